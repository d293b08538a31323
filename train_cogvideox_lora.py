"""Trains a LoRA for CogVideoX on a folder of clips with captions: options -> data -> what is trained -> loop -> result.

    accelerate launch --config_file accelerate_config_machine_single.yaml train_cogvideox_lora.py \
        --pretrained_model_name_or_path THUDM/CogVideoX-2b --instance_data_root ~/my-clips --output_dir my-lora

An update is `gradient_accumulation_steps` micro-batches on each of N ranks. Micro-batches are numbered over all ranks
and epochs; the number decides which clips and which noise it holds, so N ranks, one rank and a resumed run agree.
"""

import argparse
import contextlib
import importlib
import itertools
import os
import resource
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    gather_object,
    set_seed,
)
from diffusers.optimization import TYPE_TO_SCHEDULER_FUNCTION, SchedulerType, get_scheduler
from huggingface_hub import snapshot_download
from tqdm.auto import tqdm

import checkpoints
import cogvideox
import dataset
import validation

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Restored with the optimizer on resuming, so that another value given then would have no effect.
FIXED_BY_A_CHECKPOINT = (
    "rank", "lora_alpha", "lora_target_modules", "optimizer", "use_8bit_adam", "learning_rate", "scale_lr",
    "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "prodigy_beta3", "prodigy_decouple",
    "prodigy_use_bias_correction", "prodigy_safeguard_warmup",
)  # fmt: skip


