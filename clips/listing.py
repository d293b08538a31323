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
import reprlib
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download

from files import LFS_BEGINNING, is_lfs_pointer, printable

CAPTIONS_FILE, VIDEOS_FILE = "prompts.txt", "videos.txt"
LISTS, BESIDE, SAT = "two lists", "a caption beside each clip", "videos/ and labels/"
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_COLUMN, CAPTION_COLUMNS = "file_name", ("text", "caption", "prompt")
VIDEO_SUFFIXES = {
    ".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".wmv", ".flv", ".3gp",
    ".ogv", ".mxf", ".gif", ".apng", ".3g2", ".asf", ".divx", ".dv", ".f4v", ".h264", ".h265", ".264", ".265", ".hevc",
    ".m1v", ".m2v", ".mjpeg", ".mjpg", ".mod", ".mpe", ".nut", ".ogm", ".qt", ".rm", ".rmvb", ".tod", ".vob", ".y4m",
}  # fmt: skip
UNREAD_SUFFIXES = {".heic", ".heif", ".avif", ".jxl", ".tif", ".tiff", ".bmp", ".dng"}  # pictures that are no clips
MEDIA_SUFFIXES = VIDEO_SUFFIXES | {".png", ".jpg", ".jpeg", ".webp"}
MASKS = "--mask_column"  # the only list or column in which a clip may be left out
NUMBERED = re.compile(r"\.\d+$")  # end of the name of one of several captions, before its suffix
PUNCTUATION = ",.;:!?，。、；：！？"  # what no space stands before
EXTRA = "(more than the header)"  # column of the fields that a row of a .csv has beyond its header
LFS = "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull` in its repository"


class Clip(NamedTuple):
    video: Path
    caption: str
    line: int  # of the lists or the table, or the place in the order of names, counted from 1
    image: Path | None = None  # image that the video starts from; None: its own first frame
    place: str | None = None  # where it was read from, "" if its own name says it; None: line `line` of the lists
    repeats: int = 1  # how often an epoch shows it
    problems: tuple[str, ...] = ()  # of how it is listed, which `Listing.problems` has as well
    other_captions: tuple[str, ...] = ()  # further ones, of which each time one is drawn
    plain_captions: tuple[str, ...] = ()  # each of its captions without the new word; none where that is not needed
    is_regularization: bool = False  # it shows what the model is to keep, and gets no new word
    mask: Path | None = None  # image or video whose white says what of the clip counts; None: all of it

    @property
    def captions(self) -> tuple[str, ...]:
        return (self.caption, *self.other_captions)

    @property
    def named(self) -> str:
        """How a remark names this clip: its line, its row, or its file."""
        return f"line {self.line}" if self.place is None else self.place or self.video.name

    def problem(self, description: str, file: Path | None = None) -> str:
        """Returns a sentence: where this clip was read from, the file (default: the video), and what is wrong."""
        place = f"line {self.line}" if self.place is None else self.place
        place = "" if place == str(file or self.video) else place
        return ": ".join(filter(None, [place, str(file or self.video), description]))


def _joined(*words: str | None) -> str:
    return " ".join(filter(None, words))


def _ended(text: str, suffix: str | None) -> str:
    return f"{text}{suffix}" if suffix and suffix[0] in PUNCTUATION else _joined(text, suffix)


class Words(NamedTuple):
    """The words around the captions of a dataset, the options of these names."""

    id_token: str | None = None
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    with_plain: bool = False  # whether to add each clip's captions without id_token
    plain_prompt: str | None = None  # in their place; None: the captions without it

    def has_word(self, text: str) -> bool:
        """Whether a text has `id_token` in it, as a word of its own."""
        return bool(self.id_token and re.search(rf"(?<!\w){re.escape(self.id_token)}(?!\w)", text))

    def around(self, clip: Clip) -> Clip:
        """Returns the clip with these words around its captions."""
        plain = [_ended(_joined(self.caption_prefix, caption), self.caption_suffix) for caption in clip.captions]
        if clip.is_regularization:
            return clip._replace(caption=plain[0], other_captions=tuple(plain[1:]))
        first, *others = (_joined(self.id_token, caption) for caption in plain)
        if self.plain_prompt is not None:
            plain = [self.plain_prompt] * len(plain)
        plain_captions = tuple(plain) if self.with_plain else ()
        return clip._replace(caption=first, other_captions=tuple(others), plain_captions=plain_captions)


