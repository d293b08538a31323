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
from diffusers.optimization import SchedulerType
from tqdm.auto import tqdm

import checkpoints
import cogvideox
import dataset
import hub
import optimizers
import processes
import trainable
import validation

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
START_OPTIONS = (
    "mixed_precision", "gradient_accumulation_steps", "report_to", "output_dir", "logging_dir", "ddp_timeout"
)  # fmt: skip
OPTIMIZER_OPTIONS = (
    "optimizer", "use_8bit_adam", "learning_rate", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon",
    "prodigy_beta3", "prodigy_decouple", "prodigy_use_bias_correction", "prodigy_safeguard_warmup",
)  # fmt: skip
DEFAULT_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
LORA_OPTIONS = ("rank", "lora_alpha", "lora_target_modules", "use_dora", "use_rslora", "init_lora_weights")
# What a resumed run must share with its checkpoint: it comes back with the optimizer, or counts the place in the data.
FIXED = ("training_type", *LORA_OPTIONS, *OPTIMIZER_OPTIONS, "scale_lr", "seed", "train_batch_size")


# ---- options ---------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:  # noqa: PLR0915 - a statement per option
    about = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(usage="%(prog)s OPTIONS (see --help)", description=about, allow_abbrev=False)
    count, positive, path = _at_least(0), _at_least(1), lambda text: Path(text).expanduser()
    model = parser.add_argument_group("model").add_argument
    model("--pretrained_model_name_or_path", required=True, metavar="NAME", help="CogVideoX folder or hub name")
    model("--revision", help="branch, tag or commit of the hub repository")
    model("--variant", help="weight files to take where the repository has several, such as fp16")
    model("--cache_dir", type=path, help="folder for downloads (default: that of huggingface_hub)")

    data_group = parser.add_argument_group("data")
    data, source = data_group.add_argument, data_group.add_mutually_exclusive_group(required=True).add_argument
    source("--instance_data_root", type=path, metavar="FOLDER", help="folder with the two list files and the videos")
    source("--dataset_name", metavar="NAME", help="hub dataset repository to download and read like a folder")
    data("--caption_column", default="prompts.txt", metavar="FILE", help="list of captions, one per line")
    data("--video_column", default="videos.txt", metavar="FILE", help="list of videos, line n belongs to caption n")
    data("--image_column", metavar="FILE", help="image-to-video: list of images to start from (default: first frames)")
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
    data("--enable_slicing", action="store_true", help="VAE: the images of a batch one by one, as clips always are")

    lora = parser.add_argument_group("LoRA").add_argument
    lora("--rank", type=positive, help="rank of the LoRA matrices (default: 128)")
    lora("--lora_alpha", type=float, help="strength is lora_alpha / rank (default: rank, strength 1)")
    lora("--lora_target_modules", nargs="+", metavar="NAME", help="layers (default: to_q to_k to_v to_out.0)")
    lora("--lora_path", type=path, metavar="PATH", help="LoRA to start from: run directory, checkpoint or file")
    lora("--lora_dropout", type=float, default=0.0, metavar="P", help="share of the LoRA's inputs to drop in training")
    lora("--use_dora", action="store_true", help="DoRA: train each layer's row norms apart from their directions")
    lora("--use_rslora", action="store_true", help="rsLoRA: strength is lora_alpha / sqrt(rank)")
    inits = ["default", "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_4", "pissa_niter_16"]
    lora("--init_lora_weights", choices=inits, default="default", help="first values; pissa_niter_N is a quick pissa")

    train = parser.add_argument_group("training").add_argument
    train("--training_type", choices=["lora", "sft"], default="lora", help="a LoRA, or all weights of the transformer")
    train("--seed", type=count, default=42, help="of order, noise, timesteps, LoRA weights, validation")
    train("--mixed_precision", choices=list(DTYPES), help="default: what accelerate's config file says")
    train("--train_batch_size", type=positive, default=1, metavar="N", help="clips per micro-batch and GPU")
    train("--gradient_accumulation_steps", type=positive, default=1, metavar="N", help="micro-batches per update")
    train("--num_train_epochs", type=positive, default=1, metavar="N", help="times that each clip is seen")
    train("--max_train_steps", type=positive, metavar="N", help="updates; overrides --num_train_epochs")
    train("--gradient_checkpointing", action="store_true", help="recompute activations: less memory, slower")
    train("--ddp_timeout", type=positive, default=1800, metavar="SECONDS", help="longest wait for another process")
    train("--allow_tf32", action="store_true", help="faster float32 matrix products on Ampere GPUs and later")

    optim = parser.add_argument_group("optimizer").add_argument
    optim("--optimizer", type=str.lower, choices=optimizers.KINDS, default="adamw", help="prodigy needs prodigyopt")
    optim("--use_8bit_adam", action="store_true", help="adam and adamw with 8-bit state (needs bitsandbytes)")
    optim("--learning_rate", type=float, help="peak value (default: 1e-4; sft: 1e-5; prodigy: 1.0)")
    optim("--scale_lr", action="store_true", help="multiply it by GPUs x accumulation x batch size")
    schedules = [kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT]
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
    check("--validation_images", metavar="FILES", help="image-to-video: theirs, with the separator (default: of clips)")
    check("--num_validation_videos", type=positive, default=1, metavar="N", help="videos per prompt, a seed each")
    check("--validation_epochs", type=positive, default=50, metavar="N", help="validate every N epochs")
    check("--validation_steps", type=positive, metavar="N", help="validate every N updates, too")
    check("--guidance_scale", type=float, default=6.0, help="of the validation videos")
    check("--use_dynamic_cfg", action="store_true", help="let the guidance grow over the sampling steps")

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
    _check_lora(args, parser.error)
    args.rank, args.lora_target_modules = args.rank or 128, sorted(args.lora_target_modules or DEFAULT_TARGETS)
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
    for name in ("lora_alpha", "learning_rate", "max_grad_norm"):
        if not getattr(args, name) > 0:
            refuse(f"--{name} {getattr(args, name)}: must be above 0")
    frames, prodigy = args.max_num_frames, args.optimizer == "prodigy"
    if frames % 4 != 1:
        refuse(f"--max_num_frames {frames}: must be 4k + 1, best 8k + 1; nearest is {8 * round((frames - 1) / 8) + 1}")
    if not prodigy and any(value for name, value in vars(args).items() if name.startswith("prodigy_")):
        refuse(
            f"--prodigy_...: does nothing with --optimizer {args.optimizer}; pass --optimizer prodigy, or leave it out"
        )
    if prodigy and args.use_8bit_adam:
        refuse("--use_8bit_adam: does nothing with --optimizer prodigy; pass --optimizer adamw, or leave it out")
    if args.lr_warmup_steps and args.lr_scheduler == "constant":
        refuse("--lr_warmup_steps: does nothing with --lr_scheduler constant; pass constant_with_warmup")
    _check_validation(args, refuse)


