"""Checkpoints, the saved states of a training run: saves, finds, loads and prunes them."""

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast_object_list
from torch.distributed import is_initialized
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from cogvideox.lora import Export
from cogvideox.lora_files import LORA_FILE, TRANSFORMER_FOLDER
from files import publish_folder, write_json
from run.optimizers import WeightAverage
from run.processes import from_main
from run.run_directory import (
    BEST_FILE,
    BEST_FOLDER,
    STATE_FILE,
    STATE_FOLDER,
    STATE_TENSORS,
    checkpoint_folder,
    list_checkpoints,
    read_best,
)

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
_SHARDED = StateDictOptions(ignore_frozen_params=True)
# A run of one process needs no process group.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


class State(NamedTuple):
    """Everything that training changes."""

    transformer: torch.nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    average: WeightAverage


# ---- where to start --------------------------------------------------------------------------------------------------


def starting_point(
    output_dir: Path, resume_from: str | None, fixed: dict, derived: Callable[[dict], dict]
) -> tuple[Path | None, dict]:
    """Returns the checkpoint to resume from, None for a fresh run, and the position to start at (`read_position`).

    Args:
        fixed: options that a resumed run must share with its checkpoint, which would silently overrule them.
        derived: returns, from such options, the ones that follow from others unless they are given.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: its `fixed` options differ, or the directory holds the results of a run that got further.
    """
    _check_writable(output_dir)
    if resume_from is None:
        _check_unused(output_dir)
        return None, read_position(None)
    checkpoint = _find_checkpoint(output_dir, resume_from)
    _check_fixed(checkpoint, fixed, derived)
    return checkpoint, read_position(checkpoint)


def _check_writable(output_dir: Path) -> None:
    """Refuses a directory that cannot be written to before hours of encoding, not after them."""
    existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"--output_dir {output_dir}: {existing} is not a writable folder; choose another one")


def _check_unused(output_dir: Path) -> None:
    results = (output_dir / name for name in (BEST_FOLDER, LORA_FILE, TRANSFORMER_FOLDER))
    used = [path.name for path in (*list_checkpoints(output_dir)[-1:], *results) if path.exists()]
    if used:
        raise ValueError(
            f"--output_dir {output_dir}: holds {' and '.join(used)} of an earlier run, which a new run would mix with "
            "its own; continue that run with --resume_from_checkpoint latest, or choose another --output_dir"
        )


def _find_checkpoint(output_dir: Path, resume_from: str) -> Path:
    existing = list_checkpoints(output_dir)
    if resume_from == "latest":
        candidates = existing[-1:]
    else:
        candidates = [Path(resume_from).expanduser(), output_dir / resume_from]
    checkpoint = next((path for path in candidates if (path / STATE_FILE).is_file()), None)
    if checkpoint is None:
        names = ", ".join(path.name for path in existing) or "no checkpoint"
        way_out = "name one of those, or start anew in another --output_dir" if existing else "leave the option out"
        raise FileNotFoundError(
            f"--resume_from_checkpoint {resume_from}: no complete checkpoint there; {output_dir} holds {names}; "
            f"{way_out}"
        )
    if existing and _read_state(existing[-1])["step"] > _read_state(checkpoint)["step"]:
        raise ValueError(
            f"--resume_from_checkpoint {resume_from}: {output_dir} holds {existing[-1].name}, which is later; resume "
            "from latest, or branch off into another --output_dir"
        )
    return checkpoint


def _check_fixed(checkpoint: Path, fixed: dict, derived: Callable[[dict], dict]) -> None:
    saved = _read_state(checkpoint)["fixed"]
    if saved.keys() != fixed.keys():
        raise ValueError(
            f"--resume_from_checkpoint: {checkpoint.name} was written by a version of this script with other options; "
            "resume it with that version, or start a new run from its result"
        )
    if saved["transformer"] != fixed["transformer"]:
        raise ValueError(
            f"--resume_from_checkpoint: {checkpoint.name} was trained on another kind of CogVideoX than "
            "--pretrained_model_name_or_path; pass the base model that args.json beside it names"
        )
    ours, theirs = derived(fixed), derived(saved)
    differing = [
        f"--{name} {_as_typed(value)}: {checkpoint.name} was trained with {_as_typed(saved[name])}"
        for name, value in fixed.items()
        # What follows from another option on both sides was not given: that other one is listed.
        if saved[name] != value and not (name in ours and (ours[name], theirs[name]) == (value, saved[name]))
    ]
    if differing:
        raise ValueError(
            f"{'; '.join(differing)}. A resumed run keeps the options of its checkpoint: pass the same ones, or start "
            "a new run in another --output_dir"
        )


def _as_typed(value) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)


def read_position(checkpoint: Path | None) -> dict:
    """Returns the updates done ("step") and the micro-batches seen by all ranks ("batches_seen"); 0 without one."""
    state = _read_state(checkpoint) if checkpoint else {"step": 0, "batches_seen": 0}
    return {name: state[name] for name in ("step", "batches_seen")}


def _read_state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))


# ---- save and load ---------------------------------------------------------------------------------------------------