NO_WORDS = Words()


class Columns(NamedTuple):
    """The list files that options name, or the columns of a folder's table; None: what is found."""

    caption: str | None = None
    video: str | None = None
    image: str | None = None
    mask: str | None = None

    def named(self) -> dict[str, str]:
        """Returns the names that are given, by their options."""
        return {f"--{kind}_column": name for kind, name in self._asdict().items() if name}


NONE_NAMED = Columns()


@dataclass(frozen=True)  # no tuple: as JSON it is its text
class Folder:
    """A folder of a dataset, as an option names it: FOLDER, or FOLDER=N."""

    path: Path
    repeats: int = 1  # how often an epoch shows its clips
    is_regularization: bool = False  # of --regularization_data_root

    def __str__(self) -> str:
        return str(self.path) if self.repeats == 1 else f"{self.path}={self.repeats}"


class Listing(NamedTuple):
    """A dataset as its folders list it."""

    folders: list[Folder]
    layouts: list[str]  # of each folder
    clips: list[Clip]
    problems: list[str]
    remarks: list[str]

    @property
    def name(self) -> str:
        return ", ".join(map(str, self.folders))

    def describe(self) -> str:
        layouts = [f"{folder}: read as {layout}" for folder, layout in zip(self.folders, self.layouts)]
        return "\n".join(layouts + self.remarks)


def folder_option(text: str) -> Folder:
    """Returns the folder that FOLDER or FOLDER=N names; a type for argparse."""
    path, _, repeats = text.rpartition("=")
    if not path or Path(text).expanduser().is_dir():
        return Folder(Path(text).expanduser())
    if not (repeats.isascii() and repeats.isdecimal() and int(repeats)):
        rule = "FOLDER=N shows its clips N times an epoch, N a whole number of at least 1"
        raise argparse.ArgumentTypeError(f"{text}: {rule}; there is no folder of the name {text} either")
    return Folder(Path(path).expanduser(), int(repeats))


def regularization_folder(text: str) -> Folder:
    """Returns the folder that FOLDER or FOLDER=N names for --regularization_data_root; a type for argparse."""
    return replace(folder_option(text), is_regularization=True)


def add_options(group: argparse._ArgumentGroup) -> None:
    data = group.add_argument
    captions = "list of captions, one per line, or column of the folder's table (default: what the folder has)"
    videos = "list of videos, line n belonging to caption n, or column of the folder's table (default: the same)"
    images = "image-to-video: list or column of images to start from (default: first frames)"
    masks = "list or column of images or videos whose white says what of a clip counts, such as faces (default: all)"
    data("--caption_column", metavar="NAME", help=captions)
    data("--video_column", metavar="NAME", help=videos)
    data("--image_column", metavar="NAME", help=images)
    data("--mask_column", metavar="NAME", help=masks)
    data("--id_token", help="name of the style or character to learn, put before each caption with a space")
    data("--caption_prefix", metavar="TEXT", help="text put before each caption with a space, after --id_token")
    suffix = "text put after each caption with a space, which is left out before a comma, full stop and the like"
    data("--caption_suffix", metavar="TEXT", help=suffix)


def columns_of(args: argparse.Namespace) -> Columns:
    return Columns(args.caption_column, args.video_column, args.image_column, args.mask_column)


def words_of(args: argparse.Namespace) -> Words:
    return Words(args.id_token, args.caption_prefix, args.caption_suffix)


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


