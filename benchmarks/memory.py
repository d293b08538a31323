"""Predicted peak memory of each phase of a run, from configs alone.

    python benchmarks/memory.py --model 5b --rank 128 --gradient_checkpointing full --base_precision int8
    python benchmarks/memory.py --measured benchmarks/results/*.json   # against what benchmarks/step.py measured
    python benchmarks/memory.py --table                                # models x levels x base precisions

Needs neither weights nor a GPU. The formulas, and what they leave out, are in memory.py.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, which has a memory.py as well

import step

import train_cogvideox_lora as train
from clips.frames import check_size
from cogvideox import compute, memory, quantized
from cogvideox.base_model import empty_transformer
from cogvideox.lora import DEFAULT_TARGETS
from files import at_least, write_json

CARDS = (12, 16, 24, 32, 40, 48, 80, 96, 141, 192)  # GB, as sold


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    what = parser.add_argument_group("what is shown").add_argument
    what("--model", choices=list(step.MODELS), default="2b", help="as in benchmarks/step.py")
    what("--free_gib", type=float, metavar="GIB", help="free memory of a GPU: what fits, and what auto would choose")
    what(
        "--measured", type=Path, nargs="+", metavar="FILE", help="results of step.py, with their own model and options"
    )
    what("--table", action="store_true", help="peak of training of every model, level and base precision, in Markdown")
    what("--output", type=Path, metavar="FILE", help="also write it as JSON there")

    positive = at_least(1)
    same = parser.add_argument_group("as in train_cogvideox_lora.py").add_argument
    same("--training_type", choices=["lora", "sft"], default="lora", help="a LoRA, or all weights")
    same("--rank", type=positive, default=128, help="rank of the LoRA matrices")
    same("--lora_target_modules", nargs="+", metavar="NAME", default=DEFAULT_TARGETS, help="layers")
    same("--height", type=positive, help="pixels (default: the model's)")
    same("--width", type=positive, help="pixels (default: the model's)")
    same("--num_frames", "--max_num_frames", dest="max_num_frames", type=positive, help="4k + 1 (default: the model's)")
    same("--train_batch_size", type=positive, default=1, metavar="N", help="clips per micro-batch and GPU")
    same("--gradient_accumulation_steps", type=positive, default=1, metavar="N", help="micro-batches per update")
    levels = [*compute.LEVELS, "auto"]
    same("--gradient_checkpointing", nargs="?", choices=levels, const="full", default="none", help="recompute")
    same("--mixed_precision", choices=list(train.DTYPES), default="bf16", help="no: float32")
    same("--base_precision", choices=quantized.PRECISIONS, default="bf16", help="of the blocks' frozen linear layers")
    same("--optimizer", choices=list(memory.STATE_BYTES), default="adamw", help="and its state")
    same("--use_8bit_adam", action="store_true", help="8-bit state")
    same("--ema_decay", type=float, metavar="D", help="a moving average of the LoRA")
    tilings = {"nargs": "?", "const": "always", "default": "never", "choices": ["never", "auto", "always"]}
    same("--enable_tiling", **tilings, help="VAE in tiles")
    swapped = "blocks whose frozen weights stay in main memory"
    same("--blocks_to_swap", type=at_least(0), default=0, metavar="N", help=swapped)
    options = parser.parse_args(argv)
    model = step.MODELS[options.model]
    for name in ("height", "width", "max_num_frames"):
        setattr(options, name, getattr(options, name) or getattr(model, name))
    if "auto" in (options.gradient_checkpointing, options.enable_tiling) and (options.table or not options.free_gib):
        parser.error("auto: depends on the GPU; pass --free_gib, its free memory, and no --table")
    layers = empty_transformer(model.transformer).config.num_layers
    if options.blocks_to_swap > layers or options.blocks_to_swap and options.table:
        parser.error(f"--blocks_to_swap {options.blocks_to_swap}: {options.model} has {layers}, and --table swaps none")
    check_size(options.height, options.width, options.max_num_frames, parser.error)
    if options.blocks_to_swap and (options.training_type == "sft" or options.gradient_checkpointing == "none"):
        parser.error(
            f"--blocks_to_swap {options.blocks_to_swap}: of a LoRA with --gradient_checkpointing; leave it out"
        )
    if options.training_type == "sft" and options.base_precision != "bf16":
        parser.error(f"--base_precision {options.base_precision}: sft trains the base; leave it out")
    return options


def one_run(options: argparse.Namespace) -> dict:
    """Prints the phases of a run, and the parts of training; the same as a result."""
    checkpoint, text_encoder = step.random_base_model(options.model), t5(options.model)
    settings = memory.Settings.of(options, train.DTYPES[options.mixed_precision])
    plan = memory.plan(checkpoint, text_encoder, settings, options.enable_tiling, options.free_gib)
    settings = settings._replace(**{name: value for name, value in plan._asdict().items() if name != "lines"})
    phases = memory.predict(checkpoint, text_encoder, settings)
    parts = memory.training_parts(checkpoint, settings)
    for phase, gib in phases.items():
        print(f"{phase:<24}{gib:8.2f} GiB")
    print("training, in parts")
    for part, gib in parts.items():
        print(f"  {part:<22}{gib:8.2f} GiB")
    print(*plan.lines, sep="\n")
    rounded = [{name: round(gib, 3) for name, gib in values.items()} for values in (phases, parts)]
    described = {name: value for name, value in settings._asdict().items() if name != "dtype"}
    described |= {"mixed_precision": options.mixed_precision}
    return {"model": options.model, "options": described, "phases_gib": rounded[0], "training_gib": rounded[1]}


def t5(model: str) -> dict:
    """The config of its text encoder."""
    return step.T5S["tiny" if model.startswith("tiny") else "published"]


def settings_of_result(result: dict) -> memory.Settings:
    """Those with which step.py ran."""
    own = result["options"]
    known = {name: value for name, value in own.items() if name in memory.Settings._fields}
    return memory.Settings(**known | {"dtype": train.DTYPES[own["mixed_precision"]]})


def against_measurements(files: list[Path]) -> list[dict]:
    """Prints predicted and measured peaks of training; results without a GPU's are left out."""
    rows = []
    print(f"{'result':<36}{'predicted':>10}{'measured':>10}{'error':>8}")
    for file in files:
        result = json.loads(file.read_text())
        if "peak_memory_gib" not in result or result["device"].startswith("CPU"):
            print(f"{file.stem:<36}{'no peak of a GPU in it':>28}")
            continue
        predicted = memory.training_parts(step.random_base_model(result["model"]), settings_of_result(result))["peak"]
        measured = result["peak_memory_gib"]
        rows.append({"result": file.stem, "predicted_gib": round(predicted, 3), "measured_gib": measured})
        print(f"{file.stem:<36}{predicted:10.2f}{measured:10.2f}{predicted / measured - 1:+8.1%}")
    return rows


