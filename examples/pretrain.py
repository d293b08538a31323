"""Trains the small CogVideoX of the examples from nothing, on clips drawn in code, and measures what it can do.

    python examples/pretrain.py vae                           # the VAE, and the frozen T5 with its vocabulary
    python examples/pretrain.py transformer                   # the transformer, on the latents of 2,400 clips
    python examples/pretrain.py vae --resume --seed 1         # both go on, on other clips
    python examples/pretrain.py transformer --resume --seed 1
    python examples/pretrain.py decoder --seed 2              # that of the VAE alone, on clips of which half are grey
    python examples/pretrain.py measure                       # do 100 samples show what their prompts ask for?

The classes are CogVideoX's own, and so are noise schedule and objective; only the sizes are small: 17 frames of
64 x 96 pixels. The VAE also sees clips in other looks, as large VAEs have seen everything; the transformer does not.
Figures go to benchmarks/results/. The seeds are fixed; another machine rounds differently.

Shapes: B batch, F frames, H height, W width; f c h w are sizes of latents, D is the width of the text.
"""

import argparse
import copy
import json
import math
import sys
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from transformers import T5Config, T5EncoderModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import shapes  # noqa: E402
from make_example import make_tokenizer  # noqa: E402

from cogvideox.base_model import load_transformer, read_base_model  # noqa: E402
from cogvideox.encoders import caption_encoder, encode_videos, loaded_vae  # noqa: E402
from cogvideox.objective import training_loss  # noqa: E402

FRAMES, HEIGHT, WIDTH = 17, 64, 96
MAX_TOKENS = 24


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "examples" / "small-cogvideox")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder for figures")
    parser.add_argument("--resume", action="store_true", help="train what --output_dir holds further")
    steps = "updates (default: VAE 6,000, transformer 5,000, both resumed 8,000; decoder 3,000)"
    parser.add_argument("--steps", type=int, help=steps)
    parser.add_argument("--clips", type=int, default=2400, help="for the transformer, encoded once")
    parser.add_argument("--samples", type=int, default=100, help="videos to measure")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.resume and args.stage not in ("vae", "transformer"):
        parser.error(f"--resume: {args.stage} always takes what --output_dir holds; leave it out")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.perf_counter()
    figures = STAGES[args.stage](args, device)
    figures |= {"minutes": round((time.perf_counter() - started) / 60, 1), "seed": args.seed, "device": machine(device)}
    figures |= {"torch": torch.__version__, "diffusers": diffusers.__version__}
    args.results.mkdir(parents=True, exist_ok=True)
    name = f"small-cogvideox-{args.stage}{'-resumed' * args.resume}.json"
    (args.results / name).write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps({name: value for name, value in figures.items() if name != "curve"}, indent=1))


def machine(device):
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


# ---- the VAE ---------------------------------------------------------------------------------------------------------


def train_vae(args, device):
    """Images first, which are many for the time that a clip takes, then clips; resumed, clips alone."""
    if args.resume:
        vae = AutoencoderKLCogVideoX.from_pretrained(args.output_dir, subfolder="vae", dtype=torch.float32).to(device)
        steps = args.steps or 8000
        curve = fit_vae(vae, steps, 1e-3, images_until=0, other_looks=0.4, seed=args.seed)
    else:
        make_text_encoder(args.output_dir, args.seed)
        torch.manual_seed(args.seed)
        vae = AutoencoderKLCogVideoX(
            block_out_channels=(16, 32, 32, 48), latent_channels=16, layers_per_block=1, norm_num_groups=8,
            sample_height=HEIGHT, sample_width=WIDTH,
        ).to(device)  # fmt: skip
        steps = args.steps or 6000
        curve = fit_vae(vae, steps, 2e-3, images_until=0.4 * steps, other_looks=0.25, seed=args.seed)
    vae.register_to_config(scaling_factor=round(1 / deviation_of_latents(vae, args.seed), 5))
    publish(vae, args.output_dir / "vae")
    return {"steps": steps, "weights": count(vae), "psnr": measure_vae(vae.float(), args.seed), "curve": curve}


