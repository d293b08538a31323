"""Inputs with something wrong in them, from a seeded generator: a message or a result, never a traceback."""

import csv
import json
import os
import random
import resource
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

from conftest import ROOT
from safetensors.torch import load_file

from cogvideox.lora_files import LORA_FILE
from faults import damage, harness
from faults.harness import World
from run.run_directory import ARGS_FILE, METRICS_FILE, STATE_FILE

SHORT = {"max_train_steps": 1}
MEMORY_BYTES = 12 * 2**30  # of address space: a wild size must not take the memory of the machine
VALUES = (
    None, True, False, -1, 0, 1, 3, 2**31, 10**20, 1e30, -0.5, 0.5, float("nan"), "", "text", "é\u202e", [], [1], {},
    {"a": 1},
)  # fmt: skip
TEXTS = ("", "\n", "\x00", "\ufeff", "\r\n\r\n", "../../", '"', ",", "\t", "é\u202e字", "a" * 70_000, "{", "null")
CONFIGS = (
    "model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json",
    "text_encoder/config.json", "tokenizer/tokenizer_config.json",
)  # fmt: skip


# ---- what can be wrong with a file -----------------------------------------------------------------------------------


def spoil_bytes(path: Path, draw: random.Random) -> str:
    way = draw.choice(["one bit flipped", "truncated", "emptied", "zeros", "deleted", "many bits flipped", "folder"])
    if way == "folder":
        path.unlink()
        path.mkdir()
    elif way == "many bits flipped":
        for _ in range(20):
            damage.flip(path, draw)
    else:
        damage.WAYS[way](path, draw)
    return way


def spoil_text(path: Path, draw: random.Random) -> str:
    """Inserts, deletes, repeats or exchanges lines, or puts odd text somewhere."""
    text = path.read_text(encoding="utf-8")
    lines, way = text.splitlines(), draw.choice(["insert", "delete", "repeat", "odd text", "join", "latin-1"])
    at = draw.randrange(len(lines))
    if way == "insert":
        lines.insert(at, draw.choice(TEXTS))
    elif way == "delete":
        del lines[at]
    elif way == "repeat":
        lines.insert(at, lines[at])
    elif way == "odd text":
        cut = draw.randrange(len(lines[at]) + 1)
        lines[at] = lines[at][:cut] + draw.choice(TEXTS) + lines[at][cut:]
    elif way == "join" and at + 1 < len(lines):
        lines[at : at + 2] = [lines[at] + lines[at + 1]]
    path.write_bytes(("\n".join([*lines, "é"] if way == "latin-1" else lines) + "\n").encode(
        "latin-1" if way == "latin-1" else "utf-8", "replace"
    ))  # fmt: skip
    return f"{way} at line {at + 1}"


