"""Reads a dataset folder in any known layout into clips with captions, each with the place that it was read from.

The problems of a dataset are returned as sentences, not raised one by one, so that a person sees all of them at once.
"""

import argparse
import csv
import difflib
import io
import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download

CAPTIONS_FILE, VIDEOS_FILE = "prompts.txt", "videos.txt"
LISTS, BESIDE, SAT = "two lists", "a caption beside each clip", "videos/ and labels/"
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_COLUMN, CAPTION_COLUMNS = "file_name", ("text", "caption", "prompt")
VIDEO_SUFFIXES = {
    ".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".wmv", ".flv", ".3gp",
    ".ogv", ".mxf", ".gif", ".apng",
}  # fmt: skip
MEDIA_SUFFIXES = VIDEO_SUFFIXES | {".png", ".jpg", ".jpeg", ".webp"}


class Clip(NamedTuple):
    video: Path
    caption: str
    line: int  # of the lists or the table, or the place in the order of names, counted from 1
    image: Path | None = None  # image that the video starts from; None: its own first frame
    place: str | None = None  # where it was read from, "" if its own name says it; None: line `line` of the lists
    times: int = 1  # how often an epoch shows it

    @property
    def named(self) -> str:
        """How a remark names this clip: its line, its row, or its file."""
        return f"line {self.line}" if self.place is None else self.place or self.video.name

    def problem(self, description: str, file: Path | None = None) -> str:
        """Returns a sentence: where this clip was read from, the file (default: the video), and what is wrong."""
        place = f"line {self.line}" if self.place is None else self.place
        return ": ".join(filter(None, [place, str(file or self.video), description]))


@dataclass(frozen=True)  # no tuple: as JSON it is its text
class Folder:
    """A folder of a dataset, as an option names it: FOLDER, or FOLDER=N."""

    path: Path
    times: int = 1  # how often an epoch shows its clips

    def __str__(self) -> str:
        return str(self.path) if self.times == 1 else f"{self.path}={self.times}"


class Listing(NamedTuple):
    """A dataset as its folders list it."""

    folders: list[Folder]
    layouts: list[str]  # of each folder
    clips: list[Clip]
    problems: list[str]

    @property
    def name(self) -> str:
        return ", ".join(map(str, self.folders))

    def describe(self) -> str:
        return "\n".join(f"{folder}: read as {layout}" for folder, layout in zip(self.folders, self.layouts))


def folder_option(text: str) -> Folder:
    """Returns the folder that FOLDER or FOLDER=N names; a type for argparse."""
    path, _, times = text.rpartition("=")
    if not path or Path(text).expanduser().is_dir():
        return Folder(Path(text).expanduser())
    if not times.isdigit() or not int(times):
        rule = "FOLDER=N shows its clips N times an epoch, N a whole number of at least 1"
        raise argparse.ArgumentTypeError(f"{text}: {rule}; there is no folder of the name {text} either")
    return Folder(Path(path).expanduser(), int(times))


def add_options(group: argparse._ArgumentGroup) -> None:
    data = group.add_argument
    captions = "list of captions, one per line, or column of the folder's table (default: what the folder has)"
    videos = "list of videos, line n belonging to caption n, or column of the folder's table (default: the same)"
    images = "image-to-video: list or column of images to start from (default: first frames)"
    data("--caption_column", metavar="NAME", help=captions)
    data("--video_column", metavar="NAME", help=videos)
    data("--image_column", metavar="NAME", help=images)
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


def read_listing(
    folders: list[Folder],
    caption_column: str | None = None,
    video_column: str | None = None,
    image_column: str | None = None,
    id_token: str | None = None,
) -> Listing:
    """Returns the clips of all folders, in the order of the folders; the arguments are those of `read_clips`.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: a folder is named twice, or fits more than one layout.
    """
    listing = Listing(folders, layouts=[], clips=[], problems=[])
    paths = [os.path.realpath(folder.path) for folder in folders]
    for folder, path in zip(folders, paths):
        if paths.count(path) > 1:
            raise ValueError(f"{folder.path}: is named twice; name it once, with =2 to show its clips twice an epoch")
        layout, clips, problems = _read_folder(folder.path, caption_column, video_column, image_column, id_token)
        if len(folders) > 1:  # lines and files of the same name may be in each of them
            problems = [f"{folder.path}: {problem}" for problem in problems]
            count = itertools.count(len(listing.clips) + 1)
            clips = [clip._replace(line=next(count), place=f"{folder.path}, {clip.named}") for clip in clips]
        listing.layouts.append(layout)
        listing.problems.extend(problems)
        listing.clips.extend(clip._replace(times=folder.times) for clip in clips)
    return listing


