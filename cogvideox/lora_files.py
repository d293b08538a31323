"""LoRA files in diffusers' format: their names, headers and checks; how ours are read and written."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from cogvideox.base_model import BaseModel
from files import publish, with_metadata

LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' default name, with which load_lora_weights(folder) finds it
TRANSFORMER_FOLDER = "transformer"  # beside it in a run directory where all weights are trained
PREFIX = "transformer."  # of every name in the file and in its metadata

# Beginnings of PEFT's init_lora_weights that take a part out of the frozen weights, for the LoRA to start with.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def find_lora_file(path: Path) -> Path:
    """Returns the file, or the file in a run directory or checkpoint; raises FileNotFoundError if there is none."""
    file = path / LORA_FILE if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"--lora_path {path}: no such file or folder; correct the path")
    if not file.is_file():
        other = "holds a fine-tuned transformer, " if (path / TRANSFORMER_FOLDER).is_dir() else ""
        raise FileNotFoundError(
            f"--lora_path {path}: {other}no {LORA_FILE}; give a run directory or checkpoint of a LoRA, or its file"
        )
    return file


class LoraHeader(NamedTuple):
    """What the header of a LoRA file says; the weights stay on disk."""

    file: Path
    shapes: dict[str, tuple[int, ...]]  # of each weight
    settings: dict  # LoraConfig's fields, as far as they are recorded
    trained_on: dict | None  # `BaseModel.identity`; None where it is not recorded
    base_model: str | None

    @property
    def rank(self) -> int | None:
        return next((shape[0] for name, shape in self.shapes.items() if name.endswith("lora_A.weight")), None)

    @property
    def is_dora(self) -> bool:
        return any(name.endswith(".lora_magnitude_vector") for name in self.shapes)

    @property
    def changes_base(self) -> bool:
        """Whether the LoRA belongs to base weights that its first values were taken out of."""
        return str(self.settings.get("init_lora_weights")).startswith(CHANGES_BASE)


def read_header(file: Path, option: str = "--lora_path") -> LoraHeader:
    """Reads the header of a .safetensors file; raises ValueError, which names `option`, if it is not one."""
    try:
        with safe_open(file, framework="pt") as weights:
            shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
            metadata = weights.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{option} {file}: cannot be read as .safetensors ({error}); copy it again") from error
    settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    return LoraHeader(
        file,
        shapes,
        settings={name.removeprefix(PREFIX): value for name, value in settings.items()},
        trained_on=json.loads(metadata.get("cogvideox_transformer", "null")),
        base_model=metadata.get("base_model"),
    )


def check_start(start: Path, base: BaseModel, config: LoraConfig, expected: dict[str, torch.Tensor]) -> None:
    """Raises ValueError if a LoRA is of another base model, rank, strength or kind, or has other layers.

    Args:
        config: of the LoRA that is to be trained.
        expected: its state dict.
    """
    header = read_header(find_lora_file(start))
    found = f"--lora_path {header.file}"
    if header.trained_on not in (None, base.identity):
        raise ValueError(
            f"{found}: was trained on another kind of CogVideoX ({header.base_model}) than {base.name}; pass the one "
            "that it was trained on"
        )
    if header.rank is None:
        raise ValueError(f"{found}: holds no LoRA in diffusers' format, but {next(iter(header.shapes), 'nothing')}")
    _check_settings(found, header, config)
    shapes = {f"{PREFIX}{name}": tuple(weight.shape) for name, weight in expected.items()}
    if differences := _differences(header.shapes, shapes):
        raise ValueError(f"{found}: {'; '.join(differences[:4])}; pass the options that it was trained with")


def _check_settings(found: str, header: LoraHeader, config: LoraConfig) -> None:
    settings = header.settings
    unsupported = [name for name in ("rank_pattern", "alpha_pattern", "lora_bias") if settings.get(name)]
    if header.changes_base:
        unsupported.append("init_lora_weights")
    if unsupported:
        raise ValueError(
            f"{found}: was made with {unsupported[0]} {settings[unsupported[0]]}, which training cannot start from; "
            "convert it into a plain LoRA, or start without it"
        )
    # diffusers applies a file that does not say its strength at 1.
    trained = {"r": header.rank, "lora_alpha": header.rank, "use_dora": False, "use_rslora": False} | settings
    same_kind = all(getattr(config, name) == trained[name] for name in ("r", "use_dora", "use_rslora"))
    if not (same_kind and math.isclose(config.lora_alpha, trained["lora_alpha"], rel_tol=1e-3)):
        switches = "".join(f" --{name}" for name in ("use_dora", "use_rslora") if trained[name])
        raise ValueError(
            f"{found}: was trained with other options than those given (rank {config.r}, alpha {config.lora_alpha:g}); "
            f"continue with --rank {trained['r']} --lora_alpha {trained['lora_alpha']:g}{switches}, and no others of "
            "them"
        )


def _differences(found: dict, expected: dict) -> list[str]:
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    differences = [f"--lora_target_modules: it has no {missing[0]}"] if missing else []
    differences += [f"--lora_target_modules: it has {unknown[0]}"] if unknown else []
    return differences + [
        f"its {name} is {list(found[name])}, here {list(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]


def load_lora(path: Path) -> dict[str, torch.Tensor]:
    """Returns the weights of a LoRA file, or of the folder that holds it, named as in the transformer."""
    return {name.removeprefix(PREFIX): weight for name, weight in load_file(find_lora_file(path)).items()}


def save_lora(weights: dict[str, torch.Tensor], settings: dict, folder: Path, base: BaseModel) -> Path:
    """Writes a LoRA as diffusers' `load_lora_weights(folder)` reads it, at its trained strength.

    diffusers applies any file without `lora_adapter_metadata` at 1.0, whatever alpha was.

    Args:
        settings: from `Lora.saved`.
    """
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps({f"{PREFIX}{name}": value for name, value in settings.items()}),
        "base_model": base.name,
        "cogvideox_transformer": json.dumps(base.identity),
    }
    weights = {f"{PREFIX}{name}": weight.cpu() for name, weight in weights.items()}
    publish(folder / LORA_FILE, with_metadata(save(weights), metadata))
    return folder / LORA_FILE
