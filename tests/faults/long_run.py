"""A long run: memory and open files stay as they are, and what it costs that the ranks agree on each update."""

import itertools
import json
import os
import statistics
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from faults import harness
from faults.harness import World

MEMORY_GROWTH_MIB = 12  # of the median of the last third over that of the second: the allocator's, not a leak's
EVERY = 10  # updates from one look to the next


class Look(NamedTuple):
    step: int
    memory_mib: float  # resident
    files: int  # open


def watch(note: Path) -> None:
    """Has memory and open files written down every few updates."""

    def looked(log):
        def after(run, step, *args, **options):
            log(run, step, *args, **options)
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            look = Look(step, pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd")))
            with open(note, "a") as file:
                file.write(json.dumps(look) + "\n")

        return after

    harness.replace("train_cogvideox_lora.log", looked)


def thirds(looks: list[Look]) -> list[dict[str, float]]:
    """Returns the median of the memory and of the open files in each third of a run."""
    size = len(looks) // 3
    parts = [looks[:size], looks[size : 2 * size], looks[2 * size :]]
    return [
        {
            "memory_mib": round(statistics.median(look.memory_mib for look in part), 1),
            "files": statistics.median(look.files for look in part),
        }
        for part in parts
    ]


def check_flat(parts: list[dict[str, float]]) -> None:
    """Refuses memory or open files that grow from the second third, when all has been used once, to the last."""
    _, second, last = parts
    assert last["memory_mib"] <= second["memory_mib"] + MEMORY_GROWTH_MIB, f"memory grows: {parts}"
    assert last["files"] <= second["files"], f"open files grow: {parts}"


def check(world: World, updates: int) -> dict:
    """Trains for many updates with everything that is done on the way; returns the medians of its thirds."""
    folder = harness.fresh(world.folder / "long" / "run")
    note = folder.with_suffix(".jsonl")
    folder.parent.mkdir(parents=True, exist_ok=True)
    note.unlink(missing_ok=True)
    every = max(updates // 50, 1)
    options = {
        "max_train_steps": updates, "validation_split": 2, "validation_steps": every, "checkpointing_steps": every,
        "checkpoints_total_limit": 2, "ema_decay": 0.99, "logging_steps": EVERY, "learning_rate": 1e-4,
    }  # fmt: skip
    ended = harness.run(world.options(folder, **options), 60 + updates, disturb=partial(watch, note))
    assert ended.codes == [0], ended.output[-2000:]
    looks = [Look(*json.loads(line)) for line in note.read_text().splitlines()]
    parts = thirds(looks)
    check_flat(parts)
    return {"updates": updates, "validations": updates // every, "thirds": parts}


# ---- the cost of the agreement ---------------------------------------------------------------------------------------


def time_updates(note: Path) -> None:
    """Has every second update done without the agreement, and the time of each written down."""
    is_agreed, count = [True], itertools.count()

    def without(of_each_rank):
        def values(accelerator, own):
            return of_each_rank(accelerator, own) if is_agreed[0] else torch.tensor([own])

        return values

    def timed(update):
        def after(*args, **options):
            is_agreed[0] = next(count) % 2 == 0
            start = time.perf_counter()
            measured = update(*args, **options)
            seconds = time.perf_counter() - start
            if os.environ.get("RANK", "0") == "0":
                with open(note, "a") as file:
                    file.write(json.dumps([is_agreed[0], seconds]) + "\n")
            is_agreed[0] = True
            return measured

        return after

    harness.replace("run.processes.of_each_rank", without)
    harness.replace("train_cogvideox_lora.update", timed)


def cost_of_agreement(world: World, ranks: int, updates: int) -> dict[str, float]:
    """Returns the medians of an update with and without the agreement, in milliseconds."""
    folder = harness.fresh(world.folder / "long" / f"agreement-{ranks}")
    note = folder.with_suffix(".jsonl")
    folder.parent.mkdir(parents=True, exist_ok=True)
    note.unlink(missing_ok=True)
    line = world.options(folder, max_train_steps=updates, checkpointing_steps=updates, logging_steps=updates)
    ended = harness.run(line, 60 + updates, ranks=ranks, disturb=partial(time_updates, note))
    assert ended.codes == [0] * ranks, ended.output[-2000:]
    times = [json.loads(line) for line in note.read_text().splitlines()][updates // 10 :]  # without the first ones
    medians = {kind: statistics.median(s for is_agreed, s in times if is_agreed == kind) for kind in (True, False)}
    return {
        "ranks": ranks,
        "updates": len(times),
        "with_ms": round(1000 * medians[True], 3),
        "without_ms": round(1000 * medians[False], 3),
    }
