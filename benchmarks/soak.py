"""Disturbs training in every way that tests/faults knows, and writes down what did not survive.

    python benchmarks/soak.py --output benchmarks/results/soak.json
    python benchmarks/soak.py --only kills stops

tests/faults runs a fixed sample of the same trials. Each trial is a run of the tiny base model on a CPU, disturbed,
resumed, and compared with an undisturbed one. All parts take about two hours on two cores.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from faults import damage, kills, long_run, mutations, nonfinite, stops, surroundings
from faults.harness import World
from make_example import make_checkpoint, make_clips

from files import at_least, expanded_path, write_json

Trials = dict[str, Callable[[], object]]


# ---- the trials of each part -----------------------------------------------------------------------------------------


def trials_of_kills(world: World, args: argparse.Namespace) -> Trials:
    trials = {name: partial(kills.check, world, name) for name in kills.PLACES}
    kinds = itertools.cycle([("lora", 1, 3.0), ("sft", 1, 3.0), ("lora", 2, 5.0), ("sft", 2, 5.0)])
    for number, (kind, ranks, longest) in zip(range(args.kills), kinds):
        about = {"kind": kind, "ranks": ranks, "longest": longest}
        trials[f"random {number}, {kind}, ranks: {ranks}"] = partial(kills.check_random, world, number, **about)
    return trials


def trials_of_stops(world: World, args: argparse.Namespace) -> Trials:
    trials = {
        f"{name}, {signal.Signals(number).name}": partial(stops.check, world, name, number)
        for name in stops.MOMENTS
        for number in stops.SIGNALS
    }
    trials["a second signal"] = partial(stops.check_second_signal, world)
    trials |= {f"launched: {name}": partial(stops.check_launched, world, name) for name in stops.LAUNCHERS}
    for seconds, number in itertools.product((0.05, 0.5, 1, 2, 3), (signal.SIGTERM, signal.SIGINT)):
        name = f"{signal.Signals(number).name} {seconds} s after the start"
        trials[name] = partial(stops.check_while_imports_run, world, seconds, number)
    return trials


def trials_of_numbers(world: World, args: argparse.Namespace) -> Trials:
    return {name: partial(nonfinite.check, world, name) for name in nonfinite.CASES}


def trials_of_checkpoints(world: World, args: argparse.Namespace) -> Trials:
    trials = {}
    for kind in ("lora", "sft"):
        for file, way in itertools.product(damage.files_of(world, kind), damage.WAYS):
            seeds = range(args.flips if way in ("one bit flipped", "truncated") else 1)
            for seed in seeds:
                name = f"{kind}: {file} {way} {seed}"
                trials[name] = partial(damage.check_found, world, kind, file, way, seed)
            spoil = partial(damage.spoil_file, file, way)
            name = f"{file} {way}".replace(" ", "-").replace("/", "-")
            if way != "one bit flipped" or not file.endswith("manifest.json"):  # a bit there may not count
                trials[f"{kind}: resumed, {file} {way}"] = partial(damage.check_passed_over, world, kind, spoil, name)
        for name, spoil in {"empty folder": damage.empty_folder, "later format": damage.later_format}.items():
            for both in (False, True):
                trial = partial(damage.check_passed_over, world, kind, spoil, name.replace(" ", "-"), both)
                trials[f"{kind}: {name}, {'both' if both else 'the newest'}"] = trial
    return trials


def trials_of_inputs(world: World, args: argparse.Namespace) -> Trials:
    accelerate = range(args.inputs // 20)
    return mutations.trials(world, args.inputs) | {
        f"accelerate {seed}": partial(mutations.check_accelerate, world, seed) for seed in accelerate
    }


def trials_of_surroundings(world: World, args: argparse.Namespace) -> Trials:
    return {name: partial(check, world) for name, check in surroundings.CHECKS.items()}


def trials_of_a_long_run(world: World, args: argparse.Namespace) -> Trials:
    return {"memory and open files": partial(long_run.check, world, args.updates)} | {
        f"cost of the agreement, ranks: {ranks}": partial(
            long_run.cost_of_agreement, world, ranks, max(args.updates // 10, 40)
        )
        for ranks in (1, 2)
    }


PARTS = {
    "kills": trials_of_kills,
    "stops": trials_of_stops,
    "numbers": trials_of_numbers,
    "checkpoints": trials_of_checkpoints,
    "inputs": trials_of_inputs,
    "surroundings": trials_of_surroundings,
    "long": trials_of_a_long_run,
}


# ---- running them ----------------------------------------------------------------------------------------------------


def attempt(name: str, trial: Callable[[], object]) -> dict:
    """Returns how a trial ended: its "outcome" ("passed", "failed" or "skipped"), its seconds, and the reason."""
    start = time.perf_counter()
    try:
        result = {"outcome": "passed", "returned": trial()}
    except surroundings.Impossible as reason:
        result = {"outcome": "skipped", "reason": str(reason)}
    except Exception as error:  # noqa: BLE001 - whatever it is, the others run
        result = {"outcome": "failed", "reason": f"{type(error).__name__}: {error}"}
    print(f"{result['outcome']:<8} {name}", flush=True)
    return {"name": name, "seconds": round(time.perf_counter() - start, 1)} | result


def run_part(trials: Trials, jobs: int) -> dict:
    """Runs trials; returns their counts, what failed or was skipped with its reason, and what was measured."""
    start = time.perf_counter()
    with ThreadPoolExecutor(jobs) as threads:
        results = list(threads.map(attempt, trials, trials.values()))
    counts = {kind: sum(result["outcome"] == kind for result in results) for kind in ("passed", "failed", "skipped")}
    returned = [result.get("returned") for result in results]
    return {
        "trials": len(results),
        **counts,
        "seconds": round(time.perf_counter() - start),
        "failures": {result["name"]: result["reason"][-1500:] for result in results if result["outcome"] == "failed"},
        "skips": {result["name"]: result["reason"] for result in results if result["outcome"] == "skipped"},
        "measured": {name: value for name, value in zip(trials, returned) if isinstance(value, dict)},
        "exit_codes": {str(code): returned.count(code) for code in (0, 2, 3) if any(type(c) is int for c in returned)},
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add, positive = parser.add_argument, at_least(1)
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"of: {' '.join(PARTS)}")
    add("--kills", type=at_least(0), default=40, metavar="N", help="kills at random times, besides those at all places")
    add("--flips", type=positive, default=50, metavar="N", help="bits to flip and places to truncate, of each file")
    add("--inputs", type=at_least(0), default=300, metavar="N", help="inputs with something wrong in them")
    add("--updates", type=at_least(60), default=5000, metavar="N", help="updates of the long run")
    add("--jobs", type=positive, default=2, metavar="N", help="trials at the same time; of the long run's, one")
    add("--folder", type=expanded_path, metavar="FOLDER", help="where to run (default: a temporary folder)")
    add("--output", type=expanded_path, metavar="FILE", help="file to write the JSON to; parts that are in it stay")
    return parser.parse_args(argv)


def main() -> int:
    args, results = parse_args(), {}
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        world = World(make_checkpoint(folder / "base"), make_clips(folder / "clips"), folder / "runs")
        for part in args.only:
            print(f"\n{part}", flush=True)
            results[part] = run_part(PARTS[part](world, args), 1 if part == "long" else args.jobs)
            if args.output:
                write_json(args.output, report(results, args.output))
    for part, result in results.items():
        print(f"{part:<13} {result['passed']} of {result['trials']} passed, {result['skipped']} skipped")
    return any(result["failed"] for result in results.values())


def report(results: dict, path: Path) -> dict:
    """Returns what the file is to hold: versions, and the parts, also those of earlier calls."""
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    packages = ("torch", "diffusers", "transformers", "accelerate", "peft")
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    return {"versions": versions, "cores": os.cpu_count(), "parts": earlier.get("parts", {}) | results}


if __name__ == "__main__":
    sys.exit(main())
