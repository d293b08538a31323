"""Writes the frames that a model would see of each clip as PNG files: `python dataset.py export FOLDER`.

A clip becomes a folder named by its place in the listing, such as 00001/, with 000.png, 001.png ... and frames.json:
where it was read from, its captions, and the time of each frame in the file, in seconds. The mask of 000.png, if the
clip has one, is 000-mask.png. Further windows of a clip follow as 00001-2/, 00001-3/ ...
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from clips import check, masks, selection
from clips.facts import Facts
from clips.frames import choose_source
from clips.listing import Clip
from files import expanded_path, parse_options, run_command, write_json


def write_clip(
    folder: Path, clip: Clip, facts: Facts, seen_frames: torch.Tensor, mask: torch.Tensor | None = None
) -> None:
    """Writes the frames of a window, and their masks, into a folder named by the clip's place in the listing.

    Args:
        seen_frames: uint8 [F, H, W, C].
        mask: uint8 [F, H, W].
    """
    window = f"-{facts.window + 1}" if facts.window else ""
    folder = folder / f"{clip.line:05d}{window}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"--output_dir {folder}: cannot be made ({error.strerror}); pass another folder") from error
    for number, frame in enumerate(seen_frames.numpy()):
        Image.fromarray(frame).save(folder / f"{number:03d}.png")
    for number, grey in enumerate([] if mask is None else mask.numpy()):
        Image.fromarray(grey).save(folder / f"{number:03d}-mask.png")
    seconds = choose_source(clip.video, facts.file, facts.view).seconds
    about = {"source": str(clip.video), "caption": clip.caption, "times": seconds}
    if clip.mask:
        about["mask"] = str(clip.mask)
    if clip.other_captions:
        about["other captions"] = clip.other_captions
    write_json(folder / "frames.json", about)


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    about = "Writes the frames that a model would see of each clip as PNG files."
    parser = argparse.ArgumentParser("python dataset.py export", description=about, allow_abbrev=False)
    check.add_options(parser)
    output = "folder to write into, new or empty"
    parser.add_argument("--output_dir", type=expanded_path, required=True, metavar="DIR", help=output)
    args = parse_options(parser, argv)
    selection.check_options(args, parser.error)
    masks.check_options(args, parser.error)
    if args.output_dir.exists() and (not args.output_dir.is_dir() or any(args.output_dir.iterdir())):
        parser.error(f"--output_dir {args.output_dir}: is not empty; pass a new folder")
    for folder in args.folders:
        if args.output_dir.resolve().is_relative_to(folder.path.resolve()):
            parser.error(
                f"--output_dir {args.output_dir}: is in {folder.path}, where its pictures could be taken for clips; "
                "pass a folder elsewhere"
            )
    return parser, args


def main(argv: list[str] | None = None) -> None:
    parser, args = parse_args(argv)

    def export() -> None:
        listed, chosen = check.listing_of(args), selection.selection_of(args, with_image=False, whole=False)
        write = partial(write_clip, args.output_dir)
        all_seen, chosen = check.see_all(listed.clips, chosen, make=write, damaged=args.allow_damaged)
        for line in check.describe(listed, all_seen, chosen):
            print(line)
        written = sum(seen.facts is not None and not seen.problem for seen in all_seen)
        if written:
            print(f"{args.output_dir}: {written} folders of frames, 00001/ ...; frames.json in each says of which clip")
        others = "the other clips are written" if written else "nothing is written"
        check.refuse_problems(listed, all_seen, others)

    run_command(parser, export)


if __name__ == "__main__":
    main()
