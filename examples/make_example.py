"""Makes clips and a tiny base model, to try everything with, offline.

    python examples/make_example.py --output_dir examples/world

writes

* `world/clips`: six short clips with captions (mp4 files, prompts.txt, videos.txt)
* `world/tiny-cogvideox`: a complete base model of the real classes (VAE, T5 with its own sentencepiece model,
  transformer, scheduler) with random weights. It trains and samples in seconds, and its videos are noise.

The base model of the quickstart, `examples/small-cogvideox`, is a trained one; `examples/pretrain.py` made it.
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
import sentencepiece
import shapes
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from make_film import write_clips
from shapes import COLOURS, MOTIONS, Scene
from transformers import AutoTokenizer, T5Config, T5EncoderModel

# What distinguishes the base models, as in their published configs; everything else is only smaller.
ROTARY = {"use_rotary_positional_embeddings": True}
ROTARY_1_5 = ROTARY | {"patch_size_t": 2, "patch_bias": False}
IMAGE_5B = {"in_channels": 8, "use_learned_positional_embeddings": True} | ROTARY
IMAGE_1_5 = {"in_channels": 8, "ofs_embed_dim": 32} | ROTARY_1_5
DDIM, DPM = CogVideoXDDIMScheduler, CogVideoXDPMScheduler
VARIANTS = {  # name: configs of the transformer and the VAE, scheduler with its SNR shift
    "2b":         ({},         {"scaling_factor": 1.15258426},                        DDIM, 3.0),
    "5b":         (ROTARY,     {"scaling_factor": 0.7},                               DPM,  1.0),
    "5b-I2V":     (IMAGE_5B,   {"scaling_factor": 0.7},                               DPM,  1.0),
    "1.5-5B":     (ROTARY_1_5, {"scaling_factor": 0.7},                               DPM,  1.0),
    "1.5-5B-I2V": (IMAGE_1_5,  {"scaling_factor": 0.7, "invert_scale_latents": True}, DPM,  1.0),
}  # fmt: skip

WORDS = ("a", "moves", "over", "ground", *COLOURS, *shapes.SHAPES, *MOTIONS, *shapes.GROUNDS)


def make_tokenizer(folder, max_length=226):
    """Trains a sentencepiece model on a few words, writes it like T5's files on the hub, and returns the tokenizer."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"()-"
    sentences = [" ".join(WORDS), *WORDS, *letters] * 20
    model = io.BytesIO()
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    options = {"vocab_size": 200, "hard_vocab_limit": False, "minloglevel": 2} | ids
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sentences), model_writer=model, **options)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    config = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config |= {"extra_ids": 100, "model_max_length": max_length}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return AutoTokenizer.from_pretrained(folder)


def make_vae(**options):
    """Returns a tiny VAE whose latents barely vary from draw to draw, like those of a trained one."""
    sizes = {"block_out_channels": (8, 8, 8, 8), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4}
    vae = AutoencoderKLCogVideoX(sample_height=64, sample_width=96, **sizes, **options)
    with torch.no_grad():
        vae.encoder.conv_out.conv.bias[4:] -= 8  # the log-variance
    return vae


def make_checkpoint(folder, variant="2b", seed=0):
    """Writes a tiny base model for videos of 9 frames of 64x96 pixels; returns its folder.

    `DiffusionPipeline.from_pretrained(folder)` loads it.
    """
    transformer_options, vae_options, scheduler_class, snr_shift = VARIANTS[variant]
    folder = Path(folder)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(folder / "tokenizer")
    text_encoder = T5EncoderModel(tiny_t5_config(len(tokenizer)))
    vae = make_vae(**vae_options)
    layers = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32}
    widths = {"time_embed_dim": 32, "text_embed_dim": 32, "in_channels": 4, "out_channels": 4}
    latents = {"sample_frames": 9, "sample_height": 8, "sample_width": 12}
    transformer = CogVideoXTransformer3DModel(**layers | widths | latents | transformer_options)
    scheduler = make_scheduler(scheduler_class, snr_shift_scale=snr_shift)
    pipeline_class = CogVideoXImageToVideoPipeline if variant.endswith("I2V") else CogVideoXPipeline
    pipeline = pipeline_class(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
    )
    pipeline.save_pretrained(folder)
    # Published base models hold only the sentencepiece model, which is not read where there is a tokenizer.json.
    (folder / "tokenizer" / "tokenizer.json").unlink()
    return folder


def tiny_t5_config(vocab_size, width=32, **options):
    sizes = {"d_model": width, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 2} | options
    return T5Config(vocab_size=vocab_size, feed_forward_proj="gated-gelu", dropout_rate=0.0, **sizes)


def make_scheduler(scheduler_class, **config):
    """Returns a scheduler with what all published base models have in common."""
    return scheduler_class(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        **config,
    )


def draw_clip(shape, colour, motion, num_frames, height, width):
    """Returns frames of one shape that crosses a gradient, uint8 [F, H, W, 3]."""
    scene = Scene(colour, shape, motion, "dark")
    return shapes.draw_clip(scene, num_frames, height, width, np.random.default_rng(0))


def make_clips(folder, count=6, num_frames=32, fps=24, height=96, width=128):
    """Writes `count` mp4 files, prompts.txt and videos.txt; returns the folder."""

    def clips():
        for i in range(count):
            shape = ("circle", "square")[i % 2]
            colour, motion = list(COLOURS)[i % 4], list(MOTIONS)[(i + i // 4) % 4]
            frames = draw_clip(shape, colour, motion, num_frames=num_frames, height=height, width=width)
            yield f"{colour}-{shape}-{motion}", Scene(colour, shape, motion, "dark").caption, frames

    return write_clips(folder, clips(), fps=fps)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("examples/world"), help="folder to write into")
    parser.add_argument("--variant", choices=VARIANTS, default="2b", help="base model that the tiny one is like")
    args = parser.parse_args()
    clips = make_clips(args.output_dir / "clips")
    base_model = make_checkpoint(args.output_dir / "tiny-cogvideox", args.variant)
    print(f"clips: {clips}\nbase model: {base_model}")


if __name__ == "__main__":
    main()