def read_listing(folders: list[Folder], columns: Columns = NONE_NAMED, words: Words = NO_WORDS) -> Listing:
    """Returns the clips of all folders, in the order of the folders, and of the lists, the table or the names in each.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: a folder is named twice, or fits more than one layout, or not what the options name.
    """
    listing = Listing(folders, layouts=[], clips=[], problems=[], remarks=[])
    paths = [os.path.realpath(folder.path) for folder in folders]
    for folder, path in zip(folders, paths):
        if paths.count(path) > 1:
            kinds = {other.is_regularization for other, its_path in zip(folders, paths) if its_path == path}
            way_out = "name it once, with =2 to show its clips twice an epoch"
            if len(kinds) > 1:
                way_out = "clips to learn and clips of --regularization_data_root must be others"
            raise ValueError(f"{folder.path}: is named twice; {way_out}")
        of_folder = columns._replace(mask=None) if folder.is_regularization else columns  # what is kept counts whole
        layout, clips, problems = _read_folder(folder.path, of_folder)
        if len(folders) > 1:  # lines and files of the same name may be in each of them
            problems = [_in_folder(folder.path, problem) for problem in problems]
            clips = [
                clip._replace(
                    line=line,
                    place=f"{folder.path}, {clip.named}" if clip.place != "" else str(clip.video),
                    problems=tuple(_in_folder(folder.path, problem) for problem in clip.problems),
                )
                for line, clip in enumerate(clips, start=len(listing.clips) + 1)
            ]
        if folder.repeats > 1:
            count, repeats = len(clips), folder.repeats
            shown = f"{count} clips, each shown {repeats} times an epoch, {repeats * count} in all"
            listing.remarks.append(f"{folder.path}: {shown}")
        listing.layouts.append(layout)
        listing.remarks.extend(_left_out(folder.path, layout, clips))
        listing.problems.extend(problems)
        of_folder = {"repeats": folder.repeats, "is_regularization": folder.is_regularization}
        listing.clips.extend(clip._replace(**of_folder) for clip in clips)
    _check_words(listing, words)
    return listing._replace(clips=[words.around(clip) for clip in listing.clips])


def _check_words(listing: Listing, words: Words) -> None:
    """Adds to a listing what is said about captions that have the new word already.

    It is a problem where the absence of the word means the base model.
    """
    for is_regularization in (False, True):
        found = [clip for clip in listing.clips if clip.is_regularization == is_regularization]
        found = [clip for clip in found if any(map(words.has_word, clip.captions))]
        if not found:
            continue
        said = f"{len(found)} captions contain --id_token {words.id_token}, the first one that of {found[0].named}"
        if is_regularization:
            listing.problems.append(
                f"{said}: --regularization_data_root shows what is to stay as it is; remove it there"
            )
        elif words.with_plain and words.plain_prompt is None:
            rule = "it is added before each caption, and captions without it stand for the base model; remove it there"
            listing.problems.append(f"{said}: {rule}")
        else:
            listing.remarks.append(f"{said}: it is added before these, too")


def _in_folder(folder: Path, problem: str) -> str:
    return problem if problem.startswith(str(folder)) else f"{folder}: {problem}"


def _read_folder(root: Path, columns: Columns) -> tuple[str, list[Clip], list[str]]:
    """Returns a folder's layout, its clips and its problems."""
    if not root.is_dir():
        found = "is a file, not a folder" if root.exists() else "no such folder"
        raise FileNotFoundError(
            f"{root}: {found}; pass the one that holds the clips (--instance_data_root, or FOLDER of dataset.py)"
        )
    layout, named = find_layout(root, columns), columns.named()
    if layout in TABLES:
        clips, problems = _read_table(root, layout, named)
    elif layout == LISTS:
        clips, problems = _read_lists(root, named)
    elif named:
        option, name = next(iter(named.items()))
        raise ValueError(
            f"{option} {name}: needs a list or a table, and {root} has {layout}; write metadata.jsonl, or leave it out"
        )
    else:
        clips, problems = _read_pairs(root, layout)
    return layout, clips, problems


def _left_out(root: Path, layout: str, clips: list[Clip]) -> Iterator[str]:
    """Yields a line on each kind of file in a folder that may have been meant to be a clip or a caption."""
    used = {os.path.abspath(path) for clip in clips for path in (clip.video, clip.image, clip.mask) if path}
    stems = {os.path.splitext(path)[0] for path in used}
    unread, unlisted, without_clip = [], [], []
    for path in _files(Path(os.path.abspath(root))):
        stem, suffix = os.path.splitext(path)
        if suffix.lower() in UNREAD_SUFFIXES:
            unread.append(path)
        elif suffix.lower() in MEDIA_SUFFIXES and path not in used:
            unlisted.append(path)
        elif suffix == ".txt" and layout == BESIDE and not (stems | used) & {stem, NUMBERED.sub("", stem)}:
            without_clip.append(path)
    captioned = _not_clips(root, without_clip)
    without_clip = [path for path in without_clip if os.path.splitext(path)[0] not in captioned]
    for kind, paths in (
        ("not read; save them as JPEG or PNG", unread),
        (f"in none of the {layout}, so not used" if layout == LISTS else f"not in {layout}, so not used", unlisted),
        ("captions without a clip", without_clip),
        ("have a caption but not the ending of a video, so not used; convert them to .mp4", list(captioned.values())),
        ("links to folders, which are not followed; pass those folders as well", _linked_folders(root, layout)),
    ):
        if paths:
            more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
            yield printable(f"{root}: {kind}: {', '.join(map(os.path.basename, paths[:3]))}{more}")


