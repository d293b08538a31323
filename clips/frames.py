"""Reads a video file into the frames that the model sees: choose, decode, resize, crop.

Shapes: F frames, H height, W width, C channels.
"""

import argparse
import itertools
import os
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from clips import decord_reader
from clips.known import File, look_at
from clips.listing import Clip
from clips.video import Damage, Video, read_pictures
from files import at_least

MEND = "copy it again, cut the part out, or train on it as it is with --allow_damaged"
TIE_SECONDS = 1e-6  # a time halfway between two frames is the earlier's, whatever the last bits of both say
BYTES_DECODED_AHEAD = 2**30  # of all clips that are decoded before they are asked for
CENTRE = 0.5, 0.5  # where a picture is cropped
PICTURES_AT_ONCE = 8  # bounds the memory: pictures of the file may be much larger than the model's


class View(NamedTuple):
    """How the model sees a clip: all settings that change the cached tensors."""

    height: int
    width: int
    fps: float  # frames per second that the model sees
    max_num_frames: int
    skip_frames_start: int  # frames of the file, not of the model
    skip_frames_end: int  # likewise
    crop: str  # "center", or "random": one position per clip, drawn from `seed` and the video's content
    seed: int
    with_image: bool = False  # also cache the image that the clip starts from, for image-to-video
    whole: bool = False  # refuse a clip that gives fewer than max_num_frames
    video_decoder: str = "pyav"  # or "decord"
    start: float = 0.0  # seconds from the first frame that is not skipped to the first that is seen

    def cache_key(self) -> dict:
        """Returns the fields that change what is cached, so that a setting without effect reuses the cache.

        Users' caches are found by it: another key for the same view makes them encode everything again.
        """
        key = self._asdict()
        if self.crop == "center":
            key["seed"] = None
        for name in ("with_image", "whole", "start"):  # absent from the keys of older caches
            if not key[name]:
                del key[name]
        if self.video_decoder == "decord":  # the only one of older caches
            del key["video_decoder"]
        return key


def add_options(group: argparse._ArgumentGroup, *, flips: bool = True) -> None:
    """Adds the options that decide what of a clip a model sees; `flips`: whether mirrored clips are made, too."""
    data, count, positive = group.add_argument, at_least(0), at_least(1)
    data("--height", type=positive, default=480, help="pixels, divisible by 16; clips are scaled to fill, then cropped")
    data("--width", type=positive, default=720, help="pixels, divisible by 16")
    data("--fps", type=positive, default=8, help="frames per second that the model sees; clips are resampled by time")
    data("--max_num_frames", type=positive, default=49, metavar="N", help="frames per clip, 4k + 1, best 8k + 1")
    data("--skip_frames_start", type=count, default=0, metavar="N", help="frames to leave out at the start of a file")
    data("--skip_frames_end", type=count, default=0, metavar="N", help="frames to leave out at the end of a file")
    data("--video_reshape_mode", choices=["center", "random"], default="center", help="crop in the centre or at random")
    decoder = "library that reads the clips; decord: for comparing with other tools, it reads many files wrong"
    data("--video_decoder", choices=["pyav", "decord"], default="pyav", help=decoder)
    damaged = "train on clips that decode with errors, with a remark (default: refuse them)"
    data("--allow_damaged", action="store_true", help=damaged)
    if flips:
        data("--random_flip", action="store_true", help="mirror each clip in half of its epochs; it is encoded twice")


def check_options(args: argparse.Namespace, refuse: Callable[[str], None]) -> None:
    """Refuses sizes that CogVideoX's VAE and transformer cannot take, and a decoder that is not there.

    Args:
        refuse: ends the program with a message, as `parser.error` does.
    """
    for name, value in (("height", args.height), ("width", args.width)):
        if value % 16:
            refuse(f"--{name} {value}: must be divisible by 16; nearest is {max(16, 16 * round(value / 16))}")
    if args.max_num_frames % 4 != 1:
        nearest = 8 * round((args.max_num_frames - 1) / 8) + 1
        refuse(f"--max_num_frames {args.max_num_frames}: must be 4k + 1, best 8k + 1; nearest is {nearest}")
    if args.video_decoder == "decord" and not decord_reader.is_installed():
        refuse("--video_decoder decord: is not installed; pip install decord==0.6.0 (x86-64 only), or leave it out")


def view_of(args: argparse.Namespace, *, with_image: bool, whole: bool) -> View:
    """Returns the view that the options of `add_options`, --seed and the needs of the base model describe."""
    same_names = {name: value for name, value in vars(args).items() if name in View._fields}
    return View(**same_names, crop=args.video_reshape_mode, with_image=with_image, whole=whole)


def count_of(num_frames: int) -> str:
    return "1 frame" if num_frames == 1 else f"{num_frames} frames"


