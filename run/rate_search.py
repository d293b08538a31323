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

from files import CannotContinue

AUTO = "auto"
FIRST_RATES = {"lora": 1.8e-3, "sft": 1.8e-4}
SPACING = 3  # factor between rates, until the best has a neighbour on both sides; one more is half a step from it
MOST_TRIALS = 9
TRIAL_UPDATES = 15


class Found(NamedTuple):
    learning_rate: float
    losses: dict[float, float]  # on held-out clips after a trial, by its rate in the order of the trials
    updates: int  # of each trial
    total_updates: int  # of the run that it is for

    @property
    def best(self) -> float:
        """The rate of the best trial."""
        return _best(self.losses)

    def as_json(self) -> dict:
        losses = sorted(self.losses.items())
        losses = {f"{rate:.1e}": loss if math.isfinite(loss) else None for rate, loss in losses}
        return {
            "learning_rate": self.learning_rate,
            "best_trial": f"{self.best:.1e}",
            "updates_of_a_trial": self.updates,
            "updates_of_the_run": self.total_updates,
            "loss_by_rate": losses,
        }


def option(text: str) -> float | str:
    try:
        return AUTO if text == AUTO else float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number above 0, or auto") from error


def check_options(args: argparse.Namespace, refuse: Callable[[str], None]) -> None:
    """Refuses to find the learning rate where something else decides it, or nothing can judge it."""
    if args.learning_rate != AUTO:
        return
    is_changed = "learning_rate" in args.change
    for is_due, reason in (
        (args.optimizer == "prodigy", "--optimizer prodigy finds its own learning rate; leave one of them out"),
        (args.scale_lr, "--scale_lr would change what was found; leave it out"),
        (is_changed, "it is found before the first update only; with --change learning_rate, pass a number"),
        (not args.validation_split, "needs held-out clips to judge by; add --validation_split"),
    ):
        if is_due:
            refuse(f"--learning_rate auto: {reason}")


def find(loss_of: Callable[[float], float], first: float, *, trial_updates: int, total_updates: int) -> Found:
    """Finds the learning rate for a run of `total_updates`: up or down from three, then half a step from the best.

    A loss after so few updates can be off by chance, so a second rate that is worse does not end the way up; a third
    may be far better than both.

    Args:
        loss_of: trains from the same start with a rate for `trial_updates`, and returns the loss on held-out clips;
            infinite where the weights are no longer finite. It must return the same on all ranks.

    Raises:
        CannotContinue: no rate has a finite loss.
    """
    losses = {rate: loss_of(rate) for rate in (first, first * SPACING, first * SPACING**2)}
    factor = 1 / SPACING if _best(losses) == first else SPACING
    while len(losses) < MOST_TRIALS - 1:
        best = _best(losses)
        if best * factor in losses:
            break
        losses[best * factor] = loss_of(best * factor)
    last = _between(losses)
    losses[last] = loss_of(last)
    best = _best(losses)
    if not math.isfinite(losses[best]):
        raise CannotContinue(
            f"--learning_rate auto: the loss is not finite with any of {', '.join(f'{rate:.1e}' for rate in losses)}; "
            "look at the clips and the precision of the run, or pass a number"
        )
    return Found(for_longer_run(best, trial_updates, total_updates), losses, trial_updates, total_updates)


def _best(losses: dict[float, float]) -> float:
    """Returns the rate with the lowest loss, of equal ones the lower: where all diverge, the way is down."""
    return min(losses, key=lambda rate: (losses[rate], rate))


def _between(losses: dict[float, float]) -> float:
    """Returns the rate half a step from the best, towards its better neighbour or past the end of what was tried.

    A parabola through the three has its minimum on that side.
    """
    rates, best = sorted(losses), _best(losses)
    place, past = rates.index(best), float("-inf")
    lower = losses[rates[place - 1]] if place > 0 else past
    higher = losses[rates[place + 1]] if place + 1 < len(rates) else past
    return best / math.sqrt(SPACING) if lower <= higher else best * math.sqrt(SPACING)


def for_longer_run(rate: float, trial_updates: int, total_updates: int) -> float:
    """Returns the learning rate for the whole run, in two digits, from the best rate of its first updates."""
    return float(f"{rate * min(1, math.sqrt(trial_updates / total_updates)):.1e}")


def describe_plan(total_updates: int) -> str:
    updates = min(TRIAL_UPDATES, total_updates)
    return (
        f"learning rate auto: 4 to {MOST_TRIALS} trials of {updates} updates, each followed by the loss "
        f"on held-out clips, then the run of {total_updates} updates from the start"
    )


def describe(found: Found) -> list[str]:
    """Returns lines on what the trials have found."""
    lines, best = [], found.best
    if best in (min(found.losses), max(found.losses)):
        lines.append(f"the best, {best:.1e}, is at the end of what was tried: a rate beyond it may be better")
    scaled, times = "", found.total_updates / found.updates
    if times > 1:
        scaled = f", {best:.1e}, divided by the square root of {times:.4g}, since the run is so many times as long"
    return [*lines, f"learning rate {found.learning_rate:g}: the best of the trials{scaled}"]


def remark_on_length(found: dict | None, total_updates: int) -> str | None:
    """Returns a sentence if a resumed run has another length than the one for which its learning rate was found.

    Args:
        found: "learning_rate_found" of args.json; None if it was given.
    """
    before = found.get("updates_of_the_run", total_updates) if found else total_updates
    if before == total_updates:
        return None
    rate = for_longer_run(float(found["best_trial"]), found["updates_of_a_trial"], total_updates)
    return (
        f"learning rate {found['learning_rate']:g} was found for a run of {before} updates; for {total_updates} it "
        f"would be {rate:g}: --learning_rate {rate:g} --change learning_rate continues with that"
    )
