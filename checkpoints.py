"""The run directory: save, find, prune, resume, and export of the trained weights.

output_dir/
  pytorch_lora_weights.safetensors   the result
  checkpoint-500/                    complete or absent; holds its own pytorch_lora_weights.safetensors
  validation/step-000500/*.mp4
  metrics.jsonl                      one line per logged step
  args.json                          what was run
"""

import json
import math
import os
import resource
import shutil
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import ModelCardData, create_repo, upload_folder
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save

from cogvideox import Checkpoint
from dataset import publish

LORA_FILE = "pytorch_lora_weights.safetensors"
STATE_FILE = "training_state.json"
METRICS_FILE = "metrics.jsonl"


# ---- the trained weights ---------------------------------------------------------------------------------------------


def save_lora(transformer, folder: Path, checkpoint: Checkpoint) -> None:
    """Writes the adapter as diffusers' `load_lora_weights(folder)` reads it, at its trained strength.

    diffusers applies any file without `lora_adapter_metadata` at 1.0, whatever alpha was. The metadata is kept to what
    LoraConfig has always had, since an older peft refuses fields that it does not know.
    """
    config = transformer.peft_config["default"]
    adapter = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.target_modules)}
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in adapter.items()}),
        "base_model": checkpoint.name,
        "cogvideox_transformer": json.dumps(checkpoint.identity),
    }
    weights = {f"transformer.{name}": weight.cpu() for name, weight in get_peft_model_state_dict(transformer).items()}
    publish(folder / LORA_FILE, save(weights, metadata))


def load_lora(transformer, folder: Path) -> None:
    """Puts a saved adapter's weights back into the adapter that `transformer` already has."""
    weights = {name.removeprefix("transformer."): weight for name, weight in load_file(folder / LORA_FILE).items()}
    expected = get_peft_model_state_dict(transformer)
    assert weights.keys() == expected.keys(), "resume checks that the adapter's options are those of the checkpoint"
    set_peft_model_state_dict(transformer, weights)


def register_lora_hooks(accelerator, checkpoint) -> None:
    """Makes accelerate's save_state and load_state keep the adapter alone: the frozen weights are on disk already."""

    def save(models, weights, output_dir):
        if accelerator.is_main_process:
            for model in models:
                save_lora(accelerator.unwrap_model(model), Path(output_dir), checkpoint)
        weights.clear()

    def load(models, input_dir):
        while models:
            load_lora(accelerator.unwrap_model(models.pop()), Path(input_dir))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def _check_writable(output_dir: Path) -> None:
    """Before hours of encoding, not after them."""
    there = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--output_dir {output_dir}: {there} is no folder that can be written to; choose another")


def find_checkpoint(output_dir: Path, resume_from: str | None, fixed: dict) -> Path | None:
    """The checkpoint to go on from; None for a fresh run.

    Args:
        fixed: options that resuming would silently overrule with those of the checkpoint.

    Raises:
        FileNotFoundError: the checkpoint asked for is not there.
        ValueError: it was made with other `fixed` options, or the directory holds what a run made that went further.
    """
    _check_writable(output_dir)
    existing = list_checkpoints(output_dir)
    names = ", ".join(path.name for path in existing) or "no checkpoint"
    if resume_from is None:
        used = [path.name for path in (*existing[-1:], output_dir / LORA_FILE) if path.exists()]
        if used:
            raise ValueError(
                f"--output_dir {output_dir}: holds {' and '.join(used)} of an earlier run, which a new run would mix "
                "with its own; go on with it by --resume_from_checkpoint latest, or choose another --output_dir"
            )
        return None
    candidates = (
        existing[-1:] if resume_from == "latest" else [Path(resume_from).expanduser(), output_dir / resume_from]
    )
    found = next((path for path in candidates if (path / STATE_FILE).is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"--resume_from_checkpoint {resume_from}: no complete checkpoint there, {output_dir} holds {names}; "
            "name one of those, or leave the option away to start anew"
        )
    if existing and _read_state(existing[-1])["step"] > _read_state(found)["step"]:
        raise ValueError(
            f"--resume_from_checkpoint {resume_from}: {output_dir} holds {existing[-1].name}, which is later; resume "
            "from latest, or branch off into another --output_dir"
        )
    _check_fixed(found, fixed)
    return found


def _check_fixed(checkpoint: Path, fixed: dict) -> None:
    saved = _read_state(checkpoint)["fixed"]
    if saved["transformer"] != fixed["transformer"]:
        raise ValueError(
            f"--resume_from_checkpoint: {checkpoint.name} was trained on another kind of CogVideoX than that of "
            "--pretrained_model_name_or_path; pass the one that args.json beside it names"
        )
    others = [
        f"--{name} {value}: {checkpoint.name} was trained with {saved[name]}"
        for name, value in fixed.items()
        if saved[name] != value
    ]
    if others:
        raise ValueError(
            f"{'; '.join(others)}. Resuming continues that: pass the same, or start a new run in another --output_dir"
        )


def save_checkpoint(accelerator, output_dir: Path, position: dict, fixed: dict, total_limit: int | None) -> None:
    """Publishes checkpoint-<step>, then removes the oldest ones over the limit; to be called by every rank.

    Args:
        position: "step" and "batches_seen", what `read_position` is to give back.
        fixed: options that a resumed run must share.
    """
    final = output_dir / f"checkpoint-{position['step']}"
    temporary = output_dir / f".{final.name}.incomplete"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed here
    accelerator.wait_for_everyone()
    accelerator.save_state(temporary)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(temporary / STATE_FILE, position | {"fixed": fixed})
        os.rename(temporary, final)
        for old in list_checkpoints(output_dir)[: -total_limit if total_limit else 0]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator, checkpoint: Path) -> None:
    """Puts weights, optimizer, schedule and random state back; to be called by every rank."""
    accelerator.load_state(checkpoint)
    # accelerate counts micro-batches on, but we only stop between updates, and the next may have more of them.
    accelerator.step = 0


