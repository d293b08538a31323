"""Decides at which size, and in which windows of its time, the model sees a clip.

Nothing here reads a file: a clip is its picture's size and the times of its frames.
"""

import argparse
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from clips import frames
from clips.frames import View, count_frames, covering_scale, kept_times, trainable_length
from files import at_least

STEP = 16  # pixels: what height and width are multiples of
MODES = ("start", "middle", "end", "uniform", "chunks", "random")
SPREAD = ("uniform", "random")  # modes of several windows that may overlap
SPREAD_WINDOWS = 4  # of a clip, in those modes, unless --clips_per_video names another number
LEAST_APART = 0.25  # of a window, between the beginnings of two
LEAST_LOST = 0.05  # share of the picture for which "auto" adds a bucket
LEAST_WINDOW = 9  # frames of a further window of a clip: fewer would be nearly a still
CLOSE = 2  # decimals in which two shares of a picture that are lost are compared
LITTLE = 0.02  # of a picture, which a larger size may lose more


class Unfit(ValueError):
    """A clip that is whole, but gives too few frames for what it is trained on."""


@dataclass(frozen=True, order=True)  # no tuple: as JSON it is its text
class Bucket:
    """A size that clips are trained at."""

    num_frames: int
    height: int  # pixels
    width: int

    def __iter__(self) -> Iterator[int]:
        return iter((self.num_frames, self.height, self.width))

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"


class Selection(NamedTuple):
    """The sizes and the windows in which the model sees the clips of a dataset."""

    view: View  # of a clip seen from its start, at the size of the options
    buckets: tuple[Bucket, ...] = ()  # empty: the size of `view`, and any length up to view.max_num_frames
    has_any_length: bool = True  # whether num_frames of a bucket is only the most that a clip gives
    is_fitted: bool = True  # False: the buckets are still to be chosen by `fitted`
    largest_size: tuple[int, int] | None = None  # height and width that the base model allows; None: any
    clip_mode: str = "start"
    clips_per_video: int | None = None  # None: as many as the mode has
    is_stretched: bool = False  # whether a clip's whole time is seen, in as many frames as a window has
    drop_unfit: bool = False  # leave out, with a remark, what fits no bucket

    @property
    def sizes(self) -> tuple[Bucket, ...]:
        """The buckets, or the one size that all clips have."""
        return self.buckets or (Bucket(self.view.max_num_frames, self.view.height, self.view.width),)

    @property
    def possible_sizes(self) -> list[Bucket]:
        """The sizes that clips can have: those of `sizes`, and the lengths of shorter clips in them."""
        if not self.has_any_length or self.view.whole:
            return list(self.sizes)
        return [
            replace(bucket, num_frames=length)
            for bucket in self.sizes
            for length in sorted({trainable_length(n, bucket.num_frames) for n in range(1, bucket.num_frames + 1)})
        ]

    @property
    def largest(self) -> Bucket:
        return max(self.sizes, key=lambda bucket: bucket.num_frames * bucket.height * bucket.width)

    @property
    def shortest_video(self) -> int | None:
        """The fewest frames, above one, that a clip is seen with; None: all are seen as stills."""
        lengths = [bucket.num_frames for bucket in self.sizes if bucket.num_frames > 1]
        return 5 if lengths and self.has_any_length else min(lengths, default=None)

    @property
    def by_option(self) -> dict[str, Bucket]:
        """The sizes, by the options that name them."""
        if self.buckets and not self.has_any_length:
            return {f"--buckets {bucket}": bucket for bucket in self.buckets}
        num_frames, height, width = self.sizes[0]
        return {f"--max_num_frames {num_frames} --height {height} --width {width}": self.sizes[0]}

    @property
    def is_plain(self) -> bool:
        """Whether all clips are seen from their start and at one size, as in earlier versions."""
        return self.is_fitted and not self.buckets and self.clip_mode == "start" and not self.is_stretched

    @property
    def is_drawn(self) -> bool:
        """Whether an epoch shows one window of each clip, another one each time."""
        return self.clip_mode == "random"

    def empty(self, taken: Iterable[Bucket]) -> list[Bucket]:
        """Returns the buckets named by options to which no clip goes; `taken`: where clips go."""
        taken = set(taken)
        return [] if self.has_any_length else [bucket for bucket in self.buckets if bucket not in taken]

    def fitted(self, sizes: Iterable[tuple[int, int]]) -> "Selection":
        """Returns the selection with the buckets of `--buckets auto` for pictures of these heights and widths."""
        if self.is_fitted:
            return self
        area = self.view.height * self.view.width
        pictures = auto_sizes(Counter(sizes), area, self.largest_size)
        buckets = tuple(Bucket(self.view.max_num_frames, *size) for size in pictures)
        return self._replace(buckets=buckets, is_fitted=True)


