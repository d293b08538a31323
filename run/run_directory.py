"""The run directory: the name of every file in it, its metrics, and the record of its options.

output_dir/
  pytorch_lora_weights.safetensors   the result; with --training_type sft, the folder transformer/
  checkpoint-500/                    a training state, complete or absent, with the result at that step
  checkpoint-best/                   the result with the lowest loss on held-out clips, and best.json with its losses
  validation/step-000500/*.mp4       and prompts.json: the prompt of each video; *.png: the images that they start from
  metrics.jsonl                      one line per logged step
  args.json                          options, data, memory plan and versions of packages
  report.html                        the page of the run
"""

import fcntl
import json
import os
import resource
import socket
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from types import NoneType
from typing import NamedTuple

import torch

from files import naming, publish, write_json
from run import trackers

STATE_FILE = "training_state.json"
STATE_TENSORS = "training_state.pt"  # for a LoRA
STATE_FOLDER = "training_state"  # for a whole transformer
BEST_FOLDER = "checkpoint-best"
BEST_FILE = "best.json"  # in BEST_FOLDER: step and losses
VALIDATION_FOLDER = "validation"
PROMPTS_FILE = "prompts.json"  # in the folder of each step
LOCK_FILE = ".lock"
METRICS_FILE = "metrics.jsonl"
ARGS_FILE = "args.json"
REPORT_FILE = "report.html"


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    return output_dir / f"checkpoint-{step}"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Returns the complete checkpoints, oldest first."""
    by_step = {path.name.removeprefix("checkpoint-"): path for path in output_dir.glob("checkpoint-*")}
    return [by_step[step] for step in sorted(filter(str.isdecimal, by_step), key=int)]


@contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Keeps other runs out of the run directory for the length of a `with` block, and no longer than this process.

    Raises:
        ValueError: another run is using it, or it cannot be written to.
    """
    check_writable(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / LOCK_FILE
    while True:
        file = open(path, "a+")  # noqa: SIM115, closed below
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise ValueError(
                f"--output_dir {output_dir}: {owner} is training into it; wait for its end, or choose another one"
            ) from error
        except OSError as error:
            reason = f"this file system has no locks ({error.strerror})"
            warnings.warn(f"{output_dir}: {reason}; make sure that no other run uses it", stacklevel=2)
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # its owner has removed it meanwhile
    with naming(path):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    try:
        yield
    finally:
        with suppress(OSError):  # the folder has become read-only: no reason to hide why the run ends
            path.unlink()
        file.close()
        with suppress(OSError):  # not empty
            output_dir.rmdir()


def check_writable(output_dir: Path) -> None:
    """Refuses a directory that cannot be written to before hours of encoding, not after them."""
    existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"--output_dir {output_dir}: {existing} is not a writable folder; choose another one")


class ValidationVideos(NamedTuple):
    """The validation videos of one step."""

    step: int
    folder: Path
    prompts: dict[str, str]  # by file name


def write_validation_videos(
    output_dir: Path, step: int, videos: Iterable[tuple[str, str, bytes]], images: dict[str, bytes]
) -> Path:
    """Publishes the videos (name, prompt, mp4) and then the file that marks them complete; returns their folder.

    Args:
        images: what videos start from, by file name.
    """
    folder, prompts = validation_folder(output_dir, step), {}
    for name, content in images.items():
        publish(folder / name, content)
    for name, prompt, mp4 in videos:
        publish(folder / name, mp4)
        prompts[name] = prompt
    write_json(folder / PROMPTS_FILE, prompts)
    return folder


def read_validation_videos(output_dir: Path) -> list[ValidationVideos]:
    """Returns the validation videos of every step, ascending; step 0 is the base model."""
    validations = []
    for path in (output_dir / VALIDATION_FOLDER).glob(f"step-*/{PROMPTS_FILE}"):
        step = path.parent.name.removeprefix("step-")
        if step.isdecimal():
            validations.append(ValidationVideos(int(step), path.parent, read_json(path)))
    return sorted(validations)


def validation_folder(output_dir: Path, step: int) -> Path:
    return output_dir / VALIDATION_FOLDER / f"step-{step:06d}"


def is_validated(output_dir: Path, step: int, *, with_loss: bool) -> bool:
    """Whether the validation after update `step` is complete.

    Args:
        with_loss: it ends with the loss on held-out clips; otherwise with the videos.
    """
    if with_loss:
        return any(row["step"] == step and "validation_loss" in row for row in read_metrics(output_dir))
    return (validation_folder(output_dir, step) / PROMPTS_FILE).exists()


def log_row(accelerator, output_dir: Path, row: dict, group: str = "train") -> None:
    """Writes a row of numbers, to which it adds the peak memory, to metrics.jsonl and the trackers."""
    row = row | {"peak_memory_gib": round(peak_memory_gib(accelerator.device), 3)}
    if accelerator.is_main_process:
        append_metrics(output_dir, row)
    shown = {f"{group}/{name.removeprefix(f'{group}_')}": value for name, value in row.items() if name != "step"}
    trackers.log(accelerator, shown, row["step"])


def log_skipped(accelerator, output_dir: Path, row: dict, reasons: list[str]) -> None:
    """Writes a row on an update that was skipped, with the reasons in metrics.jsonl only: trackers take numbers."""
    if accelerator.is_main_process:
        append_metrics(output_dir, row | {"reasons": reasons})
    trackers.log(accelerator, {"train/skipped_updates": row["skipped_updates"]}, row["step"])


