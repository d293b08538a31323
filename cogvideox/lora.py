"""What is trained of the transformer, a LoRA or all of its weights, and how the result is exported."""

import argparse
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import CogVideoXTransformer3DModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer

from cogvideox import quantized
from cogvideox.base_model import BaseModel, empty_transformer, load_transformer
from cogvideox.lora_files import CHANGES_BASE, TRANSFORMER_FOLDER, LoraHeader, check_start, load_lora, save_lora
from files import at_least, expanded_path, publish_folder

OPTIONS = ("rank", "lora_alpha", "lora_target_modules", "use_dora", "use_rslora", "init_lora_weights", "base_precision")
DEFAULT_RANK = 128
DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")

# Writes the result from the trained weights into a folder, and returns its path.
Export = Callable[[dict[str, torch.Tensor], Path], Path]


class Lora(NamedTuple):
    """The kind of LoRA: the training script's options of these names."""

    rank: int
    lora_alpha: float
    lora_target_modules: tuple[str, ...]
    use_dora: bool = False
    use_rslora: bool = False
    lora_dropout: float = 0.0
    init_lora_weights: str = "default"
    base_precision: str = "bf16"

    @property
    def changes_base(self) -> bool:
        """Whether its first values are taken out of the frozen weights."""
        return self.init_lora_weights.startswith(CHANGES_BASE)

    def config(self) -> LoraConfig:
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.lora_alpha,
            target_modules=list(self.lora_target_modules),  # of which PEFT makes a set; a tuple would stay one
            use_dora=self.use_dora,
            use_rslora=self.use_rslora,
            lora_dropout=self.lora_dropout,
            init_lora_weights=True if self.init_lora_weights == "default" else self.init_lora_weights,
        )

    def saved(self) -> dict:
        """Returns what the exported file records: rank, alpha and kind, for the strength that was trained.

        A LoRA that changed the base is exported at twice its rank (see `_against_the_base`).

        Nothing else is recorded: an older peft refuses fields that it does not know, and diffusers 0.42.1 samples with
        a lora_dropout that it reads. diffusers 0.34 to 0.39 end with a KeyError without the empty rank_pattern.
        """
        scale = 2 if self.changes_base else 1
        alpha = self.lora_alpha * (math.sqrt(scale) if self.use_rslora else scale)
        settings = {"r": self.rank * scale, "lora_alpha": alpha, "target_modules": sorted(self.lora_target_modules)}
        switches = {name: True for name in ("use_dora", "use_rslora") if getattr(self, name)}
        return settings | {"rank_pattern": {}} | switches


def add_options(parser: argparse.ArgumentParser) -> None:
    lora, file = parser.add_argument_group("LoRA").add_argument, expanded_path
    inits = ["default", "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_4", "pissa_niter_16"]
    bits = {"choices": quantized.PRECISIONS, "default": quantized.PRECISIONS[0]}
    targets = f"linear layers that get a LoRA (default: attention's {' '.join(DEFAULT_TARGETS)})"
    init = "how the first values are chosen; pissa_niter_N is a fast approximation of pissa"
    frozen = "weights of the frozen blocks; bf16: unquantised, in the compute dtype; others take less memory"
    lora("--rank", type=at_least(1), help=f"rank of the LoRA matrices (default: {DEFAULT_RANK})")
    lora("--lora_alpha", type=float, help="the LoRA's strength is lora_alpha / rank (default: rank, so strength 1)")
    lora("--lora_target_modules", nargs="+", metavar="NAME", help=targets)
    other = "start from --lora_path although it was trained on another base model; its shapes have to fit"
    start = "LoRA to start from: its file, the folder that holds it, or a hub name, with or without /file"
    lora("--lora_path", type=file, metavar="PATH", help=start)
    lora("--lora_for_other_base", action="store_true", help=other)
    lora("--lora_dropout", type=float, default=0.0, metavar="P", help="share of the LoRA's inputs to drop in training")
    lora("--use_dora", action="store_true", help="DoRA: train each layer's row norms separately from the directions")
    lora("--use_rslora", action="store_true", help="rsLoRA: the LoRA's strength is lora_alpha / sqrt(rank)")
    lora("--init_lora_weights", choices=inits, default="default", help=init)
    lora("--base_precision", **bits, help=frozen)


