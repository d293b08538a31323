"""Says what LoRA files of CogVideoX hold, and makes others of them.

    python lora.py inspect disney-lora
    python lora.py convert disney-lora disney.safetensors --to comfyui
    python lora.py merge disney-lora boats-lora --lora_scale 1 0.5 --base THUDM/CogVideoX-2b --output disney-2b
    python lora.py resize disney-lora small.safetensors --rank 16
    python lora.py extract my-2b THUDM/CogVideoX-2b lora.safetensors --rank 64
    python lora.py compare disney-lora other-lora

Files are named directly, by the folder that holds them, or by their name on the hub. Only merge and
extract need a base model.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel
from huggingface_hub import snapshot_download

from cogvideox.base_model import IDENTITY, BaseModel, load_transformer, reaches_hub, read_base_model
from cogvideox.lora import save_transformer
from cogvideox.lora_algebra import compared, differences, factors_of, merged, plain_lora, resized, unlike_layers
from cogvideox.lora_files import (
    NAMINGS,
    SAVE_DTYPES,
    LoraHeader,
    check_fits,
    check_output,
    find_lora_file,
    load_lora,
    read_lora,
    save_as,
)
from files import at_least, expanded_path, finite


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    path, lora, result = expanded_path, "LoRA: file, folder that holds it, or hub name", ".safetensors file to write"
    base, rank = "base model: a folder, or a name on the hub", "rank of the result, at most"

    def command(name: str, run, text: str):
        parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        parser.set_defaults(run=run)
        return parser.add_argument

    add = command("inspect", inspect, "print rank, strength, layers and base model")
    add("file", type=path, help=lora)
    add = command("convert", convert, "write the LoRA in another naming")
    add("file", type=path, help=lora)
    add("output", type=path, help=f"{result}; a folder with --to peft")
    add("--to", choices=NAMINGS, required=True, help="tool that is to read it")
    add = command("merge", merge, "add LoRAs to the base model's transformer, and write it")
    add("files", type=path, nargs="+", metavar="file", help=lora)
    add("--lora_scale", type=finite, nargs="+", default=[1.0], metavar="X", help="factor on each LoRA's strength")
    add("--base", required=True, metavar="NAME", help=base)
    add("--output", type=path, required=True, metavar="FOLDER", help="folder for the result, which is transformer/")
    add("--save_precision", choices=SAVE_DTYPES, help="precision of the result (default: the base model's)")
    add = command("resize", resize, "write the best approximation of a LoRA that has a smaller rank")
    add("file", type=path, help=lora)
    add("output", type=path, help=result)
    add("--rank", type=at_least(1), required=True, metavar="R", help=rank)
    add = command("extract", extract, "write the LoRA that makes a base model most like a fine-tuned transformer")
    add("tuned", type=path, help="fine-tuned transformer: run directory or folder")
    add("base", help=base)
    add("output", type=path, help=result)
    add("--rank", type=at_least(1), required=True, metavar="R", help=rank)
    add = command("compare", compare, "print what two LoRAs have in common, and their updates by block")
    add("first", type=path, help=lora)
    add("second", type=path, help=lora)
    return parser.parse_args(argv)


def read(path: Path) -> LoraHeader:
    return read_lora(find_lora_file(path, option=""), option="")


# ---- what a LoRA holds -----------------------------------------------------------------------------------------------


def inspect(args: argparse.Namespace) -> None:
    print(describe(read(args.file)))


def values_of(numbers) -> str:
    return "/".join(f"{number:g}" for number in sorted(set(numbers)))


def targets_of(header: LoraHeader) -> Counter:
    """Returns the number of layers of each name, those of the blocks by their name in the block."""
    is_inside = lambda layer: layer.startswith("transformer_blocks.")  # noqa: E731
    return Counter(layer.split(".", 2)[2] if is_inside(layer) else layer for layer in header.ranks)


def describe(header: LoraHeader) -> str:
    """Returns lines on rank, strength, layers and base model."""
    blocks = {layer.split(".")[1] for layer in header.ranks if layer.startswith("transformer_blocks.")}
    source = f"from {header.strength_from}" if header.strength_from else "not recorded, taken as 1"
    return "\n".join([
        f"{header.file}: {'DoRA' if header.is_dora else 'LoRA'}",
        f"rank: {values_of(header.ranks.values())}",
        f"strength: {values_of(header.strengths.values())} ({source})",
        f"layers: {', '.join(f'{name} ({count})' for name, count in sorted(targets_of(header).items()))}",
        f"blocks: {len(blocks)}",
        f"base model: {header.base_model or 'not recorded'}",
        f"a name in the file: {next(iter(header.names.values()))}",
    ])  # fmt: skip


def compare(args: argparse.Namespace) -> None:
    first, second = read(args.first), read(args.second)
    updates = factors_of(first), factors_of(second)
    described = {
        "base model": [header.base_model or "not recorded" for header in (first, second)],
        "rank": [values_of(header.ranks.values()) for header in (first, second)],
        "strength": [values_of(header.strengths.values()) for header in (first, second)],
        "targets": [" ".join(sorted(targets_of(header))) for header in (first, second)],
    }
    for name, (one, other) in described.items():
        print(f"{name}: {one} in both" if one == other else f"{name}: {one} in the first, {other} in the second")
    rows = compared(*updates)
    width = max(len(row.block) for row in rows)
    print(f"\n{'':<{width}}  {'first':>10}  {'second':>10}  cosine     (norms of the updates)")
    for block, (one, other), cosine in rows:
        print(f"{block:<{width}}  {one:>10.4g}  {other:>10.4g}  {cosine:>6.3f}")


# ---- other files of a LoRA -------------------------------------------------------------------------------------------


def convert(args: argparse.Namespace) -> None:
    header = read(args.file)
    print(save_as(args.to, header, load_lora(header.file), args.output))


def resize(args: argparse.Namespace) -> None:
    header = read(args.file)
    check_output("diffusers", header.file, args.output)
    most = max(header.ranks.values())
    if args.rank > most:
        raise ValueError(f"--rank {args.rank}: {header.file} has rank {most}; a larger one adds nothing, so give less")
    layers, kept, whole = {}, 0.0, 0.0
    for layer, update in factors_of(header).items():
        layers[layer], kept_here, energy = resized(update, args.rank)
        kept, whole = kept + kept_here, whole + energy
    shapes = {layer: header.shapes[f"{layer}.lora_A.weight"] for layer in layers}
    print(save_as("diffusers", *plain_lora(layers, shapes, header, header.file), args.output))
    print(energy_line(header.ranks.values(), args.rank, kept, whole))


def energy_line(before, rank: int, kept: float, whole: float) -> str:
    share = kept / whole if whole else 1.0
    return f"rank {values_of(before)} -> {rank}: keeps {share:.2%} of the energy, the squared elements of the updates"


# ---- LoRAs and transformers ------------------------------------------------------------------------------------------


def read_base(name: str, option: str) -> BaseModel:
    """Returns a base model with the folder of its transformer, downloaded where it is a hub name."""
    base = read_base_model(name, option=option)
    if base.folder:
        return base
    folder = snapshot_download(base.name, allow_patterns="transformer/*", local_files_only=not reaches_hub())
    return base._replace(folder=Path(folder))


def merge(args: argparse.Namespace) -> None:
    headers, scales = [read(path) for path in args.files], args.lora_scale
    scales = scales * (1 if len(scales) > 1 else len(headers))
    if len(scales) != len(headers):
        reason = f"{len(scales)} scales for {len(headers)} LoRAs"
        raise ValueError(f"--lora_scale {' '.join(f'{scale:g}' for scale in scales)}: {reason}; give one for each")
    if (args.output / "model_index.json").is_file():
        raise ValueError(f"--output {args.output}: is a base model, whose transformer would be lost; name another one")
    base = read_base(args.base, "--base")
    for header in headers:
        check_fits(header, base, named_by=f"--base {base.name}", found=str(header.file))
    dtype = SAVE_DTYPES[args.save_precision] if args.save_precision else base.stored_dtype
    transformer = load_transformer(base, torch.float32)
    merged(transformer, headers, scales)
    print(save_transformer(base, dtype, transformer.state_dict(), args.output))


def extract(args: argparse.Namespace) -> None:
    folder = next((path for path in (args.tuned / "transformer", args.tuned) if (path / "config.json").is_file()), None)
    if not folder:
        raise FileNotFoundError(f"{args.tuned}: no transformer/ in it; give a run directory of --training_type sft")
    base = read_base(args.base, "base")
    check_output("diffusers", folder, args.output)
    config = CogVideoXTransformer3DModel.load_config(folder)
    if others := [name for name in IDENTITY if config.get(name) != base.transformer[name]]:
        wrong = "; ".join(f"{name} {config.get(name)}, there {base.transformer[name]}" for name in others)
        raise ValueError(f"{folder}: of another kind than {base.name}: {wrong}. Give the base that it was tuned from")
    before = load_transformer(base, base.stored_dtype)
    after = CogVideoXTransformer3DModel.from_pretrained(folder, dtype=torch.float32)
    layers, shapes, kept, whole = {}, {}, 0.0, 0.0
    for layer, update, kept_here, energy in differences(after, before, args.rank):
        layers[layer], shapes[layer] = update, tuple(after.get_submodule(layer).weight.shape)
        kept, whole = kept + kept_here, whole + energy
    if not layers:
        raise ValueError(f"{folder}: has the weights of {base.name}; there is no LoRA to extract")
    print(save_as("diffusers", *plain_lora(layers, shapes, base, folder), args.output))
    print(energy_line([min(shapes[layer][:2]) for layer in layers], args.rank, kept, whole))
    if unlike := unlike_layers(after, before):
        print(f"not in the LoRA, which holds no biases and norms: {len(unlike)} tensors, such as {unlike[0]}")


def main(args: argparse.Namespace) -> None:
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"lora.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(parse_args())
