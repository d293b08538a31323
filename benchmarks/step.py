"""Seconds, tokens per second, MFU and peak memory of training steps, as JSON.

    python benchmarks/step.py --model 2b --gradient_checkpointing --output benchmarks/results/2b-recompute.json
    python benchmarks/step.py --model 2b --training_type sft --gradient_checkpointing
    python benchmarks/step.py --model tiny        # on any CPU, in seconds

Needs no base model and no clips: the transformer has the full size and random weights, so has the VAE that encodes
the images of image-to-video, and the cache holds random latents and embeddings. All else is what
train_cogvideox_lora.py runs: its accelerator, optimizer, batches, loss and update.

"mfu" is the share of its GPU's peak at which a process gets through the forward and backward pass, "hfu" counts what is
recomputed, too. FLOPs are those of a rehearsal (cogvideox/rehearsal.py): products of matrices, and attention's backward
pass as flash kernels compute it, 2.5 times its forward pass (Dao 2023, arXiv:2307.08691, section 4.1).
"peak_memory_gib" is counted after the warm-up: what PyTorch allocated on the GPU, or all that the process ever had on a
CPU; "predicted_peak_gib" is what the rehearsal says of it. Of several processes (accelerate launch) the first one
reports its own times, FLOPs and memory; tokens are those of all.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import set_seed
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXTransformer3DModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dataset
import train_cogvideox_lora as train
from clips.order import Item, Order
from cogvideox import compute, quantized
from cogvideox.base_model import BaseModel, check_training, empty_transformer
from cogvideox.budget import GIB, MemoryPlan
from cogvideox.lora import add_lora, count_trained, lora_of, trained_parameters
from cogvideox.rehearsal import Phase, models_of, rehearse
from files import at_least, write_json
from run import checkpoints, processes, run_directory
from run.guard import Failures
from run.optimizers import WeightAverage
from run.signals import StopRequest

# Options of the training script that are passed on to it.
TRAINING = (
    "training_type", "rank", "height", "width", "max_num_frames", "train_batch_size", "gradient_accumulation_steps",
    "mixed_precision", "gradient_checkpointing", "attention_backend", "base_precision",
    "blocks_to_swap",
)  # fmt: skip

# Dense bfloat16 TFLOP/s of the tensor cores with float32 sums, as NVIDIA's data sheets and whitepapers have them, by
# what torch.cuda.get_device_name says without "NVIDIA ". Whole names: a slice of a GPU (MIG) is named after it, too.
PEAK_TFLOPS = {
    "H200": 989, "H100 80GB HBM3": 989, "H100 PCIe": 756,
    "A100-SXM4-40GB": 312, "A100-SXM4-80GB": 312, "A100-PCIE-40GB": 312, "A100 80GB PCIe": 312,
    "A10": 125, "A30": 165, "A40": 149.7, "L4": 121, "L40S": 362,
    "GeForce RTX 3090": 71, "GeForce RTX 4090": 165,
}  # fmt: skip


class Model(NamedTuple):
    """A base model's published configs; their sample sizes are those of the clips that it was trained on."""

    transformer: dict  # what differs from the defaults of CogVideoXTransformer3DModel, which are those of 2b
    vae: dict  # of its config what the loss needs
    scheduler: type
    snr_shift_scale: float


