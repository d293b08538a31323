"""Trains a LoRA for CogVideoX, or the whole transformer, on captioned clips.

    accelerate launch --config_file accelerate_config_machine_single.yaml train_cogvideox_lora.py \
        --pretrained_model_name_or_path THUDM/CogVideoX-2b --instance_data_root ~/my-clips --output_dir my-lora

`main`, at the end, is the story: options -> data -> what is trained -> loop -> result. `update` is one optimizer step.

An update takes `gradient_accumulation_steps` micro-batches on each of N ranks. Micro-batches are numbered over all
ranks and epochs, and the number decides which clips and which noise one holds: N ranks, one rank and a resumed run
compute the same.
"""

import argparse
import contextlib
import itertools
import shlex
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

import dataset
from clips import listing, masks, selection
from clips.frames import image_problems
from clips.known import CACHE, Notes
from clips.listing import Listing
from clips.order import Order, Ranks, Timeline, count_held_out, make_timeline
from clips.selection import Selection
from cogvideox import budget, compute, encoders, lora, self_check
from cogvideox.base_files import check_files
from cogvideox.base_model import BaseModel, check_training, download_weights, read_base_model, read_text_encoder_config
from cogvideox.budget import MemoryPlan
from cogvideox.lora_files import CHANGES_BASE, SAVE_DTYPES
from cogvideox.objective import Masking, generator_for, preservation_loss, spread_timesteps, training_loss
from cogvideox.rehearsal import Models, Settings, models_of
from dataset import Data, Parts
from files import CannotContinue, at_least, expanded_path, parse_options, plain_name, share, weight
from pages import report
from run import (
    checkpoints,
    course,
    dry_run,
    guard,
    hub,
    optimizers,
    processes,
    rate_search,
    run_directory,
    signals,
    stopping,
    trackers,
    validation,
)
from run.checkpoints import Start
from run.shards import reshard

REGULARIZATION = "regularization"  # kind of micro-batch
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# ---- options ---------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(usage="%(prog)s OPTIONS (see --help)", allow_abbrev=False)
    parser.description = __doc__.split("\n")[0]
    add_model_options(parser)
    add_data_options(parser)
    lora.add_options(parser)
    add_training_options(parser)
    compute.add_options(parser)
    optimizers.add_options(parser)
    validation.add_options(parser)
    add_output_options(parser)
    dry_run.add_options(parser)

    args = parse_options(parser, argv)
    lora.check_options(args, parser.error)  # first: it refuses options of a LoRA that are given where none is trained
    args.hub_model_id = args.hub_model_id or args.output_dir.absolute().name
    args.rank = args.rank or lora.DEFAULT_RANK
    args.lora_target_modules = sorted(args.lora_target_modules or lora.DEFAULT_TARGETS)
    for name, value in derived_options(vars(args)).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    selection.check_options(args, parser.error)
    masks.check_options(args, parser.error)
    masks.check_weights(args, parser.error)
    check_order(args, parser.error)
    check_preservation(args, parser.error)
    check_regularization(args, parser.error)
    optimizers.check_options(args, parser.error)
    compute.check_options(args, parser.error)
    validation.check_options(args, parser.error)
    stopping.check_options(args, parser.error)
    dry_run.check_options(args, parser.error)
    course.check_options(args, parser.error)
    return args


def check_order(args: argparse.Namespace, refuse: Callable[[str], None]) -> None:
    """Refuses options of the order of clips that exclude each other; `refuse` ends the program with a message."""
    if args.max_tokens_per_batch and args.train_batch_size > 1:
        refuse("--max_tokens_per_batch: decides the clips in a batch, as --train_batch_size does; leave one out")
    if args.max_tokens_per_batch and args.scale_lr:
        refuse("--scale_lr: needs batches of one size, which --max_tokens_per_batch does not make; leave one out")


def check_regularization(args: argparse.Namespace, refuse: Callable[[str], None]) -> None:
    """Refuses a weight of the loss on regularization clips that does nothing."""
    if args.prior_loss_weight is not None and not args.regularization_data_root:
        refuse("--prior_loss_weight: does nothing without --regularization_data_root; pass its folder, or leave it out")
    if args.prior_loss_weight == 0:
        refuse("--prior_loss_weight 0: the clips of --regularization_data_root would do nothing; leave them out")


def changes_base(args: argparse.Namespace) -> str | None:
    """Returns the option that changes the base model in training; None if none does."""
    if args.training_type != "lora":
        return f"--training_type {args.training_type}"
    return f"--init_lora_weights {args.init_lora_weights}" if args.init_lora_weights.startswith(CHANGES_BASE) else None


def measures_drift(args: argparse.Namespace) -> bool:
    """Whether validation measures how far the LoRA is from the base model where the new word is absent."""
    has_captions = args.id_token or args.preserve_prompt is not None or args.drift_prompt
    return bool(args.validation_split and has_captions) and not changes_base(args)


def check_preservation(args: argparse.Namespace, refuse: Callable[[str], None]) -> None:
    """Refuses to preserve where there is nothing to preserve, or nothing that names what is new; likewise drift."""
    if changed := changes_base(args):
        given = {
            "--drift_prompt": args.drift_prompt,
            f"--mask_preserve {args.mask_preserve:g}": args.mask_preserve,
            f"--preserve {args.preserve:g}": args.preserve,
        }
        for option in (name for name, value in given.items() if value):
            refuse(f"{option}: {changed} changes the base model, with which it compares; leave one of them out")
    for option, prompts in {
        "--preserve_prompt": [args.preserve_prompt or ""],
        "--drift_prompt": validation.drift_prompts(args),
    }.items():
        for prompt in filter(listing.words_of(args).has_word, prompts):
            rule = f"contains --id_token {args.id_token}, whose absence means the base model"
            refuse(f"{option} {prompt!r}: {rule}; remove it")
    if not args.preserve:
        every = f"--preserve_every {args.preserve_every}" if args.preserve_every != 1 else None
        given = [every, "--preserve_prompt" if args.preserve_prompt is not None else None]
        for option in filter(None, given):
            refuse(f"{option}: does nothing without --preserve; pass a weight with it, such as --preserve 1")
        return
    if not args.id_token and args.preserve_prompt is None:
        refuse(
            f"--preserve {args.preserve:g}: needs --id_token, whose absence means the base model, or --preserve_prompt"
        )


def derived_options(options: dict) -> dict:
    """Returns the options that follow from others unless they are given."""
    return {
        "learning_rate": optimizers.default_learning_rate(options["optimizer"], options["training_type"]),
        "lora_alpha": options["rank"],
        "result": "last" if options.get("stop_patience") is None else "best",
        "prior_loss_weight": 1.0 if options.get("regularization_data_root") else None,
    }


