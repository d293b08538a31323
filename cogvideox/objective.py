"""The training objective: latents, conditioning, noise, and the velocity loss.

Shapes: B batch, F frames, C channels, H height, W width; lower-case f c h w are latent sizes,
f = (F - 1) / 4 + 1, h = H / 8, w = W / 8. L prompt tokens, D text width.
"""

import hashlib
import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from diffusers.utils.torch_utils import randn_tensor

from cogvideox.base_model import BaseModel


class Masking(NamedTuple):
    """How the loss treats the black areas of a mask; white ones count with weight 1, by the squared error only."""

    floor: float = 0.0  # weight of the squared error
    preserve: float = 0.0  # weight of the squared difference from what the base model predicts, on latents of its own
    teacher: Callable | None = None  # the base model, which `lora.base_of` returns, if it is to be preserved


DEFAULT_MASKING = Masking()


def training_loss(
    base: BaseModel,
    transformer,
    batch: dict,
    generator,
    dtype,
    encode=None,
    timesteps=None,
    teacher=None,
    masking: Masking = DEFAULT_MASKING,
) -> torch.Tensor:
    """Velocity loss of a batch from the cache, computed on the generator's device; nothing else in it is random.

    Args:
        batch: "parameters" [B, 2c, f, h, w] of the latents' distribution, "prompt_embeds" [B, L, D]; for
            image-to-video also "image", uint8 [B, H, W, C]; where some of the clips have a mask, "mask" [B, f, h, w].
        encode: from `image_encoder`.
        timesteps: [B]; drawn from `generator` if None.
        teacher: a transformer, called without gradients, that predicts the latents in place of the batch's, and the
            target; None: the target is the true velocity.
        masking: what a mask does to the loss.
    """
    device = generator.device
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    latents = sample_latents(batch["parameters"], base.vae["scaling_factor"], generator)  # [B, f, c, h, w]
    latents = pad_latent_frames(latents, base.transformer["patch_size_t"])
    _, f, _, h, w = latents.shape
    conditions = {
        "prompt_embeds": batch["prompt_embeds"],
        "rotary": rotary_embedding(base, f, h, w, device),
        "image_latents": condition_on_images(base, encode, batch["image"], f, generator) if encode else None,
        "ofs": ofs_of(base, dtype, device),
    }
    if teacher:
        latents = predicted_latents(teacher, base.scheduler, latents, generator=generator, dtype=dtype, **conditions)
    mask = None
    if "mask" in batch:
        mask = pad_latent_frames(batch["mask"][:, :, None], base.transformer["patch_size_t"])
        if masking.preserve:
            # Black areas show the base model's own prediction, so that what is preserved there is compared on it.
            kept = predicted_latents(
                masking.teacher, base.scheduler, latents, generator=generator, dtype=dtype, **conditions
            )
            latents = mask * latents + (1 - mask) * kept
    return velocity_loss(
        transformer,
        base.scheduler,
        latents,
        generator=generator,
        dtype=dtype,
        timesteps=timesteps,
        teacher=teacher,
        mask=mask,
        masking=masking,
        **conditions,
    )


def preservation_loss(
    base: BaseModel, transformer, batch: dict, generator, dtype, encode, teacher, timesteps=None
) -> torch.Tensor:
    """Mean squared difference between the predictions of the transformer and of the teacher, without the new word.

    It keeps what is learned to the captions that name it: prior preservation (Ruiz et al. 2022, arXiv:2208.12242), with
    the model's own predictions in place of sampled videos. They are compared on the latents that the teacher predicts
    for the caption: a clip's own latents show what is new, which does not occur where the word is absent.
    Masks do not apply: what a clip shows beside its subject is to be kept as well.

    Args:
        batch: as in `training_loss`, with "plain_prompt_embeds" [B, L, D] of the captions without the new word.
        teacher: the base model, which `lora.base_of` returns.
        timesteps: as in `training_loss`.
    """
    batch = {name: tensor for name, tensor in batch.items() if name != "mask"}
    batch |= {"prompt_embeds": batch["plain_prompt_embeds"]}
    return training_loss(
        base, transformer, batch, generator, dtype, encode=encode, timesteps=timesteps, teacher=teacher
    )