ROTARY, LEARNED = {"use_rotary_positional_embeddings": True}, {"use_learned_positional_embeddings": True}
FIVE_B = ROTARY | {"num_layers": 42, "num_attention_heads": 48}
SAMPLES_1_5 = {"sample_height": 96, "sample_width": 170, "sample_frames": 81}
FIVE_B_1_5 = FIVE_B | SAMPLES_1_5 | {"patch_size_t": 2, "patch_bias": False}
TINY = {
    "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 4,
    "time_embed_dim": 32, "text_embed_dim": 32, "sample_height": 8, "sample_width": 12, "sample_frames": 9,
}  # fmt: skip
I2V, I2V_1_5 = LEARNED | {"in_channels": 32}, {"in_channels": 32, "ofs_embed_dim": 512}
TWO, FIVE, INVERTED = {"scaling_factor": 1.15258426}, {"scaling_factor": 0.7}, {"invert_scale_latents": True}
DDIM, DPM = CogVideoXDDIMScheduler, CogVideoXDPMScheduler
MODELS = {
    "2b": Model({}, TWO, DDIM, 3.0),
    "5b": Model(FIVE_B, FIVE, DPM, 1.0),
    "5b-I2V": Model(FIVE_B | I2V, FIVE, DPM, 1.0),
    "1.5": Model(FIVE_B_1_5, FIVE, DPM, 1.0),
    "1.5-I2V": Model(FIVE_B_1_5 | I2V_1_5, FIVE | INVERTED, DPM, 1.0),
    "tiny": Model(TINY, TWO, DDIM, 3.0),
    "tiny-I2V": Model(TINY | ROTARY | LEARNED | {"in_channels": 8}, FIVE, DPM, 1.0),
}
# VAE and T5 of the published base models, and of the tiny ones.
VAES = {
    "published": {"latent_channels": 16, "layers_per_block": 3, "block_out_channels": (128, 256, 256, 512)},
    "tiny": {"latent_channels": 4, "layers_per_block": 1, "block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4},
}
T5S = {
    "published": {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_heads": 64, "num_layers": 24,
                  "feed_forward_proj": "gated-gelu"},  # google/t5-v1_1-xxl
    "tiny": {"vocab_size": 512, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_heads": 2, "num_layers": 2,
             "feed_forward_proj": "gated-gelu"},
}  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)

    what = parser.add_argument_group("what is measured").add_argument
    what("--model", choices=list(MODELS), default="2b", help="1.5 is CogVideoX1.5-5B; tiny is for a CPU")
    what("--num_layers", type=at_least(1), metavar="N", help="transformer blocks (default: the model's)")
    what("--steps", type=at_least(1), default=10, metavar="N", help="updates that are measured")
    warmup = "updates before them, for kernels and memory to settle"
    profile = "updates after them, to tell the time of each kernel"
    what("--warmup", type=at_least(0), default=3, metavar="N", help=warmup)
    seconds = "seconds after which no further update is measured, but at least two are (default: no limit)"
    what("--max_seconds", type=float, default=math.inf, metavar="SECONDS", help=seconds)
    what("--profile", type=at_least(0), default=0, metavar="N", help=profile)
    what("--output", type=Path, metavar="FILE", help="also write the JSON there")

    same = parser.add_argument_group("as in train_cogvideox_lora.py").add_argument
    same("--training_type", choices=["lora", "sft"], default="lora", help="a LoRA, or all weights")
    same("--rank", type=int, help="rank of the LoRA matrices (default: 128)")
    same("--base_precision", choices=quantized.PRECISIONS, default="bf16", help="of the frozen weights of the blocks")
    same("--height", type=int, help="pixels (default: the model's)")
    same("--width", type=int, help="pixels (default: the model's)")
    same("--num_frames", "--max_num_frames", dest="max_num_frames", type=int, help="4k + 1 (default: the model's)")
    same("--train_batch_size", type=int, default=1, metavar="N", help="clips per micro-batch and GPU")
    same("--gradient_accumulation_steps", type=int, default=1, metavar="N", help="micro-batches per update")
    same("--mixed_precision", choices=list(train.DTYPES), help="default: bf16 on a GPU, no (float32) on a CPU")
    compute.add_options(parser)

    options = parser.parse_args(argv)
    if options.gradient_checkpointing == "auto":
        parser.error("--gradient_checkpointing auto: pass the level that is to be measured: none, attention or full")
    return options


def training_args(options: argparse.Namespace) -> argparse.Namespace:
    """The training script's options, checked by itself; the model's own size where none is asked for."""
    values = clip_size(options.model)
    values["mixed_precision"] = "bf16" if torch.cuda.is_available() else "no"
    values |= {name: value for name, value in vars(options).items() if name in TRAINING and value is not None}
    values["max_train_steps"] = options.warmup + options.steps + options.profile
    # Required by the parser; nothing is read from either.
    line = ["--pretrained_model_name_or_path", options.model, "--instance_data_root", "."]
    for name, value in values.items():
        line += [f"--{name}", str(value)]
    if options.compile:
        line.append("--compile")
    return train.parse_args(line)


