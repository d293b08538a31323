"""benchmarks/gpu_suite.sh, with a stand-in for Python that writes down its command line."""

import os
import subprocess
import sys

import pytest
import versus
from conftest import ROOT

from cogvideox import compute

PYTHON = """#!/usr/bin/env bash
[[ $1 == -c ]] && { echo test-gpu; exit; }
echo "$*" >> "$(dirname "$0")/commands"
case "$*" in
  *int8*) echo a reason; exit 3 ;;
  *nf4*) exit 124 ;;
esac
"""


@pytest.fixture
def suite(tmp_path):
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)

    def run(*words, **environment):
        environment = {"PYTHON": str(tmp_path / "python"), "GPU_SUITE_RESULTS": str(tmp_path), **environment}
        command = ["bash", ROOT / "benchmarks" / "gpu_suite.sh", *words]
        result = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=60)
        file = tmp_path / "commands"
        return result, file.read_text().splitlines() if file.exists() else []

    return run


def test_a_failure_is_recorded_and_the_rest_goes_on(suite, tmp_path):
    (tmp_path / "failures.txt").write_text("part 6, old (test-gpu): gone\npart 1, other (test-gpu): stays\n")
    result, commands = suite("6")
    assert result.returncode == 1
    first, failed, late = (tmp_path / "failures.txt").read_text().splitlines()
    assert first == "part 1, other (test-gpu): stays"
    assert failed.startswith("part 6, 5b-full-int8 (test-gpu): exit code 3") and "a reason" in failed
    assert late.startswith("part 6, 5b-full-nf4 (test-gpu): exit code 124 (124: over 75 s)")
    assert [command for command in commands if "fp8" in command]  # after int8


def test_what_does_not_fit_into_a_part_is_recorded(suite, tmp_path):
    result, commands = suite("2", GPU_SUITE_PART_SECONDS="4")
    assert result.returncode == 1 and commands == []
    assert "2b-attention (test-gpu): not run: the 4 seconds of the part are over" in result.stdout


def test_compiled_steps_are_timed_at_every_level(suite):
    _, commands = suite("2")
    compiled = [command for command in commands if "--compile" in command]
    levels = [command.split("--gradient_checkpointing ")[1].split()[0] for command in compiled]
    assert sorted(levels) == sorted(compute.LEVELS)


@pytest.mark.parametrize("words", [[], ["--tiny"]])
def test_comparisons_take_their_options_and_all_fit_into_their_parts(words, suite):
    result, _ = suite("all", "--dry", *words, VERSUS_REFERENCE=__file__)
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
    result, commands = suite("all", "--dry")
    assert result.returncode == 0 and commands == []
    assert result.stdout.count("---- part") == 7
    assert "benchmarks/step.py --model 1.5-I2V" in result.stdout and "-m pytest -m gpu -v" in result.stdout


@pytest.mark.parametrize("way", [{"words": ["--tiny"]}, {"GPU_SUITE_MODEL": "tiny"}])
def test_tiny_takes_no_real_model(way, suite):
    way = dict(way)
    result, commands = suite("5", *way.pop("words", []), **way)
    models = {command.split("--model ")[1].split()[0] for command in commands if "--model" in command}
    assert result.returncode == 0 and models == {"tiny", "tiny-I2V"}


@pytest.mark.parametrize("words", [[], ["8"], ["1", "--fast"]])
def test_other_words_are_refused(words, suite):
    result, commands = suite(*words)
    assert result.returncode == 2 and commands == []
    assert result.stderr.startswith("usage:")


def test_a_real_command_runs_on_a_cpu(suite, tmp_path):
    """pytest -m gpu and steps of tiny models have tests of their own; here the name of the device is found."""
    result, _ = suite("2", "--dry", PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0 and "---- part 2, on cpu" in result.stdout
