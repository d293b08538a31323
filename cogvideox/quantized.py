"""Quantised frozen weights: linear layers that keep fewer bits and dequantise their weight whenever they use it.

Shapes: O output and I input features of a layer.
"""

from collections.abc import Sequence
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

PRECISIONS = ("bf16", "fp8", "int8", "nf4")  # bf16: not quantised, in the compute dtype
# Formats with a scale per output row: the dtype of the weights, and the largest of its values that is used.
ROWS = {"fp8": (torch.float8_e4m3fn, 448.0), "int8": (torch.int8, 127.0)}
NF4_BLOCK, NF4_SCALES_BLOCK = 64, 256  # weights per scale, and scales per scale of these: QLoRA's, section 3


def check_packages(precision: str, option: str) -> None:
    """Raises ValueError for a precision whose package is not installed, with the command that installs it."""
    if precision == "nf4" and not find_spec("bitsandbytes"):
        raise ValueError(f"{option} nf4: needs bitsandbytes; pip install bitsandbytes, or take int8 or fp8")


def quantize_linears(module: torch.nn.Module, precision: str, device: torch.device | str | None = None) -> None:
    """Replaces each linear layer within `module` by a `QuantizedLinear`, one by one.

    Args:
        device: where they are quantised and stay (default: where they are). It holds at most one layer unquantised.
    """
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is torch.nn.Linear:
                setattr(parent, name, QuantizedLinear(child.to(device), precision))


