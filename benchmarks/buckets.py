"""Measures what several buckets cost against one: tokens per second, idle ranks, and compilation.

    python benchmarks/buckets.py --output benchmarks/results/buckets.json

Trains the small model on drawn clips, the same number of updates each time, and reads the seconds of its updates from
metrics.jsonl. Of two ranks, an update takes as long as the slower one.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torch
from pretrain import device_name
from sizes import LANDSCAPE, PORTRAIT, SHORT, STILL, make_clips, name_of
from small import ROOT, SMALL

from clips.order import Order
from cogvideox.base_model import BaseModel, read_base_model
from files import at_least, expanded_path, write_json
from run.run_directory import read_metrics

CLIPS = 16  # of each size
FIRST = 3  # updates that are left out of the throughput: their shapes are new to the libraries
DATASETS = {
    "one bucket": (LANDSCAPE,),
    "three buckets": (LANDSCAPE, PORTRAIT, SHORT),
    "four buckets, one of images": (LANDSCAPE, PORTRAIT, SHORT, STILL),
}


class Course:
    """A run of the training script on one dataset, and the tokens of each of its micro-batches."""

    def __init__(self, base: BaseModel, sizes: tuple, folder: Path, args: argparse.Namespace):
        self.base, self.sizes, self.folder, self.args = base, sizes, folder, args
        self.data = make_clips(folder / "clips", dict.fromkeys(sizes, CLIPS), seed=0)
        self.max_tokens = args.clips * base.num_tokens(*base.latent_shape(*LANDSCAPE))

    def seconds(self, *, ranks: int, group: int, compiled: bool = False) -> list[float]:
        """Trains; returns the seconds of each update."""
        output = self.folder / f"run-{ranks}-{group}-{compiled}"
        shutil.rmtree(output, ignore_errors=True)  # of the run before
        line = [ROOT / "train_cogvideox_lora.py", "--pretrained_model_name_or_path", SMALL, "--mixed_precision", "no"]
        line += ["--instance_data_root", self.data, "--output_dir", output, "--rank", 16, "--bucket_group", group]
        line += ["--buckets", *map(name_of, self.sizes), "--max_tokens_per_batch", self.max_tokens]
        line += ["--max_train_steps", self.args.updates, "--checkpointing_steps", self.args.updates]
        line += ["--compile"] if compiled else []
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        command = [str(word) for word in [*start, *line]]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        return [row["seconds"] for row in read_metrics(output) if "loss" in row]

    def order(self, group: int) -> Order:
        """Returns the order of micro-batches of `seconds`, for clips in the order of their sizes."""
        shapes = [(0, *self.base.latent_shape(*size)) for size in self.sizes for _ in range(CLIPS)]
        return Order(shapes, 42, lambda shape: self.max_tokens // self.base.num_tokens(*shape[1:]), bucket_group=group)

    def tokens(self, ranks: int, group: int) -> list[list[int]]:
        """Returns the tokens of each rank's micro-batch, update by update."""
        order = self.order(group)
        batches = order.batches(range(self.args.updates * ranks))
        counts = [sum(self.base.num_tokens(*order.shapes[item.clip][1:]) for item in batch) for batch in batches]
        return [counts[first : first + ranks] for first in range(0, len(counts), ranks)]


def throughput(course: Course, ranks: int, group: int) -> float:
    """Returns tokens per second."""
    seconds, tokens = course.seconds(ranks=ranks, group=group), course.tokens(ranks, group)
    return sum(map(sum, tokens[FIRST:])) / sum(seconds[FIRST:])


def idle_share(course: Course, ranks: int, group: int) -> float:
    """Returns the share of the ranks' time in which they wait for the longest batch, if tokens take equal time."""
    tokens = course.tokens(ranks, group)
    return 1 - sum(map(sum, tokens)) / sum(ranks * max(update) for update in tokens)


def compiling_seconds(course: Course) -> float:
    """Returns the seconds that compilation adds to the updates of a run."""
    seconds = course.seconds(ranks=1, group=8, compiled=True)
    usual = statistics.median(seconds)
    return sum(max(0, second - 2 * usual) for second in seconds)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add, positive = parser.add_argument, at_least(1)
    add("--updates", type=positive, default=60, metavar="N", help="updates of each run (default: 60)")
    add("--clips", type=positive, default=4, metavar="N", help="clips of 17x64x96 whose tokens fill a batch")
    add("--runs", type=positive, default=3, metavar="N", help="runs of each; the best one counts (default: 3)")
    add("--compile", action="store_true", help="measure compilation, too: some minutes more")
    add("--output", type=expanded_path, metavar="FILE", help="file to write the JSON to, besides printing it")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    base, results = read_base_model(str(SMALL)), {}
    with tempfile.TemporaryDirectory() as folder:
        courses = {name: Course(base, sizes, Path(folder, name), args) for name, sizes in DATASETS.items()}
        for ranks in (1, 2):
            best = dict.fromkeys(courses, 0.0)
            for _ in range(args.runs):  # in turn, so that all see the same machine
                for name, course in courses.items():
                    best[name] = max(best[name], throughput(course, ranks, group=8))
            for name, rate in best.items():
                relative = round(rate / best["one bucket"], 3)
                results.setdefault(name, {})[f"tokens per second, {ranks} ranks"] = [round(rate), relative]
        for name, course in courses.items():
            shares = {
                f"{ranks} ranks, group {group}": idle_share(course, ranks, group)
                for ranks in (2, 8)
                for group in (1, 8)
            }
            results[name]["idle share (calculated)"] = {key: round(share, 3) for key, share in shares.items()}
            if args.compile:
                results[name]["seconds of compiling"] = round(compiling_seconds(course), 1)
    results |= {"updates": args.updates, "torch": torch.__version__, "device": device_name(torch.device("cpu"))}
    print(json.dumps(results, indent=1))
    if args.output:
        write_json(args.output, results)


if __name__ == "__main__":
    main()
