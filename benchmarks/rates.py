r"""Measures learning rates on three small data sets: a sweep, what `--learning_rate auto` finds, LoRA+ and Prodigy.

    python benchmarks/rates.py sweep --seeds 1 2 3 --every 100 --output benchmarks/results/rates-sweep.json
    python benchmarks/rates.py ways --looks film --seeds 1 2 3 --updates 200 --every 50 \
      --output benchmarks/results/rates-ways.json
    python benchmarks/rates.py timesteps --looks film --seeds 1 2 3 4 5 --updates 200 --every 50 \
      --output benchmarks/results/rates-timesteps.json

Every run learns from 25 clips of one look on the small model; every few updates, its loss on 8 held-out clips is noted.
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
from make_film import write_clips

from files import at_least
from run.run_directory import read_args, read_metrics

LEARNED, HELD_OUT = 25, 8  # clips
LOOKS = {  # what is new in the clips: the look in which they are drawn, and what becomes of their frames
    "film": ("film", lambda frames: frames),
    "negative": ("colour", lambda frames: 255 - frames),
    "bounce": ("colour", lambda frames: np.concatenate([frames[::2], frames[::-2]])),  # there and back
}
RATES = (7e-4, 1e-3, 1.4e-3, 2e-3, 2.8e-3, 4e-3)
PRODIGY = "--optimizer prodigy --prodigy_decouple --prodigy_use_bias_correction --prodigy_safeguard_warmup"
SPREAD = "--timestep_sampling low_discrepancy"
KINDS = {  # ways to train: options of the training script
    "sweep": tuple(f"--learning_rate {rate}" for rate in (*RATES, "auto")),
    "ways": tuple(
        f"{way} {SPREAD}"
        for way in (
            "--learning_rate 1e-3",
            "--learning_rate 1e-3 --loraplus_lr_ratio 4",
            "--learning_rate 1e-3 --loraplus_lr_ratio 16",
            "--learning_rate 2e-3",
            "--learning_rate 2e-3 --loraplus_lr_ratio 4",
            "--learning_rate 4e-3",
            "--learning_rate 4e-3 --lr_scheduler cosine",
            PRODIGY,
            f"{PRODIGY} --lr_scheduler cosine",
        )
    ),
    "timesteps": tuple(
        f"--learning_rate {rate} --timestep_sampling {how}"
        for rate in ("1e-3", "2e-3")
        for how in ("uniform", "low_discrepancy")
    ),
}


def make_clips(look: str, folder: Path) -> Path:
    """Writes the clips of a look, whose captions begin with its name in capitals; returns the folder."""
    drawn, change = LOOKS[look]
    rng = np.random.default_rng(7)

    def clips():
        for _ in range(LEARNED + HELD_OUT):
            scene = shapes.random_scene(rng)
            frames = shapes.draw_clip(scene, 34, 128, 192, rng=rng, look=drawn)
            yield look, f"{look.upper()} {scene.caption}", change(frames)

    return write_clips(folder, clips(), fps=16, quality=9)


def measure(data: Path, way: str, *, seed: int, updates: int, every: int) -> dict:
    """Returns the loss on held-out clips by update, and what `--learning_rate auto` has found."""
    with tempfile.TemporaryDirectory() as run:
        options = [*small.LANDSCAPE, "--validation_split", HELD_OUT, "--validation_steps", every]
        options += ["--validation_epochs", updates, *way.split()]
        small.train(data, Path(run), options, updates=updates, seed=seed)
        rows = [row for row in read_metrics(Path(run)) if "validation_loss" in row]
        found = read_args(Path(run))["learning_rate_found"]
    losses = {str(row["step"]): round(row["validation_loss"], 5) for row in rows}
    return {"losses": losses} | ({"found": found} if found else {})


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("kind", choices=KINDS, help="what to compare")
    add("--looks", nargs="+", choices=LOOKS, default=list(LOOKS), help="data sets (default: all)")
    add("--every", type=at_least(1), default=20, metavar="N", help="updates between two losses (default: 20)")
    small.add_options(parser, seeds=[1])
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    about = {"kind": args.kind, "updates": args.updates, "every": args.every}
    results = small.begun(args.output, about, {"looks": {}})
    with tempfile.TemporaryDirectory() as folder:
        for look in args.looks:
            data = make_clips(look, Path(folder, look))
            print(look, flush=True)
            small.run_ways(
                results["looks"].setdefault(look, {}),
                KINDS[args.kind],
                args.seeds,
                measure=partial(measure, data, updates=args.updates, every=args.every),
                keep=partial(small.keep, args.output, results),
            )


if __name__ == "__main__":
    main()
