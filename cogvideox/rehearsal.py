"""Rehearses a run on the meta device: peak memory and FLOPs of each phase, from configs only.

A meta tensor has a shape, a dtype and no memory. Modules, loss, backward pass and recomputation are those of the run,
and a `Meter` adds up what they would hold and compute. All blocks of a transformer are alike, so at most four of them
are rehearsed: with each further block, everything that is counted grows by the same amount.

What cannot run there has a stand-in: the optimizer (`optimizer_bytes`), autocast (`Autocast`), a GPU's attention
(`flash_attention`), swapped blocks (`swapped_bytes`), the sampler's loop (`_validation`), and bitsandbytes' nf4
(quantized.py).

Not counted: the libraries' own memory (the CUDA context, workspaces of cuDNN and cuBLAS, NCCL) and fragments of
PyTorch's allocator, for which `budget.needed` leaves room; compiled blocks are rehearsed as if they were not.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter
from transformers import T5EncoderModel

from cogvideox import compute, encoders, quantized, swapping
from cogvideox.base_model import BaseModel, empty_text_encoder, empty_transformer, empty_vae
from cogvideox.lora import Lora, add_lora, base_of, count_trained, needs_autocast, trained_parameters
from cogvideox.meter import Meter, bytes_of, module_bytes
from cogvideox.objective import Masking, ofs_of, pad_latent_frames, rotary_embedding, training_loss
from cogvideox.sampling import NUM_INFERENCE_STEPS

REHEARSED_LAYERS = 4  # at most; and one fewer, to see what a block adds
FLASH = torch.ops.aten._scaled_dot_product_flash_attention.default
EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention.default
META = torch.device("meta")


class Settings(NamedTuple):
    """The settings that decide memory; most fields are the training script's options of these names."""

    height: int  # pixels
    width: int
    max_num_frames: int
    lora: Lora | None  # None: all weights are trained
    dtype: torch.dtype = torch.bfloat16  # of --mixed_precision
    train_batch_size: int = 1
    # Clips, frames, height and width of the micro-batch with most tokens, where it is not one of the size above.
    largest_batch: tuple[int, int, int, int] | None = None
    gradient_accumulation_steps: int = 1
    preserve: float = 0  # whether, and
    preserve_every: int = 1  # how often the base model's predictions are preserved
    mask_preserve: float = 0  # above 0, the base model predicts each micro-batch with masks, too
    regularized: bool = False  # whether each micro-batch is paired with one of regularization clips
    gradient_checkpointing: str = "none"
    attention_backend: str = "auto"
    blocks_to_swap: int = 0
    ema: bool = False
    tile_encoding: bool = False
    tile_decoding: bool = False
    enable_slicing: bool = False
    text_encoder_precision: str = "bf16"
    text_encoder_device: str = "accelerator"
    samples: bool = True  # whether validation makes videos
    device_type: str = "cuda"  # "cpu": the run computes there, and keeps everything in CPU memory
    num_processes: int = 1

    @property
    def in_training(self) -> "Settings":
        """The settings with the size and the number of clips of the largest micro-batch."""
        if not self.largest_batch:
            return self
        count, num_frames, height, width = self.largest_batch
        return self._replace(max_num_frames=num_frames, height=height, width=width, train_batch_size=count)

    @property
    def autocast(self) -> bool:
        """Whether float32 weights compute in another dtype; the forward pass of a plain LoRA has a single dtype."""
        return needs_autocast(self.lora) and self.dtype != torch.float32

    @property
    def gradients_in_forward(self) -> bool:
        """Whether gradients are there in the forward pass: of earlier losses, or in the buckets of DDP."""
        earlier_losses = self.gradient_accumulation_steps > 1 or bool(self.preserve) or self.regularized
        return earlier_losses or self.num_processes > 1


class OptimizerBytes(NamedTuple):
    """Bytes per trained element."""

    state: float
    update: float  # held during the update of one weight, after which the next one is updated


