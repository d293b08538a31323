"""Our training script against diffusers' examples/cogvideo/train_cogvideox_lora.py: same work, seconds and memory.

    python benchmarks/versus.py --reference path/to/diffusers/examples/cogvideo/train_cogvideox_lora.py --size overhead

Both run as they are, each time in a process of its own, on one checkpoint of random weights and one set of clips, in
the order ours, theirs, theirs, ours; ours twice more says how far two runs of the same differ. First a gate: given the
same draws and the same LoRA, both come to the same loss and gradients, or nothing is timed. Options that ours alone has
stand at the end, and the gate runs with them, too:

    python benchmarks/versus.py --reference ... --size 2b --mixed_precision bf16 --ours_options --compile

Equal on both sides: what PARITY and `shared_options` say. Clips are written in the size, length and frame rate that is
asked for, so that both see all of their pixels. T5 and VAE are small, since only what comes after them is compared:
diffusers' example keeps both in memory and runs T5 in every update, ours has cached their outputs and let them go.
"""

import argparse
import json
import os
import platform
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
from transformers import T5Config, T5EncoderModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

import make_example
from reference import sha256
from step import TINY

import train_cogvideox_lora as train
from files import write_json

OURS = Path(__file__).resolve().parents[1] / "train_cogvideox_lora.py"
TRIAL = Path(__file__).with_name("trial.py")
ROUND = ("ours", "theirs", "theirs", "ours")  # what drifts evenly over a round cancels out of its means
# float32: of the loss, of the norm of the gradients, of the norm of what an update changes.
TOLERANCE = {"inputs": 1e-6, "loss": 1e-5, "gradients": 1e-4, "updates": 1e-3}
# bf16, fp16: how much farther from the gradients of float32 ours may be than theirs. Under CUDA's autocast theirs has
# LayerNorms in float32; another computation would be off by a hundred times as much.
ROUNDING = 5
PARITY = (
    "no validation, no tracker; a checkpoint is written after the last update only, which is not timed",
    "the transformer is stored in float16: diffusers' example loads it so, whatever it then trains in",
    "T5 and VAE are small: what is timed is neither; T5 runs in every update of diffusers' example, in none of ours",
    "in bf16 and fp16 ours keeps the LoRA and the loss in float32; diffusers' example has a bfloat16 LoRA in bf16",
)


class Size(NamedTuple):
    """What is trained on what, and for how long."""

    transformer: dict  # what differs from the defaults of CogVideoXTransformer3DModel, which are those of 2b
    height: int
    width: int
    max_num_frames: int
    rank: int
    steps: int
    warmup: int


SMALL = TINY | {
    "num_layers": 4, "num_attention_heads": 8, "attention_head_dim": 64, "time_embed_dim": 512,
    "sample_height": 16, "sample_width": 24, "sample_frames": 17,
}  # fmt: skip
SIZES = {  # of the first, the transformer is that of examples/make_example.py
    "overhead": Size(TINY, 64, 96, 9, rank=8, steps=300, warmup=20),
    "compute": Size(SMALL, 128, 192, 17, rank=32, steps=20, warmup=4),
    "2b": Size({}, 480, 720, 49, rank=128, steps=20, warmup=4),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    option = parser.add_argument
    option("--reference", type=Path, required=True, metavar="FILE", help="diffusers' train_cogvideox_lora.py")
    what = "overhead: all but matrix products; compute: mostly those; 2b: full size, for a GPU"
    option("--size", choices=list(SIZES), default="overhead", help=what)
    option("--mixed_precision", choices=["no", "bf16", "fp16"], default="no", help="no: float32")
    option("--gradient_checkpointing", action="store_true", help="both recompute activations")
    option("--train_batch_size", type=int, default=1, metavar="N", help="clips per update")
    option("--rank", type=int, metavar="N", help="of the LoRA, and its alpha (default: the size's)")
    option("--steps", type=int, metavar="N", help="updates of each run that are measured (default: the size's)")
    option("--warmup", type=int, metavar="N", help="updates before them (default: the size's)")
    option("--gate_updates", type=int, default=3, metavar="N", help="updates that are compared before any is timed")
    option("--rounds", type=int, default=1, metavar="N", help="of ours, theirs, theirs, ours")
    option("--work_dir", type=Path, metavar="FOLDER", help="for checkpoint, clips and logs (default: a temporary one)")
    option("--output", type=Path, metavar="FILE", help="also write all that was measured there, as JSON")
    option(
        "--ours_options", nargs=argparse.REMAINDER, default=[], metavar="OPTION",
        help="all that follows is for our script alone, such as: --ours_options --compile",
    )  # fmt: skip
    args = parser.parse_args(argv)
    args.ours_options = " ".join(args.ours_options).split()  # in quotes they are one word

    if not args.reference.is_file():
        parser.error(f"--reference {args.reference}: no such file; give the path of train_cogvideox_lora.py")
    for name in ("rank", "steps", "warmup", "train_batch_size", "rounds", "gate_updates"):
        value, lowest = getattr(args, name), 2 if name == "steps" else 1
        if value is None:
            setattr(args, name, getattr(SIZES[args.size], name))
        elif value < lowest:
            parser.error(f"--{name} {value}: must be at least {lowest}")
    check_ours_options(args, parser.error)
    return args


def check_ours_options(args: argparse.Namespace, refuse: Callable[[str], None]) -> None:
    """Refuses what both scripts share; our script refuses by itself what it does not know.

    What makes the work another one (--use_dora, say) is for the gate to find.

    --gradient_checkpointing may be another one: it changes what is kept, not what is computed.
    """
    shared = {word for word in shared_options(args, updates=1) if word.startswith("--")} - {"--gradient_checkpointing"}
    for word in args.ours_options:
        name = word.split("=")[0]
        if name in shared | {"--output_dir", "--latents_cache_dir"}:
            refuse(f"--ours_options {name}: set for both scripts alike; leave it out, or pass it to versus.py itself")
    train.parse_args([*shared_options(args, updates=1), *args.ours_options])


# ---- the world that both train in ------------------------------------------------------------------------------------


def write_world(size: Size, folder: Path) -> None:
    """`folder`/checkpoint and `folder`/clips, of the size that is trained in."""
    torch.manual_seed(0)
    # The transformer's defaults are those of 2b.
    transformer = CogVideoXTransformer3DModel(**size.transformer)
    config = transformer.config
    tokenizer = make_example.make_tokenizer(folder / "tokenizer")
    text_config = T5Config(
        vocab_size=len(tokenizer), d_model=config.text_embed_dim, d_ff=64, d_kv=16, num_heads=2, num_layers=2,
        feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=config.in_channels, layers_per_block=1, norm_num_groups=4,
        sample_height=size.height, sample_width=size.width, scaling_factor=1.15258426,
    )  # fmt: skip
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False,
        snr_shift_scale=3.0,
    )  # fmt: skip
    CogVideoXPipeline(
        tokenizer=tokenizer, text_encoder=T5EncoderModel(text_config), vae=vae, transformer=transformer.half(),
        scheduler=scheduler,
    ).save_pretrained(folder / "checkpoint")  # fmt: skip
    make_example.make_clips(
        folder / "clips", count=8, num_frames=size.max_num_frames, fps=8, height=size.height, width=size.width
    )


