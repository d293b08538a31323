"""Compares our training script with diffusers' examples/cogvideo/train_cogvideox_lora.py: same work, time and memory.

    python benchmarks/versus.py --reference path/to/diffusers/examples/cogvideo/train_cogvideox_lora.py --size overhead

Both scripts run unmodified, each time in a process of its own, on the same base model with random weights and the same
clips, in the order ours, theirs, theirs, ours. Two further runs of ours show how much equal runs differ. A gate comes
first: given the same draws and the same LoRA, both must compute the same loss and gradients, or nothing is timed.
Options that only our script has come last; the gate runs with them, too:

    python benchmarks/versus.py --reference ... --size 2b --mixed_precision bf16 --ours_options --compile

What is equal on both sides is in PARITY and `shared_options`. Clips have the size, length and frame rate that is
trained on, so that both scripts see all pixels. T5 and VAE are small, since only what follows them is compared:
diffusers' example keeps both in memory and runs T5 in every update; ours has cached their outputs and freed them.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from transformers import T5EncoderModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

import make_example
import step
from reference import sha256

import train_cogvideox_lora as train
from files import at_least, write_json

OURS = Path(__file__).resolve().parents[1] / "train_cogvideox_lora.py"
TRIAL = Path(__file__).with_name("trial.py")
ROUND = ("ours", "theirs", "theirs", "ours")  # an even drift over a round cancels out of its means
# Largest relative difference in float32; of tensors, the norm of the difference relative to the norm.
TOLERANCE = {"inputs": 1e-6, "loss": 1e-5, "gradients": 1e-4, "updates": 1e-3}
# In bf16 and fp16, our gradients may be this many times as far from those of float32 as theirs, whose LayerNorms CUDA's
# autocast runs in float32. A different computation would be off by a hundred times as much.
ROUNDING = 5
PARITY = (
    "no validation, no tracker; a checkpoint is written only after the last update, which is not timed",
    "the transformer is stored in float16: diffusers' example loads it in float16, whatever it trains in",
    "T5 and VAE are small, as neither is measured; T5 runs in every update of diffusers' example, in none of ours",
    "in bf16 and fp16 ours keeps the LoRA and the loss in float32; diffusers' example has a bfloat16 LoRA in bf16",
)


class Size(NamedTuple):
    """The size of the transformer and the clips, and how many updates are measured."""

    transformer: dict  # differences from the defaults of CogVideoXTransformer3DModel, which are 2b's
    height: int
    width: int
    max_num_frames: int
    rank: int
    steps: int
    warmup: int


SMALL = step.TINY | {
    "num_layers": 4, "num_attention_heads": 8, "attention_head_dim": 64, "time_embed_dim": 512,
    "sample_height": 16, "sample_width": 24, "sample_frames": 17,
}  # fmt: skip
SIZES = {  # TINY is the transformer of examples/make_example.py
    "overhead": Size(step.TINY, 64, 96, 9, rank=8, steps=300, warmup=20),
    "compute": Size(SMALL, 128, 192, 17, rank=32, steps=20, warmup=4),
    "2b": Size({}, 480, 720, 49, rank=128, steps=20, warmup=4),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    option = parser.add_argument
    option("--reference", type=Path, required=True, metavar="FILE", help="diffusers' train_cogvideox_lora.py")
    size = "what the time goes to; overhead: not to matrix products; compute: mostly to them; 2b: full size, for a GPU"
    ours = "options for our script only: everything that follows, such as --ours_options --compile"
    option("--size", choices=list(SIZES), default="overhead", help=size)
    option("--mixed_precision", choices=["no", "bf16", "fp16"], default="no", help="compute precision; no: float32")
    option("--gradient_checkpointing", action="store_true", help="recompute activations, in both scripts")
    count = at_least(1)
    option("--train_batch_size", type=count, default=1, metavar="N", help="clips per update")
    option("--rank", type=count, metavar="N", help="rank and alpha of the LoRA (default: the size's)")
    option("--steps", type=at_least(2), metavar="N", help="measured updates of each run (default: the size's)")
    option("--warmup", type=count, metavar="N", help="updates before the measured ones (default: the size's)")
    option("--gate_updates", type=count, default=3, metavar="N", help="updates to compare before any is timed")
    option("--rounds", type=count, default=1, metavar="N", help="rounds of ours, theirs, theirs, ours")
    option("--work_dir", type=Path, metavar="FOLDER", help="folder for base model, clips and logs (default: temporary)")
    option("--output", type=Path, metavar="FILE", help="file to write all measurements to, as JSON")
    option("--ours_options", nargs=argparse.REMAINDER, default=[], metavar="OPTION", help=ours)
    args = parser.parse_args(argv)
    args.ours_options = " ".join(args.ours_options).split()  # quoted, they are one word

    if not args.reference.is_file():
        parser.error(f"--reference {args.reference}: no such file; pass the path of diffusers' train_cogvideox_lora.py")
    for name in ("rank", "steps", "warmup"):
        setattr(args, name, getattr(args, name) or getattr(SIZES[args.size], name))
    check_ours_options(args, parser.error)
    return args


def check_memory(args: argparse.Namespace) -> None:
    """Refuses what does not fit into this GPU, as `step.check_memory` predicts it for our script."""
    if args.size == "2b":
        line = ["--model", "2b", "--rank", str(args.rank), "--train_batch_size", str(args.train_batch_size)]
        line += ["--mixed_precision", args.mixed_precision]
        line += ["--gradient_checkpointing"] if args.gradient_checkpointing else []
        step.check_memory(step.parse_args(line), args.output)


def check_ours_options(args: argparse.Namespace, refuse: Callable[[str], None]) -> None:
    """Refuses options that both scripts share; our script itself refuses unknown ones.

    Options that change the work, such as --use_dora, are left to the gate. --gradient_checkpointing may differ from the
    shared one: it changes what is kept, not what is computed.
    """
    shared = {word for word in shared_options(args, updates=1) if word.startswith("--")} - {"--gradient_checkpointing"}
    for word in args.ours_options:
        name = word.split("=")[0]
        if name in shared | {"--output_dir", "--latents_cache_dir"}:
            refuse(f"--ours_options {name}: is the same for both scripts; leave it out, or pass it to versus.py itself")
    train.parse_args([*shared_options(args, updates=1), *args.ours_options])


def write_inputs(size: Size, folder: Path) -> None:
    """Writes a base model, `folder`/base-model, and clips, `folder`/clips, of the size that is trained."""
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(**size.transformer)
    tokenizer = make_example.make_tokenizer(folder / "tokenizer")
    text_config = make_example.tiny_t5_config(len(tokenizer), width=transformer.config.text_embed_dim)
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=transformer.config.in_channels,
        layers_per_block=1,
        norm_num_groups=4,
        sample_height=size.height,
        sample_width=size.width,
        scaling_factor=1.15258426,
    )
    pipeline = CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(text_config),
        vae=vae,
        transformer=transformer.half(),
        scheduler=make_example.make_scheduler(CogVideoXDDIMScheduler, snr_shift_scale=3.0),
    )
    pipeline.save_pretrained(folder / "base-model")
    make_example.make_clips(
        folder / "clips", count=8, num_frames=size.max_num_frames, fps=8, height=size.height, width=size.width
    )


def shared_options(args: argparse.Namespace, updates: int) -> list[str]:
    """Returns the options that both scripts get; paths are relative to the folder of `write_inputs`."""
    size = SIZES[args.size]
    values = {
        "pretrained_model_name_or_path": "base-model",  # "5b" in it would make diffusers' example load bfloat16
        "instance_data_root": "clips", "caption_column": "prompts.txt", "video_column": "videos.txt",
        "height": size.height, "width": size.width, "max_num_frames": size.max_num_frames, "fps": 8,
        "rank": args.rank, "lora_alpha": args.rank,
        "train_batch_size": args.train_batch_size, "gradient_accumulation_steps": 1,
        "max_train_steps": updates, "checkpointing_steps": updates + 1,
        "mixed_precision": args.mixed_precision,
        "optimizer": "adamw", "learning_rate": 1e-3, "max_grad_norm": 1.0, "seed": 42,
    }  # fmt: skip
    line = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return [*line, "--gradient_checkpointing"] if args.gradient_checkpointing else line


def run_trial(folder: Path, name: str, mode: list[str], script: Path, options: list[str]) -> None:
    """Runs a script under trial.py, whose arguments begin with `mode`, in `folder`; its output goes to `name`.log."""
    line = [sys.executable, str(TRIAL), *mode, str(script.resolve()), *options, "--output_dir", name]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with open(folder / f"{name}.log", "w") as log:
        code = subprocess.run(line, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        end = "\n".join((folder / f"{name}.log").read_text().splitlines()[-12:])
        raise RuntimeError(f"{name}: {script} ended with code {code}:\n{end}")


# ---- the gate --------------------------------------------------------------------------------------------------------


def distance(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Returns the norm of the difference of all tensors together, relative to the norm of the expected ones."""
    difference = sum((actual[name].double() - tensor.double()).square().sum() for name, tensor in expected.items())
    return (difference / sum(tensor.double().square().sum() for tensor in expected.values())).sqrt().item()