def check_options(args: argparse.Namespace, refuse: Callable[[str], None]) -> None:
    """Refuses values and combinations that cannot work; `refuse` ends the program with a message."""
    names = (*OPTIONS, "lora_path", "lora_for_other_base", "lora_dropout")
    given = [name for name in names if getattr(args, name) not in (None, 0, "default", "bf16")]
    if args.training_type == "sft" and given:
        refuse(f"--{given[0]}: does nothing with --training_type sft, which trains no LoRA; leave it out")
    if args.lora_for_other_base and not args.lora_path:
        refuse("--lora_for_other_base: there is no LoRA to start from; add --lora_path, or leave it out")
    if args.lora_path and args.init_lora_weights != "default":
        refuse(f"--init_lora_weights {args.init_lora_weights}: --lora_path gives the first values; pass one of the two")
    if args.init_lora_weights == "orthogonal" and (args.rank or DEFAULT_RANK) % 2:
        refuse(f"--rank {args.rank}: must be even for --init_lora_weights orthogonal; pass {args.rank + 1}")
    needs_base = "--use_dora" if args.use_dora else f"--init_lora_weights {args.init_lora_weights}"
    if args.base_precision != "bf16" and (args.use_dora or args.init_lora_weights.startswith(CHANGES_BASE)):
        refuse(f"--base_precision {args.base_precision}: {needs_base} needs unquantised weights; pass one of the two")
    if args.lora_alpha is not None and not args.lora_alpha > 0:
        refuse(f"--lora_alpha {args.lora_alpha}: must be above 0")
    if not 0 <= args.lora_dropout < 1:
        refuse(f"--lora_dropout {args.lora_dropout}: must be from 0 to below 1")


def lora_of(args: argparse.Namespace) -> Lora | None:
    """Returns the LoRA that the options describe; None if all weights are trained."""
    if args.training_type != "lora":
        return None
    options = {name: getattr(args, name) for name in Lora._fields}
    return Lora(**options | {"lora_target_modules": tuple(args.lora_target_modules)})


def needs_autocast(lora: Lora | None) -> bool:
    """Whether products have operands of two dtypes: where all weights are trained in float32, and with DoRA.

    Elsewhere autocast would only cost memory: it also computes and keeps the LayerNorms in float32.
    """
    return lora is None or lora.use_dora


