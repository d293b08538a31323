"""Checkpoints, the saved states of a training run: save, find, load, prune."""

import json
import math
import os
import shutil
import warnings
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
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")  # one process is meant


class State(NamedTuple):
    """What training changes."""

    transformer: torch.nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    average: WeightAverage


# ---- where to start --------------------------------------------------------------------------------------------------


def starting_point(output_dir: Path, resume_from: str | None, fixed: dict) -> tuple[Path | None, dict]:
    """The checkpoint to go on from, and where the run stands there; see `find_checkpoint` and `read_position`."""
    checkpoint = find_checkpoint(output_dir, resume_from, fixed)
    return checkpoint, read_position(checkpoint)


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
        results = (output_dir / name for name in (BEST_FOLDER, LORA_FILE, TRANSFORMER_FOLDER))
        used = [path.name for path in (*existing[-1:], *results) if path.exists()]
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
        way_out = "name one of those, or start anew in another --output_dir" if existing else "leave the option away"
        raise FileNotFoundError(
            f"--resume_from_checkpoint {resume_from}: no complete checkpoint there, {output_dir} holds {names}; "
            f"{way_out}"
        )
    if existing and _read_state(existing[-1])["step"] > _read_state(found)["step"]:
        raise ValueError(
            f"--resume_from_checkpoint {resume_from}: {output_dir} holds {existing[-1].name}, which is later; resume "
            "from latest, or branch off into another --output_dir"
        )
    _check_fixed(found, fixed)
    return found


def _check_writable(output_dir: Path) -> None:
    """Before hours of encoding, not after them."""
    there = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--output_dir {output_dir}: {there} is no folder that can be written to; choose another")


def _check_fixed(checkpoint: Path, fixed: dict) -> None:
    saved = _read_state(checkpoint)["fixed"]
    if saved.keys() != fixed.keys():
        raise ValueError(
            f"--resume_from_checkpoint: {checkpoint.name} was written by another version of this script, which had "
            "other options; go on with that version, or start anew from its result"
        )
    if saved["transformer"] != fixed["transformer"]:
        raise ValueError(
            f"--resume_from_checkpoint: {checkpoint.name} was trained on another kind of CogVideoX than that of "
            "--pretrained_model_name_or_path; pass the one that args.json beside it names"
        )
    others = [
        f"--{name} {_typed(value)}: {checkpoint.name} was trained with {_typed(saved[name])}"
        for name, value in fixed.items()
        if saved[name] != value
    ]
    if others:
        raise ValueError(
            f"{'; '.join(others)}. Resuming continues that: pass the same, or start a new run in another --output_dir"
        )


def _typed(value) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)


def read_position(checkpoint: Path | None) -> dict:
    """Where a run stands: updates done ("step") and micro-batches seen by all ranks ("batches_seen")."""
    state = _read_state(checkpoint) if checkpoint else {"step": 0, "batches_seen": 0}
    return {name: state[name] for name in ("step", "batches_seen")}


def _read_state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))


# ---- save and load ---------------------------------------------------------------------------------------------------


