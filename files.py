"""Files and folders that are published whole or not at all, hashes of content, and what argparse and threads lack."""

import argparse
import ctypes
import difflib
import hashlib
import itertools
import json
import math
import os
import re
import secrets
import shutil
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

LFS_BEGINNING = b"version https://git-lfs"  # of the pointers that Git LFS leaves in place of files
SECONDS_OF_A_LEFTOVER = 86400  # after which a temporary file of another host is no longer being written
TEMPORARY = re.compile(r"\..+?(\.(?P<host>[^.]+)\.(?P<process>\d+))?\.[0-9a-f]{8}")  # earlier versions named no process


class CannotContinue(RuntimeError):
    """Ends a run that cannot continue; what it has saved stays."""


def publish(path: Path, content: bytes) -> None:
    """Writes a file that is complete or absent, even if the disk is full, the process is killed or the power fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with naming(path), open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what Git LFS leaves in place of one that it has not downloaded; larger ones are not opened."""
    if path.stat().st_size >= 1024:  # by LFS's specification a pointer is smaller
        return False
    with open(path, "rb") as file:
        return file.read(len(LFS_BEGINNING)) == LFS_BEGINNING


def without_tokens(message: str) -> str:
    """Returns a message without access tokens: HTTP libraries quote the headers that they refuse."""
    return re.sub(r"Bearer [^'\"]*|\bhf_\w+", "...", message)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Lets errors of the disk name this file: those of writing and closing name none."""
    try:
        yield
    except OSError as error:
        if error.errno:  # without one, a name would replace the message
            error.filename = str(path)
        raise


def find_leftovers(folder: Path) -> list[Path]:
    """Returns temporary files of `publish` whose process on this host is gone, or that are a day old."""
    leftovers = []
    for path in sorted(folder.glob(".*")):
        if match := TEMPORARY.fullmatch(path.name):
            is_dead = match["host"] == _host() and not _is_running(int(match["process"]))
            with suppress(FileNotFoundError):  # published, or removed by another process
                if is_dead or time.time() - path.stat().st_mtime > SECONDS_OF_A_LEFTOVER:
                    leftovers.append(path)
    return leftovers


def _host() -> str:
    """Returns a name for where process ids are unique: the host, its boot, and in a container its processes' namespace.

    Names of hosts and machine ids are copied with the images of machines; no two boots have the same id.
    """
    namespace, boot = Path("/proc/self/ns/pid"), Path("/proc/sys/kernel/random/boot_id")  # Linux
    numbers = [str(namespace.stat().st_ino) if namespace.exists() else "0"]
    numbers += [boot.read_text()[:8]] if boot.exists() else []
    return "-".join([socket.gethostname().replace(".", "-"), *numbers])


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it belongs to someone else
        return True
    return True


def publish_folder(temporary: Path, final: Path) -> None:
    """Renames a complete folder to its final name, once its files have reached the disk; replaces an earlier one.

    Where the file system can exchange two names (Linux, local disks), there is no moment without the folder. Elsewhere
    the earlier one keeps another name for that moment, from which `restore_folder` brings it back.
    """
    for path in (*temporary.rglob("*"), temporary):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    if not final.exists():
        os.rename(temporary, final)
    elif _exchange(temporary, final):
        shutil.rmtree(temporary)
    else:
        previous = _previous(final)
        shutil.rmtree(previous, ignore_errors=True)
        os.rename(final, previous)
        os.rename(temporary, final)
        shutil.rmtree(previous)


def restore_folder(final: Path) -> None:
    """Makes up for a process that was killed while `publish_folder` replaced this folder."""
    previous = _previous(final)
    if previous.exists() and not final.exists():
        os.rename(previous, final)
    shutil.rmtree(previous, ignore_errors=True)


def _previous(final: Path) -> Path:
    return final.with_name(f".{final.name}.previous")


def _exchange(first: Path, second: Path) -> bool:
    """Exchanges the names of two folders at once; returns False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)  # Python has no function for it
    if renameat2 is None:
        return False
    in_working_directory, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(in_working_directory, os.fsencode(first), in_working_directory, os.fsencode(second), exchange) == 0


