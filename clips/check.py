"""Reads all that a model would see of a dataset, and says what is wrong with it: `python dataset.py check FOLDER`.

Needs no model and no GPU. The exit code is 0 if the dataset can be trained on, and 2 if it cannot, with the problems.
"""

import argparse
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from clips import frames, listing
from clips.facts import Facts, count_clips, examine, headline, list_problems, remarks
from clips.frames import MEND, View, decode, decoding_threads, describe_damage
from clips.listing import Clip, Listing
from files import at_least, map_ahead, parse_options, run_command


class Seen(NamedTuple):
    """A clip as a model would see it, or why it cannot be used."""

    clip: Clip
    facts: Facts | None
    made: Any  # what was made of its frames
    problem: str | None


def add_options(parser: argparse.ArgumentParser, *, flips: bool = False) -> None:
    """Adds the folder, and the options that decide what of it a model sees; `flips`: also those of mirrored clips."""
    folders = "folder with the clips and their captions, or several; FOLDER=2 is what an epoch shows twice"
    parser.add_argument("folders", type=listing.folder_option, nargs="+", metavar="FOLDER", help=folders)
    data = parser.add_argument_group("data")
    listing.add_options(data)
    frames.add_options(data, flips=flips)
    data.add_argument("--seed", type=at_least(0), default=42, help="decides where --video_reshape_mode random crops")


def listing_of(args: argparse.Namespace) -> Listing:
    return listing.read_listing(args.folders, listing.columns_of(args), id_token=args.id_token)


def see(
    clips: list[Clip], view: View, make: Callable[[Clip, Facts, torch.Tensor], Any], *, damaged: bool
) -> list[Seen]:
    """Reads clips as a model would see them, several at once; keeps none of their frames.

    Args:
        make: called in a thread with each clip that can be used, its facts and its frames, uint8 [F, H, W, C].
        damaged: whether clips that decode with errors can be used.
    """
    look = partial(_look, view=view, make=make, damaged=damaged)
    with closing(map_ahead(look, clips, decoding_threads(view))) as looked_at:
        return list(tqdm(looked_at, "Reading clips", total=len(clips), unit="clip"))


def _look(clip: Clip, view: View, make: Callable, *, damaged: bool) -> Seen:
    facts, problem = examine(clip, view)
    if problem:
        return Seen(clip, None, None, problem)
    damage = []
    try:
        seen_frames = decode(clip, view, mirrored=False, file=facts.file, damage=damage)
    except ValueError as error:
        return Seen(clip, facts, None, str(error))
    problem = None
    if damage:
        facts = facts._replace(damage=describe_damage(damage))
        problem = None if damaged else clip.problem(f"{facts.damage}; {MEND}")
    return Seen(clip, facts, None if problem else make(clip, facts, seen_frames), problem)


def describe(listed: Listing, all_seen: list[Seen], view: View) -> list[str]:
    """Returns the layouts, the summary and the remarks on the usable clips, or nothing if there are none."""
    usable = [seen for seen in all_seen if not seen.problem]
    if not usable:
        return []
    clips, facts = [seen.clip for seen in usable], [seen.facts for seen in usable]
    return [listed.describe(), headline(facts, view), *remarks(clips, facts, view)]


def all_problems(listed: Listing, all_seen: list[Seen]) -> list[str]:
    return listed.problems + [seen.problem for seen in all_seen if seen.problem]


def refuse_problems(listed: Listing, all_seen: list[Seen], consequence: str) -> None:
    """Raises a ValueError that lists the problems of a dataset, if it has any."""
    if problems := all_problems(listed, all_seen):
        raise ValueError(list_problems(listed.name, problems, consequence))


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
        listed, view = listing_of(args), frames.view_of(args, with_image=False, whole=False)
        all_seen = see(listed.clips, view, make=lambda *_: None, damaged=args.allow_damaged)
        print(*describe(listed, all_seen, view), sep="\n")
        refuse_problems(listed, all_seen, "training refuses it")
        print(f"no problems: {count_clips(len(all_seen))} can be trained on")

    run_command(parser, check)


if __name__ == "__main__":
    main()
