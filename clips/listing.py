"""Folders of any layout that is known -> clips with captions, each with the place that it was read from.

What is wrong with a dataset is returned as sentences, not raised one by one, so that a person sees all of it at once.
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
    line: int  # in the list files, counted from 1
    image: Path | None = None  # that the video begins with; None: its own first frame

    def problem(self, found: str, file: Path | None = None) -> str:
        """The sentence that names this clip's place in the lists, the file (default: the video), and what is wrong."""
        return f"line {self.line}: {file or self.video}: {found}"


def add_options(group: argparse._ArgumentGroup) -> None:
    data = group.add_argument
    data("--caption_column", default="prompts.txt", metavar="FILE", help="list of captions, one per line")
    data("--video_column", default="videos.txt", metavar="FILE", help="list of videos, line n belongs to caption n")
    data("--image_column", metavar="FILE", help="image-to-video: list of images to start from (default: first frames)")
    data("--id_token", help="put before each caption, with a space: a name for the style or character to learn")


def download_dataset(name: str, cache_dir: Path | None) -> Path:
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
