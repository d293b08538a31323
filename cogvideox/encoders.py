"""VAE and T5: uint8 frames and captions -> what the cache holds; the models are in memory only while they encode.

Shapes: B batch, F frames, C channels, H height, W width; lower-case f c h w are latent sizes,
f = (F - 1) / 4 + 1, h = H / 8, w = W / 8. L prompt tokens, D text width.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLCogVideoX
from transformers import T5EncoderModel

from cogvideox import quantized
from cogvideox.base_model import BaseModel, load_tokenizer

TOKENS_AT_ONCE = 1024  # that T5 encodes together, the captions' padding included
EXAMPLES = 3  # of captions that are cut off
WEIGHTS = (".safetensors", ".bin")  # suffixes of files of weights
PIXELS_AT_ONCE = 2**20  # that the VAE encodes together, over all frames of small clips


class Encoder(NamedTuple):
    """A VAE or T5, not loaded yet."""

    fingerprint: str  # differs between encoders that encode differently
    load: Callable[[], AbstractContextManager[Callable]]  # the function that encodes, for the length of a `with` block
    at_once: Callable[[tuple[int, ...]], int]  # how many clips of shape [F, H, W, C] or captions, (), it takes together
    # the shape of what it makes of one of them; None: not known
    shape_of: Callable[[tuple[int, ...]], tuple[int, ...] | None] = lambda _: None


def encoders(
    base: BaseModel,
    dtype,
    device,
    *,
    tiling: bool,
    slicing: bool,
    text_precision: str = "bf16",
    text_device=None,
    cut: dict[str, int] | None = None,
) -> tuple[Encoder, Encoder]:
    """Returns the video and the caption encoder; each loads its model when it is entered.

    Args:
        text_device: where captions are encoded; None: `device`.
        cut: receives each encoded caption that is too long, and how many of its tokens are cut off.
    """
    video = partial(video_encoder, base, dtype, device, tiling=tiling, slicing=slicing)
    caption = partial(caption_encoder, base, dtype, text_device or device, text_precision, cut)
    max_length, width = base.transformer["max_text_seq_length"], base.transformer["text_embed_dim"]
    return (
        Encoder(
            vae_fingerprint(base, dtype, tiling=tiling),
            video,
            (lambda _: 1) if slicing else clips_at_once,
            lambda clip: (2 * base.vae["latent_channels"], *base.latent_shape(*clip[:3])),
        ),
        Encoder(
            text_fingerprint(base, dtype, text_precision),
            caption,
            lambda _: captions_at_once(max_length),
            lambda _: (max_length, width),
        ),
    )


def captions_at_once(max_length: int) -> int:
    """Returns how many captions, padded to `max_length` tokens, T5 encodes together."""
    return max(1, TOKENS_AT_ONCE // max_length)


def clips_at_once(shape: tuple[int, ...]) -> int:
    """Returns how many clips [F, H, W, C] the VAE encodes together: two small ones, or one larger one.

    A pair needs at most a third of the memory of one clip of 49x480x720. The last batch is filled up; for clips that
    keep the processor busy by themselves, that costs more than fewer calls of the VAE save.
    """
    num_frames, height, width, _ = shape
    return max(1, min(2, PIXELS_AT_ONCE // (num_frames * height * width)))


def set_tiling(vae: AutoencoderKLCogVideoX, *, tiling: bool, slicing: bool) -> None:
    if tiling:
        # The tile of the published VAEs. diffusers 0.42.1 takes half the size in the VAE's config, and where that is no
        # multiple of 48 x 40 what it stitches is larger than what it was given.
        vae.enable_tiling(tile_sample_min_height=240, tile_sample_min_width=360)
    if slicing:
        vae.enable_slicing()


@contextmanager
def loaded_vae(base: BaseModel, dtype, device, *, tiling: bool, slicing: bool) -> Iterator[AutoencoderKLCogVideoX]:
    """Loads the VAE for the length of a `with` block."""
    vae = AutoencoderKLCogVideoX.from_pretrained(base.folder, subfolder="vae", dtype=dtype, variant=base.variant)
    set_tiling(vae, tiling=tiling, slicing=slicing)
    try:
        yield vae.to(device).eval()
    finally:
        vae.to("meta")  # frees the memory even if something still refers to the VAE
        torch.cuda.empty_cache()


@contextmanager
def video_encoder(base: BaseModel, dtype, device, *, tiling: bool, slicing: bool) -> Iterator[Callable]:
    """Yields `encode_videos` with a VAE that is in memory for the length of a `with` block."""
    with loaded_vae(base, dtype, device, tiling=tiling, slicing=slicing) as vae:
        yield partial(encode_videos, vae)


@contextmanager
def image_encoder(base: BaseModel, dtype, device, *, tiling: bool, slicing: bool) -> Iterator[Callable | None]:
    """Yields `encode_images` with the VAE's encoder half for the length of a `with` block; None for text-to-video."""
    if not base.takes_image:
        yield None
        return
    with loaded_vae(base, dtype, device, tiling=tiling, slicing=slicing) as vae:
        vae.decoder.to("meta")
        torch.cuda.empty_cache()
        yield partial(encode_images, vae)


