"""Checkpoints, the saved states of a training run: saves, finds, loads and prunes them."""

import contextlib
import json
import math
import os
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch.distributed import is_initialized
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from cogvideox.base_model import BaseModel
from cogvideox.lora import Export
from cogvideox.lora_files import LORA_FILE, TRANSFORMER_FOLDER
from files import TEMPORARY, CannotContinue, publish, publish_folder, restore_folder, write_json
from run import course, guard, rate_search, stopping
from run.manifest import read_manifest, write_manifest
from run.optimizers import WeightAverage
from run.processes import from_main, of_each_rank
from run.run_directory import (
    BEST_FILE,
    BEST_FOLDER,
    STATE_FILE,
    STATE_FOLDER,
    STATE_TENSORS,
    VALIDATION_FOLDER,
    check_records,
    check_writable,
    checkpoint_folder,
    list_checkpoints,
    read_args,
    read_best,
)
from run.shards import INDEX_FILE, load_shards, save_shards

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
FORMAT = 2  # of checkpoints; 1 had no manifest and recorded fewer options
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


class Start(NamedTuple):
    """Where a run starts.

    Attributes:
        checkpoint: folder to resume from; None for a fresh run.
        saved: what the checkpoint records beside its tensors; of a fresh run the position 0.
        remarks: lines on checkpoints that were passed over.
    """

    checkpoint: Path | None
    saved: dict
    remarks: tuple[str, ...] = ()

    @classmethod
    def fresh(cls) -> "Start":
        return cls(None, {"step": 0, "batches_seen": 0})

    @property
    def name(self) -> str:
        return self.checkpoint.name if self.checkpoint else ""

    @property
    def position(self) -> dict:
        """The updates done ("step") and the micro-batches seen by all ranks ("batches_seen")."""
        return {name: self.saved[name] for name in ("step", "batches_seen")}


def starting_point(output_dir: Path, resume_from: str | None, *, only_look: bool = False) -> Start:
    """Returns where to start; sets damaged checkpoints aside and removes what a killed run has left half-written.

    Args:
        resume_from: a checkpoint's name or path; "latest" for the newest complete one in `output_dir`; "auto" for the
            same, or a fresh run where there is none; None for a fresh run.
        only_look: change nothing.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is damaged, or the records beside it are, or the directory holds the results of a run that got
            further.
    """
    check_writable(output_dir)
    remarks = []
    if not only_look:
        _remove_leftovers(output_dir)
        remarks += _best_aside(output_dir)
    if resume_from not in (None, "latest", "auto"):
        return _start_at(output_dir, resume_from)._replace(remarks=tuple(remarks))
    for checkpoint in reversed(list_checkpoints(output_dir) if resume_from else []):
        if not (problem := damage(checkpoint)):
            check_records(output_dir)
            return Start(checkpoint, _read_state(checkpoint), tuple(remarks))
        remarks.append(f"{checkpoint}: {problem}" if only_look else _set_aside(checkpoint, problem))
    if resume_from:
        _check_may_begin(output_dir, resume_from, remarks)
    else:
        _check_unused(output_dir)
    if not only_look:
        shutil.rmtree(output_dir / BEST_FOLDER, ignore_errors=True)  # of a run killed before its first checkpoint
    return Start.fresh()._replace(remarks=tuple(remarks))


