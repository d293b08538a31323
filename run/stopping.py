"""When a run has learned what it can: the loss on held-out clips no longer falls."""

import argparse
import re
from collections.abc import Callable, Sequence
from math import sqrt
from statistics import fmean, stdev

CLIP_PREFIX = "validation_loss_clip"  # of the names of single held-out clips' losses in metrics.jsonl


def check_options(args: argparse.Namespace, refuse: Callable[[str], None]) -> None:
    """Refuses options that need held-out clips where there are none; `refuse` ends the program with a message."""
    given = {f"--stop_patience {args.stop_patience}": args.stop_patience, "--result best": args.result == "best"}
    if (named := [name for name, is_given in given.items() if is_given]) and not args.validation_split:
        refuse(f"{named[0]}: is decided by the loss on held-out clips; add --validation_split")


def of_each_clip(rows: Sequence[dict]) -> list[tuple[int, list[float]]]:
    """Returns the step of each validation in rows of metrics.jsonl, with the losses of the held-out clips."""
    found = []
    for row in rows:
        losses = {int(match[1]): row[name] for name in row if (match := re.fullmatch(rf"{CLIP_PREFIX}(\d+)", name))}
        if losses and None not in losses.values():
            found.append((row["step"], [losses[clip] for clip in sorted(losses)]))
    return found


def remark_on_patience(patience: int, count: int) -> str | None:
    """Returns a sentence if a run has too few validations for `patience` to end it.

    Args:
        count: validations before the last update.
    """
    if count > patience:
        return None
    return (
        f"--stop_patience {patience}: cannot end this run, which has {count} validations before its last update; it "
        f"takes {patience + 1}, with a lower --validation_steps or --validation_epochs"
    )


def is_lower(losses: Sequence[float], than: Sequence[float]) -> bool:
    """Whether losses of the same clips are lower by more than one standard error of their mean difference.

    One clip has none: every lower loss counts.
    """
    gains = [before - now for now, before in zip(losses, than, strict=True)]
    error = stdev(gains) / sqrt(len(gains)) if len(gains) > 1 else 0
    return fmean(gains) > error


def validations_without_gain(validations: Sequence[tuple[int, list[float]]]) -> int:
    """Returns how many of the last validations were no better than the best one before them.

    The losses are smoothed: of each clip, the mean of a validation and the one before it.

    Args:
        validations: from `of_each_clip`.
    """
    best, previous, count = None, None, 0
    for _, losses in validations:
        smoothed = losses if previous is None else [fmean(pair) for pair in zip(losses, previous, strict=True)]
        if best is None or is_lower(smoothed, best):
            best, count = smoothed, 0
        else:
            count += 1
        previous = losses
    return count


def still_learned(validations: Sequence[tuple[int, list[float]]], count: int) -> list[int]:
    """Returns the held-out clips whose loss is lower after the last validation than `count` validations before it."""
    if len(validations) <= count:
        return []
    (_, before), (_, last) = validations[-1 - count], validations[-1]
    return [clip for clip, (early, late) in enumerate(zip(before, last, strict=True)) if late < early]


def clips_changed_at(record: dict) -> int:
    """Returns the step of the last start with other clips (--change data), -1 if there was none.

    Other clips may have been held out, so validations up to that step cannot be compared with later ones.

    Args:
        record: what args.json holds.
    """
    changed = [start["step"] for start in record.get("lineage", ()) if "data: " in " ".join(start["changed"])]
    return max(changed, default=-1)


def reason(rows: Sequence[dict], record: dict) -> str | None:
    """Returns why a run is at its end, by rows of metrics.jsonl; None while it is not.

    Args:
        record: what args.json holds.
    """
    patience, labels = record.get("options", {}).get("stop_patience"), record.get("held_out", ())
    since = clips_changed_at(record)
    validations = of_each_clip([row for row in rows if row["step"] > since])
    if patience is None or validations_without_gain(validations) < patience:
        return None
    falling = still_learned(validations, patience)
    count, of_clips = len(validations[-1][1]), "is lower on none of them"
    if falling:
        of_clips = f"is lower on {len(falling)} of them: {', '.join(labels[clip] for clip in falling)}"
    return (
        f"in {patience} validations (--stop_patience), the loss on held-out clips has fallen by no more than its "
        f"standard error over the {count} clips; since then it {of_clips}"
    )
