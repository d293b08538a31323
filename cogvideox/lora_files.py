"""LoRA files: their names, headers and checks; and how ours are written."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from cogvideox.base_model import BaseModel
from files import publish

LORA_FILE = "pytorch_lora_weights.safetensors"
TRANSFORMER_FOLDER = "transformer"

# Values of init_lora_weights that take a part out of the frozen weights, for the LoRA to begin with.
MUTATING = ("pissa", "olora")
CHANGING = (*MUTATING, "corda", "loftq", "lora_ga")  # so do these of PEFT's, which diffusers cannot load


def find_lora_file(path: Path) -> Path:
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


class LoraHeader(NamedTuple):
    """What a LoRA file says of itself; its weights stay on disk."""

    file: Path
    shapes: dict[str, list[int]]  # of each weight
    settings: dict  # LoraConfig's fields, as far as they are recorded
    trained_on: dict | None  # `BaseModel.identity`; None where it is not recorded
    base_model: str | None

    @property
    def rank(self) -> int | None:
        return next((shape[0] for name, shape in self.shapes.items() if name.endswith("lora_A.weight")), None)


def read_header(file: Path) -> LoraHeader:
    """Reads names, shapes and metadata of a .safetensors file.

    Raises:
        ValueError: it is not such a file.
    """
    try:
        with safe_open(file, framework="pt") as weights:
            shapes = {name: list(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
            metadata = weights.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"--lora_path {file}: cannot be read as .safetensors ({error}); copy it again") from error
    settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    return LoraHeader(
        file,
        shapes,
        settings={name.removeprefix("transformer."): value for name, value in settings.items()},
        trained_on=json.loads(metadata.get("cogvideox_transformer", "null")),
        base_model=metadata.get("base_model"),
    )


def check_start(start: Path, base: BaseModel, config: LoraConfig, expected: dict[str, torch.Tensor]) -> None:
    """Refuses a LoRA that training cannot start from, by its header.

    Args:
        config: of the LoRA that is to be trained.
        expected: its state dict.

    Raises:
        ValueError: it is of another base model, rank, strength or kind, or has other layers.
    """
    header = read_header(find_lora_file(start))
    flag = f"--lora_path {header.file}"
    if header.trained_on not in (None, base.identity):
        raise ValueError(
            f"{flag}: was trained on another kind of CogVideoX ({header.base_model}) than {base.name}; pass the one "
            "that it was trained on"
        )
    if header.rank is None:
        raise ValueError(f"{flag}: holds no LoRA in diffusers' format, but {next(iter(header.shapes), 'nothing')}")
    _check_settings(flag, header, config)
    shapes = {f"transformer.{name}": list(weight.shape) for name, weight in expected.items()}
    if wrong := _wrong_shapes(header.shapes, shapes):
        raise ValueError(f"{flag}: {'; '.join(wrong[:4])}; pass what it was trained with")


def _check_settings(flag: str, header: LoraHeader, config: LoraConfig) -> None:
    settings = header.settings
    unknown = [name for name in ("rank_pattern", "alpha_pattern", "lora_bias") if settings.get(name)]
    if str(settings.get("init_lora_weights")).startswith(CHANGING):
        unknown.append("init_lora_weights")
    if unknown:
        raise ValueError(
            f"{flag}: was made with {unknown[0]} {settings[unknown[0]]}, from which no run starts here; convert it "
            "into a plain LoRA, or start without it"
        )
    # diffusers applies a file that does not say its strength at 1.
    found = {"r": header.rank, "lora_alpha": header.rank, "use_dora": False, "use_rslora": False} | settings
    same = all(getattr(config, name) == found[name] for name in ("r", "use_dora", "use_rslora"))
    if not (same and math.isclose(config.lora_alpha, found["lora_alpha"], rel_tol=1e-3)):
        switches = "".join(f" --{name}" for name in ("use_dora", "use_rslora") if found[name])
        raise ValueError(
            f"{flag}: of other options than those given (rank {config.r}, alpha {config.lora_alpha:g}); go on with "
            f"--rank {found['r']} --lora_alpha {found['lora_alpha']:g}{switches}, and no others of them"
        )


def _wrong_shapes(found: dict, expected: dict) -> list[str]:
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    wrong = [f"--lora_target_modules: it has no {missing[0]}"] if missing else []
    wrong += [f"--lora_target_modules: it has {unknown[0]}"] if unknown else []
    common = sorted(expected.keys() & found.keys())
    return wrong + [
        f"its {name} is {found[name]}, here {expected[name]}" for name in common if found[name] != expected[name]
    ]


def save_lora(weights: dict[str, torch.Tensor], settings: dict, folder: Path, base: BaseModel) -> Path:
    """Writes a LoRA as diffusers' `load_lora_weights(folder)` reads it, at its trained strength.

    diffusers applies any file without `lora_adapter_metadata` at 1.0, whatever alpha was.

    Args:
        settings: from `Lora.saved`.
    """
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in settings.items()}),
        "base_model": base.name,
        "cogvideox_transformer": json.dumps(base.identity),
    }
    publish(
        folder / LORA_FILE, save({f"transformer.{name}": weight.cpu() for name, weight in weights.items()}, metadata)
    )
    return folder / LORA_FILE
