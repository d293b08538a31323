"""Every formula of CogVideoX: load, encode, conditioning, velocity loss, sample a video.

Shapes: B batch, F frames, C channels, H height, W width; lower-case f c h w are latent sizes,
f = (F - 1) / 4 + 1, h = H / 8, w = W / 8. L prompt tokens, D text width.

What differs between checkpoints is read from their configs, never from their names.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from PIL import Image
from transformers import AutoTokenizer, T5Config, T5EncoderModel

import quantized
from dataset import Encoder

SCHEDULERS = {"CogVideoXDDIMScheduler": CogVideoXDDIMScheduler, "CogVideoXDPMScheduler": CogVideoXDPMScheduler}

TOKENS_AT_ONCE = 1024  # of captions with their padding, in T5
PIXELS_AT_ONCE = 2**20  # of small clips, all their frames, in the VAE

NOT_FOUND = {
    HFValidationError: "no such folder, and no name of the hub's form",
    LocalEntryNotFoundError: "no such folder, the hub cannot be reached, and nothing of it is in the cache",
}

# The transformer's config fields that tell one checkpoint's weights from another's.
IDENTITY = (
    "num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "patch_size_t",
    "use_rotary_positional_embeddings", "use_learned_positional_embeddings",
)  # fmt: skip


class Checkpoint(NamedTuple):
    """A checkpoint's configs, read before any of its weights."""

    name: str  # as the user gave it
    transformer: dict
    vae: dict
    scheduler: CogVideoXDDIMScheduler | CogVideoXDPMScheduler
    hub: dict  # revision, cache_dir and variant: which files to download
    folder: Path | None  # with its weights, once they are there

    @property
    def variant(self) -> str | None:
        return self.hub["variant"]

    @property
    def identity(self) -> dict:
        return {field: self.transformer[field] for field in IDENTITY}

    @property
    def takes_image(self) -> bool:
        """Whether the latents of a first image stand beside those of the noisy video."""
        return self.transformer["in_channels"] == 2 * self.transformer["out_channels"]

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent, 8."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    @property
    def fixed_size(self) -> tuple[int, int, int] | None:
        """Frames, height and width of every clip, where learned positions allow no others."""
        config = self.transformer
        sides = (self.spatial_factor * config[f"sample_{side}"] for side in ("height", "width"))
        return (config["sample_frames"], *sides) if config["use_learned_positional_embeddings"] else None

    def describe(self) -> str:
        config = self.transformer
        task = "image-to-video" if self.takes_image else "text-to-video"
        positions = "rotary" if config["use_rotary_positional_embeddings"] else "sin-cos"
        positions += " and learned" * config["use_learned_positional_embeddings"]
        return (
            f"CogVideoX {task}, {config['num_layers']} layers of {config['num_attention_heads']} heads, "
            f"{positions} positions"
        )

    def remarks(self, num_frames: int, fps: int) -> list[str]:
        """What works, but may not be what was meant."""
        remarks = []
        if num_frames % 8 != 1:
            remarks.append(f"--max_num_frames {num_frames} is not 8k + 1: the VAE gives back videos of another length")
        if self.transformer["patch_size_t"] and fps != 16:
            remarks.append(f"--fps {fps}: CogVideoX 1.5 was made for 16, at which cli_demo.py shows its videos")
        return remarks


# ---- load ------------------------------------------------------------------------------------------------------------


def read_checkpoint(name: str, revision: str | None = None, variant: str | None = None, cache_dir=None) -> Checkpoint:
    """The configs of a folder or of a hub repository.

    Raises:
        ValueError: it cannot be found, or is no complete CogVideoX checkpoint.
    """
    local = Path(name).expanduser()
    name = str(local.resolve()) if local.is_dir() else name
    rule = "--pretrained_model_name_or_path takes a folder, or a hub name such as THUDM/CogVideoX-2b"
    hub = {"revision": revision, "cache_dir": cache_dir}
    try:
        index = DiffusionPipeline.load_config(name, **hub)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: found no model_index.json there ({_why(error, local)}); {rule}") from error
    if not index.get("_class_name", "").startswith("CogVideoX"):
        raise ValueError(f"{name}: holds a {index.get('_class_name')}, not a CogVideoX pipeline; {rule}")
    try:
        return Checkpoint(
            name=name,
            transformer=dict(empty_transformer(_config(CogVideoXTransformer3DModel, name, "transformer", hub)).config),
            vae=_config(AutoencoderKLCogVideoX, name, "vae", hub),
            scheduler=SCHEDULERS[index["scheduler"][1]].from_pretrained(name, subfolder="scheduler", **hub),
            hub=hub | {"variant": variant},
            folder=local if local.is_dir() else None,
        )
    except (OSError, KeyError) as error:
        raise ValueError(f"{name}: the checkpoint is not complete ({error}); download it again") from error


