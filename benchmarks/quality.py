"""Compares our training script with diffusers' example by the seconds, updates and clips until a held-out loss.

    OMP_NUM_THREADS=1 python benchmarks/quality.py --reference path/to/train_cogvideox_lora.py --seeds 1 2 3 4 5 \\
        --output benchmarks/results/quality.json --picture docs/quality.svg

Both scripts run unmodified, each time in a process of its own, on the small model and the clips of a new look. After
some of the updates `trial.py` copies the LoRA aside. One judge then computes the loss of all of them: the one that
training reports for held-out clips, with the same noise for every LoRA, on clips that neither script has seen.

Both scripts get the options in `shared_options`: base model, clips, size, LoRA, batch size, float32, number of updates
and seed. Everything else is the default of each script: the example's are Adam at a constant 1e-4, ours AdamW, and both
have betas of 0.9 and 0.95, weight decay 1e-4, no warm-up and gradients clipped to a norm of 1. The ways in `WAYS` add
the learning rate: none, the best of a sweep, or `auto`. A sweep has a seed of its own, and the best rate is the one
with the lowest held-out loss after --sweep_updates.

"Seconds" are those since the start of the process, so loading, encoding and a search for a learning rate count;
"seconds of updates" are those since the first forward pass of training. A loss is reached at the first recorded update
whose loss is at or below it; nothing is interpolated. Each seed gives a ratio; reported are their median, and as its
interval the smallest and the largest, between which the true median lies with a probability of 1 - 2^(1 - seeds).

The loss on a few held-out clips goes up and down, and the first update below a loss is easier to find than a loss that
stays there: a script that is compared with itself would have a ratio below 1, too. "ratio" is therefore accompanied by
"ratio_of_firsts", in which the other side has its first update at or below the loss as well.

Every run is written to --output when it ends, and a benchmark that is started again does only what is missing there.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

import curves
import small
import torch
from make_film import make_film
from proof import commit
from reference import sha256
from versus import OURS, processor_name, run_trial

import train_cogvideox_lora as train
from files import at_least, expanded_path, write_json
from run import signals, validation
from run.validation import HeldOut

JUDGE_SEED = 42  # of the noise in which every LoRA is judged
WAYS = {  # whose script, and its options; {best} is the best rate of that script's sweep
    "example": ("theirs", ""),
    "example-best": ("theirs", "--learning_rate {best}"),
    "ours-best": ("ours", "--learning_rate {best}"),
    "ours-auto": ("ours", "--learning_rate auto --validation_split 5 --no-validate_first"),  # learns from fewer clips
}
LABELS = {
    "example": "diffusers' example at its default, 1e-4",
    "example-best": "diffusers' example at its best rate",
    "ours-best": "ours at its best rate",
    "ours-auto": "ours with --learning_rate auto, search included",
}


class Setting(NamedTuple):
    """The base model and the clips, which have the size, length and frame rate that is trained on."""

    base: Path = Path(__file__).resolve().parents[1] / "examples" / "small-cogvideox"
    films: int = 25  # clips of the look that is learned
    others: int = 15  # plain ones beside them
    held_out: int = 8  # further clips of the look
    max_num_frames: int = 17
    height: int = 64
    width: int = 96
    fps: int = 8
    rank: int = 16
    train_batch_size: int = 4


SMALL = Setting()


class Comparison(NamedTuple):
    """How long one way takes to the loss that another one has after so many updates."""

    way: str
    against: str
    updates: int
    aim: float | None  # largest ratio of seconds that is asked for


def comparisons(args: argparse.Namespace) -> list[Comparison]:
    return [
        Comparison("ours-best", "example-best", args.sweep_updates, aim=0.6),
        Comparison("ours-auto", "example", args.updates, aim=0.35),
        Comparison("ours-best", "example", args.updates, aim=None),
    ]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    option, count, ways = parser.add_argument, at_least(1), list(WAYS)
    rates = [1e-4, 3e-4, 1e-3, 2e-3, 4e-3, 8e-3]
    output = "file for the results, as JSON; what it holds already is not measured again"
    after = "updates after which the best rate is chosen, and the loss of the best runs is compared (default: 200)"
    option("--reference", type=Path, required=True, metavar="FILE", help="diffusers' train_cogvideox_lora.py")
    option("--ways", nargs="+", choices=ways, default=ways, metavar="WAY", help=f"some of {', '.join(ways)}")
    option("--seeds", type=at_least(0), nargs="+", default=[1, 2, 3, 4, 5], help="seeds of training")
    option("--updates", type=count, default=400, metavar="N", help="updates of each run (default: 400)")
    for who, script in (("theirs", "diffusers' example"), ("ours", "our script")):
        sweep = f"learning rates to choose the best from for {script} (default: {' '.join(f'{r:g}' for r in rates)})"
        option(f"--{who}_rates", type=float, nargs="+", default=rates, metavar="RATE", help=sweep)
    option("--sweep_seed", type=at_least(0), default=0, metavar="N", help="seed of the sweeps (default: 0)")
    option("--sweep_updates", type=count, default=200, metavar="N", help=after)
    option("--output", type=expanded_path, required=True, metavar="FILE", help=output)
    option("--picture", type=expanded_path, metavar="FILE", help="picture of the curves to draw (.svg)")
    args = parser.parse_args(argv)
    if not args.reference.is_file():
        parser.error(f"--reference {args.reference}: no such file; pass the path of diffusers' train_cogvideox_lora.py")
    if args.sweep_updates > args.updates:
        parser.error(f"--sweep_updates {args.sweep_updates}: more than --updates {args.updates}; pass at most that")
    return args


def recorded_updates(updates: int) -> list[int]:
    """Returns the updates after which the LoRA is judged: fewer and fewer, the last one among them."""
    return sorted({*range(5, 100, 5), *range(100, 200, 10), *range(200, updates, 20), updates} & {*range(updates + 1)})


# ---- the runs --------------------------------------------------------------------------------------------------------


def write_inputs(setting: Setting, folder: Path) -> None:
    """Puts the base model and the clips, `folder`/clips and `folder`/held-out, under names without "5b".

    Such a name would make diffusers' example load bfloat16; the small model is stored in float16, as it loads others.
    """
    (folder / "base-model").symlink_to(setting.base, target_is_directory=True)
    size = {"num_frames": setting.max_num_frames, "fps": setting.fps, "height": setting.height, "width": setting.width}
    make_film(folder / "clips", films=setting.films, others=setting.others, **size)
    make_film(folder / "held-out", films=setting.held_out, others=0, seed=8, **size)


def shared_options(setting: Setting, clips: str, updates: int, seed: int) -> list[str]:
    """Returns the options that both scripts get; paths are relative to the folder of `write_inputs`."""
    values = {
        "pretrained_model_name_or_path": "base-model",
        "instance_data_root": clips, "caption_column": "prompts.txt", "video_column": "videos.txt",
        "height": setting.height, "width": setting.width, "max_num_frames": setting.max_num_frames, "fps": setting.fps,
        "rank": setting.rank, "lora_alpha": setting.rank, "train_batch_size": setting.train_batch_size,
        "mixed_precision": "no", "max_train_steps": updates, "checkpointing_steps": updates + 1, "seed": seed,
    }  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


class Bench(NamedTuple):
    """What all runs have in common."""

    args: argparse.Namespace
    setting: Setting
    folder: Path
    judge: Callable[[dict[str, torch.Tensor]], float]

    def measure(self, name: str, who: str, options: str, *, seed: int, updates: int, recorded: list[int]) -> dict:
        """Trains with one of the scripts, and judges what it has learned after each of the recorded updates."""
        line = [*shared_options(self.setting, "clips", updates, seed), *options.split()]
        script = self.args.reference
        if who == "ours":
            script, line = OURS, [*line, "--latents_cache_dir", f"{name}-cache"]  # empty at the start
        start = time.time()
        run_trial(self.folder, name, ["curve", f"{name}.pt", ",".join(map(str, recorded))], script, line)
        seconds = time.time() - start
        curve = torch.load(self.folder / f"{name}.pt", weights_only=True)
        for left in self.folder.glob(f"{name}*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        return {
            "options": options,
            "seconds_of_process": round(seconds, 2),
            "threads": curve["threads"],
            "update": [row["update"] for row in curve["rows"]],
            "steps": [row["steps"] for row in curve["rows"]],  # with those of a search
            "seconds": [round(row["at"] - start, 3) for row in curve["rows"]],
            "seconds_of_updates": [round(row["at"] - curve["begin"], 3) for row in curve["rows"]],
            "loss": [self.judge(weights) for weights in curve["weights"]],
        }


# ---- the judge -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def judging(setting: Setting, folder: Path) -> Iterator[Callable[[dict[str, torch.Tensor]], float]]:
    """Yields the function that returns the loss of a LoRA, by the names of its weights, on `folder`/held-out.

    It is what training reports as its loss on held-out clips, computed by the same functions.
    """
    line = shared_options(setting, str(folder / "held-out"), updates=1, seed=JUDGE_SEED)
    line += ["--pretrained_model_name_or_path", str(folder / "base-model"), "--output_dir", str(folder / "judge")]
    with signals.noted() as stop:
        args = train.parse_args(line)
        accelerator, ranks = train.start(args)
        base = train.read_base(args, torch.float32, accelerator.device)
        plan = train.plan_memory(args, accelerator, ranks, base, torch.float32)
        options = {"base": base, "dtype": torch.float32, "memory_plan": plan}
        base, parts = train.prepare_data(args, accelerator, ranks, **options, stop=stop)
        transformer, _ = train.prepare_transformer(args, base, plan, torch.float32, accelerator.device)
    transformer.to(accelerator.device)
    held_out = HeldOut(
        accelerator,
        ranks,
        base,
        data=parts.training,
        encode_images=None,
        seed=JUDGE_SEED,
        dtype=torch.float32,
        agree=fail,
    )
    trained = {name: weight for name, weight in transformer.named_parameters() if weight.requires_grad}

    def judge(weights: dict[str, torch.Tensor]) -> float:
        if weights.keys() != trained.keys():
            raise ValueError(f"the scripts train different weights: {sorted(weights.keys() ^ trained.keys())[:4]} ...")
        with torch.no_grad():
            for name, weight in weights.items():
                trained[name].copy_(weight)
        return validation.held_out_losses(held_out, transformer)["validation_loss"]

    yield judge


def fail(error: Exception | None = None) -> None:
    if error:
        raise error


# ---- the figures -----------------------------------------------------------------------------------------------------


def first_at_or_below(losses: list[float], loss: float) -> int | None:
    """Returns the index of the first loss that is at or below another; None if there is none."""
    return next((i for i, found in enumerate(losses) if found <= loss), None)


def median_and_range(values: list[float]) -> dict:
    """Returns the median, the smallest and the largest value, each None if it is infinite: never reached."""
    shown = [None if math.isinf(value) else round(value, 4) for value in values]
    median = statistics.median(values)
    ends = [None if math.isinf(value) else round(value, 4) for value in (min(values), max(values))]
    return {"median": None if math.isinf(median) else round(median, 4), "interval": ends, "of_each_seed": shown}


def compare(comparison: Comparison, runs: dict[str, dict], others: dict[str, dict], batch_size: int) -> dict | None:
    """Returns the figures of a comparison over the seeds that both ways have run with; None if there are none.

    Args:
        runs, others: of the way and of the one that it is compared with, by seed.
    """
    names = ("loss", "updates", "clips", "seconds", "ratio", "ratio_of_updates", "ratio_of_firsts", "updates_of_other")
    figures = {name: [] for name in names}
    seeds = [seed for seed in runs if seed in others]
    for seed in seeds:
        run, other = runs[seed], others[seed]
        end = other["update"].index(comparison.updates)
        first = first_at_or_below(other["loss"], other["loss"][end])
        i = first_at_or_below(run["loss"], other["loss"][end])
        found = {name: math.inf if i is None else run[name][i] for name in ("steps", "seconds", "seconds_of_updates")}
        figures["loss"].append(other["loss"][end])
        figures["updates"].append(found["steps"])
        figures["clips"].append(found["steps"] * batch_size)
        figures["seconds"].append(found["seconds"])
        figures["ratio"].append(found["seconds"] / other["seconds"][end])
        figures["ratio_of_updates"].append(found["seconds_of_updates"] / other["seconds_of_updates"][end])
        figures["ratio_of_firsts"].append(found["seconds"] / other["seconds"][first])
        figures["updates_of_other"].append(other["steps"][first])
    if not seeds:
        return None
    return {
        **comparison._asdict(),
        "seeds": len(seeds),
        "probability_of_interval": 1 - 2 ** (1 - len(seeds)),
        "until_it": {name: median_and_range(values) for name, values in figures.items()},
    }


def summary(args: argparse.Namespace, ways: dict[str, dict], batch_size: int) -> list[dict]:
    found = (compare(c, ways.get(c.way, {}), ways.get(c.against, {}), batch_size) for c in comparisons(args))
    return [figures for figures in found if figures]


def describe(figures: dict) -> str:
    """Returns a line on a comparison, for the terminal."""

    def text(name: str) -> str:
        low, high = (("never" if value is None else f"{value:.4g}") for value in figures["until_it"][name]["interval"])
        median = figures["until_it"][name]["median"]
        return f"{'never' if median is None else f'{median:.4g}'} ({low} to {high})"

    aim = f", at most {figures['aim']} is asked for" if figures["aim"] else ""
    return (
        f"{figures['way']} reaches the loss of {figures['against']} after {figures['updates']} updates, "
        f"{text('loss')}, in {text('ratio')} of its seconds{aim}, "
        f"{text('ratio_of_updates')} of its seconds of updates, {text('ratio_of_firsts')} of the seconds until "
        f"it has such a loss for the first time, after {text('updates_of_other')} updates: "
        f"{text('seconds')} seconds, {text('updates')} updates, {text('clips')} clips; medians and ranges of "
        f"{figures['seeds']} seeds"
    )


# ---- the comparison --------------------------------------------------------------------------------------------------


def about(args: argparse.Namespace, setting: Setting) -> dict:
    packages = ("torch", "diffusers", "peft", "accelerate", "transformers")
    line = shared_options(setting, "clips", args.updates, seed=0)[:-1]
    return {
        "commit": commit(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "versions": {package: version(package) for package in packages} | {"python": platform.python_version()},
        "reference_sha256": sha256(args.reference),
        "clips": {"films": setting.films, "others": setting.others, "held_out": setting.held_out},
        "shared_options": " ".join([*line, "SEED"]),
        "sweep": {"seed": args.sweep_seed, "updates": args.sweep_updates},
    }


def kept_results(args: argparse.Namespace, setting: Setting) -> dict:
    """Returns what --output holds, or the beginning of it; refuses a file that was measured in another way."""
    fresh = {"about": about(args, setting), "sweeps": {"theirs": {}, "ours": {}}, "best": {}, "ways": {}}
    if not args.output.exists():
        return fresh
    kept = json.loads(args.output.read_text())
    small.refuse_others(args.output, kept["about"], fresh["about"])
    return kept


def sweep(bench: Bench, result: dict, who: str) -> None:
    """Runs a script at all its rates and notes the best one, the one with the lowest loss on the held-out clips."""
    args, found = bench.args, result["sweeps"][who]
    rates = {f"{rate:g}": rate for rate in getattr(args, f"{who}_rates")}
    for rate in rates:
        if rate not in found:
            found[rate] = bench.measure(
                f"sweep-{who}-{rate}",
                who,
                f"--learning_rate {rate}",
                seed=args.sweep_seed,
                updates=args.sweep_updates,
                recorded=[args.sweep_updates],
            )
            print(f"{who} {rate}: loss {found[rate]['loss'][-1]:.4f} after {args.sweep_updates} updates", flush=True)
            write_json(args.output, result)
    result["best"][who] = min(rates, key=lambda rate: found[rate]["loss"][-1])


def run_all(bench: Bench, result: dict) -> None:
    """Does all runs that `result` lacks, the ways one after the other for each seed."""
    args = bench.args
    for who in dict.fromkeys(who for who, options in map(WAYS.get, args.ways) if "{best}" in options):
        sweep(bench, result, who)
    recorded = sorted({*recorded_updates(args.updates), args.sweep_updates})
    for seed in args.seeds:
        for way in args.ways:
            who, options = WAYS[way]
            options = options.format(best=result["best"].get(who))
            runs = result["ways"].setdefault(way, {})
            if runs.get(str(seed), {}).get("options") != options:
                name = f"{way}-{seed}"
                runs[str(seed)] = run = bench.measure(
                    name, who, options, seed=seed, updates=args.updates, recorded=recorded
                )
                print(f"{name}: loss {run['loss'][-1]:.4f}, {run['seconds'][-1]:.1f} seconds", flush=True)
            result["summary"] = summary(args, result["ways"], bench.setting.train_batch_size)
            write_json(args.output, result)


def draw(args: argparse.Namespace, result: dict) -> str:
    """Returns the curves of the ways that have run with all of --seeds, with these seeds only."""
    seeds = [str(seed) for seed in args.seeds]
    ways = {way: result["ways"][way] for way in WAYS if {*seeds} <= {*result["ways"].get(way, {})}}
    lines = {LABELS[way]: [runs[seed] for seed in seeds] for way, runs in ways.items()}
    title = "loss on held-out clips against seconds of the whole process, both on one thread"
    return curves.draw(lines, title, seeds=len(args.seeds))


def main(argv: list[str] | None = None, setting: Setting = SMALL) -> None:
    args = parse_args(argv)
    try:
        result = kept_results(args, setting)
        with tempfile.TemporaryDirectory() as folder:
            write_inputs(setting, Path(folder))
            with judging(setting, Path(folder)) as judge:
                run_all(Bench(args, setting, Path(folder), judge), result)
    except (RuntimeError, ValueError) as error:
        sys.exit(f"quality.py: error: {error}")
    print(*map(describe, result["summary"]), sep="\n")
    if args.picture:
        args.picture.write_text(draw(args, result), encoding="utf-8")


if __name__ == "__main__":
    main()
