"""Measures what a mask over the left half of all clips leaves of the base model's look in the right half.

    python benchmarks/masks.py --seeds 1 --output benchmarks/results/masks.json

Trains the small model on the 25 clips in the look of the quickstart, without masks and with them, and compares samples
of the base model and of the LoRA with the word FILM, from the same noise, in each half of the picture.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import numpy as np
import shapes
import small
import torch
from diffusers import CogVideoXPipeline
from make_film import TOKEN, make_film
from PIL import Image
from preservation import FILMS
from pretrain import device_name, sample_all

from files import at_least

WAYS = {  # options of the training script
    "no masks": "",
    "--mask_floor 0": "--mask_column masks.txt",
    "--mask_preserve 1": "--mask_column masks.txt --mask_preserve 1",
    "--mask_preserve 5": "--mask_column masks.txt --mask_preserve 5",
}


def make_data(folder: Path) -> Path:
    """Makes the clips, and a mask for all of them whose left half is white."""
    data = make_film(folder, films=FILMS, others=0)
    white_left = np.zeros((128, 192), np.uint8)
    white_left[:, :96] = 255
    Image.fromarray(white_left).save(data / "left.png")
    (data / "masks.txt").write_text("left.png\n" * FILMS)
    return data


def halves(clips: np.ndarray) -> dict[str, np.ndarray]:
    middle = clips.shape[-2] // 2
    return {"left": clips[..., :middle, :], "right": clips[..., middle:, :]}


def compare(lora_path: Path, samples: int, seed: int) -> dict:
    """Returns, for each half, the share of the colour that is lost, and the mean change of all levels (0 to 255)."""
    pipe = CogVideoXPipeline.from_pretrained(small.SMALL, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(seed)
    prompts = [f"{TOKEN} {shapes.random_scene(rng).caption}" for _ in range(samples)]
    sample = partial(sample_all, pipe, prompts, seed=seed, guidance_scale=1.5)
    base = halves(np.stack(sample()))
    pipe.load_lora_weights(lora_path)
    tuned = halves(np.stack(sample()))
    return {
        half: {
            "colour lost": round(1 - shapes.chroma(tuned[half]) / shapes.chroma(base[half]), 3),
            "levels changed": round(float(np.abs(tuned[half].astype(float) - base[half]).mean()), 1),
        }
        for half in base
    }


def measure(way: str, *, seed: int, updates: int, samples: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder, "film"))
        options = [*small.LANDSCAPE, *small.RATE, *WAYS[way].split()]
        seconds = small.train(data, Path(folder, "run"), options, updates=updates, seed=seed)
        return {"seconds": seconds} | compare(Path(folder, "run"), samples, seed)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add, ways = parser.add_argument, list(WAYS)
    add("--ways", nargs="+", choices=ways, default=ways, metavar="WAY", help="some of the ways (default: all)")
    add("--samples", type=at_least(1), default=24, metavar="N", help="scenes to measure (default: 24)")
    small.add_options(parser, seeds=[1], of="training and sampling")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    about = {"updates": args.updates, "samples": args.samples, "device": device_name(torch.device("cpu"))}
    results = small.begun(args.output, about, {"ways": {}})
    small.run_ways(
        results["ways"],
        args.ways,
        args.seeds,
        measure=partial(measure, updates=args.updates, samples=args.samples),
        keep=partial(small.keep, args.output, results),
    )


if __name__ == "__main__":
    main()