def read_position(checkpoint: Path | None) -> dict:
    """Where a run stands: updates done ("step") and micro-batches seen by all ranks ("batches_seen")."""
    state = _read_state(checkpoint) if checkpoint else {"step": 0, "batches_seen": 0}
    return {name: state[name] for name in ("step", "batches_seen")}


def _read_state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))


# ---- records ---------------------------------------------------------------------------------------------------------


def write_json(path: Path, content: dict) -> None:
    publish(path, (json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n").encode())


def peak_memory_gib(device: torch.device) -> float:
    """Of the GPU since the start, or of the process where it trains on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


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


def write_run(output_dir: Path, run: dict, step: int) -> None:
    """Writes args.json, and takes the rows after `step` out of metrics.jsonl: the resumed run writes them again."""
    packages = ("torch", "diffusers", "transformers", "accelerate", "peft")
    write_json(output_dir / "args.json", run | {"versions": {package: version(package) for package in packages}})
    rows = [row for row in read_metrics(output_dir) if row["step"] <= step]
    publish(output_dir / METRICS_FILE, "".join(json.dumps(row) + "\n" for row in rows).encode())


# ---- the hub ---------------------------------------------------------------------------------------------------------

MODEL_CARD = """---
{header}
---
# CogVideoX LoRA

A LoRA for {base}, rank {rank}, alpha {alpha}.

```python
import torch
from diffusers import CogVideoXPipeline
from diffusers.utils import export_to_video

pipe = CogVideoXPipeline.from_pretrained("{base}", torch_dtype=torch.bfloat16).to("cuda")
pipe.load_lora_weights("{repo}")  # at the strength it was trained at
export_to_video(pipe("{prompt}").frames[0], "video.mp4", fps={fps})
```
"""


def create_hub_repo(name: str, token: str | None) -> str:
    """The full name of the repository, made at the start so that a wrong token is found before training."""
    try:
        return create_repo(name, token=token, exist_ok=True).repo_id
    except Exception as error:  # without a network it is one of the HTTP library below, which changes with versions
        raise ValueError(
            f"--push_to_hub: cannot create {name} ({str(error).strip().splitlines()[0]}); log in with `hf auth login`, "
            "or pass --hub_token, or leave --push_to_hub away"
        ) from error


def model_card(repo: str, checkpoint: Checkpoint, options: dict) -> str:
    # The hub refuses a card whose base_model is not one of its own names.
    base = {"base_model": checkpoint.name} if not Path(checkpoint.name).is_dir() else {}
    header = ModelCardData(library_name="diffusers", tags=["cogvideox", "lora", "text-to-video"], **base)
    prompt = (options["validation_prompt"] or "a prompt").split(options["validation_prompt_separator"])[0]
    return MODEL_CARD.format(
        header=header.to_yaml(), base=checkpoint.name if base else Path(checkpoint.name).name, repo=repo,
        rank=options["rank"], alpha=options["lora_alpha"], prompt=prompt.strip().replace('"', "'"), fps=options["fps"],
    )  # fmt: skip


def push_to_hub(repo: str, output_dir: Path, checkpoint: Checkpoint, options: dict, token: str | None) -> None:
    """Uploads the result, a card and the validation videos; not the checkpoints."""
    publish(output_dir / "README.md", model_card(repo, checkpoint, options).encode())
    patterns = ["README.md", LORA_FILE, "validation/**", "args.json", METRICS_FILE]
    upload_folder(repo_id=repo, folder_path=output_dir, allow_patterns=patterns, token=token)