def train_decoder(args, device):
    """The encoder stays as it is, since the transformer has learned its latents. Greys lose their tint."""
    vae = AutoencoderKLCogVideoX.from_pretrained(args.output_dir, subfolder="vae", dtype=torch.float32).to(device)
    vae.encoder.requires_grad_(False)
    steps = args.steps or 3000
    curve = fit_vae(vae, steps, 1e-3, images_until=0, other_looks=0.8, seed=args.seed, grey=0.8)
    publish(vae, args.output_dir / "vae")
    return {"steps": steps, "weights": count(vae.decoder), "psnr": measure_vae(vae.float(), args.seed), "curve": curve}


def publish(model, folder):
    """Saves in half precision, and without the path that it came from, which means nothing elsewhere."""
    model.half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def fit_vae(vae, steps, learning_rate, images_until, other_looks, seed, grey=0.5):
    """Trains the VAE to rebuild clips, `grey` being the share of those in other looks; returns the curve."""
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)  # a fifth less time on a CPU
    trained = [weight for weight in vae.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.95), weight_decay=1e-4)
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, steps)
    rng, curve, squares = np.random.default_rng(seed), [], []
    for step in range(1, steps + 1):
        clips = vae_clips(rng, step <= images_until, other_looks, grey).to(vae.device)
        with torch.autocast(vae.device.type, torch.bfloat16):
            posterior = vae.encode(clips).latent_dist
            rebuilt = vae.decode(posterior.sample()).sample
        error = rebuilt.float() - clips
        kl = posterior.kl().sum() / posterior.mean.numel()
        loss = error.abs().mean() + error.square().mean() + 1e-4 * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        squares.append(error.detach().square().mean().item())
        if step % 50 == 0:
            psnr = -10 * math.log10(np.mean(squares[-50:]) / 4)
            curve.append({"step": step, "loss": round(loss.item(), 5), "psnr": round(psnr, 2)})
            print(curve[-1], flush=True)
    return curve


def vae_clips(rng, images, other_looks, grey):
    """A batch for the VAE, float32 [B, 3, F, H, W], -1 to 1; so many have other looks than the transformer sees."""
    if images:
        batch_size, num_frames, drawn_frames = 4, 1, 3
    else:  # the longer ones pass through it in several pieces
        batch_size, num_frames, drawn_frames = 1, 9 if rng.random() < 0.85 else FRAMES, FRAMES
    batch = []
    for _ in range(batch_size):
        frames = shapes.draw_clip(shapes.random_scene(rng), drawn_frames, HEIGHT, WIDTH, rng)
        start = rng.integers(drawn_frames - num_frames + 1)
        frames = frames[start : start + num_frames].astype(np.float32)
        if rng.random() < other_looks:
            frames = other_look(frames, rng, grey)
        batch.append(torch.from_numpy(frames / 127.5 - 1).permute(3, 0, 1, 2))
    return torch.stack(batch).contiguous(memory_format=torch.channels_last_3d)


def other_look(frames, rng, grey):
    """Other colours or, in `grey` of the clips, none, stripes, darker corners, grain: [F, H, W, 3], 0 to 255.

    The less of them are grey, the more have a tint.
    """
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    if rng.random() < grey:
        frames = frames.mean(-1, keepdims=True).repeat(3, -1)
    frames = 128 + (frames - 128) * rng.uniform(-1, 1.2) + rng.uniform(-40, 40, 3) * (rng.random() < 1 - grey)
    angle, period = rng.uniform(0, np.pi), rng.uniform(5, 16)
    stripes = np.cos(2 * np.pi * (np.cos(angle) * x + np.sin(angle) * y) / period)
    where = frames.mean(-1, keepdims=True) < rng.uniform(60, 255)
    frames = frames + where * rng.uniform(0, 60) * stripes[..., None]
    corners = np.hypot(x / WIDTH - 0.5, y / HEIGHT - 0.5) ** 2
    frames = frames * (1 - rng.uniform(0, 0.8) * corners[..., None])
    grain = rng.normal(0, rng.uniform(0, 4), frames.shape[:3])[..., None]
    return (frames + grain).clip(0, 255).astype(np.float32)


