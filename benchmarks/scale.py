"""Measures the start of a training on many clips: seconds and peak memory of the first start and of a second one.

    python benchmarks/scale.py --clips 100000 --files 300 --output benchmarks/results/scale.json

Draws some small clips and links to them under many names, each with a caption of its own. VAE and T5 are replaced by
functions that return one value at once: what is measured is reading, checking and looking up, which the number of clips
decides, not encoding. Each start is a process of its own, so that its memory is its own.
"""

import argparse
import contextlib
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torch
from make_example import make_clips
from tqdm import tqdm

import dataset
from clips.frames import View
from clips.listing import Folder, read_listing
from clips.order import Ranks
from clips.selection import Selection
from cogvideox.encoders import Encoder
from files import at_least, expanded_path, write_json
from run.run_directory import peak_memory_gib

VIEW = View(64, 96, 8, 9, 0, 0, "center", 42)


def make_dataset(folder: Path, count: int, files: int, *, distinct: bool) -> None:
    """Makes a folder of `count` clips, with a caption beside each, from `files` drawn ones.

    Args:
        distinct: copy them, each with a number in a box that players ignore, instead of linking to them.
    """
    drawn = make_clips(folder / "drawn", count=files, num_frames=24, height=96, width=128)
    videos = sorted((drawn / "videos").iterdir())
    for number in range(count):
        subfolder = folder / "clips" / f"{number // 1000:04d}"
        subfolder.mkdir(parents=True, exist_ok=True)
        video, drawn = subfolder / f"{number:06d}.mp4", videos[number % files]
        if distinct:
            video.write_bytes(drawn.read_bytes() + struct.pack(">I4sQ", 16, b"free", number))
        else:
            os.link(drawn, video)
        (subfolder / f"{number:06d}.txt").write_text(f"caption {number}")


def start(folder: Path, check_all: bool) -> dict:
    """Prepares the data as the training script does; returns seconds and peak memory."""
    before, begin = peak_memory_gib(torch.device("cpu")), time.perf_counter()
    listing = read_listing([Folder(folder)])
    read = time.perf_counter()
    video_encoder = Encoder("v", lambda: contextlib.nullcontext(encode_videos), lambda shape: 8)
    text_encoder = Encoder("t", lambda: contextlib.nullcontext(encode_captions), lambda shape: 64)
    data = dataset.encode_dataset(
        listing,
        Selection(VIEW),
        cache=folder / ".cogvideox_cache",
        prompts=[""],
        random_flip=False,
        video_encoder=video_encoder,
        text_encoder=text_encoder,
        progress=lambda items, description, unit: tqdm(items, description, unit=unit, mininterval=5),
        ranks=Ranks(),
        everyone=Ranks(),
        used_by=folder / "run",
        check_all=check_all,
    )
    end = time.perf_counter()
    return {
        "clips": len(data.shapes),
        "seconds": round(end - begin, 1),
        "of them reading the folder": round(read - begin, 1),
        "memory_gib": round(peak_memory_gib(torch.device("cpu")) - before, 3),
    }


def encode_videos(frames: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(frames), 2, 3, 2, 2)


def encode_captions(captions: list[str]) -> torch.Tensor:
    return torch.zeros(len(captions), 3, 2)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add, positive = parser.add_argument, at_least(1)
    add("--clips", type=positive, default=100_000, metavar="N", help="clips of the dataset")
    add("--files", type=positive, default=300, metavar="N", help="different files that the clips are links to")
    add("--distinct", action="store_true", help="copy the files, each made different, instead of linking to them")
    add(
        "--folder", type=expanded_path, metavar="FOLDER", help="where to make the dataset (default: a temporary folder)"
    )
    add("--output", type=expanded_path, metavar="FILE", help="file to write the JSON to, beside printing it")
    add("--start", type=expanded_path, metavar="FOLDER", help=argparse.SUPPRESS)  # a start, in its own process
    add("--check_all", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def measured(folder: Path, *options: str) -> dict:
    command = [sys.executable, __file__, "--start", str(folder), *options]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.start:
        print(json.dumps(start(args.start, args.check_all)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        make_dataset(Path(folder), args.clips, args.files, distinct=args.distinct)
        clips = Path(folder) / "clips"
        result = {
            "cores": len(os.sched_getaffinity(0)),
            "different_files": args.clips if args.distinct else args.files,
            "first": measured(clips),
            "second": measured(clips),
            "second, --check_all": measured(clips, "--check_all"),
        }
    print(json.dumps(result, indent=2))
    if args.output:
        write_json(args.output, result)


if __name__ == "__main__":
    main()
