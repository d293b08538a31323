"""Counts the bytes that tensors hold and the FLOPs that compute them, on any device, the meta device included."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from cogvideox.quantized import INPUT_GRADIENT

# FlopCounterMode of torch 2.13 leaves out products in place, attention on a CPU, and what is in an operator of ours.
FLOP_FORMULAS = flop_registry | {
    torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *_, **__: sdpa_flop_count(query.shape, key.shape, value.shape)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda *args, **_: sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
    ),
    INPUT_GRADIENT: lambda gradient, precision, shape, stored, **_: 2 * gradient.shape.numel() * shape[1],
}


class Meter(TorchDispatchMode):
    """Counts, within a `with` block, the `live` and `peak` bytes of new storages, and `flops`.

    What a kernel allocates and frees within itself is not seen. PyTorch takes up to milliseconds to find the shape of a
    meta tensor; blocks and tiles repeat the same ones, so an operator's results are remembered: without that, tiles of
    a large clip take four times as long.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._storages = {}  # those that are alive
        self._known = {}  # results on the meta device and FLOPs, by operator and arguments

    def lap(self) -> int:
        """Returns the peak since the last lap."""
        peak, self.peak = self.peak, self.live
        return peak

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(value.alias_info for value in func._schema.returns):  # a view, or in place
            result, flops = _compute(func, args, kwargs)
        else:
            result, flops = self._remembered(func, args, kwargs)
            for tensor in _tensors(result):
                self._add(tensor.untyped_storage())
            self.peak = max(self.peak, self.live + _workspace(func, args))
        self.flops += flops
        return result

    def _remembered(self, func, args: tuple, kwargs: dict) -> tuple:
        call = func, _signature(args), _signature(tuple(kwargs.items()))
        if call in self._known:
            return _like(self._known[call])
        result, flops = _compute(func, args, kwargs)
        if all(tensor.is_meta for tensor in _tensors(result)):
            self._known[call] = _like((result, flops))
        return result, flops

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._storages:  # _unsafe_view does not say that its result is a view
            self.live += size
            self._storages[key] = weakref.ref(storage, lambda _: self._forget(key, size))

    def _forget(self, key: int, size: int) -> None:
        del self._storages[key]
        self.live -= size


def bytes_of(values) -> int:
    """Returns the bytes of all tensors in a nested structure, each storage counted once."""
    storages = (value.untyped_storage() for value in tree_iter(values) if isinstance(value, torch.Tensor))
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def module_bytes(module: torch.nn.Module) -> int:
    return bytes_of([*module.parameters(), *module.buffers()])


def _tensors(result) -> list[torch.Tensor]:
    values = result if isinstance(result, (tuple, list)) else [result]  # tree_iter takes ten times as long
    return [value for value in values if isinstance(value, torch.Tensor)]


def _compute(func, args: tuple, kwargs: dict) -> tuple:
    """Returns the result and the FLOPs of an operator."""
    result, formula = func(*args, **kwargs), FLOP_FORMULAS.get(func.overloadpacket)
    return result, formula(*args, **kwargs, out_val=result) if formula else 0


def _workspace(func, args: tuple) -> int:
    """Bytes that an operator holds only while it runs: the dequantised weight in `INPUT_GRADIENT`."""
    if func.overloadpacket is not INPUT_GRADIENT:
        return 0
    gradient, _, shape, _ = args
    return shape[0] * shape[1] * gradient.element_size()


def _signature(value):
    """Returns the part of an argument that determines the shapes of the results."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return tuple(map(_signature, value))
    return type(value), value  # 1 and 1.0 give other dtypes


def _like(value):
    """Returns new meta tensors in place of those in a result."""
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return type(value)(map(_like, value)) if isinstance(value, (tuple, list)) else value
