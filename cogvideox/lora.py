"""What of the transformer is trained, a LoRA or all of it, and how it becomes a file."""

import argparse
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import CogVideoXTransformer3DModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from cogvideox import quantized
from cogvideox.base_model import BaseModel, empty_transformer, load_transformer
from cogvideox.lora_files import MUTATING, TRANSFORMER_FOLDER, check_start, find_lora_file, save_lora
from files import at_least, expanded_path, publish_folder

OPTIONS = ("rank", "lora_alpha", "lora_target_modules", "use_dora", "use_rslora", "init_lora_weights", "base_precision")
DEFAULT_RANK = 128
DEFAULT_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]

Export = Callable[[dict[str, torch.Tensor], Path], Path]


class Lora(NamedTuple):
    """The training script's options of these names."""

    rank: int
    lora_alpha: float
    lora_target_modules: list[str]
    use_dora: bool = False
    use_rslora: bool = False
    lora_dropout: float = 0.0
    init_lora_weights: str = "default"
    base_precision: str = "bf16"

    @property
    def mutates(self) -> bool:
        return self.init_lora_weights.startswith(MUTATING)

    def config(self) -> LoraConfig:
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.lora_alpha,
            target_modules=self.lora_target_modules,
            use_dora=self.use_dora,
            use_rslora=self.use_rslora,
            lora_dropout=self.lora_dropout,
            init_lora_weights=True if self.init_lora_weights == "default" else self.init_lora_weights,
        )

    def saved(self) -> dict:
        """Rank, alpha and kind of the file that is exported, the same strength at twice the rank where that is needed.

        No more than that: an older peft refuses fields that it does not know, and diffusers 0.42.1 samples with
        lora_dropout if it is told of one. The empty rank_pattern is there because diffusers 0.34 to 0.39 end with a
        KeyError without it.
        """
        scale = 2 if self.mutates else 1
        alpha = self.lora_alpha * (math.sqrt(scale) if self.use_rslora else scale)
        settings = {"r": self.rank * scale, "lora_alpha": alpha, "target_modules": sorted(self.lora_target_modules)}
        settings["rank_pattern"] = {}
        switches = {"use_dora": self.use_dora, "use_rslora": self.use_rslora}
        return settings | {name: True for name, on in switches.items() if on}


def add_options(parser: argparse.ArgumentParser) -> None:
    lora = parser.add_argument_group("LoRA").add_argument
    lora("--rank", type=at_least(1), help="rank of the LoRA matrices (default: 128)")
    lora("--lora_alpha", type=float, help="strength is lora_alpha / rank (default: rank, strength 1)")
    lora("--lora_target_modules", nargs="+", metavar="NAME", help="layers (default: to_q to_k to_v to_out.0)")
    lora("--lora_path", type=expanded_path, metavar="PATH", help="LoRA to go on from: its file, or the folder with it")
    lora("--lora_dropout", type=float, default=0.0, metavar="P", help="share of the LoRA's inputs to drop in training")
    lora("--use_dora", action="store_true", help="DoRA: train each layer's row norms apart from their directions")
    lora("--use_rslora", action="store_true", help="rsLoRA: strength is lora_alpha / sqrt(rank)")
    inits = ["default", "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_4", "pissa_niter_16"]
    lora("--init_lora_weights", choices=inits, default="default", help="first values; pissa_niter_N is a quick pissa")
    base = {"choices": quantized.PRECISIONS, "default": quantized.PRECISIONS[0]}
    lora("--base_precision", **base, help="of the blocks' frozen weights; bf16: as computed; fewer bits: less memory")


def check_options(args: argparse.Namespace, refuse: Callable[[str], None]) -> None:
    """Refuses values and combinations that cannot work; `refuse` ends the program with a message."""
    names = (*OPTIONS, "lora_path", "lora_dropout", "ema_decay")
    given = [name for name in names if getattr(args, name) not in (None, 0, "default", "bf16")]
    if args.training_type == "sft" and given:
        refuse(f"--{given[0]}: does nothing with --training_type sft, which trains no LoRA; leave it out")
    if args.lora_path and args.init_lora_weights != "default":
        refuse(f"--init_lora_weights {args.init_lora_weights}: --lora_path gives the first values; pass one of the two")
    if args.init_lora_weights == "orthogonal" and (args.rank or DEFAULT_RANK) % 2:
        refuse(f"--rank {args.rank}: must be even for --init_lora_weights orthogonal; pass {args.rank + 1}")
    whole = "--use_dora" if args.use_dora else f"--init_lora_weights {args.init_lora_weights}"
    if args.base_precision != "bf16" and (args.use_dora or args.init_lora_weights.startswith(MUTATING)):
        refuse(f"--base_precision {args.base_precision}: {whole} begins with unquantised weights; pass one of the two")
    if args.lora_alpha is not None and not args.lora_alpha > 0:
        refuse(f"--lora_alpha {args.lora_alpha}: must be above 0")
    if not 0 <= args.lora_dropout < 1:
        refuse(f"--lora_dropout {args.lora_dropout}: must be from 0 to below 1")
    if args.ema_decay is not None and not 0 < args.ema_decay < 1:
        refuse(f"--ema_decay {args.ema_decay}: must be above 0 and below 1")


