"""Measures preprocessing: clips per minute and the seconds of its stages, as JSON.

    python benchmarks/preprocess.py --model 2b --mixed_precision bf16 --output benchmarks/results/preprocess-2b.json
    python benchmarks/preprocess.py --model tiny --clips 8 --max_num_frames 49 --height 480 --width 720
    python benchmarks/preprocess.py --model tiny --reference path/to/diffusers/examples/cogvideo/train_cogvideox_lora.py

Needs no base model and no clips: VAE and T5 have random weights, and clips are drawn, with three times the frames that
the model sees, at 24 frames per second and 1.5 times its size. Probing files is measured; loading models is not.

With --reference, the same clips and models go through the data part of diffusers' script, unmodified: its VideoDataset
decodes all clips, its compute_prompt_embeddings encodes captions. Its encode_video is local to its main(), so its two
calls are made here: the clip to the device and dtype as [1, C, F, H, W], and `vae.encode`. Each clip and caption is
encoded once; the script itself encodes captions again in every step. With ours as A and the reference as B, they run in
the order A B B A, --repeats times, after one run of each to warm up, and then A A, which shows the noise. The ratio is
the ratio of the medians.
"""

import argparse
import contextlib
import functools
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from diffusers import AutoencoderKLCogVideoX
from transformers import AutoTokenizer, T5Config, T5EncoderModel

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import make_example
import reference
from step import T5S, VAES, clip_size

import dataset
from clips import frames
from clips.frames import View
from clips.listing import Columns, Folder, read_listing
from clips.order import Ranks
from clips.selection import Selection
from cogvideox import encoders
from cogvideox.encoders import TOKENS_AT_ONCE, Encoder, clips_at_once
from files import at_least, expanded_path, write_json

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}
MAX_LENGTH = 226  # tokens of a caption
# Functions that are timed separately: module, name, and name in the result.
STAGES = (
    (dataset, "examine_clips", "probe"),
    (frames, "read_frames", "decode"),  # includes resizing, which is subtracted later
    (frames, "resize_and_crop", "resize"),
    (dataset, "write_entry", "write"),
)


class Work(NamedTuple):
    """Clips and models, the same for both scripts; VAE and T5 have random weights."""

    folder: Path
    view: View
    vae: AutoencoderKLCogVideoX
    tokenizer: object
    text_encoder: T5EncoderModel

    @property
    def num_clips(self) -> int:
        return len((self.folder / "videos.txt").read_text().split("\n")) - 1


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    positive, path = at_least(1), expanded_path
    add = parser.add_argument
    add("--model", choices=["2b", "tiny"], default="2b", help="sizes of VAE and T5; 2b: as published; tiny: for a CPU")
    add("--t5_layers", type=positive, metavar="N", help="layers of T5 (default: the model's, in bf16 9.5 GB for 2b)")
    add("--data", type=path, metavar="FOLDER", help="folder with prompts.txt and videos.txt (default: clips are drawn)")
    add("--clips", type=positive, default=8, metavar="N", help="clips to draw")
    add("--height", type=positive, help="height of the encoded clips in pixels (default: the model's)")
    add("--width", type=positive, help="width of the encoded clips in pixels (default: the model's)")
    frames_help = "frames per clip, 4k + 1 (default: the model's)"
    add("--max_num_frames", "--num_frames", type=positive, metavar="N", help=frames_help)
    add("--mixed_precision", choices=list(DTYPES), default="bf16", help="precision of VAE and T5; no: float32")
    add("--channels_last", action="store_true", help="store the VAE's weights with channels last, too")
    add("--repeats", type=positive, default=1, metavar="N", help="runs to measure; with --reference, rounds of A B B A")
    add("--reference", type=path, metavar="FILE", help="diffusers' train_cogvideox_lora.py, to compare with")
    add("--output", type=path, metavar="FILE", help="file to write the JSON to, beside printing it")
    # Options of the training script that are not varied here.
    varied_not = {"fps": 8, "skip_frames_start": 0, "skip_frames_end": 0, "video_reshape_mode": "center", "seed": 0}
    parser.set_defaults(**varied_not, video_decoder="pyav")
    args = parser.parse_args(argv)
    for name, default in clip_size(args.model).items():
        setattr(args, name, getattr(args, name) or default)
    frames.check_options(args, parser.error)
    if args.reference and not args.reference.is_file():
        parser.error(f"--reference {args.reference}: no such file; pass the path of diffusers' train_cogvideox_lora.py")
    return args