@torch.no_grad()
def predicted_latents(teacher, scheduler, latents, generator, dtype, **conditions) -> torch.Tensor:
    """Returns the clean latents [B, f, c, h, w] that a transformer predicts from noisy ones, float32.

    The timesteps are of the noisier half of the schedule: there the caption decides what it sees, not the latents.

    Args:
        latents: clean, [B, f, c, h, w].
        conditions: "prompt_embeds", "rotary", "image_latents" and "ofs", as in `velocity_loss`.
    """
    num_timesteps, device = scheduler.config.num_train_timesteps, latents.device
    noise = randn_tensor(latents.shape, generator=generator, device=device, dtype=latents.dtype)
    timesteps = torch.randint(num_timesteps // 2, num_timesteps, latents.shape[:1], generator=generator, device=device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    velocity = teacher(**transformer_inputs(noisy, timesteps, dtype=dtype, **conditions))[0].float()
    # x0 = sqrt(a) x - sqrt(1 - a) v has the form of v = sqrt(a) noise - sqrt(1 - a) x0.
    return scheduler.get_velocity(velocity, noisy, timesteps)


def transformer_inputs(noisy_latents, timesteps, prompt_embeds, rotary, image_latents, ofs, dtype) -> dict:
    """Returns the transformer's arguments for noisy latents [B, f, c, h, w]; the others are as in `velocity_loss`."""
    if image_latents is not None:
        noisy_latents = torch.cat([noisy_latents, image_latents], dim=2)  # [B, f, 2c, h, w]
    return {
        "hidden_states": noisy_latents.to(dtype),
        "encoder_hidden_states": prompt_embeds.to(dtype),
        "timestep": timesteps,
        "ofs": ofs,
        "image_rotary_emb": rotary,
        "return_dict": False,
    }


def velocity_loss(
    transformer,
    scheduler,
    latents,
    prompt_embeds,
    rotary,
    generator,
    dtype,
    image_latents=None,
    ofs=None,
    timesteps=None,
    teacher=None,
    mask=None,
    masking: Masking = DEFAULT_MASKING,
) -> torch.Tensor:
    """Mean squared error between predicted and true velocity v = sqrt(a) noise - sqrt(1 - a) x0.

    Salimans & Ho 2022 (arXiv:2202.00512), appendix D. Noise and timesteps are drawn here, one timestep per sample.

    Args:
        latents: clean, [B, f, c, h, w], float32: a bfloat16 `a` rounds to 1 at the first timesteps.
        prompt_embeds: [B, L, D].
        rotary: tables from `rotary_embedding`, or None.
        generator: on the latents' device.
        dtype: compute dtype of the transformer.
        image_latents: from `condition_on_images`, [B, f, c, h, w], or None.
        ofs: from `ofs_of`.
        timesteps: [B]; drawn from `generator` if None.
        teacher: a transformer, called without gradients, that predicts the target; None: it is the true velocity.
        mask: [B, f, 1, h, w], float32, from 0 to 1; None: everything counts.
        masking: as in `training_loss`.
    """
    noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
    if timesteps is None:
        timesteps = torch.randint(
            0, scheduler.config.num_train_timesteps, latents.shape[:1], generator=generator, device=latents.device
        )
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    inputs = transformer_inputs(noisy_latents, timesteps, prompt_embeds, rotary, image_latents, ofs, dtype)
    if teacher:
        with torch.no_grad():
            velocity = teacher(**inputs)[0].float()
    else:
        velocity = scheduler.get_velocity(latents, noise, timesteps)
    if mask is None:
        return F.mse_loss(transformer(**inputs)[0].float(), velocity)
    return _masked_loss(transformer, inputs, velocity, mask, masking)


def _masked_loss(transformer, inputs: dict, velocity, mask, masking: Masking) -> torch.Tensor:
    base_velocity = None
    if masking.preserve:
        with torch.no_grad():  # first: what the transformer keeps for the backward pass is not in memory yet
            base_velocity = masking.teacher(**inputs)[0].float()
    predicted_velocity = transformer(**inputs)[0].float()
    weights = masking.floor + (1 - masking.floor) * mask
    loss = (weights * (predicted_velocity - velocity).square()).mean()
    if base_velocity is not None:
        loss += masking.preserve * ((1 - mask) * (predicted_velocity - base_velocity).square()).mean()
    return loss


def generator_for(device: torch.device, *parts: int | str) -> torch.Generator:
    """Returns a generator seeded with the parts, so that nothing depends on what was drawn before."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big"))


def spread_timesteps(number: int, count: int, num_train_timesteps: int, generator: torch.Generator) -> torch.Tensor:
    """Returns the timesteps [count] of a micro-batch, which fill the schedule more evenly than independent draws do.

    Those of a micro-batch are equally far apart, as in Kingma et al. 2021 (arXiv:2107.00630), and each
    number moves them on by the golden ratio, the additive sequence of the least discrepancy. Over all offsets, every
    timestep has the same probability.

    Args:
        number: of the micro-batch.
        generator: on the CPU; draws the offset of the sequence, so it is seeded alike for all numbers.
    """
    offset = torch.rand((), generator=generator, dtype=torch.float64).item()
    golden = (math.sqrt(5) - 1) / 2
    places = [(offset + golden * number + i / count) % 1 for i in range(count)]
    return torch.tensor([int(place * num_train_timesteps) for place in places])


def sample_latents(parameters: torch.Tensor, scaling_factor: float, generator: torch.Generator) -> torch.Tensor:
    """Draws latents [B, f, c, h, w] for the transformer, float32, from parameters [B, 2c, f, h, w]."""
    latents = DiagonalGaussianDistribution(parameters.float()).sample(generator)  # [B, c, f, h, w]
    return latents.transpose(1, 2) * scaling_factor


def pad_latent_frames(latents: torch.Tensor, patch_size_t: int | None) -> torch.Tensor:
    """Prepends copies of the first latent frame until CogVideoX 1.5 can patch them in time, as its pipelines do."""
    missing = -latents.shape[1] % (patch_size_t or 1)
    return torch.cat([latents[:, :1].expand(-1, missing, -1, -1, -1), latents], dim=1)


def rotary_embedding(base: BaseModel, num_latent_frames: int, latent_height: int, latent_width: int, device):
    """Cosine and sine tables [f' * h/2 * w/2, head size], float32; None for a base model with sin-cos positions.

    CogVideoX 1.0 stretches the grid to the size that it was trained at; 1.5 cuts it from the largest grid ("slice").
    """
    config = base.transformer
    if not config["use_rotary_positional_embeddings"]:
        return None
    patch, patch_t = config["patch_size"], config["patch_size_t"]
    grid = (latent_height // patch, latent_width // patch)
    base_grid = (config["sample_height"] // patch, config["sample_width"] // patch)
    if patch_t is None:
        crop = {"crops_coords": get_resize_crop_region_for_grid(grid, base_grid[1], base_grid[0])}
    else:
        crop = {"crops_coords": None, "grid_type": "slice", "max_size": base_grid}
    num_frames = -(-num_latent_frames // (patch_t or 1))
    return _rotary_tables(config["attention_head_dim"], grid, temporal_size=num_frames, device=device, **crop)


@lru_cache(maxsize=32)  # once for each shape of a batch, not in every step
def _rotary_tables(head_size: int, grid: tuple[int, int], **options):
    return get_3d_rotary_pos_embed(head_size, grid_size=grid, **options)


def ofs_of(base: BaseModel, dtype: torch.dtype, device) -> torch.Tensor | None:
    """Returns a further condition of CogVideoX 1.5 image-to-video, [1], as its pipeline has it; None elsewhere."""
    return torch.full((1,), 2.0, dtype=dtype, device=device) if base.transformer["ofs_embed_dim"] else None


def condition_on_images(base, encode: Callable, images, num_latent_frames: int, generator) -> torch.Tensor:
    """Latents [B, f, c, h, w] with the images in the first of f frames and zeros in the others; float32.

    Noise is added before the encoding and the VAE is not linear, so that a cached encoding cannot be used: one image
    is encoded per clip and step. One image in twenty is dropped whole, so that the model does not rely only on it.

    Args:
        encode: from `image_encoder`.
        images: uint8 [B, H, W, C].
    """
    images = noisy_images(images.float() / 127.5 - 1, generator)
    kept = torch.rand(len(images), 1, 1, 1, 1, generator=generator, device=images.device) >= 0.05
    factor = base.vae["scaling_factor"]
    if base.vae.get("invert_scale_latents"):  # as CogVideoX1.5-5B-I2V was trained
        factor = 1 / factor
    latents = sample_latents(encode(images), factor, generator) * kept  # [B, 1, c, h, w]
    return F.pad(latents, (0, 0, 0, 0, 0, 0, 0, num_latent_frames - 1))


def noisy_images(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Adds noise to images [B, H, W, C] in [-1, 1], its scale exp(N(-3, 0.5)) drawn for each, as in pre-training.

    From Stable Video Diffusion (Blattmann et al. 2023, arXiv:2311.15127), which CogVideoX follows.
    """
    device = images.device
    scale = torch.exp(torch.randn(len(images), 1, 1, 1, generator=generator, device=device) * 0.5 - 3.0)
    return images + scale * torch.randn(images.shape, generator=generator, device=device)