def compare_updates(actual: list[dict], expected: list[dict]) -> list[dict[str, float]]:
    return [compare_update(*pair) for pair in zip(actual, expected, strict=True)]


def compare_update(actual: dict, expected: dict) -> dict[str, float]:
    """Returns the relative differences of two updates: transformer inputs, loss, gradients, change of the weights."""
    inputs = ("hidden_states", "encoder_hidden_states")
    return {
        "inputs": max(distance({name: actual[name]}, {name: expected[name]}) for name in inputs),
        "loss": abs(actual["loss"] - expected["loss"]) / expected["loss"],
        "gradients": distance(actual["gradients"], expected["gradients"]),
        "updates": distance(change(actual), change(expected)),
    }


def change(update: dict) -> dict[str, torch.Tensor]:
    return {name: update["after"][name].double() - before.double() for name, before in update["before"].items()}


def gate(args: argparse.Namespace, folder: Path) -> dict:
    """Compares what both compute from the same draws, embeddings and LoRA; in bf16 and fp16, also with float32."""
    options = shared_options(args, args.gate_updates)
    run_trial(folder, "gate-theirs", ["capture", "theirs.pt"], args.reference, options)
    theirs = torch.load(folder / "theirs.pt", weights_only=True)
    ours = replay(folder, "gate-ours", [*options, *args.ours_options])
    result = {"timesteps": [update["timesteps"].tolist() for update in theirs], "shifts": compare_updates(ours, theirs)}
    if args.mixed_precision == "no":
        check_gate(result["shifts"])
        return result | {"tolerance": TOLERANCE}
    # The last of two values of an option counts. Recomputation, since float32 takes twice the memory. Without
    # --ours_options: some attention kernels do not support float32.
    exact = replay(folder, "gate-float32", [*options, "--mixed_precision", "no", "--gradient_checkpointing"])
    from_float32 = {"ours": compare_updates(ours, exact), "theirs": compare_updates(theirs, exact)}
    check_rounding(from_float32)
    return result | {"from_float32": from_float32, "tolerance": {"rounding": ROUNDING}}