def read_clips(
    root: Path,
    caption_column: str | None = None,
    video_column: str | None = None,
    image_column: str | None = None,
    id_token: str | None = None,
) -> tuple[list[Clip], list[str]]:
    """Returns the clips of a folder, in the order of the lists, of the table, or of their names, and its problems.

    Args:
        caption_column, video_column, image_column: list files, or columns of the table; None: what is found.
        id_token: word put before each caption.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: the folder fits more than one layout.
    """
    _, clips, problems = _read_folder(root, caption_column, video_column, image_column, id_token)
    return clips, problems


def _read_folder(
    root: Path, caption_column: str | None, video_column: str | None, image_column: str | None, id_token: str | None
) -> tuple[str, list[Clip], list[str]]:
    """Returns a folder's layout beside the result of `read_clips`."""
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root}: no such folder; pass the one that holds the clips as --instance_data_root (preview: FOLDER)"
        )
    layout = find_layout(root, caption_column, video_column)
    if layout in TABLES:
        clips, problems = _read_table(root, layout, caption_column, video_column, image_column)
    elif layout == LISTS:
        clips, problems = _read_lists(root, caption_column or CAPTIONS_FILE, video_column or VIDEOS_FILE, image_column)
    else:
        if image_column:
            raise ValueError(
                f"--image_column {image_column}: needs a list or a table; write metadata.jsonl, or leave it out"
            )
        clips, problems = _read_pairs(root, layout)
    prefix = f"{id_token} " if id_token else ""
    return layout, [clip._replace(caption=prefix + clip.caption) for clip in clips], problems


def find_layout(root: Path, caption_column: str | None = None, video_column: str | None = None) -> str:
    """Returns how a folder tells which caption belongs to which clip: one of TABLES, LISTS, BESIDE or SAT.

    Raises:
        ValueError: it fits more than one.
    """
    named = [name for name in (caption_column, video_column) if name]
    if any(name.endswith(".txt") or (root / name).is_file() for name in named):
        return LISTS
    found = [name for name in TABLES if (root / name).is_file()]
    if not named:
        found += [LISTS] * any((root / name).is_file() for name in (CAPTIONS_FILE, VIDEOS_FILE))
        found += [SAT] * ((root / "videos").is_dir() and (root / "labels").is_dir())
        found += [BESIDE] * any(path.with_suffix(".txt").is_file() for path in _media(root))
    if len(found) > 1:
        raise ValueError(
            f"{root}: fits {len(found)} layouts ({'; '.join(found)}), which may disagree; move the files of all but "
            "one to another folder, or name one by --caption_column: a list file or a column"
        )
    return found[0] if found else LISTS


