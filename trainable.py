"""What of the transformer is trained, a LoRA or all of it, and the files that are its result."""

import argparse
import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import CogVideoXTransformer3DModel
from diffusers.training_utils import EMAModel, cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

import quantized
from cogvideox import Checkpoint, empty_transformer, load_transformer
from dataset import at_least, expanded_path, publish, publish_folder

OPTIONS = ("rank", "lora_alpha", "lora_target_modules", "use_dora", "use_rslora", "init_lora_weights", "base_precision")
DEFAULT_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
LORA_FILE = "pytorch_lora_weights.safetensors"
TRANSFORMER_FOLDER = "transformer"
# Those that begin with a part of the frozen weights, which is taken out of these.
MUTATING = ("pissa", "olora")
CHANGING = (*MUTATING, "corda", "loftq", "lora_ga")  # so do these of PEFT's, which diffusers cannot load

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
    if args.init_lora_weights == "orthogonal" and (args.rank or 128) % 2:
        refuse(f"--rank {args.rank}: must be even for --init_lora_weights orthogonal; pass {args.rank + 1}")
    whole = "--use_dora" if args.use_dora else f"--init_lora_weights {args.init_lora_weights}"
    if args.base_precision != "bf16" and (args.use_dora or args.init_lora_weights.startswith(MUTATING)):
        refuse(f"--base_precision {args.base_precision}: {whole} begins with unquantised weights; pass one of the two")
    if not 0 <= args.lora_dropout < 1:
        refuse(f"--lora_dropout {args.lora_dropout}: must be from 0 to below 1")
    if args.ema_decay is not None and not 0 < args.ema_decay < 1:
        refuse(f"--ema_decay {args.ema_decay}: must be above 0 and below 1")


