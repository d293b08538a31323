"""Drops from a cache what nothing refers to: `python dataset.py clean FOLDER`.

Each start of a training records in `uses/` of the cache which of its files it uses, under the name of its output
directory. A use counts as long as that directory exists. Files and uses of the last days stay in any case: another
machine, or a run that has only encoded so far, may need them.
"""

import argparse
import itertools
import json
import os
import re
import time
from contextlib import suppress
from pathlib import Path

from clips.known import CACHE, KNOWN, USES, Notes
from files import at_least, expanded_path, find_leftovers, parse_options, run_command

DAY = 86400  # seconds
FOLDERS = ("latents", "captions", KNOWN, USES)  # of a cache
ENCODED = re.compile(r"[0-9a-f]{40}\.safetensors")


def used_files(cache: Path, oldest: float) -> tuple[set[str], list[Path]]:
    """Returns the files that a run uses, and the records of uses that no longer count.

    Args:
        oldest: seconds since the epoch; later uses count even if their output directory is gone.
    """
    used, gone = set(), []
    for path in sorted((cache / USES).glob("*.json")):
        try:
            use = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path}: is damaged; delete it, and start the runs again that use this cache") from error
        if os.path.isdir(use["output_dir"]) or path.stat().st_mtime > oldest:
            used |= set(use["files"])
        else:
            gone.append(path)
    return used, gone


def unused_files(cache: Path, oldest: float) -> list[Path]:
    """Returns the files to drop: encoded ones that no run uses, records of past uses, leftovers of killed runs.

    Args:
        oldest: seconds since the epoch; later files stay, except leftovers.
    """
    used, drop = used_files(cache, oldest)
    for path in itertools.chain(*(sorted((cache / folder).glob("*")) for folder in FOLDERS)):
        is_unused = ENCODED.fullmatch(path.name) and f"{path.parent.name}/{path.name}" not in used
        if is_unused and path.stat().st_mtime <= oldest:
            drop.append(path)
    return drop + leftovers(cache)


def leftovers(cache: Path) -> list[Path]:
    """Returns the temporary files that killed runs have left in a cache."""
    return [path for folder in FOLDERS for path in find_leftovers(cache / folder)]


def remove_leftovers(cache: Path) -> None:
    """Removes what killed runs have left in a cache, and says how much that is."""
    removed = []
    for path in leftovers(cache):
        with suppress(OSError):  # removed by another process, or in a cache that is only read
            path.unlink()
            removed.append(path)
    if removed:
        print(f"{cache}: removed {len(removed)} unfinished files of runs that were killed")


def forget_files(cache: Path) -> None:
    """Writes the notes of a cache into one list, without those on files that are gone or have changed."""
    lists = list((cache / KNOWN).glob("*.txt"))
    notes = Notes(cache)
    notes.keep_current()
    notes.publish()
    for path in lists:
        path.unlink(missing_ok=True)


def clean(cache: Path, *, unused_days: int, dry_run: bool) -> str:
    """Drops what no run has used for `unused_days`; returns a sentence that says how much that is."""
    if not (cache / USES).is_dir():
        rule = "no cache in which a training has recorded what it uses"
        raise FileNotFoundError(f"{cache}: {rule}; pass the dataset's folder, or --latents_cache_dir")
    drop = unused_files(cache, time.time() - unused_days * DAY)
    size = sum(path.stat().st_size for path in drop)
    if not dry_run:
        for path in drop:
            path.unlink(missing_ok=True)
        forget_files(cache)
    stays = [path for folder in FOLDERS for path in (cache / folder).glob("*") if ENCODED.fullmatch(path.name)]
    done = "would drop" if dry_run else "dropped"
    return (
        f"{cache}: {done} {len(drop)} files of {size / 1e6:.1f} MB; {len(stays)} encoded clips and captions are there"
    )


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    about = "Deletes cached files that no existing run uses and no recent start wrote or used."
    parser = argparse.ArgumentParser("python dataset.py clean", description=about, allow_abbrev=False)
    folder = "folder with the clips; with several, the first of them"
    parser.add_argument("folder", type=expanded_path, metavar="FOLDER", help=folder)
    cache = "the cache, where it is not in FOLDER"
    days = "keep files that a start in the last N days wrote or used"
    parser.add_argument("--latents_cache_dir", type=expanded_path, metavar="FOLDER", help=cache)
    parser.add_argument("--unused_days", type=at_least(0), default=30, metavar="N", help=days)
    parser.add_argument("--dry_run", action="store_true", help="only say how much would be dropped")
    return parser, parse_options(parser, argv)


def main(argv: list[str] | None = None) -> None:
    parser, args = parse_args(argv)
    cache = args.latents_cache_dir or args.folder / CACHE
    run_command(parser, lambda: print(clean(cache, unused_days=args.unused_days, dry_run=args.dry_run)))


if __name__ == "__main__":
    main()