def _check_lora(args: argparse.Namespace, refuse) -> None:
    names = (*LORA_OPTIONS, "lora_path", "lora_dropout")
    given = [name for name in names if getattr(args, name) not in (None, 0, "default")]
    if args.training_type == "sft" and given:
        refuse(f"--{given[0]}: does nothing with --training_type sft, which trains no LoRA; leave it out")
    if args.lora_path and args.init_lora_weights != "default":
        refuse(f"--init_lora_weights {args.init_lora_weights}: --lora_path gives the first values; pass one of the two")
    if args.init_lora_weights == "orthogonal" and (args.rank or 128) % 2:
        refuse(f"--rank {args.rank}: must be even for --init_lora_weights orthogonal; pass {args.rank + 1}")
    if not 0 <= args.lora_dropout < 1:
        refuse(f"--lora_dropout {args.lora_dropout}: must be from 0 to below 1")


def _check_validation(args: argparse.Namespace, refuse) -> None:
    if not args.validation_prompt_separator or not all(validation_prompts(args)):
        refuse(f"--validation_prompt {args.validation_prompt!r}: a prompt or its separator is empty; write both")
    if len(validation_images(args)) > len(validation_prompts(args)):
        refuse(f"--validation_images {args.validation_images!r}: more images than prompts; give each a prompt")


