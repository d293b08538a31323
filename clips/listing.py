"""Reads a dataset folder in any known layout into clips with captions, each with the place that it was read from.

The problems of a dataset are returned as sentences, not raised one by one, so that a person sees all of them at once.
"""

import argparse
import difflib
import itertools
import re
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download


class Clip(NamedTuple):
    video: Path
    caption: str
    line: int  # of the list files, counted from 1
    image: Path | None = None  # image that the video starts from; None: its own first frame

    def problem(self, description: str, file: Path | None = None) -> str:
        """Returns a sentence with this clip's line in the lists, the file (default: the video), and what is wrong."""
        return f"line {self.line}: {file or self.video}: {description}"


def add_options(group: argparse._ArgumentGroup) -> None:
    data = group.add_argument
    data("--caption_column", default="prompts.txt", metavar="FILE", help="list of captions, one per line")
    data("--video_column", default="videos.txt", metavar="FILE", help="list of videos; line n belongs to caption n")
    data("--image_column", metavar="FILE", help="image-to-video: list of images to start from (default: first frames)")
    data("--id_token", help="name of the style or character to learn, put before each caption with a space")


def download_dataset(name: str, cache_dir: Path | None) -> Path:
    """Downloads a dataset repository from the hub and returns its folder.

    Raises:
        ValueError: the download failed.
    """
    try:
        return Path(snapshot_download(name, repo_type="dataset", cache_dir=cache_dir))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--dataset_name {name}: cannot be downloaded ({str(error).strip().splitlines()[0]}); check the name and "
            "`hf auth login`, or download it yourself and pass its folder as --instance_data_root"
        ) from error


def read_clips(
    root: Path, caption_file: str, video_file: str, image_file: str | None = None, id_token: str | None = None
) -> tuple[list[Clip], list[str]]:
    """Returns the clips in the order of the lists, and the problems of the lists.

    Line n of the captions belongs to line n of the videos, so a blank line is refused instead of skipped: skipping it
    would give every later video the wrong caption. Blank lines at the very end are ignored.

    Args:
        image_file: list of the images that the videos start from; None: their first frames.
        id_token: word put before each caption.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root}: no such folder; pass the one that holds {caption_file} as --instance_data_root (preview: FOLDER)"
        )
    captions, problems = _read_list(root, caption_file, "--caption_column")
    videos, video_problems = _read_list(root, video_file, "--video_column")
    images, image_problems = _read_list(root, image_file, "--image_column") if image_file else ([], [])
    problems += video_problems + image_problems
    lengths = {caption_file: len(captions), video_file: len(videos), image_file: len(images)}
    problems += _unequal_lengths({name: length for name, length in lengths.items() if length})

    prefix = f"{id_token} " if id_token else ""
    clips = []
    lines = itertools.zip_longest(captions, videos, images, fillvalue="")
    for line, (caption, video, image) in enumerate(lines, start=1):
        if video:  # even without a caption, so that the problems of the video itself are reported as well
            image_path = root / Path(image).expanduser() if image else None
            clips.append(Clip(root / Path(video).expanduser(), prefix + caption, line, image_path))
    return clips, problems


def _unequal_lengths(lengths: dict[str, int]) -> list[str]:
    """Returns the problem of lists that differ in their number of lines, if they do."""
    if len(set(lengths.values())) <= 1:
        return []
    (first, length), *others = lengths.items()
    return [
        f"{first} has {length} lines and {' and '.join(f'{name} {length}' for name, length in others)}: "
        "line n of one belongs to line n of the other; add or remove lines until they match"
    ]


def _read_list(root: Path, name: str, option: str) -> tuple[list[str], list[str]]:
    """Returns the stripped lines of a UTF-8 file and its problems.

    The file may start with a byte order mark, and have the line ends of Unix, Windows or old Macs.
    """
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
        f"{name}:{number}: blank line; write what is missing, or delete the line here and in the other lists"
        for number, line in enumerate(lines, start=1)
        if not line
    ]
    return lines, blank


def _near_names(root: Path, name: str, option: str) -> str:
    near = difflib.get_close_matches(name, [path.name for path in root.glob("*.txt")], n=1, cutoff=0.5)
    if near:
        return f", but there is {near[0]}: pass {option} {near[0]}"
    return f"; write it, or name another file with {option}"
