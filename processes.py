"""The processes of a run: how they start, and end with a message."""

import contextlib
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    gather_object,
)

from dataset import Ranks


def start(
    *,
    mixed_precision: str | None,
    gradient_accumulation_steps: int,
    report_to: str,
    output_dir: Path,
    logging_dir: Path,
) -> tuple[Accelerator, Ranks]:
    """The arguments are the training script's options of the same names.

    Raises:
        ValueError: one of them cannot be had here.
    """
    _check_gpu_of_this_process()
    # Ranks without a validation video wait for the others, with 1.5 for more than NCCL's ten minutes.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=1))
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # torch 2.11 has no other name for it
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    try:
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            log_with=None if report_to == "none" else report_to,
            project_config=ProjectConfiguration(str(output_dir), str(output_dir / logging_dir)),
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                gradient_accumulation_steps, sync_with_dataloader=False
            ),
            kwargs_handlers=[ddp, patience],
        )
    except (ValueError, ImportError) as error:
        raise ValueError(f"{error} (--mixed_precision {mixed_precision}, --report_to {report_to})") from error
    if report_to != "none" and not accelerator.log_with:
        raise ValueError(f"--report_to {report_to}: not installed; pip install {report_to}, or leave it out")
    place = accelerator.process_index, accelerator.num_processes
    return accelerator, Ranks(*place, gather_object, accelerator.wait_for_everyone)


def _check_gpu_of_this_process() -> None:
    rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if torch.cuda.is_available() and rank >= gpus and os.environ.get("ACCELERATE_USE_CPU") != "true":
        raise ValueError(f"process {rank + 1} of this machine: it has {gpus} GPUs; pass --num_processes {gpus}")


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
