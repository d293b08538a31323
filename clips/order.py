"""Which clips are in which micro-batch, on which rank, and how many updates there are: whole numbers only.

An update is made of micro-batches, which are numbered over all ranks and all epochs. Everything here is a pure function
of such numbers and a seed, so N ranks, one rank and a resumed run see the same clips in the same order.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple


class Ranks(NamedTuple):
    """The processes that share the work; `gather` takes a list and gives the lists of all ranks as one."""

    index: int = 0
    count: int = 1
    gather: Callable[[list], list] = list
    wait: Callable[[], None] = lambda: None

    def share(self, items: list) -> list:
        return items[self.index :: self.count]

    def gather_shares(self, items: list) -> list:
        """Puts together what all ranks made of their `share`, in the order of the whole."""
        shares = self.gather([items])
        whole = [None] * sum(len(share) for share in shares)
        for index, share in enumerate(shares):
            whole[index :: self.count] = share
        return whole


def count_held_out(held_out: float, videos: int) -> int:
    """How many of the videos `--validation_split` takes.

    Raises:
        ValueError: none is left to train on.
    """
    count = round(held_out) if held_out >= 1 or not held_out else max(1, round(held_out * videos))
    if 0 < videos <= count:
        raise ValueError(f"--validation_split {held_out:g}: holds out all of the {videos} videos; hold out fewer")
    return count


def epoch_batches(shapes: list, batch_size: int, seed: int, epoch: int, random_flip: bool) -> list[list]:
    """Batches of items (clip, mirrored) of one epoch: every clip once, and only clips of one shape together."""
    draw = random.Random(f"{seed} {epoch}")
    order = draw.sample(range(len(shapes)), len(shapes))
    buckets = {}
    for clip in order:
        buckets.setdefault(shapes[clip], []).append((clip, random_flip and draw.random() < 0.5))
    batches = [bucket[i : i + batch_size] for bucket in buckets.values() for i in range(0, len(bucket), batch_size)]
    draw.shuffle(batches)
    return batches


def rank_batches(shapes, batch_size: int, seed: int, random_flip: bool, numbers: Iterable[int]) -> Iterator[list]:
    """The micro-batches with these (ascending) numbers.

    The sequence is the same for every number of ranks, they only share it out: N ranks see in one turn what one rank
    sees in N, no clip is ever left out or seen more often than another, and a number is all there is to resume.
    """
    epoch, per_epoch = None, len(epoch_batches(shapes, batch_size, seed, 0, random_flip))
    for number in numbers:
        if number // per_epoch != epoch:
            epoch = number // per_epoch
            batches = epoch_batches(shapes, batch_size, seed, epoch, random_flip)
        yield batches[number % per_epoch]


class Timeline(NamedTuple):
    """A run in whole numbers. Micro-batches are counted over all ranks, and over all epochs laid end to end."""

    first_step: int  # updates that were done before this start
    first_batch: int  # micro-batches that were seen before this start
    batches_per_step: int
    batches_per_epoch: int
    total_steps: int

    def batches_seen(self, step: int) -> int:
        return self.first_batch + (step - self.first_step) * self.batches_per_step

    def position(self, step: int) -> dict:
        """What a run that goes on from here has to know."""
        return {"step": step, "batches_seen": self.batches_seen(step)}

    def epoch(self, step: int) -> float:
        return self.batches_seen(step) / self.batches_per_epoch

    @property
    def last_epoch(self) -> float:
        return self.epoch(self.total_steps)

    def summary(self, batch_size: int) -> str:
        if self.first_step >= self.total_steps:
            return f"{self.first_step} updates are done, {self.total_steps} were asked for; ask for more to go on"
        clips, epochs = self.batches_per_step * batch_size, self.last_epoch
        return f"updates {self.first_step + 1} to {self.total_steps}, clips in each: {clips}, epochs: {epochs:.4g}"

    def ends_epochs(self, step: int, every: int) -> bool:
        """Whether the update passes the end of epoch `every`, 2 * `every`, ..."""
        return self.epoch(step) // every > self.epoch(step - 1) // every

    def due(self, step: int, every_steps: int | None, every_epochs: int) -> bool:
        """Whether what happens every so many updates or epochs, and at the end, happens after this update."""
        by_steps = every_steps is not None and step % every_steps == 0
        return by_steps or self.ends_epochs(step, every_epochs) or step == self.total_steps


def make_timeline(
    *, batches_per_epoch: int, batches_per_step: int, epochs: int, max_steps: int | None, step: int, batches_seen: int
) -> Timeline:
    """The plan of a run that stands at `step`; the epochs that are left are turned into updates of today's size."""
    left = max(epochs * batches_per_epoch - batches_seen, 0)
    total_steps = max_steps or step + math.ceil(left / batches_per_step)
    return Timeline(step, batches_seen, batches_per_step, batches_per_epoch, total_steps)
