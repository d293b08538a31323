"""Decides which clips are in which micro-batch, on which rank, and how many updates a run has: whole numbers only.

An update is made of micro-batches, which are numbered over all ranks and all epochs. Everything here is a pure function
of such numbers and a seed, so N ranks, one rank and a resumed run see the same clips in the same order.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

WITHOUT_CAPTION = -1  # number of the caption of no words


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


class Item(NamedTuple):
    """What a batch holds of a clip."""

    clip: int
    mirrored: bool = False
    caption: int = 0  # number of its caption; WITHOUT_CAPTION: that of no words


class Order(NamedTuple):
    """What decides which clips are in which micro-batch.

    The sequence does not depend on the number of ranks; they divide it. N ranks see in one turn what one rank sees in
    N turns, and a run resumes from a number. An epoch shows every clip once, but for the stills where their share is
    given, and of clips of one group one, another one each time until all were shown.
    """

    shapes: Sequence[tuple]  # of each clip's latents, (2c, f, h, w); those of a batch have the same
    seed: int
    batch_size: Callable[[tuple], int]  # clips in a batch, for their shape
    # Of each clip: windows of a video, all of one shape, of which an epoch shows one; empty: no such groups.
    groups: Sequence = ()
    num_captions: Sequence[int] = ()  # of each clip; empty: each has one
    stills: frozenset[int] = frozenset()  # clips of one frame
    random_flip: bool = False
    caption_dropout: float = 0.0  # probability that a clip is shown without its caption
    still_share: float | None = None  # of the clips that an epoch shows; None: every still once, as other clips
    bucket_group: int = 1  # micro-batches of one shape that follow each other

    def batches_per_epoch(self) -> int:
        return len(self.epoch(0))

    def batches(self, numbers: Iterable[int]) -> Iterator[list[Item]]:
        """Yields the micro-batches with the given ascending numbers."""
        batches_per_epoch, epoch = self.batches_per_epoch(), None
        for number in numbers:
            if number // batches_per_epoch != epoch:
                epoch = number // batches_per_epoch
                batches = self.epoch(epoch)
            yield batches[number % batches_per_epoch]

    def epoch(self, epoch: int) -> list[list[Item]]:
        """Returns the micro-batches of one epoch."""
        shown, draw = self._shown(epoch), random.Random(f"{self.seed} {epoch}")
        captions = random.Random(f"{self.seed} {epoch} captions")
        items_of = {}
        for clip in draw.sample(shown, len(shown)):
            mirrored = self.random_flip and draw.random() < 0.5
            items_of.setdefault(self.shapes[clip], []).append(Item(clip, mirrored, self._caption(clip, captions)))
        batches = []
        for shape, items in items_of.items():
            size = self.batch_size(shape)
            batches += [items[first : first + size] for first in range(0, len(items), size)]
        if self.still_share is not None:
            batches = self._as_many_batches_each_epoch(batches)
        draw.shuffle(batches)
        if self.bucket_group == 1 or len(items_of) == 1:
            return batches
        return _grouped(batches, self.bucket_group, epoch * len(batches), lambda batch: self.shapes[batch[0].clip])

    def _as_many_batches_each_epoch(self, batches: list[list[Item]]) -> list[list[Item]]:
        """Returns the batches with some of those of stills divided, so that all epochs have as many.

        An epoch shows as many stills as another, but of other shapes, which fill other numbers of batches.
        """
        batches, shapes = list(batches), {self.shapes[clip] for clip in self.stills}
        of_stills = [batch for batch in batches if batch[0].clip in self.stills]
        count = sum(map(len, of_stills))
        begun = min(len(shapes), count)
        most = begun + (count - begun) // min(map(self.batch_size, shapes), default=1)
        for _ in range(most - len(of_stills)):
            largest = max((batch for batch in batches if batch[0].clip in self.stills), key=len)
            at, half = batches.index(largest), len(largest) // 2
            batches[at : at + 1] = [largest[:half], largest[half:]]
        return batches

    def _shown(self, epoch: int) -> list[int]:
        """Returns the clips that an epoch shows, in no order; one is listed as often as it is shown."""
        groups = {}
        for clip, group in enumerate(self.groups or range(len(self.shapes))):
            groups.setdefault(group, []).append(clip)
        this = range(epoch, epoch + 1)
        shown = [_turns(clips, this, f"{self.seed} {clips[0]}")[0] for clips in groups.values()]
        if self.still_share is None:
            return shown
        stills = [clip for clip in shown if clip in self.stills]
        videos = [clip for clip in shown if clip not in self.stills]
        count = round(len(videos) * self.still_share / (1 - self.still_share))
        return videos + _turns(stills, range(epoch * count, (epoch + 1) * count), f"{self.seed} stills")

    def _caption(self, clip: int, draw: random.Random) -> int:
        if self.caption_dropout and draw.random() < self.caption_dropout:
            return WITHOUT_CAPTION
        count = self.num_captions[clip] if self.num_captions else 1
        return draw.randrange(count) if count > 1 else 0


def _turns(items: list, turns: range, seed: str) -> list:
    """Returns an item for each turn, so that as many successive turns as there are items have each of them once."""
    taken, cycle, order = [], 0, items
    for turn in turns:
        if len(items) > 1 and (not taken or turn // len(items) != cycle):
            cycle = turn // len(items)
            order = random.Random(f"{seed} {cycle}").sample(items, len(items))
        taken.append(order[turn % len(items)])
    return taken


def _grouped(batches: list, size: int, first: int, kind: Callable) -> list:
    """Returns batches so that `size` of one kind follow each other, beginning at numbers divisible by `size`.

    Ranks that divide `size` then have batches of one kind at the same time. What fills no group is at the two ends.

    Args:
        first: number of the first batch.
    """
    of_kind = {}
    for batch in batches:
        of_kind.setdefault(kind(batch), []).append(batch)
    whole, rest = [], []
    for same in of_kind.values():
        whole += [same[start : start + size] for start in range(0, len(same) - size + 1, size)]
        rest += same[len(same) - len(same) % size :]
    place = {id(batch): number for number, batch in enumerate(batches)}  # drawn, so that this order is, too
    whole.sort(key=lambda group: place[id(group[0])])
    lead = -first % size  # batches before the next number that is divisible
    if len(rest) < lead and whole:
        rest += whole.pop()
    return rest[:lead] + [batch for group in whole for batch in group] + rest[lead:]


class Timeline(NamedTuple):
    """A run in whole numbers. Micro-batches are counted over all ranks and all epochs."""

    first_step: int  # updates done before this start
    first_batch: int  # micro-batches seen before this start
    batches_per_step: int
    batches_per_epoch: int
    total_steps: int

    def batches_seen(self, step: int) -> int:
        return self.first_batch + (step - self.first_step) * self.batches_per_step

    def step_of(self, number: int) -> int:
        """Returns the update, counted from 1, that has the micro-batch of this number in it."""
        return self.first_step + (number - self.first_batch) // self.batches_per_step + 1

    def position(self, step: int) -> dict:
        """Returns what a resumed run needs to continue after this update."""
        return {"step": step, "batches_seen": self.batches_seen(step), "batches_per_epoch": self.batches_per_epoch}

    def epoch(self, step: int) -> float:
        return self.batches_seen(step) / self.batches_per_epoch

    def count_checkpoints(self, every_steps: int, total_limit: int | None) -> int:
        """Returns the most checkpoints on disk at once: the oldest is deleted after the newest has been written."""
        count = -(-self.total_steps // every_steps) - self.first_step // every_steps
        return count if total_limit is None else min(count, total_limit + 1)

    def summary(self, batch_sizes: set[int]) -> str:
        if self.first_step >= self.total_steps:
            return (
                f"nothing is left to train: {self.first_step} updates are done and {self.total_steps} were requested; "
                "raise --num_train_epochs or --max_train_steps to continue"
            )
        epochs, counts = self.epoch(self.total_steps), [self.batches_per_step * size for size in sorted(batch_sizes)]
        clips = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else counts[0]
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