def shared_options(args: argparse.Namespace, updates: int) -> list[str]:
    """The part of the command line that both scripts get; paths are relative to the folder of `write_world`."""
    size = SIZES[args.size]
    values = {
        "pretrained_model_name_or_path": "checkpoint",  # "5b" in it would make diffusers' example load bfloat16
        "instance_data_root": "clips", "caption_column": "prompts.txt", "video_column": "videos.txt",
        "height": size.height, "width": size.width, "max_num_frames": size.max_num_frames, "fps": 8,
        "rank": args.rank, "lora_alpha": args.rank, "train_batch_size": args.train_batch_size,
        "gradient_accumulation_steps": 1, "max_train_steps": updates, "checkpointing_steps": updates + 1,
        "mixed_precision": args.mixed_precision, "optimizer": "adamw", "learning_rate": 1e-3, "max_grad_norm": 1.0,
        "seed": 42,
    }  # fmt: skip
    line = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return line + ["--gradient_checkpointing"] * args.gradient_checkpointing


def run_trial(folder: Path, name: str, use: list[str], script: Path, options: list[str]) -> None:
    """Runs a script under trial.py in `folder`, its output in `name`.log.

    Args:
        use: the words of trial.py before the script.

    Raises:
        RuntimeError: the script failed.
    """
    line = [sys.executable, str(TRIAL), *use, str(script.resolve()), *options, "--output_dir", name]
    with open(folder / f"{name}.log", "w") as log:
        code = subprocess.run(
            line, cwd=folder, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=log, stderr=subprocess.STDOUT
        ).returncode
    if code:
        end = "\n".join((folder / f"{name}.log").read_text().splitlines()[-12:])
        raise RuntimeError(f"{name}: {script} ended with code {code}:\n{end}")


