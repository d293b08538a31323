"""benchmarks/prove.sh and proof.py, with a stand-in for Python that writes down its command line."""

import json
import os
import signal
import subprocess
import sys
import time

import proof
import pytest
import versus
from conftest import ROOT

from cogvideox import compute

PYTHON = f"""#!/usr/bin/env bash
[[ $1 == -c ]] && {{ echo NVIDIA Test GPU; exit; }}
[[ $1 == benchmarks/proof.py ]] && exec {sys.executable} "$@"
folder=$(dirname "$0")
echo "$*" >> "$folder/commands"
[[ -f $folder/wait && "$*" == *fp8* ]] && {{ touch "$folder/waiting"; sleep 60; }}
if [[ ! -f $folder/repaired ]]; then
  case "$*" in
    *int8*) echo "a reason in $HOME/clips"; exit 3 ;;
    *nf4*) exit 1 ;;
  esac
fi
[[ "$*" =~ --output\\ ([^ ]+) ]] &&
  echo '{{"seconds_per_step": 1.5, "predicted_peak_gib": 7.34, "peak_memory_gib": 7.5}}' > "${{BASH_REMATCH[1]}}"
exit 0
"""
NAMES = ["2b-full-swapped", "5b-full-swapped", "5b-full-int8", "5b-full-fp8", "5b-full-nf4", "1.5-I2V-short"]  # part 6


@pytest.fixture
def command(tmp_path):
    """Returns the arguments of `subprocess.run` for the suite with the stand-in."""
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)

    def arguments(*words, **environment):
        environment = {"PYTHON": str(tmp_path / "python"), "PROVE_RESULTS": str(tmp_path), **environment}
        line = ["bash", ROOT / "benchmarks" / "prove.sh", *words]
        return {"args": line, "env": os.environ | environment, "text": True}

    return arguments


@pytest.fixture
def suite(command, tmp_path):
    """Runs the suite; returns its result and the commands that it has run since the last time."""

    def run(*words, **environment):
        file = tmp_path / "commands"
        file.unlink(missing_ok=True)
        result = subprocess.run(**command(*words, **environment), capture_output=True, timeout=60)
        return result, file.read_text().splitlines() if file.exists() else []

    return run


def record(tmp_path):
    return json.loads((tmp_path / "prove-test-gpu.json").read_text())


def test_one_file_has_every_run_and_failures_with_their_last_lines(suite, tmp_path):
    result, commands = suite("6")
    found = record(tmp_path)
    assert result.returncode == 1 and len(commands) == 6
    assert found["gpu"] == "NVIDIA Test GPU" and {"driver", "versions", "commit", "date"} <= found.keys()
    assert list(found["runs"]) == NAMES
    passed, failed = found["runs"]["2b-full-swapped"], found["runs"]["5b-full-int8"]
    assert passed["exit_code"] == 0 and passed["result"]["peak_memory_gib"] == 7.5 and passed["seconds"] < 60
    assert "step.py --model 2b" in passed["command"] and passed["commit"] == found["commit"]
    assert (failed["exit_code"], failed["last_lines"]) == (3, ["a reason in ~/clips"])
    assert "failed: 5b-full-int8, exit code 3" in result.stdout
    assert [path.name for path in tmp_path.glob("*.json")] == ["prove-test-gpu.json"]
    assert list((tmp_path / ".prove").iterdir()) == []


def test_the_table_at_the_end_has_all_runs_of_the_suite(suite):
    result, _ = suite("6")
    rows = {line.split("  ")[0]: line.split() for line in result.stdout.split("run  ")[-1].splitlines()}
    assert rows["5b-full-swapped"][1:] == ["1.5", "7.34", "7.5", "passed"]
    assert rows["5b-full-int8"][1:] == ["-", "-", "-", "failed,", "exit", "code", "3"]
    assert rows["versus-2b-compile"][-2:] == rows["tests"][-2:] == ["not", "run"]


def test_what_has_passed_is_not_repeated_and_what_has_failed_is(suite, tmp_path):
    first, _ = suite("6")
    (tmp_path / "repaired").touch()
    second, commands = suite("6")
    assert "part 6: 6 runs to do, at most 9 minutes" in first.stdout
    assert "part 6: 2 runs to do, at most 3 minutes" in second.stdout and second.returncode == 0
    assert [line.split("--base_precision ")[1] for line in commands] == ["int8", "nf4"]
    assert {run["exit_code"] for run in record(tmp_path)["runs"].values()} == {0}
    third, commands = suite("6")
    assert third.returncode == 0 and commands == []


def test_runs_of_another_commit_are_repeated(suite, tmp_path):
    suite("6")
    found = record(tmp_path)
    for run in found["runs"].values():
        run["commit"] = 40 * "a"
    assert proof.passed_here(found) == []
    row = proof.row("2b-full-swapped", found["runs"]["2b-full-swapped"], "b")
    assert row[-1] == "passed, at aaaaaaaaa"


