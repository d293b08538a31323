"""LoRA files: the namings of other tools, what their headers say, and checks; how ours are read and written."""

import json
import math
import re
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from pickle import UnpicklingError
from typing import NamedTuple

import torch
from diffusers.utils.state_dict_utils import convert_state_dict, convert_unet_state_dict_to_peft
from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from cogvideox.base_model import BaseModel, empty_transformer, published_as, published_like, reaches_hub, why_not_loaded
from files import CannotContinue, publish, with_metadata, write_json

LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' default name, with which load_lora_weights(folder) finds it
PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")  # PEFT's, beside PEFT_CONFIG
PEFT_CONFIG = "adapter_config.json"
PEFT_SETTINGS = (
    "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora", "lora_bias",
    "init_lora_weights",
)  # fmt: skip
SAVE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PICKLED = (".pt", ".pth", ".bin", ".ckpt")
TRANSFORMER_FOLDER = "transformer"  # beside it in a run directory where all weights are trained
PREFIX = "transformer."  # of every name in the file and in its metadata

# Beginnings of PEFT's init_lora_weights that take a part out of the frozen weights, for the LoRA to start with.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

# ---- names -----------------------------------------------------------------------------------------------------------

WRAPPERS = re.compile(r"^((base_model\.model|diffusion_model|transformer|model)\.)+")
# ComfyUI's name of each layer of a block (comfy/ldm/cogvideo/model.py); norm1.linear and norm2.linear keep theirs.
COMFYUI = {
    "attn1.to_q": "q",
    "attn1.to_k": "k",
    "attn1.to_v": "v",
    "attn1.to_out.0": "attn_out",
    "ff.net.0.proj": "ff_proj",
    "ff.net.2": "ff_out",
}
IN_BLOCK = (*COMFYUI, "norm1.linear", "norm2.linear")
EMBEDDINGS = ("time_embedding.linear_1", "time_embedding.linear_2", "ofs_embedding.linear_1", "ofs_embedding.linear_2")
OUTSIDE = ("patch_embed.proj", "patch_embed.text_proj", *EMBEDDINGS, "norm_out.linear", "proj_out")
KOHYA = {name.replace(".", "_"): name for name in (*IN_BLOCK, *OUTSIDE)}
KOHYA_NAME = re.compile(r"lora_(?:unet|transformer)_(transformer_blocks_\d+_)?(\w+)\.(.+)")
# SAT joins q, k and v in one layer with three matrices (tools/export_sat_lora_weight.py of CogVideo).
SAT = {
    "attention.query_key_value.0": "attn1.to_q",
    "attention.query_key_value.1": "attn1.to_k",
    "attention.query_key_value.2": "attn1.to_v",
    "attention.dense.0": "attn1.to_out.0",
    "mlp.dense_h_to_4h.0": "ff.net.0.proj",
    "mlp.dense_4h_to_h.0": "ff.net.2",
}
SAT_NAME = re.compile(r"layers\.(\d+)\.(.+)\.matrix_([AB])\.(\d)")
PARTS = {
    ".lora_linear_layer.down.": ".lora_A.",
    ".lora_linear_layer.up.": ".lora_B.",
    ".lora_down.": ".lora_A.",
    ".lora_up.": ".lora_B.",
    ".dora_scale": ".lora_magnitude_vector",
}
MATRIX = re.compile(r"(.+)\.(lora_A|lora_B)(?:\.\w+)?\.(weight|bias)")  # PEFT's own files may name the adapter
MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(\.\w+)*")
ALPHA = re.compile(r"(.+?)(\.lora_A(\.weight)?)?\.alpha")