def _not_clips(root: Path, captions: list[str]) -> dict[str, str]:
    """Returns the files that have the names of captions and no ending of a clip, by their paths without the ending."""
    stems = {os.path.splitext(path)[0] for path in captions}
    others = {} if not stems else {os.path.splitext(path): path for path in _files(Path(os.path.abspath(root)))}
    apart = {".txt", *UNREAD_SUFFIXES}  # pictures have a line of their own
    return {stem: path for (stem, suffix), path in others.items() if stem in stems and suffix.lower() not in apart}


def find_layout(root: Path, columns: Columns = NONE_NAMED) -> str:
    """Returns how a folder tells which caption belongs to which clip: one of TABLES, LISTS, BESIDE or SAT.

    Raises:
        ValueError: it fits more than one, or an option names a table.
    """
    named = [name for name in (columns.caption, columns.video) if name]
    if tables := [name for name in named if name in TABLES]:
        rule = "a table is found without being named, and --caption_column and --video_column name columns of it"
        raise ValueError(f"{tables[0]}: {rule}; pass those, or leave the options out")
    if any(name.endswith(".txt") or (root / name).is_file() for name in named):
        return LISTS
    found = _evidence(root)
    if named and any(layout in TABLES for layout in found):
        found = {layout: files for layout, files in found.items() if layout in TABLES}
    elif caption := _caption_beside(root):
        found[BESIDE] = [os.path.relpath(caption, root)]
    if len(found) > 1:
        layouts = [name if name in files else f"{name}: {', '.join(files)}" for name, files in found.items()]
        raise ValueError(
            f"{root}: fits {len(found)} layouts ({'; '.join(layouts)}), which may disagree; move the files of all but "
            "one to another folder, or name one by --caption_column: a list file or a column"
        )
    return next(iter(found), LISTS)


def _evidence(root: Path) -> dict[str, list[str]]:
    """Returns the layouts for which something in a folder itself speaks, its subfolders left out, and what that is."""
    layouts = {table: [table] for table in TABLES} | {LISTS: [CAPTIONS_FILE, VIDEOS_FILE]}
    found = {layout: [name for name in names if (root / name).is_file()] for layout, names in layouts.items()}
    found[SAT] = [SAT] if (root / "videos").is_dir() and (root / "labels").is_dir() else []
    return {layout: names for layout, names in found.items() if names}


def _caption_beside(root: Path) -> str | None:
    """Returns a text file that a clip beside it gave its name, if there is one, also if it has to be renamed."""
    for folder, names in _folders(root):
        texts = {name for name in names if name.lower().endswith(".txt")}
        for name, (stem, suffix) in zip(names, map(os.path.splitext, names)):
            if suffix.lower() not in MEDIA_SUFFIXES:
                continue
            names_of_text = f"{stem}.txt", f"{stem}.txt.txt", f"{stem}.1.txt", f"{stem}.TXT", f"{name}.txt"
            if caption := next((name for name in names_of_text if name in texts), None):
                return os.path.join(folder, caption)
    return None


