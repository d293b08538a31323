"""Whether the files of a base model are all there, whole, and its own; read from headers, before any weights."""

import json
from pathlib import Path

import sentencepiece

from cogvideox.base_model import (
    BaseModel,
    empty_text_encoder,
    empty_transformer,
    empty_vae,
    load_tokenizer,
    read_text_encoder_config,
)
from cogvideox.lora_files import read_header
from files import is_lfs_pointer

PARTS = ("transformer", "vae", "text_encoder")
STEMS = {"text_encoder": ("model", "pytorch_model")}  # of the files of weights; diffusers' is the same in both formats
SMALLEST = 1024  # bytes; a pointer of Git LFS has fewer
TIED = {"shared.weight", "encoder.embed_tokens.weight"}  # T5's files hold one of them, or both
AGAIN = "download the base model again"


def check_files(base: BaseModel, parts: tuple[str, ...] = PARTS) -> None:
    """Refuses a base model's folder if a file in it is missing, cut off, a pointer of Git LFS, or another model's.

    Args:
        parts: those whose weights must be there.
    """
    for part in parts:
        _check_weights(base, part)
    _check_tokenizer(base)


def _check_weights(base: BaseModel, part: str) -> None:
    folder = base.folder / part
    files = _weight_files(base, folder)
    for file in files:
        _check_no_pointer(file)
    if not all(file.suffix == ".safetensors" for file in files):
        return
    found = {}
    for file in files:
        found |= read_header(file, "").shapes
    expected = {name: tuple(weight.shape) for name, weight in _empty(base, part).state_dict().items()}
    if part == "text_encoder" and TIED & found.keys():
        expected = {name: shape for name, shape in expected.items() if name not in TIED - found.keys()}
    wrong = sorted(name for name, shape in expected.items() if found.get(name) != shape)
    if wrong:
        here = list(found[wrong[0]]) if wrong[0] in found else "missing"
        raise ValueError(
            f"{folder}: the weights are not those of its config.json: {wrong[0]} is {here}, there "
            f"{list(expected[wrong[0]])}; take that folder from the published model"
        )


def _empty(base: BaseModel, part: str):
    if part == "text_encoder":
        return empty_text_encoder(read_text_encoder_config(base))
    return empty_transformer(base.transformer) if part == "transformer" else empty_vae(base.vae)


def _weight_files(base: BaseModel, folder: Path) -> list[Path]:
    """Returns the files that hold a part's weights, one or several with an index, as the libraries look for them."""
    variant = f".{base.variant}" if base.variant else ""
    stem, pickled = STEMS.get(folder.name, ("diffusion_pytorch_model", "diffusion_pytorch_model"))
    index = folder / f"{stem}.safetensors.index{variant}.json"
    if index.is_file():
        _check_no_pointer(index)
        files = [folder / name for name in _files_of(index)]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"{base.folder}: no {', '.join(missing[:3])} in {folder.name}/; {AGAIN}")
        return files
    for file in (folder / f"{stem}{variant}.safetensors", *folder.glob(f"{pickled}{variant}*.bin")):
        if file.is_file():
            return [file]
    kind = f"weights of --variant {base.variant}" if base.variant else "weights"
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    instead = f" under their usual name, but {others[0]}" if others else ""
    way_out = f"{AGAIN}{', or name that file as usual' if others and not variant else ''}"
    raise ValueError(f"{base.folder}: no {kind} in {folder.name}/{instead}; {way_out}")


def _files_of(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: is no index of weights ({error}); {AGAIN}") from error


def _check_no_pointer(file: Path) -> None:
    if is_lfs_pointer(file):
        raise ValueError(f"{file}: is a pointer of Git LFS, not the file; run git lfs pull, or {AGAIN}")
    size = file.stat().st_size
    if file.suffix == ".bin" and size < SMALLEST:
        raise ValueError(f"{file}: has {size} bytes, too few for weights; {AGAIN}")


def _check_tokenizer(base: BaseModel) -> None:
    """Refuses a tokenizer without a vocabulary, which transformers 5 builds unasked and which reads other prompts."""
    folder = base.folder / "tokenizer"
    vocabulary, fast = folder / "spiece.model", folder / "tokenizer.json"
    if not (vocabulary.is_file() or fast.is_file()):
        raise ValueError(f"{base.folder}: no spiece.model in tokenizer/; {AGAIN}")
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        raise ValueError(f"{base.folder}: no tokenizer_config.json in tokenizer/; {AGAIN}")
    for file in (config, vocabulary, fast):
        if file.is_file():
            _check_no_pointer(file)
    _check_json(config)
    if fast.is_file():
        _check_json(fast)
    else:
        _check_vocabulary(vocabulary, read_text_encoder_config(base)["vocab_size"])
    load_tokenizer(base)


def _check_vocabulary(vocabulary: Path, known: int) -> None:
    try:
        num_pieces = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary)).vocab_size()
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{vocabulary}: is no vocabulary that sentencepiece can read; {AGAIN}") from error
    if num_pieces > known:
        raise ValueError(f"{vocabulary}: has {num_pieces} pieces, and text_encoder/ knows {known}; {AGAIN}")


def _check_json(file: Path) -> None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: is not valid JSON ({error}); {AGAIN}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: must hold a JSON object; {AGAIN}")