# ---- options ---------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    count, positive, path = _at_least(0), _at_least(1), lambda text: Path(text).expanduser()

    model = parser.add_argument_group("model").add_argument
    model("--pretrained_model_name_or_path", required=True, metavar="NAME", help="CogVideoX folder or hub name")
    model("--revision", help="branch, tag or commit of the hub repository")
    model("--variant", help="weight files to take where the repository has several, such as fp16")
    model("--cache_dir", type=path, help="folder for downloads (default: that of huggingface_hub)")

    data = parser.add_argument_group("data").add_argument
    data("--instance_data_root", type=path, metavar="FOLDER", help="folder with the two list files and the videos")
    data("--dataset_name", metavar="NAME", help="hub dataset repository to download and read like a folder")
    data("--caption_column", default="prompts.txt", metavar="FILE", help="list of captions, one per line")
    data("--video_column", default="videos.txt", metavar="FILE", help="list of videos, line n belongs to caption n")
    data("--id_token", help="put before each caption, with a space: a name for the style or character to learn")
    data("--height", type=positive, default=480, help="pixels, divisible by 16; clips are resized to cover, then cut")
    data("--width", type=positive, default=720, help="pixels, divisible by 16")
    data("--fps", type=positive, default=8, help="frames per second that the model sees; clips are resampled by time")
    data("--max_num_frames", type=positive, default=49, metavar="N", help="frames per clip, 4k + 1, best 8k + 1")
    data("--skip_frames_start", type=count, default=0, metavar="N", help="frames of the file to leave out at its start")
    data("--skip_frames_end", type=count, default=0, metavar="N", help="frames of the file to leave out at its end")
    data("--video_reshape_mode", choices=["center", "random"], default="center", help="where to cut what overhangs")
    data("--random_flip", action="store_true", help="show each clip mirrored in half of its turns (encodes it twice)")
    data("--latents_cache_dir", type=path, metavar="FOLDER", help="default: .cogvideox_cache in the data's folder")
    data("--dataloader_num_workers", type=count, default=0, metavar="N", help="processes that read data; 0: none")
    data("--enable_tiling", action="store_true", help="VAE in tiles: less memory, slower, slightly other latents")
    data("--enable_slicing", action="store_true", help="VAE one sample at a time: less memory in batches")

    lora = parser.add_argument_group("LoRA").add_argument
    lora("--rank", type=positive, default=128, help="rank of the LoRA matrices")
    lora("--lora_alpha", type=float, help="strength is lora_alpha / rank (default: rank, strength 1)")
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    lora("--lora_target_modules", nargs="+", default=targets, metavar="NAME", help="linear layers that get a LoRA")

    train = parser.add_argument_group("training").add_argument
    train("--seed", type=count, default=42, help="of order, noise, timesteps, LoRA weights, validation")
    train("--mixed_precision", choices=list(DTYPES), help="default: what accelerate's config file says")
    train("--train_batch_size", type=positive, default=1, metavar="N", help="clips per micro-batch and GPU")
    train("--gradient_accumulation_steps", type=positive, default=1, metavar="N", help="micro-batches per update")
    train("--num_train_epochs", type=positive, default=1, metavar="N", help="times that each clip is seen")
    train("--max_train_steps", type=positive, metavar="N", help="updates; overrides --num_train_epochs")
    train("--gradient_checkpointing", action="store_true", help="recompute activations: less memory, slower")
    train("--allow_tf32", action="store_true", help="faster float32 matrix products on Ampere GPUs and later")

    optim = parser.add_argument_group("optimizer").add_argument
    optim("--optimizer", type=str.lower, choices=["adamw", "adam", "prodigy"], default="adamw", help="kind")
    optim("--use_8bit_adam", action="store_true", help="adam and adamw with 8-bit state (needs bitsandbytes)")
    optim("--learning_rate", type=float, default=1e-4, help="peak value; 1.0 for prodigy")
    optim("--scale_lr", action="store_true", help="multiply it by GPUs x accumulation x batch size")
    schedules = [kind.value for kind in TYPE_TO_SCHEDULER_FUNCTION if kind != SchedulerType.PIECEWISE_CONSTANT]
    optim("--lr_scheduler", choices=schedules, default="constant", help="course of the learning rate")
    optim("--lr_warmup_steps", type=count, default=0, metavar="N", help="updates of linear warm-up")
    optim("--lr_num_cycles", type=positive, default=1, metavar="N", help="restarts of cosine_with_restarts")
    optim("--lr_power", type=float, default=1.0, help="exponent of polynomial")
    optim("--adam_beta1", type=float, default=0.9, help="decay of the mean, Prodigy too")
    optim("--adam_beta2", type=float, default=0.95, help="decay of the square, Prodigy too")
    optim("--adam_weight_decay", type=float, default=1e-4, help="weight decay")
    optim("--adam_epsilon", type=float, default=1e-8, help="added to the denominator")
    optim("--prodigy_beta3", type=float, help="decay of Prodigy's step size (default: sqrt of beta2)")
    optim("--prodigy_decouple", action="store_true", help="AdamW's kind of weight decay")
    optim("--prodigy_use_bias_correction", action="store_true", help="Adam's bias correction")
    optim("--prodigy_safeguard_warmup", action="store_true", help="leave the warm-up out of its estimate")
    optim("--max_grad_norm", type=float, default=1.0, help="clip the norm of the gradient to this")

    check = parser.add_argument_group("validation").add_argument
    check("--validation_prompt", metavar="TEXT", help="prompts to make videos of while training and at the end")
    check("--validation_prompt_separator", default=":::", metavar="TEXT", help="stands between the prompts")
    check("--num_validation_videos", type=positive, default=1, metavar="N", help="videos per prompt, a seed each")
    check("--validation_epochs", type=positive, default=50, metavar="N", help="validate every N epochs")
    check("--validation_steps", type=positive, metavar="N", help="validate every N updates, too")
    check("--guidance_scale", type=float, default=6.0, help="of the validation videos")
    check("--use_dynamic_cfg", action="store_true", help="let the guidance grow over the sampling steps")

    out = parser.add_argument_group("output").add_argument
    out("--output_dir", type=path, default=Path("cogvideox-lora"), help="run directory")
    out("--checkpointing_steps", type=positive, default=500, metavar="N", help="save a checkpoint every N updates")
    out("--checkpoints_total_limit", type=positive, metavar="N", help="keep the newest N (default: all)")
    out("--resume_from_checkpoint", metavar="PATH", help="a checkpoint folder, or 'latest' in --output_dir")
    out("--logging_steps", type=positive, default=1, metavar="N", help="log every N updates")
    out("--report_to", help="tensorboard, wandb, comet_ml or all (default: metrics.jsonl alone)")
    out("--tracker_name", default="cogvideox-lora", help="project name in the tracker")
    out("--logging_dir", default="logs", help="the tracker's folder in --output_dir")
    out("--push_to_hub", action="store_true", help="upload the result at the end")
    out("--hub_model_id", help="repository for it (default: the name of --output_dir)")
    out("--hub_token", help="token for it (default: that of `hf auth login`); never written anywhere")

    args = parser.parse_args(argv)
    args.lora_alpha = args.rank if args.lora_alpha is None else args.lora_alpha
    check_args(args, parser.error)
    return args