@dataclass(frozen=True)
class Models:
    """The models and the optimizer that are rehearsed; equal if their configs are equal."""

    base: BaseModel = field(compare=False)
    text_encoder: dict = field(compare=False)  # from base_model.read_text_encoder_config
    optimizer: OptimizerBytes
    configs: str  # JSON


class Phase(NamedTuple):
    name: str  # of PHASES
    peak_bytes: int
    flops: int  # of what is encoded together (text, clips), an update (training) or a video (validation)


def models_of(base: BaseModel, text_encoder: dict, make_optimizer: Callable) -> Models:
    """Returns the models to rehearse; `make_optimizer` makes the run's optimizer for a list of parameters."""
    configs = json.dumps([base.transformer, base.vae, base.scheduler.config, text_encoder], default=str)
    return Models(base, text_encoder, optimizer_bytes(make_optimizer), configs)


@lru_cache(maxsize=256)
def rehearse(phase: str, models: Models, settings: Settings) -> Phase:
    """Returns peak memory and FLOPs of one of PHASES."""
    return Phase(phase, *PHASES[phase](models, settings))


# ---- stand-ins -------------------------------------------------------------------------------------------------------


class MetaGenerator(torch.Generator):
    """A generator of the meta device, for which PyTorch has none; nothing is drawn from it."""

    device = META


def flash_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A GPU's attention, [B, S, heads, head size]: for meta tensors, PyTorch would choose the one that keeps scores."""
    return FLASH(*(tensor.transpose(1, 2) for tensor in (query, key, value)))[0].transpose(1, 2)


class FusedAttention(TorchFunctionMode):
    """A GPU's kernels for PyTorch's attention with a mask, which T5 uses."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return EFFICIENT(*args, attn_bias=kwargs["attn_mask"], compute_log_sumexp=False, scale=kwargs["scale"])[0]


class Autocast(TorchFunctionMode):
    """What `torch.autocast` does to the transformer's operators, for meta tensors.

    Products are computed in `dtype`, and on a GPU LayerNorms in float32. As in PyTorch, the cast of a weight is kept
    until the outermost `with` block is left.
    """

    PRODUCTS = (F.linear, F.conv2d, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.bmm)

    def __init__(self, dtype: torch.dtype, device_type: str):
        super().__init__()
        self.dtype = dtype
        self.in_float32 = (F.layer_norm,) if device_type == "cuda" else ()
        self.depth, self.weights = 0, {}

    def __enter__(self):
        self.depth += 1
        return super().__enter__()

    def __exit__(self, *error):
        self.depth -= 1
        if not self.depth:
            self.weights.clear()
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.PRODUCTS:
            args = [self._cast(value) for value in args]
        elif func in self.in_float32:
            args = [value.float() if isinstance(value, torch.Tensor) else value for value in args]
        return func(*args, **(kwargs or {}))

    def _cast(self, value):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(self.dtype)
        if value not in self.weights:
            self.weights[value] = value.to(self.dtype)
        return self.weights[value]

    def wrap(self, module: torch.nn.Module) -> None:
        """Lets the module's forward pass run in this mode, when it is recomputed as well."""
        forward = module.forward

        def in_autocast(*args, **options):
            with self:
                return forward(*args, **options)

        module.forward = in_autocast


def optimizer_bytes(make_optimizer: Callable, size: int = 2**14) -> OptimizerBytes:
    """Measures an optimizer on a small weight on the CPU; its kernels do not accept meta tensors."""
    weight = torch.nn.Parameter(torch.ones(size))
    optimizer = make_optimizer([weight])
    if type(optimizer).__module__.startswith("bitsandbytes"):  # mean and square in 8 bits, a float32 scale for each 256
        return OptimizerBytes(state=2 + 2 * 4 / 256, update=0)
    for _ in range(2):  # the first update makes the state
        weight.grad = torch.ones_like(weight)
        with Meter() as meter:
            optimizer.step()
    state = [value for value in tree_iter(dict(optimizer.state)) if isinstance(value, torch.Tensor) and value.ndim]
    return OptimizerBytes(bytes_of(state) / size, meter.peak / size)


