"""What a resumed run may do differently from the run that wrote its checkpoint, and what that does to its state."""

import argparse
import json
from collections.abc import Callable
from fractions import Fraction

import torch

from cogvideox import lora
from run import optimizers, rate_search

# What --change allows, with the options that are then free to differ.
CHANGES = {
    "learning_rate": ("learning_rate", "scale_lr"),
    "schedule": ("lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power"),
    "steps": ("num_train_epochs", "max_train_steps"),
    "batch": ("train_batch_size", "gradient_accumulation_steps", "max_tokens_per_batch", "bucket_group"),
    "data": ("image_share",),
    "base": (),
}
# The checkpoint decides these: they shape what it holds, or the clips that were held out.
KEPT = (
    "training_type", *lora.OPTIONS, *(name for name in optimizers.OPTIONS if name != "learning_rate"), "seed",
    "validation_split", "ema_decay", "mixed_precision", "loraplus_lr_ratio",
)  # fmt: skip
# Where a run reads and writes, and what it is asked to do on the way: no part of its course.
BESIDE = {
    "output_dir", "resume_from_checkpoint", "change", "hub_token", "hub_model_id", "push_to_hub", "report_to",
    "tracker_name", "logging_dir", "cache_dir", "latents_cache_dir", "pretrained_model_name_or_path", "revision",
    "variant", "lora_path", "check_all", "encode_only", "dry_run", "dry_run_gib",
    "save_precision", "lora_for_other_base",
}  # fmt: skip
# Values of options that earlier versions did not have and that move the numbers: their checkpoints are without them.
EARLIER = {"timestep_sampling": "uniform", "loraplus_lr_ratio": 1.0}
FLAT = ("constant", "constant_with_warmup")  # schedules that do not depend on the number of updates


def add_options(group: argparse._ArgumentGroup) -> None:
    allow = "what may differ from the checkpoint that is resumed"
    group.add_argument("--change", nargs="+", choices=list(CHANGES), default=[], metavar="WHAT", help=allow)


def check_options(args: argparse.Namespace, refuse: Callable[[str], None]) -> None:
    """Refuses an option that would do nothing; `refuse` ends the program with a message."""
    if args.change and not args.resume_from_checkpoint:
        refuse("--change: does nothing without --resume_from_checkpoint; pass latest or auto, or leave it out")


def recorded(options: dict) -> dict:
    """Returns the options that belong to the course of a run, as a checkpoint records them, in JSON's types."""
    options = {name: value for name, value in options.items() if name not in BESIDE}
    return json.loads(json.dumps(options, default=str))


def check_options_of_checkpoint(
    name: str, saved: dict, options: dict, *, allowed: list[str], derived: Callable[[dict], dict]
) -> dict[str, list]:
    """Returns the options that differ from a checkpoint's, {option: [saved, now]}.

    Args:
        name: of the checkpoint, for messages.
        saved: options that it was trained with (earlier formats hold only some), and its "processes".
        allowed: values of --change.
        derived: returns, from such options, the ones that follow from others unless they are given.

    Raises:
        ValueError: an option differs that has to be kept, or that no value of --change allows.
    """
    both = options.keys() & saved.keys() - {"processes"}
    differing = {name: [saved[name], options[name]] for name in sorted(both) if saved[name] != options[name]}
    ours, theirs = derived(options), derived(saved)
    follows = {name for name, pair in differing.items() if name in ours and [theirs[name], ours[name]] == pair}
    kept = [option for option in differing if option in KEPT and option not in follows]
    needed = _needed_changes(saved, options, differing.keys() - follows)
    missing = {change: found for change, found in needed.items() if change not in allowed}
    refused = [*kept, *(option for found in missing.values() for option in found)]
    if "learning_rate" in missing.get("learning_rate", ()) and options["learning_rate"] == rate_search.AUTO:
        raise ValueError(
            f"--learning_rate auto: it is found before the first update only, and {name} was trained with "
            f"{saved['learning_rate']}; pass that, or another number and --change learning_rate"
        )
    if refused:
        ways_out = []
        if kept:
            named = " and ".join(f"--{option}" for option in kept)
            ways_out.append(f"a resumed run keeps {named} of its checkpoint: pass the same")
        if missing:
            changes = " ".join(dict.fromkeys([*allowed, *missing]))
            named = " and ".join(f"--{option}" for found in missing.values() for option in found)
            ways_out.append(f"{named} changes the course of the run: --change {changes} allows it (docs/resume.md)")
        raise ValueError(
            f"{_listed(name, refused, differing)}. {'; '.join(ways_out).capitalize()}; or start a new run in another "
            "--output_dir"
        )
    return differing