def validation_prompts(args: argparse.Namespace) -> list[str]:
    prompts = args.validation_prompt.split(args.validation_prompt_separator) if args.validation_prompt else []
    return [prompt.strip() for prompt in prompts]


def validation_images(args: argparse.Namespace) -> list[Path | None]:
    """One for each prompt, as far as they are given; None where nothing stands between two separators."""
    images = args.validation_images.split(args.validation_prompt_separator) if args.validation_images else []
    return [Path(image.strip()).expanduser() if image.strip() else None for image in images]


# ---- launch ----------------------------------------------------------------------------------------------------------


def start(args: argparse.Namespace) -> tuple[Accelerator, dataset.Ranks]:
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    accelerator, ranks = processes.start(**{name: getattr(args, name) for name in START_OPTIONS})
    if accelerator.is_fsdp2 and args.use_8bit_adam:
        raise ValueError("--use_8bit_adam: bitsandbytes cannot work on shards; leave it out, they are small already")
    if args.training_type == "sft":  # of whose checkpoints each rank writes a part
        processes.check_shared(ranks, args.output_dir, "--output_dir")
    return accelerator, ranks


# ---- data ------------------------------------------------------------------------------------------------------------


def prepare_data(args, accelerator, checkpoint: cogvideox.Checkpoint, dtype, ranks: dataset.Ranks) -> dataset.Data:
    """Reads, checks and encodes the dataset; T5 and VAE are gone from memory afterwards."""
    root = args.instance_data_root or dataset.download(args.dataset_name, args.cache_dir)
    clips, problems = dataset.read_clips(root, args.caption_column, args.video_column, args.image_column, args.id_token)
    problems += dataset.image_problems([image for image in validation_images(args) if image], "--validation_images")
    view = dataset.View(
        args.height, args.width, args.fps, args.max_num_frames, args.skip_frames_start, args.skip_frames_end,
        args.video_reshape_mode, args.seed, checkpoint.takes_image, checkpoint.fixed_size is not None,
    )  # fmt: skip
    video_encoder, text_encoder = cogvideox.encoders(
        checkpoint, dtype, accelerator.device, args.enable_tiling, args.enable_slicing
    )
    cache = args.latents_cache_dir or root / ".cogvideox_cache"
    return dataset.encode_dataset(
        root, clips, problems, view, cache=cache,
        prompts=[*validation_prompts(args), ""],  # "": what guidance moves away from
        random_flip=args.random_flip, video_encoder=video_encoder, text_encoder=text_encoder,
        num_workers=args.dataloader_num_workers, progress=partial(bar, accelerator),
        ranks=processes.sharing(ranks, cache, "--latents_cache_dir"), everyone=ranks,
    )  # fmt: skip


def bar(accelerator: Accelerator, items, description: str, unit: str, **options) -> tqdm:
    return tqdm(items, description, unit=unit, disable=not accelerator.is_main_process, **options)


# ---- what is trained -------------------------------------------------------------------------------------------------


def read_checkpoint(args: argparse.Namespace, dtype: torch.dtype) -> cogvideox.Checkpoint:
    """The checkpoint's configs, of which all that is asked for can be had."""
    checkpoint = cogvideox.read_checkpoint(
        args.pretrained_model_name_or_path, args.revision, args.variant, args.cache_dir
    )
    image_options = [f"--{name}" for name in ("image_column", "validation_images") if getattr(args, name)]
    cogvideox.check_training(checkpoint, dtype, args.max_num_frames, args.height, args.width, image_options)
    if args.training_type == "lora":
        trainable.check_lora(checkpoint, *lora_of(args))
    return checkpoint


def lora_of(args: argparse.Namespace) -> tuple[trainable.Lora, Path | None]:
    """And what it starts from; one that is resumed has come further."""
    lora = trainable.Lora(**{name: getattr(args, name) for name in trainable.Lora._fields})
    return lora, None if args.resume_from_checkpoint else args.lora_path