def swapped_bytes(block: torch.nn.Module, settings: Settings) -> int:
    """Bytes by which swapping changes what the device holds: all swapped blocks share two slots there.

    On a CPU the swapped blocks stay in the same memory, and the slots come on top.
    """
    parts, size = swapping.layout(block)
    slots = size * min(2, settings.blocks_to_swap)
    if settings.device_type == "cpu":
        return slots
    return slots - settings.blocks_to_swap * bytes_of([part.tensor for part in parts])


# ---- models and tensors of a run, on the meta device -----------------------------------------------------------------


def _transformer(base: BaseModel, settings: Settings, num_layers: int):
    """Returns the transformer as training prepares it."""
    transformer = empty_transformer(base.transformer | {"num_layers": num_layers})
    if settings.lora:
        for weight in transformer.parameters():  # from_pretrained, too, leaves 2b's position table in float64
            weight.data = weight.data.to(settings.dtype)
        lora = settings.lora._replace(init_lora_weights="default")  # the first values do not matter
        with META:
            add_lora(transformer, lora, settings.dtype)
    compute.prepare(transformer, settings.gradient_checkpointing)
    if settings.attention_backend != "math":
        transformer.set_attn_processor(compute.AttentionByTokens(flash_attention))
    if settings.autocast:
        mode = Autocast(settings.dtype, settings.device_type)
        for module in (*transformer.transformer_blocks, transformer):
            mode.wrap(module)
    return transformer.train()


def _vae(base: BaseModel, settings: Settings, *, tiling: bool):
    vae = empty_vae(base.vae).to(settings.dtype).eval()
    encoders.set_tiling(vae, tiling=tiling, slicing=settings.enable_slicing)
    return vae


def _image_encoder(base: BaseModel, settings: Settings):
    """The VAE of image-to-video training, without its decoder; None for text-to-video."""
    if not base.takes_image:
        return None
    vae = _vae(base, settings, tiling=settings.tile_encoding)
    vae.decoder = None
    return vae


def _batch(base: BaseModel, settings: Settings) -> dict[str, torch.Tensor]:
    """A micro-batch from the cache."""
    config, count, dtype = base.transformer, settings.train_batch_size, settings.dtype
    shape = base.latent_shape(settings.max_num_frames, settings.height, settings.width)
    with META:
        batch = {
            "parameters": torch.empty(count, 2 * config["out_channels"], *shape, dtype=dtype),
            "prompt_embeds": torch.empty(count, config["max_text_seq_length"], config["text_embed_dim"], dtype=dtype),
        }
        if base.takes_image:
            batch["image"] = torch.empty(count, settings.height, settings.width, 3, dtype=torch.uint8)
        if settings.mask_preserve:
            batch["mask"] = torch.empty(count, *shape)
    return batch


def _transformer_input(base: BaseModel, settings: Settings, count: int) -> tuple[torch.Tensor, tuple | None]:
    """Returns noisy latents [B, f, c, h, w] and the rotary tables that go with them."""
    config, (f, h, w) = base.transformer, base.latent_shape(settings.max_num_frames, settings.height, settings.width)
    latents = torch.empty(count, f, config["in_channels"], h, w, dtype=settings.dtype, device=META)
    latents = pad_latent_frames(latents, config["patch_size_t"])
    return latents, rotary_embedding(base, latents.shape[1], h, w, META)


def _resident_bytes(models: Models, settings: Settings, transformer, image_encoder) -> int:
    """Returns the bytes that are held from the first update to the last."""
    trained = trained_parameters(transformer)
    resident = module_bytes(transformer) + swapped_bytes(transformer.transformer_blocks[0], settings)
    resident += round(models.optimizer.state * count_trained(transformer))
    resident += bytes_of(_transformer_input(models.base, settings, 1)[1])
    if settings.ema:
        resident += bytes_of(trained)
    if settings.num_processes > 1:  # the buckets of DDP
        resident += bytes_of(trained)
    return resident + (module_bytes(image_encoder) if image_encoder else 0)