def table(options: argparse.Namespace) -> list[dict]:
    """Prints, in Markdown, GiB of a LoRA's training at each model's own size, and the smallest card that it fits on."""
    rows = []
    print("| | base | none | attention | full | text | clips | clips, tiled | validation | validation, tiled |")
    print("|---" * 10 + "|")
    for name, model in step.MODELS.items():
        if name.startswith("tiny"):
            continue
        checkpoint = step.random_base_model(name)
        size = {"height": model.height, "width": model.width, "max_num_frames": model.max_num_frames}
        for precision in quantized.PRECISIONS:
            settings = memory.Settings.of(options, train.DTYPES[options.mixed_precision])
            settings = settings._replace(**size, base_precision=precision, training_type="lora")
            phases, tiled = (
                memory.predict(checkpoint, t5(name), settings._replace(tile_encoding=tiling, tile_decoding=tiling))
                for tiling in (False, True)
            )
            levels = {
                level: memory.training_parts(checkpoint, settings._replace(gradient_checkpointing=level))["peak"]
                for level in compute.LEVELS
            }
            others = {"text": phases["text"], "clips": phases["clips"], "clips, tiled": tiled["clips"]}
            others |= {"validation": phases["validation"], "validation, tiled": tiled["validation"]}
            cells = [f"{gib:.1f} ({card(gib)})" for gib in levels.values()] + [f"{gib:.1f}" for gib in others.values()]
            print(f"| {name} | {precision} | {' | '.join(cells)} |")
            numbers = {column: round(gib, 2) for column, gib in (levels | others).items()}
            rows.append({"model": name, "base_precision": precision} | numbers)
    return rows


def card(peak_gib: float) -> str:
    """The smallest one that has what `choose_checkpointing` asks for; a driver and a CUDA context take 0.5 GiB."""
    return next((f"{size} GB" for size in CARDS if memory.needed_gib(peak_gib) <= size - 0.5), "none")


def main(argv: list[str] | None = None) -> None:
    options = parse_args(argv)
    if options.measured:
        result = against_measurements(options.measured)
    else:
        result = table(options) if options.table else one_run(options)
    if options.output:
        write_json(options.output, result)


if __name__ == "__main__":
    main()