def _needed_changes(saved: dict, options: dict, differing: set[str]) -> dict[str, list[str]]:
    """Returns the values of --change that differing options need, each with those options."""
    needed = {change: [option for option in found if option in differing] for change, found in CHANGES.items()}
    if options["lr_scheduler"] in FLAT:
        del needed["steps"]
    accumulation = "gradient_accumulation_steps"
    if accumulation in differing and _batches_per_update(saved) == _batches_per_update(options):
        needed["batch"].remove(accumulation)  # other processes, but the same update
    return {change: found for change, found in needed.items() if found}


def _batches_per_update(options: dict) -> int:
    return options["gradient_accumulation_steps"] * options["processes"]


def _listed(name: str, options: list[str], differing: dict[str, list]) -> str:
    return "; ".join(
        f"--{option} {_as_typed(now)}: {name} was trained with {_as_typed(before)}"
        for option, (before, now) in differing.items()
        if option in options
    )


def _as_typed(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def describe(name: str, differing: dict[str, list]) -> list[str]:
    """Returns a line on the options that differ from the checkpoint's; none if none do."""
    named = {what: what if ": " in what else f"--{what}" for what in differing}  # content, or an option
    found = [f"{named[what]} {_as_typed(now)} (was {_as_typed(before)})" for what, (before, now) in differing.items()]
    return [f"continues from {name} with other values: {', '.join(found)}"] if found else []


def check_content(name: str, saved: dict, now: dict, allowed: list[str]) -> dict[str, list]:
    """Returns what differs from a checkpoint in the clips or the base model's weights, {what: [saved, now]}.

    Args:
        name: of the checkpoint, for messages.
        saved: what it records; nothing in a fresh run.
        now: "data" and "base", each a dictionary of values to compare; what a checkpoint lacks is not compared.

    Raises:
        ValueError: no value of --change allows it.
    """
    differing, refused = {}, []
    for change, what in {"data": "the clips", "base": "the base model's weights"}.items():
        before, current = saved.get(change, {}), now[change]
        found = {key: [before[key], current[key]] for key in before if before[key] != current[key]}
        if found and change not in allowed:
            shown = ", ".join(f"{key} {_short(a)}, now {_short(b)}" for key, (a, b) in found.items())
            refused.append(f"{what} are not those of {name} ({shown}): --change {change} continues with these")
        differing |= {f"{change}: {key}": [_short(a), _short(b)] for key, (a, b) in found.items()}
    if refused:
        raise ValueError(
            f"--resume_from_checkpoint: {'; '.join(refused)}; or pass those that it was trained on, or start a new run "
            "in another --output_dir"
        )
    return differing


def _short(value) -> str:
    return value[:8] if isinstance(value, str) else str(value)


def moved_position(saved: dict, batches_per_epoch: int) -> dict:
    """Returns the position of a run whose epochs may have another number of micro-batches than before.

    As large a part of the current epoch counts as done; its remaining clips are those of the new order.
    """
    before = saved.get("batches_per_epoch", batches_per_epoch)
    batches_seen = round(Fraction(saved["batches_seen"], before) * batches_per_epoch)
    return {"step": saved["step"], "batches_seen": batches_seen}


def set_learning_rate(optimizer, lr_scheduler: torch.optim.lr_scheduler.LambdaLR, peak: float | None) -> None:
    """Sets the learning rate to what the schedule gives at its position.

    Args:
        peak: new peak of the first group, in proportion to which those of others change; None keeps the checkpoint's.
    """
    if peak is not None:
        # Rounded to 12 digits, since a quotient may be 3.0000000000000004.
        ratios = [round(base / lr_scheduler.base_lrs[0], 12) for base in lr_scheduler.base_lrs]
        lr_scheduler.base_lrs = [peak * ratio for ratio in ratios]
    rates = [
        base * factor(lr_scheduler.last_epoch) for base, factor in zip(lr_scheduler.base_lrs, lr_scheduler.lr_lambdas)
    ]
    for group, base, rate in zip(optimizer.param_groups, lr_scheduler.base_lrs, rates):
        group["initial_lr"], group["lr"] = base, rate
    lr_scheduler._last_lr = rates