def name_in_transformer(name: str) -> str | None:
    """Returns the name of a LoRA's tensor in the transformer, such as proj_out.lora_A.weight; None if it is no LoRA's.

    The strength of a layer ends in .alpha.
    """
    name = WRAPPERS.sub("", name)
    if match := KOHYA_NAME.fullmatch(name):
        block, layer = (match[1] or "").replace("transformer_blocks_", "transformer_blocks."), KOHYA.get(match[2])
        name = f"{block[:-1]}.{layer}.{match[3]}" if block else f"{layer}.{match[3]}"
    elif match := SAT_NAME.fullmatch(name):
        layer = SAT.get(f"{match[2]}.{match[4]}")
        name = f"transformer_blocks.{match[1]}.{layer}.lora_{match[3]}.weight"
    elif match := re.fullmatch(r"blocks\.(\d+)\.(\w+)\.(.+)", name):
        layer = next((ours for ours, theirs in COMFYUI.items() if theirs == match[2]), match[2])
        name = f"transformer_blocks.{match[1]}.{layer}.{match[3]}"
    (name,) = convert_state_dict(convert_unet_state_dict_to_peft({name: None}), PARTS)
    if "None." in name:
        return None
    if match := MATRIX.fullmatch(name):
        return ".".join(match.groups()) if match.groups()[1:] != ("lora_A", "bias") else None
    if match := MAGNITUDE.fullmatch(name):
        return f"{match[1]}.lora_magnitude_vector"
    match = ALPHA.fullmatch(name)
    return f"{match[1]}.alpha" if match else None


def _rename(names: list[str], found: str) -> dict[str, str]:
    """Returns the file's name of each tensor, by its name in the transformer."""
    renamed, of_sat = {}, any(".matrix_A." in name for name in names)
    left_out = []
    for name in names:
        ours = name_in_transformer(name)
        if of_sat and not ours and ".matrix_" not in name:
            left_out.append(name)  # SAT saves the whole model
        elif not ours:
            raise ValueError(f"{found}: holds {name}, which belongs to no LoRA of CogVideoX; give the file of a LoRA")
        elif ours in renamed:
            raise ValueError(f"{found}: holds {renamed[ours]} and {name}, both of {ours}; save one LoRA per file")
        else:
            renamed[ours] = name
    if not renamed:
        raise ValueError(f"{found}: holds nothing; give the file of a LoRA")
    if left_out:
        print(f"{found}: {len(left_out)} tensors beside the LoRA are not used, such as {left_out[0]}")
    return renamed


# ---- files -----------------------------------------------------------------------------------------------------------


def _only_lora(names: Iterable[str], found: str) -> str | None:
    """Returns the LoRA's file among those of a folder: of a usual name, or the only one; None if there is none."""
    names = sorted(names)
    if usual := [name for name in (LORA_FILE, *PEFT_FILES) if name in names]:
        return usual[0]
    weights = [name for name in names if name.endswith(".safetensors")]
    weights = weights or [name for name in names if name.endswith(PICKLED)]
    if len(weights) > 1:
        more = f" and {len(weights) - 10} more" if len(weights) > 10 else ""
        raise ValueError(f"{found}: holds several files: {', '.join(weights[:10])}{more}; give one of them")
    return weights[0] if weights else None


def lora_file_in(folder: Path, found: str = "") -> Path | None:
    """Returns the LoRA's file in a folder, None if there is none; raises ValueError if it is one of several."""
    names = [path.name for path in folder.glob("*") if path.is_file()]
    file = _only_lora(names, found or str(folder))
    return folder / file if file else None


def find_lora_file(path: Path, option: str = "--lora_path") -> Path:
    """Returns a LoRA's file: `path` itself, the one in this folder, or a download from the hub.

    Args:
        path: a file, a folder, or a hub name: owner/name, owner/name/folder or owner/name/file.safetensors.
        option: that named it, for messages.
    """
    found = f"{option} {path}".strip()
    if path.is_file():
        return path
    if path.is_dir():
        if file := lora_file_in(path, found):
            return file
        other = "holds a fine-tuned transformer, " if (path / TRANSFORMER_FOLDER).is_dir() else ""
        raise FileNotFoundError(
            f"{found}: {other}no {LORA_FILE}; give a run directory or checkpoint of a LoRA, or its file"
        )
    try:
        file = _lora_on_hub(path, found)
    except (OSError, ValueError) as error:
        if str(error).startswith(found):
            raise
        message = f"no such file or folder, nor a LoRA on the hub; check it ({why_not_loaded(error)})"
        raise FileNotFoundError(f"{found}: {message}") from error
    if not file:
        raise FileNotFoundError(f"{found}: no LoRA in this repository of the hub; check the name")
    return file


