"""The run directory: the name of every file in it, its metrics, and what was run.

output_dir/
  pytorch_lora_weights.safetensors   the result; of a whole transformer, the folder transformer/
  checkpoint-500/                    complete or absent; holds a result of its own
  checkpoint-best/                   the result with the lowest loss on held-out clips, and best.json with its figures
  validation/step-000500/*.mp4       and prompts.json: the prompt of each video
  metrics.jsonl                      one line per logged step
  args.json                          what was run
  report.html                        the page of the run
"""

import json
import math
import resource
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

from files import publish, write_json

STATE_FILE = "training_state.json"
STATE_TENSORS = "training_state.pt"  # of a LoRA
STATE_FOLDER = "training_state"  # of a whole transformer
BEST_FOLDER = "checkpoint-best"
BEST_FILE = "best.json"  # in BEST_FOLDER: its step and losses
VALIDATION_FOLDER = "validation"
PROMPTS_FILE = "prompts.json"  # in the folder of each step
METRICS_FILE = "metrics.jsonl"
ARGS_FILE = "args.json"
REPORT_FILE = "report.html"


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    return output_dir / f"checkpoint-{step}"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


# ---- validation videos -----------------------------------------------------------------------------------------------


class ValidationVideos(NamedTuple):
    """The validation videos of one step."""

    step: int
    folder: Path
    prompts: dict[str, str]  # by file name


def write_validation_videos(output_dir: Path, step: int, videos: Iterable[tuple[str, str, bytes]]) -> Path:
    """Publishes videos (name, prompt, mp4), then the file that says they are complete; returns their folder."""
    folder, prompts = _validation_folder(output_dir, step), {}
    for name, prompt, mp4 in videos:
        publish(folder / name, mp4)
        prompts[name] = prompt
    write_json(folder / PROMPTS_FILE, prompts)
    return folder


def read_validation_videos(output_dir: Path) -> list[ValidationVideos]:
    """The steps with validation videos, the base model (step 0) first."""
    found = []
    for path in (output_dir / VALIDATION_FOLDER).glob(f"step-*/{PROMPTS_FILE}"):
        step = path.parent.name.removeprefix("step-")
        if step.isdecimal():
            found.append(ValidationVideos(int(step), path.parent, read_json(path)))
    return sorted(found)


def _validation_folder(output_dir: Path, step: int) -> Path:
    return output_dir / VALIDATION_FOLDER / f"step-{step:06d}"


def validated(output_dir: Path, step: int, with_loss: bool) -> bool:
    """Whether a validation after this update has been completed."""
    if with_loss:
        return any(row["step"] == step and "validation_loss" in row for row in read_metrics(output_dir))
    return (_validation_folder(output_dir, step) / PROMPTS_FILE).exists()


# ---- metrics ---------------------------------------------------------------------------------------------------------


def log_row(accelerator, output_dir: Path, row: dict, group: str = "train") -> dict:
    """Writes a row of numbers, and the memory with it, to metrics.jsonl and the trackers."""
    row = row | {"peak_memory_gib": round(peak_memory_gib(accelerator.device), 3)}
    if accelerator.is_main_process:
        append_metrics(output_dir, row)
    shown = {f"{group}/{name.removeprefix(f'{group}_')}": value for name, value in row.items() if name != "step"}
    accelerator.log(shown, step=row["step"])
    return row


def append_metrics(output_dir: Path, row: dict) -> None:
    with open(output_dir / METRICS_FILE, "a", encoding="utf-8") as file:
        # JSON has no infinity, which a gradient in float16 may have.
        row = {name: value if math.isfinite(value) else None for name, value in row.items()}
        file.write(json.dumps(row) + "\n")


def read_metrics(output_dir: Path) -> list[dict]:
    """Rows of metrics.jsonl; a last line that a killed process left half-written is not one."""
    path = output_dir / METRICS_FILE
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def smoothed_loss(output_dir: Path) -> float | None:
    """Where the smoothed loss of an earlier start stands; after `start_records`."""
    return next((row["loss_smoothed"] for row in reversed(read_metrics(output_dir)) if "loss_smoothed" in row), None)


def peak_memory_gib(device: torch.device) -> float:
    """Of the GPU since it was last reset, or of the process, since its start, where it trains on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# ---- what was run ----------------------------------------------------------------------------------------------------


def start_records(accelerator, output_dir: Path, tracker_name: str, about: dict, options: dict, step: int) -> None:
    """Opens the trackers, and writes args.json and what metrics.jsonl holds up to `step`."""
    options = {name: value for name, value in options.items() if name != "hub_token"}
    # Numbers stay numbers, to be sorted and compared by; tensorboard refuses what is neither these nor text.
    config = {name: value if isinstance(value, (bool, int, float)) else str(value) for name, value in options.items()}
    accelerator.init_trackers(tracker_name, config)
    if accelerator.is_main_process:
        write_run(output_dir, about | {"options": options}, step)


def write_run(output_dir: Path, run: dict, step: int) -> None:
    """Writes args.json, and takes the rows after `step` out of metrics.jsonl: the resumed run writes them again."""
    packages = ("torch", "diffusers", "transformers", "accelerate", "peft")
    write_json(output_dir / ARGS_FILE, run | {"versions": {package: version(package) for package in packages}})
    rows = [row for row in read_metrics(output_dir) if row["step"] <= step]
    publish(output_dir / METRICS_FILE, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_args(output_dir: Path) -> dict:
    return read_json(output_dir / ARGS_FILE)


def read_best(output_dir: Path) -> dict:
    """Step and losses of `BEST_FOLDER`; empty where there is none."""
    return read_json(output_dir / BEST_FOLDER / BEST_FILE)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
