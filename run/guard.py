"""Names the causes of updates whose loss or gradient is not finite, and what to do about them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

LARGEST_CACHED = 1e4  # latents and embeddings of real clips and captions stay far below it


@dataclass
class Failures:
    """How often something has failed while training went on."""

    skipped: int = 0  # updates, over all starts of the run
    skipped_in_a_row: int = 0
    validations_in_a_row: int = 0


class MicroBatch(NamedTuple):
    """A micro-batch of this rank, and what it gave."""

    number: int
    batch: dict[str, torch.Tensor]
    loss: float


def suspects(micro_batches: list[MicroBatch]) -> list[MicroBatch]:
    """Returns the micro-batches whose loss is not finite; all of them where only the gradient is not."""
    found = [one for one in micro_batches if not torch.tensor(one.loss).isfinite()]
    return found or micro_batches


def reason(one: MicroBatch, clips: list[str], timesteps: list[int]) -> str:
    """Returns a line on a micro-batch: its clips, its timesteps, its loss, and values that explain it."""
    shown = "; ".join(f"{clip}, timestep {timestep}" for clip, timestep in zip(clips, timesteps))
    explained = [f"its {name} reach {largest(tensor):.3g}" for name, tensor in one.batch.items() if is_extreme(tensor)]
    return ": ".join(filter(None, [shown, f"loss {one.loss:.4g}", ", ".join(explained)]))


def largest(tensor: torch.Tensor) -> float:
    return tensor.float().abs().max().item()


def is_extreme(tensor: torch.Tensor) -> bool:
    return not largest(tensor) <= LARGEST_CACHED  # NaN, too


def advice(micro_batches: list[MicroBatch], *, precision: str, learning_rate: float) -> str:
    """Returns what is likely to help, by cause."""
    if any(is_extreme(tensor) for one in micro_batches for tensor in one.batch.values()):
        return "the values of those clips or captions are at fault: look at the clips (python dataset.py preview)"
    if precision == "fp16":
        return "float16 overflows beyond 65,504: pass --mixed_precision bf16, or no where the GPU has no bfloat16"
    return f"--learning_rate {learning_rate:g} may be too high for this run: lower it, or warm up"


def drawn_timesteps(training_loss: Callable[[Callable], torch.Tensor]) -> list[int]:
    """Returns the timesteps that a training loss draws.

    Args:
        training_loss: takes a transformer; it must draw the same numbers again.
    """
    drawn = []

    def record(*, hidden_states: torch.Tensor, timestep: torch.Tensor, **_) -> tuple[torch.Tensor]:
        drawn.extend(timestep.tolist())
        return (hidden_states[:, :, :1],)  # the loss of which is thrown away

    training_loss(record)
    return drawn