def replay(folder: Path, name: str, options: list[str]) -> list[dict]:
    """Runs our script with the draws of theirs.pt and returns its updates."""
    options = [*options, "--latents_cache_dir", f"{name}-cache"]
    run_trial(folder, name, ["replay", "theirs.pt", f"{name}.pt"], OURS, options)
    return torch.load(folder / f"{name}.pt", weights_only=True)


def check_gate(shifts: list[dict[str, float]]) -> None:
    """Refuses differences of the two scripts that are larger than `TOLERANCE`; NaN counts as larger."""
    for number, update in enumerate(shifts, 1):
        for name, limit in TOLERANCE.items():
            if not update[name] <= limit:
                raise ValueError(
                    f"update {number}: {name} differ by {update[name]:.1e} of their size, more than {limit:.0e}: the "
                    "two scripts do not do the same work, and their times cannot be compared"
                )


def check_rounding(from_float32: dict[str, list[dict[str, float]]]) -> None:
    """Refuses gradients that are much farther from float32 than theirs; NaN counts as farther."""
    ours, theirs = (statistics.mean(update["gradients"] for update in from_float32[who]) for who in ("ours", "theirs"))
    if not ours <= ROUNDING * theirs:
        raise ValueError(
            f"gradients differ from those of float32 by {ours:.1e} of their size, those of the other script by "
            f"{theirs:.1e}: more than {ROUNDING:g} times as much is not rounding, and the times cannot be compared"
        )


# ---- the comparison --------------------------------------------------------------------------------------------------


def time_trial(args: argparse.Namespace, folder: Path, number: int, who: str) -> dict:
    name = f"{number}-{who}"
    script, options = args.reference, shared_options(args, args.warmup + args.steps)
    if who == "ours":
        cache = ["--latents_cache_dir", f"{name}-cache"]  # empty at each start
        script, options = OURS, [*options, *args.ours_options, *cache]
    start = time.time()
    run_trial(folder, name, ["times", f"{name}.json"], script, options)
    return summarize(who, json.loads((folder / f"{name}.json").read_text()), start=start, warmup=args.warmup)