def _at_least(lowest: int):
    def whole_number(text: str) -> int:
        if int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text}: must be a whole number of at least {lowest}")
        return int(text)

    return whole_number


def check_args(args: argparse.Namespace, refuse) -> None:
    """Refuses values and combinations that cannot work; `refuse` ends the program with a message."""
    for name in ("height", "width"):
        if (value := getattr(args, name)) % 16:
            refuse(f"--{name} {value}: must be divisible by 16; nearest is {max(16, 16 * round(value / 16))}")
    if (args.max_num_frames - 1) % 4:
        nearest = 8 * round((args.max_num_frames - 1) / 8) + 1
        refuse(f"--max_num_frames {args.max_num_frames}: must be 4k + 1 for the VAE; nearest of the best is {nearest}")
    if bool(args.instance_data_root) == bool(args.dataset_name):
        refuse("give the data by one of --instance_data_root FOLDER and --dataset_name NAME")
    for name in ("lora_alpha", "learning_rate", "max_grad_norm"):
        if not getattr(args, name) > 0:
            refuse(f"--{name} {getattr(args, name)}: must be above 0")
    if args.optimizer != "prodigy" and any(value for name, value in vars(args).items() if name.startswith("prodigy_")):
        refuse(f"--prodigy_* options do nothing with --optimizer {args.optimizer}; pass --optimizer prodigy")
    if args.optimizer == "prodigy" and args.use_8bit_adam:
        refuse("--use_8bit_adam does nothing with --optimizer prodigy; pass --optimizer adamw, or leave it away")
    if args.lr_warmup_steps and args.lr_scheduler == "constant":
        refuse("--lr_warmup_steps does nothing with --lr_scheduler constant; pass constant_with_warmup")
    if args.validation_prompt is not None and not all(validation_prompts(args)):
        refuse(f"--validation_prompt {args.validation_prompt!r}: a prompt is empty; check the separator")


def validation_prompts(args: argparse.Namespace) -> list[str]:
    if args.validation_prompt is None:
        return []
    return [prompt.strip() for prompt in args.validation_prompt.split(args.validation_prompt_separator)]


# ---- launch ----------------------------------------------------------------------------------------------------------


def start_accelerator(args: argparse.Namespace) -> Accelerator:
    _check_gpu_of_this_process()
    try:
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to in (None, "none") else args.report_to,
            project_config=ProjectConfiguration(str(args.output_dir), str(args.output_dir / args.logging_dir)),
            # An update is always N micro-batches, also where an epoch ends.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                # Ranks without a validation video wait for the others: minutes for 5b, more than NCCL's ten for 1.5.
                InitProcessGroupKwargs(timeout=timedelta(hours=1)),
            ],
        )
    except (ValueError, ImportError) as error:  # fp16 without a GPU, a tracker that is not installed
        raise ValueError(f"{error} (--mixed_precision {args.mixed_precision}, --report_to {args.report_to})") from error
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    return accelerator


def _check_gpu_of_this_process() -> None:
    rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if torch.cuda.is_available() and rank >= gpus and os.environ.get("ACCELERATE_USE_CPU") != "true":
        raise ValueError(
            f"process {rank + 1} of this machine has no GPU, there are {gpus}: pass --num_processes {gpus}"
        )


