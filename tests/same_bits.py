"""Shows that two commits compute the same: the same tiny runs on a CPU, compared bit for bit.

    python tests/same_bits.py --base main
    python tests/same_bits.py --base_folder ../before --cases 2b sft

The base is a commit or a folder; the new side is the checkout that this file is in, uncommitted changes included. Both
are used through their command lines only, so that nothing here depends on how they are written. The base makes clips
and checkpoints for both. All cases take about six minutes on two quiet cores.

Prints a line per case. Exits with 1 if a case differs or a run fails, and then keeps all runs to look into.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import imageio.v3 as iio
import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
# One thread each: how many threads share a sum decides its last bits.
ENVIRONMENT = os.environ | {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
TIMEOUT_SECONDS = 900


class Case(NamedTuple):
    """A run that both sides make, or that the base begins and the new side finishes."""

    flags: str
    variant: str = "2b"  # a value of --variant of examples/make_example.py
    ranks: int = 1
    shares_cache: bool = False  # the new side is given the cache that the base has filled
    resumes: bool = False  # the new side is given a checkpoint of the base, after two updates


# Options as the README has them; one in a case overrides the same one here.
COMMON = "--height 64 --width 96 --max_num_frames 9 --max_train_steps 3 --learning_rate 1e-3 --mixed_precision no"
CASES = {
    "2b": Case("--rank 4"),
    "5b": Case("--rank 4", variant="5b"),
    "5b-I2V": Case("--rank 4", variant="5b-I2V"),
    "1.5-5B": Case("--rank 4", variant="1.5-5B"),
    "1.5-5B-I2V": Case("--rank 4", variant="1.5-5B-I2V"),
    "sft": Case("--training_type sft --mixed_precision bf16"),
    "dora": Case("--rank 4 --use_dora --lora_target_modules to_q to_k to_v to_out.0 ff.net.0.proj ff.net.2"),
    "int8": Case("--rank 4 --base_precision int8 --mixed_precision bf16"),
    "rslora": Case("--rank 4 --use_rslora --lora_dropout 0.2 --gradient_accumulation_steps 2 --train_batch_size 2"),
    "pissa": Case("--rank 4 --init_lora_weights pissa_niter_4"),
    "recompute-attention": Case("--rank 4 --gradient_checkpointing attention", variant="5b"),
    "recompute-full": Case("--rank 4 --gradient_checkpointing full --blocks_to_swap 2", variant="5b"),
    "two-ranks": Case("--rank 4 --gradient_accumulation_steps 2", ranks=2),
    "image-list": Case("--rank 4 --image_column stills.txt --validation_prompt 'a red circle'", variant="5b-I2V"),
    "flip-and-crop": Case("--rank 4 --random_flip --video_reshape_mode random --fps 12 --id_token FILM"),
    "held-out": Case("--rank 4 --validation_split 2 --validation_steps 2 --ema_decay 0.9 --lr_scheduler cosine"),
    "validation-videos": Case("--rank 4 --validation_prompt 'a red circle:::a blue square' --num_validation_videos 2"),
    "cache": Case("--rank 4 --random_flip", variant="5b-I2V", shares_cache=True),
    "resume": Case("--rank 4 --lora_dropout 0.2 --ema_decay 0.9 --random_flip", resumes=True),
    "resume-sft": Case("--training_type sft", resumes=True),
}


# ---- runs ------------------------------------------------------------------------------------------------------------


def run(arguments: list, log: Path) -> None:
    """Runs Python with these arguments; raises RuntimeError if it fails."""
    command = [sys.executable, *map(str, arguments)]
    with open(log, "a", encoding="utf-8") as output:
        print(shlex.join(command), file=output, flush=True)
        options = {"env": ENVIRONMENT, "timeout": TIMEOUT_SECONDS, "stdout": output, "stderr": subprocess.STDOUT}
        code = subprocess.run(command, cwd=log.parent, **options).returncode
    if code:
        lines = log.read_text(encoding="utf-8").strip().splitlines()
        reason = next((line for line in reversed(lines) if "error" in line.lower()), lines[-1])
        raise RuntimeError(f"{log}: exit code {code}: {reason.strip()}")


def make_world(base: Path, worlds: Path, variant: str) -> None:
    """Writes clips and a tiny checkpoint, and stills.txt with an image for each clip."""
    world, clips = worlds / variant, worlds / variant / "clips"
    world.mkdir(parents=True)
    script, log = base / "examples" / "make_example.py", world / "make_example.log"
    run([script, "--output_dir", world, "--variant", variant], log)
    names = [f"{Path(video).stem}.png" for video in (clips / "videos.txt").read_text().splitlines()]
    for seed, name in enumerate(names):
        pixels = np.random.default_rng(seed).integers(0, 256, (96, 128, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(clips / name)
    (clips / "stills.txt").write_text("\n".join(names) + "\n")  # not images.txt, which a run may take unasked


def train(side: Path, case: Case, world: Path, output_dir: Path, cache: Path, more: str = "") -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", case.ranks] if case.ranks > 1 else []
    folders = {
        "--pretrained_model_name_or_path": world / "tiny-cogvideox",
        "--instance_data_root": world / "clips",
        "--latents_cache_dir": cache,
        "--output_dir": output_dir,
    }
    options = [word for pair in folders.items() for word in pair] + shlex.split(f"{COMMON} {case.flags} {more}")
    if (side / "clips" / "decord_reader.py").exists():  # earlier commits know no other decoder than decord
        options += ["--video_decoder", "decord"]
    run([*launcher, side / "train_cogvideox_lora.py", *options], log=output_dir.with_suffix(".log"))


def compare_case(base: Path, new: Path, work: Path, name: str) -> str | None:
    """Runs a case on both sides and returns the first difference."""
    case, world, folder = CASES[name], work / "worlds" / CASES[name].variant, work / name
    folder.mkdir()
    base_cache = folder / "base-cache"
    new_cache = base_cache if case.shares_cache else folder / "new-cache"
    try:
        train(base, case, world, folder / "base", base_cache)
        cache_before = modification_times(base_cache)
        more = ""
        if case.resumes:
            train(base, case, world, folder / "new", base_cache, "--max_train_steps 2")
            more = "--resume_from_checkpoint latest"
        train(new, case, world, folder / "new", new_cache, more)
        changed = first_difference(cache_before, modification_times(base_cache))
        return changed or first_difference(read_run(folder / "base"), read_run(folder / "new"))
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return str(error)


# ---- comparison ------------------------------------------------------------------------------------------------------


def modification_times(folder: Path) -> dict[str, int]:
    files = sorted(folder.rglob("*.safetensors"))  # later commits add notes on the clips beside them
    return {f"modification time in the cache: {path.relative_to(folder)}": path.stat().st_mtime_ns for path in files}


def read_run(output_dir: Path) -> dict[str, Any]:
    """Returns all that a run has computed, numbers and texts by the names of their places."""
    found = {}
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    # Earlier commits write no row for a validation that only samples videos.
    rows = [row for row in rows if "validation_motion" not in row or "validation_loss" in row]
    for number, row in enumerate(rows, start=1):
        computed = {key: row[key] for key in row if "loss" in key or key in ("step", "epoch", "lr", "grad_norm")}
        found |= {f"metrics.jsonl:{number}: {key}": value for key, value in computed.items()}
    results = [output_dir / name for name in (".", "transformer", "checkpoint-best")]
    weights = [path for result in results for path in sorted(result.glob("*.safetensors"))]
    if not weights:
        raise RuntimeError(f"{output_dir}: the run has ended without a result")
    for path in weights:
        found |= {f"{path.relative_to(output_dir)}: {name}": value for name, value in read_tensors(path).items()}
    for path in sorted((*output_dir.glob("transformer/config.json"), *output_dir.rglob("*.mp4"))):
        # Of a video the frames: its metadata name the run directory.
        content = iio.imread(path).tobytes() if path.suffix == ".mp4" else path.read_bytes()
        found[str(path.relative_to(output_dir))] = f"sha256 {hashlib.sha256(content).hexdigest()}"
    return found


def read_tensors(path: Path) -> dict[str, str]:
    """Returns a line for each tensor: dtype, shape, sum, and the hash of its bytes, which tells -0.0 from 0.0."""
    with safe_open(path, framework="pt") as file:
        lines = {f"metadata {name}": value for name, value in (file.metadata() or {}).items()}
        for name in file.keys():  # noqa: SIM118 - the file is no mapping
            tensor = file.get_tensor(name)
            digest = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy()).hexdigest()
            total = tensor.double().sum().item()
            lines[name] = f"{tensor.dtype} {list(tensor.shape)} sum {total!r} sha256 {digest[:16]}"
    return lines


def first_difference(base: dict[str, Any], new: dict[str, Any]) -> str | None:
    """Returns the name of the first value that differs, with both values; None if all are the same."""
    for name in base | new:
        base_value, new_value = base.get(name, "absent"), new.get(name, "absent")
        if base_value != new_value:
            return f"{name}: {base_value} in base, {new_value} in new"
    return None


# ---- command line ----------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    base = parser.add_mutually_exclusive_group(required=True).add_argument
    base("--base", metavar="REV", help="commit, branch or tag of this repository to compare with")
    base("--base_folder", type=Path, metavar="FOLDER", help="checkout to compare with")
    option = parser.add_argument
    option("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=f"of: {' '.join(CASES)}")
    option("--jobs", type=int, default=2, metavar="N", help="cases that run at the same time, about one core each")
    args = parser.parse_args(argv)
    if args.base_folder and not (args.base_folder / "train_cogvideox_lora.py").is_file():
        parser.error(f"--base_folder {args.base_folder}: no train_cogvideox_lora.py there; name a checkout")
    known = ["git", "-C", str(ROOT), "rev-parse", "--quiet", "--verify", f"{args.base}^{{commit}}"]
    if args.base and subprocess.run(known, stdout=subprocess.DEVNULL).returncode:
        parser.error(f"--base {args.base}: no commit of {ROOT}; name one that `git log --all` shows")
    return args


def check_out(revision: str, work: Path) -> Path:
    """Unpacks a commit into a folder; as an archive, since a worktree would have to be unregistered again."""
    archive = work / "base.tar"
    subprocess.run(["git", "-C", str(ROOT), "archive", "--output", str(archive), revision], check=True)
    shutil.unpack_archive(archive, work / "base", filter="data")
    return work / "base"


def main() -> int:
    args = parse_args()
    work = Path(tempfile.mkdtemp(prefix="same-bits-"))
    base = args.base_folder.resolve() if args.base_folder else check_out(args.base, work)
    differing = 0
    with ThreadPoolExecutor(args.jobs) as threads:
        variants = sorted({CASES[name].variant for name in args.cases})
        list(threads.map(partial(make_world, base, work / "worlds"), variants))
        for name, difference in zip(args.cases, threads.map(partial(compare_case, base, ROOT, work), args.cases)):
            print(f"{name:<20} {difference or 'same'}", flush=True)
            differing += difference is not None
    print(f"{len(args.cases) - differing} of {len(args.cases)} cases are the same")
    if differing:
        print(f"all runs: {work}")
        return 1
    shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
