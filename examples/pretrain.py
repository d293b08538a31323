"""Trains the small CogVideoX of the examples from scratch, on clips drawn in code, and measures what it can do.

    python examples/pretrain.py vae                           # the VAE; also makes the T5, which is not trained
    python examples/pretrain.py transformer                   # the transformer, on the latents of 2,400 clips
    python examples/pretrain.py vae --resume --seed 1         # both again, further, on other clips
    python examples/pretrain.py transformer --resume --seed 1
    python examples/pretrain.py decoder --seed 2              # only the VAE's decoder, mostly on grey clips
    python examples/pretrain.py measure                       # do 100 samples show what their prompts ask for?

Classes, noise schedule and objective are CogVideoX's own; only the sizes are small: 17 frames of 64 x 96 pixels. The
VAE also sees clips in other looks, since large VAEs have seen all kinds of videos; the transformer does not. Results
are written to benchmarks/results/. Seeds are fixed, but another machine rounds differently.

Shapes: B batch, F frames, H height, W width; lower-case f c h w are latent sizes. L prompt tokens, D text width.
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
from transformers import T5EncoderModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import shapes  # noqa: E402
from make_example import make_scheduler, make_tokenizer, tiny_t5_config  # noqa: E402

from cogvideox.base_model import load_transformer, read_base_model  # noqa: E402
from cogvideox.encoders import caption_encoder, encode_videos, loaded_vae  # noqa: E402
from cogvideox.lora import count_trained, trained_parameters  # noqa: E402
from cogvideox.objective import training_loss  # noqa: E402

FRAMES, HEIGHT, WIDTH = 17, 64, 96
MAX_TOKENS = 24  # of a prompt
LOG_EVERY = 50  # updates


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    small, results = ROOT / "examples" / "small-cogvideox", ROOT / "benchmarks" / "results"
    steps = "updates (default: vae 6,000, transformer 5,000, each 8,000 with --resume; decoder 3,000)"
    option("stage", choices=STAGES, help="what to train, or measure")
    option("--output_dir", type=Path, default=small, help="folder of the model (default: examples/small-cogvideox)")
    option("--results", type=Path, default=results, help="folder for the results (default: benchmarks/results)")
    option("--resume", action="store_true", help="continue from the model in --output_dir")
    option("--steps", type=int, help=steps)
    option("--clips", type=int, default=2400, help="clips to train the transformer on (default: 2,400)")
    option("--samples", type=int, default=100, help="videos to measure (default: 100)")
    option("--seed", type=int, default=0, help="seed of weights, clips and noise (default: 0)")
    args = parser.parse_args()
    if args.resume and args.stage not in ("vae", "transformer"):
        parser.error(f"--resume: the stage {args.stage} always starts from the model in --output_dir; leave it out")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    figures = STAGES[args.stage](args, device)
    figures |= {"minutes": round((time.perf_counter() - start) / 60, 1), "seed": args.seed}
    figures |= {"device": device_name(device), "torch": torch.__version__, "diffusers": diffusers.__version__}
    args.results.mkdir(parents=True, exist_ok=True)
    stage = f"{args.stage}-resumed" if args.resume else args.stage
    (args.results / f"small-cogvideox-{stage}.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps({name: value for name, value in figures.items() if name != "curve"}, indent=1))


def device_name(device):
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


# ---- the VAE ---------------------------------------------------------------------------------------------------------


def train_vae(args, device):
    """Trains the VAE: on images first, which are cheap, then on clips; only on clips with --resume."""
    if args.resume:
        vae, steps = load_vae(args.output_dir, device), args.steps or 8000
        curve = fit_vae(vae, steps, args.seed, learning_rate=1e-3, other_looks=0.4)
    else:
        make_text_encoder(args.output_dir, args.seed)
        torch.manual_seed(args.seed)
        sizes = {"block_out_channels": (16, 32, 32, 48), "latent_channels": 16, "layers_per_block": 1}
        clip = {"sample_height": HEIGHT, "sample_width": WIDTH}
        vae = AutoencoderKLCogVideoX(norm_num_groups=8, **sizes, **clip).to(device)
        steps = args.steps or 6000
        curve = fit_vae(vae, steps, args.seed, learning_rate=2e-3, other_looks=0.25, images_until=0.4 * steps)
    vae.register_to_config(scaling_factor=round(1 / deviation_of_latents(vae, args.seed), 5))
    return finish_vae(vae, args, steps, curve)


def train_decoder(args, device):
    """Trains only the VAE's decoder, so that greys lose their tint; the transformer knows the encoder's latents."""
    vae = load_vae(args.output_dir, device)
    vae.encoder.requires_grad_(False)
    steps = args.steps or 3000
    curve = fit_vae(vae, steps, args.seed, learning_rate=1e-3, other_looks=0.8, grey=0.8)
    return finish_vae(vae, args, steps, curve)


def load_vae(folder, device):
    return AutoencoderKLCogVideoX.from_pretrained(folder, subfolder="vae", dtype=torch.float32).to(device)


def finish_vae(vae, args, steps, curve):
    """Saves the VAE in half precision; returns the figures of its training."""
    save_half(vae, args.output_dir / "vae")
    psnr = measure_vae(vae.float(), args.seed)
    return {"steps": steps, "weights": count_trained(vae), "psnr": psnr, "curve": curve}


def save_half(model, folder):
    """Saves a model in half precision, without the path that it was loaded from, which means nothing elsewhere."""
    model.half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def fit_vae(vae, steps, seed, *, learning_rate, other_looks, grey=0.5, images_until=0):
    """Trains the VAE to rebuild what it is given; returns loss and signal-to-noise ratio over the updates.

    Args:
        other_looks: share of clips in another look than the transformer sees.
        grey: share of grey clips among these.
        images_until: the last update on images, after which clips follow.
    """
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)  # saves a fifth of the time on a CPU
    parameters = trained_parameters(vae)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=1e-4)
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, steps)
    rng, curve, squares = np.random.default_rng(seed), [], []
    for step in range(1, steps + 1):
        clips = vae_batch(rng, images=step <= images_until, other_looks=other_looks, grey=grey).to(vae.device)
        with torch.autocast(vae.device.type, torch.bfloat16):
            posterior = vae.encode(clips).latent_dist
            rebuilt = vae.decode(posterior.sample()).sample
        error = rebuilt.float() - clips
        kl = posterior.kl().sum() / posterior.mean.numel()
        loss = error.abs().mean() + error.square().mean() + 1e-4 * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        squares.append(error.detach().square().mean().item())
        if step % LOG_EVERY == 0:
            psnr = -10 * math.log10(np.mean(squares[-LOG_EVERY:]) / 4)
            curve.append({"step": step, "loss": round(loss.item(), 5), "psnr": round(psnr, 2)})
            print(curve[-1], flush=True)
    return curve


def vae_batch(rng, *, images, other_looks, grey):
    """Draws a batch for the VAE, images or a clip, float32 [B, 3, F, H, W], -1 to 1; the shares are as in `fit_vae`."""
    if images:
        batch_size, num_frames, drawn_frames = 4, 1, 3
    else:  # the VAE takes 17 frames in several pieces, 9 in one
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
    """Changes frames [F, H, W, 3], 0 to 255: other colours or, in the share `grey`, none; stripes, dark corners, grain.

    The share 1 - `grey` gets a tint.
    """
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    if rng.random() < grey:
        frames = frames.mean(-1, keepdims=True).repeat(3, -1)
    frames = 128 + (frames - 128) * rng.uniform(-1, 1.2) + rng.uniform(-40, 40, 3) * (rng.random() < 1 - grey)
    angle, period = rng.uniform(0, np.pi), rng.uniform(5, 16)
    stripes = np.cos(2 * np.pi * (np.cos(angle) * x + np.sin(angle) * y) / period)
    is_dark = frames.mean(-1, keepdims=True) < rng.uniform(60, 255)
    frames = frames + is_dark * rng.uniform(0, 60) * stripes[..., None]
    squared_distance = np.hypot(x / WIDTH - 0.5, y / HEIGHT - 0.5) ** 2  # from the centre
    frames = frames * (1 - rng.uniform(0, 0.8) * squared_distance[..., None])
    grain = rng.normal(0, rng.uniform(0, 4), frames.shape[:3])[..., None]
    return (frames + grain).clip(0, 255).astype(np.float32)


def deviation_of_latents(vae, seed, count=32):
    """Returns the standard deviation of the latents' means, whose inverse is the VAE's scaling factor."""
    rng, latents = np.random.default_rng(seed + 1), []
    with torch.autocast(vae.device.type, torch.bfloat16):  # ten times as fast on a CPU
        for _ in range(count):
            clip = draw_frames(shapes.random_scene(rng), rng, vae.device)
            latents.append(encode_videos(vae, clip[None])[0, :16])
    return torch.stack(latents).float().std().item()


def draw_frames(scene, rng, device, look="colour"):
    return torch.from_numpy(shapes.draw_clip(scene, FRAMES, HEIGHT, WIDTH, rng=rng, look=look)).to(device)


@torch.no_grad()
def measure_vae(vae, seed, count=24):
    """Returns the PSNR, in dB, of clips that a VAE in float32 has not seen and rebuilds: in colour, and as films."""
    figures = {}
    for look in ("colour", "film"):
        rng, errors = np.random.default_rng(seed + 2), []
        for _ in range(count):
            frames = draw_frames(shapes.random_scene(rng), rng, vae.device, look)  # [F, H, W, 3]
            clip = (frames.float() / 127.5 - 1).permute(3, 0, 1, 2)[None]
            rebuilt = vae.decode(vae.encode(clip.to(vae.device)).latent_dist.mean).sample
            errors.append((rebuilt.clamp(-1, 1).cpu() - clip.cpu()).square().mean().item() / 4)
        figures[look] = round(float(np.mean(-10 * np.log10(errors))), 2)
    return figures


def make_text_encoder(folder, seed):
    """Writes a T5 that is never trained: one layer over random word vectors, which the transformer learns to read."""
    tokenizer = make_tokenizer(folder / "tokenizer", max_length=MAX_TOKENS)
    torch.manual_seed(seed)
    text_encoder = T5EncoderModel(tiny_t5_config(len(tokenizer), 64, d_ff=128, num_heads=4, num_layers=1))
    with torch.no_grad():  # small weights: a word's vector is mixed with only a little of its neighbours
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
    parameters, prompt_embeds = encode_scenes(base, scenes, rng, device)
    print(f"{args.clips} clips encoded", flush=True)

    transformer = load_transformer(base, torch.float32).to(device).train()
    ema = EMAModel(transformer.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    steps = args.steps or (8000 if args.resume else 5000)
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-4)
    schedule = get_cosine_schedule_with_warmup(optimizer, 200, steps)
    generator = torch.Generator(device).manual_seed(args.seed)
    curve, summed_loss = [], 0.0
    for step in range(1, steps + 1):
        chosen = rng.integers(args.clips, size=batch_size)
        captions = ["" if rng.random() < 0.1 else scenes[i].caption for i in chosen]  # "" is for guidance
        batch = {
            "parameters": torch.stack([parameters[i] for i in chosen]),
            "prompt_embeds": torch.stack([prompt_embeds[caption] for caption in captions]),
        }
        with torch.autocast(device.type, torch.bfloat16):
            loss = training_loss(base, transformer, batch, generator=generator, dtype=torch.float32)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ema.step(transformer.parameters())
        summed_loss += loss.item()
        if step % LOG_EVERY == 0:
            curve.append({"step": step, "loss": round(summed_loss / LOG_EVERY, 5)})
            summed_loss = 0.0
            print(curve[-1], flush=True)
        if step % 1000 == 0 or step == steps:
            result = copy.deepcopy(transformer)
            ema.copy_to(result.parameters())
            save_half(result, args.output_dir / "transformer")
    figures = {"steps": steps, "batch_size": batch_size, "clips": args.clips}
    return figures | {"weights": count_trained(transformer), "curve": curve}


def make_pipeline(folder, seed):
    """Writes a transformer with random weights, the scheduler and the index of the pipeline."""
    torch.manual_seed(seed)
    layers = {"num_layers": 6, "num_attention_heads": 5, "attention_head_dim": 32}
    widths = {"time_embed_dim": 160, "text_embed_dim": 64, "in_channels": 16, "out_channels": 16}
    latents = {"sample_frames": FRAMES, "sample_height": HEIGHT // 8, "sample_width": WIDTH // 8}
    transformer = CogVideoXTransformer3DModel(
        max_text_seq_length=MAX_TOKENS, spatial_interpolation_scale=1.0, **layers, **widths, **latents
    )
    scheduler = make_scheduler(CogVideoXDDIMScheduler, snr_shift_scale=3.0)
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


def encode_scenes(base, scenes, rng, device):
    """Encodes a clip of each scene, parameters [2c, f, h, w], and each caption, embeddings [L, D] by caption."""
    with loaded_vae(base, torch.bfloat16, device, tiling=False, slicing=False) as vae:
        parameters = [encode_videos(vae, draw_frames(scene, rng, device)[None])[0].float().cpu() for scene in scenes]
    with caption_encoder(base, torch.float32, device) as encode:
        captions = {scene.caption for scene in scenes} | {""}
        prompt_embeds = {caption: encode([caption])[0].cpu() for caption in captions}
    return parameters, prompt_embeds


# ---- what the model can do -------------------------------------------------------------------------------------------


def measure(args, device):
    pipe = CogVideoXPipeline.from_pretrained(args.output_dir, dtype=torch.bfloat16).to(device)
    pipe.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(args.seed + 3)
    scenes = [shapes.random_scene(rng) for _ in range(args.samples)]
    videos = sample_all(pipe, [scene.caption for scene in scenes])
    return {
        "samples": args.samples,
        "right": shares_right(scenes, videos),
        "psnr": measure_vae(pipe.vae.float(), args.seed),
    }


def sample_all(pipe, prompts, seed=0, guidance_scale=4.0, steps=30, batch_size=10, size=(FRAMES, HEIGHT, WIDTH)):
    """Samples a video of each prompt, uint8 [F, H, W, 3]; the noise of video i depends only on `seed` and i."""
    videos, (num_frames, height, width) = [], size
    size = {"height": height, "width": width, "num_frames": num_frames, "max_sequence_length": MAX_TOKENS}
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        noise = [torch.Generator().manual_seed(1000 * seed + start + i) for i in range(len(batch))]
        options = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "np"}
        frames = pipe(batch, generator=noise, **size, **options).frames
        videos += [(clip * 255).round().astype(np.uint8) for clip in frames]
    return videos


def shares_right(scenes, videos, look="colour"):
    """Returns the shares of videos in which the detectors see the colour, the shape and the motion of the prompt."""
    detected = [shapes.read_clip(video, look) for video in videos]
    shares = {}
    for name in ("colour", "shape", "motion"):
        matches = [clip[name] == getattr(scene, name) for clip, scene in zip(detected, scenes)]
        shares[name] = round(float(np.mean(matches)), 3)
    return shares


STAGES = {"vae": train_vae, "transformer": train_transformer, "decoder": train_decoder, "measure": measure}

if __name__ == "__main__":
    main()