def _why(error: Exception, local: Path) -> str:
    """That no model_index.json was found. diffusers words what huggingface_hub raised, the context, for all alike."""
    if any((local / part / "config.json").is_file() for part in ("", "transformer")):
        return "a transformer alone: put it in place of transformer/ in a copy of the checkpoint it was made from"
    return NOT_FOUND.get(type(error.__context__)) or str(error).strip().splitlines()[0]


def _config(model_class, name: str, subfolder: str, hub: dict) -> dict:
    return model_class.load_config(name, subfolder=subfolder, **hub)


def empty_transformer(config: dict) -> CogVideoXTransformer3DModel:
    """The transformer without memory for its weights: its module names and its config with all defaults."""
    # diffusers 0.42.1 lists there which values were defaults, and takes the default whatever the config says now.
    config = {name: value for name, value in config.items() if name != "_use_default_values"}
    with torch.device("meta"):
        return CogVideoXTransformer3DModel.from_config(config)


def empty_vae(config: dict) -> AutoencoderKLCogVideoX:
    """The VAE without memory for its weights."""
    with torch.device("meta"):
        return AutoencoderKLCogVideoX.from_config(config)


def empty_text_encoder(config: dict) -> T5EncoderModel:
    """T5 without memory for its weights."""
    with torch.device("meta"):
        return T5EncoderModel(T5Config(**config))


def read_text_encoder_config(checkpoint: Checkpoint) -> dict:
    """T5's config, from the checkpoint's folder or the hub; its weights need not be there.

    Raises:
        ValueError: it is missing.
    """
    where = {option: checkpoint.hub[option] for option in ("revision", "cache_dir") if option in checkpoint.hub}
    name = checkpoint.folder or checkpoint.name
    try:
        return T5Config.from_pretrained(name, subfolder="text_encoder", **where).to_dict()
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{checkpoint.name}: the checkpoint is not complete ({reason}); download it again") from error


def check_training(
    checkpoint: Checkpoint, dtype: torch.dtype, num_frames: int, height: int, width: int, image_options: list[str]
) -> None:
    """Refuses what this checkpoint cannot be trained on.

    Args:
        image_options: those that were given, which text-to-video has no use for.
    """
    config, name = checkpoint.transformer, checkpoint.name
    channels = f"{config['in_channels']} input channels for {config['out_channels']} output channels"
    if not checkpoint.takes_image and config["in_channels"] != config["out_channels"]:
        raise ValueError(
            f"{name}: {channels}: neither text-to-video nor image-to-video, which are what can be trained; use another"
        )
    if image_options and not checkpoint.takes_image:
        raise ValueError(
            f"{', '.join(image_options)}: {name} is a text-to-video checkpoint ({channels}) and sees no image; leave "
            "the option out, or use an image-to-video one such as THUDM/CogVideoX-5b-I2V"
        )
    if checkpoint.fixed_size not in (None, (num_frames, height, width)):
        frames, *size = checkpoint.fixed_size
        raise ValueError(
            f"--max_num_frames {num_frames} --height {height} --width {width}: {name} has learned positions for "
            f"{frames} frames of {size[0]}x{size[1]} pixels alone; pass those"
        )
    if dtype == torch.float16 and checkpoint.takes_image:
        raise ValueError(
            f"{name}: image-to-video is made for bfloat16, and in float16 an image's encoding can overflow "
            "unseen; pass --mixed_precision bf16, or no for float32"
        )
    if not config["patch_size_t"]:
        return
    if dtype == torch.float16:
        raise ValueError(f"{name}: CogVideoX 1.5 gives NaN in float16; pass --mixed_precision bf16, or no for float32")
    most = [checkpoint.spatial_factor * config[f"sample_{side}"] for side in ("height", "width")]
    if height > most[0] or width > most[1]:
        raise ValueError(
            f"--height {height} --width {width}: the positions of {name} end at {most[0]}x{most[1]} pixels; "
            "pass at most that"
        )


