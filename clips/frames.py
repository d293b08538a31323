"""One video file -> the frames that the model sees.

Shapes: F frames, H height, W width, C channels.
"""

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import decord
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from clips.listing import Clip
from files import at_least, file_hash

decord.logging.set_level(decord.logging.QUIET)

SMALLEST_SIDE = 64  # decord 0.6 cannot give frames narrower than this
FRAMES_READ_AT_ONCE = 8  # of the file's size, which may be much larger than the model's


class View(NamedTuple):
    """How the model is to see a clip, which decides what is cached."""

    height: int
    width: int
    fps: int
    max_num_frames: int
    skip_frames_start: int  # in frames of the file, not of the model
    skip_frames_end: int
    crop: str  # "center", or "random": one position per clip, drawn from `seed` and the video's content
    seed: int
    with_image: bool = False  # keep the image that the clip starts from, for image-to-video
    whole: bool = False  # refuse a clip that does not give max_num_frames

    def cache_key(self) -> dict:
        """The fields that change what is cached: a field that does nothing in this view is None or absent."""
        key = self._asdict() | ({"seed": None} if self.crop == "center" else {})
        return {name: value for name, value in key.items() if name not in ("with_image", "whole") or value}


def add_options(group: argparse._ArgumentGroup) -> None:
    data, count, positive = group.add_argument, at_least(0), at_least(1)
    data("--height", type=positive, default=480, help="pixels, divisible by 16; clips are resized to cover, then cut")
    data("--width", type=positive, default=720, help="pixels, divisible by 16")
    data("--fps", type=positive, default=8, help="frames per second that the model sees; clips are resampled by time")
    data("--max_num_frames", type=positive, default=49, metavar="N", help="frames per clip, 4k + 1, best 8k + 1")
    data("--skip_frames_start", type=count, default=0, metavar="N", help="frames of the file to leave out at its start")
    data("--skip_frames_end", type=count, default=0, metavar="N", help="frames of the file to leave out at its end")
    data("--video_reshape_mode", choices=["center", "random"], default="center", help="where to cut what overhangs")
    data("--random_flip", action="store_true", help="show each clip mirrored in half of its turns (encodes it twice)")


def check_options(args: argparse.Namespace, refuse: Callable[[str], None]) -> None:
    """Refuses sizes that CogVideoX's VAE and transformer cannot take; `refuse` ends the program with a message."""
    check_size(args.height, args.width, args.max_num_frames, refuse)


def check_size(height: int, width: int, max_num_frames: int, refuse: Callable[[str], None]) -> None:
    for name, value in (("height", height), ("width", width)):
        if value % 16:
            refuse(f"--{name} {value}: must be divisible by 16; nearest is {max(16, 16 * round(value / 16))}")
    if max_num_frames % 4 != 1:
        nearest = 8 * round((max_num_frames - 1) / 8) + 1
        refuse(f"--max_num_frames {max_num_frames}: must be 4k + 1, best 8k + 1; nearest is {nearest}")


def view_of(args: argparse.Namespace, *, with_image: bool, whole: bool) -> View:
    """The view that the options of `add_options` and --seed describe."""
    return View(
        height=args.height,
        width=args.width,
        fps=args.fps,
        max_num_frames=args.max_num_frames,
        skip_frames_start=args.skip_frames_start,
        skip_frames_end=args.skip_frames_end,
        crop=args.video_reshape_mode,
        seed=args.seed,
        with_image=with_image,
        whole=whole,
    )


# ---- which frames ----------------------------------------------------------------------------------------------------