def _with_all_layers(count: Callable[[int], dict[str, int]], num_layers: int) -> dict[str, int]:
    """Extrapolates the counts of a few layers to all."""
    if num_layers <= REHEARSED_LAYERS:
        return count(num_layers)
    fewer, more = count(REHEARSED_LAYERS - 1), count(REHEARSED_LAYERS)
    return {name: more[name] + (num_layers - REHEARSED_LAYERS) * (more[name] - fewer[name]) for name in more}


def count_trained_elements(models: Models, settings: Settings) -> int:
    def count(num_layers: int) -> dict[str, int]:
        return {"elements": count_trained(_transformer(models.base, settings, num_layers))}

    return _with_all_layers(count, models.base.transformer["num_layers"])["elements"]


# ---- phases ----------------------------------------------------------------------------------------------------------


def _text(models: Models, settings: Settings) -> tuple[int, int]:
    """Returns peak and FLOPs of T5."""
    if settings.text_encoder_device == "cpu" and settings.device_type != "cpu":
        return 0, 0
    length = models.base.transformer["max_text_seq_length"]

    def count(num_layers: int) -> dict[str, int]:
        model = empty_text_encoder(models.text_encoder | {"num_layers": num_layers}).eval()
        for name, weight in model.named_parameters():
            # Transformers keeps some of the weights in float32 where the others are in float16.
            kept = settings.dtype == torch.float16 and set(name.split(".")) & set(T5EncoderModel._keep_in_fp32_modules)
            weight.data = weight.data.to(torch.float32 if kept else settings.dtype)
        if settings.text_encoder_precision != "bf16":
            quantized.quantize_linears(model.encoder, settings.text_encoder_precision)
        with FusedAttention(), torch.no_grad(), Meter() as meter:
            model(torch.zeros(encoders.captions_at_once(length), length, dtype=torch.int64, device=META))
        return {"peak": module_bytes(model) + meter.peak, "flops": meter.flops}

    counted = _with_all_layers(count, models.text_encoder["num_layers"])
    return counted["peak"], counted["flops"]


def _clips(models: Models, settings: Settings) -> tuple[int, int]:
    """Returns peak and FLOPs of the VAE's encoder."""
    vae = _vae(models.base, settings, tiling=settings.tile_encoding)
    clip = settings.max_num_frames, settings.height, settings.width, 3
    at_once = 1 if settings.enable_slicing else encoders.clips_at_once(clip)
    with Meter() as meter:
        encoders.encode_videos(vae, torch.zeros(at_once, *clip, dtype=torch.uint8, device=META))
    return module_bytes(vae) + meter.peak, meter.flops


def _training(models: Models, settings: Settings) -> tuple[int, int]:
    """Returns peak and FLOPs of an update."""
    settings = settings.in_training
    counted = _with_all_layers(partial(_count_update, models, settings), models.base.transformer["num_layers"])
    resident, flops = counted.pop("resident"), counted.pop("flops")
    return resident + max(counted.values()), flops * settings.gradient_accumulation_steps