def lora_of(args: argparse.Namespace) -> Lora:
    return Lora(**{name: getattr(args, name) for name in Lora._fields})


def trained_parameters(transformer: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Those that are trained."""
    return [weight for weight in transformer.parameters() if weight.requires_grad]


def count_trained(transformer: torch.nn.Module) -> str:
    return f"{sum(weight.numel() for weight in trained_parameters(transformer)) / 1e6:.4g} million weights"


# ---- LoRA ------------------------------------------------------------------------------------------------------------


def check_lora(base: BaseModel, lora: Lora, start: Path | None) -> None:
    """Refuses, from configs and headers alone, a target that is no linear layer and a file to start from that differs.

    Raises:
        ValueError: with what to pass instead.
    """
    quantized.check_packages(lora.base_precision, "--base_precision")
    transformer = empty_transformer(base.transformer)
    for target in lora.lora_target_modules:
        _check_target(transformer, lora, target)
    if start:
        config = lora._replace(init_lora_weights="default").config()
        with torch.device("meta"):
            transformer.add_adapter(config)
        check_start(start, base, config, get_peft_model_state_dict(transformer))


def _check_target(transformer: torch.nn.Module, lora: Lora, target: str) -> None:
    """PEFT takes what ends in the words of a target, and skips what ends in none as long as another target fits."""
    short = {name.split(".", 2)[-1] if name.startswith("transformer_blocks.") else name: module
             for name, module in transformer.named_modules()}  # fmt: skip
    meant = {name: module for name, module in short.items() if name == target or name.endswith(f".{target}")}
    layers = {name: module for name, module in meant.items() if isinstance(module, torch.nn.Linear)}
    if not layers:
        known = sorted(name for name, module in short.items() if isinstance(module, torch.nn.Linear))
        raise ValueError(
            f"--lora_target_modules {target}: the transformer has no such linear layer in all blocks, but "
            f"{', '.join(known)}"
        )
    if others := meant.keys() - layers.keys():
        other = min(others)
        raise ValueError(
            f"--lora_target_modules {target}: is also {other}, a {type(meant[other]).__name__} and no linear layer; "
            f"write more of the name: {' '.join(layers)}"
        )
    most = min(min(layer.in_features, layer.out_features) for layer in layers.values())
    if lora.mutates and lora.rank > most:
        raise ValueError(
            f"--rank {lora.rank}: {target} has no more than {most} directions for --init_lora_weights "
            f"{lora.init_lora_weights} to begin with; pass at most that, or leave {target} out of the targets"
        )


def with_lora(
    base: BaseModel, dtype: torch.dtype, lora: Lora, start: Path | None, device: torch.device | None = None
) -> tuple[CogVideoXTransformer3DModel, Export]:
    """The transformer, frozen in `dtype`, with a LoRA in float32; and what writes the LoRA's file.

    Args:
        device: where blocks are quantised, one layer after the other, so that it never holds more of them.
    """
    # What is taken out of the weights must be just what the LoRA begins with, so that happens in float32.
    transformer = load_transformer(base, torch.float32 if lora.mutates else dtype)
    add_lora(transformer, lora, dtype, start, device)
    first = get_peft_model_state_dict(transformer) if lora.mutates else {}
    first = {name: weight.clone() for name, weight in first.items()}

    def export(state: dict, folder: Path) -> Path:
        weights = get_peft_model_state_dict(transformer, state_dict=state)
        return save_lora(_against_the_base(weights, first) if lora.mutates else weights, lora.saved(), folder, base)

    return transformer, export


def add_lora(
    transformer: CogVideoXTransformer3DModel,
    lora: Lora,
    dtype: torch.dtype,
    start: Path | None = None,
    device: torch.device | None = None,
) -> None:
    """Freezes the transformer in `dtype`, its blocks in `lora.base_precision`, and adds LoRA weights in float32.

    add_adapter makes them in the dtype of the base, and in bfloat16 most updates at 1e-5 would round away.

    Args:
        start: LoRA to go on from, a file or the folder that holds it.
        device: where blocks are quantised and stay (default: where they are).
    """
    transformer.requires_grad_(False)
    if lora.base_precision != "bf16":
        quantized.quantize_linears(transformer.transformer_blocks, lora.base_precision, device)
    transformer.add_adapter(lora.config())
    cast_training_params(transformer, dtype=torch.float32)
    if not lora.use_dora:  # which wants float32 throughout
        for layer in transformer.modules():
            if isinstance(layer, LoraLayer):
                _compute_as_the_base_does(layer)
    for weight in transformer.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.to(dtype)
    if start:
        weights = {
            name.removeprefix("transformer."): weight for name, weight in load_file(find_lora_file(start)).items()
        }
        set_peft_model_state_dict(transformer, weights)
    elif lora.use_dora:
        _measure_magnitudes(transformer)


class CastLinear(torch.nn.Linear):
    """A weight kept in float32 and multiplied in the dtype of what comes in, as autocast does it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight.to(input.dtype))


