"""How the transformer computes: what it keeps for the backward pass, with which attention kernel, compiled or not.

No choice changes the result beyond rounding; tests compare each of them with the plain float32 step.
"""

import argparse
import contextlib
import importlib
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import apply_rotary_emb
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from cogvideox import swapping
from files import at_least

LEVELS = ("none", "attention", "full")  # of recomputation: nothing, all except attention outputs, whole blocks
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}
# The operators that attention becomes once PyTorch has chosen a kernel. Their outputs are a fourteenth of what a block
# keeps without recomputation, and take most of its time.
ATTENTION = (
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


class Options(NamedTuple):
    """The training script's options of these names, which hold in every phase of a run."""

    attention_backend: str = "auto"
    compile: bool = False
    blocks_to_swap: int = 0
    base_precision: str = "bf16"


PLAIN = Options()


def options_of(args: argparse.Namespace) -> Options:
    return Options(**{name: getattr(args, name) for name in Options._fields})


def add_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument_group("speed and memory").add_argument
    recomputed = (
        "activations to recompute in the backward pass: none, all except attention outputs (attention), all (full), or "
        "what fits (auto)"
    )
    levels = {"nargs": "?", "const": "full", "default": "none", "choices": [*LEVELS, "auto"]}
    option("--gradient_checkpointing", **levels, help=recomputed)
    compiled = "compile the blocks: the first update takes minutes, later ones less time than without"
    option("--compile", action="store_true", help=compiled)
    backends = {"default": "auto", "choices": ["auto", *BACKENDS, "flash3"]}
    backend = "attention kernel in training; auto: PyTorch's choice; flash3 needs the package flash_attn_3"
    option("--attention_backend", **backends, help=backend)
    checks = "compare two blocks with diffusers' and PEFT's own code before the run; auto: on a GPU"
    option("--self_check", default="auto", choices=["auto", "always", "never"], help=checks)
    swapped = "blocks whose frozen weights are in CPU memory, except the two in use; 0: none"
    option("--blocks_to_swap", type=at_least(0), default=0, metavar="N", help=swapped)


def check_options(args: argparse.Namespace, refuse: Callable[[str], None]) -> None:
    """Refuses combinations that cannot work; `refuse` ends the program with a message."""
    level, backend = args.gradient_checkpointing, args.attention_backend
    if level == "attention" and "attention" not in possible_levels(backend):
        refuse(
            f"--gradient_checkpointing attention: {backend} attention has no output that could be kept; pass "
            "--gradient_checkpointing full, or another --attention_backend"
        )
    if args.compile and backend == "flash3":
        refuse("--compile: cannot compile --attention_backend flash3; leave one of the two out")
    if args.blocks_to_swap and args.training_type == "sft":
        refuse("--blocks_to_swap: swaps frozen weights, of which --training_type sft has none; leave it out")
    if args.blocks_to_swap and level == "none":
        refuse(
            f"--blocks_to_swap {args.blocks_to_swap}: without recomputation the backward pass would need all weights "
            "at once; pass --gradient_checkpointing full, attention or auto, too"
        )


def possible_levels(backend: str, blocks_to_swap: int = 0) -> list[str]:
    """Returns the levels of recomputation that go with an attention backend and swapped blocks, the fastest first."""
    impossible = set()
    if backend in ("math", "flash3"):  # their output is not that of one of the operators in ATTENTION
        impossible.add("attention")
    if blocks_to_swap:  # the backward pass would need all weights at once
        impossible.add("none")
    return [level for level in LEVELS if level not in impossible]


def describe(level: str, options: Options, dtype: torch.dtype, device: torch.device) -> str:
    """Says in one line how a run computes; `level` is one of LEVELS."""
    recomputed = {"none": "nothing", "attention": "all except attention outputs", "full": "every block"}
    parts = [f"computed in {str(dtype).removeprefix('torch.')}", f"{recomputed[level]} recomputed in the backward pass"]
    if options.base_precision != "bf16":
        parts.append(f"frozen weights in {options.base_precision}")
    if options.blocks_to_swap:
        gain = ""
        if device.type == "cpu":
            gain = " (which saves nothing without a GPU)"
        elif options.blocks_to_swap <= 2:
            gain = " (which saves nothing: two blocks have a place on the GPU)"
        parts.append(f"{options.blocks_to_swap} blocks swapped{gain}")
    if options.compile:
        parts.append("compiled (the first update takes minutes)")
    if options.attention_backend != "auto":
        parts.append(f"{options.attention_backend} attention")
    return ", ".join(parts)


def ways_of_its_own(options: Options, level: str) -> list[str]:
    """Returns the options in use that make a run compute in another way than it would without them."""
    in_use = {
        "--compile": options.compile,
        f"--attention_backend {options.attention_backend}": options.attention_backend != "auto",
        f"--base_precision {options.base_precision}": options.base_precision != "bf16",
        f"--blocks_to_swap {options.blocks_to_swap}": bool(options.blocks_to_swap),
        f"--gradient_checkpointing {level}": level == "attention",
    }
    return [option for option, is_used in in_use.items() if is_used]


def check_possible(config: dict, options: Options, dtype: torch.dtype, device: torch.device | None) -> None:
    """Raises ValueError for what the transformer with this config, or the device, cannot do.

    Args:
        device: None for a device of another machine, whose kernels cannot be tried here.
    """
    if options.blocks_to_swap > config["num_layers"]:
        raise ValueError(
            f"--blocks_to_swap {options.blocks_to_swap}: the transformer has {config['num_layers']}; pass at most that"
        )
    if device is None:
        return
    if options.compile and options.base_precision == "fp8" and device.type == "cuda":
        check_fp8_kernels(torch.cuda.get_device_capability(device))
    check_attention(options.attention_backend, device, dtype, config["attention_head_dim"])


def check_fp8_kernels(capability: tuple[int, int]) -> None:
    """Raises ValueError for compiled fp8 on GPUs before Ada: Triton (3.6, with torch 2.11) cannot read it there."""
    if capability < (8, 9):
        raise ValueError(
            "--base_precision fp8: compiled kernels have no fp8 on this GPU (compute capability "
            f"{capability[0]}.{capability[1]}; it needs 8.9 or later); pass int8, or leave --compile out"
        )


def prepare(
    transformer: CogVideoXTransformer3DModel, level: str, options: Options = PLAIN, device: torch.device | None = None
) -> None:
    """Sets how the blocks compute; `level` is one of LEVELS, `device` is where swapped blocks are copied to."""
    assert level != "none" or not options.blocks_to_swap, "a swapped block is overwritten before the backward pass"
    # diffusers 0.42.1 makes the sin-cos table of any size but the model's default in every forward pass.
    embed = transformer.patch_embed
    embed._get_positional_embeddings = lru_cache(maxsize=32)(embed._get_positional_embeddings)
    transformer.set_attn_processor(AttentionByTokens(attention_function(options.attention_backend)))
    if level == "attention":
        kept = partial(create_selective_checkpoint_contexts, list(ATTENTION))
        transformer.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, context_fn=kept))
    elif level == "full":
        transformer.enable_gradient_checkpointing()
    if options.compile:
        if level == "attention":
            # The first block's input needs no gradient. Where its attention needs none either, Inductor reuses the
            # memory of attention's output, which the backward pass still reads: wrong gradients, no error.
            embed.register_forward_hook(lambda module, args, output: output.requires_grad_(torch.is_grad_enabled()))
        # Splitting graphs into DDP's buckets fails under selective checkpointing (torch 2.11, 2.13), and is not needed:
        # each block is a graph of its own.
        torch._dynamo.config.optimize_ddp = False
        # The blocks differ only in their weights, so that two compilations serve all of them in training: one for the
        # first block, whose input may need no gradient. They are repeated for each shape of a batch, for dynamic shapes
        # would be slower, and PyTorch's limit of 8 is too low for that.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for block in transformer.transformer_blocks:
            block.forward = torch.compile(block.forward, dynamic=False)  # without hooks, which swap and shard weights
    if options.blocks_to_swap:
        swapping.swap(transformer.transformer_blocks, options.blocks_to_swap, device)


