"""Drops from a cache what nothing refers to: `python dataset.py clean FOLDER`.

Each start of a training records in `uses/` of the cache which of its files it uses, under the name of its output
directory. A use counts as long as that directory exists. Files and uses of the last days stay in any case: another
machine, or a run that has only encoded so far, may need them.
"""

import argparse
import json
import os
import time
from pathlib import Path

from clips.known import CACHE, KNOWN, Notes, publish_in_cache
from files import at_least, expanded_path, hash_of, parse_options, run_command

USES = "uses"
DAY = 86400  # seconds
GIB = 2**30


def record_use(cache: Path, output_dir: Path, files: list[Path]) -> None:
    """Records which files of the cache the run with this output directory uses, in place of what it used before."""
    output_dir = os.path.abspath(output_dir)
    names = [f"{file.parent.name}/{file.name}" for file in files]
    use = {"output_dir": output_dir, "files": names}
    publish_in_cache(cache / USES / f"{hash_of(output_dir)}.json", json.dumps(use).encode())


def used_files(cache: Path, oldest: float) -> tuple[set[str], list[Path]]:
    """Returns the files that a run uses, and the records of uses that no longer count.

    Args:
        oldest: seconds since the epoch; later uses count even if their output directory is gone.
    """
    used, gone = set(), []
    for path in sorted((cache / USES).glob("*.json")):
        use = json.loads(path.read_text())
        if os.path.isdir(use["output_dir"]) or path.stat().st_mtime > oldest:
            used |= set(use["files"])
        else:
            gone.append(path)
    return used, gone


def unused_files(cache: Path, oldest: float) -> list[Path]:
    """Returns the files to drop: encoded ones that no run uses, records of past uses, leftovers of killed runs.

    Args:
        oldest: seconds since the epoch; later files stay.
    """
    used, drop = used_files(cache, oldest)
    for folder in ("latents", "captions", KNOWN, USES):
        for path in sorted((cache / folder).glob("*")):
            is_leftover = path.name.startswith(".")
            is_unused = path.suffix == ".safetensors" and str(path.relative_to(cache)) not in used
            if (is_leftover or is_unused) and path.stat().st_mtime <= oldest:
                drop.append(path)
    return drop


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
    if not cache.is_dir():
        raise FileNotFoundError(f"{cache}: no such cache; pass the dataset's folder, or --latents_cache_dir")
    drop = unused_files(cache, time.time() - unused_days * DAY)
    size = sum(path.stat().st_size for path in drop)
    if not dry_run:
        for path in drop:
            path.unlink(missing_ok=True)
        forget_files(cache)
    stays = [path for folder in ("latents", "captions") for path in (cache / folder).glob("*.safetensors")]
    done = "to be dropped" if dry_run else "dropped"
    return f"{cache}: {done}: {len(drop)} files, {size / GIB:.2f} GiB; encoded files there: {len(stays)}"


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    about = "Drops from the cache of a dataset what no run uses that still exists, or that started of late."
    parser = argparse.ArgumentParser("python dataset.py clean", description=about, allow_abbrev=False)
    folder = "folder with the clips; with several, the first of them"
    parser.add_argument("folder", type=expanded_path, metavar="FOLDER", help=folder)
    cache = "the cache, where it is not in FOLDER"
    days = "also keep what a start of the last N days wrote or used"
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