def add_model_options(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model").add_argument
    name = "base model: a folder, or a name on the hub such as THUDM/CogVideoX-2b"
    model("--pretrained_model_name_or_path", required=True, metavar="NAME", help=name)
    model("--revision", help="branch, tag or commit of the hub repository (default: its main branch)")
    model("--variant", help="variant of the weight files where a repository has several, such as fp16")
    model("--cache_dir", type=expanded_path, help="folder for downloads (default: the cache of huggingface_hub)")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    listing.add_options(group)
    masks.add_options(group)
    selection.add_options(group)
    source = group.add_mutually_exclusive_group(required=True).add_argument
    root = "folder with the clips and their captions, or several; FOLDER=2 shows its clips twice an epoch"
    source("--instance_data_root", type=listing.folder_option, nargs="+", metavar="FOLDER", help=root)
    source("--dataset_name", metavar="NAME", help="dataset repository on the hub, downloaded and read like a folder")
    kept = "folders with clips of what the model is to keep, without --id_token; a batch of them is added to each batch"
    regularization = {"type": listing.regularization_folder, "nargs": "+", "default": [], "metavar": "FOLDER"}
    group.add_argument("--regularization_data_root", **regularization, help=kept)
    data = group.add_argument
    cache = "folder for encoded clips and captions (default: .cogvideox_cache in the data's folder)"
    again = "read every clip again, even if its size and modification time are unchanged"
    encode = "encode what the cache lacks, then exit"
    workers = "processes that read the cache; 0: a thread of the training process reads it"
    precision = "precision of T5's weights; bf16: unquantised, in the compute dtype; int8: half the memory"
    device = "where T5 encodes captions; accelerator: the GPU if there is one; cpu: slower, without GPU memory"
    dropped = "probability that a clip is shown without its caption; pre-training used 0.1"
    images = "share of images, and clips of one frame, among what an epoch shows (default: each once, like a video)"
    tiling = "run the VAE in tiles: less memory, slower, slightly different latents; auto: only if memory is short"
    data("--caption_dropout", type=share, default=0, metavar="P", help=dropped)
    data("--image_share", type=share, metavar="P", help=images)
    data("--latents_cache_dir", type=expanded_path, metavar="FOLDER", help=cache)
    data("--check_all", action="store_true", help=again)
    data("--encode_only", action="store_true", help=encode)
    data("--dataloader_num_workers", type=at_least(0), default=0, metavar="N", help=workers)
    data("--text_encoder_precision", choices=["bf16", "int8"], default="bf16", help=precision)
    data("--text_encoder_device", choices=["accelerator", "cpu"], default="accelerator", help=device)
    tilings = ["never", "auto", "always"]
    data("--enable_tiling", nargs="?", const="always", default="never", choices=tilings, help=tiling)
    data("--enable_slicing", action="store_true", help="run the VAE on one small clip or image at a time: less memory")


def add_training_options(parser: argparse.ArgumentParser) -> None:
    train, positive = parser.add_argument_group("training").add_argument, at_least(1)
    precision = "compute precision; no: float32 (default: the one in accelerate's config file)"
    kind = "train a LoRA, or the whole transformer (sft)"
    micro_batches = "micro-batches per update and GPU"
    tokens = "as many clips per micro-batch as have at most N tokens together, instead of --train_batch_size"
    group = "with --buckets: micro-batches of one bucket that follow each other, for GPUs with equal work"
    train("--training_type", choices=["lora", "sft"], default="lora", help=kind)
    train("--seed", type=at_least(0), default=42, help="seed of clip order, noise, initial LoRA weights and validation")
    train("--mixed_precision", choices=list(DTYPES), help=precision)
    train("--train_batch_size", type=positive, default=1, metavar="N", help="clips per micro-batch and GPU")
    train("--max_tokens_per_batch", type=positive, metavar="N", help=tokens)
    train("--bucket_group", type=positive, default=8, metavar="N", help=group)
    train("--gradient_accumulation_steps", type=positive, default=1, metavar="N", help=micro_batches)
    train("--num_train_epochs", type=positive, default=1, metavar="N", help="passes over the clips")
    train("--max_train_steps", type=positive, metavar="N", help="updates; overrides --num_train_epochs")
    sampling = "timesteps of the noise; uniform: independent draws; low_discrepancy: a sequence, evenly spread"
    train("--timestep_sampling", choices=["uniform", "low_discrepancy"], default="uniform", help=sampling)
    train("--ddp_timeout", type=positive, default=1800, metavar="SECONDS", help="longest wait for another process")
    preserve = "weight of what keeps the base model as it is without --id_token: its own predictions; 0: none"
    every = "preserve in one of N updates: N times less work for it"
    prior = "weight of the loss on the clips of --regularization_data_root (default: 1)"
    plain = "caption to preserve the base model's predictions of (default: each clip's without --id_token)"
    train("--preserve", type=weight, default=0, metavar="WEIGHT", help=preserve)
    train("--preserve_every", type=positive, default=1, metavar="N", help=every)
    train("--preserve_prompt", metavar="TEXT", help=plain)
    train("--prior_loss_weight", type=weight, metavar="WEIGHT", help=prior)
    skipped = "end after so many updates in a row whose loss or gradient is not finite; each is skipped"
    train("--max_skipped_updates", type=positive, default=3, metavar="N", help=skipped)
    train("--allow_tf32", action="store_true", help="use TF32 for float32 products: faster on Ampere GPUs and later")


def add_output_options(parser: argparse.ArgumentParser) -> None:
    group, path, positive = parser.add_argument_group("output"), expanded_path, at_least(1)
    out = group.add_argument
    resume = "checkpoint to resume from: its folder, 'latest' in --output_dir, or 'auto': the latest if there is one"
    minutes = "minutes from checkpoint to checkpoint, besides --checkpointing_steps (default: none)"
    precision = "precision of the result's weights (default: fp32 for a LoRA, the compute precision for sft)"
    tracker = "tracker: tensorboard, wandb, trackio, comet_ml or all; none: metrics.jsonl only"
    token = "access token of the hub; HF_TOKEN or `hf auth login` is safer: others can see a machine's command lines"
    out("--output_dir", type=path, default=Path("cogvideox-lora"), help="run directory: checkpoints, metrics, result")
    out("--checkpointing_steps", type=positive, default=500, metavar="N", help="updates from checkpoint to checkpoint")
    out("--save_minutes", type=positive, metavar="N", help=minutes)
    out("--checkpoints_total_limit", type=positive, metavar="N", help="newest checkpoints to keep (default: all)")
    out("--resume_from_checkpoint", metavar="PATH", help=resume)
    course.add_options(group)
    out("--save_precision", choices=SAVE_DTYPES, help=precision)
    result = "weights that are the result: the last, or those of the lowest loss on held-out clips (default: the last; "
    out("--result", choices=["last", "best"], help=f"{result}with --stop_patience the best)")
    out("--logging_steps", type=positive, default=1, metavar="N", help="updates from one row of metrics to the next")
    out("--report_to", default="none", help=tracker)
    out("--tracker_name", type=plain_name, default="cogvideox-lora", help="name of the project in the tracker")
    logs = "folder for the tracker's files: inside --output_dir, or a whole path"
    out("--logging_dir", type=trackers.folder_of_logs, default="logs", help=logs)
    out("--push_to_hub", action="store_true", help="upload the result to the hub after training")
    out("--hub_model_id", help="hub repository for the result (default: the name of --output_dir)")
    out("--hub_token", type=hub.access_token, help=token)


# ---- launch ----------------------------------------------------------------------------------------------------------


def start(args: argparse.Namespace) -> tuple[Accelerator, Ranks]:
    hub.hide_token(args.hub_token)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    accelerator, ranks = processes.start(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        report_to=args.report_to,
        output_dir=args.output_dir,
        logging_dir=args.logging_dir,
        ddp_timeout=args.ddp_timeout,
        autocast=lora.needs_autocast(lora.lora_of(args)),
    )
    if accelerator.is_fsdp2:
        check_sharding(args)
    if args.training_type == "sft" and not args.dry_run:  # each rank writes its part of a checkpoint
        processes.check_shared(ranks, args.output_dir, "--output_dir")
    return accelerator, ranks


def check_sharding(args: argparse.Namespace) -> None:
    """Refuses options that do not work where FSDP2 shards the weights."""
    if args.use_8bit_adam:
        raise ValueError("--use_8bit_adam: bitsandbytes does not work on shards; leave it out, they are small already")
    if args.gradient_checkpointing == "auto":
        raise ValueError("--gradient_checkpointing auto: does not know about shards; pass none, attention or full")
    if args.blocks_to_swap:
        raise ValueError("--blocks_to_swap: FSDP spreads the weights over the GPUs already; leave it out")
    if args.mask_preserve:
        raise ValueError("--mask_preserve: sharded GPUs compute together, and not each batch has a mask; leave it out")
    if args.base_precision != "bf16":
        raise ValueError(f"--base_precision {args.base_precision}: FSDP cannot shard quantised weights; leave it out")


def where_to_start(
    args: argparse.Namespace, accelerator: Accelerator, base: BaseModel, *, ranks: Ranks, held: contextlib.ExitStack
) -> tuple[Start, dict]:
    """Returns where to start, and what differs from the checkpoint that is resumed.

    The main rank keeps other runs out of the output directory for as long as `held` is open.
    """

    def find() -> Start:
        if not args.dry_run:
            held.enter_context(run_directory.locked(args.output_dir))
        return checkpoints.starting_point(args.output_dir, args.resume_from_checkpoint, only_look=args.dry_run)

    starting = Start.fresh() if args.encode_only else processes.from_main(accelerator, find)
    options = options_of(args, accelerator) | {"processes": ranks.count}
    changed = checkpoints.check_course(starting, options, base, allowed=args.change, derived=derived_options)
    for line in [*starting.remarks, *course.describe(starting.name, changed)]:
        accelerator.print(line)
    return starting, changed


def options_of(args: argparse.Namespace, accelerator: Accelerator) -> dict:
    return course.recorded(vars(args) | {"mixed_precision": accelerator.mixed_precision})


def read_base(args: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> BaseModel:
    """Returns the base model, from its configs only, and refuses options that it cannot be trained with."""
    base = read_base_model(args.pretrained_model_name_or_path, args.revision, args.variant, args.cache_dir)
    image_options = [f"--{name}" for name in ("image_column", "validation_images") if getattr(args, name)]
    check_training(base, dtype, selection_of(args, base).by_option, image_options=image_options)
    check_largest_batch(args, base)
    kernels_on = None if args.dry_run_gib else device
    compute.check_possible(base.transformer, compute.options_of(args), dtype, kernels_on)
    if args.training_type == "lora":
        lora.check_lora(base, lora.lora_of(args), lora_to_start_from(args), for_other_base=args.lora_for_other_base)
    return base


def check_largest_batch(args: argparse.Namespace, base: BaseModel) -> None:
    """Refuses batches in which a clip of some size has no room."""
    tokens_of = {bucket: base.num_tokens(*base.latent_shape(*bucket)) for bucket in selection_of(args, base).sizes}
    largest = max(tokens_of, key=tokens_of.get)
    if args.max_tokens_per_batch and tokens_of[largest] > args.max_tokens_per_batch:
        raise ValueError(
            f"--max_tokens_per_batch {args.max_tokens_per_batch}: a clip of {largest} (frames x height x width) has "
            f"{tokens_of[largest]} tokens; pass at least that"
        )


def lora_to_start_from(args: argparse.Namespace) -> Path | None:
    return None if args.resume_from_checkpoint else args.lora_path  # a checkpoint holds a later one


def end(accelerator: Accelerator) -> None:
    # Without waiting torch 2.13 can hang at exit: gloo's thread and the destructor of DDP wait for each other.
    with contextlib.suppress(RuntimeError):  # another rank may have left by now: the result is written
        accelerator.wait_for_everyone()
    trackers.end(accelerator)


# ---- memory ----------------------------------------------------------------------------------------------------------


def rehearsed_models(args: argparse.Namespace, base: BaseModel) -> Models:
    return models_of(base, read_text_encoder_config(base), partial(make_optimizer, args, batches_per_step=1))


def largest_batch(args: argparse.Namespace, base: BaseModel, chosen: Selection) -> tuple[int, int, int, int] | None:
    """Returns clips, frames, height and width of the micro-batch with most tokens; None if `chosen.largest` gives it.

    The size of most pixels takes the most memory in the VAE, and need not have the most tokens.
    """
    size_of = batch_size_of(args, base)

    def batch_of(bucket: selection.Bucket) -> tuple[int, int, int, int]:
        return size_of((0, *base.latent_shape(*bucket))), *bucket

    def num_tokens(batch: tuple[int, int, int, int]) -> int:
        count, *bucket = batch
        return count * base.num_tokens(*base.latent_shape(*bucket))

    batch = max(map(batch_of, [chosen.largest, *chosen.possible_sizes]), key=num_tokens)
    return None if batch == (args.train_batch_size, *chosen.largest) else batch


def memory_settings(
    args: argparse.Namespace, base: BaseModel, dtype: torch.dtype, device: torch.device, num_processes: int
) -> Settings:
    """Returns the options that decide memory, for the dry run's GPU if one is given."""
    chosen = selection_of(args, base)
    options = {name: value for name, value in vars(args).items() if name in Settings._fields}
    options |= {"max_num_frames": chosen.largest.num_frames}
    options |= {"height": chosen.largest.height, "width": chosen.largest.width}
    return Settings(
        **options,
        largest_batch=largest_batch(args, base, chosen),
        lora=lora.lora_of(args),
        dtype=dtype,
        ema=args.ema_decay is not None,
        regularized=bool(args.regularization_data_root),
        samples=bool(args.validation_prompt),
        device_type="cuda" if args.dry_run_gib else device.type,
        num_processes=num_processes,
    )


def free_bytes(args: argparse.Namespace, accelerator: Accelerator, ranks: Ranks) -> int | None:
    """Returns the memory that each process has to itself, the least of all; None if it is not known."""
    if args.dry_run_gib:
        return round(args.dry_run_gib * budget.GIB)
    known = [count for count in ranks.gather([processes.free_bytes(accelerator.device)]) if count is not None]
    return min(known, default=None)


def plan_memory(args, accelerator: Accelerator, ranks: Ranks, base: BaseModel, dtype: torch.dtype) -> MemoryPlan:
    """Says what each phase will need and decides, the same on all ranks, what the options leave open ("auto").

    Refuses a run in which a phase does not fit even if nothing else takes memory.
    """
    plan = budget.decide(
        rehearsed_models(args, base),
        memory_settings(args, base, dtype, accelerator.device, ranks.count),
        tiling=args.enable_tiling,
        free_bytes=free_bytes(args, accelerator, ranks),
    )
    if accelerator.is_fsdp2:  # the rehearsal does not model shards; tiles are on the safe side
        plan = plan._replace(phases=())
    accelerator.print(*budget.describe(plan), sep="\n")
    if plan.impossible and not (args.allow_oversubscription or args.encode_only):
        raise ValueError(budget.refusal(plan))
    return plan


def memory_savings(
    args, accelerator: Accelerator, ranks: Ranks, base: BaseModel, memory_plan: MemoryPlan, *, phase: str
) -> list[str]:
    """Returns the options that would need less memory in a phase, each with how much less by the prediction."""
    settings = memory_settings(args, base, DTYPES[accelerator.mixed_precision], accelerator.device, ranks.count)
    decided = {name: value for name, value in memory_plan._asdict().items() if name in Settings._fields}
    return budget.savings(phase, rehearsed_models(args, base), settings._replace(**decided))


def memory_advice(run: "Run", phase: str) -> str:
    """Returns what would need less memory in a phase of the loop."""
    savings = memory_savings(run.args, run.accelerator, run.ranks, run.base, run.memory_plan, phase=phase)
    return f"out of memory in {phase}; by the prediction, {budget.ways_out(phase, savings)}"


def training_advice(run: "Run") -> str:
    resume = "--resume_from_checkpoint auto continues from the last checkpoint, or begins again where there is none"
    return f"{memory_advice(run, 'training')}; {resume}"


def encoding_advice(args, accelerator: Accelerator, ranks: Ranks, base: BaseModel, memory_plan: MemoryPlan) -> str:
    """Returns what would need less memory while captions (in T5) or clips (in the VAE) are encoded."""
    ways_out = {
        phase: budget.ways_out(phase, memory_savings(args, accelerator, ranks, base, memory_plan, phase=phase))
        for phase in ("text", "clips")
    }
    return (
        f"out of memory in encoding; by the prediction, if it was captions, {ways_out['text']}; if it was clips, "
        f"{ways_out['clips']}; what is encoded stays, and the same command continues"
    )


@contextlib.contextmanager
def memory_explained(advice: Callable[[], str]) -> Iterator[None]:
    """Turns a lack of memory into a message with what would need less, and what stays, by `advice`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not budget.is_out_of_memory(error):
            raise
        raise CannotContinue(advice()) from error


# ---- data ------------------------------------------------------------------------------------------------------------


def read_listing(args: argparse.Namespace) -> Listing:
    folders = args.instance_data_root
    if args.dataset_name:
        folders = [listing.Folder(listing.download_dataset(args.dataset_name, args.cache_dir))]
    folders = [*folders, *args.regularization_data_root]
    listed = listing.read_listing(folders, listing.columns_of(args), words_of(args))
    num_learned = sum(not clip.is_regularization for clip in listed.clips)
    count_held_out(args.validation_split, num_learned)  # before hours of encoding
    images = [image for image in validation.images(args) if image]
    listed.problems.extend(image_problems(images, "--validation_images"))
    refuse_output_among_clips(args, listed)
    return listed


def refuse_output_among_clips(args: argparse.Namespace, listed: Listing) -> None:
    """Refuses an output folder whose validation videos the next start would take for clips without captions."""
    output = args.output_dir.resolve()
    for folder, layout in zip(listed.folders, listed.layouts):
        if args.validation_prompt and layout == listing.BESIDE and output.is_relative_to(folder.path.resolve()):
            raise ValueError(
                f"--output_dir {args.output_dir}: is in {folder.path}, where every video is taken for a clip, those of "
                "--validation_prompt as well; pass a folder elsewhere, or move one that is there already"
            )


def words_of(args: argparse.Namespace) -> listing.Words:
    reads_plain = bool(args.preserve) or (measures_drift(args) and args.id_token is not None)
    return listing.words_of(args)._replace(with_plain=reads_plain, plain_prompt=args.preserve_prompt)


def selection_of(args: argparse.Namespace, base: BaseModel) -> Selection:
    return selection.selection_of(
        args, with_image=base.takes_image, whole=base.fixed_size is not None, largest_size=base.largest_size
    )


def cache_of(args: argparse.Namespace, listed: Listing) -> Path:
    return args.latents_cache_dir or listed.folders[0].path / CACHE


def prepare_data(
    args,
    accelerator: Accelerator,
    ranks: Ranks,
    *,
    base: BaseModel,
    dtype: torch.dtype,
    memory_plan: MemoryPlan,
    stop: signals.StopRequest,
) -> tuple[BaseModel, Parts]:
    """Returns the base model with its weights on disk, and the parts of the encoded dataset.

    T5 and the VAE are no longer in memory when it returns.
    """
    ranks = processes.stopping_together(ranks, stop)
    progress = partial(stop_checked, accelerator, ranks, stop)
    listed, chosen = read_listing(args), selection_of(args, base)
    cache = cache_of(args, listed)
    accelerator.print(listed.describe())
    sharing = processes.sharing(ranks, cache, "--latents_cache_dir")
    is_checked = not base.folder
    if is_checked:  # before weights are downloaded
        dataset.check_clips(
            listed, chosen, Notes(cache), ranks=sharing, everyone=ranks, progress=progress, check_all=args.check_all
        )
    base = download_weights(base)
    check_files(base)
    cut = {}
    video_encoder, text_encoder = encoders.encoders(
        base,
        dtype,
        accelerator.device,
        tiling=memory_plan.tile_encoding,
        slicing=args.enable_slicing,
        text_precision=args.text_encoder_precision,
        text_device="cpu" if args.text_encoder_device == "cpu" else accelerator.device,
        cut=cut,
    )
    with memory_explained(partial(encoding_advice, args, accelerator, ranks, base, memory_plan)):
        data = dataset.encode_dataset(
            listed,
            chosen,
            cache=cache,
            # "" is the unconditional prompt of guidance.
            prompts=[*validation.prompts(args), *validation.drift_prompts(args), ""],
            random_flip=args.random_flip,
            video_encoder=video_encoder,
            text_encoder=text_encoder,
            progress=progress,
            ranks=sharing,
            everyone=ranks,
            used_by=args.output_dir,
            check_all=args.check_all and not is_checked,
            before_encoding=partial(check_before_encoding, args, accelerator, ranks, base, memory_plan, listed),
            allow_damaged=args.allow_damaged,
        )
    say_after_encoding(accelerator, ranks, base, cut)
    return base, data.split(args.validation_split, args.seed)


def say_after_encoding(accelerator: Accelerator, ranks: Ranks, base: BaseModel, cut: dict[str, int]) -> None:
    """Says which captions were cut off, by how many tokens, and how much memory encoding took on a GPU."""
    if cut := dict(ranks.gather(list(cut.items()))):  # each rank has encoded others
        accelerator.print(encoders.describe_cut_captions(cut, base.transformer["max_text_seq_length"]))
    if accelerator.device.type == "cuda":  # later peaks are those of training
        peak_gib = run_directory.peak_memory_gib(accelerator.device)
        accelerator.print(f"peak memory of encoding: {peak_gib:.1f} GiB")
        torch.cuda.reset_peak_memory_stats(accelerator.device)


def check_before_encoding(
    args, accelerator, ranks: Ranks, base, memory_plan: MemoryPlan, listed: Listing, facts
) -> None:
    """Refuses what hours of encoding would not mend: clips that --image_share does not suit, and a lack of disk space.

    For the latter the main rank looks: there must be room for the cache, the next checkpoint and the result.
    """
    check_image_share(args, sum(of_clip.num_seen == 1 for of_clip in facts), len(facts))
    outlook = outlook_of(args, accelerator, ranks, base, memory_plan, listed=listed, facts=facts, num_checkpoints=1)
    output_dir = None if args.encode_only else args.output_dir
    check = partial(dry_run.check_disk, outlook, cache=cache_of(args, listed), output_dir=output_dir)
    processes.from_main(accelerator, check)


def outlook_of(
    args, accelerator, ranks: Ranks, base, memory_plan: MemoryPlan, *, listed: Listing, facts, num_checkpoints: int
) -> dry_run.Outlook:
    settings = memory_settings(args, base, DTYPES[accelerator.mixed_precision], accelerator.device, ranks.count)
    return dry_run.look_ahead(
        rehearsed_models(args, base),
        settings._replace(gradient_checkpointing=memory_plan.gradient_checkpointing),
        facts,
        captions={
            *itertools.chain(*(clip.captions + clip.plain_captions for clip in listed.clips)),
            *validation.prompts(args),
            *validation.drift_prompts(args),
            "",
        },
        views=2 if args.random_flip else 1,
        num_checkpoints=num_checkpoints,
        save_dtype=save_dtype(args, settings.dtype),
    )


def batch_size_of(args: argparse.Namespace, base: BaseModel) -> Callable[[tuple], int]:
    """Returns the number of clips in a micro-batch as a function of their latents' shape, (2c, f, h, w)."""
    if not args.max_tokens_per_batch:
        return lambda _: args.train_batch_size
    return lambda shape: max(1, args.max_tokens_per_batch // base.num_tokens(*shape[1:]))


def order_of(args: argparse.Namespace, base: BaseModel, data: Data) -> Order:
    """Returns the order of the clips that are learned; raises a ValueError if --image_share does not suit them."""
    order = regularization_order(args, base, data)._replace(
        random_flip=args.random_flip, caption_dropout=args.caption_dropout, still_share=args.image_share
    )
    check_image_share(args, len(order.stills), len(order.shapes))
    if args.image_share and not count_stills(order):
        least = 1 / (1 + sum(map(len, order.epoch(0))))
        raise ValueError(
            f"--image_share {args.image_share:g}: an epoch has too few videos for one image; pass at least {least:.2g}"
        )
    return order


def check_image_share(args: argparse.Namespace, num_stills: int, num_clips: int) -> None:
    """Refuses a share of images among clips that are all images, or all videos."""
    if args.image_share is None or 0 < num_stills < num_clips:
        return
    found, lacking = ("images", "videos") if num_stills else ("videos", "images")
    raise ValueError(f"--image_share {args.image_share:g}: the clips are only {found}; add {lacking}, or leave it out")


def regularization_order(args: argparse.Namespace, base: BaseModel, data: Data) -> Order:
    return data.order(
        seed=args.seed, batch_size=batch_size_of(args, base), bucket_group=args.bucket_group if args.buckets else 1
    )


def count_stills(order: Order) -> int:
    return sum(item.clip in order.stills for item in itertools.chain(*order.epoch(0)))


def describe_stills(order: Order) -> list[str]:
    """Returns a line on how many images an epoch shows, where --image_share decides it."""
    if order.still_share is None:
        return []
    shown = sum(map(len, order.epoch(0)))
    return [f"images: {count_stills(order)} of the {shown} clips that an epoch shows, drawn from {len(order.stills)}"]


def plan_updates(args, order: Order, ranks: Ranks, position: dict) -> Timeline:
    """Returns the updates of the run, from the position where it starts or resumes."""
    return make_timeline(
        batches_per_epoch=order.batches_per_epoch(),
        batches_per_step=ranks.count * args.gradient_accumulation_steps,
        epochs=args.num_train_epochs,
        max_steps=args.max_train_steps,
        **position,
    )


def stop_checked(
    accelerator: Accelerator, ranks: Ranks, stop: signals.StopRequest, items: Iterable, description: str, unit: str
) -> Iterator:
    """Yields the items with a progress bar; ends between two of them once a signal has arrived at one of the ranks."""
    return processes.until_stopped(progress_bar(accelerator, items, description, unit), ranks, stop)


def progress_bar(accelerator: Accelerator, items: Iterable | None, description: str, unit: str, **options) -> tqdm:
    is_shown = accelerator.is_main_process
    return tqdm(items, description, unit=unit, disable=not is_shown, delay=0 if items is None else 1, **options)


# ---- what is trained -------------------------------------------------------------------------------------------------


def save_dtype(args: argparse.Namespace, dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of the result; `dtype` is the one that the model computes in."""
    by_default = torch.float32 if args.training_type == "lora" else dtype
    return SAVE_DTYPES[args.save_precision] if args.save_precision else by_default


def prepare_transformer(
    args, base: BaseModel, memory_plan: MemoryPlan, dtype: torch.dtype, device: torch.device
) -> tuple[torch.nn.Module, lora.Export]:
    """Returns the transformer, in which only the trained weights require gradients, and the export of the result."""
    set_seed(args.seed)
    saved = save_dtype(args, dtype)
    if args.training_type == "lora":
        transformer, export = lora.with_lora(
            base, dtype, lora.lora_of(args), start=lora_to_start_from(args), device=device, save_dtype=saved
        )
    else:
        transformer, export = lora.whole(base, saved)
    compute.prepare(transformer, memory_plan.gradient_checkpointing, compute.options_of(args), device)
    return transformer.train(), export


def make_optimizer(args, parameters: list[torch.nn.Parameter], batches_per_step: int) -> torch.optim.Optimizer:
    options = {name: getattr(args, name) for name in optimizers.OPTIONS}
    if args.learning_rate == rate_search.AUTO:  # until it is found
        options["learning_rate"] = rate_search.FIRST_RATES[args.training_type]
    if args.scale_lr:
        options["learning_rate"] *= batches_per_step * args.train_batch_size
    return optimizers.make_optimizer(parameters, **options)


def make_lr_scheduler(args, optimizer: torch.optim.Optimizer, total_steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return optimizers.make_lr_scheduler(
        optimizer,
        args.lr_scheduler,
        warmup_steps=args.lr_warmup_steps,
        total_steps=total_steps,
        cycles=args.lr_num_cycles,
        power=args.lr_power,
    )


# ---- the loop --------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """Everything that the loop works with; it replaces none of it."""

    args: argparse.Namespace
    accelerator: Accelerator
    ranks: Ranks
    base: BaseModel
    dtype: torch.dtype
    memory_plan: MemoryPlan
    data: Data
    held_out: Data
    regularization: Data
    order: Order
    timeline: Timeline
    state: checkpoints.State
    export: lora.Export
    stop: signals.StopRequest
    failures: guard.Failures
    record: dict  # what a checkpoint records, beside the position
    self_checked: dict | None = None  # the figures of the self-check; None: it was not made
    rate_found: rate_search.Found | None = None  # None: it was given, or is the checkpoint's

    def image_encoder(self) -> AbstractContextManager[Callable | None]:
        tiling, slicing = self.memory_plan.tile_encoding, self.args.enable_slicing
        return encoders.image_encoder(self.base, self.dtype, self.accelerator.device, tiling=tiling, slicing=slicing)

    def micro_batches(self) -> Iterator[tuple[int, dict, dict | None]]:
        """Yields the number of a micro-batch, the batch, and one of regularization clips where there are any."""
        with contextlib.ExitStack() as stack:

            def batches_of(data: Data, order: Order) -> Iterator[tuple[int, dict]]:
                workers = {"num_workers": self.args.dataloader_num_workers, "in_worker": signals.ignore}
                batches = dataset.micro_batches(data, order, self.timeline, self.ranks, **workers)
                return stack.enter_context(contextlib.closing(batches))

            kept = itertools.repeat((None, None))
            if self.regularization.shapes:
                kept = batches_of(self.regularization, regularization_order(self.args, self.base, self.regularization))
            for (number, batch), (_, regularization) in zip(batches_of(self.data, self.order), kept):
                yield number, batch, regularization


def checked_record(
    args: argparse.Namespace, accelerator: Accelerator, ranks: Ranks, base: BaseModel, *, data: Data, starting: Start
) -> tuple[dict, dict]:
    """Returns what checkpoints will record beside the position, and what of the clips and weights has changed.

    Raises:
        ValueError: clips or weights are not those of the checkpoint, and --change does not allow it.
    """
    record = {
        "options": options_of(args, accelerator),
        "processes": ranks.count,
        "base": {"identity": base.identity, "weights": encoders.transformer_fingerprint(base)},
        "data": data.record,
    }
    changed = course.check_content(starting.name, starting.saved, record, args.change)
    for line in course.describe(starting.name, changed):
        accelerator.print(line)
    return record, changed


def prepare_run(
    args: argparse.Namespace,
    accelerator: Accelerator,
    ranks: Ranks,
    *,
    base: BaseModel,
    dtype: torch.dtype,
    memory_plan: MemoryPlan,
    parts: Parts,
    starting: Start,
    stop: signals.StopRequest,
    record: dict,
) -> Run:
    """Returns what the loop works with: the model as it starts or as the checkpoint holds it."""
    order = order_of(args, base, parts.training)
    position = course.moved_position(starting.saved, order.batches_per_epoch())
    timeline = plan_updates(args, order, ranks, position)

    # What is trained is in float32, what is frozen in the compute dtype.
    transformer, export = prepare_transformer(args, base, memory_plan, dtype=dtype, device=accelerator.device)
    # No variable may hold the weights: FSDP2 would keep them whole on every GPU, beside its shards.
    optimizer = make_optimizer(args, lora.trained_parameters(transformer), timeline.batches_per_step)
    if args.loraplus_lr_ratio != 1:
        optimizers.multiply_learning_rate(optimizer, lora.loraplus_parameters(transformer), args.loraplus_lr_ratio)
    lr_scheduler = make_lr_scheduler(args, optimizer, timeline.total_steps)
    # The schedule is not prepared: accelerate would advance it once per rank.
    transformer, optimizer = accelerator.prepare(transformer, optimizer)
    average = optimizers.WeightAverage(lora.trained_parameters(transformer), args.ema_decay)
    state = checkpoints.State(transformer, optimizer, lr_scheduler, average)
    if starting.checkpoint:
        checkpoints.load_checkpoint(accelerator, state, starting, args.change)
    run = Run(
        args=args,
        accelerator=accelerator,
        ranks=ranks,
        base=base,
        dtype=dtype,
        memory_plan=memory_plan,
        data=parts.training if args.preserve else parts.training.without_plain_captions(),
        held_out=parts.held_out,
        regularization=parts.regularization,
        order=order,
        timeline=timeline,
        state=state,
        export=export,
        stop=stop,
        failures=guard.Failures(),
        record=record,
    )
    is_due = args.self_check == "always" or (args.self_check == "auto" and accelerator.device.type == "cuda")
    if is_due and not accelerator.is_fsdp2:
        with memory_explained(lambda: f"{training_advice(run)}; --self_check never leaves out the check"):
            run = run._replace(self_checked=check_computation(run))
    if args.learning_rate == rate_search.AUTO and not starting.checkpoint:
        with memory_explained(partial(training_advice, run)):
            run = run._replace(rate_found=find_learning_rate(run))
    return run


def check_computation(run: Run) -> dict:
    """Compares the transformer with diffusers' and PEFT's own code, on a clip of the run; returns the figures.

    Raises:
        ValueError: it computes something else on one of the ranks.
    """
    args, model, number = run.args, run.accelerator.unwrap_model(run.state.transformer), run.timeline.first_batch
    _, batch = run.data.micro_batch(number, run.order)
    # One clip will do, but blocks are compiled for a number of clips.
    batch = batch if args.compile else {name: tensor[:1] for name, tensor in batch.items()}
    with run.image_encoder() as encode_images:
        report = self_check.check(
            run.base,
            model,
            lora.lora_of(args),
            partial(loss_of, run, model, number, batch, encode_images),
            dtype=run.dtype,
            autocast=lora.needs_autocast(lora.lora_of(args)),
            attention=partial(compute.attention_kernel, args.attention_backend),
        )
    figures = report.as_json()
    if any(run.ranks.gather([bool(figures["wrong"])])):
        in_use = compute.ways_of_its_own(compute.options_of(args), run.memory_plan.gradient_checkpointing)
        raise ValueError(report.refusal(in_use) if figures["wrong"] else "--self_check: failed on another process")
    run.accelerator.print(
        f"self-check: {figures['compared']} outputs, gradients and weights of two blocks are those of diffusers and "
        f"PEFT, within rounding ({figures['seconds']:.1f} s)"
    )
    return figures


def find_learning_rate(run: Run) -> rate_search.Found:
    """Finds the learning rate by trials and sets it; the weights and the optimizer are then as they were.

    Raises:
        Stopped: a signal has arrived.
        CannotContinue: no rate has a finite loss, or the loss on held-out clips cannot be computed.
    """
    args, accelerator, state, total = run.args, run.accelerator, run.state, run.timeline.total_steps
    accelerator.print(rate_search.describe_plan(total))
    updates, number = min(rate_search.TRIAL_UPDATES, total), itertools.count(1)
    # The shards of this rank, where the weights are sharded, and in CPU memory: the memory plan knows of no copy.
    local = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in trained_by(state.optimizer)]
    start = [weight.detach().to("cpu", copy=True) for weight in local]
    scaler = accelerator.scaler.state_dict() if accelerator.scaler else None

    @torch.no_grad()
    def start_with(rate: float) -> None:
        for parameter, first in zip(local, start, strict=True):
            parameter.copy_(first)
        reshard(state.transformer)
        state.optimizer.state.clear()
        if scaler:
            accelerator.scaler.load_state_dict(scaler)
        course.set_learning_rate(state.optimizer, state.lr_scheduler, rate)

    def loss_of(rate: float) -> float:
        start_with(rate)
        loss = float("inf")
        with contextlib.suppress(validation.NotFinite):
            if train_on_trial(run, updates):
                loss = held_out_losses(run, with_drift=False)["validation_loss"]
        accelerator.print(f"trial {next(number)}: learning rate {rate:.1e}, loss {loss:.4f}")
        return loss

    first = rate_search.FIRST_RATES[args.training_type]
    try:
        found = rate_search.find(loss_of, first, trial_updates=updates, total_updates=total)
    except signals.Stopped as stopped:
        message = "stopped in the trials of learning rates; the same command starts again"
        raise signals.Stopped(stopped.number, message) from stopped
    except validation.Failed as failed:
        cause = validation.cause(failed, partial(memory_advice, run, "training"))
        raise CannotContinue(f"the trials of learning rates have failed: {cause}") from failed
    start_with(found.learning_rate)
    state.average.restart(0)
    accelerator.print(*rate_search.describe(found), sep="\n")
    return found


def train_on_trial(run: Run, updates: int) -> bool:
    """Makes the first updates of a run at a constant learning rate; returns whether the loss has stayed finite."""
    optimizer = run.state.optimizer
    for group, rate in zip(optimizer.param_groups, run.state.lr_scheduler.base_lrs):
        group["lr"] = rate  # no warm-up
    constant = optimizers.make_lr_scheduler(optimizer, "constant", warmup_steps=0, total_steps=updates)
    trial = run._replace(state=run.state._replace(lr_scheduler=constant, average=optimizers.WeightAverage([], None)))
    with contextlib.closing(run.micro_batches()) as micro_batches, run.image_encoder() as encode_images:
        for _ in progress_bar(run.accelerator, range(updates), "Trial", "update", leave=False):
            measured = update(trial, micro_batches, encode_images, requests=[run.stop.number])
            if signal := int(measured.requests[0]):
                raise signals.Stopped(signal, "stopped in a trial")
            if not isfinite(measured.loss):
                return False
    return True


def trained_by(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


class Update(NamedTuple):
    """The measurements of one update, the same on all ranks but for `losses`."""

    loss: float  # mean over the micro-batches of all ranks
    grad_norm: float  # before clipping
    learning_rate: float
    preservation_loss: float | None  # mean over those micro-batches that have one; None: none has
    prior_loss: float | None  # likewise, on regularization clips
    is_skipped: bool  # loss or gradient of a rank is not finite: the weights stay as they were
    requests: list[float]  # of each request, the largest of all ranks
    losses: dict[tuple[str, int], float]  # of this rank's micro-batches, by kind and number, of a skipped update


def update(
    run: Run, micro_batches: Iterator[tuple], encode_images: Callable | None, requests: Iterable[float] = ()
) -> Update:
    """Makes one update of the weights: batch, forward, backward, clip, step, schedule.

    Args:
        requests: numbers of this rank, which travel with what the ranks tell each other anyway.
    """
    args, accelerator = run.args, run.accelerator
    transformer, optimizer, lr_scheduler, average = run.state
    # Not the batches, which would take the memory of all micro-batches of an update.
    losses, preserved, prior_losses = {}, [], {}
    for _ in range(args.gradient_accumulation_steps):
        number, batch, regularization = next(micro_batches)
        with accelerator.accumulate(transformer), compute.attention_kernel(args.attention_backend):
            if is_preserved(run, number):
                preserved.append(preserve(run, transformer, number, batch, encode_images))
            if regularization:
                prior_losses[number] = regularize(run, transformer, number, regularization, encode_images)
            loss = loss_of(run, transformer, number, batch, encode_images)
            accelerator.backward(loss)  # divides by the number of micro-batches
        losses[number] = loss.detach()
    grad_norm = accelerator.clip_grad_norm_(trained_by(optimizer), args.max_grad_norm)
    mean_loss = sum(loss / args.gradient_accumulation_steps for loss in losses.values())

    # Waits for the GPU: the next update's first kernels start a little later, which a test on a GPU has to measure.
    added = [float(sum(preserved)), len(preserved), float(sum(prior_losses.values())), len(prior_losses)]
    told = processes.of_each_rank(accelerator, [mean_loss.item(), grad_norm.item(), *added, *requests])
    is_finite = bool(told[:, :2].isfinite().all())
    if is_finite:
        optimizer.step()
        average.step()
    elif accelerator.scaler:
        accelerator.scaler.update()  # lowers the scale of a float16 gradient that overflowed
    optimizer.zero_grad()
    learning_rate = lr_scheduler.get_last_lr()[0]
    lr_scheduler.step()
    return Update(
        loss=(told[:, 0].sum() / len(told)).item(),
        grad_norm=told[:, 1].max().item(),
        learning_rate=learning_rate,
        is_skipped=not is_finite,
        preservation_loss=(told[:, 2].sum() / told[:, 3].sum()).item() if told[:, 3].any() else None,
        prior_loss=(told[:, 4].sum() / told[:, 5].sum()).item() if told[:, 5].any() else None,
        requests=told[:, 6:].amax(0).tolist(),
        losses={} if is_finite else named_losses("", losses) | named_losses(REGULARIZATION, prior_losses),
    )


def named_losses(kind: str, losses: dict[int, torch.Tensor]) -> dict[tuple[str, int], float]:
    return {(kind, number): loss.item() for number, loss in losses.items()}


def loss_of(
    run: Run, transformer, number: int, batch: dict, encode_images: Callable | None, kind: str = ""
) -> torch.Tensor:
    """Returns the loss of a micro-batch; only its number decides noise and dropout."""
    return training_loss(
        run.base,
        transformer,
        batch,
        generator=generator_of(run, number, kind),
        dtype=run.dtype,
        encode=encode_images,
        timesteps=timesteps_of(run, number, len(batch["parameters"]), kind),
        masking=masking_of(run),
    )


def timesteps_of(run: Run, number: int, count: int, kind: str) -> torch.Tensor | None:
    """Returns the timesteps of a micro-batch of `count` clips; None: the loss draws them."""
    if run.args.timestep_sampling == "uniform":
        return None
    generator = generator_for(torch.device("cpu"), run.args.seed, "timesteps", *filter(None, [kind]))
    timesteps = spread_timesteps(number, count, run.base.scheduler.config.num_train_timesteps, generator)
    return timesteps.to(run.accelerator.device)


def generator_of(run: Run, number: int, kind: str = "") -> torch.Generator:
    """Returns the generator of a micro-batch, once dropout, which draws from the global one, is seeded by it."""
    generator = generator_for(run.accelerator.device, run.args.seed, number, *filter(None, [kind]))
    torch.manual_seed(generator.initial_seed() % 2**63)
    return generator


def masking_of(run: Run) -> Masking:
    preserve = run.args.mask_preserve
    teacher = lora.base_of(run.accelerator.unwrap_model(run.state.transformer)) if preserve else None
    return Masking(run.args.mask_floor, preserve, teacher)


def is_preserved(run: Run, number: int) -> bool:
    """Whether a micro-batch also preserves the base model's predictions: all of an update do, so ranks work equally."""
    args = run.args
    return bool(args.preserve) and (run.timeline.step_of(number) - 1) % args.preserve_every == 0


def preserve(run: Run, transformer, number: int, batch: dict, encode_images: Callable | None) -> torch.Tensor:
    """Adds the gradient of the preservation loss of a micro-batch; returns the loss."""

    def loss_of_model(model) -> torch.Tensor:
        return preservation_loss(
            run.base, model, batch, generator_of(run, number), run.dtype, encode_images, teacher=lora.base_of(model)
        )

    return add_gradient(run.accelerator, transformer, loss_of_model, weight=run.args.preserve)


def regularize(run: Run, transformer, number: int, batch: dict, encode_images: Callable | None) -> torch.Tensor:
    """Adds the gradient of the loss on regularization clips beside a micro-batch; returns the loss.

    Prior preservation: Ruiz et al. 2022 (arXiv:2208.12242).
    """

    def loss_of_model(model) -> torch.Tensor:
        return loss_of(run, model, number, batch, encode_images, kind=REGULARIZATION)

    return add_gradient(run.accelerator, transformer, loss_of_model, weight=run.args.prior_loss_weight)


def add_gradient(accelerator: Accelerator, transformer, loss_of_model: Callable, weight: float) -> torch.Tensor:
    """Adds the gradient of a loss beside the training loss of a micro-batch; returns the loss.

    By itself, before the training loss, so that the activations of both are never in memory at once. Nothing is sent to
    other ranks here: the backward pass of the training loss sends the sum.
    """
    with accelerator.no_sync(transformer):
        loss = loss_of_model(accelerator.unwrap_model(transformer))
        accelerator.backward(weight * loss)
    return loss.detach()  # its value would wait for the GPU


def train(run: Run, smoothed_loss: float | None) -> None:
    """Trains up to the last update; logs, saves and validates on the way.

    Raises:
        Stopped: a signal has asked for the end; a checkpoint of the last update is written.
        CannotContinue: too many updates in a row were skipped.
    """
    args, timeline = run.args, run.timeline
    if begins_with_validation(run) and (signal := validate(run, timeline.first_step)):
        raise signals.Stopped(signal, "stopped in the first validation; the same command starts again")

    # `seconds` of a row are those of updates only: the clock restarts after whatever else a turn does.
    clock_step, clock_start = timeline.first_step, time.perf_counter()
    last_saved, is_due, is_saved = clock_start, False, True
    shown = {"total": timeline.total_steps, "initial": timeline.first_step}
    with (
        contextlib.closing(run.micro_batches()) as micro_batches,
        run.image_encoder() as encode_images,
        progress_bar(run.accelerator, None, "Training", "update", **shown) as progress,
    ):
        for step in updates_left(run):
            is_late = args.save_minutes and time.perf_counter() > last_saved + 60 * args.save_minutes
            with memory_compared(run, step):
                measured = update(run, micro_batches, encode_images, requests=[run.stop.number, bool(is_late)])
            progress.update()

            signal, is_late = map(int, measured.requests)
            # Not on a skipped update: it would replace the last checkpoint that is known to be good.
            is_due = is_due or step % args.checkpointing_steps == 0 or is_late
            is_saved = (is_due and not measured.is_skipped) or step == timeline.total_steps or signal
            is_logged = step % args.logging_steps == 0 and not measured.is_skipped
            is_validated = timeline.due(step, args.validation_steps, args.validation_epochs) and not signal
            if measured.is_skipped:
                count_skipped(run, step, measured, encode_images)
            else:
                run.failures.skipped_in_a_row = 0
            if is_logged:
                seconds = (time.perf_counter() - clock_start) / (step - clock_step)
                smoothed_loss = smoothed(measured.loss, smoothed_loss, weight=args.logging_steps / step)
                log(run, step, measured, smoothed_loss=smoothed_loss, seconds=seconds)
                progress.set_postfix(loss=f"{smoothed_loss:.4f}", lr=f"{measured.learning_rate:.2e}", refresh=False)
            if is_saved:
                save(run, step)
                last_saved, is_due = time.perf_counter(), False
            if is_validated and (signal := validate(run, step)) and not is_saved:
                save(run, step)
            if signal:
                raise signals.Stopped(signal, stopped_message(step))
            if is_logged or is_saved or is_validated:
                clock_step, clock_start = step, time.perf_counter()
    if not is_saved:  # it has ended before its last update
        save(run, step)


@contextlib.contextmanager
def memory_compared(run: Run, step: int) -> Iterator[None]:
    """Says so if a GPU's peak in the second update, once the optimizer has its state, is not as predicted."""
    device = run.accelerator.device
    if device.type != "cuda" or step != run.timeline.first_step + 2:
        yield
        return
    torch.cuda.reset_peak_memory_stats(device)  # of validation
    yield
    # A rehearsal is of the largest size, and of blocks that are not compiled.
    is_largest = len(set(run.order.shapes)) == 1 and not run.args.compile
    peak_gib = run_directory.peak_memory_gib(device)
    if remark := budget.remark_on_peak(run.memory_plan, peak_gib, is_largest=is_largest):
        run.accelerator.print(f"\n{remark}")


def updates_left(run: Run) -> Iterator[int]:
    """Yields the numbers of the updates to make, up to the last one or until the run is over."""
    args, timeline = run.args, run.timeline
    for step in range(timeline.first_step + 1, timeline.total_steps + 1):
        is_validated = timeline.due(step - 1, args.validation_steps, args.validation_epochs)
        if (is_validated or step == timeline.first_step + 1) and is_over(run):
            return
        yield step


def is_over(run: Run) -> bool:
    """Whether the held-out loss has not fallen for as long as --stop_patience allows; says so. All ranks must call it.

    The records of the run decide, so a resumed one knows of earlier validations.
    """
    output_dir = run.args.output_dir
    if run.args.stop_patience is None:
        return False

    def why() -> str | None:
        try:
            return stopping.reason(run_directory.read_metrics(output_dir), run_directory.read_args(output_dir))
        except ValueError as error:
            raise CannotContinue(f"--stop_patience: {error}") from error

    reason = processes.from_main(run.accelerator, why)
    if reason:
        on = "--resume_from_checkpoint auto with a larger --stop_patience continues"
        run.accelerator.print(f"\nthe run ends here: {reason}; {on}")
    return reason is not None


def stopped_message(step: int) -> str:
    return (
        f"stopped after update {step}: checkpoint-{step} is written; the same command with --resume_from_checkpoint "
        "auto continues"
    )


def count_skipped(run: Run, step: int, measured: Update, encode_images: Callable | None) -> None:
    """Counts and logs an update that was skipped. Every rank must call it.

    Raises:
        CannotContinue: it is one of too many in a row.
    """
    failures, scaler = run.failures, run.accelerator.scaler
    is_overflow = scaler and isfinite(measured.loss) and scaler.get_scale() >= 1
    suspected = guard.suspected(measured.losses).items()
    found = [suspect(run, *micro_batch, loss, encode_images) for micro_batch, loss in suspected]
    suspects = run.ranks.gather(found)
    reasons = [str(one) for one in suspects]
    if is_overflow:
        reasons = [f"float16 gradients overflowed; their scale is now {scaler.get_scale():g}"]
    failures.skipped += 1
    failures.skipped_in_a_row += not is_overflow
    run.accelerator.print(f"\nupdate {step} is skipped: not finite: {'; '.join(reasons)}")
    row = {"step": step, "epoch": round(run.timeline.epoch(step), 4), "skipped_updates": failures.skipped}
    run_directory.log_skipped(run.accelerator, run.args.output_dir, row, reasons)
    if failures.skipped_in_a_row == run.args.max_skipped_updates:
        precision, rate = run.accelerator.mixed_precision, measured.learning_rate
        raise CannotContinue(
            f"{failures.skipped_in_a_row} updates in a row were not finite (--max_skipped_updates), the last one: "
            f"{'; '.join(reasons)}. {guard.advice(suspects, precision=precision, learning_rate=rate)}. The weights are "
            "as before these updates, and no checkpoint was written since; --resume_from_checkpoint auto continues "
            "from the last one, or begins again where there is none"
        )


def suspect(run: Run, kind: str, number: int, loss: float, encode_images: Callable | None) -> guard.Suspect:
    """Reads a micro-batch once more, for what there is to say about it."""
    data, order = run.data, run.order
    if kind == REGULARIZATION:
        data = run.regularization
        order = regularization_order(run.args, run.base, data)
    clips, batch = data.micro_batch(number, order)
    out_channels = run.base.transformer["out_channels"]
    timesteps = guard.drawn_timesteps(
        lambda record: loss_of(run, record, number, batch, encode_images, kind), out_channels
    )
    return guard.Suspect(clips, timesteps, loss, guard.extremes(batch))


def smoothed(loss: float, previous: float | None, weight: float) -> float:
    """Returns a running mean: over all rows while `weight`, one by their number, is large; over about 50 later."""
    return loss if previous is None else previous + (loss - previous) * max(weight, 0.02)


def log(run: Run, step: int, measured: Update, *, smoothed_loss: float, seconds: float) -> None:
    """Writes one row of metrics; `seconds` is the time of one update."""
    row = {
        "step": step,
        "epoch": round(run.timeline.epoch(step), 4),
        "loss": measured.loss,
        "loss_smoothed": smoothed_loss,
        "lr": measured.learning_rate,
        "grad_norm": measured.grad_norm,
        "seconds": round(seconds, 4),
    }
    for name in ("preservation_loss", "prior_loss"):
        if (value := getattr(measured, name)) is not None:
            row[name] = value
    run_directory.log_row(run.accelerator, run.args.output_dir, row)


def save(run: Run, step: int) -> None:
    checkpoints.save_checkpoint(
        run.accelerator,
        run.state,
        run.export,
        run.args.output_dir,
        record=run.timeline.position(step) | run.record,
        total_limit=run.args.checkpoints_total_limit,
    )
    write_report(run)


def write_report(run: Run) -> None:
    """Writes the page of the run; training does not need it."""
    if run.accelerator.is_main_process:
        try:
            report.write_report(run.args.output_dir)
        except (ValueError, OSError) as error:
            print(f"\nreport.html is not written: {error}")


def begins_with_validation(run: Run) -> bool:
    """Whether to validate before the first update: in a fresh run, or to make up for what an interrupted run missed."""
    args, step = run.args, run.timeline.first_step
    is_due = run.timeline.due(step, args.validation_steps, args.validation_epochs) if step else args.validate_first
    is_complete = partial(run_directory.is_validated, args.output_dir, step, with_loss=bool(run.held_out.shapes))
    return is_due and not processes.from_main(run.accelerator, is_complete)


def validate(run: Run, step: int) -> int:
    """Samples videos and computes the loss on held-out clips, both with the moving average if there is one.

    Returns:
        The signal that has cut it short; 0 if none has.

    Raises:
        CannotContinue: it has failed as often in a row as is allowed; less often, training continues.
    """
    motion, losses, failures = {}, {}, run.failures
    try:
        with run.state.average.applied(run.state.transformer), validation.failing_together(partial(agree, run)):
            if run.args.validation_prompt:
                motion = sample_videos(run, step)
            if run.held_out.shapes:
                losses = held_out_losses(run, with_drift=measures_drift(run.args))
    except signals.Stopped as stopped:
        return stopped.number
    except validation.Failed as failed:
        failures.validations_in_a_row += 1
        cause = validation.cause(failed, partial(memory_advice, run, "validation"))
        message = f"the validation after update {step} has failed: {cause}"
        if failures.validations_in_a_row == validation.MOST_FAILURES:
            raise CannotContinue(f"{message}; {validation.MOST_FAILURES} have failed in a row") from failed
        run.accelerator.print(f"\n{message}; training continues")
        return 0
    failures.validations_in_a_row = 0
    if motion or losses:
        keep_measures(run, step, motion, losses)
    write_report(run)
    return 0


def keep_measures(run: Run, step: int, motion: dict[str, float], losses: dict[str, float]) -> None:
    """Keeps the result if it is the best so far, and logs the motion of the videos and the losses on held-out clips."""
    if step and losses:  # never the base model
        checkpoints.save_best(run.accelerator, run.state, run.export, run.args.output_dir, step=step, losses=losses)
    # Last: the row tells a resumed run that this validation is complete.
    row = {"step": step, "epoch": round(run.timeline.epoch(step), 4)} | motion | losses
    run_directory.log_row(run.accelerator, run.args.output_dir, row, group="validation")
    if losses:
        run.accelerator.print(f"\nupdate {step}: loss on held-out clips {losses['validation_loss']:.4f}")
    if step and run.accelerator.is_main_process:
        try:
            remarks = remarks_on(run.args.output_dir, motion, losses)
        except ValueError as error:
            remarks = [f"no remarks on this validation: {error}"]
        for remark in remarks:
            print(f"\nupdate {step}: {remark}")


def remarks_on(output_dir: Path, motion: dict[str, float], losses: dict[str, float]) -> list[str]:
    """Returns sentences on what a validation shows beside those before it.

    Raises:
        ValueError: a record in `output_dir` is damaged.
    """
    remarks = []
    if motion:
        base = run_directory.base_motion(output_dir)
        remarks.append(validation.remark_on_motion(motion["validation_motion"], base, motion.get("data_motion")))
    if "drift" in losses:
        since = stopping.clips_changed_at(run_directory.read_args(output_dir))
        rows = [row for row in run_directory.read_metrics(output_dir) if "drift" in row and row["step"] > since]
        remarks.append(validation.remark_on_drift(rows))
    return list(filter(None, remarks))


def agree(run: Run, error: Exception | None = None) -> None:
    """Ends a validation on all ranks once one of them has failed or received a signal. Every rank must call it.

    Raises:
        Stopped: a signal has arrived.
        validation.Failed: `error`, or one of another rank.
    """
    if error and run.accelerator.is_fsdp2:  # the others wait in the middle of a forward pass
        is_memory = budget.is_out_of_memory(error)
        cause = memory_advice(run, "validation") if is_memory else f"{type(error).__name__}: {error}"
        raise CannotContinue(f"a validation has failed: {cause}") from error
    signal, failed = processes.of_each_rank(run.accelerator, [run.stop.number, error is not None]).amax(0).tolist()
    if signal:
        raise signals.Stopped(int(signal), "stopped in a validation")
    if failed:
        raise validation.Failed(error or "on another process") from error


def held_out_losses(run: Run, *, with_drift: bool) -> dict[str, float]:
    """Returns the losses on held-out clips, and the drift from the base model."""
    args, transformer = run.args, run.state.transformer
    with run.image_encoder() as encode_images:
        held_out = validation.HeldOut(
            run.accelerator,
            run.ranks,
            run.base,
            data=run.held_out,
            encode_images=encode_images,
            seed=args.seed,
            dtype=run.dtype,
            masking=Masking(args.mask_floor),
            agree=partial(agree, run),
        )
        with_clips = args.stop_patience is not None
        losses = validation.held_out_losses(held_out, transformer, with_clips=with_clips)
        if with_drift:
            try:
                losses |= validation.drift(held_out, transformer, validation.drift_prompts(args))
            except validation.NotFinite as error:  # the losses are
                run.accelerator.print(f"\n{error}; no drift is recorded")
    return losses


def sample_videos(run: Run, step: int) -> dict[str, float]:
    """Samples the validation videos; returns how much they and the training clips move, as far as that is known."""
    args, device, tiling = run.args, run.accelerator.device, run.memory_plan.tile_decoding
    view = run.data.selection.view
    size = {"height": view.height, "width": view.width}
    options = size | {"num_frames": view.max_num_frames, "guidance_scale": args.guidance_scale}
    options |= {"use_dynamic_cfg": True} if args.use_dynamic_cfg else {}
    motion = validation.sample_videos(
        run.accelerator,
        run.ranks,
        run.base,
        run.state.transformer,
        vae=encoders.loaded_vae(run.base, run.dtype, device, tiling=tiling, slicing=args.enable_slicing),
        cases=validation.cases(run.data, validation.prompts(args), validation.images(args), **size),
        prompt_embeds=run.data.read_prompts(),
        output_dir=args.output_dir,
        step=step,
        seeds=range(args.seed, args.seed + args.num_validation_videos),
        fps=args.fps,
        video_options=options,
        comment_of=how_to_repeat(run, step, options),
        agree=partial(agree, run),
    )
    of_data = run.data.motion(args.fps)
    return motion | {"data_motion": of_data} if motion and of_data is not None else motion


def how_to_repeat(run: Run, step: int, video_options: dict) -> Callable[[str, int, Path | None], str]:
    """Returns the command that makes a validation video of this step again, by prompt, seed and its first image's path.

    Every rank must call it.
    """
    args, dtype = run.args, str(run.dtype).removeprefix("torch.")
    result = run_directory.checkpoint_folder(args.output_dir, step) if step else args.lora_path
    if step and not processes.from_main(run.accelerator, result.is_dir):
        return lambda *_: f"update {step} of {args.output_dir}, whose weights were not saved"
    if step == run.timeline.total_steps and args.result == "last":
        result = args.output_dir
    options = {"model_path": run.base.name}
    options |= {"lora_path" if args.training_type == "lora" else "transformer_path": result} if result else {}
    options |= video_options | {"fps": args.fps, "dtype": dtype, "enable_tiling": run.memory_plan.tile_decoding}
    words = ["python", "cli_demo.py"]
    for name, value in options.items():
        words += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]

    def command(prompt: str, seed: int, image: Path | None) -> str:
        of_image = ["--image_or_video_path", str(image)] if image else []
        return shlex.join([*words, "--prompt", prompt, "--seed", str(seed), *of_image])

    return command


def announce(run: Run, on_data: list[str], start: Start, changed: dict) -> float | None:
    """Describes the run in the terminal, args.json and the trackers; returns the smoothed loss of a resumed run."""
    args, accelerator, base, timeline = run.args, run.accelerator, run.base, run.timeline
    level, num_trained = run.memory_plan.gradient_checkpointing, lora.count_trained(run.state.transformer)
    is_auto = args.learning_rate == rate_search.AUTO
    lines = describe_run(
        args,
        accelerator,
        base,
        on_data=on_data,
        order=run.order,
        timeline=timeline,
        level=level,
        num_trained=num_trained,
        learning_rate=run.state.lr_scheduler.base_lrs[0] if is_auto else args.learning_rate,
    )
    found = run.rate_found.as_json() if run.rate_found else found_before(run, start)
    remarks = [patience_remark(args, timeline)]
    remarks += [rate_search.remark_on_length(found, timeline.total_steps)] if is_auto else []
    lines += filter(None, remarks)
    accelerator.print(*lines, sep="\n")
    record = {
        "step": timeline.first_step,
        "checkpoint": base.describe(),
        "clips": len(run.data.shapes),
        "processes": run.ranks.count,
        "data": on_data,
        "memory_plan": run.memory_plan.as_json(),
        "self_check": run.self_checked,
        "held_out": run.held_out.labels,
        "learning_rate_found": found,
        "options": vars(args),
    }
    run_directory.start_records(
        accelerator, args.output_dir, args.tracker_name, record, resumed_from=start.checkpoint, changed=changed
    )
    run.failures.skipped = run_directory.skipped_updates(args.output_dir)
    return run_directory.smoothed_loss(args.output_dir)


def patience_remark(args: argparse.Namespace, timeline: Timeline) -> str | None:
    """Returns a sentence if --stop_patience cannot end the run, supposing that its options have always been these."""
    if args.stop_patience is None:
        return None
    due = partial(timeline.due, every_steps=args.validation_steps, every_epochs=args.validation_epochs)
    count = args.validate_first + sum(map(due, range(1, timeline.total_steps)))
    return stopping.remark_on_patience(args.stop_patience, count)


def found_before(run: Run, start: Start) -> dict | None:
    """Returns what the trials of learning rates have found in the run that is resumed."""
    return run_directory.read_args(start.checkpoint.parent).get("learning_rate_found") if start.checkpoint else None


def describe_result(args: argparse.Namespace, result: Path) -> list[str]:
    """Returns lines on what a run has made, and the command that makes a video with it."""
    option = "lora_path" if args.training_type == "lora" else "transformer_path"
    prompt = (validation.prompts(args) or [" ".join(filter(None, [args.id_token, "..."]))])[0]
    words = ["python", "cli_demo.py", f"--{option}", str(args.output_dir), "--prompt", prompt]
    page = args.output_dir / run_directory.REPORT_FILE
    best = run_directory.read_best(args.output_dir) if args.result == "best" else {}
    of_update = f" (update {best['step']}, the lowest loss on held-out clips)" if best else ""
    return [f"Result: {result}{of_update}", f"page of the run: {page}", f"a video with it: {shlex.join(words)}"]


def describe_run(
    args,
    accelerator: Accelerator,
    base: BaseModel,
    *,
    on_data: list[str],
    order: Order,
    timeline: Timeline,
    level: str,
    num_trained: int,
    learning_rate: float | str,
) -> list[str]:
    """Returns lines on the base model, the data, what is trained, how (`level` of recomputation), and the updates."""
    device = torch.device("cuda") if args.dry_run_gib else accelerator.device
    return [
        base.describe(),
        *on_data,
        f"{args.training_type}, {num_trained / 1e6:.4g} million weights, learning rate {learning_rate}",
        compute.describe(level, compute.options_of(args), DTYPES[accelerator.mixed_precision], device),
        *describe_stills(order),
        timeline.summary({order.batch_size(shape) for shape in order.shapes}),
        *base.remarks(selection_of(args, base).by_option, args.fps),
    ]


def report_dry_run(
    args, accelerator: Accelerator, ranks: Ranks, base: BaseModel, *, memory_plan: MemoryPlan, position: dict
) -> None:
    """Says what the run will do and take from `position` on, once the clips and the disk space for it are checked."""
    listed = read_listing(args)
    cache = cache_of(args, listed)
    accelerator.print(listed.describe())
    checked = dataset.check_clips(
        listed,
        selection_of(args, base),
        Notes(cache, read_only=True),
        ranks=ranks,
        everyone=ranks,
        progress=partial(progress_bar, accelerator),
        check_all=args.check_all,
    )
    parts = dataset.unencoded(checked, base.latent_shape).split(args.validation_split, args.seed)
    order = order_of(args, base, parts.training)
    timeline = plan_updates(args, order, ranks, position)
    level = memory_plan.gradient_checkpointing
    num_checkpoints = timeline.count_checkpoints(args.checkpointing_steps, args.checkpoints_total_limit)
    outlook = outlook_of(
        args, accelerator, ranks, base, memory_plan, listed=listed, facts=checked.facts, num_checkpoints=num_checkpoints
    )
    dry_run.check_disk(outlook, cache=cache, output_dir=args.output_dir)
    lines = describe_run(
        args,
        accelerator,
        base,
        on_data=parts.describe(),
        order=order,
        timeline=timeline,
        level=level,
        num_trained=outlook.num_trained,
        learning_rate=args.learning_rate,
    )
    if args.learning_rate == rate_search.AUTO:
        lines.append(rate_search.describe_plan(timeline.total_steps))
    lines += filter(None, [patience_remark(args, timeline)])
    accelerator.print(*lines, *dry_run.describe(outlook, memory_plan.phases), sep="\n")


# ---- the story -------------------------------------------------------------------------------------------------------


@processes.endings_explained()
def main(args: argparse.Namespace) -> None:
    with signals.noted() as stop, contextlib.ExitStack() as held:
        with processes.explained():
            # Start: whatever can be refused is refused before anything is loaded.
            accelerator, ranks = start(args)
            dtype = DTYPES[accelerator.mixed_precision]
            base = read_base(args, dtype, accelerator.device)
            starting, changed = where_to_start(args, accelerator, base, ranks=ranks, held=held)
            make_optimizer(args, [torch.nn.Parameter(torch.zeros(1))], batches_per_step=1)  # refuses missing packages
            uploads = args.push_to_hub and not args.dry_run and not args.encode_only
            if uploads:
                create_repo = partial(hub.create_hub_repo, args.hub_model_id, args.hub_token)
                hub_repo = processes.from_main(accelerator, create_repo)
            memory_plan = plan_memory(args, accelerator, ranks, base, dtype)
            if args.dry_run:
                report_dry_run(args, accelerator, ranks, base, memory_plan=memory_plan, position=starting.position)
                end(accelerator)
                return

            # Data: read, checked and encoded, before the transformer comes in.
            base, parts = prepare_data(
                args, accelerator, ranks, base=base, dtype=dtype, memory_plan=memory_plan, stop=stop
            )
            if args.encode_only:
                accelerator.print(*parts.describe(), dataset.describe_cache(parts), sep="\n")
                end(accelerator)
                return

            # What is trained, and from where.
            record, other_content = checked_record(
                args, accelerator, ranks, base, data=parts.training, starting=starting
            )
            run = prepare_run(
                args,
                accelerator,
                ranks,
                base=base,
                dtype=dtype,
                memory_plan=memory_plan,
                parts=parts,
                starting=starting,
                stop=stop,
                record=record,
            )
            processes.stopping_together(ranks, stop).wait()
            smoothed_loss = announce(run, parts.describe(), starting, changed | other_content)

        with memory_explained(partial(training_advice, run)):
            train(run, smoothed_loss)

        # Result.
        limit = args.checkpoints_total_limit
        result = checkpoints.save_result(
            accelerator, run.state, run.export, args.output_dir, total_limit=limit, kind=args.result
        )
        write_report(run)
        accelerator.print(*describe_result(args, result), sep="\n")
        end(accelerator)
    if uploads and accelerator.is_main_process:  # the other ranks do not wait for the upload
        hub.push_to_hub(
            hub_repo,
            args.output_dir,
            base,
            name=args.hub_model_id,
            options=vars(args),
            token=args.hub_token,
            signal=stop.number,
        )


if __name__ == "__main__":
    main(parse_args())
