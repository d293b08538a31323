"""Files on disk -> clips and captions -> cached latents and embeddings -> batches.

Shapes: F frames, H height, W width, C channels; lower-case f c h w are latent sizes. L prompt tokens, D text width.

What is wrong with a dataset is returned as sentences, not raised one by one, so that a person sees all of it at once.
"""

import argparse
import difflib
import hashlib
import itertools
import json
import math
import os
import random
import re
import runpy
import secrets
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import decord
import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

decord.logging.set_level(decord.logging.QUIET)

SMALLEST_SIDE = 64  # decord 0.6 cannot give frames narrower than this
FRAMES_READ_AT_ONCE = 8  # of the file's size, which may be much larger than the model's
BYTES_DECODED_AHEAD = 2**30  # of all clips that are decoded before the encoder asks for them


class Clip(NamedTuple):
    video: Path
    caption: str
    line: int  # in the list files, counted from 1
    image: Path | None = None  # that the video begins with; None: its own first frame


class View(NamedTuple):
    """How the model is to see a clip; all of it goes into the key of what is cached."""

    height: int
    width: int
    fps: int
    max_num_frames: int
    skip_frames_start: int  # in frames of the file, not of the model
    skip_frames_end: int
    crop: str  # "center", or "random": one place per clip, drawn from `seed` and the video's content
    seed: int
    with_image: bool = False  # keep the image that the clip starts from, for image-to-video
    whole: bool = False  # refuse a clip that does not give max_num_frames


class Encoder(NamedTuple):
    """A VAE or T5, not loaded yet."""

    fingerprint: str  # tells encoders apart that encode differently
    load: Callable[[], AbstractContextManager[Callable]]  # the function that encodes, for as long as it is needed
    at_once: Callable[[tuple[int, ...]], int]  # how many, of a clip's [F, H, W, C] or a caption's (), it takes together


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


class Data(NamedTuple):
    """What is left of a dataset once it is encoded."""

    clips: "CachedClips"
    shapes: list[tuple[int, ...]]  # of each clip's cached latents, (2c, f, h, w)
    prompts: dict[str, Path]  # embeddings of the validation prompts, and of ""
    facts: "Sequence[Facts]" = ()  # of each clip; none where clips are made up
    view: View | None = None
    remarks: tuple[str, ...] = ()  # on the dataset as a whole

    @property
    def has_images(self) -> bool:
        return "image" in self.clips[0, False]

    def first_image(self, clip: int) -> torch.Tensor:
        """What an image-to-video model is given to start from, uint8 [H, W, C]."""
        return self.clips[clip, False]["image"]

    def split(self, held_out: float, seed: int) -> tuple["Data", "Data"]:
        """What is trained on, and what is held out: `held_out` of the videos, below 1 a share, from 1 a number.

        A video that is listed twice goes as a whole to one of the two.
        """
        videos = list(dict.fromkeys(paths[0] for paths in self.clips.latents))
        chosen = random.Random(f"{seed} held out").sample(videos, count_held_out(held_out, len(videos)))
        chosen, everything = set(chosen), range(len(self.shapes))
        return (
            self._take([clip for clip in everything if self.clips.latents[clip][0] not in chosen]),
            self._take([clip for clip in everything if self.clips.latents[clip][0] in chosen])._replace(remarks=()),
        )

    def _take(self, clips: list[int]) -> "Data":
        latents, captions = self.clips.latents, self.clips.captions
        taken = CachedClips([latents[clip] for clip in clips], [captions[clip] for clip in clips])
        shapes, facts = [self.shapes[clip] for clip in clips], [self.facts[clip] for clip in clips if self.facts]
        return self._replace(clips=taken, shapes=shapes, facts=facts)

    def batches_per_epoch(self, batch_size: int) -> int:
        return len(epoch_batches(self.shapes, batch_size, seed=0, epoch=0, random_flip=False))

    def summary(self) -> str:
        return "\n".join([headline(self.facts, self.view), *self.remarks])


