"""Trains a LoRA for CogVideoX, or all of it, on captioned clips: options -> data -> what is trained -> loop -> result.

    accelerate launch --config_file accelerate_config_machine_single.yaml train_cogvideox_lora.py \
        --pretrained_model_name_or_path THUDM/CogVideoX-2b --instance_data_root ~/my-clips --output_dir my-lora

An update is `gradient_accumulation_steps` micro-batches on each of N ranks. Micro-batches are numbered over all ranks
and epochs; the number decides which clips and which noise it holds, so N ranks, one rank and a resumed run agree.
"""

import argparse
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.auto import tqdm

import checkpoints
import cogvideox
import compute
import dataset
import hub
import memory
import optimizers
import processes
import report
import trainable
import validation

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
START_OPTIONS = (
    "mixed_precision", "gradient_accumulation_steps", "report_to", "output_dir", "logging_dir", "ddp_timeout"
)  # fmt: skip
# What a resumed run must share with its checkpoint: it comes back with the optimizer, or counts the place in the data.
FIXED = (
    "training_type", *trainable.OPTIONS, *optimizers.OPTIONS, "scale_lr", "seed", "train_batch_size",
    "validation_split", "ema_decay",
)  # fmt: skip


# ---- options ---------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:  # noqa: PLR0915 - a statement per option
    parser = argparse.ArgumentParser(usage="%(prog)s OPTIONS (see --help)", allow_abbrev=False)
    parser.description = __doc__.split("\n")[0]
    count, positive, path = dataset.at_least(0), dataset.at_least(1), dataset.expanded_path
    model = parser.add_argument_group("model").add_argument
    model("--pretrained_model_name_or_path", required=True, metavar="NAME", help="CogVideoX folder or hub name")
    model("--revision", help="branch, tag or commit of the hub repository")
    model("--variant", help="weight files to take where the repository has several, such as fp16")
    model("--cache_dir", type=path, help="folder for downloads (default: that of huggingface_hub)")

    data_group = dataset.add_options(parser)
    data, source = data_group.add_argument, data_group.add_mutually_exclusive_group(required=True).add_argument
    source("--instance_data_root", type=path, metavar="FOLDER", help="folder with the two list files and the videos")
    source("--dataset_name", metavar="NAME", help="hub dataset repository to download and read like a folder")
    data("--latents_cache_dir", type=path, metavar="FOLDER", help="default: .cogvideox_cache in the data's folder")
    data("--dataloader_num_workers", type=count, default=0, metavar="N", help="processes that read the cache; 0: none")
    data("--text_encoder_precision", choices=["bf16", "int8"], default="bf16", help="int8: T5 in half the memory")
    data("--text_encoder_device", choices=["accelerator", "cpu"], default="accelerator", help="cpu: T5 slowly there")
    tiling = "VAE in tiles: less memory, slower, slightly other latents; auto: where memory asks for it"
    tilings = ["never", "auto", "always"]
    data("--enable_tiling", nargs="?", const="always", default="never", choices=tilings, help=tiling)
    data("--enable_slicing", action="store_true", help="VAE: small clips one by one, images too: less memory")

    trainable.add_options(parser)
    train = parser.add_argument_group("training").add_argument
    train("--training_type", choices=["lora", "sft"], default="lora", help="a LoRA, or all weights of the transformer")
    train("--seed", type=count, default=42, help="of order, noise, timesteps, LoRA weights, validation")
    train("--mixed_precision", choices=list(DTYPES), help="default: what accelerate's config file says")
    train("--train_batch_size", type=positive, default=1, metavar="N", help="clips per micro-batch and GPU")
    train("--gradient_accumulation_steps", type=positive, default=1, metavar="N", help="micro-batches per update")
    train("--num_train_epochs", type=positive, default=1, metavar="N", help="times that each clip is seen")
    train("--max_train_steps", type=positive, metavar="N", help="updates; overrides --num_train_epochs")
    train("--ema_decay", type=float, metavar="D", help="save and validate a moving average of the LoRA, such as 0.99")
    train("--ddp_timeout", type=positive, default=1800, metavar="SECONDS", help="longest wait for another process")
    train("--allow_tf32", action="store_true", help="faster float32 matrix products on Ampere GPUs and later")

    compute.add_options(parser)
    optimizers.add_options(parser)
    validation.add_options(parser)

    out = parser.add_argument_group("output").add_argument
    out("--output_dir", type=path, default=Path("cogvideox-lora"), help="run directory")
    out("--checkpointing_steps", type=positive, default=500, metavar="N", help="save every N updates and at the end")
    out("--checkpoints_total_limit", type=positive, metavar="N", help="keep the newest N (default: all)")
    out("--resume_from_checkpoint", metavar="PATH", help="a checkpoint folder, or 'latest' in --output_dir")
    out("--logging_steps", type=positive, default=1, metavar="N", help="log every N updates")
    out("--report_to", default="none", help="tensorboard, wandb, trackio, comet_ml, all, or none: metrics.jsonl alone")
    out("--tracker_name", default="cogvideox-lora", help="project name in the tracker")
    out("--logging_dir", type=path, default="logs", help="the tracker's folder in --output_dir")
    out("--push_to_hub", action="store_true", help="upload the result at the end")
    out("--hub_model_id", help="repository for it (default: the name of --output_dir)")
    out("--hub_token", help="better HF_TOKEN or `hf auth login`: trackers may log commands")

    args = parser.parse_args(argv)
    args.hub_model_id = args.hub_model_id or args.output_dir.absolute().name
    if args.learning_rate is None:
        args.learning_rate = 1.0 if args.optimizer == "prodigy" else {"lora": 1e-4, "sft": 1e-5}[args.training_type]
    trainable.check_options(args, parser.error)
    args.rank = args.rank or 128
    args.lora_target_modules = sorted(args.lora_target_modules or trainable.DEFAULT_TARGETS)
    args.lora_alpha = args.rank if args.lora_alpha is None else args.lora_alpha
    check_args(args, parser.error)
    return args