def _lora_on_hub(path: Path, found: str) -> Path | None:
    """Downloads a LoRA's file; takes it from the cache where the hub cannot be reached."""
    repo, inside = "/".join(path.parts[:2]), PurePosixPath(*path.parts[2:])
    cached = {"local_files_only": not reaches_hub()}
    if inside.suffix in (".safetensors", *PICKLED):
        return Path(hf_hub_download(repo, str(inside), **cached))
    if cached["local_files_only"]:
        return lora_file_in(Path(snapshot_download(repo, **cached)) / inside, found)
    files = [PurePosixPath(name) for name in list_repo_files(repo)]
    name = _only_lora([file.name for file in files if file.parent == inside], found)
    if name in PEFT_FILES and inside / PEFT_CONFIG in files:
        hf_hub_download(repo, str(inside / PEFT_CONFIG))
    return Path(hf_hub_download(repo, str(inside / name))) if name else None


class Header(NamedTuple):
    shapes: dict[str, tuple[int, ...]]  # of each tensor
    metadata: dict[str, str]


def read_header(file: Path, option: str) -> Header:
    """Reads the header of a .safetensors file; raises ValueError, which names `option`, if it is not one."""
    try:
        with safe_open(file, framework="pt") as weights:
            shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
            return Header(shapes, weights.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{option} {file}: cannot be read as .safetensors ({error}); copy it again") from error


def _load_pickled(file: Path, found: str) -> dict[str, torch.Tensor]:
    """Loads tensors that torch.save wrote, without running code; SAT keeps them in "module"."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        way_out = "copy it again, or ask for it as .safetensors"
        raise ValueError(f"{found}: cannot be read as tensors only ({reason}); {way_out}") from error
    for name in ("model", "module", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{found}: must hold tensors by name, and nothing else; ask for it as .safetensors")
    return content


class LoraHeader(NamedTuple):
    """What a LoRA file says, checked; the weights stay on disk."""

    file: Path
    shapes: dict[str, tuple[int, ...]]  # of each weight, by its name in the transformer
    names: dict[str, str]  # the file's own, by the name in the transformer
    settings: dict  # LoraConfig's fields
    strength_from: str  # where it is recorded; "" where nowhere, and diffusers applies the LoRA at 1
    trained_on: dict | None  # `BaseModel.identity`; None where it is not recorded
    base_model: str | None

    @property
    def is_dora(self) -> bool:
        return any(name.endswith(".lora_magnitude_vector") for name in self.shapes)

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each layer."""
        suffix = ".lora_A.weight"
        return {name.removesuffix(suffix): shape[0] for name, shape in self.shapes.items() if name.endswith(suffix)}

    @property
    def strengths(self) -> dict[str, float]:
        """What the product of the matrices of each layer is multiplied by."""
        config = LoraConfig(**self.settings)
        return {
            layer: _of_layer(config.alpha_pattern, layer, config.lora_alpha)
            / (math.sqrt(rank) if config.use_rslora else rank)
            for layer, rank in self.ranks.items()
        }


def read_lora(file: Path, option: str = "--lora_path") -> LoraHeader:
    """Reads what a LoRA file in any known naming says, and checks it; raises ValueError, which names `option`."""
    found = f"{option} {file}".strip()
    names, tensors, metadata = _read_tensors(file, option, found)
    alphas = {
        name.removesuffix(".alpha"): _one_number(tensors.pop(name), names[name], found)
        for name in sorted(tensors)
        if name.endswith(".alpha")
    }
    recorded, source = _recorded(file, metadata, found)
    _check_settings_known(recorded, found)
    ranks = _check_pairs(tensors, names, found)
    if not recorded:
        of_sat = any(".matrix_A." in name for name in names.values())
        recorded = settings_of(ranks, alphas, default_alpha=1 if of_sat else None)
        source = ".alpha in the file" if alphas else "alpha 1, SAT's default" if of_sat else ""
    settings = {"target_modules": sorted(ranks)} | recorded
    if any(name.endswith(".lora_magnitude_vector") for name in tensors):
        settings["use_dora"] = True
    if any(name.endswith(".bias") for name in tensors):
        settings["lora_bias"] = True
        print(f"{found}: its biases are applied with the LoRA")
    _check_recorded(settings, ranks, alphas, found)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    trained_on = _json_object(metadata, "cogvideox_transformer", found) or None
    return LoraHeader(file, shapes, names, settings, source, trained_on, _recorded_base(file, metadata, found))


def _read_tensors(file: Path, option: str, found: str) -> tuple[dict[str, str], dict[str, torch.Tensor], dict]:
    """Returns the file's names and its tensors, both by the name in the transformer, and its metadata."""
    if file.suffix in PICKLED:
        tensors, metadata = _load_pickled(file, found), {}
        names = _rename(sorted(tensors), found)
    else:
        shapes, metadata = read_header(file, option)
        names = _rename(sorted(shapes), found)
        tensors = load_file(file)
    for name in names.values():
        if not tensors[name].is_floating_point():
            raise ValueError(f"{found}: {name} is {tensors[name].dtype}; must be floating point; save it as float32")
        if not tensors[name].float().isfinite().all():
            raise ValueError(f"{found}: {name} has values that are not finite; use an earlier checkpoint of it")
    return names, {ours: _flat_magnitude(ours, tensors[name]) for ours, name in names.items()}, metadata


def _flat_magnitude(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Returns DoRA's magnitudes of a linear layer as [out], which some write as [out, 1] or [1, out]."""
    return tensor.flatten() if name.endswith(".lora_magnitude_vector") and tensor.ndim == 2 else tensor


def _one_number(tensor: torch.Tensor, name: str, found: str) -> float:
    if tensor.numel() != 1:
        raise ValueError(f"{found}: {name} is {list(tensor.shape)}; must be one number; save the LoRA again")
    return tensor.item()


def _json_object(metadata: dict[str, str], name: str, found: str) -> dict:
    try:
        content = json.loads(metadata.get(name, "{}"))
    except ValueError as error:
        raise ValueError(f"{found}: its {name} is not JSON ({error}); save the LoRA again") from error
    if not isinstance(content, dict | None):
        raise ValueError(f"{found}: its {name} is {content!r}; must be a JSON object; save the LoRA again")
    return content or {}


def _recorded(file: Path, metadata: dict[str, str], found: str) -> tuple[dict, str]:
    """Returns LoraConfig's fields as the metadata, PEFT's config beside the file, or kohya's metadata record them."""
    if settings := _json_object(metadata, "lora_adapter_metadata", found):
        return {name.removeprefix(PREFIX): value for name, value in settings.items()}, "metadata"
    config = file.with_name(PEFT_CONFIG)
    if file.name in PEFT_FILES and config.is_file():
        settings = _json_object({PEFT_CONFIG: config.read_text(encoding="utf-8")}, PEFT_CONFIG, found)
        if settings.get("peft_type") != "LORA":
            kind = settings.get("peft_type")
            raise ValueError(f"{found}: {config} has peft_type {kind}; must be LORA; give the folder of a LoRA")
        known = {name: value for name, value in settings.items() if name in PEFT_SETTINGS and value is not None}
        return known, PEFT_CONFIG
    if "ss_network_alpha" in metadata and "ss_network_dim" in metadata:
        try:
            rank, alpha = int(metadata["ss_network_dim"]), float(metadata["ss_network_alpha"])
        except ValueError as error:
            raise ValueError(f"{found}: its ss_network_alpha or _dim is no number ({error}); save it again") from error
        return {"r": rank, "lora_alpha": alpha}, "ss_network_alpha"
    return {}, ""


def _recorded_base(file: Path, metadata: dict[str, str], found: str) -> str | None:
    config = file.with_name(PEFT_CONFIG)
    if metadata.get("base_model") or file.name not in PEFT_FILES or not config.is_file():
        return metadata.get("base_model")
    content = {PEFT_CONFIG: config.read_text(encoding="utf-8")}
    return _json_object(content, PEFT_CONFIG, found).get("base_model_name_or_path") or None


def _check_settings_known(settings: dict, found: str) -> None:
    """Refuses settings that PEFT does not know, that are of another type, or that need other base weights."""
    try:
        config = LoraConfig(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{found}: this peft does not know its settings; update peft ({error})") from error
    numbers = {"r": config.r, "lora_alpha": config.lora_alpha}
    for field in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, field) or {}
        if not isinstance(pattern, dict):
            raise ValueError(f"{found}: its {field} is {pattern!r}; must be a JSON object; save the LoRA again")
        numbers |= pattern
    for name, value in numbers.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise ValueError(f"{found}: its {name} is {value!r}; must be a number above 0; save the LoRA again")
    if str(config.init_lora_weights).startswith(CHANGES_BASE):
        rule = f"init_lora_weights {config.init_lora_weights} changed the base model's own weights, which are not in it"
        raise ValueError(f"{found}: {rule}; convert it: peft's path_initial_model_for_weight_conversion")


def _check_pairs(tensors: dict[str, torch.Tensor], names: dict[str, str], found: str) -> dict[str, int]:
    """Returns the rank of each layer; refuses a layer that lacks a matrix, or whose two differ in rank."""
    ranks = {}
    for layer in sorted({name.rpartition(".lora_")[0] for name in names if ".lora_" in name}):
        down, up = tensors.get(f"{layer}.lora_A.weight"), tensors.get(f"{layer}.lora_B.weight")
        if down is None or up is None:
            missing = "down (lora_A)" if down is None else "up (lora_B)"
            raise ValueError(f"{found}: {layer} has no {missing} matrix; a LoRA needs both; copy or save it again")
        if down.ndim < 2 or up.ndim < 2 or down.shape[0] != up.shape[1]:
            shapes = f"{list(down.shape)} and {list(up.shape)}"
            raise ValueError(f"{found}: {layer} has matrices {shapes}, whose ranks must agree; save the LoRA again")
        ranks[layer] = down.shape[0]
    if alone := [names[name] for name in names if name.endswith(".alpha") and name.removesuffix(".alpha") not in ranks]:
        raise ValueError(f"{found}: holds {alone[0]} without matrices of that layer; copy or save it again")
    return ranks


def settings_of(
    ranks: dict[str, int], alphas: dict[str, float] | None = None, default_alpha: float | None = None
) -> dict:
    """Returns LoraConfig's fields for these ranks and alphas; a layer without alpha has the default, or its rank."""
    alphas = {layer: (alphas or {}).get(layer, default_alpha or rank) for layer, rank in ranks.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{layer}": value for layer, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{layer}": value for layer, value in alphas.items() if value != alpha},
    }


def _check_recorded(settings: dict, ranks: dict[str, int], alphas: dict[str, float], found: str) -> None:
    """Refuses a file whose weights have another rank, or whose .alpha has another value, than it records."""
    config = LoraConfig(**settings)
    for layer, rank in ranks.items():
        recorded = _of_layer(config.rank_pattern, layer, config.r)
        if recorded != rank:
            raise ValueError(
                f"{found}: recorded as rank {recorded}, its weights have {rank} ({layer}); save the LoRA again"
            )
        alpha = _of_layer(config.alpha_pattern, layer, config.lora_alpha)
        if not math.isclose(alphas.get(layer, alpha), alpha, rel_tol=1e-2):  # .alpha may be bfloat16
            raise ValueError(
                f"{found}: recorded as alpha {alpha:g}, {layer}.alpha is {alphas[layer]:g}; remove the wrong one"
            )


def _of_layer(pattern: dict, layer: str, default: float) -> float:
    return pattern.get(get_pattern_key(pattern.keys(), layer), default)


def load_lora(path: Path) -> dict[str, torch.Tensor]:
    """Returns the weights of a LoRA file, or of the folder that holds it, named as in the transformer."""
    file = find_lora_file(path)
    names, tensors, _ = _read_tensors(file, "--lora_path", f"--lora_path {file}")
    return {name: tensors[name] for name in sorted(names) if not name.endswith(".alpha")}


def _fits(part: str, shape: tuple[int, ...], layer_shape: tuple[int, ...]) -> bool:
    """Whether `part` of a LoRA, such as _A.weight, can have this shape for a layer's weight [out, in, ...]."""
    if part.startswith("_magnitude_vector"):  # of DoRA: [out], and [1, out, 1, 1] for a convolution
        return math.prod(shape) == layer_shape[0]
    return shape[1:] == layer_shape[1:] if part.startswith("_A") else shape[:1] == layer_shape[:1]


def _unlike(lora: LoraHeader, base: BaseModel, *, for_other_base: bool) -> list[str]:
    """Returns how a LoRA differs from one for `base`: in what it records, and in the layers and shapes that it has."""
    here, wrong = base.transformer, []
    if not for_other_base:
        recorded = lora.trained_on or {}
        wrong = [
            f"{name} {value}, here {here.get(name)}" for name, value in recorded.items() if value != here.get(name)
        ]
        published, own = published_as(lora.base_model or ""), base.published
        if published and not recorded and (published.task, published.version) != (own.task, own.version):
            wrong.append(f"{published.task} {published.version}, here {own.task} {own.version}")
    weights = empty_transformer(here).named_parameters()
    layers = {name.removesuffix(".weight"): tuple(weight.shape) for name, weight in weights}
    for name, shape in lora.shapes.items():
        layer, _, part = name.partition(".lora")
        if layer not in layers:
            wrong.append(f"{lora.names[name]} {list(shape)}, here no such layer")
        elif not _fits(part, shape, layers[layer]):
            wrong.append(f"{lora.names[name]} {list(shape)}, here {list(layers[layer])}")
    return wrong


def _published_for(lora: LoraHeader) -> list[str]:
    """Returns names of the published base models that a LoRA's layers fit; empty where they are of another size."""
    blocks = [int(layer.split(".")[1]) for layer in lora.ranks if layer.startswith("transformer_blocks.")]
    inputs = [
        shape[1]
        for name, shape in lora.shapes.items()
        if re.search(r"(attn1\.to_[qkv]|ff\.net\.0\.proj)\.lora_A\.weight$", name)
    ]
    return published_like(max(blocks) + 1, inputs[0]) if blocks and inputs else []


def check_fits(lora: LoraHeader, base: BaseModel, *, named_by: str, found: str, for_other_base: bool = False) -> None:
    """Refuses a LoRA that was not trained on a base model such as `base`, and names blocks that have none.

    Args:
        named_by: what messages call the base model.
        found: what messages call the LoRA.
        for_other_base: whether only the shapes have to fit.
    """
    published, num_layers = _published_for(lora), base.transformer["num_layers"]
    if wrong := _unlike(lora, base, for_other_base=for_other_base):
        made_for = lora.base_model or (f"by its shapes {' or '.join(published)}" if published else "")
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{found}: trained on another base model{f' ({made_for})' if made_for else ''} than {named_by}: "
            f"{'; '.join(wrong[:3])}{more}. Give the one that it was trained on"
        )
    if not (lora.trained_on or lora.base_model or for_other_base) and len(published) != 1:
        others = f", as they would {', '.join(published)}" if published else ""
        print(f"{found}: does not record its base model; its shapes fit {named_by}{others}: it cannot be known")
    blocks = {int(name.split(".")[1]) for name in lora.shapes if name.startswith("transformer_blocks.")}
    if missing := sorted(set(range(num_layers)) - blocks if blocks else []):
        print(f"{found}: has no LoRA in {len(missing)} of {num_layers} blocks: {', '.join(map(str, missing))}")