# ---- options ---------------------------------------------------------------------------------------------------------


def bucket_option(text: str) -> Bucket | str:
    """Returns the bucket that FRAMESxHEIGHTxWIDTH names, or "auto"; a type for argparse."""
    if text == "auto":
        return text
    numbers = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if not numbers:
        raise argparse.ArgumentTypeError(f"{text}: must be FRAMESxHEIGHTxWIDTH, such as 49x480x720, or auto")
    bucket = Bucket(*map(int, numbers.groups()))
    if bucket.num_frames % 8 != 1 and bucket.num_frames != 5:
        nearest = min(5, max(1, 8 * round((bucket.num_frames - 1) / 8) + 1), key=lambda k: abs(k - bucket.num_frames))
        raise argparse.ArgumentTypeError(f"{text}: frames must be 8k + 1 or 5; nearest is {nearest}")
    for name, pixels in (("height", bucket.height), ("width", bucket.width)):
        if pixels % STEP or not pixels:
            nearest = max(STEP, STEP * round(pixels / STEP))
            raise argparse.ArgumentTypeError(f"{text}: {name} must be divisible by {STEP}; nearest is {nearest}")
    return bucket


def add_options(group: argparse._ArgumentGroup, *, flips: bool = True) -> None:
    """Adds the options that decide what of the clips a model sees; `flips`: whether mirrored clips are made, too."""
    frames.add_options(group, flips=flips)
    data = group.add_argument
    buckets = (
        "sizes to train at, each clip at the one that loses least of it: FRAMESxHEIGHTxWIDTH, --height, --width and "
        "--max_num_frames are then not used; auto: sizes of about --height x --width pixels in the clips' aspect ratios"
    )
    mode = (
        "part of a longer clip that is seen: its start, middle or end; windows spread over it (uniform) or one after "
        "another (chunks); random: uniform, of which each epoch shows one"
    )
    windows = "most windows of a clip (default: 4 for uniform and random; all that fit for chunks)"
    sampling = "fps: --fps frames of each second; stretch: the whole clip in --max_num_frames, faster if it is longer"
    drop = "leave out clips that are too short for every bucket, or for the base model (default: refuse them)"
    data("--buckets", type=bucket_option, nargs="+", default=[], metavar="SIZE", help=buckets)
    data("--clip_mode", choices=MODES, default="start", help=mode)
    data("--clips_per_video", type=at_least(1), metavar="N", help=windows)
    data("--frame_sampling", choices=["fps", "stretch"], default="fps", help=sampling)
    data("--drop_unfit", action="store_true", help=drop)


def check_options(args: argparse.Namespace, refuse: Callable[[str], None]) -> None:
    """Refuses sizes that CogVideoX cannot take, and options without effect; `refuse` ends the program."""
    frames.check_options(args, refuse)
    if "auto" in args.buckets and len(args.buckets) > 1:
        refuse("--buckets auto: stands alone; leave the other sizes out, or name all of them")
    if len(set(args.buckets)) < len(args.buckets):
        refuse(f"--buckets {' '.join(map(str, args.buckets))}: names a size twice; name it once")
    if args.clips_per_video and args.clip_mode not in (*SPREAD, "chunks"):
        refuse(
            f"--clips_per_video {args.clips_per_video}: --clip_mode {args.clip_mode} has one window of each clip; pass "
            "--clip_mode uniform, chunks or random, or leave it out"
        )
    if args.frame_sampling == "stretch" and args.clip_mode != "start":
        refuse(f"--clip_mode {args.clip_mode}: --frame_sampling stretch shows the whole clip; leave one of the two out")


