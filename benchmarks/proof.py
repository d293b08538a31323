"""Runs and records the commands of prove.sh, in one JSON file for each GPU.

python benchmarks/proof.py run --gpu H100 --limit 60 --output RESULT.json FILE NAME python benchmarks/step.py ...
python benchmarks/proof.py done FILE              # names of the runs that need not be repeated here
python benchmarks/proof.py table FILE NAME ...    # what became of these runs
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from files import write_json

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "diffusers", "peft", "accelerate", "transformers")
COLUMNS = ("run", "seconds per step", "predicted, GiB", "measured, GiB", "outcome")
LAST_LINES = 20  # of the output of a run that failed
GRACE_SECONDS = 20  # between asking a command to end and killing it
TIMED_OUT, INTERRUPTED = 124, 130
DOES_NOT_FIT = "does_not_fit"  # in the result of a command that has predicted it, with GiB


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True)
    run, done, table = (actions.add_parser(name, allow_abbrev=False) for name in ("run", "done", "table"))
    for action in (run, done, table):
        action.add_argument("file", type=Path, help="JSON file of all runs on this GPU")
    run.add_argument("name", help="name of the run")
    run.add_argument("--gpu", required=True, help="name of the GPU, as PyTorch gives it")
    run.add_argument("--limit", type=float, required=True, help="seconds after which the command is interrupted")
    run.add_argument("--output", type=Path, required=True, help="file into which the command writes its measurements")
    run.add_argument("command", nargs=argparse.REMAINDER)
    table.add_argument("names", nargs="*", help="runs to list")
    return parser


def read_record(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"runs": {}}


def environment() -> dict:
    """Returns what decides whether a run that is done is repeated: driver, versions and commit."""
    return {
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "versions": {package: version(package) for package in PACKAGES},
        "commit": commit(),
    }


def commit() -> str:
    """Returns the commit, with a hash of what was changed since; empty without git.

    Results, and the page into which table.py writes them, do not count as changes.
    """
    changes = output_of("git", "diff", "HEAD", "--", ".", ":!benchmarks/results", ":!docs/hardware.md")
    return output_of("git", "rev-parse", "HEAD") + (f"+{sha256(changes.encode()).hexdigest()[:8]}" if changes else "")


def output_of(*command: str) -> str:
    """Returns what a program prints, empty if it fails or is not installed."""
    if not shutil.which(command[0]):
        return ""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def done_here(record: dict) -> list[str]:
    here = environment()
    return [name for name, run in record["runs"].items() if is_done(run) and here.items() <= run.items()]


def is_done(run: dict) -> bool:
    """Whether a run has passed, or is predicted not to fit into the GPU's memory, which is no failure."""
    return run["exit_code"] == 0 or does_not_fit(run)


def does_not_fit(run: dict) -> bool:
    return DOES_NOT_FIT in run.get("result", {})


def record_run(args: argparse.Namespace, exit_code: int, seconds: float, last_lines: list[str]) -> dict:
    """Adds a run to the file, in place of an earlier one of its name; removes the command's own result; returns it."""
    record, here = read_record(args.file), environment() | {"date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"}
    run = {"command": without_folders(shlex.join(args.command)), "exit_code": exit_code, "seconds": round(seconds, 1)}
    if exit_code:
        run["last_lines"] = [without_folders(line) for line in last_lines]
    if args.output.exists():
        run["result"] = json.loads(args.output.read_text(encoding="utf-8"))
    write_json(args.file, {"gpu": args.gpu, **here, "runs": record["runs"] | {args.name: run | here}})
    args.output.unlink(missing_ok=True)
    return run


def without_folders(text: str) -> str:
    """Returns a text without the folders of this machine, which are nobody else's business."""
    for folder, name in ((Path(sys.prefix), ".venv"), (ROOT, "."), (Path.home(), "~")):
        text = text.replace(f"{folder}/", f"{name}/")
    return text


def run(args: argparse.Namespace) -> int:
    """Runs a command, shows its output and records it; returns 0 if it is done, 1 if not, or `INTERRUPTED`."""
    args.output.unlink(missing_ok=True)
    lines, started, late, early = deque(maxlen=LAST_LINES), time.monotonic(), threading.Event(), threading.Event()
    # Before the command starts: shells start background jobs with SIGINT ignored, and a command would inherit that.
    on_interrupt(lambda *_: early.set())
    process = subprocess.Popen(
        args.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", process_group=0
    )
    timer = threading.Timer(args.limit, lambda: (late.set(), end(process)))
    try:
        on_interrupt(signal.default_int_handler)
        if early.is_set():
            raise KeyboardInterrupt
        timer.start()
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
        exit_code = TIMED_OUT if process.wait() and late.is_set() else process.returncode
    except (KeyboardInterrupt, OSError):  # OSError: the terminal is gone
        on_interrupt(signal.SIG_IGN)
        end(process)
        return INTERRUPTED
    finally:
        timer.cancel()
    recorded = record_run(args, exit_code, time.monotonic() - started, list(lines))
    if not is_done(recorded):
        over = f" (over {args.limit:g} s)" if exit_code == TIMED_OUT else ""
        print(f"failed: {args.name}, exit code {exit_code}{over}; the next start tries it again")
    return int(not is_done(recorded))


def on_interrupt(handler: Callable | signal.Handlers) -> None:
    """Sets what happens at Ctrl-C, at a request to end, and at the loss of the terminal unless nohup ignores that."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def end(process: subprocess.Popen) -> None:
    """Interrupts a command and all that it started (pytest then still says what has failed), and kills what stays."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)


def row(name: str, run: dict | None, here: str) -> tuple[str, ...]:
    """Returns the cells of `COLUMNS`; only results of step.py have measured values."""
    if run is None:
        return (name, "-", "-", "-", "not run")
    result = run.get("result", {}) if is_done(run) else {}
    result = result.get(DOES_NOT_FIT, result)
    outcome = describe_outcome(run)
    if run["commit"] != here:
        outcome += f", at {run['commit'][:9] or 'an unknown commit'}"
    values = (result.get(key) for key in ("seconds_per_step", "predicted_peak_gib", "peak_memory_gib"))
    return (name, *("-" if value is None else f"{value:.4g}" for value in values), outcome)


def describe_outcome(run: dict) -> str:
    if does_not_fit(run):
        return "does not fit, predicted"
    return "passed" if run["exit_code"] == 0 else f"failed, exit code {run['exit_code']}"


def table(record: dict, names: list[str]) -> str:
    here = commit()
    rows = [COLUMNS, *(row(name, record["runs"].get(name), here) for name in names)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in rows)


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if args.action == "run":
        return run(args)
    record = read_record(args.file)
    print("\n".join(done_here(record)) if args.action == "done" else f"{table(record, args.names)}\n\n{args.file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
