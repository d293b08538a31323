"""Compares how fast PyAV and decord read what a model sees, in one run.

    python benchmarks/decoders.py --runs 10 --output benchmarks/results/decoders.json

The clip is drawn by FFmpeg: 10 seconds of 1280x720 at 30 frames per second, H.264 with B-frames and key frames 250
frames apart. Read are 49 frames, 8 per second. The decoders take turns, and each first in half of the turns.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import imageio_ffmpeg

from clips import decord_reader, frames
from clips.frames import View, choose_source
from clips.known import look_at
from clips.video import read_pictures
from files import at_least, expanded_path, write_json

NUM_FRAMES, FPS = 49, 8
VIEW = View(480, 720, FPS, NUM_FRAMES, 0, 0, "center", 0)
SOURCE = "testsrc2=size=1280x720:rate=30:duration=10,noise=alls=12:allf=t"  # noise, as cameras have


def draw(path: Path) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", SOURCE]
    subprocess.run([*command, "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "20", str(path)], check=True)


def readers(path: Path) -> dict[str, Callable[[], int]]:
    """Returns a function for each decoder that opens the clip, and reads and counts the frames that the model sees."""
    source = choose_source(path, look_at(path), VIEW)
    choose_source(path, look_at(path), VIEW._replace(video_decoder="decord"))  # refuses what decord reads wrong
    return {
        "pyav": lambda: len(list(read_pictures(path, source.video, source.times, []))),
        "decord": lambda: len(list(decord_reader.read_pictures(path, source.indices))),
    }


def seconds_of(read: Callable[[], int], clips: int, threads: int) -> float:
    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        counts = [future.result() for future in [pool.submit(read) for _ in range(clips)]]
    assert set(counts) == {NUM_FRAMES}
    return time.perf_counter() - begin


def compare(path: Path, runs: int, *, clips: int, threads: int) -> dict:
    """Returns the frames per second of each decoder, each with the median over all runs, and their ratio."""
    seconds = {name: [] for name in readers(path)}
    for run in range(runs):
        turn = list(readers(path).items())
        for name, read in turn if run % 2 else reversed(turn):
            seconds[name].append(seconds_of(read, clips, threads))
    rates = {name: clips * NUM_FRAMES / statistics.median(taken) for name, taken in seconds.items()}
    return {
        "clips": clips,
        "threads": threads,
        "seconds": {name: [round(value, 3) for value in taken] for name, taken in seconds.items()},
        "frames_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "pyav_to_decord": round(rates["pyav"] / rates["decord"], 3),
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--runs", type=at_least(2), default=10, metavar="N", help="runs of each decoder")
    parser.add_argument("--output", type=expanded_path, metavar="FILE", help="file for the JSON, beside printing it")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        draw(path)
        result = {
            "device": f"CPU, {platform.machine()}",
            "cores": len(os.sched_getaffinity(0)),
            "versions": {package: version(package) for package in ("av", "decord")},
            "one at a time": compare(path, args.runs, clips=1, threads=1),
            "as training reads": compare(path, args.runs, clips=4, threads=frames.decoding_threads([VIEW])),
        }
    print(json.dumps(result, indent=2))
    if args.output:
        write_json(args.output, result)


if __name__ == "__main__":
    main()