def deviation_of_latents(vae, seed, count=32):
    rng, latents = np.random.default_rng(seed + 1), []
    with torch.autocast(vae.device.type, torch.bfloat16):  # ten times as fast on a CPU
        for _ in range(count):
            clip = drawn(shapes.random_scene(rng), rng, vae.device)
            latents.append(encode_videos(vae, clip[None])[0, :16])
    return torch.stack(latents).float().std().item()


def drawn(scene, rng, device, look="colour"):
    return torch.from_numpy(shapes.draw_clip(scene, FRAMES, HEIGHT, WIDTH, rng, look)).to(device)


@torch.no_grad()
def measure_vae(vae, seed, count=24):
    """Peak signal-to-noise ratio of rebuilt clips, dB, that it has not seen: in colour, and as a film."""
    figures = {}
    for look in ("colour", "film"):
        rng, errors = np.random.default_rng(seed + 2), []
        for _ in range(count):
            frames = drawn(shapes.random_scene(rng), rng, vae.device, look)  # [F, H, W, 3]
            clip = (frames.float() / 127.5 - 1).permute(3, 0, 1, 2)[None]
            with torch.autocast(vae.device.type, torch.bfloat16):
                rebuilt = vae.decode(vae.encode(clip.to(vae.device)).latent_dist.mean).sample
            errors.append((rebuilt.float().clamp(-1, 1).cpu() - clip.cpu()).square().mean().item() / 4)
        figures[look] = round(float(np.mean(-10 * np.log10(errors))), 2)
    return figures


def make_text_encoder(folder, seed):
    """A T5 that is never trained: one layer over random word vectors, which the transformer learns to read."""
    tokenizer = make_tokenizer(folder / "tokenizer", max_length=MAX_TOKENS)
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=64, d_ff=128, d_kv=16, num_heads=4, num_layers=1,
        feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip
    text_encoder = T5EncoderModel(config)
    with torch.no_grad():  # words stay what they are; a little of their neighbours is mixed in
        for name, weight in text_encoder.named_parameters():
            if name.endswith(("SelfAttention.o.weight", "DenseReluDense.wo.weight")):
                weight.mul_(0.1)
    text_encoder.half().save_pretrained(folder / "text_encoder")
    (folder / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)


# ---- the transformer -------------------------------------------------------------------------------------------------


def train_transformer(args, device, batch_size=16):
    if not args.resume:
        make_pipeline(args.output_dir, args.seed)
    base = read_base_model(str(args.output_dir))
    rng = np.random.default_rng(args.seed + 10)
    scenes = [shapes.random_scene(rng) for _ in range(args.clips)]
    parameters, embeds = encoded(base, scenes, rng, device)
    print(f"{args.clips} clips encoded", flush=True)

    transformer = load_transformer(base, torch.float32).to(device).train()
    ema = EMAModel(transformer.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    steps = args.steps or (8000 if args.resume else 5000)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-4)
    schedule = get_cosine_schedule_with_warmup(optimizer, 200, steps)
    generator, curve, total = torch.Generator(device).manual_seed(args.seed), [], 0.0
    for step in range(1, steps + 1):
        chosen = rng.integers(args.clips, size=batch_size)
        texts = ["" if rng.random() < 0.1 else scenes[i].caption for i in chosen]  # for guidance
        batch = {
            "parameters": torch.stack([parameters[i] for i in chosen]),
            "prompt_embeds": torch.stack([embeds[text] for text in texts]),
        }
        with torch.autocast(device.type, torch.bfloat16):
            loss = training_loss(base, transformer, batch, generator, torch.float32)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ema.step(transformer.parameters())
        total += loss.item()
        if step % 50 == 0:
            curve.append({"step": step, "loss": round(total / 50, 5)})
            total = 0.0
            print(curve[-1], flush=True)
        if step % 1000 == 0 or step == steps:
            result = copy.deepcopy(transformer)
            ema.copy_to(result.parameters())
            publish(result, args.output_dir / "transformer")
    trained_on = {"steps": steps, "batch_size": batch_size, "clips": args.clips}
    return trained_on | {"weights": count(transformer), "curve": curve}