def trained_parameters(transformer: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [weight for weight in transformer.parameters() if weight.requires_grad]


def loraplus_parameters(transformer: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Returns what LoRA+ trains faster: the B matrices, which start at 0, and DoRA's magnitudes, as PEFT does."""
    named = transformer.named_parameters()
    return [weight for name, weight in named if weight.requires_grad and ("lora_B" in name or weight.ndim == 1)]


def count_trained(transformer: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in trained_parameters(transformer))


def check_lora(base: BaseModel, lora: Lora, start: Path | None, *, for_other_base: bool = False) -> None:
    """Refuses targets that cannot have a LoRA, and a file that training cannot start from; reads no weights."""
    quantized.check_packages(lora.base_precision, "--base_precision")
    transformer = empty_transformer(base.transformer)
    for target in lora.lora_target_modules:
        _check_target(transformer, lora, target)
    if start:
        config = lora._replace(init_lora_weights="default").config()
        with torch.device("meta"):
            transformer.add_adapter(config)
        expected = get_peft_model_state_dict(transformer)
        check_start(start, base, config, expected, for_other_base=for_other_base)


def is_target(name: str, target: str) -> bool:
    """Whether PEFT takes the module of this name for a name in --lora_target_modules."""
    return name == target or name.endswith(f".{target}")


def _check_target(transformer: torch.nn.Module, lora: Lora, target: str) -> None:
    # PEFT skips a target that is no module's name as long as it finds another one. Modules of the blocks, which are all
    # alike, are here once, by their name in the block.
    modules = {
        name.split(".", 2)[-1] if name.startswith("transformer_blocks.") else name: module
        for name, module in transformer.named_modules()
    }
    linear = {name: module for name, module in modules.items() if isinstance(module, torch.nn.Linear)}
    targets = [name for name in modules if is_target(name, target)]
    layers = [name for name in targets if name in linear]
    if not layers:
        raise ValueError(
            f"--lora_target_modules {target}: the transformer has no such linear layer in all blocks, but "
            f"{', '.join(sorted(linear))}"
        )
    if len(layers) < len(targets):
        other = min(name for name in targets if name not in linear)
        raise ValueError(
            f"--lora_target_modules {target}: is also {other}, a {type(modules[other]).__name__} and no linear layer; "
            f"write more of the name: {' '.join(layers)}"
        )
    most = min(min(linear[name].in_features, linear[name].out_features) for name in layers)
    if lora.changes_base and lora.rank > most:
        raise ValueError(
            f"--rank {lora.rank}: {target} has only {most} directions for --init_lora_weights "
            f"{lora.init_lora_weights} to start with; pass at most that, or leave {target} out of the targets"
        )


def with_lora(
    base: BaseModel,
    dtype: torch.dtype,
    lora: Lora,
    start: Path | None = None,
    device: torch.device | None = None,
    save_dtype: torch.dtype = torch.float32,
) -> tuple[CogVideoXTransformer3DModel, Export]:
    """Returns the transformer with a LoRA, from `add_lora`, and the function that writes its file in `save_dtype`."""
    # What is taken out of the weights must be exactly what the LoRA starts with, so that happens in float32.
    transformer = load_transformer(base, torch.float32 if lora.changes_base else dtype)
    add_lora(transformer, lora, dtype, start=start, device=device)
    first = get_peft_model_state_dict(transformer) if lora.changes_base else {}
    first = {name: weight.clone() for name, weight in first.items()}

    def export(state: dict, folder: Path) -> Path:
        weights = get_peft_model_state_dict(transformer, state_dict=state)
        if lora.changes_base:
            weights = _against_the_base(weights, first)
        return save_lora(weights, lora.saved(), folder, base, save_dtype)

    return transformer, export


def add_lora(
    transformer: CogVideoXTransformer3DModel, lora: Lora, dtype: torch.dtype, start: Path | None = None, device=None
) -> None:
    """Freezes the transformer in `dtype`, its blocks in `lora.base_precision`, and adds LoRA weights in float32.

    add_adapter makes them in the dtype of the base, and in bfloat16 most updates at 1e-5 would round away.

    Args:
        start: LoRA to start from, a file or the folder that holds it.
        device: where blocks are quantised, one layer at a time, and stay (default: where they are).
    """
    transformer.requires_grad_(False)
    if lora.base_precision != "bf16":
        quantized.quantize_linears(transformer.transformer_blocks, lora.base_precision, device)
    transformer.add_adapter(lora.config())
    cast_training_params(transformer, dtype=torch.float32)
    if not lora.use_dora:  # DoRA needs float32 throughout
        for layer in transformer.modules():
            if isinstance(layer, LoraLayer):
                _compute_in_the_base_dtype(layer)
    for weight in transformer.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.to(dtype)
    if start:
        set_peft_model_state_dict(transformer, load_lora(start))
    elif lora.use_dora:
        _measure_magnitudes(transformer)


def add_loras(transformer, loras: list[LoraHeader], scales: list[float]) -> list[str]:
    """Adds LoRAs to a transformer at `scales` times their trained strengths; returns their adapters' names."""
    adapters = ["lora", *(f"lora_{i}" for i in range(1, len(loras)))]
    for lora, adapter in zip(loras, adapters):
        weights, settings = load_lora(lora.file), dict(lora.settings)
        transformer.load_lora_adapter(weights, prefix=None, adapter_name=adapter, metadata=settings)
    transformer.set_adapters(adapters, scales)  # on top of alpha/rank, which is in the settings
    transformer.eval()  # diffusers 0.42.1 leaves the LoRA's layers in training mode, in which lora_dropout drops
    return adapters


class CastLinear(torch.nn.Linear):
    """A linear layer that keeps its weight in float32 and multiplies in its input's dtype, as under autocast."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight.to(input.dtype))


class FusedLora(LoraLinear):
    """x W^T + b + s (x A^T) B^T, where the last product is scaled and added by the kernel that computes it.

    PEFT passes over the whole output three more times: to scale it, to add it, and to scale its gradient. Without
    gradients PEFT's own forward runs, so that samples are bit for bit those of whoever loads the LoRA.
    """

    def forward(self, x: torch.Tensor, *args, **options) -> torch.Tensor:
        if not torch.is_grad_enabled() or self.disable_adapters or self.merged:
            return super().forward(x, *args, **options)
        assert not args and not options, "CogVideoX gives a linear layer nothing but its input"
        rows = x.flatten(0, -2)
        down = self.lora_A["default"](self.lora_dropout["default"](rows))
        up = self.lora_B["default"].weight.to(down.dtype)
        # In place, for nothing else needs the base layer's output; rows from the start, for autograd copies views.
        result = self.base_layer(rows).addmm_(down, up.t(), alpha=self.scaling["default"])
        return result.unflatten(0, x.shape[:-1])


def _compute_in_the_base_dtype(layer: LoraLinear) -> None:
    """Lets a LoRA layer multiply in its input's dtype without autocast, under which LayerNorms run in float32.

    PEFT itself would cast the input to the LoRA's float32 and multiply in that, eight times as slow.
    """
    layer.cast_input_dtype_enabled = False
    layer.__class__ = FusedLora
    for matrix in (*layer.lora_A.values(), *layer.lora_B.values()):
        matrix.__class__ = CastLinear


def base_of(transformer) -> Callable:
    """Returns the transformer with its LoRA off, as a function; it takes no memory of its own."""
    layers = [module for module in transformer.modules() if isinstance(module, LoraLayer)]

    def predict(**inputs):
        # Not PEFT's enable_adapters: it also switches off the gradients of the LoRA, which DDP and FSDP2 must not see.
        for layer in layers:
            layer._disable_adapters = True
        try:
            return transformer(**inputs)
        finally:
            for layer in layers:
                layer._disable_adapters = False

    return predict


@torch.no_grad()
def _measure_magnitudes(transformer) -> None:
    """Sets DoRA's magnitudes to the norms of the rows that they start from, in float32.

    PEFT 0.21.2 rounds them to the dtype of the base. In bfloat16 that changes each row by up to 0.4 % before any
    training.
    """
    for layer in transformer.modules():
        if isinstance(layer, LoraLayer):
            weight = layer.get_base_layer().weight.float() + layer.get_delta_weight("default").float()
            layer.lora_magnitude_vector["default"].weight.copy_(torch.linalg.vector_norm(weight, dim=1))


def _against_the_base(weights: dict, first: dict) -> dict:
    """Returns a LoRA of twice the rank for the published weights, from one whose first values were taken out of them.

    W - s B0 A0 + s B A = W + s [B, -B0] [A; A0]: Meng et al. 2024 (arXiv:2404.02948), appendix C.
    """
    joined = dict(weights)
    for name in weights:
        if name.endswith("lora_A.weight"):
            joined[name] = torch.cat([weights[name], first[name]], dim=0)
        elif name.endswith("lora_B.weight"):
            joined[name] = torch.cat([weights[name], -first[name]], dim=1)
    return joined


def whole(base: BaseModel, dtype: torch.dtype) -> tuple[CogVideoXTransformer3DModel, Export]:
    """Returns the transformer, all of its weights trainable in float32, and the function that writes them in `dtype`.

    bfloat16 keeps 8 bits: an update of less than 0.4 % of a weight would round away.
    """
    return load_transformer(base, torch.float32), partial(save_transformer, base, dtype)


def save_transformer(base: BaseModel, dtype: torch.dtype, weights: dict, folder: Path) -> Path:
    """Writes `folder`/transformer as `CogVideoXTransformer3DModel.from_pretrained` reads it; complete or absent."""
    final, temporary = folder / TRANSFORMER_FOLDER, folder / f".{TRANSFORMER_FOLDER}.incomplete"
    transformer = empty_transformer(base.transformer)
    transformer.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True)
    transformer.register_to_config(_name_or_path=base.name)  # where diffusers looks for what it was made from
    shutil.rmtree(temporary, ignore_errors=True)
    transformer.save_pretrained(temporary)
    for file in temporary.iterdir():
        file.chmod(0o644)  # safetensors makes its files private
    shutil.rmtree(final, ignore_errors=True)
    publish_folder(temporary, final)
    return final
