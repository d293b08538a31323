"""Reads all that a model would see of a dataset, and says what is wrong with it: `python dataset.py check FOLDER`.

Needs no model and no GPU. The exit code is 0 if the dataset can be trained on, and 2 if it cannot, with the problems.
"""

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from clips import listing, masks, selection
from clips.facts import (
    ALL_UNFIT,
    Examined,
    Facts,
    count_clips,
    examine,
    headline,
    list_cuts,
    list_motion,
    list_problems,
    picture_size,
    remark_unfit,
    remarks,
)
from clips.frames import MEND, decode, decoding_threads, describe_damage
from clips.known import Notes
from clips.listing import Clip, Listing
from clips.masks import is_all_white, read_mask
from clips.motion import watch
from clips.selection import Selection
from files import at_least, expanded_path, map_ahead, parse_options, printable, publish, run_command

Make = Callable[[Clip, Facts, torch.Tensor, torch.Tensor | None], Any]


class Seen(NamedTuple):
    """A window of a clip as a model would see it, or why the clip cannot be used."""

    clip: Clip
    facts: Facts | None
    made: Any  # what was made of its frames
    problem: str | None
    is_dropped: bool = False  # whether --drop_unfit leaves the clip out


def add_options(parser: argparse.ArgumentParser, *, flips: bool = False) -> None:
    """Adds the folder, and the options that decide what of it a model sees; `flips`: also those of mirrored clips."""
    folders = "folder with the clips and their captions, or several; FOLDER=2 is what an epoch shows twice"
    parser.add_argument("folders", type=listing.folder_option, nargs="+", metavar="FOLDER", help=folders)
    data = parser.add_argument_group("data")
    listing.add_options(data)
    selection.add_options(data, flips=flips)
    data.add_argument("--seed", type=at_least(0), default=42, help="decides where --video_reshape_mode random crops")


def listing_of(args: argparse.Namespace) -> Listing:
    return listing.read_listing(args.folders, listing.columns_of(args), listing.words_of(args))


def examine_all(clips: list[Clip], chosen: Selection) -> tuple[list[Examined], Selection]:
    """Returns what is known of each clip before it is decoded, and the selection, fitted to the clips."""
    notes = Notes()
    with ThreadPoolExecutor() as threads:
        if not chosen.is_fitted:
            sizes = tqdm(
                threads.map(partial(picture_size, notes=notes), clips), "Reading sizes", len(clips), unit="clip"
            )
            chosen = chosen.fitted([size for size in sizes if size])
        examined = threads.map(partial(examine, selection=chosen, notes=notes), clips)
        return list(tqdm(examined, "Examining clips", total=len(clips), unit="clip")), chosen


def unseen(clips: list[Clip], examined: list[Examined], chosen: Selection) -> list[Seen]:
    """Returns the windows of the clips, before any of them is decoded."""
    windows = []
    for clip, found in zip(clips, examined):
        if found.problem:
            is_dropped = chosen.drop_unfit and found.is_unfit
            windows.append(Seen(clip, None, None, None if is_dropped else found.problem, is_dropped))
        windows += [Seen(clip, facts, None, None) for facts in found.windows]
    return windows


def see(windows: list[Seen], make: Make, *, damaged: bool) -> list[Seen]:
    """Reads windows as a model would see them, several at once; keeps none of their frames.

    Args:
        make: called in a thread with the clip of each window, its facts, its frames, uint8 [F, H, W, C], and its mask,
            uint8 [F, H, W], None without one.
        damaged: whether clips that decode with errors can be used.
    """
    look = partial(_look, make=make, damaged=damaged)
    threads = decoding_threads(window.facts.view for window in windows if window.facts)
    with closing(map_ahead(look, windows, threads)) as looked_at:
        return list(tqdm(looked_at, "Reading clips", total=len(windows), unit="clip"))


def refused_whole(all_seen: list[Seen]) -> list[Seen]:
    """Returns the windows; where one has a problem, all windows of its clip have it, since none can be used then."""
    problems = {seen.clip.line: seen.problem for seen in all_seen if seen.problem}
    return [
        seen._replace(made=None, problem=seen.problem or problems[seen.clip.line])
        if seen.clip.line in problems
        else seen
        for seen in all_seen
    ]


