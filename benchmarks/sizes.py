"""Measures whether a LoRA on clips of several sizes learns the look at each of them, on the small model.

    python benchmarks/sizes.py --output benchmarks/results/sizes.json

Trains on drawn clips, some in the look of the quickstart and others in colour: on landscape and portrait clips, short
ones and images together, in buckets, on landscape clips of one size, and on images only, for as many tokens. Samples at
three sizes tell how much colour each LoRA takes away with the word FILM, how much it keeps without it, and how much of
the base model's motion is left.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import numpy as np
import small
import torch
from diffusers import CogVideoXPipeline
from make_film import TOKEN, write_clips
from pretrain import device_name, sample_all
from shapes import chroma, draw_clip, random_scene

from clips.motion import motion
from cogvideox.base_model import read_base_model
from files import at_least, expanded_path, write_json

LANDSCAPE, PORTRAIT, SHORT, STILL = (17, 64, 96), (17, 96, 64), (9, 64, 96), (1, 64, 96)
SAMPLED = (LANDSCAPE, PORTRAIT, SHORT)
FPS, SCALE = 8, 2  # of the files: frames per second of the model, and pixels for each of the model's
GUIDANCE = 1.5


def name_of(size: tuple[int, int, int]) -> str:
    return "x".join(map(str, size))


def make_clips(folder: Path, sizes: dict[tuple[int, int, int], int], seed: int) -> Path:
    """Writes so many clips of each size, three in five of them in the look of a film; returns the folder."""
    rng = np.random.default_rng(seed)

    def clips():
        for size, count in sizes.items():
            num_frames, height, width = size
            for number in range(count):
                scene, look = random_scene(rng), "film" if number % 5 < 3 else "colour"
                caption = f"{TOKEN} {scene.caption}" if look == "film" else scene.caption
                frames = draw_clip(scene, num_frames, SCALE * height, SCALE * width, rng=rng, look=look)
                yield f"{look}-{name_of(size)}", caption, frames

    return write_clips(folder, clips(), fps=FPS, quality=9)


def mean_tokens(sizes: dict[tuple[int, int, int], int]) -> float:
    """Returns the tokens of a clip, on average over a dataset."""
    base = read_base_model(str(small.SMALL))
    tokens = {size: base.num_tokens(*base.latent_shape(*size)) for size in sizes}
    return sum(count * tokens[size] for size, count in sizes.items()) / sum(sizes.values())


def measure(pipe: CogVideoXPipeline, size: tuple[int, int, int], samples: int, seed: int) -> dict[str, float]:
    """Returns the colour and the motion of samples with the word and without it, as means."""
    rng = np.random.default_rng(seed)
    captions = [random_scene(rng).caption for _ in range(samples)]
    figures = {}
    for kind, prompts in {"with": [f"{TOKEN} {caption}" for caption in captions], "without": captions}.items():
        videos = sample_all(pipe, prompts, seed=seed, guidance_scale=GUIDANCE, size=size)
        figures[f"colour {kind} the word"] = float(np.mean([chroma(video) for video in videos]))
        figures[f"motion {kind} the word"] = float(np.mean([motion(torch.from_numpy(video), FPS) for video in videos]))
    return figures


def compare(lora_path: Path | None, samples: int, seed: int) -> dict[str, dict[str, float]]:
    """Returns `measure` at each size of SAMPLED; None is the base model."""
    pipe = CogVideoXPipeline.from_pretrained(small.SMALL, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if lora_path:
        pipe.load_lora_weights(lora_path)
    return {name_of(size): measure(pipe, size, samples, seed) for size in SAMPLED}


def shares(base: dict[str, dict], tuned: dict[str, dict]) -> dict[str, dict[str, float]]:
    """Returns what a LoRA has changed at each size, relative to the base model."""
    return {
        size: {
            "colour lost with the word": round(1 - of["colour with the word"] / base[size]["colour with the word"], 3),
            "colour kept without it": round(of["colour without the word"] / base[size]["colour without the word"], 3),
            "motion with the word": round(of["motion with the word"] / base[size]["motion with the word"], 3),
            "motion without it": round(of["motion without the word"] / base[size]["motion without the word"], 3),
        }
        for size, of in tuned.items()
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add, positive = parser.add_argument, at_least(1)
    add("--updates", type=positive, default=400, metavar="N", help="updates of the run on one size (default: 400)")
    add("--clips", type=positive, default=40, metavar="N", help="clips of each dataset, in fours (default: 40)")
    add("--samples", type=positive, default=16, metavar="N", help="scenes to measure at each size (default: 16)")
    add("--seed", type=at_least(0), default=5, help="seed of the clips, the runs, the scenes and the noise")
    add("--output", type=expanded_path, metavar="FILE", help="file to write the JSON to, besides printing it")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    quarter = -(-args.clips // 4)
    datasets = {
        "mixed sizes": dict.fromkeys((LANDSCAPE, PORTRAIT, SHORT, STILL), quarter),
        "one size": {LANDSCAPE: 4 * quarter},
        "images only": {STILL: 4 * quarter},
    }
    base, results = compare(None, args.samples, args.seed), {}
    for name, sizes in datasets.items():
        updates = round(args.updates * mean_tokens(datasets["one size"]) / mean_tokens(sizes))
        with tempfile.TemporaryDirectory() as folder:
            data = make_clips(Path(folder, "clips"), sizes, args.seed)
            options = ["--buckets", *map(name_of, sizes), *small.RATE]
            seconds = small.train(data, Path(folder, "run"), options, updates=updates, seed=args.seed)
            at = shares(base, compare(Path(folder, "run"), args.samples, args.seed))
            results[name] = {"updates": updates, "seconds": seconds, "at": at}
    about = {"samples": args.samples, "guidance_scale": GUIDANCE, "torch": torch.__version__}
    results |= {"base model": base} | about | {"device": device_name(torch.device("cpu"))}
    print(json.dumps(results, indent=1))
    if args.output:
        write_json(args.output, results)


if __name__ == "__main__":
    main()
