"""Runs of the training script in processes of their own that start at once, ways to disturb them, and what they leave.

A server process imports torch and the training script once; each run is a fork of it (`multiprocessing`'s
forkserver), so that a real SIGKILL costs no start of Python. One rank is a process, two ranks are two, connected as
torchrun does it.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import pkgutil
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import imageio.v3 as iio
import torch
from conftest import training_options
from same_bits import first_difference, read_tensors

from run.manifest import MANIFEST_FILE
from run.run_directory import ARGS_FILE, METRICS_FILE, REPORT_FILE, STATE_FILE, STATE_TENSORS, read_metrics

SECONDS_UNTIL_HUNG = 60
ENVIRONMENT = {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
# A validation falls before the first checkpoint, one on a checkpoint, one on the last update, which is both.
COURSE = {
    "max_train_steps": 7, "checkpointing_steps": 3, "checkpoints_total_limit": 2, "gradient_accumulation_steps": 2,
    "lr_scheduler": "cosine", "random_flip": True, "validation_split": 2, "validation_steps": 2,
    "validate_first": False,
}  # fmt: skip
KINDS = {"lora": {"lora_dropout": 0.1, "ema_decay": 0.5}, "sft": {"training_type": "sft"}}
NOT_COMPARED = (ARGS_FILE, REPORT_FILE, MANIFEST_FILE)  # they hold times, places and hashes of the others
TAKES_TIME = ("seconds", "peak_memory_gib")

_making = threading.Lock()
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["train_cogvideox_lora", "faults.harness"])


class World(NamedTuple):
    """A base model, clips, and a folder for runs."""

    checkpoint: Path
    clips: Path
    folder: Path

    def options(self, output_dir: Path, **options) -> list[str]:
        clips = options.pop("instance_data_root", self.clips)
        return training_options(self.checkpoint, clips, output_dir, **options)

    def course(self, output_dir: Path, kind: str = "lora", **options) -> list[str]:
        """Returns the command line of the run that is disturbed in one way or another."""
        return self.options(output_dir, **COURSE | KINDS[kind] | options)


# ---- runs ------------------------------------------------------------------------------------------------------------


class Ended(NamedTuple):
    codes: list[int]  # of each rank; negative: the signal that killed it
    output: str

    @property
    def has_traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.output


class Started(NamedTuple):
    """The processes of a run."""

    ranks: list
    log: Path

    def send(self, number: int, rank: int = 0) -> None:
        os.kill(self.ranks[rank].pid, number)

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def wait(self, seconds: float = SECONDS_UNTIL_HUNG) -> Ended:
        """Waits for the end.

        Raises:
            AssertionError: it has not come in time.
        """
        deadline = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0, deadline - time.monotonic()))
        assert all(process.exitcode is not None for process in self.ranks), f"hangs: {self.said()[-2000:]}"
        return Ended([process.exitcode for process in self.ranks], self.said())


@contextmanager
def started(
    line: list[str],
    *,
    ranks: int = 1,
    disturb: Callable[[], None] | None = None,
    log: Path | None = None,
    **environment,
):
    """Starts a run, and kills what is left of it when the `with` block ends.

    Args:
        line: options of the training script.
        disturb: called in each process before the script; it must be importable, or a `partial` of such a function.
        log: file for what the run says (default: beside its output directory).
    """
    log = log or Path(f"{line[line.index('--output_dir') + 1]}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    each = ENVIRONMENT | environment
    if ranks > 1:
        each |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        each |= {"MASTER_PORT": str(free_port())}
    of_rank = [each | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}) for rank in range(ranks)]
    processes = [_processes.Process(target=_train, args=(line, own, log, disturb)) for own in of_rank]
    try:
        for process in processes:
            process.start()
        yield Started(processes, log)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def run(line: list[str], seconds: float = SECONDS_UNTIL_HUNG, **options) -> Ended:
    """Runs to the end; the arguments are those of `started`."""
    with started(line, **options) as processes:
        return processes.wait(seconds)


def _train(line: list[str], environment: dict[str, str], log: Path, disturb: Callable[[], None] | None) -> None:
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["train_cogvideox_lora.py", *line]
    torch.set_num_threads(1)
    if disturb:
        disturb()
    import train_cogvideox_lora

    train_cogvideox_lora.main(train_cogvideox_lora.parse_args(line))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# ---- faults at a named place -----------------------------------------------------------------------------------------


class Place(NamedTuple):
    """A place in the run: a call of a function."""

    function: str  # module.function, where it is looked up
    moment: str = "before"  # or "after"
    call: int = 1  # which call, from 1
    within: str = ""  # count only calls inside this function, and in the call of it that `of_within` tells
    of_within: int = 1


def at(place: Place, action: Callable[[], None]) -> None:
    """Has `action` called, in this process, when the run comes to a place."""
    depth, calls, outer_calls = [0], [0], [0]

    def inner(function):
        @functools.wraps(function)
        def wrapped(*args, **options):
            is_here = not place.within or (depth[0] > 0 and outer_calls[0] == place.of_within)
            calls[0] += is_here
            is_now = is_here and calls[0] == place.call
            if is_now and place.moment == "before":
                action()
            result = function(*args, **options)
            if is_now and place.moment == "after":
                action()
            return result

        return wrapped

    def outer(function):
        @functools.wraps(function)
        def wrapped(*args, **options):
            outer_calls[0] += 1
            depth[0] += 1
            try:
                return function(*args, **options)
            finally:
                depth[0] -= 1

        return wrapped

    replace(place.function, inner)
    if place.within:
        replace(place.within, outer)


def replace(name: str, wrap: Callable[[Callable], Callable]) -> None:
    """Replaces a function, given as module.function or module.Class.method, by `wrap` of it."""
    owner, function = name.rsplit(".", 1)
    owner = pkgutil.resolve_name(owner)
    setattr(owner, function, wrap(getattr(owner, function)))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hold(gate: Path) -> None:
    """Waits until a file is there."""
    wait_until(gate.exists)


def kill_at(place: Place, rank: int = 0) -> None:
    if int(os.environ.get("RANK", 0)) == rank:
        at(place, die)


# ---- what a run leaves -----------------------------------------------------------------------------------------------


def left_by(output_dir: Path) -> dict[str, str]:
    """Returns everything that a run directory holds but for times: names, and what the files hold."""
    found = {}
    for path in sorted(output_dir.rglob("*")):
        name = path.relative_to(output_dir).as_posix()
        if path.is_dir():
            found[name] = "folder"
        elif path.name == METRICS_FILE:
            found |= {f"{name}: {number}": json.dumps(row) for number, row in enumerate(rows_of(output_dir), 1)}
        elif path.suffix == ".safetensors":
            found |= {f"{name}: {key}": value for key, value in read_tensors(path).items()}
        elif path.name == STATE_TENSORS:
            found |= {f"{name}: {key}": value for key, value in _hashes(torch.load(path)).items()}
        elif path.name == STATE_FILE:
            state = json.loads(path.read_text(encoding="utf-8"))
            del state["options"]["instance_data_root"]
            found[name] = json.dumps(state)
        elif path.suffix == ".mp4":  # its metadata names the run directory
            found[name] = hashlib.sha256(iio.imread(path).tobytes()).hexdigest()
        elif path.name in NOT_COMPARED or path.parent.name == "training_state":
            found[name] = "file"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def rows_of(output_dir: Path) -> list[dict]:
    rows = read_metrics(output_dir)
    return [{name: value for name, value in row.items() if name not in TAKES_TIME} for row in rows]


def _hashes(content, prefix: str = "") -> dict[str, str]:
    if isinstance(content, torch.Tensor):
        return {prefix: hashlib.sha256(content.contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()}
    if isinstance(content, dict):
        pairs = content.items()
    elif isinstance(content, (list, tuple)):  # torch restores tuples as lists
        pairs = enumerate(content)
    else:
        return {prefix: repr(content)}
    return {key: value for name, part in pairs for key, value in _hashes(part, f"{prefix}.{name}").items()}


def leftovers(*folders: Path) -> list[str]:
    """Returns temporary files, locks and half-written folders."""
    hidden = [path for folder in folders for path in folder.rglob(".*") if path.name != ".metadata"]
    return [str(path) for path in hidden if path.name not in (".cogvideox_cache", ".gitignore")]


def undisturbed(world: World, kind: str = "lora", ranks: int = 1, **options) -> dict[str, str]:
    """Returns what the undisturbed run leaves, which is made once."""
    folder = world.folder / "-".join(["undisturbed", kind, str(ranks), *map(str, options.values())])
    make_once(folder, world.course(folder, kind, **options), ranks=ranks)
    return left_by(folder)


def make_once(folder: Path, line: list[str], code: int = 0, **options) -> None:
    """Runs the script if its output directory is not there yet; further arguments are those of `started`."""
    with _making:
        if not folder.exists():
            ended = run(line, **options)
            assert set(ended.codes) == {code}, ended.output[-3000:]


def check_resumed(
    world: World, output_dir: Path, kind: str = "lora", ranks: int = 1, log: Path | None = None, **options
) -> Ended:
    """Resumes a disturbed run, and compares what it leaves with what the undisturbed one has left.

    Raises:
        AssertionError: they differ, or something temporary is left.
    """
    same = {key: value for key, value in options.items() if key != "latents_cache_dir"}
    expected = undisturbed(world, kind, ranks, **same)
    ended = run(world.course(output_dir, kind, **options, resume_from_checkpoint="auto"), ranks=ranks, log=log)
    assert ended.codes == [0] * ranks, ended.output[-3000:]
    difference = first_difference(expected, left_by(output_dir))
    assert difference is None, difference
    cache = options.get("latents_cache_dir", world.clips)
    assert not leftovers(output_dir, cache), leftovers(output_dir, cache)
    return ended


def fresh(folder: Path) -> Path:
    """Returns a folder that does not exist."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def wait_until(condition: Callable[[], bool], seconds: float = SECONDS_UNTIL_HUNG) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