def selection_of(
    args: argparse.Namespace, *, with_image: bool, whole: bool, largest_size: tuple[int, int] | None = None
) -> Selection:
    """Returns what the options and the needs of the base model describe.

    Args:
        with_image: whether to cache the image that a clip starts from.
        whole: refuse a clip that gives fewer than --max_num_frames.
        largest_size: height and width that the base model allows; None: any.

    Raises:
        ValueError: the base model allows one size only, and --buckets auto would choose others.
    """
    is_auto = args.buckets == ["auto"]
    if is_auto and whole:
        raise ValueError("--buckets auto: the base model has learned positions for one size only; leave it out")
    buckets = () if is_auto else tuple(args.buckets)
    view = frames.view_of(args, with_image=with_image, whole=whole)
    if buckets:  # the size of what is shown where there is one for all, such as validation's videos
        first = next((bucket for bucket in buckets if bucket.num_frames > 1), buckets[0])
        view = view._replace(max_num_frames=first.num_frames, height=first.height, width=first.width)
    return Selection(
        view,
        buckets,
        has_any_length=not buckets,
        is_fitted=not is_auto,
        largest_size=largest_size,
        clip_mode=args.clip_mode,
        clips_per_video=args.clips_per_video,
        is_stretched=args.frame_sampling == "stretch",
        drop_unfit=args.drop_unfit,
    )


# ---- sizes -----------------------------------------------------------------------------------------------------------


def lost_share(height: int, width: int, to_height: int, to_width: int) -> float:
    """Returns the share of a height x width picture that is cut off where it is scaled to cover another size."""
    return 1 - to_height * to_width / (height * width * covering_scale(height, width, to_height, to_width) ** 2)


def auto_sizes(pictures: Counter[tuple[int, int]], area: int, largest: tuple[int, int] | None) -> list[tuple[int, int]]:
    """Returns heights and widths of at most `area` pixels, so that no picture loses more than a twentieth.

    The size that suits most clips comes first; a picture gets a further one only if it would lose more in all of them.

    Args:
        pictures: how often each height and width occurs.
        largest: height and width that no size may exceed.
    """
    by_size, counts, chosen = {}, Counter(), []
    for picture, count in pictures.items():
        size = auto_size(*picture, area, largest)
        by_size.setdefault(size, []).append(picture)
        counts[size] += count
    for size, own in sorted(by_size.items(), key=lambda item: (-counts[item[0]], item[0])):
        if not all(any(lost_share(*picture, *other) < LEAST_LOST for other in chosen) for picture in own):
            chosen.append(size)
    return chosen