# ---- a base model and a cache in memory ------------------------------------------------------------------------------


def random_base_model(name: str, num_layers: int | None = None) -> BaseModel:
    """Returns a base model's configs, as `read_base_model` does."""
    model = MODELS[name]
    config = model.transformer | ({"num_layers": num_layers} if num_layers else {})
    return BaseModel(
        name=name,
        transformer=dict(empty_transformer(config).config),
        vae=model.vae | VAES[size_of(config)],
        scheduler=model.scheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
            clip_sample=False, snr_shift_scale=model.snr_shift_scale,
        ),
        hub={"variant": None},
        folder=None,
    )  # fmt: skip


def clip_size(name: str) -> dict[str, int]:
    """Returns the size of the clips that a model was trained on, by the names of the training script's options."""
    base = random_base_model(name, num_layers=1)
    height, width = base.sample_size
    return {"height": height, "width": width, "max_num_frames": base.transformer["sample_frames"]}


def size_of(transformer: dict) -> str:
    """Returns the key of VAES and T5S that goes with a transformer's config."""
    return "tiny" if transformer.get("out_channels") == TINY["out_channels"] else "published"


def write_random_vae(base: BaseModel, folder: Path) -> BaseModel:
    """Writes a random VAE into `folder` (0.4 GB as published), and returns the base model with that folder."""
    vae = AutoencoderKLCogVideoX(**VAES[size_of(base.transformer)])
    vae.to(torch.bfloat16).save_pretrained(folder / "vae")
    return base._replace(folder=folder)


