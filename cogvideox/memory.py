"""Predicts the peak memory of each phase of a run, from configs alone.

Legend, in the units of the formulas below:

    B clips per micro-batch   T text tokens   V video tokens   S = T + V
    W width, heads x head size   M inner width of the feed-forward, 4 W   h heads   r rank   L layers
    e bytes of the compute dtype   n bytes of a LayerNorm's arithmetic: 4 under autocast, else e

Numbers of weights are counted on modules that are built on the meta device, without memory for them. Not counted: the
libraries' own memory (the CUDA context, workspaces of cuDNN and cuBLAS, NCCL, fragments of PyTorch's allocator), which
is what `choose_checkpointing` leaves room for; DoRA's norms, LoRA dropout's masks, DDP's buckets, and 2b's tables of
positions, 0.1 GiB for each length of clips other than the checkpoint's own.
"""

import argparse
import math
from typing import NamedTuple

import torch
from peft import LoraConfig

from cogvideox.base_model import BaseModel, empty_text_encoder, empty_transformer, empty_vae
from cogvideox.compute import LEVELS

GIB = 2**30
# Of a frozen weight in the blocks' linear layers. nf4: 4 bits, and 8 of scale for 64 weights, which have their scales.
BYTES_OF_BASE = {"fp8": 1.0, "int8": 1.0, "nf4": 0.53}
STATE_BYTES = {"adam": 8, "adamw": 8, "prodigy": 16}  # per trained weight: float32 mean and square; Prodigy two more
STATE_BYTES_8BIT = 2 + 2 * 4 / 256  # a float32 scale for each 256
TILE = (240, 360)  # pixels, as cogvideox.loaded_vae sets it
SAFETY_SHARE, SAFETY_GIB = 0.10, 1.0  # what `choose_checkpointing` leaves free


class Settings(NamedTuple):
    """What decides about memory; the training script's options of these names, with its defaults."""

    height: int  # pixels
    width: int
    max_num_frames: int
    train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    training_type: str = "lora"
    rank: int = 128
    lora_target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    dtype: torch.dtype = torch.bfloat16  # of --mixed_precision
    gradient_checkpointing: str = "none"
    base_precision: str = "bf16"  # bf16: that of the compute dtype
    optimizer: str = "adamw"
    use_8bit_adam: bool = False
    ema: bool = False
    tile_encoding: bool = False  # of --enable_tiling; `plan` decides where that is auto
    tile_decoding: bool = False
    blocks_to_swap: int = 0
    text_encoder_precision: str = "bf16"
    text_encoder_device: str = "accelerator"
    samples: bool = True  # videos of validation prompts

    @classmethod
    def of(cls, args: argparse.Namespace, dtype: torch.dtype, samples: bool = True) -> "Settings":
        """Those of the training script's options; `dtype` that of --mixed_precision."""
        given = {name: value for name, value in vars(args).items() if name in cls._fields}
        given["lora_target_modules"] = tuple(args.lora_target_modules)
        tiled = args.enable_tiling == "always"
        given |= {"ema": args.ema_decay is not None, "tile_encoding": tiled, "tile_decoding": tiled}
        return cls(**given, dtype=dtype, samples=samples)

    @property
    def sft(self) -> bool:
        return self.training_type == "sft"

    @property
    def autocast(self) -> bool:
        """Float32 weights that compute in another dtype; a LoRA's forward has that dtype throughout."""
        return self.sft and self.dtype != torch.float32

    @property
    def norm_bytes(self) -> int:
        return 4 if self.autocast else self.dtype.itemsize


class Weights(NamedTuple):
    """Numbers of weights of a transformer, and which linear layers of a block have something to train."""

    blocks_linear: int  # in the linear layers of all blocks, without their biases
    frozen: int  # everything that is not a LoRA, with the buffers
    frozen_per_block: int
    trained: int
    cast_per_block: int  # those that are float32 and are cast in the products of a block
    scales: int  # rows of the blocks' linear layers: each has a scale where it is quantized
    inputs_kept: frozenset[str]  # linear layers whose input the backward pass needs
    lora_layers: frozenset[str]
    modulated: frozenset[str]  # of norm1 and norm2 those whose scales and gates have gradients


def gib(count: float) -> float:
    return count / GIB


# ---- weights ---------------------------------------------------------------------------------------------------------