def download(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its weights in a folder: downloaded, where it is a hub name.

    Raises:
        ValueError: a file is missing that would be missed later, or not at all.
    """
    if not checkpoint.folder:
        try:
            folder = DiffusionPipeline.download(checkpoint.name, **checkpoint.hub)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{checkpoint.name}: cannot be downloaded ({reason}); try again, what came stays"
            ) from error
        checkpoint = checkpoint._replace(folder=Path(folder))
    for part in ("transformer", "vae", "text_encoder"):
        weights = [file for file in (checkpoint.folder / part).glob("*") if file.suffix in (".safetensors", ".bin")]
        if not any((checkpoint.variant or "") in file.name and file.stat().st_size > 1024 for file in weights):
            kind = f"weights{f' of --variant {checkpoint.variant}' * bool(checkpoint.variant)}"
            raise ValueError(f"{checkpoint.folder}: no {kind} in {part}/; download the checkpoint again")
    _check_tokenizer(checkpoint.folder)
    return checkpoint


def _check_tokenizer(folder: Path) -> None:
    """Transformers 5 would make one without a vocabulary, and not say so."""
    if not any((folder / "tokenizer" / name).is_file() for name in ("spiece.model", "tokenizer.json")):
        raise ValueError(f"{folder}: no spiece.model in tokenizer/; download the checkpoint again")


def load_tokenizer(checkpoint: Checkpoint):
    """That of the captions; of a hub name nothing else is downloaded.

    Raises:
        ValueError: it cannot be had.
    """
    folder, name = checkpoint.folder, checkpoint.name
    if not folder:
        where = {option: checkpoint.hub[option] for option in ("revision", "cache_dir")}
        try:
            folder = Path(snapshot_download(name, allow_patterns="tokenizer/*", **where))
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{name}: its tokenizer cannot be downloaded ({reason}); try again") from error
    _check_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")


def load_transformer(checkpoint: Checkpoint, dtype: torch.dtype) -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel.from_pretrained(
        checkpoint.folder, subfolder="transformer", dtype=dtype, variant=checkpoint.variant
    )


@contextmanager
def loaded_vae(checkpoint: Checkpoint, dtype, device, tiling: bool, slicing: bool) -> Iterator[AutoencoderKLCogVideoX]:
    """The VAE, for the length of a `with` block."""
    vae = AutoencoderKLCogVideoX.from_pretrained(
        checkpoint.folder, subfolder="vae", dtype=dtype, variant=checkpoint.variant
    )
    if tiling:
        # The tile of the published VAEs. diffusers 0.42.1 takes half the size in the VAE's config, and where that is no
        # multiple of 48 x 40 what it stitches is larger than what it was given.
        vae.enable_tiling(tile_sample_min_height=240, tile_sample_min_width=360)
    if slicing:
        vae.enable_slicing()
    try:
        yield vae.to(device).eval()
    finally:
        vae.to("meta")  # frees the memory whoever still refers to it
        torch.cuda.empty_cache()


@contextmanager
def video_encoder(checkpoint: Checkpoint, dtype, device, tiling: bool, slicing: bool) -> Iterator[Callable]:
    """`encode_videos` with a VAE that is in memory for the length of a `with` block."""
    with loaded_vae(checkpoint, dtype, device, tiling, slicing) as vae:
        yield partial(encode_videos, vae)


@contextmanager
def image_encoder(checkpoint: Checkpoint, dtype, device, tiling: bool, slicing: bool) -> Iterator[Callable | None]:
    """`encode_images` with the encoder half of a VAE, for the length of a `with` block; None for text-to-video."""
    if not checkpoint.takes_image:
        yield None
        return
    with loaded_vae(checkpoint, dtype, device, tiling, slicing) as vae:
        vae.decoder.to("meta")
        torch.cuda.empty_cache()
        yield partial(encode_images, vae)


@contextmanager
def caption_encoder(checkpoint: Checkpoint, dtype, device, precision: str = "bf16") -> Iterator[Callable]:
    """`encode_captions` with a T5 that is in memory for the length of a `with` block.

    Args:
        precision: of its linear layers, of `quantized.PRECISIONS`; they are quantised one after the other on `device`.
    """
    folder = checkpoint.folder
    tokenizer = load_tokenizer(checkpoint)
    text_encoder = T5EncoderModel.from_pretrained(
        folder, subfolder="text_encoder", dtype=dtype, variant=checkpoint.variant
    )
    if precision != "bf16":
        quantized.quantize_linears(text_encoder.encoder, precision, device)
    text_encoder.to(device).eval()
    try:
        yield partial(
            encode_captions, tokenizer, text_encoder, max_length=checkpoint.transformer["max_text_seq_length"]
        )
    finally:
        text_encoder.to("meta")  # frees the memory whoever still refers to it
        torch.cuda.empty_cache()


def encoders(
    checkpoint: Checkpoint, dtype, device, tiling: bool, slicing: bool, text_precision: str = "bf16", text_device=None
) -> tuple[Encoder, Encoder]:
    """Of clips and of captions, not loaded yet.

    Args:
        text_device: that of captions (default: `device`).
    """
    video = partial(video_encoder, checkpoint, dtype, device, tiling, slicing)
    caption = partial(caption_encoder, checkpoint, dtype, text_device or device, text_precision)
    captions_at_once = max(1, TOKENS_AT_ONCE // checkpoint.transformer["max_text_seq_length"])
    return (
        Encoder(vae_fingerprint(checkpoint, dtype, tiling), video, (lambda _: 1) if slicing else clips_at_once),
        Encoder(text_fingerprint(checkpoint, dtype, text_precision), caption, lambda _: captions_at_once),
    )


def clips_at_once(shape: tuple[int, ...]) -> int:
    """How many clips [F, H, W, C] the VAE encodes together: small ones in pairs, of larger ones one.

    Together they need a third of the memory of one clip of 49x480x720 at most. The last batch is filled up, which costs
    more than calling the VAE less often saves once a clip keeps the processor busy by itself.
    """
    num_frames, height, width, _ = shape
    return max(1, min(2, PIXELS_AT_ONCE // (num_frames * height * width)))


def vae_fingerprint(checkpoint: Checkpoint, dtype: torch.dtype, tiling: bool) -> str:
    """Tells apart VAEs, and uses of one, that encode differently; slicing does so by rounding alone."""
    return _fingerprint(checkpoint.folder / "vae", dtype=dtype, tiling=tiling)


def text_fingerprint(checkpoint: Checkpoint, dtype: torch.dtype, precision: str = "bf16") -> str:
    """Tells apart text encoders, and uses of one, that encode differently; on another device it is the same."""
    folder, settings = checkpoint.folder, {"dtype": dtype, "length": checkpoint.transformer["max_text_seq_length"]}
    if precision != "bf16":  # which has the fingerprint that caches are filled with
        settings["precision"] = precision
    return _fingerprint(folder / "tokenizer") + _fingerprint(folder / "text_encoder", **settings)


def _fingerprint(folder: Path, **settings) -> str:
    """A hash over the files of a model and the settings it runs with.

    Of a file over 16 MiB it reads 1,024 evenly spaced blocks of 4 KiB: T5 has 9.5 GB, and training moves all of it.
    """
    digest = hashlib.sha256(repr(sorted(settings.items())).encode())
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin", ".model")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            if size <= 1 << 24:
                digest.update(file.read())
                continue
            for i in range(1024):
                file.seek(i * (size - 4096) // 1023)
                digest.update(file.read(4096))
    return digest.hexdigest()


# ---- encode ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_videos(vae: AutoencoderKLCogVideoX, frames: torch.Tensor) -> torch.Tensor:
    """Parameters of the latents' distribution [B, 2c, f, h, w], mean then log-variance, for uint8 [B, F, H, W, C].

    Those of a clip depend on the size of its batch by rounding, and on the other clips in it not at all.
    """
    video = frames.to(vae.device).permute(0, 4, 1, 2, 3)  # [B, C, F, H, W]
    video = (video.float() / 127.5 - 1).to(vae.dtype)
    return vae.encode(video).latent_dist.parameters


@torch.no_grad()
def encode_images(vae: AutoencoderKLCogVideoX, images: torch.Tensor) -> torch.Tensor:
    """Parameters of the latents' distribution [B, 2c, 1, h, w] for images [B, H, W, C] in [-1, 1]."""
    return vae.encode(images.permute(0, 3, 1, 2)[:, :, None].to(vae.dtype)).latent_dist.parameters


@torch.no_grad()
def encode_captions(tokenizer, text_encoder: T5EncoderModel, captions: list[str], max_length: int) -> torch.Tensor:
    """Embeddings [B, L, D]; the padding is kept and no mask is used, since CogVideoX attends to all L tokens."""
    for caption in captions:
        length = len(tokenizer(caption, verbose=False).input_ids)
        if length > max_length:
            warnings.warn(
                f"CogVideoX reads {max_length} tokens of a caption; the last {length - max_length} are cut off of: "
                f"{caption[:60]} ...",
                stacklevel=2,
            )
    tokens = tokenizer(captions, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt")
    return text_encoder(tokens.input_ids.to(text_encoder.device))[0]


def cut_caption(tokenizer, caption: str, max_length: int) -> tuple[int, str]:
    """How many tokens a caption has, and what of its text `encode_captions` cuts off."""
    tokens = tokenizer(caption, verbose=False, return_offsets_mapping=True)
    num_tokens = len(tokens.input_ids)
    if num_tokens <= max_length:
        return num_tokens, ""
    begin, _ = tokens.offset_mapping[max_length - 1]  # of the first that makes room for the end-of-text token
    return num_tokens, caption[begin:].strip()


def sample_latents(parameters: torch.Tensor, scaling_factor: float, generator: torch.Generator) -> torch.Tensor:
    """Latents [B, f, c, h, w] as the transformer wants them, float32, from parameters [B, 2c, f, h, w]."""
    latents = DiagonalGaussianDistribution(parameters.float()).sample(generator)  # [B, c, f, h, w]
    return latents.transpose(1, 2) * scaling_factor


def pad_latent_frames(latents: torch.Tensor, patch_size_t: int | None) -> torch.Tensor:
    """Prepends copies of the first latent frame until CogVideoX 1.5 can patch them in time, as its pipelines do."""
    missing = -latents.shape[1] % (patch_size_t or 1)
    return torch.cat([latents[:, :1].expand(-1, missing, -1, -1, -1), latents], dim=1)


def rotary_embedding(checkpoint: Checkpoint, num_latent_frames: int, latent_height: int, latent_width: int, device):
    """Cosine and sine tables [f' * h/2 * w/2, head size], float32; None for a checkpoint with sin-cos positions.

    CogVideoX 1.0 stretches the grid to the size it was trained at; 1.5 cuts it from the largest grid ("slice").
    """
    config = checkpoint.transformer
    if not config["use_rotary_positional_embeddings"]:
        return None
    patch, patch_t = config["patch_size"], config["patch_size_t"]
    grid = (latent_height // patch, latent_width // patch)
    base = (config["sample_height"] // patch, config["sample_width"] // patch)
    return _rotary_tables(config["attention_head_dim"], num_latent_frames, grid, base, patch_t, device)


@lru_cache(maxsize=32)  # of every shape of a batch once, not in every step
def _rotary_tables(head_size: int, num_latent_frames: int, grid: tuple, base: tuple, patch_t: int | None, device):
    if patch_t is None:
        place = {"crops_coords": get_resize_crop_region_for_grid(grid, base[1], base[0])}
        temporal_size = num_latent_frames
    else:
        place = {"crops_coords": None, "grid_type": "slice", "max_size": base}
        temporal_size = -(-num_latent_frames // patch_t)
    return get_3d_rotary_pos_embed(head_size, grid_size=grid, temporal_size=temporal_size, device=device, **place)


# ---- train -----------------------------------------------------------------------------------------------------------


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
) -> torch.Tensor:
    """Mean squared error between predicted and true velocity v = sqrt(a) noise - sqrt(1 - a) x0.

    Salimans & Ho 2022 (arXiv:2202.00512), appendix D. Noise and timesteps are drawn here, one timestep per sample.

    Args:
        latents: clean, [B, f, c, h, w], float32: a bfloat16 `a` rounds to 1 at the first timesteps.
        prompt_embeds: [B, L, D].
        rotary: tables from `rotary_embedding`, or None.
        generator: on the latents' device.
        dtype: that the transformer computes in.
        image_latents: from `condition_on_images`, [B, f, c, h, w], or None.
        ofs: CogVideoX 1.5's further conditioning number, [1], or None.
        timesteps: [B], where they are not to be drawn.
    """
    noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
    if timesteps is None:
        timesteps = torch.randint(
            0, scheduler.config.num_train_timesteps, latents.shape[:1], generator=generator, device=latents.device
        )
    hidden_states = scheduler.add_noise(latents, noise, timesteps)
    if image_latents is not None:
        hidden_states = torch.cat([hidden_states, image_latents], dim=2)  # [B, f, 2c, h, w]
    predicted_velocity = transformer(
        hidden_states=hidden_states.to(dtype),
        encoder_hidden_states=prompt_embeds.to(dtype),
        timestep=timesteps,
        ofs=ofs,
        image_rotary_emb=rotary,
        return_dict=False,
    )[0]
    return F.mse_loss(predicted_velocity.float(), scheduler.get_velocity(latents, noise, timesteps))


def noisy_images(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images [B, H, W, C] in [-1, 1] plus noise, its scale exp(N(-3, 0.5)) drawn for each, as in pre-training.

    Blattmann et al. 2023 (arXiv:2311.15127) for Stable Video Diffusion, which CogVideoX follows.
    """
    device = images.device
    scale = torch.exp(torch.randn(len(images), 1, 1, 1, generator=generator, device=device) * 0.5 - 3.0)
    return images + scale * torch.randn(images.shape, generator=generator, device=device)


def condition_on_images(checkpoint, encode: Callable, images, num_latent_frames: int, generator) -> torch.Tensor:
    """Latents [B, f, c, h, w] of the images in the first of f frames, zeros in the others; float32.

    Noise is added before the encoding, and the VAE is not linear, so that no cached encoding could stand for it: one
    image is encoded per clip and step. One in twenty is dropped whole, so that the model does not lean on it alone.

    Args:
        encode: from `image_encoder`.
        images: uint8 [B, H, W, C].
    """
    images = noisy_images(images.float() / 127.5 - 1, generator)
    kept = torch.rand(len(images), 1, 1, 1, 1, generator=generator, device=images.device) >= 0.05
    factor = checkpoint.vae["scaling_factor"]
    if checkpoint.vae.get("invert_scale_latents"):  # as CogVideoX1.5-5B-I2V was trained
        factor = 1 / factor
    latents = sample_latents(encode(images), factor, generator) * kept  # [B, 1, c, h, w]
    return F.pad(latents, (0, 0, 0, 0, 0, 0, 0, num_latent_frames - 1))


def training_loss(
    checkpoint: Checkpoint, transformer, batch: dict, generator, dtype, encode=None, timesteps=None
) -> torch.Tensor:
    """Velocity loss of a batch from the cache; all that is random in it comes from `generator`, on whose device it is.

    Args:
        batch: "parameters" [B, 2c, f, h, w] of the latents' distribution, "prompt_embeds" [B, L, D]; for
            image-to-video also "image", uint8 [B, H, W, C].
        encode: from `image_encoder`.
        timesteps: [B], where they are not to be drawn.
    """
    device, config = generator.device, checkpoint.transformer
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    latents = sample_latents(batch["parameters"], checkpoint.vae["scaling_factor"], generator)  # [B, f, c, h, w]
    latents = pad_latent_frames(latents, config["patch_size_t"])
    _, f, _, h, w = latents.shape
    rotary = rotary_embedding(checkpoint, f, h, w, device)
    return velocity_loss(
        transformer, checkpoint.scheduler, latents, batch["prompt_embeds"], rotary, generator, dtype,
        image_latents=condition_on_images(checkpoint, encode, batch["image"], f, generator) if encode else None,
        ofs=torch.full((1,), 2.0, dtype=dtype, device=device) if config["ofs_embed_dim"] else None,
        timesteps=timesteps,
    )  # fmt: skip


def generator_for(device: torch.device, *numbers: int) -> torch.Generator:
    """A generator of its own for every tuple of numbers, so that nothing depends on what was drawn before."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big"))


# ---- sample ----------------------------------------------------------------------------------------------------------


def sample_video(
    transformer, vae, scheduler, prompt_embeds, negative_prompt_embeds, *, image=None, generator, **options
) -> list:
    """Frames (PIL images) of one video, sampled by diffusers' pipeline around the models that are already loaded.

    Args:
        scheduler: the checkpoint's own; a copy is used, so that training's stays as it is.
        prompt_embeds, negative_prompt_embeds: [L, D], in the transformer's dtype.
        image: the first frame, uint8 [H, W, C]; None for text-to-video.
        options: of the pipeline's __call__: height, width, num_frames, guidance_scale, use_dynamic_cfg.
    """
    pipeline_class = CogVideoXPipeline if image is None else CogVideoXImageToVideoPipeline
    pipeline = pipeline_class(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=transformer,
        scheduler=type(scheduler).from_config(scheduler.config, timestep_spacing="trailing"),
    )
    pipeline.set_progress_bar_config(disable=True)
    if image is not None:
        options["image"] = Image.fromarray(image.numpy())
    return pipeline(
        prompt_embeds=prompt_embeds[None],
        negative_prompt_embeds=negative_prompt_embeds[None],
        generator=generator,
        **options,
    ).frames[0]
