"""Compares how the transformer's blocks compute in this run with diffusers' and PEFT's own code, before a run.

A block is called as training calls it: on this device, in this dtype, with this attention kernel, recomputation,
quantisation, compilation and swapping, on inputs that the transformer itself gives it. The plain block is diffusers',
with PEFT's own LoRA layers and weights that are read from the base model's files again. Both are measured against the
plain block in a wider dtype, outputs and gradients alike.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from cogvideox import quantized
from cogvideox.base_model import BaseModel, empty_transformer
from cogvideox.lora import Lora

MOST_ERROR = 2.0  # of the run's own path, relative to that of the plain one
ROUNDING = 1e-6  # relative error that no path is blamed for
LARGEST_SCORES = 2**30  # bytes of attention scores in float64, above which float32 has to be the wider dtype of float32
FLOAT32_ERROR = 1e-4  # relative error in float32, where nothing wider is there to measure the plain path


class Compared(NamedTuple):
    """The relative errors of a block's output, of a gradient, or of a weight as it is held."""

    block: int
    what: str  # "output", "text output", a weight, or "gradient of" one
    error: float  # of the run's own path
    plain_error: float  # of diffusers' and PEFT's

    @property
    def is_wrong(self) -> bool:
        if self.plain_error > 1:  # such as the gradient of keys' biases, which is 0 but for rounding
            return not isfinite(self.error)
        return not self.error <= max(MOST_ERROR * self.plain_error, ROUNDING)


class Report(NamedTuple):
    compared: list[Compared]
    seconds: float

    def as_json(self) -> dict:
        worst = max(self.compared, key=lambda one: one.error / max(one.plain_error, ROUNDING))
        return {
            "compared": len(self.compared),
            "wrong": [f"block {one.block}, {one.what}" for one in self.compared if one.is_wrong],
            "worst": worst._asdict(),
            "seconds": round(self.seconds, 2),
        }

    def refusal(self, options: list[str]) -> str:
        """Returns what is wrong, and the options that make this run compute in a way of its own."""
        wrong = [one for one in self.compared if one.is_wrong]
        first = max(wrong, key=lambda one: one.error / max(one.plain_error, ROUNDING))
        in_turn = ", one after the other," if len(options) > 1 else ""
        leave = f"leave out {', '.join(options)}{in_turn} or " if options else ""
        remedy = f"{leave}train all the same with --self_check never"
        return (
            f"--self_check: block {first.block} computes something else here than diffusers and PEFT do: the relative "
            f"error of its {first.what} is {first.error:.2g}, where theirs is {first.plain_error:.2g} ({len(wrong)} of "
            f"{len(self.compared)} outputs, gradients and weights are wrong); {remedy}"
        )


