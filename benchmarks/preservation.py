"""Measures what a LoRA on clips of one look takes from the base model, and what --preserve keeps.

    python benchmarks/preservation.py --seeds 1 2 3 --output benchmarks/results/preservation.json

Trains the small model on 25 clips in the look of the quickstart and nothing else, with several weights of --preserve,
and with plain clips as regularization. `examples/compare.py` then measures the samples with the word FILM and without
it, and the drift on 5 held-out clips is compared with what it finds.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Collection
from functools import partial
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import numpy as np
import small
import torch
from compare import compare
from make_film import TOKEN, make_film
from pretrain import device_name

from files import at_least
from run.run_directory import read_metrics

FILMS, HELD_OUT, OTHERS = 25, 5, 15  # clips of the look that are learned, further ones, and plain clips
REGULARIZATION = "--regularization_data_root {others}"
WAYS = (  # options of the training script
    "",
    REGULARIZATION,
    "--preserve 1",
    "--preserve 4 --preserve_every 6",
    "--preserve 5 --preserve_every 8",
    "--preserve 0.3 --preserve_every 8",
)


def measure(way: str, *, seed: int, updates: int, samples: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        data, run, others = (Path(folder, name) for name in ("film", "run", "others"))
        make_film(others, films=0, others=OTHERS)
        options = [*small.LANDSCAPE, *small.RATE, "--id_token", TOKEN]
        options += ["--validation_split", HELD_OUT, "--no-validate_first"]
        options += way.format(others=others).split()
        make_film(data, films=FILMS + HELD_OUT, others=0, token="")
        seconds = small.train(data, run, options, updates=updates, seed=seed)
        rows = read_metrics(run)
        figures, _ = compare(small.SMALL, run, samples=samples, seed=seed)
    return {
        "seconds": seconds,
        "seconds per update": round(fmean(row["seconds"] for row in rows if "seconds" in row), 4),
        "drift": round(rows[-1]["drift"], 5),
        "colour lost with the word": figures["colour_lost_with_the_word"],
        "colour kept without it": figures["colour_kept_without_it"],
        "shape right without it": figures["right_without_it"]["shape"],
        "motion right without it": figures["right_without_it"]["motion"],
    }


def rank_correlation(pairs: list[tuple[float, float]]) -> float:
    """Returns Spearman's coefficient of the pairs; the ranks of equal values are in any order."""
    ranks = np.argsort(np.argsort(np.array(pairs), axis=0), axis=0)
    return float(np.corrcoef(ranks.T)[0, 1])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY", help="some of the ways (default: all)")
    add("--samples", type=at_least(1), default=24, metavar="N", help="scenes to measure (default: 24)")
    small.add_options(parser, seeds=[1, 2, 3], of="training and sampling")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    about = {"updates": args.updates, "samples": args.samples, "device": device_name(torch.device("cpu"))}
    results = small.begun(args.output, about, {"ways": {}, "means": {}})

    def keep() -> None:
        results["drift and colour taken"] = summary(results["ways"])
        results["means"] = {way: mean(found.values()) for way, found in results["ways"].items()}
        small.keep(args.output, results)

    measure_way = partial(measure, updates=args.updates, samples=args.samples)
    small.run_ways(results["ways"], args.ways, args.seeds, measure=measure_way, keep=keep)
    for way, means in results["means"].items():
        print(way or "nothing", json.dumps(means))


def mean(runs: Collection[dict[str, float]]) -> dict[str, float]:
    return {name: round(fmean(run[name] for run in runs), 3) for name in next(iter(runs))}


def summary(ways: dict[str, dict]) -> dict:
    """Returns how well the drift tells, over all runs, how much of the colour is taken where the word is absent."""
    runs = [run for found in ways.values() for run in found.values()]
    pairs = [(run["drift"], 1 - run["colour kept without it"]) for run in runs]
    return {"runs": len(runs), "rank correlation": round(rank_correlation(pairs), 3) if len(runs) > 2 else None}


if __name__ == "__main__":
    main()