def trainable_length(available: int, max_num_frames: int) -> int:
    """Returns how many of the `available` frames are used: 8k + 1, the lengths that the VAE also decodes to.

    The encoder takes any 4k + 1, but the decoder makes 4f frames of an even number f of latents (5 -> 2 -> 8). Of fewer
    than 9 frames 5 or 1 are used. `max_num_frames` itself may be any 4k + 1.
    """
    if available >= max_num_frames:
        return max_num_frames
    if available >= 9:
        return 8 * ((available - 1) // 8) + 1
    return 5 if available >= 5 else 1


def kept_times(timestamps: np.ndarray, view: View) -> np.ndarray:
    """Returns the times of the frames that are not skipped; raises a ValueError if none is left.

    Args:
        timestamps: time of every frame of the file in seconds, ascending; may be unevenly spaced.
    """
    end = len(timestamps) - view.skip_frames_end
    kept = timestamps[view.skip_frames_start : max(end, 0)]
    if not len(kept):
        raise ValueError(
            f"has {len(timestamps)} frames, and none is left after --skip_frames_start {view.skip_frames_start} "
            f"and --skip_frames_end {view.skip_frames_end}; skip fewer, or remove the clip"
        )
    return kept


def count_frames(kept: np.ndarray, view: View) -> int:
    """Returns how many frames there are at the model's rate, from the view's start to the last frame.

    Half a step of tolerance: the last frame of a file is shown for some time after its timestamp.
    """
    tie = TIE_SECONDS if view.start else 0  # the start was counted in frames, and is rounded
    return int((kept[-1] - (kept[0] + view.start) + tie) * view.fps + 0.5) + 1


def choose_frames(timestamps: np.ndarray, view: View) -> list[int]:
    """Returns the indices of the frames nearest to 0, 1/fps, 2/fps ... seconds after the view's start.

    Args:
        timestamps: time of every frame of the file in seconds, ascending; may be unevenly spaced.

    Raises:
        ValueError: nothing is left after the skips.
    """
    kept = kept_times(timestamps, view)
    num_frames = trainable_length(count_frames(kept, view), view.max_num_frames)
    wanted = kept[0] + view.start + np.arange(num_frames) / view.fps
    last = len(kept) - 1
    # Not numpy.clip, which is slow for a few numbers.
    after = np.maximum(np.minimum(np.searchsorted(kept, wanted), last), 1)
    before = after - 1
    tie = 0 if view.video_decoder == "decord" else TIE_SECONDS  # with decord, as it always was
    nearest = np.where(wanted - kept[before] <= kept[np.minimum(after, last)] - wanted + tie, before, after)
    return (view.skip_frames_start + np.minimum(nearest, last)).tolist()


class Source(NamedTuple):
    """What of a file is read."""

    video: Video
    indices: list[int]  # of the frames that the model sees
    times: list[int]  # when they are shown, in units of video.time_base
    file_seconds: np.ndarray  # when each frame of the file is shown, from the first on

    @property
    def seconds(self) -> list[float]:
        """When the frames that the model sees are shown, on the clock of the file, which may start late."""
        return [float(time * self.video.time_base) for time in self.times]


def choose_source(path: Path, file: File, view: View) -> Source:
    """Returns what of a file is read.

    Raises:
        ValueError: nothing is left after the skips, or decord reads the file wrong.
    """
    video, times = file.video, file.times
    seconds = (times - times[0]) * float(video.time_base)
    if view.video_decoder == "decord":
        seconds = decord_reader.frame_seconds(path, seconds)
    indices = choose_frames(seconds, view)
    seen_times = times[indices].tolist()
    if video.damage:
        end = float(seen_times[-1] * video.time_base) + 1 / view.fps
        video = video._replace(damage=tuple(damage for damage in video.damage if damage.seconds <= end))
    return Source(video, indices, seen_times, seconds)


def covering_scale(height: int, width: int, to_height: int, to_width: int) -> float:
    """Returns the smallest factor by which a height x width picture covers one of the other size."""
    return max(to_height / height, to_width / width)


def resize_and_crop(
    frames: torch.Tensor,
    height: int,
    width: int,
    crop_position: tuple[float, float],
    shown_size: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Scales frames to cover height x width without changing the aspect ratio that they are shown with; crops them.

    Args:
        frames: uint8 [F, H, W, C].
        crop_position: vertical and horizontal, from 0 (top, left) to 1 (bottom, right); (0.5, 0.5) is the centre.
        shown_size: height and width that a player shows; None: those of the frames.
    """
    video = frames.permute(0, 3, 1, 2)  # [F, C, H, W]
    shown_height, shown_width = shown_size or video.shape[2:]
    scale = covering_scale(shown_height, shown_width, height, width)
    scaled_height, scaled_width = max(height, round(shown_height * scale)), max(width, round(shown_width * scale))
    if (scaled_height, scaled_width) != tuple(video.shape[2:]):
        video = F.interpolate(video, (scaled_height, scaled_width), mode="bicubic", antialias=True)
    top = round((scaled_height - height) * crop_position[0])
    left = round((scaled_width - width) * crop_position[1])
    return video[:, :, top : top + height, left : left + width].permute(0, 2, 3, 1).contiguous()


def seen_rectangle(file: File, view: View) -> tuple[float, float, float, float]:
    """Returns left, top, width and height of the part of the picture that is seen, as shares of the whole picture."""
    video, (vertical, horizontal) = file.video, _crop_position(file, view)
    scale = covering_scale(video.height, video.width, view.height, view.width)
    height, width = min(1, view.height / (video.height * scale)), min(1, view.width / (video.width * scale))
    return (1 - width) * horizontal, (1 - height) * vertical, width, height


def read_frames(
    path: Path, view: View, *, mirrored: bool, file: File | None = None, damage: list[Damage] | None = None
) -> torch.Tensor:
    """Returns the frames that the model sees, uint8 [F, H, W, C].

    Args:
        file: what it holds, where that is known already.
        damage: receives what the decoder reports of the file; None: damage is an error.

    Raises:
        ValueError: the file cannot be read.
    """
    file = file or look_at(path)
    video, indices, times, _ = choose_source(path, file, view)
    reports = [] if damage is None else damage
    reports += video.damage
    if view.video_decoder == "decord":
        pictures, shown_size = decord_reader.read_pictures(path, indices), None
    else:
        pictures, shown_size = read_pictures(path, video, times, reports), (video.height, video.width)
    frames = torch.cat(list(fitted(pictures, file, view, shown_size)))
    if reports and damage is None:
        raise ValueError(f"{describe_damage(reports)}; {MEND}")
    return frames.flip(2) if mirrored else frames


def fitted(
    pictures: Iterator[np.ndarray], file: File, view: View, shown_size: tuple[int, int] | None
) -> Iterator[torch.Tensor]:
    """Yields pictures, uint8 [H, W, C], as a view has those of a clip, several at once, uint8 [F, H, W, C].

    Args:
        file: what the clip's video holds, which decides where they are cropped.
        shown_size: height and width that a player shows; None: those of the pictures.
    """
    position = _crop_position(file, view)
    while pictures_of_part := list(itertools.islice(pictures, PICTURES_AT_ONCE)):
        part = torch.from_numpy(np.stack(pictures_of_part))
        yield resize_and_crop(part, view.height, view.width, position, shown_size)


def describe_damage(damage: list[Damage]) -> str:
    (seconds, report), *others = damage
    more = f", and {len(others)} more" if others else ""
    return f"is damaged at {seconds:.2f} s ({report}{more})"


def decoding_threads(views: Iterable[View]) -> int:
    """Returns one thread per core of this process, up to eight, as far as the memory for their clips allows."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    clip_bytes = max((view.max_num_frames * view.height * view.width * 3 for view in set(views)), default=1)
    return max(1, min(8, cores, BYTES_DECODED_AHEAD // clip_bytes))


def decode(clip: Clip, view: View, *, mirrored: bool, file: File, damage: list[Damage]) -> torch.Tensor:
    """Returns `read_frames` of a clip's video; raises a ValueError that names the clip if decoding stops midway."""
    try:
        return read_frames(clip.video, view, mirrored=mirrored, file=file, damage=damage)
    except ValueError as error:
        raise ValueError(clip.problem(str(error))) from error


def _crop_position(file: File, view: View) -> tuple[float, float]:
    if view.crop == "center":
        return CENTRE
    draw = random.Random(f"{view.seed} {file.content}")
    return draw.random(), draw.random()


def read_image(path: Path, height: int, width: int, crop_position: tuple[float, float] = CENTRE) -> torch.Tensor:
    """Returns an image, scaled and cropped as frames are, uint8 [H, W, C]; raises a ValueError if there is none."""
    if not path.is_file():
        raise ValueError("no such image; correct the path")
    try:
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except OSError as error:
        raise ValueError("cannot be read as an image; open it to check, and save it as PNG or JPEG") from error
    return resize_and_crop(torch.from_numpy(np.array(image))[None], height, width, crop_position)[0]


def image_problems(paths: list[Path], option: str) -> list[str]:
    """Returns the problems of image files that an option names."""
    problems = []
    for path in paths:
        try:
            read_image(path, 16, 16)
        except ValueError as error:
            problems.append(f"{option} {path}: {error}")
    return problems


def first_image(clip: Clip, frames: torch.Tensor, view: View, *, mirrored: bool, file: File) -> torch.Tensor:
    """Returns the image that an image-to-video model starts from, uint8 [H, W, C]; `frames` are from `decode`."""
    if clip.image is None:
        return frames[0]
    image = read_image(clip.image, view.height, view.width, _crop_position(file, view))
    return image.flip(1) if mirrored else image