def save_checkpoint(
    accelerator, state: State, export: Export, output_dir: Path, *, position: dict, fixed: dict, total_limit: int | None
) -> None:
    """Publishes checkpoint-<step>, then deletes the oldest ones over the limit. Every rank must call it.

    The state of a LoRA is small: one file, which only the main rank writes and reads, so that machines need not share
    a disk. The state of a whole transformer is written by all ranks, each its shard.

    Args:
        position: "step" and "batches_seen", for `read_position` to return.
        fixed: options that a resumed run must share.
    """
    final = checkpoint_folder(output_dir, position["step"])
    temporary = output_dir / f".{final.name}.incomplete"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed here
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    if fixed["training_type"] == "sft":
        weights = full_weights(state.transformer)
        dcp.save(_tensors(state, _SHARDED), checkpoint_id=temporary / STATE_FOLDER, no_dist=not is_initialized())
    else:
        tensors = _tensors(state, _FULL)
        weights = tensors["transformer"]
        if state.average.decay is not None:
            weights = tensors["average"] = result_weights(state)
        if accelerator.is_main_process:
            torch.save(tensors, temporary / STATE_TENSORS)
    if accelerator.is_main_process:
        export(weights, temporary)
        numbers = {"lr_scheduler": state.lr_scheduler.state_dict()}
        numbers["scaler"] = accelerator.scaler.state_dict() if accelerator.scaler else None
        write_json(temporary / STATE_FILE, position | {"fixed": fixed} | numbers)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        publish_folder(temporary, final)
        if total_limit:
            for old in list_checkpoints(output_dir)[:-total_limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator, state: State, checkpoint: Path) -> None:
    """Restores weights, optimizer and schedule, on any number of ranks. Every rank must call it."""
    saved = from_main(accelerator, partial(_read_state, checkpoint))
    if saved["fixed"]["training_type"] == "sft":
        tensors, options = _tensors(state, _SHARDED), _SHARDED
        dcp.load(tensors, checkpoint_id=checkpoint / STATE_FOLDER, no_dist=not is_initialized())
    else:
        tensors, options = {"transformer": {}, "optimizer": {}, "average": {}}, replace(_FULL, cpu_offload=False)
        options = replace(options, broadcast_from_rank0=is_initialized())
        if accelerator.is_main_process:
            tensors = torch.load(checkpoint / STATE_TENSORS, map_location="cpu", weights_only=True)
        _add_missing_entries(state.optimizer, tensors["optimizer"])
    # Not set_state_dict: it skips the weights on a rank that has read none, and the others wait for it for ever.
    set_weights = partial(set_model_state_dict, state.transformer, options=replace(options, strict=False))
    if state.average.decay is not None:
        set_weights(tensors["average"])
        state.average.restart(saved["step"])
    set_weights(tensors["transformer"])
    set_optimizer_state_dict(
        state.transformer, _unwrapped(state.optimizer), optim_state_dict=tensors["optimizer"], options=options
    )
    state.lr_scheduler.load_state_dict(saved["lr_scheduler"])
    if accelerator.scaler:
        accelerator.scaler.load_state_dict(saved["scaler"])


def _add_missing_entries(optimizer, saved: dict) -> None:
    """Adds to the groups of a fresh optimizer the entries that Prodigy creates while it trains.

    torch 2.13 fails on an entry of a checkpoint that the optimizer does not have yet.
    """
    groups = [
        {name: value for name, value in group.items() if name != "params"} for group in saved.get("param_groups", [])
    ]
    for ours, theirs in zip(optimizer.param_groups, broadcast_object_list([groups])[0], strict=True):
        ours |= {name: value for name, value in theirs.items() if name not in ours}


def save_best(accelerator, state: State, export: Export, output_dir: Path, *, step: int, losses: dict) -> None:
    """Publishes the result as checkpoint-best if its loss is the lowest so far. Every rank must call it.

    Args:
        losses: of held-out clips; "validation_loss" decides.
    """
    lowest = from_main(accelerator, lambda: read_best(output_dir).get("validation_loss", math.inf))
    if not losses["validation_loss"] < lowest:  # NaN is not lower
        return
    weights, best = result_weights(state), output_dir / BEST_FOLDER
    if accelerator.is_main_process:
        temporary = output_dir / f".{best.name}.incomplete"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        export(weights, temporary)
        write_json(temporary / BEST_FILE, {"step": step} | losses)
        shutil.rmtree(best, ignore_errors=True)
        publish_folder(temporary, best)


def full_weights(transformer) -> dict[str, torch.Tensor]:
    """Returns the trained weights on the CPU of the main rank, gathered one by one. Every rank must call it."""
    return get_model_state_dict(transformer, options=_FULL)


def result_weights(state: State) -> dict[str, torch.Tensor]:
    """Returns the weights of a result, by `full_weights`: the moving average, if there is one."""
    with state.average.applied():
        weights = full_weights(state.transformer)
        if state.average.decay is None:
            return weights
        # On a CPU they are the model's own tensors, which soon hold the weights in training again.
        return {name: tensor.clone() for name, tensor in weights.items()}


def _tensors(state: State, options: StateDictOptions) -> dict:
    weights, optimizer = get_state_dict(state.transformer, _unwrapped(state.optimizer), options=options)
    return {"transformer": weights, "optimizer": optimizer}


def _unwrapped(optimizer) -> torch.optim.Optimizer:
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