class FusedLora(LoraLinear):
    """x W^T + b + s (x A^T) B^T, where the last product is scaled and added by the kernel that computes it.

    PEFT goes over the whole output three times more: to scale it, to add it, and to scale its gradient. Where nothing
    is trained its own way is taken, so that samples are to the last bit those of whoever loads the LoRA.
    """

    def forward(self, x: torch.Tensor, *args, **options) -> torch.Tensor:
        if not torch.is_grad_enabled() or self.disable_adapters or self.merged:
            return super().forward(x, *args, **options)
        assert not args and not options, "what CogVideoX gives a linear layer is its input alone"
        rows = x.flatten(0, -2)
        down = self.lora_A["default"](self.lora_dropout["default"](rows))
        up = self.lora_B["default"].weight.to(down.dtype)
        # In place: nothing needs what the base gave. As rows from the start, for autograd copies what is a view.
        result = self.base_layer(rows).addmm_(down, up.t(), alpha=self.scaling["default"])
        return result.unflatten(0, x.shape[:-1])


def _compute_as_the_base_does(layer: LoraLinear) -> None:
    """Without autocast, PEFT would cast the input to the LoRA's float32 and multiply in that, eight times as slow.

    Under autocast, on the other hand, LayerNorms run and are stored in float32.
    """
    layer.cast_input_dtype_enabled = False
    layer.__class__ = FusedLora
    for matrix in (*layer.lora_A.values(), *layer.lora_B.values()):
        matrix.__class__ = CastLinear


@torch.no_grad()
def _measure_magnitudes(transformer) -> None:
    """Sets DoRA's magnitudes to the norms that they start from, in float32.

    PEFT 0.21.2 leaves them as rounded to the dtype of the base, by which a bfloat16 transformer is another one before
    it is trained at all: its rows are off by up to 0.4 %.
    """
    for layer in transformer.modules():
        if isinstance(layer, LoraLayer):
            weight = layer.get_base_layer().weight.float() + layer.get_delta_weight("default").float()
            layer.lora_magnitude_vector["default"].weight.copy_(torch.linalg.vector_norm(weight, dim=1))


def _against_the_base(weights: dict, first: dict) -> dict:
    """A LoRA of twice the rank for the weights as published, from one whose first values were taken out of them.

    W - s B0 A0 + s B A = W + s [B, -B0] [A; A0]: Meng et al. 2024 (arXiv:2404.02948), appendix C.
    """
    joined = dict(weights)
    for name in weights:
        if name.endswith("lora_A.weight"):
            joined[name] = torch.cat([weights[name], first[name]], dim=0)
        elif name.endswith("lora_B.weight"):
            joined[name] = torch.cat([weights[name], -first[name]], dim=1)
    return joined


# ---- the whole transformer -------------------------------------------------------------------------------------------


def whole(base: BaseModel, dtype: torch.dtype) -> tuple[CogVideoXTransformer3DModel, Export]:
    """The transformer with all of its weights trainable, in float32; and what writes them in `dtype`.

    bfloat16 keeps 8 bits: an update of less than 0.4 % of a weight would round away.
    """
    transformer = load_transformer(base, torch.float32)

    def export(state: dict, folder: Path) -> Path:
        return save_transformer({name: weight.to(dtype) for name, weight in state.items()}, folder, base)

    return transformer, export


def save_transformer(weights: dict, folder: Path, base: BaseModel) -> Path:
    """Writes `folder`/transformer as `CogVideoXTransformer3DModel.from_pretrained` reads it; complete or absent."""
    final, temporary = folder / TRANSFORMER_FOLDER, folder / f".{TRANSFORMER_FOLDER}.incomplete"
    transformer = empty_transformer(base.transformer)
    transformer.load_state_dict(weights, assign=True)
    transformer.register_to_config(_name_or_path=base.name)  # where diffusers looks for what it was made from
    shutil.rmtree(temporary, ignore_errors=True)
    transformer.save_pretrained(temporary)
    for file in temporary.iterdir():
        file.chmod(0o644)  # safetensors makes its files private
    shutil.rmtree(final, ignore_errors=True)
    publish_folder(temporary, final)
    return final
