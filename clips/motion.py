"""Measures how a clip moves, and finds where it cuts, in the frames that the model sees.

Shapes: F frames, H height, W width, C channels.
"""

import itertools
import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from clips.frames import View, choose_source
from clips.known import File
from clips.video import Video, ffmpeg_program, read_pictures

SIDE, QUARTER = 32, 16  # pixels of the small pictures that are compared, and of their quarters
STILL_LEVELS = 6.0  # of 255: codecs and grain change a small picture of a still by less
# Another shot begins where the colours of the quarters change
LEAST_CHANGE = 10.0  # by at least so many levels of 255,
TIMES_MEDIAN = 4.0  # and by so many times the median of the clip, unlike with a shaking camera,
TIMES_NEIGHBOURS = 2.5  # and by so many times the changes shortly before and after, unlike in a fade or a fast pan,
LASTING_SHARE = 0.5  # and where this share of the change is there shortly before and after, unlike at a flash.
SHORTLY = 0.25  # seconds
LEAST_CONTRAST = 4.0  # levels of 255: a picture with less has no structure that could be compared
ALIKE = 0.7  # correlation of two pictures of one scene, however bright each is


class Movement(NamedTuple):
    """How a clip moves, in the frames that the model sees."""

    motion: float | None  # levels of 255 per second; None: a single frame
    is_still: bool  # nothing changes, though there are several frames
    cuts: tuple[float, ...]  # where another shot begins: between two frames, in seconds from the first one of the file


def watch(path: Path, file: File, view: View, frames: torch.Tensor) -> Movement:
    """Returns how a clip moves.

    Args:
        file: what the file at `path` holds.
        frames: what the model sees of it, uint8 [F, H, W, C].
    """
    pictures = small_pictures(frames)
    cuts = [cut_time(path, file, view, number) for number in first_frames(pictures, view.fps)]
    return Movement(motion(frames, view.fps), is_still(pictures), tuple(cuts))


def motion(frames: torch.Tensor, fps: float) -> float | None:
    """Returns how much a second of video changes: the mean difference of successive frames times their rate.

    Args:
        frames: uint8 [F, H, W, C].

    Returns:
        Levels of 255 per second; None for a single frame.
    """
    if len(frames) < 2:
        return None
    total = sum((torch.maximum(a, b) - torch.minimum(a, b)).sum().item() for a, b in itertools.pairwise(frames))
    return fps * total / frames[1:].numel()


def is_still(pictures: torch.Tensor) -> bool:
    """Returns whether there are several pictures, and no part of them changes."""
    return len(pictures) > 1 and float((pictures.amax(0) - pictures.amin(0)).max()) < STILL_LEVELS


# ---- cuts ------------------------------------------------------------------------------------------------------------


def small_pictures(frames: Iterable) -> torch.Tensor:
    """Returns frames, uint8 [H, W, C] each, as float32 [F, C, SIDE, SIDE]."""
    channels_first = (torch.as_tensor(frame).permute(2, 0, 1).float() for frame in frames)
    return torch.stack([F.adaptive_avg_pool2d(frame, SIDE) for frame in channels_first])


def first_frames(pictures: torch.Tensor, fps: float) -> list[int]:
    """Returns the numbers of the frames with which another shot begins.

    Args:
        pictures: of `small_pictures`.
        fps: their rate.
    """
    seen = sorted_colours(pictures)
    changes = colour_change(seen[:-1], seen[1:])
    if not len(changes):
        return []
    least = max(LEAST_CHANGE, TIMES_MEDIAN * changes.median().item())
    shortly = max(1, int(SHORTLY * fps))  # frames
    candidates = [number for number, change in enumerate(changes.tolist(), start=1) if change >= least]
    return [
        number
        for number in candidates
        if _is_sudden(changes, number, shortly)
        and _lasts(seen, number, shortly)
        and _is_another_picture(pictures, number, shortly)
    ]


