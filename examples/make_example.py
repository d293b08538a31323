"""Makes a small world to try everything in, offline: six short clips with captions, and a tiny CogVideoX.

    python examples/make_example.py --output_dir examples/world

writes `world/clips` (prompts.txt, videos.txt, mp4 files) and `world/tiny-cogvideox`, a complete checkpoint of random
weights with the real classes: VAE, T5 with its own sentencepiece model, transformer, scheduler. It trains and samples
in seconds on a laptop; what it paints is noise, since nothing in it is trained.
"""

import argparse
import io
import json
from pathlib import Path

import imageio
import numpy as np
import sentencepiece
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from transformers import AutoTokenizer, T5Config, T5EncoderModel

COLOURS = {"red": (220, 50, 40), "green": (40, 170, 80), "blue": (50, 90, 220), "yellow": (230, 200, 50)}
MOTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}

# What tells the checkpoints apart, as in their published configs; everything else is only smaller.
VARIANTS = {
    "2b": {
        "transformer": {},
        "vae": {"scaling_factor": 1.15258426},
        "scheduler": (CogVideoXDDIMScheduler, {"snr_shift_scale": 3.0}),
    },
    "5b": {
        "transformer": {"use_rotary_positional_embeddings": True},
        "vae": {"scaling_factor": 0.7},
        "scheduler": (CogVideoXDPMScheduler, {"snr_shift_scale": 1.0}),
    },
    "5b-I2V": {
        "transformer": {
            "in_channels": 8,
            "use_rotary_positional_embeddings": True,
            "use_learned_positional_embeddings": True,
        },
        "vae": {"scaling_factor": 0.7},
        "scheduler": (CogVideoXDPMScheduler, {"snr_shift_scale": 1.0}),
    },
    "1.5-5B": {
        "transformer": {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False},
        "vae": {"scaling_factor": 0.7},
        "scheduler": (CogVideoXDPMScheduler, {"snr_shift_scale": 1.0}),
    },
    "1.5-5B-I2V": {
        "transformer": {
            "in_channels": 8,
            "use_rotary_positional_embeddings": True,
            "patch_size_t": 2,
            "patch_bias": False,
            "ofs_embed_dim": 32,
        },
        "vae": {"scaling_factor": 0.7, "invert_scale_latents": True},
        "scheduler": (CogVideoXDPMScheduler, {"snr_shift_scale": 1.0}),
    },
}


def make_tokenizer(folder):
    """Trains a sentencepiece model on a few words and leaves it in `folder` as T5's files lie on the hub."""
    words = ["a", "the", "circle", "square", "moves", "over", "grey", "ground", *COLOURS, *MOTIONS]
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"()-"
    sentences = [" ".join(words), *words, *letters] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, vocab_size=200, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    config = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"extra_ids": 100, "model_max_length": 226}))
    return AutoTokenizer.from_pretrained(folder)


def make_vae(**options):
    """A tiny VAE whose latents, like those of a trained one, are nearly the same at every draw."""
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=4,
        sample_height=64, sample_width=96, **options,
    )  # fmt: skip
    with torch.no_grad():
        vae.encoder.conv_out.conv.bias[4:] -= 8  # log-variance
    return vae


def make_checkpoint(folder, variant="2b", seed=0):
    """Writes a tiny checkpoint that `DiffusionPipeline.from_pretrained(folder)` loads; 64x96 pixels, 9 frames."""
    folder, parts = Path(folder), VARIANTS[variant]
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(folder / "tokenizer")
    text_config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_ff=64, d_kv=16, num_heads=2, num_layers=2,
        feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip
    scheduler_class, scheduler_options = parts["scheduler"]
    pipeline_class = CogVideoXImageToVideoPipeline if variant.endswith("I2V") else CogVideoXPipeline
    pipeline = pipeline_class(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(text_config),
        vae=make_vae(**parts["vae"]),
        transformer=CogVideoXTransformer3DModel(
            num_layers=2, num_attention_heads=2, attention_head_dim=32, time_embed_dim=32, text_embed_dim=32,
            out_channels=4, sample_height=8, sample_width=12, sample_frames=9,
            **{"in_channels": 4} | parts["transformer"],
        ),
        scheduler=scheduler_class(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
            clip_sample=False, **scheduler_options,
        ),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    # The published checkpoints hold the sentencepiece model alone; beside a tokenizer.json it would never be read.
    (folder / "tokenizer" / "tokenizer.json").unlink()
    return folder


def draw_clip(shape, colour, motion, num_frames, height, width):
    """Frames of one shape crossing a grey gradient, uint8 [F, H, W, 3]."""
    y, x = np.mgrid[0:height, 0:width]
    step_x, step_y = MOTIONS[motion]
    radius = height // 5
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    for i in range(num_frames):
        progress = i / max(num_frames - 1, 1) - 0.5
        distance_x = x - width * (0.5 + 0.6 * step_x * progress)
        distance_y = y - height * (0.5 + 0.6 * step_y * progress)
        square = np.maximum(abs(distance_x), abs(distance_y)) < radius
        inside = square if shape == "square" else distance_x**2 + distance_y**2 < radius**2
        frames[i] = (90 + 80 * y / height)[..., None]
        frames[i][inside] = COLOURS[colour]
    return frames


def make_clips(folder, count=6, num_frames=32, fps=24, height=96, width=128):
    """Writes `count` mp4 files, prompts.txt and videos.txt into `folder`."""
    folder = Path(folder)
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    prompts, videos = [], []
    for i in range(count):
        shape = ("circle", "square")[i % 2]
        colour, motion = list(COLOURS)[i % 4], list(MOTIONS)[(i + i // 4) % 4]
        prompts.append(f"a {colour} {shape} moves {motion} over grey ground")
        videos.append(f"videos/{i:02d}-{colour}-{shape}-{motion}.mp4")
        frames = draw_clip(shape, colour, motion, num_frames, height, width)
        imageio.mimsave(folder / videos[-1], frames, fps=fps, macro_block_size=1)
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    (folder / "videos.txt").write_text("\n".join(videos) + "\n", encoding="utf-8")
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("examples/world"), help="folder to write into")
    parser.add_argument("--variant", choices=VARIANTS, default="2b", help="which checkpoint the tiny one is like")
    args = parser.parse_args()
    make_clips(args.output_dir / "clips")
    make_checkpoint(args.output_dir / "tiny-cogvideox", args.variant)
    print(f"clips: {args.output_dir / 'clips'}\ncheckpoint: {args.output_dir / 'tiny-cogvideox'}")


if __name__ == "__main__":
    main()