def trainable_length(available: int, max_num_frames: int) -> int:
    """How many of `available` frames a clip gives: 8k + 1 wherever it allows, since the VAE gives just those back.

    The encoder takes any 4k + 1, but the decoder makes 4f frames of an even number f of latents (5 -> 2 -> 8). A clip
    of fewer than 9 frames gives 5 or 1; `max_num_frames` itself is kept as asked.
    """
    if available >= max_num_frames:
        return max_num_frames
    if available >= 9:
        return 8 * ((available - 1) // 8) + 1
    return 5 if available >= 5 else 1


def choose_frames(timestamps: np.ndarray, view: View) -> list[int]:
    """Indices of the frames nearest to 0, 1/fps, 2/fps ... seconds after the first one that is not skipped.

    Args:
        timestamps: of every frame in the file, seconds, ascending; may be unevenly spaced.

    Raises:
        ValueError: nothing is left after the skips.
    """
    end = len(timestamps) - view.skip_frames_end
    kept = timestamps[view.skip_frames_start : max(end, 0)]
    if not len(kept):
        raise ValueError(
            f"has {len(timestamps)} frames and nothing is left after --skip_frames_start {view.skip_frames_start} "
            f"and --skip_frames_end {view.skip_frames_end}; skip fewer, or remove the clip from the lists"
        )
    # Half a step of tolerance: the last frame of a 24 fps file stands for the time up to its end.
    available = int((kept[-1] - kept[0]) * view.fps + 0.5) + 1
    wanted = kept[0] + np.arange(trainable_length(available, view.max_num_frames)) / view.fps
    after = np.searchsorted(kept, wanted).clip(1, max(len(kept) - 1, 1))
    before = after - 1
    nearest = np.where(wanted - kept[before] <= kept[np.minimum(after, len(kept) - 1)] - wanted, before, after)
    return [view.skip_frames_start + int(i) for i in nearest.clip(0, len(kept) - 1)]


# ---- decode, resize, crop --------------------------------------------------------------------------------------------


def covering_scale(height: int, width: int, to_height: int, to_width: int) -> float:
    """What a picture's sides are multiplied by to cover another."""
    return max(to_height / height, to_width / width)


def resize_and_crop(frames: torch.Tensor, height: int, width: int, place: tuple[float, float]) -> torch.Tensor:
    """Frames scaled to cover height x width with their aspect kept, then cropped.

    Args:
        frames: uint8 [F, H, W, C].
        place: where in the overhang to crop, each from 0 (top, left) to 1; (0.5, 0.5) is the centre.
    """
    video = frames.permute(0, 3, 1, 2)  # [F, C, H, W]
    scale = covering_scale(video.shape[2], video.shape[3], height, width)
    size = [max(height, round(video.shape[2] * scale)), max(width, round(video.shape[3] * scale))]
    if size != list(video.shape[2:]):
        video = F.interpolate(video, size, mode="bicubic", antialias=True)
    top, left = round((size[0] - height) * place[0]), round((size[1] - width) * place[1])
    return video[:, :, top : top + height, left : left + width].permute(0, 2, 3, 1).contiguous()


def read_frames(video: Path, view: View, mirrored: bool) -> torch.Tensor:
    """The frames that the model sees, uint8 [F, H, W, C]."""
    reader = decord.VideoReader(str(video))
    indices = choose_frames(read_timestamps(reader), view)
    place, parts = _crop_position(video, view), []
    for i in range(0, len(indices), FRAMES_READ_AT_ONCE):
        part = torch.from_numpy(reader.get_batch(indices[i : i + FRAMES_READ_AT_ONCE]).asnumpy())
        parts.append(resize_and_crop(part, view.height, view.width, place))
    frames = torch.cat(parts)
    return frames.flip(2) if mirrored else frames


def decode(clip: Clip, view: View, mirrored: bool) -> torch.Tensor:
    """`read_frames` of a clip.

    Raises:
        ValueError: the problem, as `examine` tells those that it finds.
    """
    try:
        return read_frames(clip.video, view, mirrored)
    except (RuntimeError, decord.DECORDError) as error:
        problem = clip.problem(f"stopped in the middle of decoding: {str(error).splitlines()[0]}")
        raise ValueError(problem) from error


def _crop_position(video: Path, view: View) -> tuple[float, float]:
    if view.crop == "center":
        return 0.5, 0.5
    draw = random.Random(f"{view.seed} {file_hash(video)}")
    return draw.random(), draw.random()


def read_timestamps(reader) -> np.ndarray:
    return reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(np.float64)


# ---- images ----------------------------------------------------------------------------------------------------------


def read_image(path: Path, height: int, width: int, place: tuple[float, float] = (0.5, 0.5)) -> torch.Tensor:
    """An image scaled and cropped as frames are, uint8 [H, W, C].

    Raises:
        ValueError: it cannot be read.
    """
    if not path.is_file():
        raise ValueError("no such image; correct the path")
    try:
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except OSError as error:
        raise ValueError("cannot be read as an image; open it to check, and save it as PNG or JPEG") from error
    return resize_and_crop(torch.from_numpy(np.array(image))[None], height, width, place)[0]


def image_problems(paths: list[Path], option: str) -> list[str]:
    """What is wrong with image files that an option names."""
    problems = []
    for path in paths:
        try:
            read_image(path, SMALLEST_SIDE, SMALLEST_SIDE)
        except ValueError as error:
            problems.append(f"{option} {path}: {error}")
    return problems


def first_image(clip: Clip, frames: torch.Tensor, view: View, mirrored: bool) -> torch.Tensor:
    """What an image-to-video model is given to start from, uint8 [H, W, C].

    Args:
        frames: of the clip, from `read_frames`.
    """
    if clip.image is None:
        return frames[0]
    image = read_image(clip.image, view.height, view.width, _crop_position(clip.video, view))
    return image.flip(1) if mirrored else image
