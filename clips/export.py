"""Writes the frames that a model would see of each clip as PNG files: `python dataset.py export FOLDER`.

A clip becomes a folder named by its place in the listing, such as 00001/, with 000.png, 001.png ... and frames.json:
where it was read from, its caption, and the time of each frame in the file, in seconds.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from clips import check, frames
from clips.facts import Facts
from clips.frames import View, choose_source
from clips.listing import Clip
from files import expanded_path, parse_options, run_command, write_json


def write_clip(folder: Path, view: View, clip: Clip, facts: Facts, seen_frames: torch.Tensor) -> None:
    """Writes the frames of a clip, uint8 [F, H, W, C], into a folder named by the clip's place in the listing."""
    folder = folder / f"{clip.line:05d}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"--output_dir {folder}: cannot be made ({error.strerror}); pass another folder") from error
    for number, frame in enumerate(seen_frames.numpy()):
        Image.fromarray(frame).save(folder / f"{number:03d}.png")
    seconds = choose_source(clip.video, facts.file, view).seconds
    about = {"source": str(clip.video), "caption": clip.caption, "times": seconds}
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
        write = partial(write_clip, args.output_dir, view)
        all_seen = check.see(listed.clips, view, make=write, damaged=args.allow_damaged)
        print(*check.describe(listed, all_seen, view), sep="\n")
        check.refuse_problems(listed, all_seen, "the other clips are written")

    run_command(parser, export)


if __name__ == "__main__":
    main()