def summarize(who: str, record: dict, *, start: float, warmup: int) -> dict:
    """Returns seconds per update after the warm-up, seconds until the end of the first update, and memory of one run.

    `record` is what `trial.times` wrote, `start` the time of day at which it was started.
    """
    at, cpu, peaks = ([row[name] for row in record["updates"]] for name in ("at", "cpu", "peak_gib"))
    seconds, cpu_seconds = (
        [round(later - earlier, 5) for earlier, later in zip(clock[warmup - 1 :], clock[warmup:])]
        for clock in (at, cpu)
    )
    return {
        "who": who,
        "seconds_per_update": statistics.median(seconds),
        "mean_seconds_per_update": round(statistics.mean(seconds), 5),
        "cpu_seconds_per_update": statistics.median(cpu_seconds),
        "seconds_to_first_update": round(at[0] - start, 2),
        "peak_gib": round(max(peaks), 3),
        "peak_gib_of_updates": round(max(peaks[warmup:]), 3),
        "seconds_of_each_update": seconds,
        **{name: value for name, value in record.items() if name != "updates"},
    }


COLUMNS = {
    "seconds_per_update": "seconds per update",
    "mean_seconds_per_update": "mean",
    "cpu_seconds_per_update": "CPU seconds",
    "seconds_to_first_update": "to the first",
    "peak_gib": "peak GiB",
}


def ratios(trials: list[dict]) -> dict:
    """Returns the mean of ours over the mean of theirs, over all rounds, and the ratio of the last two, both ours."""
    *compared, first, second = trials

    def mean(who: str, name: str) -> float:
        return statistics.mean(trial[name] for trial in compared if trial["who"] == who)

    return {
        "ours_over_theirs": {name: round(mean("ours", name) / mean("theirs", name), 4) for name in COLUMNS},
        "ours_over_ours": {name: round(first[name] / second[name], 4) for name in COLUMNS},
    }


def table(result: dict) -> str:
    rows = [("run", *COLUMNS.values())]
    for number, trial in enumerate(result["trials"], 1):
        rows.append((f"{number} {trial['who']}", *(f"{trial[name]:.4f}" for name in COLUMNS)))
    for label, name in (("ours / theirs", "ours_over_theirs"), ("last two", "ours_over_ours")):
        rows.append((label, *(f"{result[name][column]:.3f}" for column in COLUMNS)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(word.ljust(width) for word, width in zip(row, widths)).rstrip() for row in rows)


def describe_gate(gate: dict) -> str:
    compared = {"ours from theirs": gate["shifts"]}
    compared |= {f"{who} from float32": shifts for who, shifts in gate.get("from_float32", {}).items()}
    lines = []
    for pair, updates in compared.items():
        largest = ", ".join(f"{name} {max(update[name] for update in updates):.1e}" for name in TOLERANCE)
        lines.append(f"gate, {pair}, largest relative difference: {largest}")
    return "\n".join(lines)


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Returns the CPU's model where Linux tells it, which `platform` does not; otherwise what `platform` says."""
    found = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def about(args: argparse.Namespace) -> dict:
    packages = ("torch", "diffusers", "peft", "accelerate", "transformers")
    line = shared_options(args, args.warmup + args.steps)
    return {
        "size": args.size,
        "transformer": SIZES[args.size].transformer,
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "versions": {package: version(package) for package in packages} | {"python": platform.python_version()},
        "reference_sha256": sha256(args.reference),
        "ours_options": args.ours_options,
        "command_lines": {
            "theirs": " ".join([args.reference.name, *line, "--output_dir RUN"]),
            "ours": " ".join([OURS.name, *line, *args.ours_options, "--latents_cache_dir RUN-cache --output_dir RUN"]),
        },
        "updates": {"measured": args.steps, "warmup": args.warmup},
        "parity": PARITY,
    }


def compare(args: argparse.Namespace, folder: Path) -> dict:
    write_inputs(SIZES[args.size], folder)
    result = about(args) | {"gate": gate(args, folder), "load_average_before": os.getloadavg()[0], "trials": []}
    print(describe_gate(result["gate"]), flush=True)
    for number, who in enumerate((*ROUND * args.rounds, "ours", "ours"), 1):
        keep(args, result)  # in case a later run fails
        result["trials"].append(time_trial(args, folder, number, who))
    result["load_average_after"] = os.getloadavg()[0]
    result |= ratios(result["trials"])
    keep(args, result)
    return result


def keep(args: argparse.Namespace, result: dict) -> None:
    if args.output:
        write_json(args.output, result)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work_dir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            check_memory(args)
            result = compare(args, folder)
        except (RuntimeError, ValueError) as error:
            sys.exit(f"versus.py: error: {error}")
    print(table(result))


if __name__ == "__main__":
    main()
