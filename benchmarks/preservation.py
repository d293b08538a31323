"""Measures what a LoRA on clips of one look takes from the base model, and what --preserve keeps.

    python benchmarks/preservation.py --seeds 1 2 3 --output benchmarks/results/preservation.json

Trains the small model on 25 clips in the look of the quickstart and nothing else, with several weights of --preserve,
and with plain clips as regularization. `examples/compare.py` then measures the samples with the word FILM and without
it, and the drift on 5 held-out clips is compared with what it finds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import numpy as np
import torch
from compare import compare
from make_example import TOKEN, make_film
from pretrain import device_name

from files import at_least, expanded_path, write_json
from run.run_directory import read_metrics

ROOT = Path(__file__).parents[1]
SMALL = ROOT / "examples" / "small-cogvideox"
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


def train(data: Path, output_dir: Path, options: list, *, updates: int, seed: int) -> float:
    """Trains a LoRA; returns its seconds."""
    line = [sys.executable, ROOT / "train_cogvideox_lora.py", "--pretrained_model_name_or_path", SMALL]
    line += ["--instance_data_root", data, "--output_dir", output_dir, "--mixed_precision", "no", "--seed", seed]
    line += ["--height", 64, "--width", 96, "--max_num_frames", 17, "--rank", 16, "--learning_rate", "1e-3"]
    line += ["--train_batch_size", 4, "--max_train_steps", updates, "--checkpointing_steps", updates, *options]
    begin = time.perf_counter()
    subprocess.run([str(word) for word in line], check=True, stdout=subprocess.DEVNULL)
    return round(time.perf_counter() - begin, 1)


def measure(way: str, seed: int, updates: int, samples: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        data, run, others = (Path(folder, name) for name in ("film", "run", "others"))
        make_film(others, films=0, others=OTHERS)
        options = ["--id_token", TOKEN, "--validation_split", HELD_OUT, "--no-validate_first"]
        options += way.format(others=others).split()
        make_film(data, films=FILMS + HELD_OUT, others=0, token="")
        seconds = train(data, run, options, updates=updates, seed=seed)
        rows = read_metrics(run)
        figures, _ = compare(SMALL, run, samples=samples, seed=seed)
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
    add, positive = parser.add_argument, at_least(1)
    add("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY", help="some of the ways (default: all)")
    add(
        "--seeds",
        type=at_least(0),
        nargs="+",
        default=[1, 2, 3],
        help="seeds of training and sampling (default: 1 2 3)",
    )
    add("--updates", type=positive, default=400, metavar="N", help="updates of each run (default: 400)")
    add("--samples", type=positive, default=24, metavar="N", help="scenes to measure (default: 24)")
    add("--output", type=expanded_path, metavar="FILE", help="file to write the JSON to, besides printing it")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    results = {"updates": args.updates, "samples": args.samples, "torch": torch.__version__}
    results |= {"device": device_name(torch.device("cpu")), "ways": {way: {} for way in args.ways}}
    for seed in args.seeds:
        for way, found in results["ways"].items():
            found[f"seed {seed}"] = measure(way, seed, args.updates, args.samples)
            print(way or "nothing", f"seed {seed}", json.dumps(found[f"seed {seed}"]), flush=True)
            results["drift and colour taken"] = summary(results["ways"])
            if args.output:
                write_json(args.output, results)
    for way, found in results["ways"].items():
        names = next(iter(found.values()))
        found["mean"] = {name: round(fmean(run[name] for run in found.values()), 3) for name in names}
        print(way or "nothing", json.dumps(found["mean"]))
    if args.output:
        write_json(args.output, results)


def summary(ways: dict[str, dict]) -> dict:
    """Returns how well the drift tells, over all runs, how much of the colour is taken where the word is absent."""
    runs = [run for found in ways.values() for run in found.values()]
    pairs = [(run["drift"], 1 - run["colour kept without it"]) for run in runs]
    return {"runs": len(runs), "rank correlation": round(rank_correlation(pairs), 3) if len(runs) > 2 else None}


if __name__ == "__main__":
    main()