class QuantizedLinear(torch.nn.Linear):
    """A frozen linear layer that keeps its weight in 8 or 4 bits, and computes in the dtype that the weight had.

    The quantised weight and its scales are buffers, so they move with the module and nothing trains or broadcasts them;
    they are not in its state dict, because a checkpoint holds only what is trained.
    """

    def __init__(self, linear: torch.nn.Linear, precision: str):
        super(torch.nn.Linear, self).__init__()  # torch.nn.Linear's own would allocate a weight
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.precision = precision
        self.compute_dtype = linear.weight.dtype  # PEFT reads it, too
        stored = quantize(linear.weight.detach(), precision)
        self.stored = tuple(stored)
        for name, tensor in stored.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        autocast = kind != "meta" and torch.is_autocast_enabled(kind)  # which raises for meta
        dtype = torch.get_autocast_dtype(kind) if autocast else self.compute_dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        x, shape = x.to(dtype), (self.out_features, self.in_features)
        stored = [getattr(self, name) for name in self.stored]
        if x.requires_grad and torch.is_grad_enabled():
            return _FrozenLinear.apply(x, bias, self.precision, shape, *stored)
        # Without the Function: where nothing needs a gradient, torch.compile of 2.13 miscounts its *arguments.
        return F.linear(x, dequantize(self.precision, shape, dtype, *stored), bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, precision={self.precision}"


class _FrozenLinear(torch.autograd.Function):
    """x W^T + b for a frozen weight, which the backward pass dequantises again instead of keeping it."""

    @staticmethod
    def forward(ctx, x, bias, precision, shape, *stored):
        ctx.precision, ctx.shape = precision, shape
        ctx.save_for_backward(*stored)
        return F.linear(x, dequantize(precision, shape, x.dtype, *stored), bias)

    @staticmethod
    def backward(ctx, gradient):
        stored = ctx.saved_tensors  # under recomputation they can be read only once
        x_gradient = _input_gradient(gradient, ctx.precision, ctx.shape, stored)
        return x_gradient, None, None, None, *(None for _ in stored)


@torch.library.custom_op("cogvideox_lora::input_gradient", mutates_args=())
def _input_gradient(gradient: Tensor, precision: str, shape: Sequence[int], stored: Sequence[Tensor]) -> Tensor:
    """Gradient of the input from the gradient of the output, as an operator that torch.compile does not trace into.

    Otherwise it would reuse the forward pass's dequantised weight, and keep that in memory until then.
    """
    return gradient @ dequantize(precision, shape, gradient.dtype, *stored)


@_input_gradient.register_fake
def _(gradient, precision, shape, stored):
    return gradient.new_empty(*gradient.shape[:-1], shape[1])


INPUT_GRADIENT = torch.ops.cogvideox_lora.input_gradient


@torch.no_grad()
def quantize(weight: torch.Tensor, precision: str) -> dict[str, torch.Tensor]:
    """Returns the tensors that a weight [O, I] is kept as, by name; the first, "weight", holds its values."""
    return _quantize_nf4(weight) if precision == "nf4" else _quantize_rows(weight, *ROWS[precision])


def dequantize(precision: str, shape: Sequence[int], dtype: torch.dtype, *stored: torch.Tensor) -> torch.Tensor:
    """Returns the weight, [O, I] = `shape`, from what `quantize` returned; allocates nothing else of its size."""
    if precision == "nf4":
        return _dequantize_nf4(shape, dtype, *stored)
    weight, scale = stored
    return weight.to(dtype).mul_(scale.to(dtype))


def _quantize_rows(weight: torch.Tensor, kept_as: torch.dtype, largest: float) -> dict[str, torch.Tensor]:
    """Divides each row by a scale, [O, 1], so that its largest element becomes `largest`.

    The scale is rounded to the weight's dtype before it is used, so that dequantising in that dtype multiplies by
    exactly the divisor.
    """
    scale = weight.abs().amax(dim=1, keepdim=True).float() / largest
    scale = scale.to(weight.dtype).clamp(min=torch.finfo(weight.dtype).tiny)  # rows of zeros have no scale
    values = weight.float() / scale.float()
    if not kept_as.is_floating_point:
        values.round_()
    return {"weight": values.clamp_(-largest, largest).to(kept_as), "scale": scale}


def _quantize_nf4(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Quantises to 4 bits with 8-bit scales by bitsandbytes (Dettmers et al. 2023, arXiv:2305.14314).

    The weight is passed as one block per row: on a CPU, bitsandbytes 0.50.2 has three times the error of nf4 in rows
    that are not whole blocks. Every weight of CogVideoX has a multiple of 64 x 32 elements.
    """
    if weight.is_meta:
        return _empty_nf4(weight.numel())
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(
        weight.reshape(-1, NF4_BLOCK), blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4"
    )
    scales = {"absmax": state.absmax, "code": state.code, "offset": state.offset}
    return {"weight": packed} | scales | {"nested_absmax": state.state2.absmax, "nested_code": state.state2.code}


def _empty_nf4(count: int) -> dict[str, torch.Tensor]:
    """Returns empty tensors like those of `_quantize_nf4`, on the meta device, which bitsandbytes does not support."""
    blocks = -(-count // NF4_BLOCK)
    with torch.device("meta"):
        return {
            "weight": torch.empty(count // 2, 1, dtype=torch.uint8),
            "absmax": torch.empty(blocks, dtype=torch.uint8),
            "code": torch.empty(16),
            "offset": torch.empty(()),
            "nested_absmax": torch.empty(-(-blocks // NF4_SCALES_BLOCK)),
            "nested_code": torch.empty(256),
        }


def _dequantize_nf4(shape, dtype, packed, absmax, code, offset, nested_absmax, nested_code) -> torch.Tensor:
    if packed.is_meta:
        return torch.empty(shape, dtype=dtype, device="meta")
    from bitsandbytes.functional import QuantState, dequantize_4bit

    nested = QuantState(nested_absmax, blocksize=NF4_SCALES_BLOCK, code=nested_code, dtype=torch.float32)
    blocks = torch.Size((shape[0] * shape[1] // NF4_BLOCK, NF4_BLOCK))
    state = QuantState(absmax, blocks, code, NF4_BLOCK, "nf4", dtype, offset, nested)
    return dequantize_4bit(packed, state).view(shape)