def _set_aside(folder: Path, problem: str) -> str:
    """Renames a damaged folder, and returns a line on it."""
    aside = folder.with_name(f"damaged-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    return f"{folder}: passed over and renamed to {aside.name}: {problem}"


def _best_aside(output_dir: Path) -> list[str]:
    """Sets the best result aside if its losses cannot be read, since no later one could be compared with it."""
    try:
        is_known = isinstance(read_best(output_dir).get("validation_loss", 0.0), float | int)
        problem = None if is_known else f"its {BEST_FILE} has no validation_loss"
    except ValueError as error:
        problem = str(error)
    return [_set_aside(output_dir / BEST_FOLDER, problem)] if problem else []


def _start_at(output_dir: Path, resume_from: str) -> Start:
    candidates = [Path(resume_from).expanduser(), output_dir / resume_from]
    checkpoint = next((path for path in candidates if path.exists()), None)
    problem = damage(checkpoint) if checkpoint and checkpoint.is_dir() else "no such folder"
    if problem:
        way_out = _instead_of(checkpoint or candidates[-1], output_dir)
        raise ValueError(f"--resume_from_checkpoint {resume_from}: {problem}; {way_out}")
    saved, existing = _read_state(checkpoint), list_checkpoints(output_dir)
    later = [path.name for path in existing if int(path.name.removeprefix("checkpoint-")) > saved["step"]]
    if later:
        raise ValueError(
            f"--resume_from_checkpoint {resume_from}: {output_dir} holds {later[-1]}, which is later; resume from "
            "latest, or branch off into another --output_dir"
        )
    check_records(checkpoint.parent)
    return Start(checkpoint, saved)


def _instead_of(path: Path, output_dir: Path) -> str:
    """Returns what to pass instead of a path at which no whole checkpoint is."""
    if inside := list_checkpoints(path):
        return f"it is the folder of a run: name a checkpoint in it, such as {inside[-1]}"
    if path.suffix == ".safetensors" or ((path / LORA_FILE).is_file() and not (path / STATE_FILE).exists()):
        return "it is a LoRA without the state of a run: a new run can start from it with --lora_path"
    folder = path.parent if path.exists() else output_dir
    others = ", ".join(other.name for other in list_checkpoints(folder) if other != path)
    if folder.absolute() != output_dir.absolute():
        return f"beside it, {folder} holds {others or 'no other'}"
    if not others:
        other = "other checkpoint" if path.exists() else "checkpoint"
        return f"{folder} holds no {other}; pass auto, which then starts from the beginning"
    return f"{folder} holds {others}; name one of those, or pass auto, which resumes from the newest that is whole"


def _check_may_begin(output_dir: Path, resume_from: str, remarks: list[str]) -> None:
    """Refuses to begin a run where there is no checkpoint to resume, unless "auto" asks for that.

    "auto" may repeat a run that has only a best result.
    """
    found = f"{output_dir} holds no complete checkpoint" + (f" ({'; '.join(remarks)})" if remarks else "")
    if result := next((name for name in (LORA_FILE, TRANSFORMER_FOLDER) if (output_dir / name).exists()), None):
        start = f", with --lora_path {output_dir} to train that result further" if result == LORA_FILE else ""
        raise ValueError(
            f"--resume_from_checkpoint {resume_from}: {found}, but {result}, the result of a run that a new one would "
            f"mix with its own; start in another --output_dir{start}"
        )
    if resume_from == "latest":
        raise FileNotFoundError(
            f"--resume_from_checkpoint latest: {found}; pass auto, which then starts from the beginning"
        )


def _check_unused(output_dir: Path) -> None:
    """Refuses to begin a run where there are checkpoints or results of another."""
    results = [path for name in (BEST_FOLDER, LORA_FILE, TRANSFORMER_FOLDER) if (path := output_dir / name).exists()]
    if used := [path.name for path in (*list_checkpoints(output_dir)[-1:], *results)]:
        raise ValueError(
            f"--output_dir {output_dir}: holds {' and '.join(used)} of an earlier run, which a new run would mix with "
            "its own; continue that run with --resume_from_checkpoint auto, or choose another --output_dir"
        )


def _remove_leftovers(output_dir: Path) -> None:
    """Removes what killed processes have left half-written; the caller holds the lock of the run directory."""
    restore_folder(output_dir / BEST_FOLDER)
    for path in output_dir.glob(".*.incomplete"):
        shutil.rmtree(path)
    for folder in (output_dir, *output_dir.glob(f"{VALIDATION_FOLDER}/*")):
        for path in folder.glob(".*"):
            if TEMPORARY.fullmatch(path.name):
                path.unlink()


def damage(checkpoint: Path) -> str | None:
    """Returns what is wrong with a checkpoint; None if it is complete and its files are as they were written."""
    try:
        state = _read_state(checkpoint)
    except FileNotFoundError:
        return f"it has no {STATE_FILE}"
    except OSError as error:
        return f"its {STATE_FILE} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {STATE_FILE} is damaged ({error})"
    if state["format"] > FORMAT:
        return f"it was written by a later version of this script (format {state['format']}; this one reads {FORMAT})"
    if state["format"] > 1:
        return read_manifest(checkpoint).problem(checkpoint)
    tensors = checkpoint / STATE_TENSORS  # format 1 has no manifest, but torch's archive has a CRC for each tensor
    if state["options"]["training_type"] == "sft":
        return None if (checkpoint / STATE_FOLDER / INDEX_FILE).is_file() else f"it has no {STATE_FOLDER}"
    try:
        with zipfile.ZipFile(tensors) as archive:
            return f"its {STATE_TENSORS} is damaged" if archive.testzip() else None
    except (OSError, zipfile.BadZipFile) as error:
        return f"its {STATE_TENSORS} cannot be read ({error})"


def _read_state(checkpoint: Path) -> dict:
    """Returns what a checkpoint of any format records, as the latest format names it."""
    state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    if "format" not in state:  # format 1: the options that had to be kept, and the base model's identity among them
        options = state.pop("fixed")
        state |= {"format": 1, "base": {"identity": options.pop("transformer")}, "options": options}
    state["step"], state["batches_seen"] = int(state["step"]), int(state["batches_seen"])
    return state


def check_course(
    start: Start, options: dict, base: BaseModel, *, allowed: list[str], derived: Callable[[dict], dict]
) -> dict[str, list]:
    """Returns the options that differ from those of the checkpoint (`course.check_options_of_checkpoint`).

    Raises:
        ValueError: one of them may not differ, or the base model is another kind of CogVideoX.
    """
    if start.checkpoint is None:
        return {}
    if start.saved["base"]["identity"] != base.identity:
        raise ValueError(
            f"--resume_from_checkpoint: {start.checkpoint.name} was trained on another kind of CogVideoX than "
            "--pretrained_model_name_or_path; pass the base model that args.json beside it names"
        )
    saved = course.EARLIER | start.saved["options"] | {"processes": start.saved.get("processes", 1)}
    if saved.get("learning_rate") == rate_search.AUTO != options["learning_rate"]:  # it is compared with what was found
        saved["learning_rate"] = start.saved["lr_scheduler"]["base_lrs"][0]
    return course.check_options_of_checkpoint(start.name, saved, options, allowed=allowed, derived=derived)


# ---- save and load ---------------------------------------------------------------------------------------------------


def save_checkpoint(
    accelerator, state: State, export: Export, output_dir: Path, *, record: dict, total_limit: int | None
) -> None:
    """Publishes checkpoint-<step>, then deletes the oldest ones over the limit. Every rank must call it.

    The state of a LoRA is small: one file, which only the main rank writes and reads, so that machines need not share
    a disk. The state of a whole transformer is written by all ranks, each its shard.

    Args:
        record: what the checkpoint records beside its tensors: "step" and the rest of the position, "options",
            "processes", "base" and "data".

    Raises:
        CannotContinue: a weight is not finite, or the disk is full. Earlier checkpoints stay as they are.
    """
    final = checkpoint_folder(output_dir, record["step"])
    temporary = output_dir / f".{final.name}.incomplete"
    is_whole = record["options"]["training_type"] == "sft"
    tensors = _tensors(state, _SHARDED if is_whole else _FULL)
    weights = full_weights(state.transformer) if is_whole else tensors["transformer"]
    if state.average.decay is not None:
        weights = tensors["average"] = result_weights(state)
    _check_finite(accelerator, tensors, final.name)
    numbers = {"format": FORMAT, "lr_scheduler": state.lr_scheduler.state_dict()}
    numbers["scaler"] = accelerator.scaler.state_dict() if accelerator.scaler else None

    def begin() -> None:
        check_room(output_dir, size_of(tensors) * accelerator.num_processes if is_whole else size_of(tensors), final)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def write() -> None:
        if not is_whole:
            with open(temporary / STATE_TENSORS, "wb") as file:
                torch.save(tensors, file)
        export(weights, temporary)
        write_json(temporary / STATE_FILE, record | numbers)
        write_manifest(temporary)
        publish_folder(temporary, final)
        _prune(output_dir, total_limit)

    with full_disk_explained(output_dir, final.name):
        from_main(accelerator, begin)
        if is_whole:
            save_shards(tensors, temporary / STATE_FOLDER)
        from_main(accelerator, write)


def _prune(output_dir: Path, total_limit: int | None) -> None:
    """Deletes the oldest checkpoints over the limit."""
    for old in list_checkpoints(output_dir)[:-total_limit] if total_limit else []:
        aside = old.with_name(f".{old.name}.incomplete")
        os.rename(old, aside)  # no half-deleted folder under a checkpoint's name
        shutil.rmtree(aside)


def load_checkpoint(accelerator, state: State, start: Start, changes: list[str]) -> None:
    """Restores weights, optimizer and schedule, on any number of ranks. Every rank must call it.

    Args:
        changes: values of --change; the peak learning rate and the schedule are then those of this run.
    """
    checkpoint, peak = start.checkpoint, state.lr_scheduler.base_lrs[0]
    saved = start.saved
    if saved["options"]["training_type"] == "sft":
        tensors, options = _tensors(state, _SHARDED), _SHARDED
        load_shards(tensors, checkpoint / STATE_FOLDER)
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
    if changes:
        # What trials have found is in the schedule of the checkpoint only.
        is_found = saved["options"].get("learning_rate") == rate_search.AUTO and "learning_rate" not in changes
        is_new_peak = not is_found and not {"learning_rate", "batch"}.isdisjoint(changes)
        course.set_learning_rate(state.optimizer, state.lr_scheduler, peak if is_new_peak else None)
    if accelerator.scaler and saved["scaler"]:
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
    lowest = from_main(accelerator, partial(_lowest_loss, output_dir))
    if not losses["validation_loss"] < lowest:  # NaN is not lower
        return
    weights, best = result_weights(state), output_dir / BEST_FOLDER
    temporary = output_dir / f".{best.name}.incomplete"
    _check_finite(accelerator, weights, best.name)

    def write() -> None:
        check_room(output_dir, size_of(weights), best)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        export(weights, temporary)
        write_json(temporary / BEST_FILE, {"step": step} | losses)
        publish_folder(temporary, best)

    with full_disk_explained(output_dir, best.name):
        from_main(accelerator, write)


def _lowest_loss(output_dir: Path) -> float:
    """Returns the loss of checkpoint-best; infinity if there is none, or if other clips were held out for it."""
    best = read_best(output_dir)
    is_comparable = best.get("step", -1) > stopping.clips_changed_at(read_args(output_dir))
    return best["validation_loss"] if is_comparable else math.inf


def save_result(
    accelerator, state: State, export: Export, output_dir: Path, *, total_limit: int | None, kind: str
) -> Path:
    """Writes the result of the run and returns its path. Every rank must call it.

    Args:
        kind: "last": the weights as they are; "best": those of checkpoint-best, if there is one.
    """
    best = output_dir / BEST_FOLDER
    is_best = kind == "best" and from_main(accelerator, best.is_dir)

    def write() -> Path:
        _prune(output_dir, total_limit)  # a run that was killed after its last checkpoint may not have
        return _copy_result(best, output_dir) if is_best else export(weights, output_dir)

    if not is_best:
        weights = result_weights(state)
        _check_finite(accelerator, weights, "the result")
    with full_disk_explained(output_dir, "the result"):
        return from_main(accelerator, write)


def _copy_result(folder: Path, output_dir: Path) -> Path:
    """Publishes the LoRA or the transformer of a folder in another one; returns its path."""
    (source,) = [path for name in (LORA_FILE, TRANSFORMER_FOLDER) if (path := folder / name).exists()]
    result = output_dir / source.name
    if source.is_file():
        publish(result, source.read_bytes())
    else:
        temporary = output_dir / f".{source.name}.incomplete"
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(source, temporary)
        publish_folder(temporary, result)
    return result


def _check_finite(accelerator, tensors: dict, name: str) -> None:
    """Refuses to save numbers that are not finite, on all ranks alike."""
    found = next((key for key, tensor in _flat(tensors) if not _is_finite(tensor)), None)
    if of_each_rank(accelerator, [found is not None]).any():
        raise CannotContinue(
            f"{name} is not saved: {found or 'a weight of another process'} holds numbers that are not finite (NaN or "
            "infinity); earlier checkpoints stay. Resume from the newest with a lower --learning_rate (and --change "
            f"learning_rate); if this was fp16, {guard.OTHER_PRECISION}"
        )


def _flat(tensors, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of nested dictionaries with their names."""
    if isinstance(tensors, dict):
        for name, content in tensors.items():
            yield from _flat(content, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(tensors, torch.Tensor):
        yield prefix, tensors.to_local() if isinstance(tensors, DTensor) else tensors


def _is_finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def size_of(tensors: dict) -> int:
    """Returns the bytes of the tensors in nested dictionaries."""
    return sum(tensor.numel() * tensor.element_size() for _, tensor in _flat(tensors))


def check_room(output_dir: Path, num_bytes: int, path: Path) -> None:
    """Refuses to begin a file that the disk has no room for."""
    if (free := shutil.disk_usage(output_dir).free) < num_bytes:
        raise CannotContinue(
            f"{path}: needs {num_bytes / 2**30:.2f} GiB, and {output_dir} has {free / 2**30:.2f} GiB free. "
            f"{_what_stays(output_dir)}"
        )


@contextlib.contextmanager
def full_disk_explained(output_dir: Path, name: str) -> Iterator[None]:
    """Turns the errors of a full disk into a message."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        if not (reason := _failed_write(error)):
            raise
        raise CannotContinue(f"{output_dir}: {name} cannot be written ({reason}). {_what_stays(output_dir)}") from error


def _failed_write(error: BaseException) -> str | None:
    """Returns why something was not written, which each library reports in its own way; None for other errors."""
    if isinstance(error, CheckpointException):  # holds the errors of the ranks
        return next(filter(None, (_failed_write(failure) for failure, _ in error.failures.values())), None)
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    is_torchs = any(words in str(error) for words in ("PytorchStreamWriter", "basic_ios", "inline_container"))
    return str(error).splitlines()[0] if isinstance(error, (OSError, SafetensorError)) or is_torchs else None


def _what_stays(output_dir: Path) -> str:
    newest = list_checkpoints(output_dir)[-1:]
    stays = f"{newest[0].name} is whole" if newest else "nothing is saved yet"
    return (
        f"{stays}. Free some space (--checkpoints_total_limit 2 keeps fewer checkpoints), then start again with "
        "--resume_from_checkpoint auto"
    )


def full_weights(transformer) -> dict[str, torch.Tensor]:
    """Returns the trained weights on the CPU of the main rank, gathered one by one. Every rank must call it."""
    return get_model_state_dict(transformer, options=_FULL)


def result_weights(state: State) -> dict[str, torch.Tensor]:
    """Returns the weights of a result, by `full_weights`: the moving average, if there is one."""
    with state.average.applied(state.transformer):
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
