"""The processes of a run: how they start, what they see of each other's disks, and how they end with a message."""

import contextlib
import os
import secrets
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from clips.order import Ranks
from files import publish


def start(
    *,
    mixed_precision: str | None,
    gradient_accumulation_steps: int,
    report_to: str,
    output_dir: Path,
    logging_dir: Path,
    ddp_timeout: int,
    autocast: bool,
) -> tuple[Accelerator, Ranks]:
    """The arguments are the training script's options of the same names.

    Args:
        autocast: whether what is computed by weights in float32 is to be cast where that is quicker.

    Raises:
        ValueError: one of them cannot be had here.
    """
    _check_gpu_of_this_process()
    patience = InitProcessGroupKwargs(timeout=timedelta(seconds=ddp_timeout))
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # torch 2.11 has no other name for it
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    sharding = _sharding(mixed_precision)
    try:
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            log_with=None if report_to == "none" else report_to,
            project_config=ProjectConfiguration(str(output_dir), str(output_dir / logging_dir)),
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                gradient_accumulation_steps,
                sync_with_dataloader=False,
                sync_each_batch=sharding is not None,  # or each GPU would hold the gradients of all weights
            ),
            kwargs_handlers=[ddp, patience, AutocastKwargs(enabled=autocast)],
            fsdp_plugin=sharding,
        )
    except (ValueError, ImportError) as error:
        raise ValueError(f"{error} (--mixed_precision {mixed_precision}, --report_to {report_to})") from error
    if report_to != "none" and not accelerator.log_with:
        raise ValueError(f"--report_to {report_to}: not installed; pip install {report_to}, or leave it out")
    place = accelerator.process_index, accelerator.num_processes
    return accelerator, Ranks(*place, gather_object, accelerator.wait_for_everyone)


def _sharding(mixed_precision: str | None) -> FullyShardedDataParallelPlugin | None:
    """FSDP2 if accelerate's config file asks for FSDP, with what the file cannot say."""
    if os.environ.get("ACCELERATE_USE_FSDP") != "true":
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("FSDP, version 1, in accelerate's config: FSDP2 is what is supported; set fsdp_version: 2")
    precision = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision == "fp16":
        raise ValueError("FSDP with --mixed_precision fp16: it trains in bf16 or no (float32); pass one of those")
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the rotary tables stay float32, as the pipeline has them
    )
    # What the transformer returns is never changed in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    return FullyShardedDataParallelPlugin(mixed_precision_policy=policy)


def _check_gpu_of_this_process() -> None:
    rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if torch.cuda.is_available() and rank >= gpus and os.environ.get("ACCELERATE_USE_CPU") != "true":
        raise ValueError(f"process {rank + 1} of this machine: it has {gpus} GPUs; pass --num_processes {gpus}")


def from_main(accelerator: Accelerator, function: Callable, *args):
    """What `function` gives on the main rank, whose disk has the run directory, for every rank; or what it raises."""
    outcome = None
    if accelerator.is_main_process:
        try:
            outcome = function(*args)
        except (ValueError, FileNotFoundError) as error:
            outcome = error
    (outcome,) = broadcast_object_list([outcome])
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def sharing(ranks: Ranks, folder: Path, option: str) -> Ranks:
    """Those of the ranks that see the same `folder` as this one; all of them, where there is one machine.

    The first process of each machine leaves a file there, and all look which ones they see.

    Raises:
        ValueError: the folder cannot be written to.
    """
    if ranks.count <= int(os.environ.get("LOCAL_WORLD_SIZE", ranks.count)):
        return ranks
    mark = folder / f".machine-{secrets.token_hex(8)}"
    first = os.environ["LOCAL_RANK"] == "0"
    problem = None
    if first:
        try:
            publish(mark, b"")
        except OSError as error:
            problem = f"{folder}: cannot be written to ({error.strerror}); give another folder with {option}"
    if problems := ranks.gather([problem] if problem else []):
        raise ValueError("; ".join(problems))
    marks = ranks.gather([mark] if first else [])
    seen = tuple(mark.name for mark in marks if (folder / mark.name).exists())
    here = [rank for rank, other in ranks.gather([(ranks.index, seen)]) if other == seen]
    ranks.wait()
    if first:
        mark.unlink()
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()

    def gather(items: list) -> list:
        return [item for marks, item in ranks.gather([(seen, item) for item in items]) if marks == seen]

    return Ranks(here.index(ranks.index), len(here), gather, ranks.wait)


def check_shared(ranks: Ranks, folder: Path, option: str) -> None:
    """Refuses a folder that not all machines of the run see."""
    if sharing(ranks, folder, option).count < ranks.count:
        raise ValueError(
            f"{option} {folder}: the machines of this run do not see the same folder, and all write to it; put it on a "
            "shared disk"
        )


@contextlib.contextmanager
def explained():
    """Turns what a person can mend into one message and exit code 2; every rank says it, the first one in full."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        rank, script = int(os.environ.get("RANK", 0)), Path(sys.argv[0]).name
        message = f"{script}: error: {error}" if rank == 0 else f"[rank {rank}] {error}".splitlines()[0]
        print(message, file=sys.stderr, flush=True)
        leave = os._exit if torch.distributed.is_initialized() else sys.exit  # gloo's threads can abort a normal end
        leave(2)


# In gloo's errors, plain RuntimeErrors, and NCCL's, when it is another process that is gone.
LOST = (
    "closed by peer",
    "reset by peer",
    "Timed out waiting",
    "Broken pipe",
    "remote process exited",
    "ncclRemoteError",
)


@contextlib.contextmanager
def lost_processes_explained():
    """Ends this process with a message when another one of the run is gone, where torch would only name a socket.

    NCCL's watchdog may end a process itself before an error gets here.
    """
    try:
        yield
    except RuntimeError as error:
        if not torch.distributed.is_initialized() or not any(words in str(error) for words in LOST):
            raise
        print(
            f"\n{error}\n[rank {os.environ['RANK']}] another process of the run is gone, or its machine, or the "
            "network between. The message of the one that ended first says why; all end now. Start all again with "
            "--resume_from_checkpoint latest.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
