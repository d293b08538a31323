"""Keeps frozen blocks in main memory, and brings each to the GPU before it computes.

Two places on the GPU hold one block each: while the block in one of them computes, the next one is copied into the
other, on a stream of its own. A forward pass asks for the blocks in ascending order; the backward pass recomputes them
in descending order. So what is asked for after block i is i + 1 where i came after a lower one, and i - 1 elsewhere;
where nothing is trained it is always i + 1, and after the last one the first.

No weight may be needed after its block was left: blocks have to be recomputed on the way back.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

ALIGNMENT = 256  # bytes, at which the GPU's kernels like tensors to begin


def chosen(num_blocks: int, count: int) -> list[int]:
    """`count` of `num_blocks` block numbers, evenly spread: what lies between two of them is time to copy in."""
    return [i for i in range(num_blocks) if i * count // num_blocks < (i + 1) * count // num_blocks]


def swap(blocks: Sequence[torch.nn.Module], count: int, device: torch.device) -> "Swapper":
    """Moves what is frozen in `count` of the blocks out to main memory, and lets them fetch it when they are called."""
    swapper = Swapper([blocks[i] for i in chosen(len(blocks), count)], device)
    for index, block in enumerate(swapper.modules):
        block.register_forward_pre_hook(lambda module, args, index=index: swapper.bring(index))
    return swapper


class Part(NamedTuple):
    """A frozen tensor of a block, and where it lies among its bytes."""

    tensor: torch.Tensor
    offset: int
    dtype: torch.dtype
    shape: torch.Size

    def of(self, memory: torch.Tensor) -> torch.Tensor:
        """The tensor's values in `memory`, which holds the bytes of its block."""
        end = self.offset + self.shape.numel() * self.dtype.itemsize
        return memory[self.offset : end].view(self.dtype).view(self.shape)


class Swapper:
    """The blocks that are swapped, of which two at a time are on the device."""

    def __init__(self, modules: list[torch.nn.Module], device: torch.device):
        self.modules, self.device = modules, device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.parts, self.main_memory = zip(*(self._moved_out(module) for module in modules))
        size = max(memory.numel() for memory in self.main_memory)
        self.places = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(min(2, len(modules)))]
        for place in self.places if self.stream else ():
            place.record_stream(self.stream)  # so that nothing else gets their memory while a copy is under way
        self.held: list[int | None] = [None, None]  # the block in each place
        self.copied: list[torch.cuda.Event | None] = [None, None]  # when it is there
        self.last = -1

    def _moved_out(self, module: torch.nn.Module) -> tuple[list[Part], torch.Tensor]:
        frozen = [weight for weight in module.parameters() if not weight.requires_grad] + list(module.buffers())
        parts, size = [], 0
        for tensor in frozen:
            parts.append(Part(tensor, size, tensor.dtype, tensor.shape))
            size += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        memory = self._main_memory(size)
        for part in parts:
            part.of(memory).copy_(part.tensor.data)
            self._empty(part)
        return parts, memory

    def _main_memory(self, size: int) -> torch.Tensor:
        """So many bytes that a GPU can copy from while it computes."""
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=self.stream is not None)
        except RuntimeError as error:
            raise ValueError(
                f"--blocks_to_swap {len(self.modules)}: no main memory to pin for all of these blocks "
                f"({str(error).splitlines()[0]}); pass fewer, raise `ulimit -l`, or take a machine with more"
            ) from error

    def _empty(self, part: Part) -> None:
        """On the device all the same, which accelerate and DDP look at."""
        part.tensor.data = torch.empty(0, dtype=part.dtype, device=self.device)

    def bring(self, index: int) -> None:
        """Block `index` is about to compute: it is there when this returns, and the one after it on its way."""
        following = index + 1 if index > self.last or index == 0 else index - 1
        if not torch.is_grad_enabled():
            following = (index + 1) % len(self.modules)
        self._fetch(index, spared=self.last)
        self._wait(self.held.index(index))
        self.last = index
        if 0 <= following < len(self.modules):
            self._fetch(following, spared=index)

    def _fetch(self, index: int, spared: int) -> None:
        """Begins to copy a block in, in place of the one that is not `spared`, unless it is there."""
        if index in self.held:
            return
        place = 1 if self.held[0] == spared else 0
        if self.held[place] is not None:
            for part in self.parts[self.held[place]]:
                self._empty(part)
        self.held[place] = index
        self._copy(place, index)
        for part in self.parts[index]:
            part.tensor.data = part.of(self.places[place])

    def _copy(self, place: int, index: int) -> None:
        memory = self.main_memory[index]
        target = self.places[place][: memory.numel()]
        if self.stream is None:
            target.copy_(memory)
            return
        # Everything that computes with the block before has been launched: its kernels are on the stream that computes.
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(memory, non_blocking=True)
            self.copied[place] = self.stream.record_event()

    def _wait(self, place: int) -> None:
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied[place])
