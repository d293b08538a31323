"""Says what a LoRA file of CogVideoX holds, and converts it into the naming of another tool.

    python lora.py inspect disney-lora
    python lora.py convert disney-lora disney.safetensors --to comfyui

Files are named directly or by the folder that holds them. No base model is needed.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from cogvideox.lora_files import NAMINGS, LoraHeader, load_lora, lora_file_in, read_lora, save_as
from files import expanded_path


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="print rank, strength, layers and base model", allow_abbrev=False)
    inspect.add_argument("file", type=expanded_path, help="LoRA: its file, or the folder that holds it")
    convert = commands.add_parser("convert", help="write the LoRA in another naming", allow_abbrev=False)
    convert.add_argument("file", type=expanded_path, help="LoRA: its file, or the folder that holds it")
    convert.add_argument("output", type=expanded_path, help=".safetensors file to write; a folder with --to peft")
    convert.add_argument("--to", choices=NAMINGS, required=True, help="tool that is to read it")
    return parser.parse_args(argv)


def read(path: Path) -> LoraHeader:
    file = path if path.is_file() else lora_file_in(path)
    if not file:
        raise FileNotFoundError(f"{path}: no LoRA file of that name, nor in it; correct the path")
    return read_lora(file, option="")


def describe(header: LoraHeader) -> str:
    """Returns lines on rank, strength, layers and base model."""
    ranks, strengths = sorted(set(header.ranks.values())), sorted(set(header.strengths.values()))
    inside = [layer.split(".", 2) for layer in header.ranks if layer.startswith("transformer_blocks.")]
    targets = Counter(name for _, _, name in inside)
    targets.update(layer for layer in header.ranks if not layer.startswith("transformer_blocks."))
    kind = "DoRA" if header.is_dora else "LoRA"
    source = f"from {header.strength_from}" if header.strength_from else "not recorded, taken as 1"
    return "\n".join([
        f"{header.file}: {kind}",
        f"rank: {'/'.join(map(str, ranks))}",
        f"strength: {'/'.join(f'{strength:g}' for strength in strengths)} ({source})",
        f"layers: {', '.join(f'{name} ({count})' for name, count in sorted(targets.items()))}",
        f"blocks: {len({block for _, block, _ in inside})}",
        f"base model: {header.base_model or 'not recorded'}",
        f"a name in the file: {next(iter(header.names.values()))}",
    ])  # fmt: skip


def main(args: argparse.Namespace) -> None:
    try:
        header = read(args.file)
        if args.command == "inspect":
            print(describe(header))
        else:
            print(save_as(args.to, header, load_lora(header.file), args.output))
    except (ValueError, OSError) as error:
        print(f"lora.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(parse_args())