def check(
    base: BaseModel,
    transformer,
    lora: Lora | None,
    forward: Callable[[], object],
    *,
    dtype: torch.dtype,
    autocast: bool,
    attention: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Report:
    """Compares the first and the middle block.

    Args:
        lora: kind of the LoRA; None where all weights are trained.
        forward: runs the transformer once on inputs of the run.
        dtype: compute dtype.
        autocast: whether the run computes under autocast.
        attention: context in which training calls the transformer.
    """
    begin, compared = time.perf_counter(), []
    blocks = transformer.transformer_blocks
    numbers = sorted({0, len(blocks) // 2})
    inputs = _inputs_of(blocks, numbers, forward)
    for number in numbers:
        block, device = blocks[number], inputs[number][0].device
        with _comparable(block, number), _autocast(device, dtype, autocast), attention():
            own = _computed(partial(_called, transformer, block), block, inputs[number])
            state, held = _state_of(base, block, number, lora, dtype), _weights_of(block)
        plain = _plain_block(base, lora, state, device)
        with _autocast(device, dtype, autocast):
            theirs = _computed(plain, plain, inputs[number])
        del plain
        wide = _wider(dtype, inputs[number], base)
        exact_block = _plain_block(base, lora, {name: value.to(wide) for name, value in state.items()}, device).to(wide)
        with torch.autograd.graph.save_on_cpu():  # they could take more than an update does
            exact = _computed(exact_block, exact_block, [_cast(value, wide) for value in inputs[number]])
        compared += _compare(number, own, theirs, exact, is_wider=wide != dtype)
        compared += [
            Compared(number, name, _relative_error(held[name], weight), 0.0)
            for name, weight in state.items()
            if weight.ndim > 1
        ]
    return Report(compared, time.perf_counter() - begin)


def _inputs_of(blocks, numbers: list[int], forward: Callable[[], object]) -> dict[int, list]:
    """Returns hidden states, text, time embedding and rotary tables that the transformer gives to some blocks.

    Hidden states and text require gradients where they do in training: in the first block they need not, and a compiled
    block is then another one.
    """
    inputs = {}

    def keep(number: int, block, args: tuple, options: dict) -> None:
        names = ("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb")
        hidden, text, *others = args[:4] if args else [options[name] for name in names]
        needed = [number > 0 or value.requires_grad for value in (hidden, text)]
        hidden, text = (value.detach().requires_grad_(need) for value, need in zip((hidden, text), needed))
        inputs[number] = [hidden, text, *others]
        torch.set_grad_enabled(False)  # all that follows would keep its activations

    hooks = [blocks[n].register_forward_pre_hook(partial(keep, n), with_kwargs=True) for n in numbers]
    try:
        # Not compiled: without gradients it would be another compilation, which takes minutes.
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


@contextlib.contextmanager
def _comparable(block, number: int) -> Iterator[None]:
    """Gives a LoRA's B values, and leaves out dropout, for the length of a `with` block.

    B starts as zeros, in which no error could be seen, and each pass would drop out others.
    """
    generator, before = torch.Generator().manual_seed(number), {}
    for name, weight in block.named_parameters():
        if "lora_B" in name:
            before[name] = weight.data.clone()
            weight.data += 0.02 * torch.randn(weight.shape, generator=generator).to(weight.device, weight.dtype)
    dropouts = [module for module in block.modules() if isinstance(module, torch.nn.Dropout) and module.p]
    for module in dropouts:
        module.eval()
    try:
        yield
    finally:
        for module in dropouts:
            module.train()
        for name, weight in block.named_parameters():
            if name in before:
                weight.data = before[name]


def _autocast(device: torch.device, dtype: torch.dtype, enabled: bool):
    return torch.autocast(device.type, dtype) if enabled and dtype != torch.float32 else contextlib.nullcontext()


def _called(transformer, block, *inputs):
    """Calls a block as the transformer does in training."""
    if transformer.gradient_checkpointing:
        return transformer._gradient_checkpointing_func(block, *inputs, None)
    names = ("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb")
    return block(**dict(zip(names, inputs)))


def _computed(call: Callable, block, inputs: list) -> dict[str, torch.Tensor]:
    """Returns a block's outputs, and the gradients for a fixed random gradient of the outputs."""
    outputs = call(*inputs)
    trained = {name: weight for name, weight in block.named_parameters() if weight.requires_grad}
    generator = torch.Generator().manual_seed(0)
    seeds = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
    trained |= {name: value for name, value in zip(("its input", "its text"), inputs) if value.requires_grad}
    gradients = torch.autograd.grad(outputs, trained.values(), seeds)
    computed = dict(zip(("output", "text output"), (output.detach() for output in outputs)))
    return computed | {f"gradient of {name}": gradient for name, gradient in zip(trained, gradients)}


def _state_of(base: BaseModel, block, number: int, lora: Lora | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Returns a block's weights: frozen ones from the base model's files, rounded as in the run, and its own others.

    Weights that a LoRA's first values were taken out of are its own as well.
    """
    own = {name: weight.detach().clone() for name, weight in block.named_parameters() if weight.numel()}
    device = next(iter(own.values())).device
    if lora is None or lora.changes_base:
        return own
    trained = {name: weight for name, weight in own.items() if "lora_" in name}
    targets = {name.partition(".lora_")[0] for name in trained}
    state = {}
    for name, weight in _read_block(base, number):
        module, _, kind = name.rpartition(".")
        weight = weight.to(device, dtype)
        is_linear = kind == "weight" and weight.ndim == 2
        if lora.base_precision != "bf16" and is_linear:
            stored = quantized.quantize(weight, lora.base_precision)
            weight = quantized.dequantize(lora.base_precision, weight.shape, dtype, *stored.values())
        state[f"{module}.base_layer.{kind}" if module in targets else name] = weight
    return (state or own) | trained


def _weights_of(block) -> dict[str, torch.Tensor]:
    """Returns the weights as a block holds them, quantised ones dequantised."""
    weights = {name: weight.detach() for name, weight in block.named_parameters()}
    for name, layer in block.named_modules():
        if isinstance(layer, quantized.QuantizedLinear):
            stored = [getattr(layer, part) for part in layer.stored]
            shape = layer.out_features, layer.in_features
            weights[f"{name}.weight"] = quantized.dequantize(layer.precision, shape, layer.compute_dtype, *stored)
    return weights


def _read_block(base: BaseModel, number: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the weights of a block by name; none where the base model has no safetensors files."""
    prefix = f"transformer_blocks.{number}."
    for path in sorted(Path(base.folder, "transformer").glob("*.safetensors")):
        if base.variant and f".{base.variant}." not in path.name:
            continue
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - a file is not iterable
                if name.startswith(prefix):
                    yield name.removeprefix(prefix), file.get_tensor(name)


def _plain_block(base: BaseModel, lora: Lora | None, state: dict[str, torch.Tensor], device: torch.device):
    """Returns diffusers' block with these weights, and PEFT's own LoRA layers on it."""
    transformer = empty_transformer(base.transformer | {"num_layers": 1})
    if lora:
        transformer.requires_grad_(False)
        plain = lora._replace(lora_dropout=0.0, init_lora_weights="default")
        config = plain.config()
        config.init_lora_weights = False  # the values come from `state`
        transformer.add_adapter(config)
    block = transformer.transformer_blocks[0]
    block.load_state_dict(state, assign=True)
    for name, weight in block.named_parameters():
        weight.requires_grad_(lora is None or "lora_" in name)
    return block.to(device)


def _wider(dtype: torch.dtype, inputs: list, base: BaseModel) -> torch.dtype:
    if dtype != torch.float32:
        return torch.float32
    num_tokens = inputs[0].shape[1] + inputs[1].shape[1]
    scores = 8 * base.transformer["num_attention_heads"] * num_tokens**2
    return torch.float64 if scores < LARGEST_SCORES else torch.float32


def _cast(value, dtype: torch.dtype):
    if isinstance(value, tuple):
        return tuple(tensor.to(dtype) for tensor in value)
    return value if value is None else value.detach().to(dtype).requires_grad_(value.requires_grad)


def _compare(number: int, own: dict, theirs: dict, exact: dict, *, is_wider: bool) -> list[Compared]:
    compared = []
    for name, value in exact.items():
        errors = [_relative_error(found[name], value) for found in (own, theirs)]
        if not is_wider:
            errors[1] = max(errors[1], FLOAT32_ERROR)
        compared.append(Compared(number, name, *errors))
    return compared


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (found.to(expected.dtype) - expected).norm()
    return float(difference / expected.norm().clamp(min=torch.finfo(torch.float32).tiny))