def count_weights(config: dict, settings: Settings) -> Weights:
    """Of the transformer with that config. All blocks are alike: two models, of one and two blocks, tell the rest."""
    layers, sft = config["num_layers"], settings.sft
    models = [_on_meta(config | {"num_layers": count}, settings) for count in (1, 2)]
    one, two = (sum(weight.numel() for weight in _frozen(model, sft)) for model in models)
    trained_one, trained_two = (sum(weight.numel() for weight in _trained(model)) for model in models)
    block = models[0].transformer_blocks[0]
    linear = {
        name.removesuffix(".base_layer"): layer
        for name, layer in block.named_modules()
        if isinstance(layer, torch.nn.Linear) and "lora_" not in name
    }
    lora = frozenset(name for name, layer in block.named_modules() if hasattr(layer, "lora_A"))
    cast = [weight for weight in _trained(block) if weight.ndim == 2]
    everywhere = [name for name, layer in models[0].named_modules() if hasattr(layer, "lora_A")]
    return Weights(
        blocks_linear=layers * sum(layer.weight.numel() for layer in linear.values()),
        frozen=one + (layers - 1) * (two - one),
        frozen_per_block=two - one,
        trained=trained_one + (layers - 1) * (trained_two - trained_one),
        cast_per_block=sum(weight.numel() for weight in cast) if settings.dtype != torch.float32 else 0,
        scales=layers * sum(layer.out_features for layer in linear.values()),
        inputs_kept=frozenset(linear) if sft else lora,
        lora_layers=lora,
        modulated=frozenset(
            norm
            for norm in ("norm1", "norm2")
            if sft or f"{norm}.linear" in lora or any("embedding" in name for name in everywhere)
        ),
    )


def _on_meta(config: dict, settings: Settings):
    transformer = empty_transformer(config)
    if not settings.sft:
        transformer.requires_grad_(False)
        with torch.device("meta"):
            transformer.add_adapter(LoraConfig(r=settings.rank, target_modules=list(settings.lora_target_modules)))
    return transformer


def _trained(transformer) -> list[torch.Tensor]:
    return [weight for weight in transformer.parameters() if weight.requires_grad]


def _frozen(transformer, sft: bool) -> list[torch.Tensor]:
    weights = [] if sft else [weight for weight in transformer.parameters() if not weight.requires_grad]
    return weights + list(transformer.buffers())


def base_bytes(weights: Weights, settings: Settings) -> float:
    """Of all that is not trained: the blocks' linear layers at `base_precision`, the rest in the compute dtype."""
    e = settings.dtype.itemsize
    if settings.sft or settings.base_precision == "bf16":
        return weights.frozen * e
    quantized = weights.blocks_linear * BYTES_OF_BASE[settings.base_precision] + 4 * weights.scales
    return (weights.frozen - weights.blocks_linear) * e + quantized


def swapped_out_bytes(config: dict, weights: Weights, settings: Settings) -> float:
    """Of the frozen weights those in main memory: all of the swapped blocks but the two that have a place on the GPU.

    What the blocks hold is what the transformer has less its ends.
    """
    ends = weights.frozen - config["num_layers"] * weights.frozen_per_block
    per_block = (base_bytes(weights, settings) - ends * settings.dtype.itemsize) / config["num_layers"]
    return per_block * max(settings.blocks_to_swap - 2, 0)


# ---- the transformer -------------------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    text: int
    video: int
    latents: int  # numbers in the latents of a clip

    @property
    def all(self) -> int:
        return self.text + self.video