def _count_update(models: Models, settings: Settings, num_layers: int) -> dict[str, int]:
    """FLOPs of a micro-batch, and the peaks of its parts and of the update that follows.

    They are counted separately: each grows linearly with the number of blocks, and their maximum need not. Between the
    first two blocks and the last one, the backward pass has no peak of its own.
    """
    # A scheduler moves its tables to where the latents are.
    base = models.base._replace(scheduler=copy.deepcopy(models.base.scheduler))
    transformer, vae = _transformer(base, settings, num_layers), _image_encoder(base, settings)
    resident = _resident_bytes(models, settings, transformer, vae)
    trained = trained_parameters(transformer)
    if settings.gradients_in_forward:
        for weight in trained:
            weight.grad = torch.empty_like(weight)
        if settings.num_processes == 1:  # several have them in the buckets of DDP
            resident += bytes_of(trained)
    encode = partial(encoders.encode_images, vae) if vae else None
    batch, peaks, preserving = _batch(base, settings), {}, 0
    teacher = base_of(transformer)
    masking = Masking(preserve=settings.mask_preserve, teacher=teacher)
    if settings.preserve:
        with Meter() as meter:  # its peak is lower than that of the training loss, when gradients are there, too
            training_loss(base, transformer, batch, MetaGenerator(), settings.dtype, encode, teacher=teacher).backward()
        preserving = meter.flops // settings.preserve_every
    with Meter() as meter:

        def lap(part: str) -> None:
            peaks[part] = max(peaks.get(part, 0), meter.lap())

        parts = {0: "first block", 1: "second block", num_layers - 1: "last block"}
        _call_after_backward(transformer.transformer_blocks, lambda index: lap(parts.get(index, "other blocks")))
        transformer.register_forward_pre_hook(lambda *_: lap("conditioning"))
        loss = training_loss(base, transformer, batch, MetaGenerator(), settings.dtype, encode, masking=masking)
        lap("forward")
        loss.backward()
        lap("first block")
    peaks.pop("other blocks", None)
    update = meter.live + round(models.optimizer.update * max(weight.numel() for weight in trained))
    flops = meter.flops * (2 if settings.regularized else 1) + preserving
    return {**peaks, "update": update, "resident": resident, "flops": flops}


def _call_after_backward(blocks: torch.nn.ModuleList, call: Callable[[int], None]) -> None:
    """Calls `call(index)` when the backward pass has left a block whose input requires a gradient."""

    def watch(index: int, block, args: tuple, options: dict) -> None:
        hidden_states = options["hidden_states"] if options else args[0]
        if hidden_states.requires_grad:
            hidden_states.register_hook(lambda gradient: call(index))

    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(partial(watch, index), with_kwargs=True)


def _validation(models: Models, settings: Settings) -> tuple[int, int]:
    """Returns peak and FLOPs of a video: the sampler's steps, then the VAE's decoder."""
    base = models.base
    sampling = _with_all_layers(partial(_count_sampling, models, settings), base.transformer["num_layers"])
    vae = _vae(base, settings, tiling=settings.tile_decoding)
    shape = base.latent_shape(settings.max_num_frames, settings.height, settings.width)
    with torch.no_grad(), Meter() as decoding:
        vae.decode(torch.empty(1, base.transformer["out_channels"], *shape, dtype=settings.dtype, device=META))
    peak = sampling["resident"] + module_bytes(vae) + max(sampling["peak"], decoding.peak)
    return peak, NUM_INFERENCE_STEPS * sampling["flops"] + decoding.flops


def _count_sampling(models: Models, settings: Settings, num_layers: int) -> dict[str, int]:
    """One step of the sampler, which takes the video with and without its prompt together."""
    base, config, dtype = models.base, models.base.transformer, settings.dtype
    transformer = _transformer(base, settings, num_layers).eval()
    latents, rotary = _transformer_input(base, settings, 2)
    with META, torch.no_grad(), Meter() as meter:
        transformer(
            hidden_states=torch.empty_like(latents),
            encoder_hidden_states=torch.empty(2, config["max_text_seq_length"], config["text_embed_dim"], dtype=dtype),
            timestep=torch.zeros(2, dtype=torch.int64),
            ofs=ofs_of(base, dtype, META),
            image_rotary_emb=rotary,
        )
    resident = _resident_bytes(models, settings, transformer, _image_encoder(base, settings))
    return {"peak": meter.peak, "resident": resident, "flops": meter.flops}


PHASES = {"text": _text, "clips": _clips, "training": _training, "validation": _validation}