# ---- ours ------------------------------------------------------------------------------------------------------------


def check_start(
    start: Path, base: BaseModel, config: LoraConfig, expected: dict[str, torch.Tensor], *, for_other_base: bool
) -> None:
    """Raises ValueError if a LoRA is of another base model, rank, strength or kind, or has other layers.

    Args:
        config: of the LoRA that is to be trained.
        expected: its state dict.
        for_other_base: as in `check_fits`.
    """
    header = read_lora(find_lora_file(start))
    found = f"--lora_path {header.file}"
    check_fits(header, base, named_by=base.name, found=found, for_other_base=for_other_base)
    _check_settings(found, header, config)
    shapes = {name: tuple(weight.shape) for name, weight in expected.items()}
    if differences := _differences(header.shapes, shapes):
        raise ValueError(f"{found}: {'; '.join(differences[:4])}; pass the options that it was trained with")


def _check_settings(found: str, header: LoraHeader, config: LoraConfig) -> None:
    settings = header.settings
    unsupported = [name for name in ("rank_pattern", "alpha_pattern", "lora_bias") if settings.get(name)]
    if unsupported:
        raise ValueError(
            f"{found}: was made with {unsupported[0]} {settings[unsupported[0]]}, which training cannot start from; "
            "convert it into a plain LoRA, or start without it"
        )
    trained = LoraConfig(**settings)
    same_kind = all(getattr(config, name) == getattr(trained, name) for name in ("r", "use_dora", "use_rslora"))
    if not (same_kind and math.isclose(config.lora_alpha, trained.lora_alpha, rel_tol=1e-3)):
        switches = "".join(f" --{name}" for name in ("use_dora", "use_rslora") if getattr(trained, name))
        raise ValueError(
            f"{found}: was trained with other options than those given (rank {config.r}, alpha {config.lora_alpha:g}); "
            f"continue with --rank {trained.r} --lora_alpha {trained.lora_alpha:g}{switches}, and no others of "
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


def save_lora(
    weights: dict[str, torch.Tensor], settings: dict, folder: Path, base: BaseModel, dtype: torch.dtype
) -> Path:
    """Writes a LoRA as diffusers' `load_lora_weights(folder)` reads it, at its trained strength.

    diffusers applies any file without `lora_adapter_metadata` at 1.0, whatever alpha was.

    Args:
        settings: from `Lora.saved`.

    Raises:
        CannotContinue: a weight is too large for `dtype`.
    """
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps({f"{PREFIX}{name}": value for name, value in settings.items()}),
        "base_model": base.name,
        "cogvideox_transformer": json.dumps(base.identity),
    }
    weights = {f"{PREFIX}{name}": weight.to("cpu", dtype) for name, weight in weights.items()}
    if dtype == torch.float16 and not all(weight.isfinite().all() for weight in weights.values()):
        raise CannotContinue("--save_precision fp16: a weight is above 65,504; pass bf16 or fp32")
    publish(folder / LORA_FILE, with_metadata(save(weights), metadata))
    return folder / LORA_FILE