def prepare(args: argparse.Namespace, folder: Path) -> Work:
    """Draws clips into `folder`, unless some are given, and creates the models."""
    clips = args.data or make_example.make_clips(
        folder / "clips",
        count=args.clips,
        num_frames=3 * args.max_num_frames,
        fps=24,
        height=3 * args.height // 2,
        width=3 * args.width // 2,
    )
    view = frames.view_of(args, with_image=False, whole=False)
    make_example.make_tokenizer(folder / "tokenizer", MAX_LENGTH)
    vae, text_encoder = random_models(args)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    return Work(folder=clips, view=view, vae=vae, tokenizer=tokenizer, text_encoder=text_encoder)


def random_models(args: argparse.Namespace) -> tuple[AutoencoderKLCogVideoX, T5EncoderModel]:
    """Creates VAE and T5 on the GPU, if there is one, in their final dtype."""
    size = "tiny" if args.model == "tiny" else "published"
    config = T5Config(dropout_rate=0.0, **T5S[size])
    config.num_layers = args.t5_layers or config.num_layers
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[args.mixed_precision])
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            vae, text_encoder = AutoencoderKLCogVideoX(**VAES[size]), T5EncoderModel(config)
    finally:
        torch.set_default_dtype(default)
    for model in (vae, text_encoder):
        model.eval().requires_grad_(False)
    if args.channels_last:
        store_channels_last(vae)
    return vae, text_encoder


def store_channels_last(vae: AutoencoderKLCogVideoX) -> None:
    """Stores the weights of the convolutions channels last, as `encode_videos` stores the frames."""
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, torch.nn.Conv2d):
            module.to(memory_format=torch.channels_last)


# ---- ours ------------------------------------------------------------------------------------------------------------


def preprocess(work: Work, cache: Path, encode_videos: Callable, encode_captions: Callable) -> None:
    """Fills a cache as train_cogvideox_lora.py does, with models that are loaded already."""
    listing = read_listing([Folder(work.folder)], Columns("prompts.txt", "videos.txt"))
    captions_at_once = TOKENS_AT_ONCE // MAX_LENGTH
    dataset.encode_dataset(
        listing,
        Selection(work.view),
        cache=cache,
        prompts=[],
        random_flip=False,
        video_encoder=Encoder("vae", lambda: contextlib.nullcontext(encode_videos), clips_at_once),
        text_encoder=Encoder("t5", lambda: contextlib.nullcontext(encode_captions), lambda _: captions_at_once),
        progress=lambda items, *_: items,
        ranks=Ranks(),
        everyone=Ranks(),
        used_by=cache,
    )


def run_ours(work: Work, stages: dict | None = None) -> float:
    """Returns the seconds of our preprocessing; adds those of its stages, which may overlap, to `stages`."""
    encode_videos = functools.partial(encoders.encode_videos, work.vae)
    encode_captions = functools.partial(
        encoders.encode_captions, work.tokenizer, work.text_encoder, max_length=MAX_LENGTH, cut={}
    )
    with tempfile.TemporaryDirectory() as cache, contextlib.ExitStack() as stack:
        if stages is not None:
            encode_videos = timed(encode_videos, "vae", stages, synchronize)
            encode_captions = timed(encode_captions, "t5", stages, synchronize)
            for module, name, stage in STAGES:  # without waiting for the GPU, which works at the same time
                timed_function = timed(getattr(module, name), stage, stages)
                stack.enter_context(mock.patch.object(module, name, timed_function))
        start = time.perf_counter()
        preprocess(work, Path(cache), encode_videos, encode_captions)
        synchronize()
        seconds = time.perf_counter() - start
    if stages is not None:
        stages["decode"] -= stages["resize"]
    return seconds


def timed(call: Callable, stage: str, stages: dict, wait: Callable[[], None] = lambda: None) -> Callable:
    lock = threading.Lock()

    @functools.wraps(call)
    def timed_call(*arguments, **options):
        start = time.perf_counter()
        result = call(*arguments, **options)
        wait()
        with lock:
            stages[stage] = stages.get(stage, 0) + time.perf_counter() - start
        return result

    return timed_call


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---- the reference ---------------------------------------------------------------------------------------------------