# ---- the gate --------------------------------------------------------------------------------------------------------


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of all tensors together, as a share of the norm of what is expected."""
    difference = sum((found[name].double() - tensor.double()).square().sum() for name, tensor in expected.items())
    return (difference / sum(tensor.double().square().sum() for tensor in expected.values())).sqrt().item()


def compare_updates(found: list[dict], expected: list[dict]) -> list[dict[str, float]]:
    return [compare_update(*pair) for pair in zip(found, expected, strict=True)]


def compare_update(found: dict, expected: dict) -> dict[str, float]:
    """How far one update is from another, as shares: what the transformer is given, loss, gradients, what changes."""
    change = [{name: record["after"][name].double() - record["before"][name].double() for name in record["before"]}
              for record in (found, expected)]  # fmt: skip
    inputs = ("hidden_states", "encoder_hidden_states")
    return {
        "inputs": max(distance({name: found[name]}, {name: expected[name]}) for name in inputs),
        "loss": abs(found["loss"] - expected["loss"]) / expected["loss"],
        "gradients": distance(found["gradients"], expected["gradients"]),
        "updates": distance(*change),
    }


def gate(args: argparse.Namespace, folder: Path) -> dict:
    """What both make of the same draws, embeddings and LoRA; in bf16 and fp16, how far each is from float32.

    Raises:
        ValueError: they differ by more than `TOLERANCE`, or `ROUNDING` allows.
    """
    options = shared_options(args, args.gate_updates)
    run_trial(folder, "gate-theirs", ["capture", "theirs.pt"], args.reference, options)
    theirs = torch.load(folder / "theirs.pt", weights_only=True)
    ours = replay(folder, "gate-ours", [*options, *args.ours_options])
    result = {"timesteps": [update["timesteps"].tolist() for update in theirs], "shifts": compare_updates(ours, theirs)}
    if args.mixed_precision == "no":
        check_gate(result["shifts"])
        return result | {"tolerance": TOLERANCE}
    # The last of two values counts; recomputation changes the memory alone, of which float32 needs twice as much. Plain
    # in all else: no kernel but the math one may know float32.
    exact = replay(folder, "gate-float32", [*options, "--mixed_precision", "no", "--gradient_checkpointing"])
    from_float32 = {"ours": compare_updates(ours, exact), "theirs": compare_updates(theirs, exact)}
    check_rounding(from_float32)
    return result | {"from_float32": from_float32, "tolerance": {"rounding": ROUNDING}}


def replay(folder: Path, name: str, options: list[str]) -> list[dict]:
    """Our updates, given the draws of theirs.pt."""
    options = [*options, "--latents_cache_dir", f"{name}-cache"]
    run_trial(folder, name, ["replay", "theirs.pt", f"{name}.pt"], OURS, options)
    return torch.load(folder / f"{name}.pt", weights_only=True)


def check_gate(shifts: list[dict[str, float]]) -> None:
    for number, update in enumerate(shifts, 1):
        for name, limit in TOLERANCE.items():
            if not update[name] <= limit:
                raise ValueError(
                    f"update {number}: {name} differ by {update[name]:.1e} of their size, allowed are {limit:.0e}: the "
                    "two scripts do not do the same work, and their times say nothing"
                )


def check_rounding(from_float32: dict[str, list[dict[str, float]]]) -> None:
    """What is not a number is more than any limit."""
    ours, theirs = (statistics.mean(update["gradients"] for update in from_float32[who]) for who in ("ours", "theirs"))
    if not ours <= ROUNDING * theirs:
        raise ValueError(
            f"gradients are {ours:.1e} of their size from those of float32, those of the other script {theirs:.1e}: "
            f"more than {ROUNDING:g} times as much is no rounding, and the times say nothing"
        )


# ---- the comparison --------------------------------------------------------------------------------------------------


def time_trial(args: argparse.Namespace, folder: Path, number: int, who: str) -> dict:
    name = f"{number}-{who}"
    script, options = args.reference, shared_options(args, args.warmup + args.steps)
    if who == "ours":
        cache = ["--latents_cache_dir", f"{name}-cache"]  # empty at each start
        script, options = OURS, [*options, *args.ours_options, *cache]
    began = time.time()
    run_trial(folder, name, ["times", f"{name}.json"], script, options)
    return summarize(who, json.loads((folder / f"{name}.json").read_text()), began, args.warmup)


def summarize(who: str, record: dict, began: float, warmup: int) -> dict:
    """Of one run: seconds per update after the warm-up, seconds until the first one is done, and memory."""
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
        "seconds_to_first_update": round(at[0] - began, 2),
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
    """Means of ours over those of theirs, of all rounds; and the last two, both ours, over each other."""
    *compared, first, second = trials
    of = {who: [trial for trial in compared if trial["who"] == who] for who in ("ours", "theirs")}
    mean = {who: {name: statistics.mean(trial[name] for trial in of[who]) for name in COLUMNS} for who in of}
    return {
        "ours_over_theirs": {name: round(mean["ours"][name] / mean["theirs"][name], 4) for name in COLUMNS},
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
    worst = {
        name: ", ".join(f"{what} {max(update[what] for update in shifts):.1e}" for what in TOLERANCE)
        for name, shifts in compared.items()
    }
    return "\n".join(f"gate, {name}, largest difference as a share: {shown}" for name, shown in worst.items())


def about(args: argparse.Namespace) -> dict:
    packages = ("torch", "diffusers", "peft", "accelerate", "transformers")
    line = shared_options(args, args.warmup + args.steps)
    return {
        "size": args.size,
        "transformer": SIZES[args.size].transformer,
        "processor": platform.processor() or platform.machine(),
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
    write_world(SIZES[args.size], folder)
    result = about(args) | {"gate": gate(args, folder), "load_average_before": os.getloadavg()[0], "trials": []}
    print(describe_gate(result["gate"]), flush=True)
    for number, who in enumerate((*ROUND * args.rounds, "ours", "ours"), 1):
        keep(args, result)  # what there is, should the rest not come
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
            result = compare(args, folder)
        except (RuntimeError, ValueError) as error:
            sys.exit(f"versus.py: error: {error}")
    print(table(result))


if __name__ == "__main__":
    main()