def count_tokens(base: BaseModel, settings: Settings) -> Tokens:
    """Of one clip. CogVideoX 1.5 patches two frames at a time, and pads them to an even number."""
    config, factor = base.transformer, base.spatial_factor
    patch, patch_t = config["patch_size"], config["patch_size_t"] or 1
    h, w, f = settings.height // factor, settings.width // factor, (settings.max_num_frames - 1) // 4 + 1
    frames = math.ceil(f / patch_t)
    video = frames * (h // patch) * (w // patch)
    return Tokens(config["max_text_seq_length"], video, config["out_channels"] * frames * patch_t * h * w)


def saved_by_block(config: dict, weights: Weights, settings: Settings, tokens: Tokens) -> float:
    """Bytes that one block keeps for its backward pass, weights left out.

    In bytes per token, summed over the B S tokens; [x] is there if x is trained, so for a LoRA's targets, or all (SFT).

        norm1, norm2     2 W n                  their inputs
                         [W n] for each         its output, if its modulation is trained
                         2 x 2 x 4              mean and reciprocal deviation
        to_q, to_k, to_v [W e]                  their input, once; under autocast cast for each, [3 W e]
        norm_q, norm_k   2 W n + 2 x 2 x 4 h    their inputs, mean and reciprocal deviation per head
        attention        4 W e + 4 h            queries, keys, values, output; float32 logsumexp
        to_out                                  its input is attention's output
        gates            [W e] for each         what it multiplies, if its modulation is trained
        ff.net.0.proj    [W e]                  its input
        GELU             M e                    its input
        ff.net.2         [M e]                  its input
        LoRA             r e for each target    what lora_A gives

    plus the copies of float32 weights in the compute dtype, e each: LoRA matrices, or under autocast those of the
    linear layers. RoPE keeps two tables for all blocks together, and modulation a few rows per clip.

    Read in diffusers 0.42.1 (CogVideoXBlock, CogVideoXLayerNormZero, FeedForward), compute.AttentionByTokens and
    trainable.FusedLora, and counted in tests/test_memory_formula.py.
    """
    e, n = settings.dtype.itemsize, settings.norm_bytes
    heads = config["num_attention_heads"]
    width = heads * config["attention_head_dim"]
    inner, kept = 4 * width, weights.inputs_kept
    projections = [name for name in kept if name in ("attn1.to_q", "attn1.to_k", "attn1.to_v")]
    per_token = 2 * width * n + 16
    per_token += width * (n + e) * len(weights.modulated)
    per_token += width * e * (len(projections) if settings.autocast else bool(projections))
    per_token += 2 * width * n + 16 * heads
    per_token += 4 * width * e + 4 * heads
    per_token += width * e * ("ff.net.0.proj" in kept)
    per_token += inner * e * (1 + ("ff.net.2" in kept))
    per_token += settings.rank * e * sum(not name.startswith("norm") for name in weights.lora_layers)
    return settings.train_batch_size * tokens.all * per_token + weights.cast_per_block * e


def kept_by_block(config: dict, settings: Settings, tokens: Tokens) -> float:
    """Bytes that outlive one block's forward pass where it is recomputed.

    full: its inputs, B S W e. attention: also the kernel's output, B S W e, and logsumexp, 4 B S h.
    """
    e, heads = settings.dtype.itemsize, config["num_attention_heads"]
    states = settings.train_batch_size * tokens.all * heads * config["attention_head_dim"] * e
    logsumexp = 4 * settings.train_batch_size * tokens.all * heads
    return states if settings.gradient_checkpointing == "full" else 2 * states + logsumexp


def _shared(config: dict, settings: Settings, tokens: Tokens) -> float:
    """What one block both keeps while it is not there and saves once it is recomputed."""
    kept = kept_by_block(config, settings, tokens)
    states = kept_by_block(config, settings._replace(gradient_checkpointing="full"), tokens)
    return kept - states if settings.autocast else kept  # autocast's LayerNorms save float32 copies of the input


def _backward_of_block(config: dict, settings: Settings, tokens: Tokens) -> float:
    """The gradients that meet at GELU, where most do: of its two sides, 2 M e, and of the block's output, W e.

    Of SFT it is M e less: GELU's output, which it keeps for ff.net.2, is gone by then.
    """
    width = config["num_attention_heads"] * config["attention_head_dim"]
    sides = 1 if settings.sft else 2
    return settings.train_batch_size * tokens.all * (sides * 4 * width + width) * settings.dtype.itemsize


def _dequantized(config: dict, settings: Settings) -> float:
    """The largest linear layer of a block, for the length of its product."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return 0 if settings.base_precision == "bf16" else 4 * width * width * settings.dtype.itemsize


def training_parts(base: BaseModel, settings: Settings, weights: Weights | None = None) -> dict[str, float]:
    """GiB of the training phase, part by part; "peak" is the largest sum of those that are there at one time.

    Backward begins in the last block: all that is kept, one block's activations, the gradients in it. It ends in the
    first: all other blocks have their gradients (those of earlier micro-batches are there all the time), nothing else
    is kept. Under autocast, recomputation has a third such moment: the end of the forward pass, with a copy of all
    weights in the compute dtype. The update itself needs no more than weights, gradients and state: the optimizer is
    fused.
    """
    config, e = base.transformer, settings.dtype.itemsize
    weights = weights or count_weights(config, settings)
    tokens, layers = count_tokens(base, settings), config["num_layers"]
    one_block = saved_by_block(config, weights, settings, tokens)
    if settings.gradient_checkpointing == "none":
        kept, live = layers * one_block, 0.0
    else:
        kept = layers * kept_by_block(config, settings, tokens)
        live = one_block - _shared(config, settings, tokens)
    transient = _backward_of_block(config, settings, tokens) + _dequantized(config, settings)
    gradients = 4 * weights.trained
    resident = {
        "frozen weights": base_bytes(weights, settings)
        - swapped_out_bytes(config, weights, settings)
        + _image_encoder_bytes(base, settings),
        "trained weights": 4 * weights.trained,
        "optimizer": weights.trained
        * (STATE_BYTES_8BIT if settings.use_8bit_adam else STATE_BYTES[settings.optimizer]),
        "moving average": 4 * weights.trained * settings.ema,
        # Latents, noise, true and predicted velocity and its gradient in float32; two in the compute dtype.
        "loss": settings.train_batch_size * tokens.latents * (5 * 4 + 2 * e) + _rotary_bytes(config, tokens),
    }
    earlier = gradients if settings.gradient_accumulation_steps > 1 else 0
    others = gradients * (layers - 1) / layers  # when the backward pass comes to the first block
    moments = [earlier + kept + live + transient, max(earlier, others) + live + transient]
    if base.takes_image:
        moments.append(earlier + settings.train_batch_size * encoding_bytes(base, settings, num_frames=1))
    if settings.autocast:
        moments.append(earlier + kept + (weights.cast_per_block * e * layers if live else 0))
    parts = resident | {"kept activations": kept, "one block": live + transient, "gradients": gradients}
    return {name: gib(value) for name, value in parts.items()} | {"peak": gib(sum(resident.values()) + max(moments))}


def _rotary_bytes(config: dict, tokens: Tokens) -> float:
    return 2 * 4 * tokens.video * config["attention_head_dim"] * config["use_rotary_positional_embeddings"]


def sampling_bytes(base: BaseModel, settings: Settings, weights: Weights) -> float:
    """Largest moment of the forward pass of two clips, with and without the prompt; weights left out.

    In bytes per token of both: in the feed-forward the block's input and state, the attention's result, the cat of
    norm2's outputs (with a copy under autocast) and both sides of GELU; or in RoPE the block's input, norm1's output
    and its cat, queries, keys and values, and four temporary tensors, three of them float32.
    """
    config, e, n = base.transformer, settings.dtype.itemsize, settings.norm_bytes
    tokens = count_tokens(base, settings)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    feed_forward = 3 * e + n + settings.autocast * e + 2 * 4 * e
    rope = 2 * e + 4 * n + 12 + n if config["use_rotary_positional_embeddings"] else 0
    cast = weights.cast_per_block * config["num_layers"] * e if settings.autocast else 0
    return 2 * tokens.all * width * max(feed_forward, rope) + cast + _dequantized(config, settings)


# ---- the VAE ---------------------------------------------------------------------------------------------------------


class Walk:
    """Numbers that are alive on the way through an encoder or decoder, one group of frames after another.

    A causal convolution of kernel k keeps its last k - 1 input frames for the next group; those of this group come up
    while those of the group before are still there.
    """

    def __init__(self, latent_channels: int):
        self.latent_channels = latent_channels  # of the decoder's conditioning; 0 in an encoder
        self.before = self.cache = self.peak = 0

    def group(self) -> None:
        self.before, self.cache = self.cache, 0

    def alive(self, count: float) -> None:
        self.peak = max(self.peak, count + self.before + self.cache)

    def conv(self, held: float, channels: int, out_channels: int, frames: int, area: int) -> None:
        """A 3x3x3 convolution: `held` with its input, the input with two frames before it, and its output."""
        self.cache += 2 * channels * area
        padded, out = channels * (frames + 2) * area, out_channels * frames * area
        self.alive(held + padded + out + _split_conv(padded, channels, out, frames, area))

    def norm(self, held: float, channels: int, frames: int, area: int) -> None:
        """GroupNorm, and in a decoder its modulation by the latents; `held` without its input."""
        size = channels * frames * area
        if not self.latent_channels:
            self.alive(held + 3 * size)  # with SiLU's output
            return
        latents = self.latent_channels * frames * area
        # Convolutions of kernel 1 keep [:, :, -0:], which is all of their input: diffusers 0.42.1.
        self.cache += 2 * latents
        pieces = 2 if frames > 1 and frames % 2 else 1
        self.alive(held + 6 * size + pieces * latents)

    def resnet(self, held: float, channels: int, out_channels: int, frames: int, area: int) -> None:
        """`held` without the input x of the block: two of norm, SiLU, convolution, and the sum with x."""
        x, out = channels * frames * area, out_channels * frames * area
        self.norm(held, channels, frames, area)
        self.conv(held + 2 * x, channels, out_channels, frames, area)
        self.norm(held + x, out_channels, frames, area)
        self.conv(held + x + out, out_channels, out_channels, frames, area)
        shortcut = out if channels != out_channels else 0
        self.alive(held + x + 2 * out + shortcut)

    def block(self, channels: int, out_channels: int, layers: int, frames: int, area: int) -> None:
        first = channels * frames * area  # the caller holds on to it
        for layer in range(layers):
            held, inputs = (first, out_channels) if layer else (0, channels)
            self.resnet(held, inputs, out_channels, frames, area)


def _split_conv(padded: float, channels: int, out: float, frames: int, area: int) -> float:
    """What CogVideoXSafeConv3d needs more where the input has over 2^30 numbers: pieces of it, and of the output."""
    if padded <= 2**30:
        return 0
    parts = padded // 2**30 + 1
    size = math.ceil((frames + 2) / parts)
    later = (frames + 2) - size
    return out + channels * area * (later + 2 * math.ceil(later / size))


def encoder_peak(config: dict, num_frames: int, height: int, width: int) -> float:
    """Numbers alive at most in AutoencoderKLCogVideoX's encoder for one clip, without the clip.

    Eight frames at a time, the first time with what is left over. Downsampling stays below what is counted.
    """
    walk, widths = Walk(0), config["block_out_channels"]
    for frames in _groups(num_frames, 8):
        walk.group()
        area = height * width
        walk.conv(0, config["in_channels"], widths[0], frames, area)
        for level, (channels, out_channels) in enumerate(zip((widths[0], *widths), widths)):
            walk.block(channels, out_channels, config["layers_per_block"], frames, area)
            if level < len(widths) - 1:
                area //= 4
                frames = (frames + 1) // 2 if level < math.log2(config["temporal_compression_ratio"]) else frames
        walk.block(widths[-1], widths[-1], 2, frames, area)
        walk.norm(0, widths[-1], frames, area)
        walk.conv(widths[-1] * frames * area, widths[-1], 2 * config["latent_channels"], frames, area)
    return walk.peak


def decoder_peak(config: dict, num_latent_frames: int, latent_height: int, latent_width: int) -> float:
    """Numbers alive at most in AutoencoderKLCogVideoX's decoder for one clip, without the clip.

    Two latent frames at a time, the first time with what is left over. Upsampling stays below what is counted.
    """
    widths = config["block_out_channels"][::-1]
    walk = Walk(config["latent_channels"])
    for frames in _groups(num_latent_frames, 2):
        walk.group()
        area = latent_height * latent_width
        walk.conv(0, config["latent_channels"], widths[0], frames, area)
        walk.block(widths[0], widths[0], 2, frames, area)
        for level, (channels, out_channels) in enumerate(zip((widths[0], *widths), widths)):
            walk.block(channels, out_channels, config["layers_per_block"] + 1, frames, area)
            if level < len(widths) - 1:
                area *= 4
                doubles = level < math.log2(config["temporal_compression_ratio"]) and frames > 1
                frames = 2 * frames - frames % 2 if doubles else frames
        walk.norm(0, widths[-1], frames, area)
        walk.conv(widths[-1] * frames * area, widths[-1], config["out_channels"], frames, area)
    return walk.peak


def _groups(frames: int, size: int) -> list[int]:
    count = max(frames // size, 1)
    return [size + frames % size if frames >= size else frames] + [size] * (count - 1)


def encoding_bytes(base: BaseModel, settings: Settings, num_frames: int | None = None) -> float:
    """The encoder's peak for one clip, the clip itself (uint8 and compute dtype), weights left out."""
    config, e = vae_config(base), settings.dtype.itemsize
    frames, height, width = num_frames or settings.max_num_frames, settings.height, settings.width
    clip = 3 * frames * height * width * (1 + e)
    if settings.tile_encoding:
        height, width = min(height, TILE[0]), min(width, TILE[1])
    return clip + encoder_peak(config, frames, height, width) * e


def decoding_bytes(base: BaseModel, settings: Settings) -> float:
    """The decoder's peak for one clip, and the video, in pieces and whole; weights left out."""
    config, e, factor = vae_config(base), settings.dtype.itemsize, base.spatial_factor
    height, width = settings.height, settings.width
    video = 3 * settings.max_num_frames * height * width * e
    if settings.tile_decoding:
        # All tiles are kept until they are blended; a sixth and a fifth of each lies over its neighbours.
        video *= math.prod(
            sum(min(tile, side - start) for start in range(0, side, int(tile * (1 - overlap)))) / side
            for side, tile, overlap in zip((height, width), TILE, (1 / 6, 1 / 5))
        )
        height, width = min(height, TILE[0]), min(width, TILE[1])
    latent_frames = (settings.max_num_frames - 1) // 4 + 1
    # A group of frames is appended to the video only after its peak, by then as small as the video itself.
    return video + decoder_peak(config, latent_frames, height // factor, width // factor) * e


def vae_config(base: BaseModel) -> dict:
    """With diffusers' defaults, where the checkpoint's file leaves fields out."""
    return dict(empty_vae(base.vae).config)


def vae_weights(base: BaseModel, part: str | None = None) -> int:
    vae = empty_vae(base.vae)
    return sum(weight.numel() for weight in (getattr(vae, part) if part else vae).parameters())


def _image_encoder_bytes(base: BaseModel, settings: Settings) -> float:
    """Of image-to-video, which encodes a noisy image for each clip and step."""
    return vae_weights(base, "encoder") * settings.dtype.itemsize if base.takes_image else 0


# ---- T5 --------------------------------------------------------------------------------------------------------------


def text_bytes(config: dict, dtype: torch.dtype, num_tokens: int, precision: str = "bf16") -> float:
    """Weights of T5 with the config of its text_encoder folder, and its largest moment for one caption.

    With `precision` int8 its linear layers have one byte a weight; their scales, one a row, are not counted.

    Transformers keeps the feed-forward's outgoing matrices in float32 where the rest is in float16.
    """
    weights = 0
    for name, weight in empty_text_encoder(config).named_parameters():
        outgoing = dtype == torch.float16 and ".wo." in name
        linear = weight.ndim == 2 and not name.startswith("shared") and "relative_attention_bias" not in name
        itemsize = 1 if linear and precision == "int8" else 4 if outgoing else dtype.itemsize
        weights += weight.numel() * itemsize
    e, scores = dtype.itemsize, config["num_heads"] * num_tokens**2
    attention = scores * (3 * e + 2 * 4)  # position bias, products, their sum; softmax in float32
    feed_forward = scores * e + 3 * num_tokens * config["d_ff"] * e
    return weights + 4 * num_tokens * config["d_model"] * e + max(attention, feed_forward)


# ---- a whole run -----------------------------------------------------------------------------------------------------


def predict(base: BaseModel, text_encoder: dict, settings: Settings) -> dict[str, float]:
    """GiB at the peak of each phase: "text" and "clips" (encoding), "training", and "validation", if it samples videos.

    Args:
        text_encoder: T5's config, from `cogvideox.read_text_encoder_config`.
    """
    weights = count_weights(base.transformer, settings)
    vae = vae_weights(base) * settings.dtype.itemsize
    training = training_parts(base, settings, weights)
    stays = sum(training[name] for name in ("frozen weights", "trained weights", "optimizer", "moving average"))
    sampling = max(sampling_bytes(base, settings, weights), decoding_bytes(base, settings))
    max_length = base.transformer["max_text_seq_length"]
    text = text_bytes(text_encoder, settings.dtype, max_length, settings.text_encoder_precision)
    phases = {
        "text": 0.0 if settings.text_encoder_device == "cpu" else gib(text),
        "clips": gib(vae + encoding_bytes(base, settings)),
        "training": training["peak"],
        "validation": stays + gib(vae + sampling),
    }
    return phases if settings.samples else {name: value for name, value in phases.items() if name != "validation"}


def summary(phases: dict[str, float], free_gib: float | None) -> str:
    """The line that a run begins with; None where there is no GPU to compare with."""
    numbers = ", ".join(f"{phase} {value:.1f}" for phase, value in phases.items())
    line = f"memory, predicted: {numbers} GiB"
    if free_gib is None:
        return line
    line += f"; this GPU has {free_gib:.1f}"
    too_large = [phase for phase, value in phases.items() if value > free_gib]
    return line + (f", too little for {' and '.join(too_large)}" if too_large else "")


class Plan(NamedTuple):
    """What is done where an option is "auto", and otherwise what the options say."""

    gradient_checkpointing: str  # of LEVELS
    tile_encoding: bool
    tile_decoding: bool
    lines: list[str]  # what to tell of it


def plan(base: BaseModel, text_encoder: dict, settings: Settings, tiling: str, free_gib: float | None) -> Plan:
    """The fastest way that the memory of the GPU allows; the slowest, where none does.

    Args:
        text_encoder: T5's config, from `cogvideox.read_text_encoder_config`.
        tiling: --enable_tiling, of which "auto" tiles what would not fit otherwise.
        free_gib: of the GPU, before anything is loaded; None where there is none that could be full.
    """
    level, lines = settings.gradient_checkpointing, []
    if level == "auto":
        level, reason = choose_checkpointing(free_gib, base, settings)
        lines = [reason]
    settings = settings._replace(gradient_checkpointing=level)
    phases = predict(base, text_encoder, settings)
    if tiling == "auto" and free_gib is not None:
        tiled = {phase for phase in phases.keys() & {"clips", "validation"} if needed_gib(phases[phase]) > free_gib}
        settings = settings._replace(tile_encoding="clips" in tiled, tile_decoding="validation" in tiled)
        phases = predict(base, text_encoder, settings)
        lines.append(f"--enable_tiling auto: tiles for {' and '.join(sorted(tiled)) or 'nothing, there is room'}")
    if free_gib is not None and phases["training"] > free_gib and not any("may not do" in line for line in lines):
        weights = count_weights(base.transformer, settings)
        lines.append(f"training may not fit: {_way_out(base, settings, weights)}")
    if 0 < settings.blocks_to_swap <= 2:
        lines.append(
            f"--blocks_to_swap {settings.blocks_to_swap}: saves nothing, as two blocks have a place on the GPU"
        )
    return Plan(level, settings.tile_encoding, settings.tile_decoding, [summary(phases, free_gib), *lines])


def free_gpu_gib(device: torch.device) -> float | None:
    """None for a CPU."""
    return gib(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None


def needed_gib(peak_gib: float) -> float:
    return peak_gib * (1 + SAFETY_SHARE) + SAFETY_GIB


def choose_checkpointing(free_gib: float | None, base: BaseModel, settings: Settings) -> tuple[str, str]:
    """The fastest of `LEVELS` whose training fits into `free_gib`, and a sentence why.

    It fits if 10 % more than predicted and 1 GiB are free. Where even "full" does not, it is "full", and the sentence
    says so: a prediction is no reason to refuse. Blocks that are swapped must be recomputed.
    """
    levels = LEVELS[1:] if settings.blocks_to_swap else LEVELS
    if free_gib is None:
        fastest = levels[0]
        return fastest, f"--gradient_checkpointing auto: {fastest}, since there is no GPU whose memory could run out"
    weights = count_weights(base.transformer, settings)
    peaks = {
        level: training_parts(base, settings._replace(gradient_checkpointing=level), weights)["peak"]
        for level in levels
    }
    fits = [level for level, peak in peaks.items() if needed_gib(peak) <= free_gib]
    level = fits[0] if fits else "full"
    rule = f"needs {needed_gib(peaks[level]):.1f} of {free_gib:.1f} GiB (predicted {peaks[level]:.1f}, 10 % and 1 GiB)"
    reason = f"--gradient_checkpointing auto: {level} {rule}"
    if not fits:
        return level, f"{reason}, which may not do: {_way_out(base, settings, weights)}"
    smaller = levels[: levels.index(level)]
    return level, reason + "".join(f"; {other} would need {needed_gib(peaks[other]):.1f}" for other in smaller)


def _way_out(base: BaseModel, settings: Settings, weights: Weights) -> str:
    smaller = "lower --max_num_frames, --height and --width"
    layers = base.transformer["num_layers"]
    if settings.sft or settings.blocks_to_swap == layers:
        return smaller
    swapped = settings._replace(gradient_checkpointing="full", blocks_to_swap=layers)
    needed = needed_gib(training_parts(base, swapped, weights)["peak"])
    return f"with --blocks_to_swap {layers} it would need {needed:.1f}; or {smaller}"
