"""Reads masks: images or videos whose white says what of a clip counts in the loss.

Shapes: F frames, H height, W width; lower-case f h w are latent sizes.
"""

import argparse
from collections.abc import Callable
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F

from clips.frames import View, choose_source, describe_damage, fitted
from clips.known import File
from clips.listing import Clip
from clips.video import Video, read_pictures
from files import weight

BLACK, WHITE = 8, 247  # levels of 255 from which on codecs may have changed black and white


def add_options(group: argparse._ArgumentGroup) -> None:
    floor = "weight in the loss of what is black in a clip's mask, from 0 to 1; white has 1"
    preserve = "weight, where a mask is black, of what keeps the base model there: its own predictions; 0: none"
    group.add_argument("--mask_floor", type=weight, default=0, metavar="WEIGHT", help=floor)
    group.add_argument("--mask_preserve", type=weight, default=0, metavar="WEIGHT", help=preserve)


def check_options(args: argparse.Namespace, refuse: Callable[[str], None]) -> None:
    """Refuses a decoder by which no masks are read; `refuse` ends the program with a message."""
    if args.mask_column and args.video_decoder == "decord":
        refuse("--video_decoder decord: reads no masks; leave it out, or leave out --mask_column")


def check_weights(args: argparse.Namespace, refuse: Callable[[str], None]) -> None:
    """Refuses weights that would do nothing, or turn the masks around."""
    floor = f"--mask_floor {args.mask_floor:g}"
    if args.mask_floor > 1:
        refuse(f"{floor}: must be at most 1, the weight of what is white; pass a smaller one")
    for name, value in {"mask_floor": args.mask_floor, "mask_preserve": args.mask_preserve}.items():
        if value and not args.mask_column:
            refuse(f"--{name} {value:g}: does nothing without --mask_column, which names masks; pass both, or neither")
    if args.mask_floor == 1 and not args.mask_preserve:
        refuse(f"{floor}: with it, black counts as white does, and masks do nothing; pass a smaller one")


def refuse_misfit(mask: File, clip: File) -> None:
    """Raises a ValueError if a mask does not have the shape or the times of its clip's video."""
    if not _is_of_one_shape(mask.video, clip.video):
        raise ValueError(
            f"has {mask.video.width}x{mask.video.height} pixels and its video {clip.video.width}x{clip.video.height}, "
            "which is another shape; make it from pictures of the whole video, at any scale"
        )
    times, of_clip = mask.times, clip.times
    if len(times) == 1:
        return
    rule = "make it from each frame of the video, at the same times, or pass one image for all of them"
    if len(times) != len(of_clip):
        raise ValueError(f"has {len(times)} frames and its video {len(of_clip)}; {rule}")
    apart = np.abs(_seconds(times, mask.video) - _seconds(of_clip, clip.video))
    if apart.max() > _seconds(of_clip, clip.video)[-1] / (len(of_clip) - 1) / 2:
        rates = [(len(times) - 1) / _seconds(*pair)[-1] for pair in ((times, mask.video), (of_clip, clip.video))]
        raise ValueError(
            f"shows its frames up to {apart.max():.2f} s apart from those of its video ({rates[0]:.4g} and "
            f"{rates[1]:.4g} a second); {rule}"
        )


def _is_of_one_shape(mask: Video, clip: Video) -> bool:
    """Whether two pictures have the same aspect ratio, as far as whole pixels allow."""
    width, height = mask.height * clip.width / clip.height, mask.width * clip.height / clip.width
    return min(abs(mask.width - width), abs(mask.height - height)) <= 1


def _seconds(times: np.ndarray, video: Video) -> np.ndarray:
    return (times - times[0]) * float(video.time_base)


def read_mask(clip: Clip, mask: File, view: View, *, mirrored: bool, file: File) -> torch.Tensor:
    """Returns the mask of a clip in a view, scaled and cropped as its frames are, uint8 [F, H, W].

    Args:
        file: what the clip's video holds.

    Raises:
        ValueError: it cannot be read, or is black wherever the model looks; names the clip.
    """
    try:
        return _read_mask(clip, mask, view, mirrored=mirrored, file=file)
    except ValueError as error:
        raise ValueError(clip.problem(f"this mask {error}", clip.mask)) from error


def _read_mask(clip: Clip, mask: File, view: View, *, mirrored: bool, file: File) -> torch.Tensor:
    indices, all_times = choose_source(clip.video, file, view).indices, mask.times
    is_still = len(all_times) == 1
    times, damage = all_times[[0] if is_still else indices].tolist(), list(mask.video.damage)
    pictures = islice(read_pictures(clip.mask, mask.video, times, damage), len(times))
    shown_size = file.video.height, file.video.width  # whatever its own number of pixels is
    # Grey is the mean of red, green and blue: a picture of a mask has the same in all three.
    parts = [part.float().mean(-1).round().byte() for part in fitted(pictures, file, view, shown_size)]
    if damage:
        raise ValueError(f"{describe_damage(damage)}; write it again")
    seen = torch.cat(parts)
    if seen.max() <= BLACK:
        since = f" from {view.start:.2f} s on" if view.start else ""
        raise ValueError(
            f"is black wherever the model looks{since}, so that nothing is learned from the clip; remove it or the clip"
        )
    seen = seen.flip(2) if mirrored else seen
    return seen.expand(len(indices), -1, -1)


def is_all_white(mask: torch.Tensor) -> bool:
    return bool(mask.min() >= WHITE)


def latent_mask(mask: torch.Tensor, num_frames: int, height: int, width: int) -> torch.Tensor:
    """Returns the mean of a mask in each place of the latents, float32 [f, h, w] from 0 to 1.

    The first latent frame is the first frame, each later one of f is an equal number of the others, as the causal VAE
    compresses them.

    Args:
        mask: uint8 [F, H, W].
    """
    squares = F.adaptive_avg_pool2d(mask.float() / 255, (height, width))  # [F, h, w]
    first, later = squares[:1], squares[1:]
    return torch.cat([first, later.reshape(num_frames - 1, -1, height, width).mean(1)]) if num_frames > 1 else first