def prepare_transformer(args, checkpoint: cogvideox.Checkpoint, dtype) -> tuple[torch.nn.Module, trainable.Export]:
    """The transformer, of which just what is trained requires gradients, and what writes that as a result."""
    set_seed(args.seed)
    if args.training_type == "lora":
        transformer, export = trainable.with_lora(checkpoint, dtype, *lora_of(args))
    else:
        transformer, export = trainable.whole(checkpoint, dtype)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return transformer.train(), export


def make_optimizer(args, weights: list[torch.nn.Parameter], clips_per_step: int) -> torch.optim.Optimizer:
    options = {name: getattr(args, name) for name in OPTIMIZER_OPTIONS}
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
    data: dataset.Data
    plan: dataset.Plan
    transformer: torch.nn.Module


def losses(run: Run) -> Iterator[torch.Tensor]:
    """The loss of each micro-batch of this rank, in order; its noise depends on the seed and its number alone."""
    args, device = run.args, run.accelerator.device
    micro_batches = dataset.micro_batches(
        run.data, run.plan, run.ranks, args.train_batch_size, args.seed, args.random_flip, args.dataloader_num_workers
    )
    vae_options = device, args.enable_tiling, args.enable_slicing
    with cogvideox.image_encoder(run.checkpoint, run.dtype, *vae_options) as encode:
        for number, batch in micro_batches:
            generator = cogvideox.generator_for(device, args.seed, number)
            torch.manual_seed(generator.initial_seed() % 2**63)  # dropout draws from the global generator
            yield cogvideox.training_loss(run.checkpoint, run.transformer, batch, generator, run.dtype, encode)