def _look(window: Seen, make: Make, *, damaged: bool) -> Seen:
    clip, facts = window.clip, window.facts
    if not facts:
        return window
    damage, view = [], facts.view
    try:
        seen_frames = decode(clip, view, mirrored=False, file=facts.file, damage=damage)
        mask = facts.mask and read_mask(clip, facts.mask, view, mirrored=False, file=facts.file)
    except ValueError as error:
        return window._replace(problem=str(error))
    problem = None
    if damage:
        facts = facts._replace(damage=describe_damage(damage))
        problem = None if damaged else clip.problem(f"{facts.damage}; {MEND}")
    facts = facts._replace(**watch(clip.video, facts.file, view, seen_frames)._asdict())
    facts = facts._replace(is_all_white=mask is not None and is_all_white(mask))
    return Seen(clip, facts, None if problem else make(clip, facts, seen_frames, mask), problem)


def see_all(clips: list[Clip], chosen: Selection, make: Make, *, damaged: bool) -> tuple[list[Seen], Selection]:
    """Returns all windows, read as by `see`, and the selection, fitted to the clips."""
    examined, chosen = examine_all(clips, chosen)
    return refused_whole(see(unseen(clips, examined, chosen), make, damaged=damaged)), chosen


def describe(listed: Listing, all_seen: list[Seen], chosen: Selection) -> list[str]:
    """Returns the layouts, the summary and the remarks on the usable clips, or nothing if there are none."""
    usable = [seen for seen in all_seen if seen.facts and not seen.problem]
    if not usable:
        return []
    clips, facts = [seen.clip for seen in usable], [seen.facts for seen in usable]
    dropped = [seen.clip for seen in all_seen if seen.is_dropped]
    return [listed.describe(), headline(facts, chosen), *remark_unfit(dropped), *remarks(clips, facts, chosen)]


def describe_movement(all_seen: list[Seen]) -> list[str]:
    """Returns lines on how much each usable window moves, and on the cuts in it."""
    usable = [seen for seen in all_seen if seen.facts and not seen.problem]
    clips, facts = [seen.clip for seen in usable], [seen.facts for seen in usable]
    return list_motion(clips, facts) + list_cuts(clips, facts)


def all_problems(listed: Listing, all_seen: list[Seen]) -> list[str]:
    problems = listed.problems + list(dict.fromkeys(seen.problem for seen in all_seen if seen.problem))
    is_empty = all_seen and all(seen.is_dropped for seen in all_seen)
    return problems + [ALL_UNFIT] * bool(is_empty)


def refuse_problems(listed: Listing, all_seen: list[Seen], consequence: str) -> None:
    """Raises a ValueError that lists the problems of a dataset, if it has any."""
    if problems := all_problems(listed, all_seen):
        raise ValueError(list_problems(listed.name, problems, consequence))


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    about = "Reads all that a model would see of a dataset, and says what is wrong with it; exit code 0 or 2."
    parser = argparse.ArgumentParser("python dataset.py check", description=about, allow_abbrev=False)
    add_options(parser)
    problems = "also write all problems there, a line each: the message groups more than 20 by kind"
    parser.add_argument("--problems_file", type=expanded_path, metavar="FILE", help=problems)
    args = parse_options(parser, argv)
    selection.check_options(args, parser.error)
    masks.check_options(args, parser.error)
    if args.problems_file and (args.problems_file.is_dir() or not args.problems_file.parent.is_dir()):
        parser.error(f"--problems_file {args.problems_file}: must be a file in a folder that exists; pass another path")
    return parser, args


def main(argv: list[str] | None = None) -> None:
    parser, args = parse_args(argv)

    def check() -> None:
        listed, chosen = listing_of(args), selection.selection_of(args, with_image=False, whole=False)
        all_seen, chosen = see_all(listed.clips, chosen, make=lambda *_: None, damaged=args.allow_damaged)
        for line in (*describe(listed, all_seen, chosen), *describe_movement(all_seen)):
            print(line)
        if args.problems_file:
            lines = [f"{printable(problem)}\n" for problem in all_problems(listed, all_seen)]
            publish(args.problems_file, "".join(lines).encode())
        refuse_problems(listed, all_seen, "training refuses it")
        usable = {id(seen.clip) for seen in all_seen if not seen.is_dropped}
        print(f"no problems: {count_clips(len(usable))} can be trained on")

    run_command(parser, check)


if __name__ == "__main__":
    main()
