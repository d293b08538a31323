"""How the transformer computes: what it keeps for the way back, by which attention kernel, compiled or not.

None of it changes what is computed beyond rounding; tests hold every choice to the plain float32 step.
"""

import argparse
import contextlib
import importlib
from collections.abc import Callable
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import apply_rotary_emb
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from cogvideox import swapping
from files import at_least

LEVELS = ("none", "attention", "full")  # of recomputation: nothing, all but attention's outputs, every block
BACKEND_HELP = "kernel of attention while training; auto: PyTorch chooses; flash3 needs flash_attn_3"
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
# What attention is once PyTorch has chosen its kernel. Their outputs are a fourteenth of what a block
# keeps without recomputation, and most of its time.
ATTENTION = (
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def add_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument_group("speed and memory").add_argument
    option(
        "--gradient_checkpointing", nargs="?", const="full", default="none", choices=[*LEVELS, "auto"],
        help="recompute on the way back: nothing, all but attention's outputs, all of a block, or what memory asks for",
    )  # fmt: skip
    option("--compile", action="store_true", help="compile the blocks: some minutes at the start, then quicker steps")
    option("--attention_backend", choices=["auto", *BACKENDS, "flash3"], default="auto", help=BACKEND_HELP)
    swapped = "blocks whose frozen weights lie in main memory, all but two at a time; 0: none"
    option("--blocks_to_swap", type=at_least(0), default=0, metavar="N", help=swapped)


def check_options(args: argparse.Namespace, refuse: Callable[[str], None]) -> None:
    """Refuses combinations that cannot work; `refuse` ends the program with a message."""
    level, backend = args.gradient_checkpointing, args.attention_backend
    if level == "attention" and backend in ("math", "flash3"):
        refuse(
            f"--gradient_checkpointing attention: {backend} attention has no output that could be kept apart; pass "
            "--gradient_checkpointing full, or another --attention_backend"
        )
    if args.compile and backend == "flash3":
        refuse("--compile: cannot see into --attention_backend flash3; leave one of the two out")
    if args.blocks_to_swap and args.training_type == "sft":
        refuse("--blocks_to_swap: swaps frozen weights, of which --training_type sft has none; leave it out")
    if args.blocks_to_swap and level == "none":
        refuse(
            f"--blocks_to_swap {args.blocks_to_swap}: without recomputation the backward pass would need all weights "
            "at once; pass --gradient_checkpointing full, attention or auto, too"
        )


def describe(args: argparse.Namespace, dtype: torch.dtype, level: str, device: torch.device) -> str:
    """How a run of these options computes, in one line; `level` is what --gradient_checkpointing came to."""
    kept = {"none": "nothing", "attention": "all but attention", "full": "every block"}
    parts = [f"computed in {str(dtype).removeprefix('torch.')}", f"{kept[level]} computed again on the way back"]
    parts += [f"frozen weights in {args.base_precision}"] * (args.base_precision != "bf16")
    gain = " (which saves nothing without a GPU)" * (device.type == "cpu")
    parts += [f"{args.blocks_to_swap} blocks swapped{gain}"] * (args.blocks_to_swap > 0)
    parts += ["compiled (the first update takes minutes)"] * args.compile
    parts += [f"{args.attention_backend} attention"] * (args.attention_backend != "auto")
    return ", ".join(parts)


def check_possible(args: argparse.Namespace, config: dict, dtype: torch.dtype, device: torch.device) -> None:
    """Refuses what this transformer or device cannot do.

    Args:
        config: of the transformer.

    Raises:
        ValueError: with what to pass instead.
    """
    if args.blocks_to_swap > config["num_layers"]:
        raise ValueError(
            f"--blocks_to_swap {args.blocks_to_swap}: the transformer has {config['num_layers']}; pass at most that"
        )
    if args.compile and args.base_precision == "fp8" and device.type == "cuda":
        check_fp8_kernels(torch.cuda.get_device_capability(device))
    check_attention(args.attention_backend, device, dtype, config["attention_head_dim"])


def check_fp8_kernels(capability: tuple[int, int]) -> None:
    """Compiled kernels read fp8 themselves, by Triton (3.6, of torch 2.11), which has it for Ada and later GPUs."""
    if capability < (8, 9):
        raise ValueError(
            "--base_precision fp8: compiled kernels of this GPU have no fp8 (compute capability "
            f"{capability[0]}.{capability[1]}, 8.9 is the first that has); pass int8, or leave --compile out"
        )


def prepare(
    transformer: CogVideoXTransformer3DModel,
    level: str,
    *,
    compiled: bool = False,
    backend: str = "auto",
    blocks_to_swap: int = 0,
    device: torch.device | None = None,
) -> None:
    """Sets how the blocks compute.

    Args:
        level: one of LEVELS; the others are those of the options.
        device: that the blocks compute on, for those that are swapped.
    """
    assert level != "none" or not blocks_to_swap, "a place holds another block by the time of the backward pass"
    # diffusers 0.42.1 makes the sin-cos table of any size but the checkpoint's own in every forward pass.
    embed = transformer.patch_embed
    embed._get_positional_embeddings = lru_cache(maxsize=32)(embed._get_positional_embeddings)
    transformer.set_attn_processor(AttentionByTokens(flash3() if backend == "flash3" else scaled_dot_product))
    if level == "attention":
        kept = partial(create_selective_checkpoint_contexts, list(ATTENTION))
        transformer.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, context_fn=kept))
    elif level == "full":
        transformer.enable_gradient_checkpointing()
    if compiled:
        if level == "attention":
            # The first block's input needs no gradient. Where its attention does not either, Inductor would put other
            # things into the memory of attention's output, which is kept for the way back: wrong gradients, no error.
            embed.register_forward_hook(lambda module, args, output: output.requires_grad_(torch.is_grad_enabled()))
        # DDP's splitting of graphs into its buckets fails under selective checkpointing (torch 2.11, 2.13), and a block
        # is a graph of its own.
        torch._dynamo.config.optimize_ddp = False
        # Two compilations serve all blocks while training, which differ in their weights alone: one is for the first,
        # if its input needs no gradient. They are repeated for every shape of a batch, whereas shapes left open would
        # cost speed, and 8 is all that PyTorch allows by itself.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        for block in transformer.transformer_blocks:
            block.forward = torch.compile(block.forward, dynamic=False)  # without hooks, which swap and shard weights
    if blocks_to_swap:
        swapping.swap(transformer.transformer_blocks, blocks_to_swap, device)