def check_args(args: argparse.Namespace, refuse) -> None:
    """Refuses values and combinations that cannot work; `refuse` ends the program with a message."""
    for problem in dataset.size_problems(args.height, args.width, args.max_num_frames):
        refuse(problem)
    for name in ("lora_alpha", "learning_rate", "max_grad_norm"):
        if not getattr(args, name) > 0:
            refuse(f"--{name} {getattr(args, name)}: must be above 0")
    optimizers.check_options(args, refuse)
    compute.check_options(args, refuse)
    validation.check_options(args, refuse)


# ---- launch ----------------------------------------------------------------------------------------------------------


def start(args: argparse.Namespace) -> tuple[Accelerator, dataset.Ranks]:
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    options = {name: getattr(args, name) for name in START_OPTIONS}
    # Only where float32 weights do most of the work: it runs and stores the LayerNorms in float32, too.
    accelerator, ranks = processes.start(**options, autocast=args.training_type == "sft" or args.use_dora)
    if accelerator.is_fsdp2 and args.use_8bit_adam:
        raise ValueError("--use_8bit_adam: bitsandbytes cannot work on shards; leave it out, they are small already")
    if accelerator.is_fsdp2 and args.gradient_checkpointing == "auto":
        raise ValueError("--gradient_checkpointing auto: knows nothing of shards; pass none, attention or full")
    if accelerator.is_fsdp2 and args.blocks_to_swap:
        raise ValueError("--blocks_to_swap: FSDP spreads the weights over the GPUs already; leave it out")
    if accelerator.is_fsdp2 and args.base_precision != "bf16":
        raise ValueError(f"--base_precision {args.base_precision}: FSDP shards no quantised weights; leave one out")
    if args.training_type == "sft":  # of whose checkpoints each rank writes a part
        processes.check_shared(ranks, args.output_dir, "--output_dir")
    return accelerator, ranks


