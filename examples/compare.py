"""Measures what the LoRA of the quickstart has learned: samples with and without it, with and without its word FILM.

    python examples/compare.py --lora_path examples/world/lora --output examples/world/compare.png

All four samples of a scene start from the same noise. Prints the figures as JSON, and draws some of the samples: each
row of the picture is one of the four kinds.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import CogVideoXPipeline
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import shapes
from make_film import TOKEN
from pretrain import device_name, sample_all, shares_right

LABEL_HEIGHT = 36  # pixels
LABELS = {  # of the rows of the picture, by (model, kind of prompt)
    ("base", "film"): f"without the LoRA, {TOKEN} before the prompt",
    ("LoRA", "film"): f"with the LoRA, {TOKEN} before the prompt",
    ("base", "plain"): f"without the LoRA, no {TOKEN}",
    ("LoRA", "plain"): f"with the LoRA, no {TOKEN}",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option, small = parser.add_argument, Path(__file__).parent / "small-cogvideox"
    option("--model_path", type=Path, default=small, help="base model (default: examples/small-cogvideox)")
    option("--lora_path", type=Path, required=True, help="run directory, or folder with the LoRA's file")
    option("--guidance_scale", type=float, default=1.5, help="classifier-free guidance scale (default: 1.5)")
    option("--samples", type=int, default=24, help="scenes to measure (default: 24)")
    option("--output", type=Path, help="picture to draw (.png)")
    option("--results", type=Path, help="file to write the figures to, with versions (.json)")
    option("--seed", type=int, default=5, help="seed of scenes and noise (default: 5)")
    args = parser.parse_args()
    figures, videos = compare(
        args.model_path, args.lora_path, samples=args.samples, seed=args.seed, guidance_scale=args.guidance_scale
    )
    print(json.dumps(figures, indent=1))
    if args.results:
        about = {"torch": torch.__version__, "diffusers": diffusers.__version__, "device": device_name(device())}
        args.results.write_text(json.dumps(figures | about, indent=1) + "\n")
    if args.output:
        draw_picture(videos).save(args.output)


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compare(model_path, lora_path, *, samples, seed, guidance_scale=1.5):
    """Returns the figures of the LoRA, and the videos by (model, kind of prompt)."""
    pipe = CogVideoXPipeline.from_pretrained(model_path, dtype=torch.float32).to(device())
    pipe.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(seed)
    scenes = [shapes.random_scene(rng) for _ in range(samples)]
    plain = [scene.caption for scene in scenes]
    prompts = {"plain": plain, "film": [f"{TOKEN} {caption}" for caption in plain]}
    sample = partial(sample_all, pipe, seed=seed, guidance_scale=guidance_scale)
    videos = {("base", kind): sample(texts) for kind, texts in prompts.items()}
    pipe.load_lora_weights(lora_path)
    videos |= {("LoRA", kind): sample(texts) for kind, texts in prompts.items()}
    colour = {key: float(np.mean([shapes.chroma(clip) for clip in clips])) for key, clips in videos.items()}
    figures = {
        "samples": samples,
        "guidance_scale": guidance_scale,
        "colour_of_base": round(colour["base", "plain"], 4),
        "colour_lost_with_the_word": round(1 - colour["LoRA", "film"] / colour["base", "film"], 3),
        "colour_kept_without_it": round(colour["LoRA", "plain"] / colour["base", "plain"], 3),
        "right_with_the_word": shares_right(scenes, videos["LoRA", "film"], "film"),
        "right_without_it": shares_right(scenes, videos["LoRA", "plain"]),
        "right_of_base": shares_right(scenes, videos["base", "plain"]),
    }
    del figures["right_with_the_word"]["colour"]  # a film has none
    return figures, videos


def draw_picture(videos, count=3, scale=3):
    """Draws the first, middle and last frame of `count` videos of each kind, one row with a label per kind."""
    sheet = None
    for row, (model_and_kind, label) in enumerate(LABELS.items()):
        frames = [clip[i] for clip in videos[model_and_kind][:count] for i in (0, len(clip) // 2, -1)]
        strip = np.concatenate([np.pad(frame, ((0, 2), (0, 2), (0, 0)), constant_values=255) for frame in frames], 1)
        strip = Image.fromarray(strip.repeat(scale, 0).repeat(scale, 1))
        height = strip.height + LABEL_HEIGHT
        sheet = sheet or Image.new("RGB", (strip.width, len(LABELS) * height), "white")
        draw = ImageDraw.Draw(sheet)
        draw.text((4, row * height + 4), label, "black", ImageFont.load_default(LABEL_HEIGHT - 12))
        sheet.paste(strip, (0, row * height + LABEL_HEIGHT))
    return sheet


if __name__ == "__main__":
    main()