def _folders(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields a folder and its subfolders but for hidden ones, and the names of the files in each, in order."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))  # not into the cache
        yield folder, sorted(name for name in names if not name.startswith("."))


def _linked_folders(root: Path, layout: str = BESIDE) -> list[str]:
    """Returns the links to folders in which clips would be looked for."""
    links = []
    if layout not in (BESIDE, SAT):  # lists and tables name the files
        return links
    for folder, subfolders, _ in os.walk(root / "videos" if layout == SAT else root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        links += [path for name in subfolders if os.path.islink(path := os.path.join(folder, name))]
    return links


def _files(root: Path) -> Iterator[str]:
    """Yields the files in a folder and its subfolders but for hidden ones, folder by folder, by name."""
    for folder, names in _folders(root):
        yield from (os.path.join(folder, name) for name in names)


def _media(root: Path) -> Iterator[Path]:
    """Yields the videos and images among `_files`."""
    for folder, names in _folders(root):
        parent = Path(folder)
        yield from (parent / name for name in names if os.path.splitext(name)[1].lower() in MEDIA_SUFFIXES)


def _read_pairs(root: Path, layout: str) -> tuple[list[Clip], list[str]]:
    """Reads clips whose captions are in a file each, or in several, beside them or in labels/."""
    clips, problems, clip_of_text = [], [], {}
    folder, texts = (root / "videos", root / "labels") if layout == SAT else (root, root)
    paths = list(_media(folder))
    text_of = {path: texts / path.relative_to(folder).with_suffix(".txt") for path in paths}
    numbered = _numbered_captions(texts, set(text_of.values()))
    for number, (path, text) in enumerate(text_of.items(), start=1):
        files = [*([text] if text.is_file() or text not in numbered else []), *numbered.get(text, [])]
        read = [_read_caption(file, text.with_name(f"{path.name}.txt")) for file in files]
        (caption, _), *others = read
        problem = next((problem for _, problem in read if problem), None)
        if text in clip_of_text:
            problem = f"shares its caption with {clip_of_text[text].name}; rename one of them, or move it away"
        of_clip = (f"{path}: {problem}",) if problem else ()
        problems += of_clip
        clip_of_text[text] = path
        other_captions = tuple(other for other, _ in others)
        clips.append(Clip(path, caption, number, place="", problems=of_clip, other_captions=other_captions))
    labels = sorted((root / "labels").rglob("*.txt")) if layout == SAT else ()
    used = {*clip_of_text, *itertools.chain(*numbered.values())}
    problems += [f"{text}: no clip of this name in videos/; rename or remove it" for text in labels if text not in used]
    if not clips:
        problems.append(f"{folder}: no videos or images in it; copy them there")
    if problems and layout == BESIDE and (datasets := _datasets_in(root)):
        problems.insert(0, _meant_datasets(root, datasets))
    return clips, problems


def _numbered_captions(root: Path, texts: set[Path]) -> dict[Path, list[Path]]:
    """Returns further captions of a clip, such as a.1.txt and a.2.txt, by the file of its first one, a.txt.

    Args:
        texts: the first one of each clip, which may be missing; a.1.txt belongs to a.1.mp4 where there is such a clip.
    """
    numbered = {}
    for folder, names in _folders(root):
        for name in names:
            stem, suffix = os.path.splitext(name)
            first = Path(folder, f"{NUMBERED.sub('', stem)}.txt")
            if suffix == ".txt" and NUMBERED.search(stem) and first in texts and Path(folder, name) not in texts:
                numbered.setdefault(first, []).append(Path(folder, name))
    return {text: sorted(paths, key=lambda path: int(path.stem.rpartition(".")[2])) for text, paths in numbered.items()}


def _datasets_in(root: Path) -> list[str]:
    """Returns the names of the subfolders that are datasets of their own."""
    subfolders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [path.name for path in subfolders if _evidence(path)]


def _meant_datasets(root: Path, names: list[str]) -> str:
    """Returns the problem of a folder that was probably given in place of datasets in it."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    paths = " ".join(str(root / name) for name in names[:3])
    return (
        f"{root}: has datasets of their own in it ({', '.join(names[:3])}{more}); pass the folders of the datasets in "
        f"its place, several after each other: {paths}{' ...' if more else ''}"
    )


def _read_caption(path: Path, misnamed: Path) -> tuple[str, str | None]:
    """Returns the caption in a file, whose lines are joined, and its problem.

    Args:
        misnamed: file with the caption if other tools wrote it.
    """
    if not path.is_file():
        if path.exists():
            return "", f"no caption: {path} is not a plain file; write a text file of that name"
        if (twice := path.with_name(f"{path.name}.txt")).is_file():
            there = f"{twice.name}, which Windows may show as {path.name}"
            return "", f"no caption: {path} is missing, but there is {there}; rename it to {path.name}"
        if misnamed.is_file():
            return "", f"no caption: {path} is missing, but there is {misnamed.name}; rename it to {path.name}"
        if there := other_spelling(path):
            return "", f"no caption: {path} is missing, but there is {there}; rename it, its spelling is another"
        return "", f"no caption: {path} is missing; write it, or move the clip to another folder"
    text, problem = _decoded(path)
    caption = " ".join(text.split())
    if not problem and not caption:
        problem = f"{path} is empty; write the caption"
    return caption, problem


def _read_table(root: Path, name: str, named: dict[str, str]) -> tuple[list[Clip], list[str]]:
    """Reads a table with a row per clip, as the hub's VideoFolder has it; `named` holds what options name."""
    try:
        rows = list(_rows(root / name))
    except ValueError as error:
        return [], [str(error)]
    if not rows:
        return [], [f"{name}: the table is empty; write one row per clip, in a .csv below the names of the columns"]
    columns = [column for column in dict.fromkeys(column for _, row in rows for column in row) if column != EXTRA]
    if not named.get("--caption_column"):
        candidates = [column for column in CAPTION_COLUMNS if column in columns]
        if len(candidates) != 1:
            has = f"more than one of {', '.join(candidates)}" if candidates else f"none of {', '.join(CAPTION_COLUMNS)}"
            remedy = f"pass the column of the captions as --caption_column, one of {', '.join(columns)}"
            return [], [f"{name}: has {has}; {remedy}"]
        named = named | {"--caption_column": candidates[0]}
    named = {"--video_column": FILE_COLUMN} | named
    problems = _named_twice(named) + [
        f"{name}: no column {column}; it has {', '.join(columns)}: pass one of them as {option}"
        for option, column in named.items()
        if column not in columns
    ]
    clips = []
    for number, (place, row) in enumerate([] if problems else rows, start=1):
        clip, of_row = _read_row(root, named, row, number, place)
        problems += of_row
        clips += [clip] if clip else []
    return clips, problems


def _read_row(root: Path, named: dict[str, str], row: dict, number: int, place: str) -> tuple[Clip | None, list[str]]:
    """Returns the clip of a row, None if it names no file, and the problems of the row."""
    texts = {option: row.get(column) for option, column in named.items()}
    captions, others = texts["--caption_column"], []
    if isinstance(captions, list) and captions and all(map(_is_text, captions)):
        texts["--caption_column"], *others = captions
    wrong = [option for option, text in texts.items() if not (_is_text(text) or _is_left_out(option, text))]
    problems = [f"{place}: {named[option]} is {reprlib.repr(texts[option])}; write a text there" for option in wrong]
    if any(row.get(EXTRA, ())):  # spreadsheets write empty fields at the end
        more = reprlib.repr(row[EXTRA])
        problems.append(f"{place}: has more fields than the header, {more}; put a field with a comma in double quotes")
    caption, video, image, mask = (
        (texts[option] or "").strip() if option in named and option not in wrong else ""
        for option in ("--caption_column", "--video_column", "--image_column", MASKS)
    )
    if not video:
        return None, problems
    image_path, mask_path = (_path(root, path) if path else None for path in (image, mask))
    clip = Clip(_path(root, video), " ".join(caption.split()), number, image_path, place, problems=tuple(problems))
    other_captions = tuple(" ".join(other.split()) for other in others)
    return clip._replace(other_captions=other_captions, mask=mask_path), problems


def _is_text(value: object) -> bool:
    """Whether a value is text that UTF-8 can write, which it can of every character but half a surrogate pair."""
    return isinstance(value, str) and bool(value.strip()) and not re.search("[\0\ud800-\udfff]", value)


def _is_left_out(option: str, value: object) -> bool:
    """Whether a value says that a clip has no mask, which it need not have."""
    return option == MASKS and (value is None or (isinstance(value, str) and not value.strip()))


def _path(root: Path, text: str) -> Path:
    # Path.expanduser raises an error where there is no such user; os.path leaves the path as it is: a missing file.
    return root / os.path.expanduser(text)


def _rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Yields the place and the columns of each row of a table; raises ValueError where it is malformed."""
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    text, problem = _decoded(path)
    if problem:
        raise ValueError(problem)
    if path.suffix == ".csv":
        yield from _csv_rows(path.name, text)
        return
    for number, line in enumerate(re.split(r"\r\n|\n|\r", text), start=1):
        if line.strip():
            yield f"{path.name}:{number}", _parsed(line, f"{path.name}:{number}")


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict]]:
    if is_lfs_pointer(path):
        raise ValueError(f"{path.name}: {LFS}")
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path.name}: needs a package (pip install pyarrow), or write metadata.jsonl") from None
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path.name}: not Parquet ({reason}); copy it again, or write metadata.jsonl") from error
    yield from ((f"{path.name}, row {number}", row) for number, row in enumerate(rows, start=1))


def _csv_rows(name: str, text: str) -> Iterator[tuple[str, dict]]:
    reader = csv.DictReader(io.StringIO(text, newline=None), restkey=EXTRA, skipinitialspace=True, strict=True)
    start = 1  # line where the next row begins: one with line breaks in quotes ends further down
    try:
        columns = reader.fieldnames or []
        if len(columns) == 1 and (mark := re.search(r"[;\t|]", columns[0])):
            raise ValueError(f"{name}:1: columns are separated by {mark[0]!r}; save it separated by commas")
        if twice := [column for column in dict.fromkeys(columns) if column and columns.count(column) > 1]:
            raise ValueError(f"{name}:1: has more than one column {twice[0]}; rename or remove all but one")
        start = reader.line_num + 1
        for row in reader:
            yield f"{name}:{reader.line_num}", row
            start = reader.line_num + 1
    except csv.Error as error:
        rule = "close double quotes where they open, and write those within a field twice"
        raise ValueError(f"{name}:{start}: not CSV ({error}); {rule}") from error


def _parsed(line: str, place: str) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # besides what is no JSON: very long numbers, very deep nesting
        reason = str(error).partition(":")[0]
        rule = "write one object per line, with no comma after it or after its last value, and no list around all"
        raise ValueError(f"{place}: not JSON ({reason}); {rule}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: is a {type(row).__name__}; write one object per line")
    return row


def _read_lists(root: Path, named: dict[str, str]) -> tuple[list[Clip], list[str]]:
    """Reads clips from list files; `named` holds the names that options give them.

    Line n of the captions belongs to line n of the videos, so a blank line is refused instead of skipped: skipping it
    would give every later video the wrong caption. Blank lines at the very end are ignored.
    """
    names = {"--caption_column": CAPTIONS_FILE, "--video_column": VIDEOS_FILE} | named
    if not (named or any((root / name).exists() for name in names.values())):
        return [], [_no_layout(root)]
    problems, lists = _named_twice(names), {}
    for option, name in names.items():
        lists[option], of_list = _read_list(root, name, option, taken=set(names.values()))
        problems += of_list
    if lists.get(MASKS):  # the last clips may have none
        length = max(len(lines) for option, lines in lists.items() if option != MASKS)
        while len(lists[MASKS]) > length and not lists[MASKS][-1]:
            lists[MASKS].pop()
    problems += _unequal_lengths({names[option]: len(lines) for option, lines in lists.items() if lines})

    clips, kinds = [], ("--caption_column", "--video_column", "--image_column", MASKS)
    lines = itertools.zip_longest(*(lists.get(option, []) for option in kinds), fillvalue="")
    for line, (caption, video, image, mask) in enumerate(lines, start=1):
        if video:  # even without a caption, so that the problems of the video itself are reported as well
            blank = tuple(
                _blank_line(names[option], line)
                for option, lines in lists.items()
                if option != MASKS and "" in lines[line - 1 : line]
            )
            image_path, mask_path = (_path(root, path) if path else None for path in (image, mask))
            clips.append(Clip(_path(root, video), caption, line, image_path, problems=blank, mask=mask_path))
    return clips, problems


def _no_layout(root: Path) -> str:
    """Returns the problem of a folder in which nothing tells the captions."""
    if datasets := _datasets_in(root):
        return _meant_datasets(root, datasets)
    others = sorted(path.name for path in root.iterdir() if not path.name.startswith(".") and path.is_file())
    others = [name for name in others if Path(name).suffix.lower() not in MEDIA_SUFFIXES]
    beside = f", and beside them {', '.join(others[:5])}" if others else ""
    count = sum(1 for _ in _media(root))
    if not count:
        links = ", ".join(map(os.path.basename, _linked_folders(root)[:3]))
        followed = f", but links to folders, which are not followed ({links}); pass those folders" if links else ""
        beside = f", only {', '.join(others[:5])}" if others else ""
        return f"{root}: holds no videos and no images{beside}{followed or '; copy clips and captions there'}"
    clips = "1 video or image" if count == 1 else f"{count} videos and images"
    lists = sum(name.endswith(".txt") for name in others) > 1
    or_name = ", or name your lists with --caption_column and --video_column" if lists else ""
    return (
        f"{root}: holds {clips}{beside}, but no captions: no .txt file of the name of a clip, "
        f"no {CAPTIONS_FILE} and {VIDEOS_FILE}, no {', '.join(TABLES)}, no {SAT}; write one of them{or_name}: "
        "see docs/data.md"
    )


def _named_twice(named: dict[str, str]) -> list[str]:
    """Returns the problem of two options that name the same list or column, if they do."""
    for (option, name), (other, other_name) in itertools.combinations(named.items(), 2):
        if name == other_name:
            return [f"{name}: is meant by {option} and by {other}; name another with one of them"]
    return []


def _unequal_lengths(lengths: dict[str, int]) -> list[str]:
    """Returns the problem of lists that differ in their number of lines, if they do."""
    if len(set(lengths.values())) <= 1:
        return []
    (first, length), *others = lengths.items()
    return [
        f"{first} has {length} lines and {' and '.join(f'{name} {length}' for name, length in others)}: "
        "line n of one belongs to line n of the other; add or remove lines until they match"
    ]


def _read_list(root: Path, name: str, option: str, taken: set[str]) -> tuple[list[str], list[str]]:
    """Returns the stripped lines of a UTF-8 file and its problems; of masks also the blank ones at the end.

    The file may start with a byte order mark, and have the line ends of Unix, Windows or old Macs.

    Args:
        taken: names of all lists, which are not proposed in place of a missing one.
    """
    path = root / name
    if not path.is_file():
        if path.exists():
            return [], [f"{path}: is not a plain file; write a text file, or name another one with {option}"]
        return [], [f"{path}: no such file{_near_names(root, name, option, taken)}"]
    text, problem = _decoded(path)
    if problem:
        return [], [problem]
    # Not str.splitlines: it also splits at form feeds and U+2028, which shifts captions against videos.
    lines = [line.strip() for line in re.split(r"\r\n|\n|\r", text)]
    if option == MASKS and any(lines):
        return lines, []  # a blank line is a clip without a mask
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        return [], [f"{name}: the file is empty; write one line per clip"]
    return lines, [_blank_line(name, number) for number, line in enumerate(lines, start=1) if not line]


def _blank_line(name: str, number: int) -> str:
    return f"{name}:{number}: blank line; write what is missing, or delete the line here and in the other lists"


def _near_names(root: Path, name: str, option: str, taken: set[str]) -> str:
    captions = {path.with_suffix(".txt") for path in _media(root)}  # of single clips, so no lists
    lists = [path.name for path in root.glob("*.txt") if path not in captions and path.name not in taken]
    near = difflib.get_close_matches(name, lists, n=1, cutoff=0.5)
    if near:
        return f", but there is {near[0]}: pass {option} {near[0]}"
    return f"; write it, name another file with {option}, or use another layout: see docs/data.md"


def _decoded(path: Path) -> tuple[str, str | None]:
    """Returns a UTF-8 file's text, and its problem."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return "", f"{path.name}: cannot be read ({error.strerror}); copy it again, or change its permissions"
    if content.startswith(LFS_BEGINNING):
        return "", f"{path.name}: {LFS}"
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "", f"{path.name}: is UTF-16 text; save the file as UTF-8"
    if b"\0" in content:
        line = content[: content.index(b"\0")].count(b"\n") + 1
        return "", f"{path.name}:{line}: not UTF-8 text (byte 0x00, perhaps UTF-16); save the file as UTF-8"
    try:
        return content.decode("utf-8-sig"), None
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        byte = f"byte 0x{content[error.start]:02x}"
        return "", f"{path.name}:{line}: not UTF-8 text ({byte}, perhaps Windows-1252); save the file as UTF-8"


def other_spelling(path: Path) -> Path | None:
    """Returns a file whose path looks like a missing one: other slashes, accents, suffix, quotes around it."""
    text = str(path)
    spellings = [text.replace("\\", "/"), f"{text}.mp4", re.sub("[\"'\ufeff\u200b]", "", text)]
    spellings += [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]
    spellings += [str(path.with_suffix(suffix)) for suffix in (path.suffix.lower(), path.suffix.upper())]
    spellings += [str(path.with_name(path.name.lower()))]
    return next((Path(spelling) for spelling in spellings if os.path.isfile(spelling)), None)
