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
folder=$(dirname "$0")
[[ $1 == -c && $2 == "import bitsandbytes" ]] && {{ [[ ! -f $folder/without-bitsandbytes ]]; exit; }}
[[ $1 == -c ]] && {{ echo "${{TEST_GPU:-NVIDIA H100 Test}}"; exit; }}
[[ $1 == benchmarks/proof.py ]] && exec {sys.executable} "$@"
echo "$*" >> "$folder/commands"
[[ -f $folder/wait && "$*" == *fp8* ]] && {{ touch "$folder/waiting"; sleep 60; }}
if [[ ! -f $folder/repaired ]]; then
  case "$*" in
    *int8*) echo "a reason in $HOME/clips"; exit 3 ;;
    *nf4*) exit 1 ;;
  esac
fi
while (($# > 1)) && [[ $1 != --output ]]; do shift; done
result='{{"seconds_per_step": 1.5, "predicted_peak_gib": 7.34, "peak_memory_gib": 7.5}}'
[[ -f $folder/small-gpu && $3 == --steps && "$*" == *none* ]] &&
  {{ echo '{{"does_not_fit": {{"predicted_peak_gib": 30.29, "gpu_gib": 23.6}}}}' > "$2"; exit 2; }}
[[ $1 == --output ]] && echo "$result" > "$2"
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
    return json.loads((tmp_path / "prove-h100-test.json").read_text())


def wait_for(file, seconds=30):
    end = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < end, f"{file} is not there after {seconds} seconds"
        time.sleep(0.05)


def test_one_file_has_every_run_and_failures_with_their_last_lines(suite, tmp_path):
    result, commands = suite("6")
    found = record(tmp_path)
    assert result.returncode == 1 and len(commands) == 6
    assert found["gpu"] == "NVIDIA H100 Test" and {"driver", "versions", "commit", "date"} <= found.keys()
    assert list(found["runs"]) == NAMES
    passed, failed = found["runs"]["2b-full-swapped"], found["runs"]["5b-full-int8"]
    assert passed["exit_code"] == 0 and passed["result"]["peak_memory_gib"] == 7.5 and passed["seconds"] < 60
    assert "step.py --model 2b" in passed["command"] and passed["commit"] == found["commit"]
    assert (failed["exit_code"], failed["last_lines"]) == (3, ["a reason in ~/clips"])
    assert "failed: 5b-full-int8, exit code 3" in result.stdout
    assert [path.name for path in tmp_path.glob("*.json")] == ["prove-h100-test.json"]
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
    assert proof.done_here(found) == []
    row = proof.row("2b-full-swapped", found["runs"]["2b-full-swapped"], "b")
    assert row[-1] == "passed, at aaaaaaaaa"


def test_ctrl_c_keeps_what_is_done_and_the_same_command_continues(command, suite, tmp_path):
    (tmp_path / "repaired").touch()
    (tmp_path / "wait").touch()
    process = subprocess.Popen(**command("6"), stdout=subprocess.PIPE, start_new_session=True)
    wait_for(tmp_path / "waiting")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and "stopped; the same command continues" in output
    assert list(record(tmp_path)["runs"]) == NAMES[:3]
    (tmp_path / "wait").unlink()
    result, commands = suite("6")
    assert result.returncode == 0 and len(commands) == 3
    assert sorted(record(tmp_path)["runs"]) == sorted(NAMES)


def with_a_terminal():
    """Undoes the nohup under which the tests may run."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize("nohup", [False, True])
def test_a_lost_terminal_ends_the_command_that_runs_unless_nohup_was_asked_for(nohup, tmp_path):
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    script = f"trap 'touch {ended}; exit' INT; touch {begun}; for i in {{1..600}}; do sleep 0.1; done"
    line = [sys.executable, str(ROOT / "benchmarks" / "proof.py"), "run", "--gpu", "x", "--limit", "60"]
    line += ["--output", str(tmp_path / "none.json"), str(tmp_path / "record.json"), "long", "bash", "-c", script]
    line = ["nohup", *line] if nohup else line
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, preexec_fn=with_a_terminal)
    wait_for(begun)
    process.send_signal(signal.SIGHUP)
    if nohup:
        time.sleep(0.5)
        assert process.poll() is None and not ended.exists()
        process.send_signal(signal.SIGTERM)
    assert process.wait(30) == proof.INTERRUPTED and ended.exists()
    assert not (tmp_path / "record.json").exists()


def test_a_lost_terminal_stops_the_suite(command, tmp_path):
    (tmp_path / "repaired").touch()
    (tmp_path / "wait").touch()
    options = {"stdout": subprocess.PIPE, "start_new_session": True, "preexec_fn": with_a_terminal}
    process = subprocess.Popen(**command("6"), **options)
    wait_for(tmp_path / "waiting")
    os.killpg(process.pid, signal.SIGHUP)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130 and "stopped; the same command continues" in output
    assert list(record(tmp_path)["runs"]) == NAMES[:3]


def test_what_does_not_fit_as_predicted_is_said_is_no_failure_and_is_not_tried_again(suite, tmp_path):
    (tmp_path / "small-gpu").touch()
    result, commands = suite("1")
    assert result.returncode == 0 and len(commands) == 3
    assert record(tmp_path)["runs"]["2b-none"]["result"]["does_not_fit"]["gpu_gib"] == 23.6
    rows = {line.split("  ")[0]: line.split() for line in result.stdout.split("run  ")[-1].splitlines()}
    assert " ".join(rows["2b-none"][1:]) == "- 30.29 - does not fit, predicted"
    assert "failed" not in result.stdout
    second, commands = suite("1")
    assert second.returncode == 0 and commands == []


def test_quantised_blocks_that_need_bitsandbytes_are_skipped_without_it(suite, tmp_path):
    (tmp_path / "repaired").touch()
    (tmp_path / "without-bitsandbytes").touch()
    result, commands = suite("6")
    assert result.returncode == 0 and len(commands) == 5 and "nf4" not in "".join(commands)
    assert "skipped 5b-full-nf4: needs bitsandbytes; pip install bitsandbytes" in result.stdout
    dry, _ = suite("6", "--dry")
    assert "--base_precision nf4" in dry.stdout  # benchmarks/table.py lists it


def test_slower_gpus_get_more_time_for_each_run_and_as_much_for_a_part(suite):
    fast, slow = (suite("6", "--dry", TEST_GPU=name)[0].stdout for name in ("NVIDIA H200", "NVIDIA GeForce RTX 4090"))
    limits = [[int(line.split()[1]) for line in text.splitlines()[1:]] for text in (fast, slow)]
    assert limits[1] == [3 * limit for limit in limits[0]]
    result, _ = suite("6", TEST_GPU="NVIDIA GeForce RTX 4090")
    assert "part 6: 6 runs to do, at most 9 minutes" in result.stdout


def test_relative_paths_are_those_of_the_folder_in_which_the_suite_is_started(command, tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "example.py").touch()
    line = command("3", PYTHON="./python", PROVE_RESULTS="a folder", VERSUS_REFERENCE="a folder/example.py")
    result = subprocess.run(**line, cwd=tmp_path, capture_output=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((folder / "prove-h100-test.json").read_text())["runs"]
    assert [run["result"]["seconds_per_step"] for run in found.values()] == [1.5, 1.5]
    assert f"--reference {tmp_path}/a folder/example.py" in (tmp_path / "commands").read_text()


@pytest.mark.parametrize("harm", ["damaged", "in the way"])
def test_nothing_runs_where_its_outcome_could_not_be_kept(harm, suite, tmp_path):
    if harm == "damaged":
        (tmp_path / "prove-h100-test.json").write_text("{")
    else:
        (tmp_path / ".prove").touch()
    result, commands = suite("6")
    assert result.returncode == 2 and commands == []


def test_the_page_of_the_results_does_not_make_another_commit(monkeypatch, tmp_path):
    def git(*words):
        line = ["git", "-c", "user.name=x", "-c", "user.email=x@x", *words]
        subprocess.run(line, cwd=tmp_path, check=True, capture_output=True)

    for name in ("docs/hardware.md", "benchmarks/results/a.json", "files.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a\n")
    for words in (("init",), ("add", "."), ("commit", "-m", "x")):
        git(*words)
    monkeypatch.setattr(proof, "ROOT", tmp_path)
    commit = proof.commit()
    for name in ("docs/hardware.md", "benchmarks/results/a.json"):
        (tmp_path / name).write_text("b\n")
    assert proof.commit() == commit and len(commit) == 40
    (tmp_path / "files.py").write_text("b\n")
    assert proof.commit().startswith(f"{commit}+")


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


def test_help_is_the_head_of_the_script(suite):
    result, commands = suite("--help")
    assert result.returncode == 0 and commands == []
    assert result.stdout.startswith("Proves on a GPU") and result.stdout.endswith("Installs nothing.\n")


def test_a_real_command_runs_on_a_cpu(suite, tmp_path):
    """pytest -m gpu and steps of tiny models have tests of their own; here the name of the device is found."""
    result, _ = suite("2", "--dry", PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0 and "---- part 2, on cpu" in result.stdout