def weights_of(transformer: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Those that are trained."""
    return [weight for weight in transformer.parameters() if weight.requires_grad]


def count(transformer: torch.nn.Module) -> str:
    return f"{sum(weight.numel() for weight in weights_of(transformer)) / 1e6:.4g} million weights"


# ---- LoRA ------------------------------------------------------------------------------------------------------------


class Average:
    """A moving average of trained weights (EMA), or nothing if `decay` is None.

    The first updates weigh more, as in diffusers' EMAModel: decay is at most (1 + n) / (10 + n) after n of them.
    """

    def __init__(self, weights: list[torch.nn.Parameter], decay: float | None):
        self.weights, self.decay = weights, decay
        self.restart(0)

    def restart(self, step: int) -> None:
        """Goes on from what the model holds, which is the average after `step` updates."""
        if self.decay is not None:
            self._ema = EMAModel(self.weights, decay=self.decay)
            self._ema.optimization_step = step

    def step(self) -> None:
        """To be called after each update."""
        if self.decay is not None:
            self._ema.step(self.weights)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the average, for as long as it is needed."""
        if self.decay is None:
            yield
            return
        self._ema.store(self.weights)
        self._ema.copy_to(self.weights)
        try:
            yield
        finally:
            self._ema.restore(self.weights)


def check_lora(checkpoint: Checkpoint, lora: Lora, start: Path | None) -> None:
    """Refuses, from configs and headers alone, a target that is no linear layer and a file to start from that differs.

    Raises:
        ValueError: with what to pass instead.
    """
    quantized.check_packages(lora.base_precision, "--base_precision")
    transformer = empty_transformer(checkpoint.transformer)
    for target in lora.lora_target_modules:
        _check_target(transformer, lora, target)
    if start:
        with torch.device("meta"):
            transformer.add_adapter(lora._replace(init_lora_weights="default").config())
        _check_start(checkpoint, lora, start, get_peft_model_state_dict(transformer))


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


def _check_start(checkpoint: Checkpoint, lora: Lora, start: Path, expected: dict) -> None:
    file = lora_file(start)
    try:
        with safe_open(file, framework="pt") as weights:
            shapes = {name: list(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
            header = weights.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"--lora_path {file}: cannot be read as .safetensors ({error}); copy it again") from error
    trained_on = json.loads(header.get("cogvideox_transformer", "null"))
    if trained_on not in (None, checkpoint.identity):
        raise ValueError(
            f"--lora_path {file}: was trained on another kind of CogVideoX ({header.get('base_model')}) than "
            f"{checkpoint.name}; pass the one that it was trained on"
        )
    settings = json.loads(header.get("lora_adapter_metadata", "{}"))
    settings = {name.removeprefix("transformer."): value for name, value in settings.items()}
    rank = next((shape[0] for name, shape in shapes.items() if name.endswith("lora_A.weight")), None)
    if rank is None:
        raise ValueError(f"--lora_path {file}: holds no LoRA in diffusers' format, but {next(iter(shapes), 'nothing')}")
    unknown = [name for name in ("rank_pattern", "alpha_pattern", "lora_bias") if settings.get(name)]
    unknown += ["init_lora_weights"] * str(settings.get("init_lora_weights")).startswith(CHANGING)
    if unknown:
        raise ValueError(
            f"--lora_path {file}: was made with {unknown[0]} {settings[unknown[0]]}, from which no run starts here; "
            "convert it into a plain LoRA, or start without it"
        )
    # diffusers applies a file that does not say its strength at 1.
    found = {"r": rank, "lora_alpha": rank, "use_dora": False, "use_rslora": False} | settings
    same = lora.use_dora == found["use_dora"] and lora.use_rslora == found["use_rslora"] and lora.rank == found["r"]
    if not (same and math.isclose(lora.lora_alpha, found["lora_alpha"], rel_tol=1e-3)):
        switches = "".join(f" --{name}" for name in ("use_dora", "use_rslora") if found[name])
        raise ValueError(
            f"--lora_path {file}: of other options than those given (rank {lora.rank}, alpha {lora.lora_alpha:g}); "
            f"go on with --rank {found['r']} --lora_alpha {found['lora_alpha']:g}{switches}, and no others of them"
        )
    if wrong := _wrong_shapes(shapes, {f"transformer.{name}": list(weight.shape) for name, weight in expected.items()}):
        raise ValueError(f"--lora_path {file}: {'; '.join(wrong[:4])}; pass what it was trained with")


def _wrong_shapes(found: dict, expected: dict) -> list[str]:
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    wrong = [f"--lora_target_modules: it has no {missing[0]}"] if missing else []
    wrong += [f"--lora_target_modules: it has {unknown[0]}"] if unknown else []
    common = sorted(expected.keys() & found.keys())
    return wrong + [
        f"its {name} is {found[name]}, here {expected[name]}" for name in common if found[name] != expected[name]
    ]


def lora_file(path: Path) -> Path:
    """The file itself, or that of a run directory or checkpoint.

    Raises:
        FileNotFoundError: there is none.
    """
    file = path / LORA_FILE if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"--lora_path {path}: no such file or folder; correct the path")
    if not file.is_file():
        other = "holds a fine-tuned transformer, " * (path / TRANSFORMER_FOLDER).is_dir()
        raise FileNotFoundError(
            f"--lora_path {path}: {other}no {LORA_FILE}; give a run directory or checkpoint of a LoRA, or its file"
        )
    return file


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
        weights = {name.removeprefix("transformer."): weight for name, weight in load_file(lora_file(start)).items()}
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


def with_lora(
    checkpoint: Checkpoint, dtype: torch.dtype, lora: Lora, start: Path | None, device: torch.device | None = None
) -> tuple[CogVideoXTransformer3DModel, Export]:
    """The transformer, frozen in `dtype`, with a LoRA in float32; and what writes the LoRA's file.

    Args:
        device: where blocks are quantised, one layer after the other, so that it never holds more of them.
    """
    # What is taken out of the weights must be just what the LoRA begins with, so that happens in float32.
    transformer = load_transformer(checkpoint, torch.float32 if lora.mutates else dtype)
    add_lora(transformer, lora, dtype, start, device)
    first = get_peft_model_state_dict(transformer) if lora.mutates else {}
    first = {name: weight.clone() for name, weight in first.items()}

    def export(state: dict, folder: Path) -> Path:
        weights = get_peft_model_state_dict(transformer, state_dict=state)
        return save_lora(_against_the_base(weights, first) if lora.mutates else weights, lora, folder, checkpoint)

    return transformer, export


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


def save_lora(weights: dict, lora: Lora, folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes a LoRA as diffusers' `load_lora_weights(folder)` reads it, at its trained strength.

    diffusers applies any file without `lora_adapter_metadata` at 1.0, whatever alpha was.
    """
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in lora.saved().items()}),
        "base_model": checkpoint.name,
        "cogvideox_transformer": json.dumps(checkpoint.identity),
    }
    publish(
        folder / LORA_FILE, save({f"transformer.{name}": weight.cpu() for name, weight in weights.items()}, metadata)
    )
    return folder / LORA_FILE


# ---- the whole transformer -------------------------------------------------------------------------------------------


def whole(checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[CogVideoXTransformer3DModel, Export]:
    """The transformer with all of its weights trainable, in float32; and what writes them in `dtype`.

    bfloat16 keeps 8 bits: an update of less than 0.4 % of a weight would round away.
    """
    transformer = load_transformer(checkpoint, torch.float32)

    def export(state: dict, folder: Path) -> Path:
        return save_transformer({name: weight.to(dtype) for name, weight in state.items()}, folder, checkpoint)

    return transformer, export


def save_transformer(weights: dict, folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes `folder`/transformer as `CogVideoXTransformer3DModel.from_pretrained` reads it; complete or absent."""
    final, temporary = folder / TRANSFORMER_FOLDER, folder / f".{TRANSFORMER_FOLDER}.incomplete"
    transformer = empty_transformer(checkpoint.transformer)
    transformer.load_state_dict(weights, assign=True)
    transformer.register_to_config(_name_or_path=checkpoint.name)  # where diffusers looks for what it was made from
    shutil.rmtree(temporary, ignore_errors=True)
    transformer.save_pretrained(temporary)
    for file in temporary.iterdir():
        file.chmod(0o644)  # safetensors makes its files private
    shutil.rmtree(final, ignore_errors=True)
    publish_folder(temporary, final)
    return final