def make_pipeline(folder, seed):
    """Writes what stands around the trained parts, and a transformer of random weights."""
    torch.manual_seed(seed)
    transformer = CogVideoXTransformer3DModel(
        num_layers=6, num_attention_heads=5, attention_head_dim=32, in_channels=16, out_channels=16, time_embed_dim=160,
        text_embed_dim=64, sample_height=HEIGHT // 8, sample_width=WIDTH // 8, sample_frames=FRAMES,
        max_text_seq_length=MAX_TOKENS, spatial_interpolation_scale=1.0,
    )  # fmt: skip
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False,
        snr_shift_scale=3.0,
    )  # fmt: skip
    parts = {
        "tokenizer": ["transformers", "T5Tokenizer"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
    }
    transformer.save_pretrained(folder / "transformer")
    scheduler.save_pretrained(folder / "scheduler")
    index = {"_class_name": "CogVideoXPipeline", "_diffusers_version": diffusers.__version__, **parts}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def encoded(base, scenes, rng, device):
    """Of each scene a clip's parameters [2c, f, h, w], of each caption its embedding [L, D], as training reads them."""
    with loaded_vae(base, torch.bfloat16, device, tiling=False, slicing=False) as vae:
        parameters = [encode_videos(vae, drawn(scene, rng, device)[None])[0].float().cpu() for scene in scenes]
    with caption_encoder(base, torch.float32, device) as encode:
        embeds = {text: encode([text])[0].cpu() for text in {scene.caption for scene in scenes} | {""}}
    return parameters, embeds


# ---- what it can do --------------------------------------------------------------------------------------------------


def measure(args, device):
    pipe = CogVideoXPipeline.from_pretrained(args.output_dir, dtype=torch.bfloat16).to(device)
    pipe.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(args.seed + 3)
    scenes = [shapes.random_scene(rng) for _ in range(args.samples)]
    videos = sample_all(pipe, [scene.caption for scene in scenes])
    return {"samples": args.samples, "right": right(scenes, videos), "psnr": measure_vae(pipe.vae, args.seed)}


def sample_all(pipe, prompts, seed=0, guidance_scale=4.0, steps=30, batch_size=10):
    """A video of each prompt, uint8 [F, H, W, 3]; video i depends on `seed` and i alone."""
    videos = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        frames = pipe(
            batch, height=HEIGHT, width=WIDTH, num_frames=FRAMES, num_inference_steps=steps,
            guidance_scale=guidance_scale, max_sequence_length=MAX_TOKENS, output_type="np",
            generator=[torch.Generator().manual_seed(1000 * seed + start + i) for i in range(len(batch))],
        ).frames  # fmt: skip
        videos += [(clip * 255).round().astype(np.uint8) for clip in frames]
    return videos


def right(scenes, videos, look="colour"):
    """The share of videos in which the detectors see the colour, the shape and the motion of the prompt."""
    seen = [shapes.read_clip(video, look) for video in videos]
    return {
        what: round(float(np.mean([clip[what] == getattr(scene, what) for clip, scene in zip(seen, scenes)])), 3)
        for what in ("colour", "shape", "motion")
    }


def count(model):
    return sum(weight.numel() for weight in model.parameters())


STAGES = {"vae": train_vae, "transformer": train_transformer, "decoder": train_decoder, "measure": measure}

if __name__ == "__main__":
    main()
