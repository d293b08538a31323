"""Reads all that a model would see of a dataset, and says what is wrong with it: `python dataset.py check FOLDER`.

Needs no model and no GPU. The exit code is 0 if the dataset can be trained on, and 2 if it cannot, with the problems.
"""

import argparse
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from clips import frames, listing
from clips.facts import Facts, examine, headline, list_problems, remarks
from clips.frames import MEND, View, decode, decoding_threads, describe_damage
from clips.listing import Clip, read_clips
from files import at_least, expanded_path, map_ahead, parse_options, run_command


class Seen(NamedTuple):
    """A clip as a model would see it, or why it cannot be used."""

    clip: Clip
    facts: Facts | None
    frames: torch.Tensor | None  # uint8 [F, H, W, C]
    problem: str | None


def add_options(parser: argparse.ArgumentParser, *, flips: bool = False) -> None:
    """Adds the folder, and the options that decide what of it a model sees; `flips`: also those of mirrored clips."""
    parser.add_argument("folder", type=expanded_path, metavar="FOLDER", help="folder with the clips and their captions")
    data = parser.add_argument_group("data")
    listing.add_options(data)
    frames.add_options(data, flips=flips)
    data.add_argument("--seed", type=at_least(0), default=42, help="decides where --video_reshape_mode random crops")


def see(args: argparse.Namespace, each: Callable[[Seen], None]) -> tuple[list[Seen], list[str]]:
    """Reads all clips of a folder; returns what is known of each, without its frames, and the problems of the lists.

    Args:
        each: called with each clip that can be used, in order.
    """
    clips, problems = read_clips(
        args.folder, args.caption_column, args.video_column, args.image_column, id_token=args.id_token
    )
    view = frames.view_of(args, with_image=False, whole=False)
    all_seen = []
    look = partial(_look, view=view, allow_damaged=args.allow_damaged)
    with closing(map_ahead(look, clips, decoding_threads(view))) as looked_at:
        for seen in tqdm(looked_at, "Reading clips", total=len(clips), unit="clip"):
            if seen.frames is not None:
                each(seen)
            all_seen.append(seen._replace(frames=None))
    return all_seen, problems


def _look(clip: Clip, view: View, *, allow_damaged: bool) -> Seen:
    facts, problem = examine(clip, view)
    if problem:
        return Seen(clip, None, None, problem)
    damage = []
    try:
        seen = decode(clip, view, mirrored=False, file=facts.file, damage=damage)
    except ValueError as error:
        return Seen(clip, facts, None, str(error))
    if damage and not allow_damaged:
        return Seen(clip, facts, None, clip.problem(f"{describe_damage(damage)}; {MEND}"))
    facts = facts._replace(damage=describe_damage(damage) if damage else None)
    return Seen(clip, facts, seen, None)


def report(args: argparse.Namespace, all_seen: list[Seen], problems: list[str], *, consequence: str) -> None:
    """Prints what is to be known of a dataset; raises a ValueError that lists its problems, if it has any."""
    usable = [seen for seen in all_seen if not seen.problem]
    if usable:
        view = frames.view_of(args, with_image=False, whole=False)
        clips, facts = [seen.clip for seen in usable], [seen.facts for seen in usable]
        print(listing.describe_layout(args.folder, args.caption_column, args.video_column))
        print(headline(facts, view), *remarks(clips, facts, view), sep="\n")
    if problems := problems + [seen.problem for seen in all_seen if seen.problem]:
        raise ValueError(list_problems(args.folder, problems, consequence))


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    about = "Reads all that a model would see of a dataset, and says what is wrong with it; exit code 0 or 2."
    parser = argparse.ArgumentParser("python dataset.py check", description=about, allow_abbrev=False)
    add_options(parser)
    args = parse_options(parser, argv)
    frames.check_options(args, parser.error)
    return parser, args


def main(argv: list[str] | None = None) -> None:
    parser, args = parse_args(argv)

    def check() -> None:
        report(args, *see(args, each=lambda seen: None), consequence="training refuses it")

    run_command(parser, check)


if __name__ == "__main__":
    main()