@contextlib.contextmanager
def explained():
    """Turns what a person can mend into one message and exit code 2; every rank says it, the first one in full."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        rank = int(os.environ.get("RANK", 0))
        message = f"{Path(__file__).name}: error: {error}" if rank == 0 else f"[rank {rank}] {error}".splitlines()[0]
        print(message, file=sys.stderr, flush=True)
        sys.exit(2)


# ---- data ------------------------------------------------------------------------------------------------------------


def prepare_data(args, accelerator: Accelerator, checkpoint: cogvideox.Checkpoint, dtype: torch.dtype) -> dataset.Data:
    """Reads, checks and encodes the dataset; T5 and VAE are gone from memory afterwards."""
    root = args.instance_data_root or download_dataset(args)
    clips, problems = dataset.read_clips(root, args.caption_column, args.video_column, args.id_token)
    view = dataset.View(
        args.height, args.width, args.fps, args.max_num_frames, args.skip_frames_start, args.skip_frames_end,
        args.video_reshape_mode, args.seed,
    )  # fmt: skip
    files, device = cogvideox.files_folder(checkpoint), accelerator.device
    return dataset.encode_dataset(
        root, clips, problems, view,
        cache=args.latents_cache_dir or root / ".cogvideox_cache",
        prompts=[*validation_prompts(args), ""],  # "": what guidance moves away from
        random_flip=args.random_flip,
        video_encoder=dataset.Encoder(
            cogvideox.encoder_fingerprint(files / "vae", dtype=dtype, tiling=args.enable_tiling),
            partial(cogvideox.video_encoder, checkpoint, dtype, device, args.enable_tiling, args.enable_slicing),
        ),
        text_encoder=dataset.Encoder(
            cogvideox.encoder_fingerprint(
                files / "text_encoder", dtype=dtype, max_length=checkpoint.transformer["max_text_seq_length"]
            ),
            partial(cogvideox.caption_encoder, checkpoint, dtype, device),
        ),
        num_workers=args.dataloader_num_workers,
        progress=partial(bar, accelerator),
        ranks=dataset.Ranks(
            accelerator.process_index, accelerator.num_processes, gather_object, accelerator.wait_for_everyone
        ),
    )  # fmt: skip


def download_dataset(args: argparse.Namespace) -> Path:
    try:
        return Path(snapshot_download(args.dataset_name, repo_type="dataset", cache_dir=args.cache_dir))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--dataset_name {args.dataset_name}: cannot be downloaded ({str(error).strip().splitlines()[0]}); check "
            "the name and `hf auth login`, or download it yourself and pass its folder as --instance_data_root"
        ) from error


def bar(accelerator: Accelerator, items, description: str, unit: str, **options) -> tqdm:
    return tqdm(items, description, unit=unit, disable=not accelerator.is_main_process, **options)


# ---- what is trained -------------------------------------------------------------------------------------------------


def make_optimizer(args, weights: list[torch.nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    options = {"lr": learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    options["weight_decay"] = args.adam_weight_decay
    if args.optimizer == "prodigy":
        names = ("beta3", "decouple", "use_bias_correction", "safeguard_warmup")
        options |= {name: getattr(args, f"prodigy_{name}") for name in names}
        return optional("prodigyopt", "--optimizer prodigy").Prodigy(weights, **options)
    if args.use_8bit_adam:
        optimizers = optional("bitsandbytes", "--use_8bit_adam").optim
        return {"adam": optimizers.Adam8bit, "adamw": optimizers.AdamW8bit}[args.optimizer](weights, **options)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer](weights, **options)


def optional(package: str, option: str):
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"{option}: needs {package}, which cannot be imported; pip install {package}") from error


def make_plan(args, accelerator: Accelerator, data: dataset.Data, state: dict) -> dataset.Plan:
    per_step = accelerator.num_processes * args.gradient_accumulation_steps
    per_epoch = dataset.batches_per_epoch(data.shapes, args.train_batch_size)
    plan = dataset.make_plan(per_epoch, per_step, args.num_train_epochs, args.max_train_steps, **state)
    if args.lr_warmup_steps >= plan.total_steps:
        raise ValueError(
            f"--lr_warmup_steps {args.lr_warmup_steps}: the run has {plan.total_steps} updates; warm up for fewer"
        )
    return plan


# ---- the loop --------------------------------------------------------------------------------------------------------


def losses(args, accelerator, checkpoint, transformer, dtype, data, plan) -> Iterator[torch.Tensor]:
    """The loss of each micro-batch of this rank, in order; its noise depends on the seed and its number alone."""
    rank, world = accelerator.process_index, accelerator.num_processes
    order = dataset.rank_batches(
        data.shapes, args.train_batch_size, args.seed, args.random_flip, rank=rank, world=world, start=plan.first_batch
    )
    batches = torch.utils.data.DataLoader(
        data.clips, batch_sampler=order, num_workers=args.dataloader_num_workers, pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or it would draw from the global one
    )  # fmt: skip
    for number, batch in zip(itertools.count(plan.first_batch + rank, world), batches):
        generator = cogvideox.generator_for(accelerator.device, args.seed, number)
        yield cogvideox.training_loss(checkpoint, transformer, batch, generator, dtype)


def update(accelerator: Accelerator, transformer, optimizer, micro_batch_losses, max_grad_norm: float) -> tuple:
    """One optimizer update; returns its loss on this rank, and the norm of its gradient over all."""
    total, weights = 0.0, optimizer.param_groups[0]["params"]
    for _ in range(accelerator.gradient_accumulation_steps):
        with accelerator.accumulate(transformer):
            loss = next(micro_batch_losses)
            accelerator.backward(loss)  # divides by the number of micro-batches
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(weights, max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        total += loss.detach() / accelerator.gradient_accumulation_steps
    return total, grad_norm


def log(args, accelerator, plan, step: int, loss, grad_norm, optimizer, since: tuple[int, float]) -> dict:
    """Writes one row; `since` is an earlier step and its time, with nothing but updates in between."""
    row = {"step": step, "epoch": round(plan.epoch(step), 4), "loss": accelerator.reduce(loss, "mean").item()}
    row |= {"lr": optimizer.param_groups[0]["lr"], "grad_norm": grad_norm.item()}
    row["seconds"] = round((time.perf_counter() - since[1]) / (step - since[0]), 4)
    row["peak_memory_gib"] = round(peak_memory_gib(), 3)
    if accelerator.is_main_process:
        checkpoints.append_metrics(args.output_dir, row)
    accelerator.log({f"train/{name}": value for name, value in row.items() if name != "step"}, step=step)
    return row


def peak_memory_gib() -> float:
    """Of the GPU since the start, or of the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def validation_due(args, plan: dataset.Plan, step: int) -> bool:
    by_steps = args.validation_steps and step % args.validation_steps == 0
    due = by_steps or plan.ends_epochs(step, args.validation_epochs) or step == plan.total_steps
    return bool(due and args.validation_prompt)