def write_json(path: Path, content: dict) -> None:
    publish(path, (json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n").encode())


def with_metadata(content: bytes, metadata: dict[str, str]) -> bytes:
    """Returns a file of the safetensors format with metadata in its header, in the order given.

    safetensors 0.8 writes the keys in random order; equal content must give equal bytes.

    Args:
        content: the file, without metadata.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps({"__metadata__": metadata} | json.loads(content[8:end])).encode()
    header += b" " * (-len(header) % 8)  # aligns the data, as the format wants it
    return len(header).to_bytes(8, "little") + header + content[end:]


def file_hash(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_of(content) -> str:
    """Returns a hash of `content`, which JSON can hold, as 40 hexadecimal digits; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:40]


def parse_options(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """Parses a command line; names the nearest options for one that is unknown.

    Unknown options are refused first: argparse would only say that the required one, misspelled, is missing.
    """
    words = sys.argv[1:] if argv is None else argv
    names = [word.split("=")[0] for word in words if word.startswith("-")]
    known = list(parser._option_string_actions)
    # A negative number, a lone dash and text with spaces are values.
    unknown = [name for name in names if name.lstrip("-")[:1].isalpha() and " " not in name and name not in known]
    if unknown:
        parser.error(" ".join(f"{name}: unknown option; {_near(name, known)}" for name in unknown))
    return parser.parse_args(argv)


def _near(name: str, known: list[str]) -> str:
    bare = name.strip("-").replace("-", "_").lower()
    near = difflib.get_close_matches(f"--{bare}", known, cutoff=0.8)
    near = near or [option for option in known if option[:2] == "--" and (bare in option or option[2:] in bare)]
    return f"did you mean {' or '.join(near[:3])}?" if near else "--help lists all of them"


def run_command(parser: argparse.ArgumentParser, command: Callable[[], None]) -> None:
    """Runs a command; ends with its message and exit code 2 if it refuses something, 3 if it cannot continue."""
    try:
        command()
    except (ValueError, FileNotFoundError, CannotContinue) as error:
        sys.stdout.flush()
        parser.exit(3 if isinstance(error, CannotContinue) else 2, f"{parser.prog}: error: {error}\n")


def printable(text: str) -> str:
    """Returns a text in one line, in which what no terminal can show of a file's name is written as in Python."""
    return re.sub("[\0-\x1f\x7f\ud800-\udfff]", lambda character: repr(character[0])[1:-1], text)


def expanded_path(text: str) -> Path:
    """Returns the path with ~ expanded, which a quoted path would keep."""
    return Path(text).expanduser()


def plain_name(text: str) -> str:
    """Returns a name that files can have; a type for argparse."""
    if Path(text).name != text or "\\" in text or text in ("", ".", ".."):
        raise argparse.ArgumentTypeError(f"{text}: must be a name, not a path")
    return text


def at_least(lowest: int) -> Callable[[str], int]:
    """Returns a type for whole numbers from `lowest`."""

    def whole_number(text: str) -> int:
        if int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text}: must be a whole number of at least {lowest}")
        return int(text)

    return whole_number


def finite(text: str) -> float:
    """Returns a number that is neither infinite nor NaN; a type for argparse."""
    if not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"{text}: must be a finite number")
    return float(text)


def share(text: str) -> float:
    """Returns a number from 0 to below 1; a type for argparse."""
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 0 and below 1")
    return float(text)


def weight(text: str) -> float:
    """Returns a finite number from 0; a type for argparse."""
    if not 0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be at least 0, and finite")
    return float(text)


def map_ahead(function: Callable, items: Iterable, threads: int) -> Iterator:
    """Yields `function(item)` for each item, in order; computes as many results in advance as there are threads.

    Executor.map takes all items at once; from Python 3.14 on it has `buffersize`, which can replace this.
    """
    items, pool = iter(items), ThreadPoolExecutor(threads)
    try:
        waiting = deque(pool.submit(function, item) for item in itertools.islice(items, threads))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
