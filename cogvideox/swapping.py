"""Keeps frozen blocks in CPU memory, and copies each to the GPU before it computes.

Two slots of GPU memory hold one block each: while the block in one slot computes, the next block is copied into the
other, on a stream of its own. A forward pass runs the blocks in ascending order; the backward pass recomputes them in
descending order. So block i is followed by i + 1 if a lower block came before it, and by i - 1 otherwise; without
gradients it is always followed by i + 1, and the last block by the first.

No weight may be needed after its block has run: blocks have to be recomputed in the backward pass.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

ALIGNMENT = 256  # bytes; tensors start at multiples of it, as GPU kernels prefer


def chosen(num_blocks: int, count: int) -> list[int]:
    """Returns `count` of `num_blocks` block numbers, evenly spread: the blocks between two give time for the copy."""
    return [i for i in range(num_blocks) if i * count // num_blocks < (i + 1) * count // num_blocks]


def swap(blocks: Sequence[torch.nn.Module], count: int, device: torch.device) -> "Swapper":
    """Moves the frozen tensors of `count` blocks to CPU memory; each block fetches its own when it is called."""
    swapper = Swapper([blocks[i] for i in chosen(len(blocks), count)], device)
    for index, block in enumerate(swapper.modules):
        block.register_forward_pre_hook(lambda module, args, index=index: swapper.bring(index))
    return swapper


class Part(NamedTuple):
    """A frozen tensor of a block, and its place among the block's bytes."""

    tensor: torch.Tensor
    offset: int  # bytes
    shape: torch.Size  # kept here, for the tensor is empty while its block is not on the device

    def view_in(self, memory: torch.Tensor) -> torch.Tensor:
        """Returns the tensor's values in `memory`, which holds the bytes of its block."""
        end = self.offset + self.shape.numel() * self.tensor.dtype.itemsize
        return memory[self.offset : end].view(self.tensor.dtype).view(self.shape)


def layout(block: torch.nn.Module) -> tuple[list[Part], int]:
    """Returns the frozen tensors of a block, one after the other, and how many bytes they take together."""
    parts, size = [], 0
    for tensor in [weight for weight in block.parameters() if not weight.requires_grad] + list(block.buffers()):
        parts.append(Part(tensor, size, tensor.shape))
        size += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
    return parts, size


class Swapper:
    """The swapped blocks, at most two of them on the device."""

    def __init__(self, modules: list[torch.nn.Module], device: torch.device):
        self.modules, self.device = modules, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.parts, self.cpu_memory = zip(*(self._move_out(module) for module in modules))
        size = max(memory.numel() for memory in self.cpu_memory)
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(min(2, len(modules)))]
        for slot in self.slots if self.stream else ():
            slot.record_stream(self.stream)  # so that the memory is not reused while a copy is under way
        self.held: list[int | None] = [None, None]  # the block in each slot
        self.copied: list[torch.cuda.Event | None] = [None, None]  # the end of its copy
        self.last = -1

    def _move_out(self, module: torch.nn.Module) -> tuple[list[Part], torch.Tensor]:
        parts, size = layout(module)
        memory = self._allocate(size)
        for part in parts:
            part.view_in(memory).copy_(part.tensor.data)
            self._empty(part)
        return parts, memory

    def _allocate(self, size: int) -> torch.Tensor:
        """Returns `size` bytes of CPU memory that a GPU can copy from while it computes."""
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=self.stream is not None)
        except RuntimeError as error:
            raise ValueError(
                f"--blocks_to_swap {len(self.modules)}: no CPU memory to pin for all of these blocks "
                f"({str(error).splitlines()[0]}); pass fewer, raise `ulimit -l`, or use a machine with more memory"
            ) from error

    def _empty(self, part: Part) -> None:
        # On the device nevertheless: accelerate and DDP look at that.
        part.tensor.data = torch.empty(0, dtype=part.tensor.dtype, device=self.device)

    def bring(self, index: int) -> None:
        """Makes block `index` ready to compute, and starts to copy the block that follows it."""
        following = index + 1 if index > self.last or index == 0 else index - 1
        if not torch.is_grad_enabled():
            following = (index + 1) % len(self.modules)
        self._fetch(index, spared=self.last)
        self._wait(self.held.index(index))
        self.last = index
        if 0 <= following < len(self.modules):
            self._fetch(following, spared=index)

    def _fetch(self, index: int, spared: int) -> None:
        """Starts to copy a block into the slot that does not hold block `spared`, unless it is in a slot already."""
        if index in self.held:
            return
        slot = 1 if self.held[0] == spared else 0
        if self.held[slot] is not None:
            for part in self.parts[self.held[slot]]:
                self._empty(part)
        self.held[slot] = index
        self._copy(slot, index)
        for part in self.parts[index]:
            part.tensor.data = part.view_in(self.slots[slot])

    def _copy(self, slot: int, index: int) -> None:
        memory = self.cpu_memory[index]
        target = self.slots[slot][: memory.numel()]
        if self.stream is None:
            target.copy_(memory)
            return
        # All kernels that read the slot's former block are on the compute stream by now.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(memory, non_blocking=True)
            self.copied[slot] = self.stream.record_event()

    def _wait(self, slot: int) -> None:
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied[slot])
