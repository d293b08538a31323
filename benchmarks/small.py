"""Trains LoRAs on the small model, and continues a comparison of several ways to train where it was stopped.

preservation.py, masks.py, rates.py and sizes.py train with it; quality.py has its own runs, and the same check of what
it continues.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from proof import commit

from files import at_least, expanded_path, write_json

ROOT = Path(__file__).parents[1]
SMALL = ROOT / "examples" / "small-cogvideox"
LANDSCAPE, RATE = ("--height", 64, "--width", 96, "--max_num_frames", 17), ("--learning_rate", "1e-3")


def train(data: Path, output_dir: Path, options: Iterable, *, updates: int, seed: int) -> float:
    """Trains a LoRA with further options of the training script; returns its seconds."""
    line = [sys.executable, ROOT / "train_cogvideox_lora.py", "--pretrained_model_name_or_path", SMALL]
    line += ["--instance_data_root", data, "--output_dir", output_dir, "--mixed_precision", "no", "--seed", seed]
    line += ["--rank", 16, "--train_batch_size", 4, "--max_train_steps", updates, "--checkpointing_steps", updates]
    begin = time.perf_counter()
    subprocess.run([str(word) for word in (*line, *options)], check=True, stdout=subprocess.DEVNULL)
    return round(time.perf_counter() - begin, 1)


def add_options(parser: argparse.ArgumentParser, seeds: list[int], of: str = "training") -> None:
    """Adds the options of a comparison; its runs have these seeds by default."""
    add, default = parser.add_argument, " ".join(map(str, seeds))
    output = "file for the results, as JSON; what it holds already is not measured again"
    add("--seeds", type=at_least(0), nargs="+", default=seeds, help=f"seeds of {of} (default: {default})")
    add("--updates", type=at_least(1), default=400, metavar="N", help="updates of each run (default: 400)")
    add("--output", type=expanded_path, metavar="FILE", help=output)


def begun(output: Path | None, about: dict, measured: dict) -> dict:
    """Returns the results that `output` holds, or their beginning.

    Args:
        about: what all runs have in common; version and commit are added.
        measured: empty results.
    """
    about = about | {"torch": torch.__version__, "commit": commit()}
    if not output or not output.exists():
        return about | measured
    kept = json.loads(output.read_text())
    refuse_others(output, kept, about)
    return kept


def refuse_others(output: Path, kept: dict, about: dict) -> None:
    """Ends the script if the results that a file holds were measured in another way."""
    if different := [name for name, value in about.items() if kept.get(name) != value]:
        sys.exit(
            f"--output {output}: was measured with other {', '.join(different)}; move it away or pass another file"
        )


def keep(output: Path | None, results: dict) -> None:
    if output:
        write_json(output, results)


def run_ways(
    results: dict[str, dict], ways: Iterable[str], seeds: list[int], *, measure: Callable, keep: Callable[[], None]
) -> None:
    """Does the runs that `results` lacks, the ways one after the other for each seed.

    Args:
        results: what has been measured, by way and "seed N".
        measure: takes a way and `seed`.
        keep: called after each run.
    """
    for seed in seeds:
        for way in ways:
            found, name = results.setdefault(way, {}), f"seed {seed}"
            if name not in found:
                found[name] = measure(way, seed=seed)
                print(way or "nothing", name, json.dumps(found[name]), flush=True)
                keep()