class Facts(NamedTuple):
    """What the file of a video holds, and what the model gets of it."""

    width: int
    height: int
    fps: float  # the mean, where frames are unevenly spaced
    num_frames: int
    indices: list[int]  # of the frames that the model gets
    seen_until: float  # seconds from the start of the file
    content: str  # a hash

    @property
    def seconds(self) -> float:
        return self.num_frames / self.fps

    @property
    def unseen_seconds(self) -> float:
        """At the end; what is skipped at the start is what was asked for."""
        return max(self.seconds - self.seen_until, 0)

    @property
    def repeats(self) -> bool:
        """Whether the model gets a frame twice, because the file is slower than the model."""
        return len(set(self.indices)) < len(self.indices)

    def scale(self, view: View) -> float:
        return covering_scale(self.height, self.width, view.height, view.width)

    def cropped(self, view: View) -> float:
        """The share of the picture that is cut off."""
        return 1 - view.height * view.width / (self.height * self.width * self.scale(view) ** 2)


def count_held_out(held_out: float, videos: int) -> int:
    """How many of the videos `--validation_split` takes.

    Raises:
        ValueError: none is left to train on.
    """
    count = round(held_out) if held_out >= 1 or not held_out else max(1, round(held_out * videos))
    if 0 < videos <= count:
        raise ValueError(f"--validation_split {held_out:g}: holds out all of the {videos} videos; hold out fewer")
    return count


class Probed(NamedTuple):
    """What is known of a clip before it is encoded: where its latents belong, or why it cannot be used."""

    paths: list[Path]  # of the cached latents: as filmed, then mirrored if flips were asked for
    missing: list[bool]
    facts: Facts | None
    problem: str | None


# ---- options ---------------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser):
    """Those that decide what a model sees of the clips, for training and for looking at it; returns their group."""
    count, positive = at_least(0), at_least(1)
    group = parser.add_argument_group("data")
    data = group.add_argument
    data("--caption_column", default="prompts.txt", metavar="FILE", help="list of captions, one per line")
    data("--video_column", default="videos.txt", metavar="FILE", help="list of videos, line n belongs to caption n")
    data("--image_column", metavar="FILE", help="image-to-video: list of images to start from (default: first frames)")
    data("--id_token", help="put before each caption, with a space: a name for the style or character to learn")
    data("--height", type=positive, default=480, help="pixels, divisible by 16; clips are resized to cover, then cut")
    data("--width", type=positive, default=720, help="pixels, divisible by 16")
    data("--fps", type=positive, default=8, help="frames per second that the model sees; clips are resampled by time")
    data("--max_num_frames", type=positive, default=49, metavar="N", help="frames per clip, 4k + 1, best 8k + 1")
    data("--skip_frames_start", type=count, default=0, metavar="N", help="frames of the file to leave out at its start")
    data("--skip_frames_end", type=count, default=0, metavar="N", help="frames of the file to leave out at its end")
    data("--video_reshape_mode", choices=["center", "random"], default="center", help="where to cut what overhangs")
    data("--random_flip", action="store_true", help="show each clip mirrored in half of its turns (encodes it twice)")
    return group


def expanded_path(text: str) -> Path:
    """A type for argparse."""
    return Path(text).expanduser()


def at_least(lowest: int) -> Callable[[str], int]:
    """A type for argparse."""

    def whole_number(text: str) -> int:
        if int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text}: must be a whole number of at least {lowest}")
        return int(text)

    return whole_number


def size_problems(height: int, width: int, max_num_frames: int) -> list[str]:
    """What CogVideoX's VAE and transformer cannot take."""
    problems = [
        f"--{name} {value}: must be divisible by 16; nearest is {max(16, 16 * round(value / 16))}"
        for name, value in (("height", height), ("width", width))
        if value % 16
    ]
    if max_num_frames % 4 != 1:
        nearest = 8 * round((max_num_frames - 1) / 8) + 1
        problems.append(f"--max_num_frames {max_num_frames}: must be 4k + 1, best 8k + 1; nearest is {nearest}")
    return problems