def _media(root: Path) -> Iterator[Path]:
    """Yields the videos and images in a folder and its subfolders but for hidden ones, in the order of their names."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))  # not into the cache
        for name in sorted(names):
            if os.path.splitext(name)[1].lower() in MEDIA_SUFFIXES and not name.startswith("."):
                yield Path(folder, name)


def _read_pairs(root: Path, layout: str) -> tuple[list[Clip], list[str]]:
    """Reads clips whose captions are in a file each, beside them or in labels/."""
    clips, problems = [], []
    folder = root / "videos" if layout == SAT else root
    for number, path in enumerate(_media(folder), start=1):
        text = path.with_suffix(".txt")
        if layout == SAT:
            text = root / "labels" / text.relative_to(folder)
        caption, problem = _read_caption(text)
        if problem:
            problems.append(f"{path}: {problem}")
        clips.append(Clip(path, caption, number, place=""))
    if not clips:
        problems.append(f"{folder}: no videos or images in it; copy them there")
    return clips, problems


def _read_caption(path: Path) -> tuple[str, str | None]:
    """Returns the caption in a file, whose lines are joined, and its problem."""
    if not path.is_file():
        return "", f"no caption: {path} is missing; write it, or move the clip to another folder"
    text, problem = _decoded(path)
    caption = " ".join(text.split())
    if not problem and not caption:
        problem = f"{path} is empty; write the caption"
    return caption, problem


def _read_table(
    root: Path, name: str, caption_column: str | None, video_column: str | None, image_column: str | None
) -> tuple[list[Clip], list[str]]:
    """Reads a table with a row per clip, as the hub's VideoFolder has it."""
    try:
        rows = list(_rows(root / name))
    except ValueError as error:
        return [], [str(error)]
    if not rows:
        return [], [f"{name}: the table is empty; write one row per clip"]
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    candidates = [column for column in CAPTION_COLUMNS if column in columns]
    wanted = {
        "--caption_column": caption_column,
        "--video_column": video_column or FILE_COLUMN,
        "--image_column": image_column,
    }
    if not caption_column:
        if len(candidates) != 1:
            which = (
                f"more than one of {', '.join(candidates)}" if candidates else f"none of {', '.join(CAPTION_COLUMNS)}"
            )
            return [], [f"{name}: has {which}; pass the column of the captions as --caption_column"]
        wanted["--caption_column"] = candidates[0]
    problems = [
        f"{name}: no column {column}; it has {', '.join(map(str, columns))}: pass one of them as {option}"
        for option, column in wanted.items()
        if column and column not in columns
    ]
    if problems:
        return [], problems
    clips, column_of = [], list(wanted.values())
    for number, (place, row) in enumerate(rows, start=1):
        caption, video, image = (row.get(column) if column else None for column in column_of)
        texts = {column_of[0]: caption, column_of[1]: video} | ({column_of[2]: image} if image_column else {})
        empty = [column for column, text in texts.items() if not isinstance(text, str) or not text.strip()]
        problems += [f"{place}: {column} is {texts[column]!r}; write a text there" for column in empty]
        if column_of[1] not in empty:
            image_path = root / Path(image).expanduser() if image_column and column_of[2] not in empty else None
            caption = "" if column_of[0] in empty else " ".join(caption.split())
            clips.append(Clip(root / Path(video.strip()).expanduser(), caption, number, image_path, place))
    return clips, problems


def _rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Yields the place and the columns of each row of a table; raises ValueError where it is malformed."""
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise ValueError(f"{path.name}: needs a package (pip install pyarrow), or write metadata.jsonl") from None
        rows = pyarrow.parquet.read_table(path).to_pylist()
        yield from ((f"{path.name}, row {number}", row) for number, row in enumerate(rows, start=1))
        return
    text, problem = _decoded(path)
    if problem:
        raise ValueError(problem)
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text), restkey="(more than the header)")
        yield from ((f"{path.name}:{reader.line_num}", row) for row in reader)
        return
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), start=1):
        if line.strip():
            yield f"{path.name}:{number}", _parsed(line, f"{path.name}:{number}")


def _parsed(line: str, place: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error.msg}); write one object per line") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: is a {type(row).__name__}; write one object per line")
    return row


def _read_lists(root: Path, caption_file: str, video_file: str, image_file: str | None) -> tuple[list[Clip], list[str]]:
    """Reads clips from list files.

    Line n of the captions belongs to line n of the videos, so a blank line is refused instead of skipped: skipping it
    would give every later video the wrong caption. Blank lines at the very end are ignored.
    """
    captions, problems = _read_list(root, caption_file, "--caption_column")
    videos, video_problems = _read_list(root, video_file, "--video_column")
    images, image_problems = _read_list(root, image_file, "--image_column") if image_file else ([], [])
    problems += video_problems + image_problems
    lengths = {caption_file: len(captions), video_file: len(videos), image_file: len(images)}
    problems += _unequal_lengths({name: length for name, length in lengths.items() if length})

    clips = []
    lines = itertools.zip_longest(captions, videos, images, fillvalue="")
    for line, (caption, video, image) in enumerate(lines, start=1):
        if video:  # even without a caption, so that the problems of the video itself are reported as well
            image_path = root / Path(image).expanduser() if image else None
            clips.append(Clip(root / Path(video).expanduser(), caption, line, image_path))
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
    text, problem = _decoded(path)
    if problem:
        return [], [problem]
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
    return f"; write it, name another file with {option}, or use another layout: see docs/data.md"


def _decoded(path: Path) -> tuple[str, str | None]:
    """Returns a UTF-8 file's text, and its problem."""
    content = path.read_bytes()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "", f"{path.name}: is UTF-16 text; save the file as UTF-8"
    try:
        return content.decode("utf-8-sig"), None
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        byte = f"byte 0x{content[error.start]:02x}"
        return "", f"{path.name}:{line}: not UTF-8 text ({byte}, perhaps Windows-1252); save the file as UTF-8"
