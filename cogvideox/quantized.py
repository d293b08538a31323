"""Holds frozen weights in fewer bits: linear layers that dequantise their weight each time they use it.

O and I: output and input features of a layer.
"""

from collections.abc import Sequence
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

PRECISIONS = ("bf16", "fp8", "int8", "nf4")  # the first one: not quantised, in the dtype that is computed in
# Of the formats with a scale per output row: how the weights are kept, and the largest number that is used of it.
ROWS = {"fp8": (torch.float8_e4m3fn, 448.0), "int8": (torch.int8, 127.0)}
NF4_BLOCK, NF4_SCALES_BLOCK = 64, 256  # weights per scale, and scales per scale of these: QLoRA's, section 3


def check_packages(precision: str, option: str) -> None:
    """Looks for what a precision needs beside PyTorch.

    Raises:
        ValueError: this precision needs a package that is not there.
    """
    if precision == "nf4" and not find_spec("bitsandbytes"):
        raise ValueError(f"{option} nf4: needs bitsandbytes; pip install bitsandbytes, or take int8 or fp8")


def quantize_linears(module: torch.nn.Module, precision: str, device: torch.device | str | None = None) -> None:
    """Puts a `QuantizedLinear` in place of each linear layer within `module`, one after the other.

    Args:
        device: where they are quantised and stay (default: where they are). No more than one layer comes there whole.
    """
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is torch.nn.Linear:
                setattr(parent, name, QuantizedLinear(child.to(device), precision))


class QuantizedLinear(torch.nn.Linear):
    """A frozen linear layer that keeps its weight in 8 or 4 bits, and computes in the dtype that the weight had.

    The quantised weight and its scales are buffers, so they move with the module and nothing trains or broadcasts them;
    they are not part of its state, because a checkpoint holds what is trained alone.
    """

    def __init__(self, linear: torch.nn.Linear, precision: str):
        super(torch.nn.Linear, self).__init__()  # torch.nn.Linear would make a weight
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.precision = precision
        self.compute_dtype = linear.weight.dtype  # PEFT, too, reads it
        stored = quantize(linear.weight.detach(), precision)
        self.stored = tuple(stored)
        for name, tensor in stored.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.compute_dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        x, shape, stored = x.to(dtype), (self.out_features, self.in_features), [getattr(self, n) for n in self.stored]
        if x.requires_grad and torch.is_grad_enabled():
            return _FrozenLinear.apply(x, bias, self.precision, shape, *stored)
        # Not by the Function: where nothing needs a gradient, torch.compile of 2.13 miscounts its *arguments.
        return F.linear(x, dequantize(self.precision, shape, dtype, *stored), bias)

    def dequantized(self) -> torch.Tensor:
        """The weight that it computes with, [O, I]."""
        stored = [getattr(self, name) for name in self.stored]
        return dequantize(self.precision, (self.out_features, self.in_features), self.compute_dtype, *stored)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, precision={self.precision}"


class _FrozenLinear(torch.autograd.Function):
    """x W^T + b for a weight that needs no gradient: the backward pass dequantises it again instead of keeping it."""

    @staticmethod
    def forward(ctx, x, bias, precision, shape, *stored):
        ctx.precision, ctx.shape = precision, shape
        ctx.save_for_backward(*stored)
        return F.linear(x, dequantize(precision, shape, x.dtype, *stored), bias)

    @staticmethod
    def backward(ctx, gradient):
        stored = ctx.saved_tensors  # read once: recomputation gives them out no more often
        x_gradient = _input_gradient(gradient, ctx.precision, ctx.shape, stored)
        return x_gradient, None, None, None, *(None for _ in stored)


@torch.library.custom_op("cogvideox_lora::input_gradient", mutates_args=())
def _input_gradient(gradient: Tensor, precision: str, shape: Sequence[int], stored: Sequence[Tensor]) -> Tensor:
    """That of x, from that of the output: an operator that torch.compile does not look into.

    It would find the forward pass's dequantised weight in it, and keep that.
    """
    return gradient @ dequantize(precision, shape, gradient.dtype, *stored)


@_input_gradient.register_fake
def _(gradient, precision, shape, stored):
    return gradient.new_empty(*gradient.shape[:-1], shape[1])


# ---- the formats -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def quantize(weight: torch.Tensor, precision: str) -> dict[str, torch.Tensor]:
    """What is kept of a weight [O, I], by name; the first, "weight", is what holds its values."""
    return _quantize_nf4(weight) if precision == "nf4" else _quantize_rows(weight, *ROWS[precision])


def dequantize(precision: str, shape: Sequence[int], dtype: torch.dtype, *stored: torch.Tensor) -> torch.Tensor:
    """The weight [O, I] = `shape` in `dtype`, from what `quantize` gave; the one tensor of this size that is made."""
    if precision == "nf4":
        return _dequantize_nf4(shape, dtype, *stored)
    weight, scale = stored
    return weight.to(dtype).mul_(scale.to(dtype))


def _quantize_rows(weight: torch.Tensor, kept_as: torch.dtype, largest: float) -> dict[str, torch.Tensor]:
    """Each row divided by a scale [O, 1], so that the largest of its numbers becomes `largest`.

    The scale is rounded to the weight's dtype before it is used: what dequantises in that dtype then multiplies by the
    very number that was divided by.
    """
    scale = weight.abs().amax(dim=1, keepdim=True).float() / largest
    scale = scale.to(weight.dtype).clamp(min=torch.finfo(weight.dtype).tiny)  # of rows of zeros
    values = weight.float() / scale.float()
    if not kept_as.is_floating_point:
        values.round_()
    return {"weight": values.clamp_(-largest, largest).to(kept_as), "scale": scale}


def _quantize_nf4(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Dettmers et al. 2023 (arXiv:2305.14314), by bitsandbytes: 4 bits a weight, and scales in 8 bits.

    It gets a block per row: on a CPU, bitsandbytes 0.50.2 gives rows that are no whole blocks back with three times
    the error of nf4. Layers of CogVideoX are a multiple of 64 times a multiple of 32 wide.
    """
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(
        weight.reshape(-1, NF4_BLOCK), blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4"
    )
    scales = {"absmax": state.absmax, "code": state.code, "offset": state.offset}
    return {"weight": packed} | scales | {"nested_absmax": state.state2.absmax, "nested_code": state.state2.code}


def _dequantize_nf4(shape, dtype, packed, absmax, code, offset, nested_absmax, nested_code) -> torch.Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    nested = QuantState(nested_absmax, blocksize=NF4_SCALES_BLOCK, code=nested_code, dtype=torch.float32)
    blocks = torch.Size((shape[0] * shape[1] // NF4_BLOCK, NF4_BLOCK))
    state = QuantState(absmax, blocks, code, NF4_BLOCK, "nf4", dtype, offset, nested)
    return dequantize_4bit(packed, state).view(shape)
