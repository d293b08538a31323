"""LoRAs as updates of weights: added to a transformer, cut to a rank, taken out of a transformer, compared.

Shapes: a layer's update is strength * up @ down, [out, in]; down [rank, in], up [out, rank]. Of a convolution, `in`
counts its channels times the pixels of its kernel.
"""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import CogVideoXTransformer3DModel

from cogvideox.base_model import BaseModel
from cogvideox.lora import add_loras
from cogvideox.lora_files import LoraHeader, load_lora, settings_of

OVERSAMPLING, ITERATIONS = 16, 6  # of torch.svd_lowrank, which takes minutes where a whole SVD of 5b would take an hour


class Factors(NamedTuple):
    """A layer's update as a product, with its strength in it; float64."""

    up: torch.Tensor  # [out, rank]
    down: torch.Tensor  # [rank, in]

    def dot(self, other: "Factors") -> float:
        """Returns the sum of the products of both updates' elements, without computing the updates."""
        return ((self.up.T @ other.up) * (self.down @ other.down.T)).sum().item()

    @property
    def norm(self) -> float:
        return math.sqrt(max(self.dot(self), 0))


def factors_of(header: LoraHeader) -> dict[str, Factors]:
    """Returns the update of each layer; raises ValueError if the LoRA is more than products of two matrices."""
    others = [name for name in header.shapes if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if others:
        reason = f"holds {header.names[others[0]]} besides, as a DoRA or a LoRA with biases does"
        raise ValueError(f"{header.file}: {reason}; only merge, inspect and convert take it")
    weights = load_lora(header.file)
    return {
        layer: Factors(
            strength * weights[f"{layer}.lora_B.weight"].double().flatten(1),
            weights[f"{layer}.lora_A.weight"].double().flatten(1),
        )
        for layer, strength in header.strengths.items()
    }


# ---- a transformer and LoRAs -----------------------------------------------------------------------------------------


def merged(transformer: CogVideoXTransformer3DModel, loras: list[LoraHeader], scales: list[float]) -> None:
    """Adds LoRAs to the weights, each at its trained strength times its scale; diffusers and PEFT compute it."""
    add_loras(transformer, loras, scales)
    transformer.fuse_lora()
    transformer.unload_lora()


def differences(
    tuned: CogVideoXTransformer3DModel, base: CogVideoXTransformer3DModel, rank: int
) -> Iterator[tuple[str, torch.Tensor, float, float]]:
    """Yields name, best LoRA of this rank, its energy and the update's, for each weight of a layer that differs.

    The energy of an update is the sum of its squared elements.
    """
    before = dict(base.named_parameters())
    for name, weight in tuned.named_parameters():
        if weight.ndim < 2 or not name.endswith(".weight") or torch.equal(weight, before[name]):
            continue
        update = (weight.float() - before[name].float()).flatten(1)
        most = min(update.shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # equal files give equal LoRAs
            u, s, v = torch.svd_lowrank(update, q=min(rank + OVERSAMPLING, most), niter=ITERATIONS)
        parts = _as_lora(u.double(), s.double(), v.double(), min(rank, most))
        energy = s[: min(rank, most)].double().square().sum().item()
        yield name.removesuffix(".weight"), parts, energy, update.double().square().sum().item()


def unlike_layers(tuned: CogVideoXTransformer3DModel, base: CogVideoXTransformer3DModel) -> list[str]:
    """Returns names of parameters that differ and that no LoRA can hold: biases and norms."""
    before = dict(base.named_parameters())
    return [
        name
        for name, weight in tuned.named_parameters()
        if (weight.ndim < 2 or not name.endswith(".weight")) and not torch.equal(weight, before[name])
    ]


# ---- one LoRA, two LoRAs ---------------------------------------------------------------------------------------------


def _as_lora(u: torch.Tensor, s: torch.Tensor, v: torch.Tensor, rank: int) -> Factors:
    """Returns the best approximation of this rank, u s v^T cut off, its singular values shared by both matrices."""
    root = s[:rank].sqrt()
    return Factors(u[:, :rank] * root, root[:, None] * v[:, :rank].T)


def resized(update: Factors, rank: int) -> tuple[Factors, float, float]:
    """Returns the best approximation of this rank at most, its energy, and the update's.

    By Eckart and Young 1936; the SVD of a matrix as small as the update's rank, between two orthogonal ones, is enough.
    """
    q_up, r_up = torch.linalg.qr(update.up)
    q_down, r_down = torch.linalg.qr(update.down.T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T)
    parts = _as_lora(q_up @ u, s, q_down @ vh.T, rank)
    return parts, s[:rank].square().sum().item(), s.square().sum().item()


def plain_lora(
    layers: dict[str, Factors], shapes: dict[str, tuple[int, ...]], like: LoraHeader | BaseModel, file: Path
) -> tuple[LoraHeader, dict[str, torch.Tensor]]:
    """Returns header and weights of a LoRA of these updates, at strength 1, in float32.

    Args:
        shapes: [rank or out, in, ...] of each layer, whose first number is not read.
        like: what the LoRA is for: the header of one for the same base model, or the base model.
        file: that it comes from, for messages.
    """
    weights = {}
    for layer, (up, down) in layers.items():
        kernel = shapes[layer][2:]
        weights[f"{layer}.lora_A.weight"] = down.float().reshape(len(down), shapes[layer][1], *kernel).contiguous()
        weights[f"{layer}.lora_B.weight"] = up.float().reshape(*up.shape, *(1 for _ in kernel)).contiguous()
    ranks = {layer: len(update.down) for layer, update in layers.items()}
    is_base = isinstance(like, BaseModel)
    header = LoraHeader(
        file=file,
        shapes={name: tuple(weight.shape) for name, weight in weights.items()},
        names={name: name for name in weights},
        settings={"target_modules": sorted(ranks)} | settings_of(ranks),
        strength_from="metadata",
        trained_on=like.identity if is_base else like.trained_on,
        base_model=like.name if is_base else like.base_model,
    )
    return header, weights


class Comparison(NamedTuple):
    """The updates of two LoRAs on the layers of one block, or outside of the blocks."""

    block: str
    norms: tuple[float, float]
    cosine: float  # 0 where one of them is 0


def compared(one: dict[str, Factors], other: dict[str, Factors]) -> list[Comparison]:
    """Returns norms and cosines by block, and at the end of all layers together."""
    sums = {}  # of squares and products
    for layer in sorted(one.keys() | other.keys()):
        block = f"block {layer.split('.')[1]}" if layer.startswith("transformer_blocks.") else "outside the blocks"
        first, second = one.get(layer), other.get(layer)
        own = Counter(
            one=first.dot(first) if first else 0,
            other=second.dot(second) if second else 0,
            product=first.dot(second) if first and second else 0,
        )
        for place in (block, "all"):
            sums.setdefault(place, Counter())
            sums[place] = Counter({name: sums[place][name] + own[name] for name in own})
    rows = []
    for place in sorted(sums, key=lambda place: (place == "all", place[:5] != "block", len(place), place)):
        norms = tuple(math.sqrt(max(sums[place][name], 0)) for name in ("one", "other"))
        product = math.prod(norms)
        rows.append(Comparison(place, norms, sums[place]["product"] / product if product else 0.0))
    return rows