def plan_memory(args, accelerator: Accelerator, ranks, checkpoint: cogvideox.Checkpoint, dtype) -> memory.Plan:
    """Says what each phase will need, and decides what is "auto" among the options: for all ranks the same."""
    free_gib = memory.free_gpu_gib(accelerator.device)
    free_gib = None if free_gib is None else min(ranks.gather([free_gib]))
    settings = memory.Settings.of(args, dtype, samples=bool(args.validation_prompt))
    text_encoder = cogvideox.read_text_encoder_config(checkpoint)
    plan = memory.plan(checkpoint, text_encoder, settings, args.enable_tiling, free_gib)
    # Under FSDP2 GPUs share the weights, and need less for all phases but the clips: tiles on the safe side.
    accelerator.print(*plan.lines[accelerator.is_fsdp2 :], sep="\n")
    return plan


# ---- data ------------------------------------------------------------------------------------------------------------


def prepare_data(args, accelerator, checkpoint, dtype, ranks, memory_plan: memory.Plan) -> tuple:
    """The checkpoint with its weights, what is trained on, and what is held out; T5 and VAE are gone from memory."""
    root = args.instance_data_root or dataset.download(args.dataset_name, args.cache_dir)
    clips, problems = dataset.read_clips(root, args.caption_column, args.video_column, args.image_column, args.id_token)
    dataset.count_held_out(args.validation_split, len(clips))  # before hours of encoding
    problems += dataset.image_problems([image for image in validation.images(args) if image], "--validation_images")
    view = dataset.View(
        args.height, args.width, args.fps, args.max_num_frames, args.skip_frames_start, args.skip_frames_end,
        args.video_reshape_mode, args.seed, checkpoint.takes_image, checkpoint.fixed_size is not None,
    )  # fmt: skip
    cache = args.latents_cache_dir or root / ".cogvideox_cache"
    sharing = processes.sharing(ranks, cache, "--latents_cache_dir")
    if not checkpoint.folder:  # no weights are downloaded for clips that cannot be trained on
        dataset.check_clips(root, clips, problems, view, sharing, ranks)
    checkpoint = cogvideox.download(checkpoint)
    video_encoder, text_encoder = cogvideox.encoders(
        checkpoint, dtype, accelerator.device, memory_plan.tile_encoding, args.enable_slicing,
        args.text_encoder_precision, "cpu" if args.text_encoder_device == "cpu" else accelerator.device,
    )  # fmt: skip
    data = dataset.encode_dataset(
        root, clips, problems, view, cache=cache,
        prompts=[*validation.prompts(args), ""],  # "": what guidance moves away from
        random_flip=args.random_flip, video_encoder=video_encoder, text_encoder=text_encoder,
        progress=partial(bar, accelerator), ranks=sharing, everyone=ranks,
    )  # fmt: skip
    if accelerator.device.type == "cuda":  # from here on it is the peak of training
        accelerator.print(f"peak memory of encoding: {checkpoints.peak_memory_gib(accelerator.device):.1f} GiB")
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    return checkpoint, *data.split(args.validation_split, args.seed)


def bar(accelerator: Accelerator, items, description: str, unit: str, **options) -> tqdm:
    return tqdm(items, description, unit=unit, disable=not accelerator.is_main_process, **options)


# ---- what is trained -------------------------------------------------------------------------------------------------


