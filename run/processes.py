"""The processes of a run: how they start, which of them share a disk, and how they end with a message."""

import contextlib
import errno
import os
import secrets
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

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
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.fsdp import MixedPrecisionPolicy

from clips.order import Ranks
from cogvideox.budget import is_out_of_memory
from files import CannotContinue, publish
from run.signals import Stopped, StopRequest

SECONDS_PER_LOOK = 1  # from one look for the signals of other ranks to the next
STOP_KEY = "stopped by a signal"


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
    """Connects the processes; the arguments are the training script's options of the same names.

    Args:
        autocast: whether to compute float32 weights in the lower precision where that is faster.

    Raises:
        ValueError: this machine cannot provide one of them.
    """
    _check_gpu_of_this_process()
    process_group = InitProcessGroupKwargs(timeout=timedelta(seconds=ddp_timeout))
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
                sync_each_batch=sharding is not None,  # otherwise each GPU would hold the gradients of all weights
            ),
            kwargs_handlers=[ddp, process_group, AutocastKwargs(enabled=autocast)],
            fsdp_plugin=sharding,
        )
    except (ValueError, ImportError) as error:
        raise ValueError(f"{error} (--mixed_precision {mixed_precision}, --report_to {report_to})") from error
    if report_to != "none" and not accelerator.log_with:
        raise ValueError(f"--report_to {report_to}: not installed; pip install {report_to}, or leave it out")
    wait = accelerator.wait_for_everyone
    return accelerator, Ranks(accelerator.process_index, accelerator.num_processes, gather=gather_object, wait=wait)


def _sharding(mixed_precision: str | None) -> FullyShardedDataParallelPlugin | None:
    """Returns FSDP2's settings that accelerate's config file cannot hold; None unless the file asks for FSDP."""
    if os.environ.get("ACCELERATE_USE_FSDP") != "true":
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("FSDP, version 1, in accelerate's config: only FSDP2 is supported; set fsdp_version: 2")
    precision = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision == "fp16":
        raise ValueError("FSDP with --mixed_precision fp16: sharded training runs in bf16 or no (float32); pass one")
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # keeps the rotary tables in float32, as in the pipeline
    )
    # The output of the transformer is never changed in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    return FullyShardedDataParallelPlugin(mixed_precision_policy=policy)


def _check_gpu_of_this_process() -> None:
    rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if torch.cuda.is_available() and rank >= gpus and os.environ.get("ACCELERATE_USE_CPU") != "true":
        raise ValueError(
            f"process {rank + 1} of this machine: it has {gpus} GPUs, and each process needs its own; pass "
            f"--num_processes {gpus} (on several machines: the sum of their GPUs)"
        )


def free_bytes(device: torch.device, root: Path = Path("/")) -> int | None:
    """Returns the free memory that this process has to itself, of its GPU or of the machine; None if it is not known.

    On a CPU, the processes of a machine share what it has free, and what a control group leaves them of it.

    Args:
        root: the folder with /proc and /sys.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo, group = root / "proc/meminfo", root / "sys/fs/cgroup"
    if not meminfo.exists():
        return None
    values = dict(line.split(":") for line in meminfo.read_text().splitlines())
    free = 1024 * int(values["MemAvailable"].split()[0])
    limit = group / "memory.max"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        file_cache = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["inactive_file"]
        free = min(free, int(most) - int((group / "memory.current").read_text()) + int(file_cache))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def from_main(accelerator: Accelerator, function: Callable):
    """Calls `function` on the main rank, whose disk holds the run directory; returns or raises the outcome on all."""
    outcome = None
    if accelerator.is_main_process:
        try:
            outcome = function()
        except (ValueError, OSError, CannotContinue) as error:
            outcome = error
    (outcome,) = broadcast_object_list([outcome])
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def of_each_rank(accelerator: Accelerator, values: list[float]) -> torch.Tensor:
    """Returns the values of all ranks, [ranks, values], float32, on the CPU. Every rank must call it."""
    own = torch.tensor([values], dtype=torch.float32)
    return own if accelerator.num_processes == 1 else accelerator.gather(own.to(accelerator.device)).cpu()


def sharing(ranks: Ranks, folder: Path, option: str) -> Ranks:
    """Returns the ranks that see the same `folder` as this one; on a single machine these are all ranks.

    The first process of each machine writes a file there, and every rank looks which of these files it sees.

    Raises:
        ValueError: the folder is not writable; `option` names the flag that sets it.
    """
    if ranks.count <= int(os.environ.get("LOCAL_WORLD_SIZE", ranks.count)):
        return ranks
    own_mark = folder / f".machine-{secrets.token_hex(8)}"
    is_first_of_machine = os.environ["LOCAL_RANK"] == "0"
    marks, problems = [], []
    try:
        if is_first_of_machine:
            try:
                publish(own_mark, b"")
                marks = [own_mark.name]
            except OSError as error:
                problems = [f"{folder}: cannot be written to ({error.strerror}); pass another folder with {option}"]
        if problems := ranks.gather(problems):
            raise ValueError("; ".join(problems))
        seen = tuple(mark for mark in ranks.gather(marks) if (folder / mark).exists())
        same_folder = [rank for rank, seen_there in ranks.gather([(ranks.index, seen)]) if seen_there == seen]
        ranks.wait()
    finally:  # also where a signal, or the folder of another machine, ends the run
        if is_first_of_machine:
            with contextlib.suppress(OSError):  # it could not be written, or the folder is not empty
                own_mark.unlink()
                folder.rmdir()

    def gather(items: list) -> list:
        return [item for seen_there, item in ranks.gather([(seen, item) for item in items]) if seen_there == seen]

    return Ranks(index=same_folder.index(ranks.index), count=len(same_folder), gather=gather, wait=ranks.wait)


def check_shared(ranks: Ranks, folder: Path, option: str) -> None:
    """Refuses a folder that is not the same one on all machines of the run."""
    if sharing(ranks, folder, option).count < ranks.count:
        raise ValueError(
            f"{option} {folder}: the machines of this run do not see the same folder, and all of them write to it; "
            "put it on a shared disk"
        )


def stopping_together(ranks: Ranks, stop: StopRequest) -> Ranks:
    """Returns the same ranks; each of their exchanges ends the run on all of them once one has received a signal.

    Its functions raise Stopped.
    """

    def gather(items: list) -> list:
        told = ranks.gather([(stop.number, items)])
        if number := max(number for number, _ in told):
            message = "stopped before the first update: what is encoded stays, and the same command starts again"
            raise Stopped(number, message)
        return [item for _, items_of_rank in told for item in items_of_rank]

    return ranks._replace(gather=gather, wait=lambda: gather([]))


def until_stopped(items: Iterable, ranks: Ranks, stop: StopRequest) -> Iterator:
    """Yields the items, and ends between two of them on all ranks once a signal has arrived at one.

    The ranks have different items, which take long: a store tells one of the other's signal between two exchanges.

    Args:
        ranks: what `stopping_together` returns.

    Raises:
        Stopped: a signal has arrived.
    """
    looked = time.monotonic()
    for item in items:
        if stop.number or time.monotonic() > looked + SECONDS_PER_LOOK:
            looked = time.monotonic()
            _tell_of_stop(stop)
        if stop.number:
            ranks.wait()  # for the exchange that all come to; it ends the run
        yield item


def _tell_of_stop(stop: StopRequest) -> None:
    """Tells the other ranks of this one's signal, or learns of theirs."""
    if not torch.distributed.is_initialized():
        return
    store = _get_default_store()  # torch 2.13 has no public way to the store that connects the ranks
    if stop.number:
        store.set(STOP_KEY, str(stop.number))
    elif store.check([STOP_KEY]):
        stop.number = int(store.get(STOP_KEY))