def run_reference(script, work: Work) -> dict[str, float]:
    """Returns the seconds of each stage of the data part of diffusers' script, which are all of it."""
    vae, view = work.vae, work.view
    start = time.perf_counter()
    try:
        videos = script.VideoDataset(
            instance_data_root=work.folder,
            caption_column="prompts.txt",
            video_column="videos.txt",
            height=view.height,
            width=view.width,
            fps=view.fps,
            max_num_frames=view.max_num_frames,
        )
    finally:
        import decord  # which the script needs; there are wheels for x86-64 only

        decord.bridge.reset_bridge()  # the script sets it to torch, for the whole process
    decoded = time.perf_counter()
    for i, video in enumerate(videos.instance_videos):
        video = video.to(vae.device, dtype=vae.dtype)[None].permute(0, 2, 1, 3, 4)  # [1, C, F, H, W]
        videos.instance_videos[i] = vae.encode(video).latent_dist
    synchronize()
    encoded = time.perf_counter()
    for prompt in videos.instance_prompts:
        script.compute_prompt_embeddings(
            work.tokenizer, work.text_encoder, [prompt], MAX_LENGTH, vae.device, vae.dtype, requires_grad=False
        )
    synchronize()
    end = time.perf_counter()
    return {"decode and resize": decoded - start, "vae": encoded - decoded, "t5": end - encoded}


def compare(work: Work, path: Path, repeats: int) -> tuple[list[float], dict]:
    """Returns the seconds of each of our runs, and the measurements of the reference beside them."""
    stand_in = reference.stand_in_for_torchvision()
    script = reference.load_reference(path)
    order = "ABBA" * repeats
    ours, theirs = [], []
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        stages = run_reference(script, work)  # warms up
        for name in order:
            if name == "A":
                ours.append(run_ours(work))
            else:
                theirs.append(sum(run_reference(script, work).values()))
    first, second = run_ours(work), run_ours(work)
    return ours, {
        "sha256": reference.sha256(path),
        "torchvision": "stand-in" if stand_in else version("torchvision"),
        "order": f"{order}, then A A",
        "seconds": rounded(theirs),
        "clips_per_minute": round(60 * work.num_clips / statistics.median(theirs), 2),
        "seconds_per_clip_of_stages": per_clip(stages, work),
        "ratio_of_medians": round(statistics.median(theirs) / statistics.median(ours), 3),
        "ratios_of_neighbours": rounded([b / a for a, b in zip(ours, theirs)]),
        "ratio_of_ours_to_ours": round(second / first, 3),
    }


# ---- the result ------------------------------------------------------------------------------------------------------


def rounded(values: list[float]) -> list[float]:
    return [round(value, 3) for value in values]


def per_clip(stages: dict, work: Work) -> dict:
    return {stage: round(seconds / work.num_clips, 4) for stage, seconds in stages.items()}


def report(args: argparse.Namespace, work: Work) -> dict:
    stages = {}
    run_ours(work, stages)
    if args.reference:
        seconds, compared = compare(work, args.reference, args.repeats)
    else:
        seconds, compared = [run_ours(work) for _ in range(args.repeats)], None
    device = work.vae.device
    packages = ("torch", "diffusers", "transformers", "av", "safetensors")
    names = ("model", "t5_layers", "max_num_frames", "height", "width", "mixed_precision", "channels_last", "repeats")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "decoding_threads": frames.decoding_threads([work.view]),
        "clips_at_once": clips_at_once((args.max_num_frames, args.height, args.width, 3)),
        "versions": {package: version(package) for package in packages},
        "options": {name: getattr(args, name) for name in names},
        "clips": work.num_clips,
        "drawn": args.data is None,
        "seconds": rounded(seconds),
        "clips_per_minute": round(60 * work.num_clips / statistics.median(seconds), 2),
        "seconds_per_clip_of_stages": per_clip(stages, work),
        "reference": compared,
    }


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    warnings.filterwarnings("ignore", message="CogVideoX reads")  # the tokenizer's words are letters
    with tempfile.TemporaryDirectory() as folder:
        result = report(args, prepare(args, Path(folder)))
    print(json.dumps(result, indent=2))
    if args.output:
        write_json(args.output, result)


if __name__ == "__main__":
    main()