def spoil_json(path: Path, draw: random.Random) -> str:
    """Replaces, deletes or adds a value anywhere in the file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    holders = [content]
    for holder in holders:
        inner = holder.values() if isinstance(holder, dict) else holder
        holders.extend(value for value in inner if isinstance(value, (dict, list)) and value)
    holder = draw.choice(holders)
    key = draw.choice(sorted(holder) if isinstance(holder, dict) else range(len(holder)))
    way = draw.choice(["delete", "replace", "replace", "replace"])
    if way == "delete":
        del holder[key]
        said = f"{key} deleted"
    else:
        holder[key] = draw.choice(VALUES)
        said = f"{key} = {holder[key]!r}"
    path.write_text(json.dumps(content), encoding="utf-8")
    return said


# ---- inputs: each spoils something in a folder, and returns the options of the run and a description -----------------


def own_clips(world: World, folder: Path) -> Path:
    """Returns a copy of the clips whose cache is shared with nobody."""
    clips = folder / "clips"
    shutil.copytree(world.clips, clips)
    return clips


def lists(world: World, folder: Path, draw: random.Random) -> tuple[dict, str]:
    clips, name = own_clips(world, folder), draw.choice(["prompts.txt", "videos.txt"])
    said = draw.choice([spoil_text, spoil_text, spoil_text, spoil_bytes])(clips / name, draw)
    return {"instance_data_root": clips}, f"{name}: {said}"


def tables(world: World, folder: Path, draw: random.Random) -> tuple[dict, str]:
    clips, name = own_clips(world, folder), draw.choice(["metadata.jsonl", "metadata.csv"])
    columns = [(clips / list_).read_text().splitlines() for list_ in ("videos.txt", "prompts.txt")]
    for list_ in ("videos.txt", "prompts.txt"):
        (clips / list_).unlink()
    rows = [{"file_name": video, "text": caption} for video, caption in zip(*columns)]
    with open(clips / name, "w", newline="", encoding="utf-8") as file:
        if name.endswith("csv"):
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
        else:
            if draw.random() < 0.5:
                draw.choice(rows)[draw.choice(["file_name", "text"])] = draw.choice(VALUES)
            file.writelines(json.dumps(row) + "\n" for row in rows)
    said = draw.choice([spoil_text, spoil_text, spoil_bytes])(clips / name, draw)
    return {"instance_data_root": clips}, f"{name}: {said}"


def videos(world: World, folder: Path, draw: random.Random) -> tuple[dict, str]:
    clips = own_clips(world, folder)
    video = draw.choice(sorted((clips / "videos").iterdir()))
    if draw.random() < 0.2:
        suffix = draw.choice([".avi", ".gif", ".txt", ".png", ".webm", "", ".mp4.part"])
        video.rename(video.with_suffix(suffix))
        listed = (clips / "videos.txt").read_text().replace(video.name, video.with_suffix(suffix).name)
        (clips / "videos.txt").write_text(listed)
        return {"instance_data_root": clips}, f"{video.name}: renamed to *{suffix}"
    return {"instance_data_root": clips}, f"{video.name}: {spoil_bytes(video, draw)}"


def configs(world: World, folder: Path, draw: random.Random) -> tuple[dict, str]:
    base, name = folder / "base", draw.choice(CONFIGS)
    shutil.copytree(world.checkpoint, base)
    said = draw.choice([spoil_json, spoil_json, spoil_json, spoil_bytes])(base / name, draw)
    return {"pretrained_model_name_or_path": base, "latents_cache_dir": folder / "cache"}, f"{name}: {said}"


def lora_files(world: World, folder: Path, draw: random.Random) -> tuple[dict, str]:
    harness.undisturbed(world)
    source = world.folder / "undisturbed-lora-1" / LORA_FILE
    path = Path(shutil.copy(source, folder / LORA_FILE))
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    if draw.random() < 0.6:
        header = folder / "header.json"
        header.write_bytes(content[8:end])
        said = spoil_json(header, draw)
        new = header.read_bytes()
        path.write_bytes(len(new).to_bytes(8, "little") + new + content[end:])
        return {"lora_path": path}, f"header: {said}"
    return {"lora_path": path}, spoil_bytes(path, draw)


def records(world: World, folder: Path, draw: random.Random) -> tuple[dict, str]:
    """A run directory with a damaged metrics.jsonl, args.json or training_state.json; the run that resumes it."""
    output_dir = folder / "run"
    shutil.copytree(damage.template(world, "lora"), output_dir)
    names = [METRICS_FILE, ARGS_FILE, f"{damage.NEWEST}/{STATE_FILE}"]
    name = draw.choice(names)
    ways = [spoil_text, spoil_bytes] if name == METRICS_FILE else [spoil_json, spoil_json, spoil_text, spoil_bytes]
    said = draw.choice(ways)(output_dir / name, draw)
    return harness.COURSE | harness.KINDS["lora"] | {"resume_from_checkpoint": "auto"}, f"{name}: {said}"


INPUTS: dict[str, Callable] = {
    "lists": lists, "tables": tables, "videos": videos, "configs": configs, "lora_files": lora_files, "records": records
}  # fmt: skip


# ---- trials ----------------------------------------------------------------------------------------------------------


def limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def check(world: World, kind: str, seed: int) -> int:
    """Trains on an input with something wrong in it; returns the exit code.

    Raises:
        AssertionError: it ends with a traceback, hangs, or its result is not finite; the message says what was wrong.
    """
    draw = random.Random(f"{kind} {seed}")
    folder = harness.fresh(world.folder / "mutations" / f"{kind}-{seed}")
    folder.mkdir(parents=True)
    options, said = INPUTS[kind](world, folder, draw)
    base = options.pop("pretrained_model_name_or_path", world.checkpoint)
    line = world._replace(checkpoint=base).options(folder / "run", **SHORT | options)
    try:
        ended = harness.run(line, disturb=limit_memory)
    except AssertionError as error:
        raise AssertionError(f"{kind} {seed}, {said}: {error}") from error
    assert ended.codes[0] in (0, 2, 3) and not ended.has_traceback, (
        f"{kind} {seed}, {said}: exit code {ended.codes[0]}: {ended.output[-1500:]}"
    )
    if ended.codes[0]:
        assert "error: " in ended.output, f"{kind} {seed}, {said}: no message: {ended.output[-1500:]}"
    else:
        weights = load_file(folder / "run" / LORA_FILE)
        assert all(weight.isfinite().all() for weight in weights.values()), f"{kind} {seed}, {said}: not finite"
    shutil.rmtree(folder)
    return ended.codes[0]


def check_accelerate(world: World, seed: int) -> int:
    """Trains with a value in accelerate's config file that is wrong; returns the exit code, which is accelerate's.

    What accelerate itself makes of such a file is its own; the training script must not add a traceback.
    """
    draw = random.Random(f"accelerate {seed}")
    folder = harness.fresh(world.folder / "mutations" / f"accelerate-{seed}")
    folder.mkdir(parents=True)
    lines = (ROOT / "accelerate_config_machine_single.yaml").read_text().splitlines()
    places = [number for number, line in enumerate(lines) if ":" in line and not line.startswith("#")]
    at = draw.choice(places)
    lines[at] = f"{lines[at].split(':')[0]}: {draw.choice(['bf17', -1, 0, 'true', '[]', 'null', '{a: 1}', 3, 'no'])}"
    config = folder / "config.yaml"
    config.write_text("\n".join(lines) + "\n")
    command = ["accelerate", "launch", "--quiet", "--config_file", str(config), "--num_processes", "1"]
    line = world.options(folder / "run", **SHORT)
    ended = subprocess.run(
        [*command, str(ROOT / "train_cogvideox_lora.py"), *line],
        env=os.environ | harness.ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=2 * harness.SECONDS_UNTIL_HUNG,  # the launcher and the script import torch one after the other
    )
    is_ours = f'File "{ROOT}/train_cogvideox_lora.py"' in ended.stderr
    assert not is_ours, f"accelerate {seed}, {lines[at]}: {ended.stderr[-1500:]}"
    shutil.rmtree(folder)
    return ended.returncode


def trials(world: World, count: int) -> dict[str, Callable[[], int]]:
    """Returns as many trials, of all kinds in turn."""
    kinds = list(INPUTS)
    numbered = [(kinds[number % len(kinds)], number // len(kinds)) for number in range(count)]
    return {f"{kind} {seed}": partial(check, world, kind, seed) for kind, seed in numbered}
