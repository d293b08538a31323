"""Decides which clips are in which micro-batch, on which rank, and how many updates a run has: whole numbers only.

An update is made of micro-batches, which are numbered over all ranks and all epochs. Everything here is a pure function
of such numbers and a seed, so N ranks, one rank and a resumed run see the same clips in the same order.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple


class Ranks(NamedTuple):
    """The processes that share the work, as seen by one of them."""

    index: int = 0
    count: int = 1
    gather: Callable[[list], list] = list  # takes this rank's list, returns the lists of all ranks as one
    wait: Callable[[], None] = lambda: None  # returns when all ranks have called it

    def share(self, items: list) -> list:
        return items[self.index :: self.count]

    def gather_shares(self, items: list) -> list:
        """Gathers what each rank made of its `share`, in the order of the shared items."""
        shares = self.gather([items])
        gathered = [None] * sum(len(share) for share in shares)
        for index, share in enumerate(shares):
            gathered[index :: self.count] = share
        return gathered


def count_held_out(held_out: float, videos: int) -> int:
    """Returns how many videos `--validation_split` holds out (below 1 it is a share); refuses to hold out all."""
    count = round(held_out) if held_out >= 1 or not held_out else max(1, round(held_out * videos))
    if 0 < videos <= count:
        raise ValueError(f"--validation_split {held_out:g}: holds out all of the {videos} videos; hold out fewer")
    return count


def epoch_batches(
    shapes: list, *, batch_size: int, seed: int, epoch: int, random_flip: bool
) -> list[list[tuple[int, bool]]]:
    """Returns the batches of one epoch, lists of (clip, mirrored): every clip once, and one shape per batch."""
    draw = random.Random(f"{seed} {epoch}")
    order = draw.sample(range(len(shapes)), len(shapes))
    buckets = {}
    for clip in order:
        buckets.setdefault(shapes[clip], []).append((clip, random_flip and draw.random() < 0.5))
    batches = [bucket[i : i + batch_size] for bucket in buckets.values() for i in range(0, len(bucket), batch_size)]
    draw.shuffle(batches)
    return batches


def rank_batches(
    shapes: list, *, batch_size: int, seed: int, random_flip: bool, numbers: Iterable[int]
) -> Iterator[list[tuple[int, bool]]]:
    """Yields the micro-batches with the given ascending numbers.

    The sequence does not depend on the number of ranks; they divide it. N ranks see in one turn what one rank sees in
    N turns, every clip is seen equally often, and a run resumes from a number.
    """
    batches_of = partial(epoch_batches, shapes, batch_size=batch_size, seed=seed, random_flip=random_flip)
    batches_per_epoch, epoch = len(batches_of(epoch=0)), None
    for number in numbers:
        if number // batches_per_epoch != epoch:
            epoch = number // batches_per_epoch
            batches = batches_of(epoch=epoch)
        yield batches[number % batches_per_epoch]


class Timeline(NamedTuple):
    """A run in whole numbers. Micro-batches are counted over all ranks and all epochs."""

    first_step: int  # updates done before this start
    first_batch: int  # micro-batches seen before this start
    batches_per_step: int
    batches_per_epoch: int
    total_steps: int

    def batches_seen(self, step: int) -> int:
        return self.first_batch + (step - self.first_step) * self.batches_per_step

    def position(self, step: int) -> dict:
        """Returns what a resumed run needs to continue after this update."""
        return {"step": step, "batches_seen": self.batches_seen(step), "batches_per_epoch": self.batches_per_epoch}

    def epoch(self, step: int) -> float:
        return self.batches_seen(step) / self.batches_per_epoch

    def count_checkpoints(self, every_steps: int, total_limit: int | None) -> int:
        """Returns the most checkpoints on disk at once: the oldest is deleted after the newest has been written."""
        count = -(-self.total_steps // every_steps) - self.first_step // every_steps
        return count if total_limit is None else min(count, total_limit + 1)

    def summary(self, batch_size: int) -> str:
        if self.first_step >= self.total_steps:
            return (
                f"nothing is left to train: {self.first_step} updates are done and {self.total_steps} were requested; "
                "raise --num_train_epochs or --max_train_steps to continue"
            )
        clips, epochs = self.batches_per_step * batch_size, self.epoch(self.total_steps)
        return f"updates {self.first_step + 1} to {self.total_steps}, clips in each: {clips}, epochs: {epochs:.4g}"

    def due(self, step: int, every_steps: int | None, every_epochs: int) -> bool:
        """Returns whether what is done every so many updates or epochs, and at the end, is due after this update."""
        by_steps = every_steps is not None and step % every_steps == 0
        by_epochs = self.epoch(step) // every_epochs > self.epoch(step - 1) // every_epochs
        return by_steps or by_epochs or step == self.total_steps


def make_timeline(
    *, batches_per_epoch: int, batches_per_step: int, epochs: int, max_steps: int | None, step: int, batches_seen: int
) -> Timeline:
    """Returns the timeline of a run that starts after update `step` and `batches_seen` micro-batches.

    The remaining epochs are counted in updates of `batches_per_step`, whatever the size of earlier updates was.

    Args:
        max_steps: number of updates in all, which overrides `epochs`.
    """
    batches_left = max(epochs * batches_per_epoch - batches_seen, 0)
    return Timeline(
        first_step=step,
        first_batch=batches_seen,
        batches_per_step=batches_per_step,
        batches_per_epoch=batches_per_epoch,
        total_steps=max_steps or step + math.ceil(batches_left / batches_per_step),
    )
