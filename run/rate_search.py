"""`--learning_rate auto`: short trials before a run find the learning rate that suits it.

The rate that is best after few updates is too high for a long run: it leaves the weights jittering about what they
could reach. The step size with which stochastic gradient descent comes closest in N updates falls as 1 / sqrt(N)
(Nemirovski et al. 2009, Robust stochastic approximation approach to stochastic programming, section 2.2), so the best
rate of the trials is divided by the square root of how many times as long the run is.
"""

import argparse
import math
from collections.abc import Callable
from typing import NamedTuple

AUTO = "auto"
FIRST_RATES = {"lora": 1.8e-3, "sft": 1.8e-4}
SPACING = 3  # of the rates that are tried until the best lies between two others; steps of its root then refine it
MOST_TRIALS = 9
TRIAL_UPDATES = 15


class Found(NamedTuple):
    learning_rate: float
    losses: dict[float, float]  # on held-out clips after a trial, by its rate in the order of the trials
    updates: int  # of each trial

    def as_json(self) -> dict:
        losses = sorted(self.losses.items())
        losses = {f"{rate:.1e}": loss if math.isfinite(loss) else None for rate, loss in losses}
        return {"learning_rate": self.learning_rate, "updates_of_a_trial": self.updates, "loss_by_rate": losses}


def option(text: str) -> float | str:
    try:
        return AUTO if text == AUTO else float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number above 0, or auto") from error


def check_options(args: argparse.Namespace, refuse: Callable[[str], None]) -> None:
    """Refuses to find the learning rate where something else decides it, or nothing can judge it."""
    if args.learning_rate != AUTO:
        return
    reasons = {
        "--optimizer prodigy: finds its own learning rate; leave one of them out": args.optimizer == "prodigy",
        "--scale_lr: would change what was found; leave it out": args.scale_lr,
        "--change learning_rate: it is found before the first update only; pass a number": "learning_rate"
        in args.change,
        "needs held-out clips to judge by; add --validation_split": not args.validation_split,
    }
    for reason, is_due in reasons.items():
        if is_due:
            refuse(f"--learning_rate auto: {reason}")


def find(loss_of: Callable[[float], float], first: float, *, trial_updates: int, total_updates: int) -> Found:
    """Finds the learning rate for a run of `total_updates`, from a first one upwards or downwards as the loss falls.

    Args:
        loss_of: trains from the same start with a rate for `trial_updates`, and returns the loss on held-out clips;
            infinite where the weights are no longer finite. It must return the same on all ranks.

    Raises:
        ValueError: no rate has a finite loss.
    """
    losses = {rate: loss_of(rate) for rate in (first, first * SPACING)}
    factor = SPACING if losses[first * SPACING] < losses[first] else 1 / SPACING
    while len(losses) < MOST_TRIALS - 2:
        best = _best(losses)
        if best * factor in losses:
            break
        losses[best * factor] = loss_of(best * factor)
    best, step = _best(losses), math.sqrt(SPACING)
    losses |= {rate: loss_of(rate) for rate in (best / step, best * step)}
    best = _best(losses)
    if not math.isfinite(losses[best]):
        raise ValueError(
            f"--learning_rate auto: the loss is not finite with any of {', '.join(f'{rate:.1e}' for rate in losses)}; "
            "look at the clips and the precision of the run, or pass a number"
        )
    return Found(for_longer_run(best, trial_updates, total_updates), losses, trial_updates)


def _best(losses: dict[float, float]) -> float:
    """Returns the rate with the lowest loss, of equal ones the lower: where all diverge, the way is down."""
    return min(losses, key=lambda rate: (losses[rate], rate))


def for_longer_run(rate: float, trial_updates: int, total_updates: int) -> float:
    """Returns the learning rate for the whole run, in two digits, from the best rate of its first updates."""
    return float(f"{rate * min(1, math.sqrt(trial_updates / total_updates)):.1e}")


def describe_plan(total_updates: int) -> str:
    updates = min(TRIAL_UPDATES, total_updates)
    return (
        f"learning rate auto: 5 to {MOST_TRIALS} trials of {updates} updates, each followed by the loss "
        f"on held-out clips, then the run of {total_updates} updates from the start"
    )


def describe(found: Found) -> list[str]:
    lines = [f"  {rate:.1e}: {loss:.4f}" for rate, loss in sorted(found.losses.items())]
    if (best := _best(found.losses)) in (min(found.losses), max(found.losses)):
        lines.append(f"the best, {best:.1e}, is at the end of what was tried: a rate beyond it may be better")
    return [
        f"loss on held-out clips after {found.updates} updates, by learning rate:",
        *lines,
        f"learning rate {found.learning_rate:g}: the best of them, scaled to the length of this run",
    ]
