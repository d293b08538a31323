"""Counts bytes that tensors hold: at any moment of a computation, and for its backward pass. For tests.

On the meta device it counts models of any size without computing anything.
"""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def storages(values) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_iter(values) if isinstance(value, torch.Tensor)]


class LiveBytes(TorchDispatchMode):
    """As a context: `now` and `peak` bytes of the storages that were made in it and are still referred to.

    What a kernel allocates and frees within itself is not seen.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._alive = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {storage._cdata for storage in storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in storages(result):
            key = storage._cdata
            if key not in self._alive and key not in before:
                self._alive.add(key)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._forget, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _forget(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def saved_bytes(forward, weights) -> int:
    """Of what autograd saves in `forward()`, each storage once, those of `weights` left out."""
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage  # kept, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    own = {storage._cdata for storage in storages(list(weights))}
    del result
    return sum(storage.nbytes() for key, storage in saved.items() if key not in own)