def sorted_colours(pictures: torch.Tensor) -> torch.Tensor:
    """Returns the values of each channel in each quarter of the pictures, ascending, [F, 4 C QUARTER**2].

    The mean difference of two rows is the earth mover's distance of the histograms: nothing that moves within a quarter
    changes it, a change of brightness changes it by as much, and the steps of a fade add up.
    """
    quarters = pictures.unfold(2, QUARTER, QUARTER).unfold(3, QUARTER, QUARTER)  # [F, C, 2, 2, QUARTER, QUARTER]
    return quarters.flatten(4).sort(-1).values.flatten(1)


def colour_change(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Returns the mean difference of `sorted_colours`, in levels of 255."""
    return (after - before).abs().mean(-1)


def _is_sudden(changes: torch.Tensor, number: int, shortly: int) -> bool:
    beside = torch.cat([changes[max(number - 1 - shortly, 0) : number - 1], changes[number : number + shortly]])
    return bool((changes[number - 1] >= TIMES_NEIGHBOURS * beside).all())


def _lasts(seen: torch.Tensor, number: int, shortly: int) -> bool:
    """Returns whether all frames shortly before differ from all shortly after, as far as there are any."""
    before, after = seen[max(number - 1 - shortly, 0) : number], seen[number : number + 1 + shortly]
    apart = colour_change(before[:, None], after[None]).min()
    return bool(apart >= LASTING_SHARE * colour_change(seen[number - 1], seen[number]))


def _is_another_picture(pictures: torch.Tensor, number: int, shortly: int) -> bool:
    """Returns whether it cannot be a flash, at an end of the clip where too few frames follow to see if it lasts."""
    if min(number, len(pictures) - number) > shortly:
        return True
    pair = F.adaptive_avg_pool2d(pictures[number - 1 : number + 1].mean(1), QUARTER).flatten(1)
    return bool(pair.std(1).min() >= LEAST_CONTRAST and torch.corrcoef(pair)[0, 1] < ALIKE)


def cut_time(path: Path, file: File, view: View, number: int) -> float:
    """Returns when the shot before frame `number` of the model ends, from all frames of the file on the way to it."""
    times, source = file.times, choose_source(path, file, view._replace(video_decoder="pyav"))
    first, last = source.indices[number - 1 : number + 1]
    if last - first > 1:
        pictures = small_pictures(read_pictures(path, source.video, times[first : last + 1].tolist(), []))
        seen = sorted_colours(pictures)
        last = first + 1 + int(colour_change(seen[:-1], seen[1:]).argmax())
    middle = float(times[last - 1] + times[last]) / 2 - float(times[0])
    return middle * float(file.video.time_base)


def split_command(path: Path, video: Video, cuts: Iterable[float]) -> str:
    """Returns the command that writes each shot into a file of its own, encoded again, so that it begins exactly there.

    It counts time from the first frame, as `cut_time` does: the clock of a file may start late, or with its sound. It
    trims by a filter, because -ss and -to round times to whole frames once more, and may lose the last one of a shot.
    Into Matroska, ffmpeg writes frames as unevenly spaced as they are; of mp4 it would make even ones.
    """
    path, ends = Path(os.path.abspath(path)), [f"{cut:.3f}" for cut in cuts]
    clock = f"N*{float(video.time_base)}/TB" if video.is_numbered else "PTS-STARTPTS"
    even = ",crop=trunc(iw/2)*2:trunc(ih/2)*2" if video.width % 2 or video.height % 2 else ""  # as H.264 needs it
    words = [ffmpeg_program(), "-i", shlex.quote(str(path))]
    for number, (start, end) in enumerate(zip([None, *ends], [*ends, None]), start=1):
        part = ":".join([f"start={start}"] * (start is not None) + [f"end={end}"] * (end is not None))
        words += ["-vf", shlex.quote(f"setpts={clock},trim={part},setpts=PTS-STARTPTS{even}")]
        words += ["-an -c:v libx264 -crf 16", shlex.quote(str(path.with_name(f"{path.stem}-{number}.mkv")))]
    return " ".join(words)
