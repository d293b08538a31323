"""Writes the frames that a model would see of each clip as PNG files: `python dataset.py export FOLDER`.

A clip becomes a folder named by its place in the listing, such as 00001/, with 000.png, 001.png ... and frames.json:
where it was read from, its caption, and the time of each frame in the file, in seconds.
"""

import argparse
from pathlib import Path

from PIL import Image

from clips import check, frames
from clips.check import Seen
from clips.frames import View, choose_source
from files import expanded_path, parse_options, run_command, write_json


def write_clip(folder: Path, seen: Seen, view: View) -> None:
    folder.mkdir(parents=True)
    for number, frame in enumerate(seen.frames.numpy()):
        Image.fromarray(frame).save(folder / f"{number:03d}.png")
    seconds = choose_source(seen.clip.video, seen.facts.file, view).seconds
    about = {"source": str(seen.clip.video), "caption": seen.clip.caption, "times": seconds}
    write_json(folder / "frames.json", about)


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    about = "Writes the frames that a model would see of each clip as PNG files."
    parser = argparse.ArgumentParser("python dataset.py export", description=about, allow_abbrev=False)
    check.add_options(parser)
    output = "folder to write into, new or empty"
    parser.add_argument("--output_dir", type=expanded_path, required=True, metavar="DIR", help=output)
    args = parse_options(parser, argv)
    frames.check_options(args, parser.error)
    if args.output_dir.exists() and (not args.output_dir.is_dir() or any(args.output_dir.iterdir())):
        parser.error(f"--output_dir {args.output_dir}: is not empty; pass a new folder")
    return parser, args


def main(argv: list[str] | None = None) -> None:
    parser, args = parse_args(argv)

    def export() -> None:
        listed, view = check.listing_of(args), frames.view_of(args, with_image=False, whole=False)
        write = lambda seen: write_clip(args.output_dir / f"{seen.clip.line:05d}", seen, view)  # noqa: E731
        all_seen = check.see(args, listed.clips, view, each=write)
        check.report(listed, all_seen, view, consequence="the other clips are written")

    run_command(parser, export)


if __name__ == "__main__":
    main()
