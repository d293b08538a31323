"""Writes and reads the entries of the cache: files of tensors with a checksum, in which any changed bit is found.

The checksum is the SHA-256 of the whole file with zeros in its place. It is in the metadata of the safetensors format,
beside what the decoder reported of a damaged clip, and how much the clip moves. Entries of earlier versions lack it, or
the motion: their form, shapes and values are checked all the same.
"""

import errno
import hashlib
import json
import os
import secrets
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save

from clips.known import publish_in_cache
from files import with_metadata

CHECKSUM, DAMAGE, MOTION = "checksum", "damage", "motion"  # all that the metadata of an entry hold
NO_CHECKSUM = "0" * 64
Shapes = dict[str, tuple[int, ...] | None]  # of the tensors of an entry, by name; None: not known


class Stamp(NamedTuple):
    """Tells a file from one that has replaced it."""

    inode: int
    size: int
    mtime_ns: int


class Header(NamedTuple):
    """What is known of cached latents without reading them."""

    shape: tuple[int, ...]  # (2c, f, h, w)
    damage: str | None  # what the decoder reported of the clip
    motion: float | None = None  # levels of 255 per second; None: a single frame, or an entry of an earlier version


class Damaged(NamedTuple):
    """An entry that cannot be used."""

    path: Path
    reason: str
    stamp: Stamp | None  # of what is there; None: nothing


def find_stamp(path: Path) -> Stamp | None:
    """Returns the stamp of a file, or None if it does not exist."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return Stamp(status.st_ino, status.st_size, status.st_mtime_ns)


# ---- write -----------------------------------------------------------------------------------------------------------


def write_entry(path: Path, tensors: dict[str, torch.Tensor], damage: str = "", *, motion: float | None = None) -> None:
    """Publishes an entry.

    safetensors' own save_file is not used: it reports a full disk as an exception of its own.

    Args:
        damage: what the decoder reported of the clip; empty: nothing.
        motion: how much it moves, in levels of 255 per second; None for a single frame.
    """
    metadata = {DAMAGE: damage} if damage else {}
    metadata |= {MOTION: str(motion)} if motion is not None else {}
    content = to_bytes(tensors, metadata)
    if path.is_dir():
        _set_aside(path)
    publish_in_cache(path, content)


def discard(damaged: Damaged) -> None:
    """Removes a damaged entry, unless it has been replaced meanwhile; the next start finds it missing."""
    if find_stamp(damaged.path) == damaged.stamp is not None:
        if damaged.path.is_dir():
            _set_aside(damaged.path)
        else:
            damaged.path.unlink(missing_ok=True)


def _set_aside(folder: Path) -> None:
    aside = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}")
    folder.rename(aside)
    print(f"{folder}: a folder had the name of a file of the cache; it is now {aside}", file=sys.stderr, flush=True)


def to_bytes(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """Returns the file for an entry; equal content gives equal bytes."""
    plain = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    content = with_metadata(plain, {CHECKSUM: NO_CHECKSUM} | metadata)
    return content.replace(NO_CHECKSUM.encode(), hashlib.sha256(content).hexdigest().encode(), 1)


# ---- read ------------------------------------------------------------------------------------------------------------


def read_entry(path: Path, shapes: Shapes, *, verify: bool) -> dict[str, torch.Tensor] | Damaged:
    """Returns the tensors of an entry, or why it cannot be used.

    Args:
        shapes: the tensors that it must have, no others.
        verify: also check the checksum, if there is one, and that all values are finite.
    """
    stamp = find_stamp(path)  # before reading: what replaces the file meanwhile has another
    try:
        content = path.read_bytes()
        tensors = load(content)
        if verify:
            _check_content(content, tensors)
        _check_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, shapes)
    except (OSError, SafetensorError, KeyError, ValueError) as error:  # KeyError: of a dtype that torch does not know
        return Damaged(path, _reason(error), stamp)
    return tensors


def read_header(path: Path) -> Header | Damaged:
    """Returns the header of cached latents, or why they cannot be used, as far as the header tells."""
    stamp = find_stamp(path)
    try:
        if path.is_dir():  # safetensors would say "No such device"
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_metadata(metadata)
            if "parameters" not in (names := file.keys()):
                raise ValueError(f"holds {', '.join(names) or 'nothing'} instead of parameters")
            shape, motion = tuple(file.get_slice("parameters").get_shape()), metadata.get(MOTION)
            return Header(shape, metadata.get(DAMAGE), None if motion is None else float(motion))
    except (OSError, SafetensorError, ValueError) as error:
        return Damaged(path, _reason(error), stamp)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) if isinstance(error, ValueError) else f"not a whole file of tensors: {error}"


def _check_content(content: bytes, tensors: dict[str, torch.Tensor]) -> None:
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__") or {}
    _check_metadata(metadata)
    if checksum := metadata.get(CHECKSUM):
        blank = content.replace(checksum.encode(), NO_CHECKSUM.encode(), 1)
        if hashlib.sha256(blank).hexdigest() != checksum:
            raise ValueError("checksum")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or infinity")


def _check_metadata(metadata: dict[str, str]) -> None:
    """Refuses other keys than those of an entry; a checksum with a changed name would not be missed otherwise."""
    if foreign := sorted(metadata.keys() - {CHECKSUM, DAMAGE, MOTION}):
        raise ValueError(f"metadata of another program: {', '.join(foreign)}")


def _check_shapes(there: Shapes, expected: Shapes) -> None:
    if there.keys() != expected.keys():
        raise ValueError(f"holds {', '.join(sorted(there)) or 'nothing'} instead of {', '.join(sorted(expected))}")
    for name, shape in expected.items():
        if shape and there[name] != shape:
            raise ValueError(f"{name} has the shape {list(there[name])} instead of {list(shape)}")
