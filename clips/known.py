"""Remembers what was found out about files, so that a second start over many clips need not open them.

Notes are text in `known/` of the cache, a line each: a key and what is known, both as JSON. The key of a file holds its
path, its size and the time of its last change in nanoseconds. Each process publishes what it has found out as a further
list; lists are never changed.
"""

import base64
import errno
import json
import os
import secrets
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clips.video import Damage, Video, examine_video
from files import CannotContinue, file_hash, hash_of, publish

FORMAT = 1  # of a note on a file: notes of other formats are not found
CACHE = ".cogvideox_cache"  # where no other is named, in the first of the dataset's folders
USES = "uses"  # folder of the records of uses, in the cache
KNOWN = "known"  # folder of the lists, in the cache


class File(NamedTuple):
    """What a video file holds."""

    content: str  # hash of the file
    video: Video
    packed_times: str  # when each frame is shown; packed, because there may be many files

    @property
    def times(self) -> np.ndarray:
        """When each frame is shown, ascending, in units of video.time_base, int64 [F]."""
        steps = np.frombuffer(zlib.decompress(base64.b64decode(self.packed_times)), np.int64)
        return self.video.first + np.concatenate([[0], np.cumsum(steps)])


class Notes:
    """Notes of earlier starts, and new ones of this process."""

    def __init__(self, cache: Path | None = None, *, read_only: bool = False):
        """Reads the notes in a cache.

        Args:
            cache: None if nothing is to be remembered.
            read_only: whether `publish` writes nothing.
        """
        self.folder, self.read_only, self.known, self.new = cache and cache / KNOWN, read_only, {}, {}
        self.lock = threading.Lock()  # several threads add notes
        lists = sorted(self.folder.glob("*.txt")) if cache else []  # by the time of their writing: later ones count
        for path in lists:
            self.known |= _read_notes(path)
        if not all(path.exists() for path in lists):  # merged meanwhile by `clean`
            self.__init__(cache, read_only=read_only)

    def get(self, key: list):
        """Returns what is known under a key, or None."""
        text = json.dumps(key)
        note = self.new.get(text) or self.known.get(text)
        return json.loads(note) if note else None

    def __contains__(self, key: list) -> bool:
        text = json.dumps(key)
        return text in self.new or text in self.known

    def add(self, key: list, note) -> None:
        key, note = json.dumps(key), json.dumps(note)
        with self.lock:
            if self.known.get(key) != note:
                self.new[key] = note

    def publish(self) -> None:
        """Writes the notes that were added since the last call, if there are any."""
        with self.lock:
            new, self.new = self.new, {}
            self.known |= new
        if new and self.folder and not self.read_only:
            lines = "".join(f"{key}\t{note}\n" for key, note in new.items())
            name = f"{time.time_ns():020d}-{secrets.token_hex(4)}.txt"
            with _unless_read_only():
                publish_in_cache(self.folder / name, lines.encode())

    def keep_current(self) -> None:
        """Marks all notes to be published again, except those on files that are gone or have changed."""
        for key, note in self.known.items():
            kind, *_ = parts = json.loads(key)
            if (self.folder.parent / kind / parts[1]).exists() if kind == "latents" else _is_current(*parts):
                self.new[key] = note
        self.known = {}


def _read_notes(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:  # merged meanwhile by `clean`
        return {}
    return dict(line.split("\t", 1) for line in lines)  # JSON writes a tab in a path as \t


@contextmanager
def _unless_read_only() -> Iterator[None]:
    """Does without what is only remembered where the cache cannot be written, which may be complete all the same."""
    try:
        yield
    except ValueError as error:
        if getattr(error.__cause__, "errno", None) not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise


def _is_current(kind: str, _format: int, path: str, size: int, mtime_ns: int) -> bool:
    try:
        return file_key(kind, Path(path)) == [kind, _format, path, size, mtime_ns]
    except OSError:
        return False


def publish_in_cache(path: Path, content: bytes) -> None:
    """Publishes a file of the cache.

    Raises:
        ValueError: the folder cannot be written to.
        CannotContinue: the disk is full.
    """
    try:
        publish(path, content)
    except OSError as error:
        raise (CannotContinue if error.errno in (errno.ENOSPC, errno.EDQUOT) else ValueError)(
            f"{path.parent}: cannot write the cache ({error.strerror}); it takes about 5 MB per clip and 2 MB per "
            "caption: make room, or pass a writable folder as --latents_cache_dir; what has been encoded is kept"
        ) from error


def record_use(cache: Path, output_dir: Path, files: list[Path]) -> None:
    """Records which files of the cache the run with this output directory uses, in place of what it used before."""
    output_dir = os.path.abspath(output_dir)
    names = [f"{file.parent.name}/{file.name}" for file in files]
    use = {"output_dir": output_dir, "files": names}
    with _unless_read_only():
        publish_in_cache(cache / USES / f"{hash_of(output_dir)}.json", json.dumps(use).encode())


def look_at(path: Path, notes: Notes | None = None, *, read_again: bool = False) -> File:
    """Returns what a video file holds, from the notes if it has not changed since they were made.

    Args:
        read_again: read the file even if it is known.

    Raises:
        ValueError: the file cannot be read.
    """
    notes = notes or Notes()
    key = file_key("video", path)
    if not read_again and (note := notes.get(key)):
        return _from_note(note)
    if not path.stat().st_size:
        raise ValueError("the file is empty; copy it again, or remove the clip")
    video, times = examine_video(path)
    packed = base64.b64encode(zlib.compress(np.diff(times).tobytes())).decode()
    file = File(file_hash(path), video, packed)
    notes.add(key, _to_note(file))
    return file


def file_key(kind: str, path: Path) -> list:
    """Returns the key of a note on a file, which changes when the file does."""
    status = path.stat()
    return [kind, FORMAT, os.path.abspath(path), status.st_size, status.st_mtime_ns]


def _to_note(file: File) -> list:
    video = file.video._replace(time_base=file.video.time_base.as_integer_ratio())
    return [file.content, video, file.packed_times]


def _from_note(note: list) -> File:
    content, video, packed_times = note
    fields = dict(zip(Video._fields, video))
    fields["time_base"] = Fraction(*fields["time_base"])
    fields["remarks"] = tuple(fields["remarks"])
    fields["damage"] = tuple(Damage(*damage) for damage in fields["damage"])
    return File(content, Video(**fields), packed_times)