def append_metrics(output_dir: Path, row: dict) -> None:
    path = output_dir / METRICS_FILE
    with naming(path), open(path, "a", encoding="utf-8") as file:
        # JSON has no infinity, which the norm of a float16 gradient can be.
        row = {name: None if isinstance(value, float) and not isfinite(value) else value for name, value in row.items()}
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_metrics(output_dir: Path) -> list[dict]:
    """Returns the rows of metrics.jsonl, without a last line that a killed process left half-written.

    Raises:
        ValueError: a line is not a row; the message names it.
    """
    path, rows = output_dir / METRICS_FILE, []
    for number, line in enumerate((_read_text(path, errors="replace") or "").splitlines(keepends=True), 1):
        if line.endswith("\n"):
            try:
                row = json.loads(line)
                row["step"] = int(row["step"])
                _check_numbers(row)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path}: line {number} is no row of metrics ({line.strip()[:60]}); remove the line, or move the "
                    "file away: training needs none of it"
                ) from error
            rows.append(row)
    return rows


def _check_numbers(row: dict) -> None:
    wrong = [name for name, value in row.items() if name != "reasons" and not isinstance(value, (int, float, NoneType))]
    if wrong:
        raise TypeError(f"{wrong[0]} is no number")


def base_motion(output_dir: Path) -> float | None:
    """Returns how much the base model's validation videos move; None if that was not measured."""
    return next((row.get("validation_motion") for row in read_metrics(output_dir) if row["step"] == 0), None)


def smoothed_loss(output_dir: Path) -> float | None:
    """Returns the last smoothed loss that is recorded, None in a fresh run.

    To be called after `start_records`, which removes the rows that the resumed run writes again.
    """
    return next((row["loss_smoothed"] for row in reversed(read_metrics(output_dir)) if "loss_smoothed" in row), None)


def skipped_updates(output_dir: Path) -> int:
    """Returns the number of updates that were skipped so far."""
    return max((row.get("skipped_updates", 0) for row in read_metrics(output_dir)), default=0)


def peak_memory_gib(device: torch.device) -> float:
    """Returns the peak of a GPU's memory since its last reset; on a CPU, the peak of the process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def start_records(
    accelerator, output_dir: Path, tracker_name: str, record: dict, *, resumed_from: Path | None, changed: dict
) -> None:
    """Opens the trackers, writes args.json, and removes the rows of metrics.jsonl that a resumed run writes again.

    A run that branches off from another one begins with that one's rows.

    Args:
        record: what args.json holds beside the versions of packages and the lineage; "options" are those of the
            training script, "step" the updates done before this start.
        resumed_from: checkpoint; None in a fresh run.
        changed: what differs from the checkpoint, {option: [saved, now]}.
    """
    options = {name: value for name, value in record["options"].items() if name != "hub_token"}
    # Trackers sort and compare by numbers; tensorboard refuses whatever is neither a number nor text.
    config = {name: value if isinstance(value, (bool, int, float)) else str(value) for name, value in options.items()}
    # accelerate gives trackers of files their folder, except this one.
    wandb = {"dir": os.environ.get("WANDB_DIR", accelerator.logging_dir)}
    trackers.start(accelerator, tracker_name, config, {"wandb": wandb})
    if accelerator.is_main_process:
        versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate", "peft")}
        lineage = []
        if resumed_from:
            own = {"checkpoint": str(resumed_from), "step": record["step"], "changed": changed}
            lineage = [*read_args(resumed_from.parent).get("lineage", []), own]
        own_record = {"options": options, "versions": versions, "lineage": lineage}
        write_json(output_dir / ARGS_FILE, record | own_record)
        rows = read_metrics(resumed_from.parent) if resumed_from else []
        rows = [row for row in rows if row["step"] <= record["step"]]
        publish(output_dir / METRICS_FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def check_records(output_dir: Path) -> None:
    """Refuses damaged records, to which a resumed run adds, before hours of encoding."""
    read_args(output_dir)
    read_metrics(output_dir)


def read_args(output_dir: Path) -> dict:
    """Returns what args.json holds; empty where there is none.

    Raises:
        ValueError: it is damaged.
    """
    path = output_dir / ARGS_FILE
    content = read_json(path)
    lineage = content.get("lineage", [])
    if not isinstance(lineage, list) or not all(isinstance(start, dict) and "checkpoint" in start for start in lineage):
        raise _damaged(path, "its lineage is no list of checkpoints")
    return content


def read_best(output_dir: Path) -> dict:
    """Returns the step and the losses of `BEST_FOLDER`; empty where there is none."""
    return read_json(output_dir / BEST_FOLDER / BEST_FILE)


def read_json(path: Path) -> dict:
    """Returns what a file holds; empty where there is no file.

    Raises:
        ValueError: it is damaged; the message names it.
    """
    text = _read_text(path)
    try:
        content = {} if text is None else json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("it holds no names and values")
        return content
    except ValueError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, reason: object) -> ValueError:
    return ValueError(f"{path}: damaged ({reason}); move it away, training does not need it")


def _read_text(path: Path, errors: str = "strict") -> str | None:
    """Returns the text of a file, None where there is none.

    Raises:
        ValueError: it is a folder.
    """
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, and must be a file; move it away, training does not need it")
    return path.read_text(encoding="utf-8", errors=errors) if path.exists() else None
