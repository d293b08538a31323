"""Dry runs: the bytes and FLOPs that a run needs, before anything is loaded or written."""

import argparse
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from clips.facts import Facts
from cogvideox.budget import GIB
from cogvideox.rehearsal import Models, Phase, Settings, count_trained_elements

WHOSE_FLOPS = {
    "text": "for the captions that are encoded together",
    "clips": "for the clips that are encoded together",
    "training": "for an update, on each GPU",
    "validation": "for a video",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument_group("before a run").add_argument
    option("--dry_run", action="store_true", help="check, say what the run will do and need, and end; writes nothing")
    option("--dry_run_gib", type=float, metavar="N", help="with --dry_run: suppose a GPU with N GiB free; needs no GPU")
    option("--allow_oversubscription", action="store_true", help="start even if the predicted memory is not there")


def check_options(args: argparse.Namespace, refuse: Callable[[str], None]) -> None:
    """Refuses options without effect; `refuse` ends the program with a message."""
    if args.dry_run_gib is not None and not args.dry_run:
        refuse(f"--dry_run_gib {args.dry_run_gib:g}: does nothing without --dry_run; pass both, or leave it out")
    if args.dry_run_gib is not None and not args.dry_run_gib > 0:
        refuse(f"--dry_run_gib {args.dry_run_gib:g}: must be above 0")


class Outlook(NamedTuple):
    """Sizes of what a run will write, in bytes; its videos and logs are left out."""

    num_trained: int  # elements
    cache: int
    result: int
    checkpoint: int
    num_checkpoints: int  # at the same time


def look_ahead(
    models: Models,
    settings: Settings,
    facts: list[Facts],
    *,
    captions: set[str],
    views: int,
    num_checkpoints: int,
    save_dtype: torch.dtype,
) -> Outlook:
    """Returns the sizes for clips that are not in the cache yet.

    Args:
        captions: those of the clips and of validation.
        views: entries for each clip in the cache: 2 if it is mirrored as well.
        save_dtype: of the result.
    """
    base, itemsize = models.base, settings.dtype.itemsize
    config, cache = base.transformer, 0
    once = {(of_clip.file.content, of_clip.view, of_clip.mask): of_clip.bucket for of_clip in facts}
    for (_, _, mask), bucket in once.items():
        f, h, w = base.latent_shape(*bucket)
        mask_itemsize = torch.float32.itemsize if mask else 0
        cache += views * (2 * config["out_channels"] * itemsize + mask_itemsize) * f * h * w
        if base.takes_image:
            cache += views * bucket.height * bucket.width * 3
    cache += len(captions) * config["max_text_seq_length"] * config["text_embed_dim"] * itemsize
    num_trained = count_trained_elements(models, settings)
    result = num_trained * save_dtype.itemsize
    # A checkpoint has the weights in float32, the optimizer's state, the average, and a result.
    state = num_trained * (4 + models.optimizer.state + (4 if settings.ema else 0))
    return Outlook(num_trained, cache, result, round(state) + result, num_checkpoints)


def check_disk(outlook: Outlook, *, cache: Path, output_dir: Path | None) -> None:
    """Refuses a run whose files have no room; what is in the cache already counts as room.

    Args:
        output_dir: None where nothing is trained.
    """
    cached = sum(file.stat().st_size for file in cache.rglob("*.safetensors")) if cache.exists() else 0
    needs = {f"--latents_cache_dir {cache}": (cache, {"cache": max(0, outlook.cache - cached)})}
    if output_dir:
        checkpoints = outlook.num_checkpoints * outlook.checkpoint
        needs[f"--output_dir {output_dir}"] = output_dir, {"checkpoints": checkpoints, "result": outlook.result}
    disks = {}
    for option, (folder, parts) in needs.items():
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        _, options, on_disk = disks.setdefault(there.stat().st_dev, (there, [], {}))
        options.append(option)
        on_disk |= parts
    problems = [_shortage(*disk) for disk in disks.values()]
    if any(problems):
        raise ValueError("; ".join(filter(None, problems)))


def _shortage(folder: Path, options: list[str], parts: dict[str, int]) -> str | None:
    """Returns what to do about a disk that has no room for its parts, bytes by name; None if it has."""
    free, needed = shutil.disk_usage(folder).free, sum(parts.values())
    if needed <= free:
        return None
    sizes = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    fewer = ", keep fewer checkpoints with --checkpoints_total_limit" if "checkpoints" in parts else ""
    return (
        f"{' and '.join(options)}: the run needs {needed / GIB:.2f} GiB on this disk ({sizes}), and {free / GIB:.2f} "
        f"are free; make room{fewer}, or give a folder on another disk"
    )


def describe(outlook: Outlook, phases: Iterable[Phase]) -> list[str]:
    """Returns lines for the terminal: one for each phase, with its name and its peak memory, and one on sizes."""
    lines = [
        f"{name:<12}{peak_bytes / GIB:7.2f} GiB, {flops / 1e12:,.1f} TFLOP {WHOSE_FLOPS[name]}"
        for name, peak_bytes, flops in phases
    ]
    checkpoints = f"{outlook.checkpoint / GIB:.2f} GiB each, {outlook.num_checkpoints} at a time"
    lines.append(
        f"cache: {outlook.cache / GIB:.2f} GiB; result: {outlook.result / GIB:.2f} GiB; checkpoints: {checkpoints}"
    )
    return [*lines, "dry run: nothing was loaded or written"]