def validate(args, accelerator, checkpoint, transformer, dtype, prompts: dict[str, Path], step: int) -> None:
    validation.validate(
        accelerator, checkpoint, transformer, prompts, args.output_dir, step,
        vae=cogvideox.loaded_vae(checkpoint, dtype, accelerator.device, args.enable_tiling, args.enable_slicing),
        seeds=range(args.seed, args.seed + args.num_validation_videos),
        fps=args.fps,
        height=args.height,
        width=args.width,
        num_frames=args.max_num_frames,
        guidance_scale=args.guidance_scale,
        use_dynamic_cfg=args.use_dynamic_cfg,
    )  # fmt: skip


def start_records(args, accelerator, checkpoint, data, plan) -> None:
    """Says what is going to happen, to the person, to args.json and to the trackers."""
    options = {name: value for name, value in vars(args).items() if name != "hub_token"}
    accelerator.init_trackers(args.tracker_name, {name: str(value) for name, value in options.items()})
    accelerator.print(
        f"{checkpoint.describe()}\n{data.summary()}\n"
        f"updates {plan.first_step + 1} to {plan.total_steps}, each of {plan.batches_per_step} x "
        f"{args.train_batch_size} clips; {plan.epoch(plan.total_steps):.4g} epochs"
    )
    if args.max_num_frames % 8 != 1:
        accelerator.print(f"--max_num_frames {args.max_num_frames} is not 8k + 1: the VAE gives back another length")
    if accelerator.is_main_process:
        packages = ("torch", "diffusers", "transformers", "accelerate", "peft")
        run = {"checkpoint": checkpoint.describe(), "clips": len(data.shapes), "processes": accelerator.num_processes}
        versions = {package: version(package) for package in packages}
        checkpoints.write_json(args.output_dir / "args.json", run | {"options": options, "versions": versions})
        checkpoints.rewind_metrics(args.output_dir, plan.first_step)