def test_ctrl_c_keeps_what_is_done_and_the_same_command_continues(command, suite, tmp_path):
    (tmp_path / "repaired").touch()
    (tmp_path / "wait").touch()
    process = subprocess.Popen(**command("6"), stdout=subprocess.PIPE, start_new_session=True)
    while not (tmp_path / "waiting").exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and "stopped; the same command continues" in output
    assert list(record(tmp_path)["runs"]) == NAMES[:3]
    (tmp_path / "wait").unlink()
    result, commands = suite("6")
    assert result.returncode == 0 and len(commands) == 3
    assert sorted(record(tmp_path)["runs"]) == sorted(NAMES)


def test_a_command_over_its_time_is_ended_with_all_that_it_started(tmp_path):
    file = tmp_path / "record.json"
    line = ["run", "--gpu", "x", "--limit", "0.5", "--output", str(tmp_path / "none.json"), str(file), "slow"]
    started = time.monotonic()
    line += ["bash", "-c", "echo begun; sleep 60 | cat"]
    script = [sys.executable, ROOT / "benchmarks" / "proof.py"]
    result = subprocess.run([*script, *line], capture_output=True, text=True)
    assert result.returncode == 1 and time.monotonic() - started < 15
    assert "failed: slow, exit code 124 (over 0.5 s)" in result.stdout
    assert json.loads(file.read_text())["runs"]["slow"]["last_lines"] == ["begun"]


def test_what_does_not_fit_into_a_part_is_said_and_left_for_the_next_start(suite, tmp_path):
    result, commands = suite("2", PROVE_PART_SECONDS="4")
    assert result.returncode == 1 and commands == []
    assert "2b-attention: not run, the 4 seconds of the part are over" in result.stdout


def test_without_a_number_all_parts_run(suite):
    result, commands = suite("--tiny")
    assert result.stdout.count("---- part") == 7 and result.stdout.count("runs to do, at most") == 7
    assert len(commands) > 25


def test_compiled_steps_are_timed_at_every_level(suite):
    _, commands = suite("2")
    compiled = [command for command in commands if "--compile" in command]
    levels = [command.split("--gradient_checkpointing ")[1].split()[0] for command in compiled]
    assert sorted(levels) == sorted(compute.LEVELS)


@pytest.mark.parametrize("words", [[], ["--tiny"]])
def test_comparisons_take_their_options_and_all_fit_into_their_parts(words, suite):
    result, _ = suite("--dry", *words, VERSUS_REFERENCE=__file__)
    parts = [part.splitlines() for part in result.stdout.split("---- part ")[1:]]
    for _, *commands in parts:
        assert sum(int(command.split()[1]) for command in commands) <= 540
    part_3, part_4 = parts[2:4]
    lines = [command.split("benchmarks/versus.py ")[1].split() for command in part_3 + part_4 if "versus.py" in command]
    plain, recomputed, compiled = (versus.parse_args(line) for line in lines)
    assert (recomputed.size, compiled.size) == (("overhead", "overhead") if words else ("2b", "2b"))
    assert recomputed.mixed_precision == compiled.mixed_precision == "bf16" and recomputed.gradient_checkpointing
    assert compiled.ours_options == ["--compile"] and recomputed.ours_options == plain.ours_options == []
    assert len({args.output for args in (recomputed, plain, compiled)}) == 3


def test_without_a_reference_comparisons_are_skipped_and_said(suite):
    result, commands = suite("3", VERSUS_REFERENCE="")
    assert result.returncode == 0 and commands == []
    assert result.stdout.count("VERSUS_REFERENCE names no reference") == 2


def test_dry_runs_nothing(suite):
    result, commands = suite("--dry")
    assert result.returncode == 0 and commands == []
    assert result.stdout.count("---- part") == 7
    assert "benchmarks/step.py --model 1.5-I2V" in result.stdout and "-m pytest -m gpu -v" in result.stdout


@pytest.mark.parametrize("way", [{"words": ["--tiny"]}, {"PROVE_MODEL": "tiny"}])
def test_tiny_takes_no_real_model(way, suite):
    way = dict(way)
    result, commands = suite("5", *way.pop("words", []), **way)
    models = {command.split("--model ")[1].split()[0] for command in commands if "--model" in command}
    assert result.returncode == 0 and models == {"tiny", "tiny-I2V"}


@pytest.mark.parametrize("words", [["8"], ["all"], ["1", "--fast"]])
def test_other_words_are_refused(words, suite):
    result, commands = suite(*words)
    assert result.returncode == 2 and commands == []
    assert result.stderr.startswith("usage:")


def test_a_real_command_runs_on_a_cpu(suite, tmp_path):
    """pytest -m gpu and steps of tiny models have tests of their own; here the name of the device is found."""
    result, _ = suite("2", "--dry", PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0 and "---- part 2, on cpu" in result.stdout
