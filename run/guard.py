"""Names the causes of updates whose loss or gradient is not finite, and what to do about them."""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

import torch

# A resumed run keeps its precision.
OTHER_PRECISION = (
    "begin in another --output_dir with --mixed_precision bf16, or no where the GPU has no bfloat16; --lora_path with "
    "the last checkpoint keeps what a LoRA has learned"
)
LARGEST_CACHED = 1e4  # latents and embeddings of real clips and captions stay far below it


@dataclass
class Failures:
    """How often something has failed while training went on."""

    skipped: int = 0  # updates, over all starts of the run
    skipped_in_a_row: int = 0
    validations_in_a_row: int = 0


class Suspect(NamedTuple):
    """A micro-batch of an update that is not finite.

    Attributes:
        clips: a label for each.
        timesteps: as many.
        extremes: the largest value of each of its tensors that reaches further than those of real clips.
    """

    clips: list[str]
    timesteps: list[int]
    loss: float
    extremes: dict[str, float]

    def __str__(self) -> str:
        shown = "; ".join(f"{clip}, timestep {timestep}" for clip, timestep in zip(self.clips, self.timesteps))
        explained = ", ".join(f"its {name} reach {value:.3g}" for name, value in self.extremes.items())
        return ": ".join(filter(None, [shown, f"loss {self.loss:.4g}", explained]))


def suspected(losses: dict) -> dict:
    """Returns those of some micro-batches whose loss is not finite; all where only the gradient is not."""
    return {micro_batch: loss for micro_batch, loss in losses.items() if not isfinite(loss)} or losses


def extremes(batch: dict[str, torch.Tensor]) -> dict[str, float]:
    largest = {name: tensor.float().abs().max().item() for name, tensor in batch.items()}
    return {name: value for name, value in largest.items() if not value <= LARGEST_CACHED}  # NaN, too


def advice(suspects: list[Suspect], *, precision: str, learning_rate: float) -> str:
    """Returns what is likely to help, by cause."""
    if any(suspect.extremes for suspect in suspects):
        return "the values of those clips or captions are at fault: look at the clips (python dataset.py preview)"
    if precision == "fp16":
        return f"float16 overflows beyond 65,504: {OTHER_PRECISION}"
    return (
        f"--learning_rate {learning_rate:g} may be too high for this run: lower it (with --change learning_rate where "
        "there is a checkpoint to resume), or warm up"
    )


def drawn_timesteps(training_loss: Callable[[Callable], torch.Tensor], out_channels: int) -> list[int]:
    """Returns the timesteps that a training loss draws.

    Args:
        training_loss: takes a transformer; it must draw the same numbers again.
        out_channels: of the transformer.
    """
    drawn = []

    def record(*, hidden_states: torch.Tensor, timestep: torch.Tensor, **_) -> tuple[torch.Tensor]:
        drawn.extend(timestep.tolist())
        return (hidden_states[:, :, :out_channels],)  # the loss of which is thrown away

    training_loss(record)
    return drawn