def attention_kernel(backend: str) -> contextlib.AbstractContextManager:
    """PyTorch's attention takes this kernel and no other, for the length of a `with` block."""
    return sdpa_kernel(BACKENDS[backend]) if backend in BACKENDS else contextlib.nullcontext()


def check_attention(backend: str, device: torch.device, dtype: torch.dtype, head_size: int) -> None:
    """Tries the kernel.

    Raises:
        ValueError: the hardware has none for `dtype` and heads of `head_size`, or its package is missing.
    """
    attention = AttentionByTokens(flash3() if backend == "flash3" else scaled_dot_product)
    query = torch.zeros(1, 16, 1, head_size, device=device, dtype=dtype, requires_grad=True)
    try:
        with attention_kernel(backend):
            attention.attend(query, query, query).sum().backward()
    except RuntimeError as error:
        raise ValueError(
            f"--attention_backend {backend}: {device} has no such kernel for {dtype} and heads of {head_size}; "
            "pass auto, which takes the best that there is"
        ) from error


def flash3():
    """The kernel of FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608), for [B, S, heads, head size].

    Raises:
        ValueError: its package is missing.
    """
    try:
        return importlib.import_module("flash_attn_interface").flash_attn_func
    except ImportError as error:
        raise ValueError(
            "--attention_backend flash3: needs flash_attn_3, which cannot be imported; pip install flash_attn_3 "
            "(Hopper GPUs), or pass auto"
        ) from error


def scaled_dot_product(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """PyTorch's attention, for [B, S, heads, head size]; its kernels take any strides, and give those of the query."""
    return F.scaled_dot_product_attention(*(tensor.transpose(1, 2) for tensor in (query, key, value))).transpose(1, 2)


class AttentionByTokens:
    """diffusers' attention of CogVideoX, with the numbers of a token side by side from projection to projection.

    diffusers 0.42.1 puts heads before tokens first. LayerNorm, there and back, then copies queries, keys and their
    gradients, and what comes out of attention is copied once more, and kept twice where the last projection has a LoRA.
    """

    def __init__(self, attention: Callable = scaled_dot_product):
        self.attention = attention

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        """Attended video tokens and text tokens, each as it came in."""
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
        """For [B, S, heads, head size]. Under autocast norms give float32, which FlashAttention-3 does not take."""
        attended = self.attention(query.to(value.dtype), key.to(value.dtype), value)
        # Older versions of FlashAttention-3 give the logarithms of the sums, too.
        return attended[0] if isinstance(attended, tuple) else attended

    @staticmethod
    def _rotated(tensor, num_text, tables):
        text, video = tensor[:, :num_text], tensor[:, num_text:]
        return torch.cat([text, apply_rotary_emb(video, tables, sequence_dim=1)], dim=1)