def random_transformer(config: dict, dtype: torch.dtype, device: torch.device) -> CogVideoXTransformer3DModel:
    """Made on the device in its final dtype: 5b has 22 GB in float32. PyTorch's initial weights keep it finite."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return CogVideoXTransformer3DModel.from_config(config)
    finally:
        torch.set_default_dtype(default)


def random_data(base: BaseModel, args: argparse.Namespace, dtype: torch.dtype) -> dataset.Data:
    """One batch of clips, such as the cache would hold them."""
    config = base.transformer
    shape = (config["out_channels"], *base.latent_shape(args.max_num_frames, args.height, args.width))  # (c, f, h, w)
    clips = {}
    for i in range(args.train_batch_size):
        mean, log_variance = torch.randn(shape, dtype=dtype), torch.full(shape, -10.0, dtype=dtype)
        prompt_embeds = torch.randn(config["max_text_seq_length"], config["text_embed_dim"], dtype=dtype)
        clips[Item(i)] = {"parameters": torch.cat([mean, log_variance]), "prompt_embeds": prompt_embeds}
        if base.takes_image:
            clips[Item(i)]["image"] = torch.randint(0, 256, (args.height, args.width, 3), dtype=torch.uint8)
    return dataset.Data(clips, [tuple(clip["parameters"].shape) for clip in clips.values()], prompts={})


# ---- the measurement -------------------------------------------------------------------------------------------------


def prepare(options: argparse.Namespace, folder: Path | None = None) -> train.Run:
    """The run that the training script would have before its first update.

    Args:
        folder: to write a VAE into, for image-to-video.
    """
    args = training_args(options)
    accelerator, ranks = train.start(args)
    dtype = train.DTYPES[accelerator.mixed_precision]
    base = random_base_model(options.model, options.num_layers)
    check_training(base, dtype, train.selection_of(args, base).by_option, [])
    compute.check_possible(base.transformer, compute.options_of(args), dtype, accelerator.device)
    quantized.check_packages(args.base_precision, "--base_precision")
    set_seed(args.seed)
    if base.takes_image:
        base = write_random_vae(base, folder)
    data = random_data(base, args, dtype)
    order = Order(data.shapes, args.seed, train.batch_size_of(args, base))
    timeline = train.plan_updates(args, order, ranks, position={"step": 0, "batches_seen": 0})

    is_lora = args.training_type == "lora"
    transformer = random_transformer(base.transformer, dtype if is_lora else torch.float32, accelerator.device)
    if is_lora:
        add_lora(transformer, lora_of(args), dtype)
    level = args.gradient_checkpointing
    compute.prepare(transformer, level, compute.options_of(args), accelerator.device)
    optimizer = train.make_optimizer(args, trained_parameters(transformer), timeline.batches_per_step)
    lr_scheduler = train.make_lr_scheduler(args, optimizer, timeline.total_steps)
    transformer, optimizer = accelerator.prepare(transformer.train(), optimizer)
    average = WeightAverage(trained_parameters(transformer), None)
    return train.Run(
        args=args,
        accelerator=accelerator,
        ranks=ranks,
        base=base,
        dtype=dtype,
        memory_plan=MemoryPlan(level, tile_encoding=False, tile_decoding=False),
        data=data,
        held_out=data._replace(shapes=[]),
        regularization=data._replace(shapes=[]),
        order=order,
        timeline=timeline,
        state=checkpoints.State(transformer, optimizer, lr_scheduler, average),
        export=None,
        stop=StopRequest(),
        failures=Failures(),
        record={},
    )


class Measured(NamedTuple):
    """Measurements of all updates, those of the warm-up first, and what `kernel_times` returns."""

    seconds: list[float]
    losses: list[float]
    peak_memory_gib: float
    kernels: list[dict]


def measure(run: train.Run, *, warmup: int, steps: int, max_seconds: float = math.inf, profiled: int = 0) -> Measured:
    """Times updates, and then profiles some more.

    Args:
        steps: the most updates to measure; once two or more have taken `max_seconds` together, no further one begins.
    """
    on_gpu = run.accelerator.device.type == "cuda"
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    seconds, losses = [], []
    with run.image_encoder() as encode_images:
        update = partial(train.update, run, run.micro_batches(), encode_images)
        for step in range(warmup + steps):
            if step >= warmup + 2 and sum(seconds[warmup:]) >= max_seconds:
                break
            if on_gpu and step == warmup:
                torch.cuda.reset_peak_memory_stats()
            synchronize()
            start = time.perf_counter()
            loss = update().loss
            synchronize()
            seconds.append(time.perf_counter() - start)
            losses.append(loss)
        peak_memory_gib = run_directory.peak_memory_gib(run.accelerator.device)  # the profiler takes some, too
        return Measured(seconds, losses, peak_memory_gib, kernel_times(update, profiled, on_gpu=on_gpu))


def kernel_times(update: Callable[[], train.Update], steps: int, *, on_gpu: bool, most: int = 30) -> list[dict]:
    """The kernels that take most of an update on a GPU, or operators on a CPU: milliseconds and calls of one update."""
    if not steps:
        return []
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(steps):
            update()
    rows = []
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        row = {"milliseconds": round(microseconds / 1e3 / steps, 3), "calls": round(event.count / steps, 1)}
        rows.append({"kernel": event.key[:160]} | row)
    return sorted(rows, key=lambda row: -row["milliseconds"])[:most]


def peak_tflops(device_name: str) -> float | None:
    """Returns the peak of a GPU; None for one that is not in the table, and for a CPU."""
    return PEAK_TFLOPS.get(device_name.removeprefix("NVIDIA "))


def rehearsals(
    args: argparse.Namespace, base: BaseModel, dtype: torch.dtype, device: torch.device, num_processes: int
) -> tuple[Phase, Phase]:
    """Returns the rehearsal of a step with these options, and of one that computes nothing twice."""
    make_optimizer = partial(train.make_optimizer, args, batches_per_step=1)
    models = models_of(base, T5S[size_of(base.transformer)], make_optimizer)
    settings = train.memory_settings(args, base, dtype, device, num_processes)
    once = settings._replace(gradient_checkpointing="none", blocks_to_swap=0)
    return rehearse("training", models, settings), rehearse("training", models, once)


def peak_gib(phase: Phase) -> float:
    return round(phase.peak_bytes / GIB, 3)


def predicted_peak_gib(options: argparse.Namespace) -> float:
    """Returns the `predicted_peak_gib` of a result from one GPU; needs none."""
    options = argparse.Namespace(**vars(options) | {"mixed_precision": options.mixed_precision or "bf16"})
    args, base = training_args(options), random_base_model(options.model, options.num_layers)
    return peak_gib(rehearsals(args, base, train.DTYPES[args.mixed_precision], torch.device("cuda"), 1)[0])


def without_room(options: argparse.Namespace) -> dict[str, float] | None:
    """Returns the predicted peak of a step on this GPU and the memory that it has, in GiB; None where that may do.

    None, too, without a GPU, and in one of several processes, which may share the weights out.
    """
    if not torch.cuda.is_available() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return None
    predicted = predicted_peak_gib(options)
    gpu = round(torch.cuda.get_device_properties("cuda").total_memory / GIB, 3)
    return {"predicted_peak_gib": predicted, "gpu_gib": gpu} if predicted > gpu else None


def check_memory(options: argparse.Namespace, output: Path | None = None) -> None:
    """Refuses a step that does not fit into this GPU, as predicted, and writes that to `output` as its result."""
    found = without_room(options)
    if found:
        if output:
            write_json(output, {"does_not_fit": found})
        raise ValueError(
            f"a step needs {found['predicted_peak_gib']:.1f} GiB, as predicted, and this GPU has "
            f"{found['gpu_gib']:.1f}: pass --gradient_checkpointing, or what else docs/hardware.md lists"
        )


def rehearsed(run: train.Run, device_name: str, seconds: float) -> dict:
    """Returns predicted memory and FLOPs of one update in one process, and their share of the GPU's peak in `seconds`.

    The share is None where the peak is not known, and in float32, which tensor cores compute at other peaks or not at
    all.
    """
    hardware, model = rehearsals(run.args, run.base, run.dtype, run.accelerator.device, run.ranks.count)
    peak = None if run.dtype == torch.float32 else peak_tflops(device_name)

    def share(flops: int) -> float | None:
        return round(flops / seconds / peak / 1e12, 4) if peak else None

    return {
        "model_flops": model.flops,
        "hardware_flops": hardware.flops,
        "peak_tflops": peak,
        "mfu": share(model.flops),
        "hfu": share(hardware.flops),
        "predicted_peak_gib": peak_gib(hardware),
    }


def report(run: train.Run, options: argparse.Namespace, measured: Measured) -> dict:
    device, seconds = run.accelerator.device, measured.seconds[options.warmup :]
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}"
    tokens, median = run.base.num_tokens(*run.data.shapes[0][1:]), statistics.median(seconds)
    clips = run.timeline.batches_per_step * run.args.train_batch_size
    own = {name: getattr(options, name) for name in ("num_layers", "warmup", "compile")} | {"steps": len(seconds)}
    packages = ("torch", "diffusers", "peft", "accelerate", "transformers")
    return {
        "model": options.model,
        "checkpoint": run.base.describe(),
        "device": device_name,
        "processes": run.ranks.count,
        "versions": {package: version(package) for package in packages} | {"cudnn": torch.backends.cudnn.version()},
        "options": {name: getattr(run.args, name) for name in TRAINING} | own,
        "trainable_weights": count_trained(run.state.transformer),
        "tokens": tokens,
        "seconds_per_step": round(median, 4),
        "seconds_of_each_step": [round(value, 4) for value in seconds],
        "first_step_seconds": round(measured.seconds[0], 4),
        "tokens_per_second": round(tokens * clips / median, 1),
        **rehearsed(run, device_name, median),
        "peak_memory_gib": round(measured.peak_memory_gib, 3),
        "losses": measured.losses[options.warmup :],
    } | ({"kernels": measured.kernels} if measured.kernels else {})


@processes.endings_explained()
def main(argv: list[str] | None = None) -> None:
    options = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        with processes.explained():
            check_memory(options, options.output)
            run = prepare(options, Path(folder))
        measured = measure(
            run, warmup=options.warmup, steps=options.steps, max_seconds=options.max_seconds, profiled=options.profile
        )
    if not all(map(math.isfinite, measured.losses)):
        rule = "must be finite for the times to mean anything; pass --mixed_precision bf16 or no"
        sys.exit(f"losses {measured.losses}: {rule}")
    if run.accelerator.is_main_process:
        result = report(run, options, measured)
        print(json.dumps(result, indent=2))
        if options.output:
            write_json(options.output, result)
    # Without it torch 2.13 can hang at exit: gloo's thread and the end of DDP wait for each other.
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()


if __name__ == "__main__":
    main()