# ---- the lists -------------------------------------------------------------------------------------------------------


def download(name: str, cache_dir: Path | None) -> Path:
    """The folder of a dataset repository, from the hub.

    Raises:
        ValueError: it cannot be had.
    """
    try:
        return Path(snapshot_download(name, repo_type="dataset", cache_dir=cache_dir))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--dataset_name {name}: cannot be downloaded ({str(error).strip().splitlines()[0]}); check the name and "
            "`hf auth login`, or download it yourself and pass its folder as --instance_data_root"
        ) from error


def read_clips(
    root: Path, caption_file: str, video_file: str, image_file: str | None, id_token: str | None
) -> tuple[list[Clip], list[str]]:
    """Clips in the order of the lists, and what is wrong with the lists.

    Line n of the captions belongs to line n of the videos, so a blank line is refused instead of skipped: skipping it
    would give every later video the wrong caption. Blank lines at the very end are ignored.

    Args:
        image_file: list of the images that the videos begin with; None: their first frames.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root}: no such folder; --instance_data_root (for a preview: FOLDER) is the one that holds {caption_file}"
        )
    captions, problems = _read_list(root, caption_file, "--caption_column")
    videos, more_problems = _read_list(root, video_file, "--video_column")
    images, image_problems = _read_list(root, image_file, "--image_column") if image_file else ([], [])
    problems += more_problems + image_problems
    lengths = {caption_file: len(captions), video_file: len(videos), image_file: len(images)}
    lengths = {name: length for name, length in lengths.items() if length}
    if len(set(lengths.values())) > 1:
        (first, length), *others = lengths.items()
        problems.append(
            f"{first} has {length} lines and {' and '.join(f'{name} {length}' for name, length in others)}: "
            "line n of one belongs to line n of the other; add or remove lines until they match"
        )
    prefix = f"{id_token} " if id_token else ""
    lines = itertools.zip_longest(captions, videos, images, fillvalue="")
    clips = [  # with a video but no caption too, so that its own problems are told as well
        Clip(
            root / Path(video).expanduser(), prefix + caption, line, root / Path(image).expanduser() if image else None
        )
        for line, (caption, video, image) in enumerate(lines, start=1)
        if video
    ]
    return clips, problems


def _read_list(root: Path, name: str, option: str) -> tuple[list[str], list[str]]:
    """Stripped lines, and problems; reads UTF-8 with or without a byte order mark, any of the three line ends."""
    path = root / name
    if not path.is_file():
        return [], [f"{path}: no such file{_near_names(root, name, option)}"]
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        return [], [f"{name}:{line}: not UTF-8 text (byte 0x{content[error.start]:02x}); save the file as UTF-8"]
    # Not str.splitlines: it also splits at form feeds and U+2028, which shifts captions against videos.
    lines = [line.strip() for line in re.split(r"\r\n|\n|\r", text)]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        return [], [f"{name}: the file is empty; write one line per clip"]
    blank = [
        f"{name}:{number}: blank line; write what is missing, or delete it, in the other lists, too, where its pair is"
        for number, line in enumerate(lines, start=1)
        if not line
    ]
    return lines, blank


def _near_names(root: Path, name: str, option: str) -> str:
    near = difflib.get_close_matches(name, [path.name for path in root.glob("*.txt")], n=1, cutoff=0.5)
    return (
        f", but there is {near[0]}: pass {option} {near[0]}" if near else f"; write it, or name another with {option}"
    )


# ---- frames ----------------------------------------------------------------------------------------------------------


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
    indices = choose_frames(_timestamps(reader), view)
    place, parts = _place(video, view), []
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
        problem = _problem(clip, f"stopped in the middle of decoding: {str(error).splitlines()[0]}")
        raise ValueError(problem) from error


def _place(video: Path, view: View) -> tuple[float, float]:
    if view.crop == "center":
        return 0.5, 0.5
    draw = random.Random(f"{view.seed} {file_hash(video)}")
    return draw.random(), draw.random()


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
    image = read_image(clip.image, view.height, view.width, _place(clip.video, view))
    return image.flip(1) if mirrored else image


def _timestamps(reader) -> np.ndarray:
    return reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(np.float64)


# ---- what is known of a clip before it is encoded --------------------------------------------------------------------


def examine(clip: Clip, view: View) -> tuple[Facts | None, str | None]:
    """What the model gets of a clip, or why it cannot be used."""
    for file in filter(None, (clip.video, clip.image)):
        if not file.is_file():
            return None, _problem(clip, "no such file; correct the path, which starts at the dataset's folder", file)
    try:
        facts = read_facts(clip.video, view)
    except ValueError as error:
        return None, _problem(clip, str(error))
    if clip.image:
        try:
            read_image(clip.image, view.height, view.width)
        except ValueError as error:
            return None, _problem(clip, str(error), clip.image)
    return facts, None


def read_facts(video: Path, view: View) -> Facts:
    """Facts of a file that is there.

    Raises:
        ValueError: it cannot be read, or not as `view` asks for.
    """
    if video.stat().st_size == 0:
        raise ValueError("the file is empty; copy it again, or remove the clip from the lists")
    try:
        reader = decord.VideoReader(str(video))  # reads to the end of the file, so a truncated one fails here
        timestamps = _timestamps(reader)
        indices = choose_frames(timestamps, view)
        height, width, _ = reader[indices[-1]].shape
    except (RuntimeError, decord.DECORDError) as error:
        remedy = "play it to check, and re-encode it (ffmpeg -i in -c:v libx264 out.mp4) or remove it from the lists"
        raise ValueError(f"cannot be read as a video, the file is damaged or not a video; {remedy}") from error
    if min(height, width) < SMALLEST_SIDE:
        raise ValueError(f"is {width}x{height} pixels; decord reads videos from {SMALLEST_SIDE} pixels a side")
    if view.whole and len(indices) < view.max_num_frames:
        raise ValueError(
            f"gives {len(indices)} frames at --fps {view.fps}, and this checkpoint takes {view.max_num_frames}, no "
            "fewer; use a longer clip, or remove it from the lists"
        )
    span, intervals = timestamps[-1] - timestamps[0], len(timestamps) - 1
    fps = float(intervals / span) if span else reader.get_avg_fps()
    seen_until = float(timestamps[indices[0]] - timestamps[0]) + len(indices) / view.fps
    return Facts(width, height, fps, len(timestamps), indices, seen_until, file_hash(video))


def headline(facts: list[Facts], view: View) -> str:
    """What clips are, and what the model gets of them."""
    sizes = sorted({(fact.width, fact.height) for fact in facts}, key=math.prod)
    rates = sorted({round(fact.fps, 2) for fact in facts})
    lengths = sorted(Counter(len(fact.indices) for fact in facts).items(), reverse=True)
    return (
        f"{count_clips(len(facts))} of {_range([f'{width}x{height}' for width, height in sizes])} at "
        f"{_range([f'{rate:g}' for rate in rates])} fps -> {view.width}x{view.height} at {view.fps} fps; "
        + ", ".join(f"{count} of {length}{' frames' * (i == 0)}" for i, (length, count) in enumerate(lengths))
    )


def remarks(clips: list[Clip], facts: list[Facts], view: View) -> list[str]:
    """What the model does not see of clips, and what of them looks like an oversight, a line each.

    Args:
        facts: of each clip.
    """
    unseen = [fact.unseen_seconds for fact in facts if fact.unseen_seconds >= 0.05]
    cropped = [fact.cropped(view) for fact in facts if fact.cropped(view) >= 0.005]
    parts = [f"up to {max(unseen):.1f} s at the end ({count_clips(len(unseen))})"] if unseen else []
    parts += [f"up to {100 * max(cropped):.0f} % of the picture ({count_clips(len(cropped))})"] if cropped else []
    lines = [f"not seen: {', '.join(parts)}"] if parts else []
    larger = sum(fact.scale(view) > 1 for fact in facts)
    slower = sum(fact.repeats for fact in facts)
    lines += [f"scaled up, so less sharp than others of this size: {count_clips(larger)}"] if larger else []
    lines += [f"slower than {view.fps} fps, so some frames are seen twice: {count_clips(slower)}"] if slower else []
    return lines + _repetitions(clips, facts)


def _repetitions(clips: list[Clip], facts: list[Facts]) -> list[str]:
    """Videos and captions that stand in the lists more than once, the most frequent first."""
    videos, captions = {}, {}
    for clip, fact in zip(clips, facts):
        videos.setdefault(fact.content, []).append(clip.line)
        captions.setdefault(clip.caption, []).append(clip.line)
    lines = []
    for what, found in (("video", videos), ("caption", captions)):
        repeated = sorted((group for group in found.values() if len(group) > 1), key=len, reverse=True)
        if repeated:
            groups = [_and(group[:6], len(group)) for group in repeated[:5]]
            more = f"; and {len(repeated) - 5} more" if len(repeated) > 5 else ""
            lines.append(f"the same {what} more than once: lines {'; '.join(groups)}{more}")
    return lines


def count_clips(count: int) -> str:
    return f"{count} clip{'s' * (count != 1)}"


def _range(ascending: list[str]) -> str:
    return ascending[0] if len(ascending) == 1 else f"{ascending[0]} to {ascending[-1]}"


def _and(numbers: list[int], count: int) -> str:
    """The numbers in words, of `count` that there are."""
    *most, last = [*map(str, numbers), *([f"{count - len(numbers)} others"] if count > len(numbers) else [])]
    return f"{', '.join(most)} and {last}"


# ---- the cache -------------------------------------------------------------------------------------------------------


def encode_dataset(
    root: Path,
    clips: list[Clip],
    problems: list[str],
    view: View,
    *,
    cache: Path,
    prompts: list[str],
    random_flip: bool,
    video_encoder: Encoder,
    text_encoder: Encoder,
    progress: Callable[..., Iterable],
    ranks: Ranks,
    everyone: Ranks,
) -> Data:
    """Fills the cache with what it does not hold yet, each rank its share, after everything has been checked.

    Args:
        clips, problems: from `read_clips`.
        prompts: further captions to encode, for validation.
        progress: wraps an iteration, as tqdm does; called with (items, description, unit).
        ranks: that see the same cache, and so share its work.
        everyone: all ranks; where machines do not share a disk, each must have the whole dataset.

    Raises:
        ValueError: with all problems of the dataset at once, before anything is loaded or written.
    """
    refuse = partial(_refuse, root, everyone)
    probed = ranks.gather_shares(probe_clips(ranks.share(clips), view, cache, video_encoder.fingerprint, random_flip))
    refuse(problems + [clip.problem for clip in probed if clip.problem])

    captions = {
        text: cache_path(cache, "captions", caption=text, encoder=text_encoder.fingerprint)
        for text in [clip.caption for clip in clips] + prompts
    }
    new_captions = [(text, path) for text, path in captions.items() if not path.exists()]
    new_latents = _missing(clips, probed)
    ranks.wait()  # until all know what is missing, nobody writes
    if share := ranks.share(new_captions):
        with text_encoder.load() as encode:
            cache_captions(share, encode, text_encoder.at_once(()), progress)
    problems = []
    if share := ranks.share(new_latents):
        with video_encoder.load() as encode:
            problems = cache_latents(share, view, encode, video_encoder.at_once, progress)
    refuse(problems)  # also keeps every rank here until all have written their share

    latents = [found.paths for found in probed]
    written = [path for paths in latents for path in paths] + list(captions.values())
    if len(set(everyone.gather([hash_of([path.name for path in written])]))) > 1:
        raise ValueError(f"{root}: the machines of this run see different clips or captions there; copy one to all")
    for path in written:
        _wait_for(path)
    cached = CachedClips(latents, [captions[clip.caption] for clip in clips])
    shapes, prompts = [_latents_shape(paths[0]) for paths in latents], {text: captions[text] for text in prompts}
    facts = [found.facts for found in probed]
    return Data(cached, shapes, prompts, facts, view, tuple(remarks(clips, facts, view)))


def _missing(clips: list[Clip], probed: list[Probed]) -> list[tuple[Clip, bool, Path]]:
    """What `cache_latents` is to make, clips of one length together; a video that is listed twice is encoded once."""
    new = {
        path: (len(found.facts.indices), (clip, bool(mirrored), path))
        for clip, found in zip(clips, probed)
        for mirrored, path in enumerate(found.paths)
        if found.missing[mirrored]
    }
    return [work for _, work in sorted(new.values(), key=itemgetter(0))]


def check_clips(root: Path, clips: list[Clip], problems: list[str], view: View, ranks: Ranks, everyone: Ranks) -> None:
    """Refuses what `encode_dataset` would, which has to know the VAE first; the arguments are its own."""
    with ThreadPoolExecutor() as threads:
        found = list(threads.map(lambda clip: examine(clip, view)[1], ranks.share(clips)))
    _refuse(root, everyone, problems + [problem for problem in ranks.gather_shares(found) if problem])


def _refuse(root: Path, everyone: Ranks, problems: list[str]) -> None:
    """Ends all ranks if one has a problem; what several have is told once."""
    if problems := list(dict.fromkeys(everyone.gather(problems))):
        raise ValueError(list_problems(root, problems, "nothing is trained"))


def list_problems(root: Path, problems: list[str], consequence: str) -> str:
    count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
    return f"{root}: {count} in the dataset, {consequence}:\n  " + "\n  ".join(problems)


def file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cache_path(cache: Path, kind: str, **content) -> Path:
    """File for what is made from `content`: whatever changes the result must be in it."""
    return cache / kind / f"{hash_of(content)}.safetensors"


def hash_of(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:40]


def probe_clips(clips: list[Clip], view: View, cache: Path, encoder: str, random_flip: bool) -> list[Probed]:
    """Opens each clip, and says where its latents belong."""
    with ThreadPoolExecutor() as threads:
        return list(threads.map(lambda clip: _probe(clip, view, cache, encoder, random_flip), clips))


def _probe(clip: Clip, view: View, cache: Path, encoder: str, random_flip: bool) -> Probed:
    facts, problem = examine(clip, view)
    if problem:
        return Probed([], [], None, problem)
    what = view._asdict() | ({"seed": None} if view.crop == "center" else {})  # the centre does not depend on it
    for name in ("with_image", "whole"):  # what is not asked for changes nothing
        if not what[name]:
            del what[name]
    what |= {"video": facts.content, "encoder": encoder}
    if view.with_image and clip.image:
        what["image"] = file_hash(clip.image)
    paths = [cache_path(cache, "latents", **what, mirrored=mirrored) for mirrored in (False, True)[: 1 + random_flip]]
    return Probed(paths, [not path.exists() for path in paths], facts, None)


def _problem(clip: Clip, what: str, file: Path | None = None) -> str:
    return f"line {clip.line}: {file or clip.video}: {what}"


def cache_captions(
    work: list[tuple[str, Path]],
    encode: Callable[[list[str]], torch.Tensor],
    at_once: int,
    progress: Callable[..., Iterable],
) -> None:
    """Encodes captions into one file each.

    Args:
        work: (caption, file to write).
        encode: captions -> embeddings [B, L, D].
        at_once: how many to encode together.
    """
    batch = []
    with _written_behind([]) as write:
        for i, item in enumerate(progress(work, "Encoding captions", "caption"), start=1):
            batch.append(item)
            if len(batch) == at_once or i == len(work):
                prompt_embeds_of_batch = encode(_filled_up([text for text, _ in batch], at_once))
                for (_, path), prompt_embeds in zip(batch, prompt_embeds_of_batch):
                    write(write_cached, path, {"prompt_embeds": prompt_embeds})
                batch = []


def cache_latents(
    work: list[tuple[Clip, bool, Path]],
    view: View,
    encode: Callable[[torch.Tensor], torch.Tensor],
    at_once: Callable[[tuple[int, ...]], int],
    progress: Callable[..., Iterable],
) -> list[str]:
    """Encodes clips into one file each, and returns what went wrong; what is done stays done.

    Threads decode the next clips and write the last ones while these are encoded: decord, torch and files leave the
    interpreter free, so processes would only add a start-up time and a copy of each clip.

    Args:
        work: (clip, mirrored, file to write); clips are encoded together where they follow on one another in one shape.
        encode: uint8 [B, F, H, W, C] -> parameters of the latents' distribution [B, 2c, f, h, w], mean, log-variance.
        at_once: how many clips of [F, H, W, C] to encode together.
    """
    problems, batch = [], []
    threads = decoding_threads(view)
    decoded = _ahead(partial(_frames_and_image, view), work, threads)
    with _written_behind(problems) as write, closing(decoded):

        def encode_batch():
            frames = [frames for _, frames, _ in batch]
            parameters = encode(torch.stack(_filled_up(frames, at_once(tuple(frames[0].shape)))))
            for ((clip, _, path), _, image), of_clip in zip(batch, parameters):
                write(_write_latents, clip, path, of_clip, image)
            batch.clear()

        for item, (frames, image) in zip(progress(work, "Encoding clips", "clip"), decoded):
            if isinstance(frames, str):
                problems.append((item[0].line, frames))
                continue
            if batch and batch[0][1].shape != frames.shape:
                encode_batch()
            batch.append((item, frames, image))
            if len(batch) >= at_once(tuple(frames.shape)):
                encode_batch()
        if batch:
            encode_batch()
    return [problem for _, problem in sorted(problems)]


def _filled_up(batch: list, size: int) -> list:
    """To the one size that batches have: what is made of a clip or caption then depends on nothing but itself.

    The last bits depend on the size of a batch, which would else differ between one rank and several, and after a stop.
    """
    return batch + batch[-1:] * (size - len(batch))


def decoding_threads(view: View) -> int:
    """One per core that this process has to itself, up to eight, as far as the memory for their clips allows."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    clip_bytes = view.max_num_frames * view.height * view.width * 3
    return max(1, min(8, cores, BYTES_DECODED_AHEAD // clip_bytes))


def _frames_and_image(view: View, item: tuple[Clip, bool, Path]) -> tuple[torch.Tensor | str, dict]:
    """Frames, or what is wrong with them, and what is kept beside the latents."""
    clip, mirrored, _ = item
    try:
        frames = decode(clip, view, mirrored)
    except ValueError as error:
        return str(error), {}
    return frames, {"image": first_image(clip, frames, view, mirrored)} if view.with_image else {}


def _write_latents(clip: Clip, path: Path, parameters: torch.Tensor, image: dict) -> tuple[int, str] | None:
    """Returns the line and what is wrong with it, if something is."""
    parameters = parameters.cpu()
    if not torch.isfinite(parameters).all():
        return clip.line, _problem(clip, "the VAE made NaN or infinity of it; train with --mixed_precision bf16")
    write_cached(path, {"parameters": parameters} | image)
    return None


def _ahead(call: Callable, items: Iterable, threads: int) -> Iterator:
    """What `call` makes of each item, in order; as many as there are threads are made before they are asked for."""
    items, pool = iter(items), ThreadPoolExecutor(threads)
    try:
        waiting = deque(pool.submit(call, item) for item in itertools.islice(items, threads))
        while waiting:
            made = waiting.popleft().result()
            waiting.extend(pool.submit(call, item) for item in itertools.islice(items, 1))
            yield made
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _written_behind(returned: list) -> Iterator[Callable]:
    """`write(call, *arguments)` in a thread; what fails there is raised by a later `write`, or at the end of the block.

    Args:
        returned: takes what the calls return, unless it is None.
    """
    pending = deque()
    with ThreadPoolExecutor(1) as thread:

        def finish(most_pending: int) -> None:
            while len(pending) > most_pending:
                if (result := pending.popleft().result()) is not None:
                    returned.append(result)

        def write(call: Callable, *arguments) -> None:
            finish(16)  # bounds what waits in memory
            pending.append(thread.submit(call, *arguments))

        yield write
        finish(0)


def publish(path: Path, content: bytes) -> None:
    """Writes a file that is complete or absent, also when the disk is full, the process killed or the power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def publish_folder(temporary: Path, final: Path) -> None:
    """Gives a folder that is complete its name; its files are on the disk by then."""
    for path in (*temporary.rglob("*"), temporary):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    os.rename(temporary, final)


def write_cached(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Publishes tensors; not by safetensors' save_file, which reports a full disk as an exception of its own."""
    try:
        publish(path, save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))
    except OSError as error:
        raise ValueError(
            f"{path.parent}: cannot write the cache ({error.strerror}); it takes about 5 MB a clip and 2 MB a caption: "
            "make room or give a writable folder with --latents_cache_dir, what is encoded already stays"
        ) from error


def load_prompt_embeds(path: Path) -> torch.Tensor:
    return load_file(path)["prompt_embeds"]  # [L, D]


def _wait_for(path: Path, seconds: float = 90) -> None:
    """A disk in the network shows another machine's new file with a delay: nfs remembers "not there" for a minute."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise ValueError(
                f"{path}: another process has encoded this, but this machine does not see it after {seconds:.0f} s; "
                "start again, what is encoded stays, or put --latents_cache_dir on another disk"
            )
        time.sleep(0.5)


def _latents_shape(path: Path) -> tuple[int, ...]:
    """Shape (2c, f, h, w) of cached latents, read from the file's header alone."""
    try:
        with safe_open(path, framework="pt") as file:
            return tuple(file.get_slice("parameters").get_shape())
    except SafetensorError as error:
        raise ValueError(f"{path}: this file of the cache is damaged ({error}); delete it, it is made again") from error


# ---- batches ---------------------------------------------------------------------------------------------------------


class CachedClips(torch.utils.data.Dataset):
    """Items (clip, mirrored), read from disk.

    Each gives its latents' "parameters" [2c, f, h, w], its caption's "prompt_embeds" [L, D], and, if it was kept, the
    "image" that it starts from, uint8 [H, W, C].
    """

    def __init__(self, latents: list[list[Path]], captions: list[Path]):
        self.latents, self.captions = latents, captions

    def __getitem__(self, item):
        clip, mirrored = item
        return load_file(self.latents[clip][mirrored]) | {"prompt_embeds": load_prompt_embeds(self.captions[clip])}


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


class Plan(NamedTuple):
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


def make_plan(
    batches_per_epoch: int, batches_per_step: int, epochs: int, max_steps: int | None, *, step: int, batches_seen: int
) -> Plan:
    """The plan of a run that stands at `step`; the epochs that are left are turned into updates of today's size."""
    left = max(epochs * batches_per_epoch - batches_seen, 0)
    total_steps = max_steps or step + math.ceil(left / batches_per_step)
    return Plan(step, batches_seen, batches_per_step, batches_per_epoch, total_steps)


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


def micro_batches(data: Data, plan: Plan, ranks: Ranks, batch_size, seed, random_flip, num_workers) -> Iterator[tuple]:
    """Endless (number, batch) of this rank; a batch is what `CachedClips` gives, stacked."""
    first = plan.first_batch + ranks.index
    order = rank_batches(data.shapes, batch_size, seed, random_flip, itertools.count(first, ranks.count))
    loader = torch.utils.data.DataLoader(
        data.clips,
        batch_sampler=order,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or it would draw from the global one
    )
    return zip(itertools.count(first, ranks.count), loader)


if __name__ == "__main__":
    usage = "python dataset.py preview FOLDER [options]   (see python dataset.py preview --help)"
    parser = argparse.ArgumentParser(usage=usage, description="Shows what a model will see of a dataset.")
    parser.add_argument("command", choices=["preview"])
    parser.parse_args(sys.argv[1:2])
    del sys.argv[1]
    runpy.run_module("preview", run_name="__main__")  # not imported: it stands on this module, and on model libraries
