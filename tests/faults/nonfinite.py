"""NaN, infinity and huge numbers in latents, captions, losses and gradients: skipped, named, and never saved."""

import itertools
import json
import threading
from functools import partial
from math import inf, nan
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from faults import harness
from faults.harness import World
from run.checkpoints import damage
from run.run_directory import list_checkpoints, read_metrics

PARTS = ("parameters", "prompt_embeds", "loss", "gradient")
VALUES = (nan, inf, 1e38)
UPDATES = 7
ACCUMULATION = 2
COURSE = {
    "max_train_steps": UPDATES, "checkpointing_steps": 2, "checkpoints_total_limit": 1, "learning_rate": 1e-3,
    "gradient_accumulation_steps": ACCUMULATION, "ema_decay": 0.5, "lr_scheduler": "linear",
}  # fmt: skip
POISONED = "poisoned.json"  # beside the run directory: the clips that the fault was put into


class Poison(NamedTuple):
    """A number that is put into the second micro-batch of some updates."""

    part: str
    value: float
    updates: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.value} in {self.part}, {'updates' if len(self.updates) > 1 else 'update'} " + ", ".join(
            map(str, self.updates)
        )

    @property
    def batches(self) -> list[int]:
        return [update * ACCUMULATION - 1 for update in self.updates]


SINGLE = [Poison(*case) for case in itertools.product(PARTS, VALUES, [(1,), (4,), (UPDATES,)])]
IN_A_ROW = [Poison(part, value, (3, 4, 5)) for part in PARTS for value in (nan, inf)]
INTERRUPTED = [Poison("loss", nan, (2, 3, 5, 6))]  # two in a row, twice
CASES = {poison.name: poison for poison in (*SINGLE, *IN_A_ROW, *INTERRUPTED)}


def put(poison: Poison, note: Path) -> None:
    """Puts the number in, and notes which clip it was, by the order in which files are read."""
    harness.replace("dataset.encode_dataset", partial(_watched, poison, note))
    if poison.part == "loss":
        harness.replace("train_cogvideox_lora.update", partial(_counted, poison, "train_cogvideox_lora.training_loss"))
    if poison.part == "gradient":
        harness.replace("accelerate.Accelerator.clip_grad_norm_", partial(_with_gradient, poison))


def _watched(poison: Poison, note: Path, encode_dataset):
    """Has the n-th clip that training reads noted, and poisoned where the fault is in the data."""

    def encode(*args, **options):
        data = encode_dataset(*args, **options)
        label_of = {paths[0]: label for paths, label in zip(data.clips.latents, data.labels)}
        read, count, found, last = type(data.clips).__getitem__, itertools.count(), [], set()

        def poisoned(clips, item):
            content = read(clips, item)
            is_again = threading.current_thread() is threading.main_thread()  # the guard reads what a thread has read
            if (is_again and item in last) or (not is_again and next(count) in poison.batches):
                last.add(item)
                found.extend([] if is_again else [label_of[clips.latents[item[0]][0]]])
                note.write_text(json.dumps(found))
                if poison.part in content:
                    changed = content[poison.part].clone()
                    changed.view(-1)[::7] = poison.value
                    content = content | {poison.part: changed}
            return content

        type(data.clips).__getitem__ = poisoned
        return data

    return encode


def _counted(poison: Poison, loss_function: str, update):
    """Multiplies the loss of a micro-batch; counts inside `update` only, since the guard computes losses, too."""
    count, inside = itertools.count(), [False]

    def multiplied(training_loss):
        def loss(*args, **options):
            value = training_loss(*args, **options)
            return value * poison.value if inside[0] and next(count) in poison.batches else value

        return loss

    harness.replace(loss_function, multiplied)

    def counted(*args, **options):
        inside[0] = True
        try:
            return update(*args, **options)
        finally:
            inside[0] = False

    return counted


def _with_gradient(poison: Poison, clip_grad_norm):
    count = itertools.count(1)

    def clip(accelerator, parameters, *args, **options):
        parameters = list(parameters)
        if next(count) in poison.updates:
            parameters[0].grad.view(-1)[0] = poison.value
        return clip_grad_norm(accelerator, parameters, *args, **options)

    return clip