# ---- the story -------------------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> None:
    with explained():
        # Data: read, checked and encoded, before the transformer comes in.
        accelerator = start_accelerator(args)
        dtype = DTYPES[accelerator.mixed_precision]
        checkpoint = cogvideox.read_checkpoint(
            args.pretrained_model_name_or_path, args.revision, args.variant, args.cache_dir
        )
        cogvideox.check_text_to_video(checkpoint, dtype)
        cogvideox.check_lora_targets(checkpoint.transformer, args.lora_target_modules)
        fixed = {name: getattr(args, name) for name in FIXED_BY_A_CHECKPOINT} | {"transformer": checkpoint.identity}
        resume_from = checkpoints.find_checkpoint(args.output_dir, args.resume_from_checkpoint, fixed)
        hub_repo = (
            checkpoints.create_hub_repo(args.hub_model_id or args.output_dir.name, args.hub_token)
            if args.push_to_hub
            else None
        )
        data = prepare_data(args, accelerator, checkpoint, dtype)
        plan = make_plan(args, accelerator, data, checkpoints.read_position(resume_from))

        # What is trained: LoRA weights in float32, over a frozen transformer in the compute dtype.
        transformer = cogvideox.load_transformer(checkpoint, dtype)
        set_seed(args.seed)
        cogvideox.add_lora(transformer, args.rank, args.lora_alpha, args.lora_target_modules)
        if args.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        weights = [weight for weight in transformer.parameters() if weight.requires_grad]
        scale = plan.batches_per_step * args.train_batch_size if args.scale_lr else 1
        optimizer = make_optimizer(args, weights, args.learning_rate * scale)
        lr_scheduler = get_scheduler(
            args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=plan.total_steps,
            num_cycles=args.lr_num_cycles, power=args.lr_power,
        )  # fmt: skip

    # Where to start. The schedule is not prepared: accelerate would advance it once per rank.
    transformer, optimizer = accelerator.prepare(transformer.train(), optimizer)
    accelerator.register_for_checkpointing(lr_scheduler)
    checkpoints.register_lora_hooks(accelerator, checkpoint)
    if resume_from:
        accelerator.load_state(resume_from)
    start_records(args, accelerator, checkpoint, data, plan)

    # Train: one turn is one update.
    micro_batch_losses = losses(args, accelerator, checkpoint, transformer, dtype, data, plan)
    progress = bar(accelerator, None, "Training", "update", total=plan.total_steps, initial=plan.first_step)
    since = plan.first_step, time.perf_counter()
    for step in range(plan.first_step + 1, plan.total_steps + 1):
        loss, grad_norm = update(accelerator, transformer, optimizer, micro_batch_losses, args.max_grad_norm)
        if logs := step % args.logging_steps == 0:
            row = log(args, accelerator, plan, step, loss, grad_norm, optimizer, since)
            progress.set_postfix(loss=f"{row['loss']:.4f}", lr=f"{row['lr']:.2e}")
        lr_scheduler.step()
        progress.update()
        if saves := step % args.checkpointing_steps == 0:
            position = {"step": step, "batches_seen": plan.batches_seen(step)}
            checkpoints.save_checkpoint(accelerator, args.output_dir, position, fixed, args.checkpoints_total_limit)
        if validates := validation_due(args, plan, step):
            validate(args, accelerator, checkpoint, transformer, dtype, data.prompts, step)
        if logs or saves or validates:
            since = step, time.perf_counter()

    # Result.
    if accelerator.is_main_process:
        checkpoints.save_lora(accelerator.unwrap_model(transformer), args.output_dir, checkpoint)
        print(f"LoRA: {args.output_dir / checkpoints.LORA_FILE}")
        if hub_repo:
            checkpoints.write_model_card(hub_repo, args.output_dir, checkpoint, vars(args))
            checkpoints.push_to_hub(hub_repo, args.output_dir, args.hub_token)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