def attention_kernel(backend: str) -> contextlib.AbstractContextManager:
    """Restricts PyTorch's attention to this kernel for the length of a `with` block; does nothing for the others."""
    return sdpa_kernel(BACKENDS[backend]) if backend in BACKENDS else contextlib.nullcontext()


def check_attention(backend: str, device: torch.device, dtype: torch.dtype, head_size: int) -> None:
    """Runs the attention kernel once, forward and backward, on one token; raises ValueError if there is none."""
    attention = AttentionByTokens(attention_function(backend))
    query = torch.zeros(1, 16, 1, head_size, device=device, dtype=dtype, requires_grad=True)
    try:
        with attention_kernel(backend):
            attention.attend(query, query, query).sum().backward()
    except RuntimeError as error:
        raise ValueError(
            f"--attention_backend {backend}: {device} has no such kernel for {dtype} and heads of {head_size}; "
            "pass auto, which takes the best one available"
        ) from error


def attention_function(backend: str) -> Callable:
    """Returns attention for [B, S, heads, head size]; flash3: FlashAttention-3, Shah et al. 2024 (arXiv:2407.08608)."""
    if backend != "flash3":
        return scaled_dot_product
    try:
        return importlib.import_module("flash_attn_interface").flash_attn_func
    except ImportError as error:
        raise ValueError(
            "--attention_backend flash3: needs flash_attn_3, which cannot be imported; pip install flash_attn_3 "
            "(Hopper GPUs), or pass auto"
        ) from error


def scaled_dot_product(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """PyTorch's attention for [B, S, heads, head size]. Its kernels take any strides, and return the query's."""
    return F.scaled_dot_product_attention(*(tensor.transpose(1, 2) for tensor in (query, key, value))).transpose(1, 2)


class AttentionByTokens:
    """diffusers' attention processor for CogVideoX, with the features of a token contiguous throughout.

    diffusers 0.42.1 moves heads before tokens first. LayerNorm then copies queries and keys in the forward pass and
    their gradients in the backward pass; attention's output is copied too, and kept twice where `to_out` has a LoRA.
    """

    def __init__(self, attention: Callable = scaled_dot_product):
        self.attention = attention

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        """Returns the attended video tokens and text tokens, in the shapes of the input."""
        num_text = encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)  # [B, S, D]
        query, key, value = (
            projection(tokens).unflatten(2, (attn.heads, -1)) for projection in (attn.to_q, attn.to_k, attn.to_v)
        )  # [B, S, heads, head size]
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (self._rotated(tensor, num_text, image_rotary_emb) for tensor in (query, key))
        tokens = attn.to_out[1](attn.to_out[0](self.attend(query, key, value).flatten(2)))
        return tokens[:, num_text:], tokens[:, :num_text]

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attends, for [B, S, heads, head size], in the value's dtype."""
        # Under autocast the norms return float32 queries and keys, which FlashAttention-3 does not take.
        attended = self.attention(query.to(value.dtype), key.to(value.dtype), value)
        # Older versions of FlashAttention-3 return the log-sum-exp, too.
        return attended[0] if isinstance(attended, tuple) else attended

    @staticmethod
    def _rotated(tensor, num_text, tables):
        text, video = tensor[:, :num_text], tensor[:, num_text:]
        return torch.cat([text, apply_rotary_emb(video, tables, sequence_dim=1)], dim=1)