def leave_out(updates: tuple[int, ...]) -> None:
    """Has some updates change nothing, in a way that has nothing to do with the guard: the reference."""

    def counted(step):
        count = itertools.count(1)
        return lambda *args, **options: None if next(count) in updates else step(*args, **options)

    harness.replace("accelerate.optimizer.AcceleratedOptimizer.step", counted)
    harness.replace("run.optimizers.WeightAverage.step", counted)


def check(world: World, name: str) -> None:
    """Poisons some updates of a run.

    Raises:
        AssertionError: the clip is not named, another update differs, or a number that is not finite is saved.
    """
    poison = CASES[name]
    folder = harness.fresh(world.folder / "nonfinite" / name.replace(" ", "-").replace(",", ""))
    note = folder.with_suffix(".json")
    note.unlink(missing_ok=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    ended = harness.run(world.options(folder, **COURSE), disturb=partial(put, poison, note))
    check_saved(folder)
    rows = read_metrics(folder)
    skipped = {row["step"]: row for row in rows if "skipped_updates" in row}
    poisoned = dict(zip(poison.updates, json.loads(note.read_text())))
    is_certain = poison.value != 1e38  # with which a loss may be finite
    if is_certain:
        assert set(skipped) == set(poison.updates), f"skipped {sorted(skipped)}: {ended.output[-2000:]}"
    for step, row in skipped.items():
        assert poisoned[step] in " ".join(row["reasons"]) and "line " in poisoned[step], (poisoned[step], row)
        assert f"update {step} is skipped: not finite" in ended.output and poisoned[step] in ended.output
    if poison in IN_A_ROW:
        assert ended.codes == [3] and not ended.has_traceback, ended.output[-2000:]
        assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-2"]
        check_continues(world, folder)
        return
    assert ended.codes == [0], ended.output[-2000:]
    if set(skipped) == set(poison.updates):
        compare_with_reference(world, folder, tuple(skipped))


def check_saved(folder: Path) -> None:
    """Refuses a file that holds a number that is not finite, and a checkpoint that is not whole."""
    for path in folder.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path
    for checkpoint in list_checkpoints(folder):
        assert damage(checkpoint) is None
        for name, value in tensors_in(torch.load(checkpoint / "training_state.pt")):
            assert value.isfinite().all(), (checkpoint, name)
    json.loads(json.dumps(read_metrics(folder), allow_nan=False))


def tensors_in(content, prefix: str = ""):
    if isinstance(content, torch.Tensor):
        yield prefix, content
    elif isinstance(content, dict):
        for name, part in content.items():
            yield from tensors_in(part, f"{prefix}.{name}")


def check_continues(world: World, folder: Path) -> None:
    """Resumes from what has stayed, without the fault, and compares with a run that never had it."""
    ended = harness.run(world.options(folder, **COURSE, resume_from_checkpoint="auto"))
    assert ended.codes == [0], ended.output[-2000:]
    compare_with_reference(world, folder, ())


def compare_with_reference(world: World, folder: Path, updates: tuple[int, ...]) -> None:
    reference = world.folder / "nonfinite" / f"reference-{'-'.join(map(str, updates))}"
    harness.make_once(reference, world.options(reference, **COURSE), disturb=partial(leave_out, updates))
    ours, theirs = (
        [without_smoothing(row) for row in harness.rows_of(run) if row["step"] not in updates]
        for run in (folder, reference)
    )
    assert ours == theirs, "other updates differ"
    ours, theirs = (
        {name: value for name, value in harness.left_by(run).items() if "metrics" not in name}
        for run in (folder, reference)
    )
    difference = harness.first_difference(theirs, ours)
    assert difference is None, difference


def without_smoothing(row: dict) -> dict:
    """A skipped update has no part in the smoothed loss; in the reference it has."""
    return {name: value for name, value in row.items() if name != "loss_smoothed"}