def update(run: Run, optimizer, micro_batch_losses: Iterator[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer update; returns its loss on this rank, and the norm of its gradient over all."""
    accelerator, micro_batches = run.accelerator, run.args.gradient_accumulation_steps
    total, weights = 0.0, optimizer.param_groups[0]["params"]
    for _ in range(micro_batches):
        with accelerator.accumulate(run.transformer):
            loss = next(micro_batch_losses)
            accelerator.backward(loss)  # divides by the number of micro-batches
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(weights, run.args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        total += loss.detach() / micro_batches
    return total, grad_norm


def log(run: Run, step: int, loss, grad_norm, learning_rate: float, since: tuple[int, float]) -> dict:
    """Writes one row; `since` is an earlier step and its time, with nothing but updates in between."""
    loss, seconds = run.accelerator.reduce(loss, "mean").item(), (time.perf_counter() - since[1]) / (step - since[0])
    row = {"step": step, "epoch": round(run.plan.epoch(step), 4), "loss": loss, "lr": learning_rate}
    row |= {"grad_norm": grad_norm.item(), "seconds": round(seconds, 4)}
    return checkpoints.log_row(run.accelerator, run.args.output_dir, row)


def validate(run: Run, step: int) -> None:
    args, device = run.args, run.accelerator.device
    vae = cogvideox.loaded_vae(run.checkpoint, run.dtype, device, args.enable_tiling, args.enable_slicing)
    cases = validation.cases(run.data, validation_prompts(args), validation_images(args), args.height, args.width)
    validation.validate(
        run.accelerator, run.ranks, run.checkpoint, run.transformer, vae, cases, run.data.prompts,
        args.output_dir, step, seeds=range(args.seed, args.seed + args.num_validation_videos), fps=args.fps,
        num_frames=args.max_num_frames, height=args.height, width=args.width, guidance_scale=args.guidance_scale,
        use_dynamic_cfg=args.use_dynamic_cfg,
    )  # fmt: skip


def start_records(run: Run) -> None:
    """Says what is going to happen, to the person, to args.json and to the trackers."""
    args, plan = run.args, run.plan
    what = f"{args.training_type}, {trainable.count(run.transformer)}, learning rate {args.learning_rate:g}"
    lines = [run.checkpoint.describe(), run.data.summary(), what, plan.summary(args.train_batch_size)]
    run.accelerator.print(*lines, *run.checkpoint.remarks(args.max_num_frames, args.fps), sep="\n")
    about = {"checkpoint": run.checkpoint.describe(), "clips": len(run.data.shapes), "processes": run.ranks.count}
    checkpoints.start_records(run.accelerator, args.output_dir, args.tracker_name, about, vars(args), plan.first_step)


# ---- the story -------------------------------------------------------------------------------------------------------


@processes.lost_processes_explained()
def main(args: argparse.Namespace) -> None:
    with processes.explained():
        # Data: read, checked and encoded, before the transformer comes in.
        accelerator, ranks = start(args)
        dtype = DTYPES[accelerator.mixed_precision]
        checkpoint = read_checkpoint(args, dtype)
        fixed = {name: getattr(args, name) for name in FIXED}
        fixed |= {"mixed_precision": accelerator.mixed_precision, "transformer": checkpoint.identity}
        resume_from, position = processes.from_main(
            accelerator, checkpoints.starting_point, args.output_dir, args.resume_from_checkpoint, fixed
        )
        make_optimizer(args, [torch.nn.Parameter(torch.zeros(1))], 1)  # a missing package or a bad value shows here
        hub_repo = args.push_to_hub and processes.from_main(
            accelerator, hub.create_hub_repo, args.hub_model_id, args.hub_token
        )
        checkpoint = cogvideox.download(checkpoint)
        data = prepare_data(args, accelerator, checkpoint, dtype, ranks)
        plan = dataset.make_plan(
            data.batches_per_epoch(args.train_batch_size), ranks.count * args.gradient_accumulation_steps,
            args.num_train_epochs, args.max_train_steps, **position,
        )  # fmt: skip

        # What is trained: weights in float32; what is frozen is in the compute dtype.
        transformer, export = prepare_transformer(args, checkpoint, dtype)
        clips_per_step = plan.batches_per_step * args.train_batch_size
        # Nothing else may hold the weights: FSDP2 would keep them whole on every GPU, beside its shards.
        optimizer = make_optimizer(args, trainable.weights_of(transformer), clips_per_step)
        lr_scheduler = optimizers.make_lr_scheduler(
            optimizer, args.lr_scheduler, args.lr_warmup_steps, plan.total_steps, args.lr_num_cycles, args.lr_power
        )

    # Where to start. The schedule is not prepared: accelerate would advance it once per rank.
    transformer, optimizer = accelerator.prepare(transformer, optimizer)
    state = checkpoints.State(transformer, optimizer, lr_scheduler)
    if resume_from:
        checkpoints.load_checkpoint(accelerator, state, resume_from)
    run = Run(args, accelerator, ranks, checkpoint, dtype, data, plan, transformer)
    start_records(run)

    # Train: one turn is one update.
    micro_batch_losses = losses(run)
    progress = bar(accelerator, None, "Training", "update", total=plan.total_steps, initial=plan.first_step)
    since, limit = (plan.first_step, time.perf_counter()), args.checkpoints_total_limit
    for step in range(plan.first_step + 1, plan.total_steps + 1):
        loss, grad_norm = update(run, optimizer, micro_batch_losses)
        if logs := step % args.logging_steps == 0:
            row = log(run, step, loss, grad_norm, lr_scheduler.get_last_lr()[0], since)
            progress.set_postfix(loss=f"{row['loss']:.4f}", lr=f"{row['lr']:.2e}", refresh=False)
        lr_scheduler.step()
        progress.update()
        if saves := step % args.checkpointing_steps == 0 or step == plan.total_steps:
            checkpoints.save_checkpoint(accelerator, state, export, args.output_dir, plan.position(step), fixed, limit)
        if validates := args.validation_prompt and plan.due(step, args.validation_steps, args.validation_epochs):
            validate(run, step)
        if logs or saves or validates:
            since = step, time.perf_counter()
    progress.close()

    # Result.
    result = checkpoints.full_weights(transformer)
    if accelerator.is_main_process:
        print(f"Result: {export(result, args.output_dir)}")
    # Without it torch 2.13 can hang at exit: gloo's thread and the end of DDP wait for each other.
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if hub_repo and accelerator.is_main_process:  # nobody waits for the upload
        hub.push_to_hub(hub_repo, args.output_dir, checkpoint, vars(args), args.hub_token)


if __name__ == "__main__":
    main(parse_args())