def read_checkpoint(args: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> cogvideox.Checkpoint:
    """The checkpoint's configs, of which all that is asked for can be had."""
    checkpoint = cogvideox.read_checkpoint(
        args.pretrained_model_name_or_path, args.revision, args.variant, args.cache_dir
    )
    image_options = [f"--{name}" for name in ("image_column", "validation_images") if getattr(args, name)]
    cogvideox.check_training(checkpoint, dtype, args.max_num_frames, args.height, args.width, image_options)
    compute.check_possible(args, checkpoint.transformer, dtype, device)
    if args.training_type == "lora":
        trainable.check_lora(checkpoint, *lora_of(args))
    return checkpoint


def lora_of(args: argparse.Namespace) -> tuple[trainable.Lora, Path | None]:
    """And what it starts from; one that is resumed has come further."""
    lora = trainable.Lora(**{name: getattr(args, name) for name in trainable.Lora._fields})
    return lora, None if args.resume_from_checkpoint else args.lora_path


def prepare_transformer(args, checkpoint, dtype, device, memory_plan) -> tuple[torch.nn.Module, trainable.Export]:
    """The transformer, of which just what is trained requires gradients, and what writes that as a result."""
    set_seed(args.seed)
    if args.training_type == "lora":
        transformer, export = trainable.with_lora(checkpoint, dtype, *lora_of(args), device)
    else:
        transformer, export = trainable.whole(checkpoint, dtype)
    level = memory_plan.gradient_checkpointing
    compute.prepare(transformer, level, args.compile, args.attention_backend, args.blocks_to_swap, device)
    return transformer.train(), export


def make_optimizer(args, weights: list[torch.nn.Parameter], clips_per_step: int) -> torch.optim.Optimizer:
    options = {name: getattr(args, name) for name in optimizers.OPTIONS}
    options["learning_rate"] *= clips_per_step if args.scale_lr else 1
    return optimizers.make_optimizer(weights, **options)


# ---- the loop --------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """What the loop works with, none of which it replaces."""

    args: argparse.Namespace
    accelerator: Accelerator
    ranks: dataset.Ranks
    checkpoint: cogvideox.Checkpoint
    dtype: torch.dtype
    memory_plan: memory.Plan
    data: dataset.Data
    held_out: dataset.Data
    plan: dataset.Plan
    state: checkpoints.State
    export: trainable.Export

    def image_encoder(self):
        vae_options = self.accelerator.device, self.memory_plan.tile_encoding, self.args.enable_slicing
        return cogvideox.image_encoder(self.checkpoint, self.dtype, *vae_options)


def losses(run: Run) -> Iterator[torch.Tensor]:
    """The loss of each micro-batch of this rank, in order; its noise depends on the seed and its number alone."""
    args, device = run.args, run.accelerator.device
    micro_batches = dataset.micro_batches(
        run.data, run.plan, run.ranks, args.train_batch_size, args.seed, args.random_flip, args.dataloader_num_workers
    )
    with run.image_encoder() as encode:
        number, batch = next(micro_batches)
        while True:
            generator = cogvideox.generator_for(device, args.seed, number)
            torch.manual_seed(generator.initial_seed() % 2**63)  # dropout draws from the global generator
            loss = cogvideox.training_loss(run.checkpoint, run.state.transformer, batch, generator, run.dtype, encode)
            number, batch = next(micro_batches)  # read while the GPU computes
            yield loss


def update(run: Run, micro_batch_losses: Iterator[torch.Tensor]) -> dict:
    """One optimizer update; returns its "loss" on this rank, its "lr", and its "grad_norm", which is that of all."""
    accelerator, micro_batches = run.accelerator, run.args.gradient_accumulation_steps
    transformer, optimizer, lr_scheduler, average = run.state
    total, weights = 0.0, optimizer.param_groups[0]["params"]
    for _ in range(micro_batches):
        with accelerator.accumulate(transformer):
            with compute.attention_kernel(run.args.attention_backend):
                loss = next(micro_batch_losses)
                accelerator.backward(loss)  # divides by the number of micro-batches
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(weights, run.args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        total += loss.detach() / micro_batches
    done = {"loss": total, "lr": lr_scheduler.get_last_lr()[0], "grad_norm": grad_norm}
    lr_scheduler.step()
    average.step()
    return done


def log(run: Run, step: int, done: dict, since: tuple[int, float], smoothed: float | None) -> float:
    """Writes one row; `since` is an earlier step and its time, with nothing but updates in between.

    Returns the smoothed loss, after that of the row before: a mean at first, of about 50 rows later on.
    """
    loss = run.accelerator.reduce(done["loss"], "mean").item()  # waits for the GPU
    seconds = (time.perf_counter() - since[1]) / (step - since[0])
    smoothed = loss if smoothed is None else smoothed + (loss - smoothed) * max(run.args.logging_steps / step, 0.02)
    row = {"step": step, "epoch": round(run.plan.epoch(step), 4), "loss": loss, "loss_smoothed": smoothed}
    row |= {"lr": done["lr"], "grad_norm": done["grad_norm"].item(), "seconds": round(seconds, 4)}
    checkpoints.log_row(run.accelerator, run.args.output_dir, row)
    return smoothed


def save(run: Run, step: int, fixed: dict) -> None:
    output_dir, position, limit = run.args.output_dir, run.plan.position(step), run.args.checkpoints_total_limit
    checkpoints.save_checkpoint(run.accelerator, run.state, run.export, output_dir, position, fixed, limit)
    if run.accelerator.is_main_process:
        report.write_report(output_dir)


def begins_with_validation(run: Run) -> bool:
    """For a fresh run, if asked for; for a resumed one, if the first was stopped before it got to that."""
    args, step = run.args, run.plan.first_step
    wanted = run.plan.due(step, args.validation_steps, args.validation_epochs) if step else args.validate_first
    place = args.output_dir, step, bool(run.held_out.shapes)
    return wanted and not processes.from_main(run.accelerator, checkpoints.validated, *place)


def validate(run: Run, step: int) -> None:
    """Looks at what training has come to, at its moving average if there is one."""
    with run.state.average.applied():
        if run.args.validation_prompt:
            sample_videos(run, step)
        losses = held_out_losses(run, step) if run.held_out.shapes else None
    if losses and step:  # the base model is not one of those to choose from
        checkpoints.save_best(run.accelerator, run.state, run.export, run.args.output_dir, step, losses)
    if run.accelerator.is_main_process:
        report.write_report(run.args.output_dir)


def held_out_losses(run: Run, step: int) -> dict:
    what = run.checkpoint, run.state.transformer, run.held_out
    with run.image_encoder() as encode:
        losses = validation.held_out_losses(run.accelerator, run.ranks, *what, encode, run.args.seed, run.dtype)
    row = {"step": step, "epoch": round(run.plan.epoch(step), 4), **losses}
    checkpoints.log_row(run.accelerator, run.args.output_dir, row, group="validation")
    run.accelerator.print(f"\nupdate {step}: loss on held-out clips {losses['validation_loss']:.4f}")
    return losses


def sample_videos(run: Run, step: int) -> None:
    args, device = run.args, run.accelerator.device
    vae = cogvideox.loaded_vae(run.checkpoint, run.dtype, device, run.memory_plan.tile_decoding, args.enable_slicing)
    cases = validation.cases(run.data, validation.prompts(args), validation.images(args), args.height, args.width)
    validation.validate(
        run.accelerator, run.ranks, run.checkpoint, run.state.transformer, vae, cases, run.data.prompts,
        args.output_dir, step, seeds=range(args.seed, args.seed + args.num_validation_videos), fps=args.fps,
        num_frames=args.max_num_frames, height=args.height, width=args.width, guidance_scale=args.guidance_scale,
        use_dynamic_cfg=args.use_dynamic_cfg,
    )  # fmt: skip


def start_records(run: Run) -> float | None:
    """Says what is going to happen, on paper and in the trackers; returns the smoothed loss of an earlier start."""
    args, plan, checkpoint = run.args, run.plan, run.checkpoint
    what = f"{args.training_type}, {trainable.count(run.state.transformer)}, learning rate {args.learning_rate:g}"
    data = [run.data.summary()] + ([f"held out: {run.held_out.summary()}"] if run.held_out.shapes else [])
    how = compute.describe(args, run.dtype, run.memory_plan.gradient_checkpointing, run.accelerator.device)
    lines = [checkpoint.describe(), *data, what, how, plan.summary(args.train_batch_size)]
    run.accelerator.print(*lines, *checkpoint.remarks(args.max_num_frames, args.fps), sep="\n")
    about = {"checkpoint": lines[0], "clips": len(run.data.shapes), "processes": run.ranks.count, "data": data}
    about |= {"memory_plan": run.memory_plan._asdict()}
    checkpoints.start_records(run.accelerator, args.output_dir, args.tracker_name, about, vars(args), plan.first_step)
    return checkpoints.smoothed_loss(args.output_dir)


# ---- the story -------------------------------------------------------------------------------------------------------


@processes.lost_processes_explained()
def main(args: argparse.Namespace) -> None:
    with processes.explained():
        # Data: read, checked and encoded, before the transformer comes in.
        accelerator, ranks = start(args)
        dtype = DTYPES[accelerator.mixed_precision]
        checkpoint = read_checkpoint(args, dtype, accelerator.device)
        fixed = {name: getattr(args, name) for name in FIXED}
        fixed |= {"mixed_precision": accelerator.mixed_precision, "transformer": checkpoint.identity}
        resume_from, position = processes.from_main(
            accelerator, checkpoints.starting_point, args.output_dir, args.resume_from_checkpoint, fixed
        )
        make_optimizer(args, [torch.nn.Parameter(torch.zeros(1))], 1)  # a missing package or a bad value shows here
        hub_repo = args.push_to_hub and processes.from_main(
            accelerator, hub.create_hub_repo, args.hub_model_id, args.hub_token
        )
        memory_plan = plan_memory(args, accelerator, ranks, checkpoint, dtype)
        checkpoint, data, held_out = prepare_data(args, accelerator, checkpoint, dtype, ranks, memory_plan)
        plan = dataset.make_plan(
            data.batches_per_epoch(args.train_batch_size), ranks.count * args.gradient_accumulation_steps,
            args.num_train_epochs, args.max_train_steps, **position,
        )  # fmt: skip

        # What is trained: weights in float32; what is frozen is in the compute dtype.
        transformer, export = prepare_transformer(args, checkpoint, dtype, accelerator.device, memory_plan)
        clips_per_step = plan.batches_per_step * args.train_batch_size
        # Nothing else may hold the weights: FSDP2 would keep them whole on every GPU, beside its shards.
        optimizer = make_optimizer(args, trainable.weights_of(transformer), clips_per_step)
        lr_scheduler = optimizers.make_lr_scheduler(
            optimizer, args.lr_scheduler, args.lr_warmup_steps, plan.total_steps, args.lr_num_cycles, args.lr_power
        )

    # Where to start. The schedule is not prepared: accelerate would advance it once per rank.
    transformer, optimizer = accelerator.prepare(transformer, optimizer)
    average = trainable.Average(trainable.weights_of(transformer), args.ema_decay)
    state = checkpoints.State(transformer, optimizer, lr_scheduler, average)
    if resume_from:
        checkpoints.load_checkpoint(accelerator, state, resume_from)
    run = Run(args, accelerator, ranks, checkpoint, dtype, memory_plan, data, held_out, plan, state, export)
    smoothed = start_records(run)

    # Train: one turn is one update.
    micro_batch_losses = losses(run)
    progress = bar(accelerator, None, "Training", "update", total=plan.total_steps, initial=plan.first_step)
    if begins_with_validation(run):
        validate(run, plan.first_step)
    since = plan.first_step, time.perf_counter()
    for step in range(plan.first_step + 1, plan.total_steps + 1):
        done = update(run, micro_batch_losses)
        if logs := step % args.logging_steps == 0:
            smoothed = log(run, step, done, since, smoothed)
            progress.set_postfix(loss=f"{smoothed:.4f}", lr=f"{done['lr']:.2e}", refresh=False)
        progress.update()
        if saves := step % args.checkpointing_steps == 0 or step == plan.total_steps:
            save(run, step, fixed)
        if validates := plan.due(step, args.validation_steps, args.validation_epochs):
            validate(run, step)
        if logs or saves or validates:
            since = step, time.perf_counter()
    progress.close()

    # Result.
    result = checkpoints.averaged_weights(state)
    if accelerator.is_main_process:
        print(f"Result: {export(result, args.output_dir)}")
    # Without it torch 2.13 can hang at exit: gloo's thread and the end of DDP wait for each other.
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if hub_repo and accelerator.is_main_process:  # nobody waits for the upload
        hub.push_to_hub(hub_repo, args.output_dir, checkpoint, vars(args), args.hub_token)


if __name__ == "__main__":
    main(parse_args())