@contextlib.contextmanager
def explained():
    """Turns errors that a user can fix into a message and exit code 2."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        _leave(2, f"error: {error}")


# Words in the errors of gloo (plain RuntimeErrors) and NCCL when another process has ended ...
LOST = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited", "ncclRemoteError")
# ... and when it has let --ddp_timeout pass; after that, gloo says the second of every exchange. The last are those of
# the store with which NCCL's communicators begin.
LATE = (
    "Timed out waiting", "Application timeout caused pair closure", "Watchdog caught collective operation timeout",
    "wait timeout after", "Socket Timeout",
)  # fmt: skip


LESS_MEMORY = "docs/hardware.md lists what needs less memory, and --dry_run predicts each phase"
# Errors of disks, folders and limits of the system, no faults of the script.
SURROUNDINGS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM, errno.EMFILE,
    errno.ENFILE,
}  # fmt: skip


@contextlib.contextmanager
def endings_explained():
    """Turns what ends a run early into a message and an exit code: 3, or 128 and the number of the signal.

    It must be the outermost: from here, a run of several processes ends without Python's own clearing up, which gloo's
    threads can abort.
    """
    try:
        with _ending_explained():
            yield
    except SystemExit as stop:
        if torch.distributed.is_initialized():
            sys.stdout.flush()
            os._exit(stop.code)
        raise


@contextlib.contextmanager
def _ending_explained():
    try:
        yield
    except Stopped as stopped:
        _leave(128 + stopped.number, str(stopped))
    except CannotContinue as error:
        _leave(3, f"error: {error}", everywhere=True)
    except MemoryError:
        _leave(3, f"error: out of CPU memory; {LESS_MEMORY}", everywhere=True)
    except KeyboardInterrupt:
        _leave(130, "interrupted")
    except OSError as error:
        if error.errno not in SURROUNDINGS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _leave(
            3,
            f"error: {where}{error.strerror}. What is saved stays; put that right, and start again with "
            "--resume_from_checkpoint auto",
        )
    except RuntimeError as error:
        if is_out_of_memory(error):
            _leave(3, f"error: out of memory ({str(error).splitlines()[0]}); {LESS_MEMORY}", everywhere=True)
        # NCCL's watchdog may end the process before such an error gets here.
        if not (reason := _about_others(str(error))):
            raise
        print(f"\n{error}", file=sys.stderr)
        _leave(3, f"{reason}. Start all of them again with --resume_from_checkpoint auto", everywhere=True)


def _about_others(error: str) -> str | None:
    """Returns what an error says about another process of the run; None if it says nothing."""
    if not torch.distributed.is_initialized():
        return None
    if any(words in error for words in LATE):
        return (
            "another process has not answered within --ddp_timeout seconds: it is slow (a slow disk or a long "
            "encoding, perhaps), it hangs, or its machine or the network has fallen silent; all end now. If it was "
            "only slow, raise --ddp_timeout"
        )
    if any(words in error for words in LOST):
        return (
            "another process of the run is gone: it has ended, or its machine or the network has failed. The message "
            "of the process that ended first says why; all end now"
        )
    return None


def _leave(code: int, message: str, *, everywhere: bool = False) -> NoReturn:
    """Ends this process with a message; ranks other than the first print its first line unless `everywhere`."""
    rank = int(os.environ.get("RANK", 0))
    if rank == 0:
        message = f"{Path(sys.argv[0]).name}: {message}"
    else:
        message = f"[rank {rank}] {message if everywhere else message.splitlines()[0]}"
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(code)