@contextmanager
def caption_encoder(
    base: BaseModel, dtype, device, precision: str = "bf16", cut: dict[str, int] | None = None
) -> Iterator[Callable]:
    """Yields `encode_captions` with a T5 that is in memory for the length of a `with` block.

    Args:
        precision: of T5's linear layers, from `quantized.PRECISIONS`; they are quantised one by one on `device`.
        cut: receives each caption that is too long, and how many of its tokens are cut off.
    """
    tokenizer, max_length = load_tokenizer(base), base.transformer["max_text_seq_length"]
    cut = {} if cut is None else cut
    text_encoder = T5EncoderModel.from_pretrained(
        base.folder, subfolder="text_encoder", dtype=dtype, variant=base.variant
    )
    if precision != "bf16":
        quantized.quantize_linears(text_encoder.encoder, precision, device)
    text_encoder.to(device).eval()
    try:
        yield partial(encode_captions, tokenizer, text_encoder, max_length=max_length, cut=cut)
    finally:
        text_encoder.to("meta")  # frees the memory even if something still refers to T5
        torch.cuda.empty_cache()


@torch.no_grad()
def encode_videos(vae: AutoencoderKLCogVideoX, frames: torch.Tensor) -> torch.Tensor:
    """Parameters of the latents' distribution [B, 2c, f, h, w], mean then log-variance, for uint8 [B, F, H, W, C].

    A clip's parameters do not depend on the other clips of the batch, and on their number only by rounding.
    """
    video = frames.to(vae.device).permute(0, 4, 1, 2, 3)  # [B, C, F, H, W]
    video = (video.float() / 127.5 - 1).to(vae.dtype)
    return vae.encode(video).latent_dist.parameters


@torch.no_grad()
def encode_images(vae: AutoencoderKLCogVideoX, images: torch.Tensor) -> torch.Tensor:
    """Parameters of the latents' distribution [B, 2c, 1, h, w] for images [B, H, W, C] in [-1, 1]."""
    return vae.encode(images.permute(0, 3, 1, 2)[:, :, None].to(vae.dtype)).latent_dist.parameters


@torch.no_grad()
def encode_captions(
    tokenizer, text_encoder: T5EncoderModel, captions: list[str], max_length: int, cut: dict[str, int]
) -> torch.Tensor:
    """Returns embeddings [B, L, D]; the padding is kept and no mask used, as CogVideoX attends to all L tokens.

    Args:
        cut: receives each caption that is too long, and how many of its tokens are cut off.
    """
    for caption in captions:
        length = len(tokenizer(caption, verbose=False).input_ids)
        if length > max_length:
            cut[caption] = length - max_length
    tokens = tokenizer(captions, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt")
    return text_encoder(tokens.input_ids.to(text_encoder.device))[0]


def describe_cut_captions(cut: dict[str, int], max_length: int) -> str:
    """Returns a line on captions that are too long; `cut` holds how many tokens of each are cut off."""
    most = sorted(cut.items(), key=itemgetter(1), reverse=True)[:EXAMPLES]
    examples = "; ".join(f"the last {tokens} of: {caption[:60]} ..." for caption, tokens in most)
    count = "1 caption is" if len(cut) == 1 else f"{len(cut)} captions are"
    such_as = ", such as" if len(cut) > len(most) else ""
    return f"CogVideoX reads {max_length} tokens of a caption; {count} longer and cut off{such_as}: {examples}"


def cut_caption(tokenizer, caption: str, max_length: int) -> tuple[int, str]:
    """Returns how many tokens a caption has, and the part of its text that `encode_captions` cuts off."""
    tokens = tokenizer(caption, verbose=False, return_offsets_mapping=True)
    num_tokens = len(tokens.input_ids)
    if num_tokens <= max_length:
        return num_tokens, ""
    begin, _ = tokens.offset_mapping[max_length - 1]  # the last place is taken by the end-of-text token
    return num_tokens, caption[begin:].strip()


def vae_fingerprint(base: BaseModel, dtype: torch.dtype, *, tiling: bool) -> str:
    """Returns a hash that differs between VAEs, dtypes and tilings, which encode differently.

    Slicing changes the encoding only by rounding, and is not part of it.
    """
    return _fingerprint(base.folder / "vae", dtype=dtype, tiling=tiling)


def text_fingerprint(base: BaseModel, dtype: torch.dtype, precision: str = "bf16") -> str:
    """Returns a hash that differs between tokenizers, text encoders, dtypes and precisions; devices do not matter."""
    settings = {"dtype": dtype, "length": base.transformer["max_text_seq_length"]}
    if precision != "bf16":  # so that caches from before there was a choice stay valid
        settings["precision"] = precision
    return _fingerprint(base.folder / "tokenizer") + _fingerprint(base.folder / "text_encoder", **settings)


def transformer_fingerprint(base: BaseModel) -> str:
    """Returns a hash of the transformer's weights; the text of its config is not part of it."""
    return _fingerprint(base.folder / "transformer", suffixes=WEIGHTS)


def _fingerprint(folder: Path, suffixes: tuple[str, ...] = (".json", ".model", *WEIGHTS), **settings) -> str:
    """Returns a hash of a model's files and the settings that it runs with.

    It reads only 1,024 evenly spaced blocks of 4 KiB of a file over 16 MiB: T5 has 9.5 GB, and training changes all
    parts of a file.
    """
    digest = hashlib.sha256(repr(sorted(settings.items())).encode())
    for path in sorted(path for path in folder.iterdir() if path.suffix in suffixes):
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