def auto_size(height: int, width: int, area: int, largest: tuple[int, int] | None) -> tuple[int, int]:
    """Returns the height and width of at most `area` pixels that lose little of a picture, as large as that allows."""
    most_height, most_width = largest or (area // STEP, area // STEP)
    candidates = []
    for to_height in range(STEP, min(most_height, area // STEP) + 1, STEP):
        most = min(most_width, area // to_height) // STEP * STEP
        fitting = max(STEP, round(to_height * width / height / STEP) * STEP)
        candidates.append((to_height, min(most, fitting)))
    lost = {size: lost_share(height, width, *size) for size in candidates}
    close = [size for size in candidates if lost[size] <= min(lost.values()) + LITTLE]
    return min(close, key=lambda size: (-size[0] * size[1], lost[size]))


# ---- windows ---------------------------------------------------------------------------------------------------------


def views_of(height: int, width: int, seconds: np.ndarray, selection: Selection) -> list[View]:
    """Returns the views of a clip, in the order of its time.

    Args:
        height, width: of the picture, in pixels.
        seconds: time of every frame of the file, ascending.

    Raises:
        Unfit: it gives too few frames for every bucket.
        ValueError: nothing of it is left after the skips.
    """
    view = selection.view
    kept = kept_times(seconds, view)
    available = count_frames(kept, view)
    bucket = choose_bucket(height, width, available, len(kept) > 1, selection)
    if selection.is_stretched and bucket.num_frames > 1:
        return [_sized(selection, bucket)._replace(fps=(bucket.num_frames - 1) / float(kept[-1] - kept[0]))]
    windows = _chunks(bucket, available, selection) if selection.clip_mode == "chunks" else None
    windows = windows or [(start, bucket) for start in _starts(bucket.num_frames, available, selection)]
    return [_sized(selection, bucket)._replace(start=start / view.fps) for start, bucket in windows]


def _sized(selection: Selection, bucket: Bucket) -> View:
    view = selection.view._replace(height=bucket.height, width=bucket.width)
    return view if selection.has_any_length else view._replace(max_num_frames=bucket.num_frames)


def choose_bucket(height: int, width: int, available: int, is_video: bool, selection: Selection) -> Bucket:
    """Returns the bucket that loses least of a clip: of its picture first, then of its time, then of its detail.

    Args:
        available: frames that the clip gives at the model's rate.
        is_video: whether it has more than one; a video becomes a still only where no other bucket takes it.

    Raises:
        Unfit: it gives too few frames for every bucket.
    """
    fitting = list(_fitting(available, selection))
    if not fitting:
        shortest = min(bucket.num_frames for bucket in selection.sizes)
        remedy = "use a longer clip, remove it" if selection.view.whole else "add a shorter one to --buckets"
        raise Unfit(
            f"gives {frames.count_of(available)} at --fps {selection.view.fps}, and the shortest bucket has "
            f"{shortest}; {remedy}, or leave such clips out with --drop_unfit"
        )

    def loss(bucket: Bucket) -> tuple:
        # What one window of "chunks" leaves is in the next; the longest have the most motion.
        unseen = 0 if selection.clip_mode == "chunks" else available - _seen(bucket, available, selection)
        scale = covering_scale(height, width, bucket.height, bucket.width)
        is_still = is_video and bucket.num_frames == 1
        lost = round(lost_share(height, width, bucket.height, bucket.width), CLOSE)
        return is_still, lost, unseen, max(scale, 1), -scale, -bucket.num_frames

    return min(fitting, key=loss)


def _fitting(available: int, selection: Selection) -> Iterable[Bucket]:
    """Yields the buckets for which so many frames are enough, each with the length that a clip has in it."""
    for bucket in selection.sizes:
        if selection.has_any_length and not selection.view.whole:
            yield replace(bucket, num_frames=trainable_length(available, bucket.num_frames))
        elif bucket.num_frames <= available:
            yield bucket


def _seen(bucket: Bucket, available: int, selection: Selection) -> int:
    """Returns how many of the available frames are in a window."""
    if selection.is_stretched:
        return available
    starts = _starts(bucket.num_frames, available, selection)
    return bucket.num_frames + sum(min(bucket.num_frames, later - start) for start, later in itertools.pairwise(starts))


def _starts(num_frames: int, available: int, selection: Selection) -> list[int]:
    """Returns the first frames of a clip's windows, counted at the model's rate."""
    slack, mode = max(available - num_frames, 0), selection.clip_mode
    if mode in SPREAD:
        most = selection.clips_per_video or SPREAD_WINDOWS
        count = min(most, 1 + int(slack / (LEAST_APART * num_frames))) if num_frames >= LEAST_WINDOW else 1
        return [round(part * slack / (count - 1)) for part in range(count)] if count > 1 else [slack // 2]
    return [{"start": 0, "chunks": 0, "middle": slack // 2, "end": slack}[mode]]


def _chunks(bucket: Bucket, available: int, selection: Selection) -> list[tuple[int, Bucket]]:
    """Returns windows one after another: the first frame of each, and its bucket, a shorter one for what is left."""
    windows, start = [], 0
    most = selection.clips_per_video or available
    while len(windows) < most:
        lengths = [
            other.num_frames
            for other in _fitting(available - start, selection)
            if (other.height, other.width) == (bucket.height, bucket.width)
        ]
        num_frames = max((length for length in lengths if length <= bucket.num_frames), default=0)
        if num_frames < (LEAST_WINDOW if windows else 1):
            break
        windows.append((start, replace(bucket, num_frames=num_frames)))
        start += num_frames
    return windows
