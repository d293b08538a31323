"""SIGTERM, SIGINT and SIGUSR1 at named moments: a checkpoint, the exit code, and no update lost."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from conftest import ROOT

from faults import harness
from faults.harness import Place, World
from run.run_directory import list_checkpoints

SECONDS_TO_END = 30
SECONDS_TO_NOTE = 0.2  # the thread that listens has then seen the signal
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stop(NamedTuple):
    """A moment at which signals reach some of the ranks."""

    place: Place
    kind: str = "lora"
    to: tuple[int, ...] = (0,)  # ranks
    ranks: int = 1
    options: dict = {}
    before_updates: bool = False  # there is nothing to save yet


UPDATE = Place("train_cogvideox_lora.loss_of", call=5)
VALIDATION = Place("run.validation.training_loss", call=12)
FIRST = {"validate_first": True}
MOMENTS = {
    "in encoding": Stop(Place("dataset._write_latents", call=2), before_updates=True),
    "before the first update": Stop(Place("train_cogvideox_lora.prepare_run"), before_updates=True),
    "in the first validation": Stop(
        Place("run.validation.training_loss", call=3), options=FIRST, before_updates=True
    ),
    "in the first update": Stop(Place("train_cogvideox_lora.loss_of")),
    "in an update": Stop(UPDATE),
    "in the last update": Stop(Place("train_cogvideox_lora.loss_of", call=14)),
    "in a later validation": Stop(VALIDATION),
    "in the sampling of a validation": Stop(
        Place("train_cogvideox_lora.agree", call=90), options={"validation_prompt": "a cat"}
    ),
    "in save": Stop(Place("torch.save", call=1)),
    "in save_best": Stop(Place("run.checkpoints.save_best", call=2)),
    "sft: in an update": Stop(UPDATE, kind="sft"),
    "sft: in save": Stop(Place("run.shards.dcp.save"), kind="sft"),
    "two ranks: the first, in encoding": Stop(
        Place("dataset._write_latents", call=1), ranks=2, before_updates=True
    ),
    "two ranks: the second, in encoding": Stop(
        Place("dataset._write_latents", call=1), ranks=2, to=(1,), before_updates=True
    ),
    "two ranks: the second, before the first update": Stop(
        Place("train_cogvideox_lora.prepare_run"), ranks=2, to=(1,), before_updates=True
    ),
    "two ranks: the first, in an update": Stop(UPDATE, ranks=2),
    "two ranks: the second, in an update": Stop(UPDATE, ranks=2, to=(1,)),
    "two ranks: both, in an update": Stop(UPDATE, ranks=2, to=(0, 1)),
    "two ranks: the second, in a validation": Stop(Place("run.validation.training_loss", call=6), ranks=2, to=(1,)),
    "two ranks: the first, in save": Stop(Place("torch.save"), ranks=2),
    "two ranks, sft: the second, in save": Stop(Place("run.shards.dcp.save"), kind="sft", ranks=2, to=(1,)),
}  # fmt: skip


def send_at(stop: Stop, number: int) -> None:
    if int(os.environ.get("RANK", 0)) in stop.to:
        harness.at(stop.place, partial(_send, number))


def _send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(SECONDS_TO_NOTE)


def check(world: World, name: str, number: int = signal.SIGTERM) -> None:
    """Stops a run by a signal, resumes it, and compares it with the undisturbed one.

    Raises:
        AssertionError: the exit code is another one, an update is lost, or the resumed run differs.
    """
    stop = MOMENTS[name]
    folder = harness.fresh(world.folder / "stops" / f"{name.replace(' ', '-')}-{signal.Signals(number).name}")
    options = dict(stop.options)
    if "encoding" in name:
        options["latents_cache_dir"] = harness.fresh(folder.with_name(f"{folder.name}-cache"))
    line = world.course(folder, stop.kind, **options)
    with harness.started(line, ranks=stop.ranks, disturb=partial(send_at, stop, number)) as run:
        ended = run.wait(SECONDS_TO_END + harness.SECONDS_UNTIL_HUNG * (name == "in the sampling of a validation"))
    assert ended.codes == [128 + number] * stop.ranks, f"{ended.codes} {ended.output}"
    assert not ended.has_traceback, ended.output
    check_nothing_lost(folder, ended.output, is_empty=stop.before_updates)
    harness.check_resumed(world, folder, stop.kind, stop.ranks, **options)


def check_nothing_lost(folder: Path, output: str, *, is_empty: bool = False) -> None:
    """Refuses a run directory in which the last update that is logged has no checkpoint."""
    saved = [path.name for path in list_checkpoints(folder)]
    if is_empty:
        assert not saved and "the same command starts again" in output, (saved, output[-1000:])
        return
    step = max(row["step"] for row in harness.rows_of(folder))
    assert saved and saved[-1] == f"checkpoint-{step}", f"update {step} is done, and {saved} are saved"
    assert f"checkpoint-{step} is written" in output, output[-1000:]


def check_second_signal(world: World) -> None:
    """A second signal ends at once a run that hangs."""
    folder = harness.fresh(world.folder / "stops" / "twice")
    hang = partial(harness.at, Place("train_cogvideox_lora.loss_of", call=4), partial(time.sleep, 300))
    with harness.started(world.course(folder), disturb=hang) as run:
        harness.wait_until(lambda: folder.exists() and "update 2: loss" in run.said() or len(logged(folder)) >= 1)
        time.sleep(1)
        run.send(signal.SIGTERM)
        time.sleep(1)
        run.send(signal.SIGTERM)  # a launcher passes on what the terminal has sent already
        time.sleep(1)
        assert run.ranks[0].is_alive()
        time.sleep(4)
        run.send(signal.SIGINT)
        ended = run.wait(2)
    assert ended.codes == [128 + signal.SIGINT] and "SIGINT again: ends at once" in ended.output, ended
    harness.check_resumed(world, folder)


def logged(folder: Path) -> list[dict]:
    return harness.rows_of(folder) if folder.exists() else []


# ---- launchers: real commands, which take seconds to start -----------------------------------------------------------


class Launcher(NamedTuple):
    """A way to start a run, and whom a signal reaches."""

    command: str  # "python", "torchrun" or "script"
    signal: int = signal.SIGTERM
    to: str = "launcher"  # or "group", as a terminal does it, or "first", which is one of the ranks
    code: int = 128 + signal.SIGTERM  # of the launcher


# accelerate and torchrun make 1 of every code but 0.
LAUNCHERS = {
    "python": Launcher("python"),
    "python, SIGINT to the group": Launcher("python", signal.SIGINT, "group", 130),
    "python, SIGUSR1": Launcher("python", signal.SIGUSR1, code=138),
    "script": Launcher("script", code=-signal.SIGTERM),
    "script, SIGINT to the group": Launcher("script", signal.SIGINT, "group", -signal.SIGINT),
    "script, to the rank": Launcher("script", to="first", code=1),
    "script, the launcher killed": Launcher("script", signal.SIGKILL, code=-signal.SIGKILL),
    "torchrun": Launcher("torchrun", code=1),
    "torchrun, SIGINT to the group": Launcher("torchrun", signal.SIGINT, "group", 1),
    "torchrun, to one rank": Launcher("torchrun", to="first", code=1),
    "torchrun, the launcher killed": Launcher("torchrun", signal.SIGKILL, code=-signal.SIGKILL),
}  # fmt: skip


def command_of(launcher: Launcher, world: World, folder: Path, **options) -> tuple[list[str], dict[str, str]]:
    """Returns the command line of a run, and its environment."""
    environment = os.environ | harness.ENVIRONMENT
    line, script = world.course(folder, **options), str(ROOT / "train_cogvideox_lora.py")
    if launcher.command == "script":
        environment |= {"MODEL_PATH": str(world.checkpoint), "DATASET_PATH": str(world.clips)}
        environment |= {"OUTPUT_PATH": str(folder)}
        at = line.index("--output_dir")
        return ["bash", str(ROOT / "finetune_single_gpu.sh"), *line[at:]], environment
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return [sys.executable, *(torchrun if launcher.command == "torchrun" else []), script, *line], environment


def as_from_a_terminal() -> None:
    """Lets SIGINT reach a launcher: a shell script starts its background jobs without it, these tests among them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def processes_of(folder: Path) -> list[int]:
    """Returns the processes whose command line names this run directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            if os.fsencode(folder) in words and (path / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                found.append(int(path.name))
    return sorted(found)


def check_launched(world: World, name: str) -> None:
    """Starts a run as users do, sends a signal, and resumes it.

    Raises:
        AssertionError: a process is left after 30 s, an update is lost, or the resumed run differs.
    """
    launcher = LAUNCHERS[name]
    folder = harness.fresh(world.folder / "stops" / f"launched-{name.replace(' ', '-').replace(',', '')}")
    long = {"max_train_steps": 100_000, "validation_steps": 20, "checkpointing_steps": 50, "lr_scheduler": "constant"}
    command, environment = command_of(launcher, world, folder, **long)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True, preexec_fn=as_from_a_terminal
        )
    try:
        harness.wait_until(lambda: len(logged(folder)) >= 3, 120)
        if launcher.to == "group":
            os.killpg(process.pid, launcher.signal)
        else:
            os.kill(process.pid if launcher.to == "launcher" else processes_of(folder)[-1], launcher.signal)
        code = process.wait(SECONDS_TO_END)
        harness.wait_until(lambda: not processes_of(folder), SECONDS_TO_END)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    output = folder.with_suffix(".log").read_text()
    assert code == launcher.code, f"exit code {code} instead of {launcher.code}: {output[-2000:]}"
    check_nothing_lost(folder, output)
    ranks = 2 if launcher.command == "torchrun" else 1
    step = len(logged(folder))
    options = long | {"max_train_steps": step + 4}
    resumed = harness.run(world.course(folder, **options, resume_from_checkpoint="auto"), ranks=ranks)
    assert resumed.codes == [0] * ranks, resumed.output[-2000:]
    straight = harness.fresh(folder.with_name(f"{folder.name}-straight"))
    harness.run(world.course(straight, **options), ranks=ranks)
    ours, theirs = (
        [row for row in harness.rows_of(run) if "loss" in row and row["step"] > step] for run in (folder, straight)
    )
    assert len(ours) == 4 and ours == theirs, "the resumed run differs"
    assert not harness.leftovers(folder)


def check_while_imports_run(world: World, seconds: float, number: int) -> None:
    """A signal in the first seconds ends the process in Python's way; nothing has begun yet."""
    folder = harness.fresh(world.folder / "stops" / f"imports-{seconds}-{number}")
    command, environment = command_of(Launcher("python"), world, folder)
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, preexec_fn=as_from_a_terminal, **pipes) as process:
        time.sleep(seconds)
        process.send_signal(number)
        process.communicate(timeout=SECONDS_TO_END)
    assert process.returncode in (-number, 128 + number), process.returncode
    harness.check_resumed(world, folder)