# ---- for other tools -------------------------------------------------------------------------------------------------


def _kohya_name(layer: str, part: str) -> str:
    return f"lora_unet_{layer.replace('.', '_')}.{part}"


def _comfyui_name(layer: str, part: str) -> str:
    _, block, name = layer.split(".", 2)
    return f"diffusion_model.blocks.{block}.{COMFYUI.get(name, name)}.{part}"


NAMINGS = {
    "diffusers": lambda layer, part: f"{PREFIX}{layer}.{part}",
    "comfyui": _comfyui_name,
    "kohya": _kohya_name,
    "peft": lambda layer, part: f"base_model.model.{layer}.{part}",
}


def save_as(naming: str, header: LoraHeader, weights: dict[str, torch.Tensor], output: Path) -> Path:
    """Writes a LoRA as another tool reads it, at the same strength: a file, or with peft a folder."""
    check_output(naming, header.file, output)
    _check_naming(naming, header)
    parts = [name.partition(".lora_") for name in weights]
    tensors = {NAMINGS[naming](layer, f"lora_{part}"): weights[f"{layer}.lora_{part}"] for layer, _, part in parts}
    settings = {"rank_pattern": {}, "alpha_pattern": {}} | header.settings
    about = {"base_model": header.base_model} if header.base_model else {}
    about |= {"cogvideox_transformer": json.dumps(header.trained_on)} if header.trained_on else {}
    if naming == "diffusers":
        about["lora_adapter_metadata"] = json.dumps({f"{PREFIX}{name}": value for name, value in settings.items()})
    elif naming == "peft":
        config = {"peft_type": "LORA", "base_model_name_or_path": header.base_model} | settings
        write_json(output / PEFT_CONFIG, config)
        output /= PEFT_FILES[0]
    else:
        tensors = {
            name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): tensor for name, tensor in tensors.items()
        }
        for layer, strength in header.strengths.items():
            tensors[NAMINGS[naming](layer, "alpha")] = torch.tensor(strength * header.ranks[layer])
    publish(output, with_metadata(save(tensors), {"format": "pt"} | about))
    return output


def check_output(naming: str, source: Path, output: Path) -> None:
    """Refuses a path that a LoRA from `source` cannot be written to."""
    if naming != "peft" and output.suffix != ".safetensors":
        raise ValueError(f"{output}: must be a .safetensors file; name it {output}.safetensors")
    if output.resolve() == source.resolve():
        raise ValueError(f"{output}: is the file that is read; name another one")
    if naming == "peft" and output.is_file():
        raise ValueError(f"{output}: is a file; with --to peft name a folder")


def _check_naming(naming: str, header: LoraHeader) -> None:
    """Refuses what the other tool's files cannot hold."""
    others = [name for name in header.shapes if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if naming == "comfyui":
        others += [name for name in header.shapes if not name.startswith("transformer_blocks.")]
    if naming in ("comfyui", "kohya") and others:
        raise ValueError(f"--to {naming}: has no place for {others[0]}; use --to diffusers or peft")