def save_checkpoint(
    accelerator,
    state: State,
    export: Export,
    output_dir: Path,
    *,
    position: dict,
    fixed: dict,
    total_limit: int | None,
) -> None:
    """Publishes checkpoint-<step>, then removes the oldest ones over the limit; to be called by every rank.

    A LoRA's state is small and lies in one file, written and read by the main rank alone, so that machines need not
    share a disk. That of a whole transformer is written by all ranks, each its shard.

    Args:
        export: writes the trained weights as a result.
        position: "step" and "batches_seen", what `read_position` is to give back.
        fixed: options that a resumed run must share.
    """
    final = checkpoint_folder(output_dir, position["step"])
    temporary = output_dir / f".{final.name}.incomplete"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed here
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    if fixed["training_type"] == "sft":
        weights = full_weights(state.transformer)
        dcp.save(_tensors(state, _SHARDED), checkpoint_id=temporary / STATE_FOLDER, no_dist=not is_initialized())
    else:
        tensors = _tensors(state, _FULL)
        weights = tensors["transformer"]
        if state.average.decay is not None:
            weights = tensors["average"] = averaged_weights(state)
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
        for old in list_checkpoints(output_dir)[: -total_limit if total_limit else 0]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator, state: State, checkpoint: Path) -> None:
    """Puts weights, optimizer and schedule back, on any number of ranks; to be called by every rank."""
    numbers = broadcast_object_list([_read_state(checkpoint) if accelerator.is_main_process else None])[0]
    if numbers["fixed"]["training_type"] == "sft":
        tensors, options = _tensors(state, _SHARDED), _SHARDED
        dcp.load(tensors, checkpoint_id=checkpoint / STATE_FOLDER, no_dist=not is_initialized())
    else:
        tensors, options = {"transformer": {}, "optimizer": {}, "average": {}}, replace(_FULL, cpu_offload=False)
        options = replace(options, broadcast_from_rank0=is_initialized())
        if accelerator.is_main_process:
            tensors = torch.load(checkpoint / STATE_TENSORS, map_location="cpu", weights_only=True)
        _know_all_numbers(state.optimizer, tensors["optimizer"])
    # Not set_state_dict: it leaves the weights of a rank alone that brings none, and the others wait for that for ever.
    set_weights = partial(set_model_state_dict, state.transformer, options=replace(options, strict=False))
    if state.average.decay is not None:
        set_weights(tensors["average"])
        state.average.restart(numbers["step"])
    set_weights(tensors["transformer"])
    set_optimizer_state_dict(
        state.transformer, _plain(state.optimizer), optim_state_dict=tensors["optimizer"], options=options
    )
    state.lr_scheduler.load_state_dict(numbers["lr_scheduler"])
    if accelerator.scaler:
        accelerator.scaler.load_state_dict(numbers["scaler"])


def _know_all_numbers(optimizer, saved: dict) -> None:
    """Gives the groups of a fresh optimizer those entries that Prodigy makes as it goes.

    torch 2.13 fails on an entry of a checkpoint that the optimizer does not have yet.
    """
    groups = [
        {name: value for name, value in group.items() if name != "params"} for group in saved.get("param_groups", [])
    ]
    for ours, theirs in zip(optimizer.param_groups, broadcast_object_list([groups])[0], strict=True):
        ours |= {name: value for name, value in theirs.items() if name not in ours}


def save_best(accelerator, state: State, export: Export, output_dir: Path, *, step: int, losses: dict) -> None:
    """Publishes the result as checkpoint-best if its validation loss is the lowest so far; for every rank to call."""
    best, better = output_dir / BEST_FOLDER, None
    if accelerator.is_main_process:
        lowest = read_best(output_dir).get("validation_loss", math.inf)
        better = losses["validation_loss"] < lowest
    if not broadcast_object_list([better])[0]:
        return
    weights = averaged_weights(state)
    if accelerator.is_main_process:
        temporary = output_dir / f".{best.name}.incomplete"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        export(weights, temporary)
        write_json(temporary / BEST_FILE, {"step": step} | losses)
        shutil.rmtree(best, ignore_errors=True)
        publish_folder(temporary, best)


def full_weights(transformer) -> dict[str, torch.Tensor]:
    """The trained weights on the CPU of the main rank, gathered one by one; to be called by every rank."""
    return get_model_state_dict(transformer, options=_FULL)


def averaged_weights(state: State) -> dict[str, torch.Tensor]:
    """As `full_weights`, of what becomes a result: the moving average, if there is one."""
    with state.average.applied():
        weights = full_weights(state.transformer)
        # On a CPU they are the model's own memory.
        return weights if state.average.decay is None else {name: tensor.clone() for name, tensor in weights.items()}


def _tensors(state: State, options: StateDictOptions) -> dict:
    weights, optimizer = get_state_dict(state.transformer, _plain(state.optimizer), options=options)
    return {"transformer": weights, "optimizer": optimizer}


def _plain(optimizer) -> torch.optim.Optimizer:
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
