"""The soak counts what it runs, names what fails, and tells growing memory from a flat one."""

import json

import pytest
import soak
from faults import long_run, surroundings
from faults.long_run import Look


def fail():
    raise AssertionError("weights differ")


def skip():
    raise surroundings.Impossible("needs root")


def test_a_part_counts_its_trials_and_names_what_failed_and_why():
    trials = {"a": lambda: 2, "b": fail, "c": skip, "d": lambda: {"with_ms": 1.0}, "e": lambda: 0}
    result = soak.run_part(trials, jobs=2)
    assert [result[kind] for kind in ("trials", "passed", "failed", "skipped")] == [5, 3, 1, 1]
    assert result["failures"] == {"b": "AssertionError: weights differ"} and result["skips"] == {"c": "needs root"}
    assert result["measured"] == {"d": {"with_ms": 1.0}} and result["exit_codes"] == {"0": 1, "2": 1, "3": 0}


def test_the_report_keeps_the_parts_of_earlier_calls(tmp_path):
    path = tmp_path / "soak.json"
    path.write_text(json.dumps({"parts": {"kills": {"passed": 1}, "stops": {"passed": 2}}}))
    written = soak.report({"stops": {"passed": 3}}, path)
    assert written["parts"] == {"kills": {"passed": 1}, "stops": {"passed": 3}} and "torch" in written["versions"]


def looks(memory_of, files_of=lambda step: 9):
    return [Look(step, memory_of(step), files_of(step)) for step in range(0, 900, 10)]


def test_memory_that_settles_in_the_first_third_is_flat():
    parts = long_run.thirds(looks(lambda step: 500 + min(step, 200)))
    assert [part["files"] for part in parts] == [9, 9, 9]
    long_run.check_flat(parts)


@pytest.mark.parametrize(
    ("memory_of", "files_of", "words"),
    [
        (lambda step: 500 + step / 10, lambda step: 9, "memory grows"),
        (lambda step: 500, lambda step: step // 10, "files grow"),
    ],
)
def test_memory_or_files_that_grow_to_the_end_are_refused(memory_of, files_of, words):
    with pytest.raises(AssertionError, match=words):
        long_run.check_flat(long_run.thirds(looks(memory_of, files_of)))


def test_every_part_of_the_soak_has_trials(tmp_path, monkeypatch):
    monkeypatch.setattr("faults.damage.files_of", lambda *_: ["manifest.json", "training_state.pt"])
    args = soak.parse_args(["--kills", "3", "--inputs", "20", "--flips", "2"])
    world = soak.World(tmp_path, tmp_path, tmp_path)
    counts = {part: len(trials(world, args)) for part, trials in soak.PARTS.items()}
    assert all(counts.values()) and counts["inputs"] == 21 and counts["long"] == 3
