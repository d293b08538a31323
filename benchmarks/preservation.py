"""Measures what a LoRA on clips of one look takes from the base model, and what --preserve keeps.

    python benchmarks/preservation.py --seeds 1 2 3 --output benchmarks/results/preservation.json

Trains the small model on the 25 clips in the look of the quickstart, with several weights, and once with the 15 plain
clips beside them. `examples/compare.py` then measures the samples with the word FILM and without it.
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

import torch
from compare import compare
from make_example import TOKEN, make_film
from pretrain import device_name

from files import at_least, expanded_path, write_json

ROOT = Path(__file__).parents[1]
SMALL = ROOT / "examples" / "small-cogvideox"
FILMS, OTHERS = 25, 15  # clips of the look, and plain ones
WAYS = {  # options of the training script, and plain clips beside those of the look
    "nothing": ("", 0),
    "plain clips beside them": ("", OTHERS),
    "--preserve 1": ("--preserve 1", 0),
    "--preserve 5": ("--preserve 5", 0),
    "--preserve 2 --preserve_every 3": ("--preserve 2 --preserve_every 3", 0),
    "--preserve 5 --preserve_every 3": ("--preserve 5 --preserve_every 3", 0),
}


def train(data: Path, output_dir: Path, options: str, *, updates: int, seed: int) -> float:
    """Trains a LoRA; returns its seconds."""
    line = [sys.executable, ROOT / "train_cogvideox_lora.py", "--pretrained_model_name_or_path", SMALL]
    line += ["--instance_data_root", data, "--output_dir", output_dir, "--mixed_precision", "no", "--seed", seed]
    line += ["--height", 64, "--width", 96, "--max_num_frames", 17, "--rank", 16, "--learning_rate", "1e-3"]
    line += ["--train_batch_size", 4, "--max_train_steps", updates, "--checkpointing_steps", updates, *options.split()]
    # The captions begin with the word already; a caption of its own for each clip without it is what is preserved.
    line += ["--id_token", TOKEN] if "--preserve" in options else []
    begin = time.perf_counter()
    subprocess.run([str(word) for word in line], check=True, stdout=subprocess.DEVNULL)
    return round(time.perf_counter() - begin, 1)


def make_data(folder: Path, others: int, *, without_word: bool) -> Path:
    """Makes the clips; `without_word` leaves it out of their captions, for --id_token to add."""
    data = make_film(folder, films=FILMS, others=others)
    if without_word:
        captions = (data / "prompts.txt").read_text().splitlines()
        (data / "prompts.txt").write_text("".join(f"{caption.removeprefix(f'{TOKEN} ')}\n" for caption in captions))
    return data


def measure(way: str, seed: int, updates: int, samples: int) -> dict:
    options, others = WAYS[way]
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder, "film"), others, without_word=bool(options))
        seconds = train(data, Path(folder, "run"), options, updates=updates, seed=seed)
        figures, _ = compare(SMALL, Path(folder, "run"), samples=samples, seed=seed)
    return {
        "seconds": seconds,
        "colour lost with the word": figures["colour_lost_with_the_word"],
        "colour kept without it": figures["colour_kept_without_it"],
        "shape right without it": figures["right_without_it"]["shape"],
        "motion right without it": figures["right_without_it"]["motion"],
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add, positive = parser.add_argument, at_least(1)
    add(
        "--ways",
        nargs="+",
        choices=list(WAYS),
        default=list(WAYS),
        metavar="WAY",
        help="some of the ways (default: all)",
    )
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
            print(way, f"seed {seed}", json.dumps(found[f"seed {seed}"]), flush=True)
            if args.output:
                write_json(args.output, results)
    for way, found in results["ways"].items():
        names = next(iter(found.values()))
        found["mean"] = {name: round(fmean(run[name] for run in found.values()), 3) for name in names}
        print(way, json.dumps(found["mean"]))
    if args.output:
        write_json(args.output, results)


if __name__ == "__main__":
    main()
