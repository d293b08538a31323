"""What a resumed run may change, what it is refused, and what each change does to the state that it restores."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, reset_accelerate
from make_example import make_checkpoint, make_clips
from safetensors.torch import load_file, save_file

from cogvideox.lora_files import LORA_FILE
from run import course, run_directory
from run.run_directory import read_args

COURSE = {"max_train_steps": 4, "checkpointing_steps": 2}


def refused(capsys, call, *parts):
    with pytest.raises(SystemExit) as stop:
        call()
    reset_accelerate()
    message = capsys.readouterr().err
    assert stop.value.code == 2 and all(part in message for part in parts), message


def column(rows, name):
    return [row[name] for row in rows]


@pytest.fixture
def half(tiny_checkpoint, tmp_path, train):
    """A run of four updates, and its checkpoint after two in the way of a killed run."""
    train(tiny_checkpoint, tmp_path / "run", **COURSE)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    (tmp_path / "run" / LORA_FILE).unlink()
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"learning_rate": 5e-4}, ["--learning_rate 0.0005: checkpoint-2 was trained with 0.001", "learning_rate "]),
        ({"lr_scheduler": "cosine"}, ["--lr_scheduler cosine: checkpoint-2 was trained with constant", "schedule "]),
        ({"train_batch_size": 2}, ["--train_batch_size 2: checkpoint-2 was trained with 1", "--change batch "]),
        ({"gradient_accumulation_steps": 3}, ["--gradient_accumulation_steps 3: ", "--change batch "]),
        ({"fps": 4}, ["the clips are not those of checkpoint-2", "frames ", "--change data "]),
        ({"random_flip": True}, ["the clips are not those of checkpoint-2", "--change data "]),
    ],
)
def test_another_course_is_refused_until_it_is_allowed(half, tiny_checkpoint, train, capsys, options, parts):
    resumed = COURSE | options | {"resume_from_checkpoint": "latest"}
    refused(capsys, lambda: train(tiny_checkpoint, half, **resumed), *parts)
    change = next(name for name in course.CHANGES if f"{name} " in parts[-1])
    rows = train(tiny_checkpoint, half, **resumed, change=change)
    assert column(rows, "step") == [1, 2, 3, 4]
    assert read_args(half)["lineage"][-1]["step"] == 2 and read_args(half)["lineage"][-1]["changed"]


def test_what_may_differ_is_said_in_a_line(half, tiny_checkpoint, train, capsys):
    train(tiny_checkpoint, half, **COURSE | {"max_train_steps": 5}, lora_dropout=0.5, resume_from_checkpoint="auto")
    said = capsys.readouterr().out
    assert "continues from checkpoint-2 with other values: " in said
    assert "--lora_dropout 0.5 (was 0.0)" in said and "--max_train_steps 5 (was 4)" in said


def test_more_updates_are_a_change_where_the_schedule_depends_on_them(tiny_checkpoint, tmp_path, train, capsys):
    options = COURSE | {"lr_scheduler": "linear", "learning_rate": 1e-3}
    train(tiny_checkpoint, tmp_path / "run", **options)
    longer = options | {"max_train_steps": 8, "resume_from_checkpoint": "latest"}
    refused(capsys, lambda: train(tiny_checkpoint, tmp_path / "run", **longer), "--change steps allows it")
    rows = train(tiny_checkpoint, tmp_path / "run", **longer, change="steps")
    assert column(rows, "lr")[4:] == pytest.approx([5e-4, 3.75e-4, 2.5e-4, 1.25e-4])  # of a run of 8 from its beginning


def test_a_new_learning_rate_and_schedule_hold_from_the_first_update_on(half, tiny_checkpoint, train):
    options = {"learning_rate": 8e-4, "lr_scheduler": "linear", "change": ["learning_rate", "schedule"]}
    rows = train(tiny_checkpoint, half, **COURSE | options, resume_from_checkpoint="latest")
    assert column(rows, "lr") == pytest.approx([1e-3, 1e-3, 4e-4, 2e-4])  # two of four updates are done


def test_a_changed_run_equals_one_whose_checkpoint_had_the_new_value(tiny_checkpoint, tmp_path, train):
    """The moments of the optimizer stay: only the step size differs from the undisturbed run's."""
    train(tiny_checkpoint, tmp_path / "a", **COURSE)
    options = COURSE | {"learning_rate": 5e-4, "change": "learning_rate"}
    train(tiny_checkpoint, tmp_path / "b", **options, resume_from_checkpoint=tmp_path / "a" / "checkpoint-2")
    saved = [torch.load(tmp_path / run / "checkpoint-4" / "training_state.pt") for run in "ab"]
    steps = [next(iter(state["optimizer"]["state"].values()))["step"] for state in saved]
    assert steps[0] == steps[1] == 4
    start = load_file(tmp_path / "a" / "checkpoint-2" / LORA_FILE)
    moved = [load_file(tmp_path / run / "checkpoint-4" / LORA_FILE) for run in "ab"]
    distances = [sum((weights[name] - start[name]).abs().sum() for name in start) for weights in moved]
    assert distances[1] / distances[0] == pytest.approx(0.5, rel=0.1)


def test_what_is_no_checkpoint_is_named_with_what_to_pass_instead(tiny_checkpoint, tmp_path, train, capsys):
    run, branch = tmp_path / "run", tmp_path / "branch"
    train(tiny_checkpoint, run, max_train_steps=2, checkpointing_steps=1, validation_split=1)
    (run / "checkpoint-1" / "training_state.json").write_text("{")
    for folder, named, says in (
        (branch, run, f"it is the folder of a run: name a checkpoint in it, such as {run}/checkpoint-2"),
        (branch, run / LORA_FILE, "a new run can start from it with --lora_path"),
        (branch, run / "checkpoint-best", "a new run can start from it with --lora_path"),
        (branch, run / "checkpoint-1", "damaged (Expecting property name enclosed in double quotes: line 1 column 2"),
        (branch, run / "checkpoint-1", f"beside it, {run} holds checkpoint-2"),
        (branch, "checkpoint-7", f"no such folder; {branch} holds no checkpoint; pass auto, which then starts"),
        (run, "checkpoint-7", f"no such folder; {run} holds checkpoint-1, checkpoint-2; name one of those, or pass"),
        (run, "checkpoint-1", f"{run} holds checkpoint-2; name one of those, or pass auto, which resumes from"),
    ):
        refused(capsys, lambda: train(tiny_checkpoint, folder, resume_from_checkpoint=named), says)  # noqa: B023


def test_another_number_of_clips_keeps_the_share_of_the_epoch(tiny_checkpoint, tmp_path, train, capsys):
    clips = make_clips(tmp_path / "clips", count=4)
    options = {"instance_data_root": clips, "checkpointing_steps": 2, "max_train_steps": 2, "learning_rate": 1e-30}
    train(tiny_checkpoint, tmp_path / "run", **options)
    lines = {name: (clips / name).read_text().splitlines() for name in ("prompts.txt", "videos.txt")}
    for name, (first, *others) in lines.items():
        (clips / name).write_text("\n".join([first, *others, first, first]) + "\n")
    resumed = options | {"max_train_steps": 5, "resume_from_checkpoint": "latest"}
    refused(capsys, lambda: train(tiny_checkpoint, tmp_path / "run", **resumed), "clips 4, now 6", "--change data")
    rows = train(tiny_checkpoint, tmp_path / "run", **resumed, change="data")
    assert "with other values: data: clips 6 (was 4), data: videos" in capsys.readouterr().out
    assert column(rows, "epoch") == pytest.approx([0.25, 0.5, 4 / 6, 5 / 6, 1], abs=1e-4)


def test_other_weights_of_the_same_kind_of_base_are_refused(half, tiny_checkpoint, tmp_path, train, capsys):
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    (path,) = (other / "transformer").glob("*.safetensors")
    weights = load_file(path)
    save_file({name: weight * 1.01 for name, weight in weights.items()}, path, {"format": "pt"})
    options = COURSE | {"resume_from_checkpoint": "latest"}
    refused(capsys, lambda: train(other, half, **options), "the base model's weights are not those of checkpoint-2")
    assert column(train(other, half, **options, change="base"), "step") == [1, 2, 3, 4]


def test_the_same_base_model_in_another_folder_is_the_same(half, tmp_path, train):
    rows = train(make_checkpoint(tmp_path / "copy", "2b"), half, **COURSE, resume_from_checkpoint="latest")
    assert column(rows, "step") == [1, 2, 3, 4]


def test_a_branch_begins_with_the_rows_of_its_origin_and_leaves_that_alone(tiny_checkpoint, tmp_path, train):
    straight = train(tiny_checkpoint, tmp_path / "a", **COURSE)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    origin = tmp_path / "a" / "checkpoint-2"
    branch = train(tiny_checkpoint, tmp_path / "b", resume_from_checkpoint=origin, **COURSE | {"max_train_steps": 6})
    assert column(branch, "loss")[:4] == column(straight, "loss") and len(branch) == 6
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()} == before
    (entry,) = read_args(tmp_path / "b")["lineage"]
    assert entry == {"checkpoint": str(origin), "step": 2, "changed": {"max_train_steps": [4, 6]}}
    page = (tmp_path / "b" / "report.html").read_text()
    assert "continued from" in page and f"{origin}, with max_train_steps 6 (was 4)" in page


def test_change_does_nothing_without_a_checkpoint(tiny_checkpoint, tmp_path, train, capsys):
    refused(capsys, lambda: train(tiny_checkpoint, tmp_path / "run", change="steps"), "--change: does nothing without")


def test_auto_starts_where_there_is_nothing_and_resumes_where_there_is(tiny_checkpoint, tmp_path, train):
    straight = train(tiny_checkpoint, tmp_path / "a", **COURSE)
    first = train(tiny_checkpoint, tmp_path / "b", **COURSE | {"max_train_steps": 2}, resume_from_checkpoint="auto")
    both = train(tiny_checkpoint, tmp_path / "b", **COURSE, resume_from_checkpoint="auto")
    assert column(both, "loss") == column(straight, "loss") and len(first) == 2


def test_equal_runs_write_equal_files(tiny_checkpoint, tmp_path, train):
    options = COURSE | {"validation_split": 1, "validation_steps": 2, "ema_decay": 0.5}
    for run in "ab":
        train(tiny_checkpoint, tmp_path / run, **options)
    names = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    different = {
        name.name for name in names if (tmp_path / "a" / name).read_bytes() != (tmp_path / "b" / name).read_bytes()
    }
    assert different <= {"metrics.jsonl", "args.json", "report.html"}  # times, the folder's name
    assert len(names) > 10


def test_a_checkpoint_is_saved_when_enough_minutes_have_passed(tiny_checkpoint, tmp_path, train, monkeypatch):
    now = iter(range(0, 100_000, 25))  # seconds
    monkeypatch.setattr("train_cogvideox_lora.time.perf_counter", lambda: next(now))
    train(tiny_checkpoint, tmp_path / "run", max_train_steps=4, save_minutes=1, logging_steps=100)
    assert len(run_directory.list_checkpoints(tmp_path / "run")) > 1


def test_a_second_run_into_the_same_folder_is_refused(tiny_checkpoint, tmp_path, train, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    held = (
        "import sys; sys.path.insert(0, '.'); from pathlib import Path; from run.run_directory import locked\n"
        f"with locked(Path({str(folder)!r})): print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        refused(capsys, lambda: train(tiny_checkpoint, folder, **COURSE), f"process {other.pid} on ", "is training")
        other.kill()
        other.wait()
    assert len(train(tiny_checkpoint, folder, **COURSE)) == 4  # a dead owner keeps nothing
    assert not (folder / ".lock").exists()


def as_format_1(checkpoint):
    """Rewrites a checkpoint as the first versions wrote it: without a manifest, and only with options that it kept."""
    (checkpoint / "manifest.json").unlink()
    state = json.loads((checkpoint / "training_state.json").read_text())
    options = {name: state["options"][name] for name in (*course.KEPT, "learning_rate", "scale_lr", "train_batch_size")}
    kept = {name: state[name] for name in ("step", "batches_seen", "lr_scheduler", "scaler")}
    old = kept | {"fixed": options | {"transformer": state["base"]["identity"]}}
    (checkpoint / "training_state.json").write_text(json.dumps(old))


@pytest.mark.parametrize("kind", ["lora", "sft"])
def test_a_checkpoint_of_format_1_resumes(tiny_checkpoint, tmp_path, train, kind):
    straight = train(tiny_checkpoint, tmp_path / "run", training_type=kind, **COURSE)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    as_format_1(tmp_path / "run" / "checkpoint-2")
    resumed = train(tiny_checkpoint, tmp_path / "run", training_type=kind, **COURSE, resume_from_checkpoint="latest")
    assert column(resumed, "loss") == column(straight, "loss")


def test_a_checkpoint_that_an_early_version_wrote_resumes(tiny_checkpoint, tmp_path, train):
    """tests/format_1 is a file that was kept, not one that this version makes."""
    shutil.copytree(ROOT / "tests" / "format_1", tmp_path / "run" / "checkpoint-1")
    options = {"rank": 1, "lora_target_modules": "to_q", "ema_decay": 0.5, "resume_from_checkpoint": "latest"}
    rows = train(tiny_checkpoint, tmp_path / "run", max_train_steps=3, **options)
    assert column(rows, "step") == [2, 3]
    before = load_file(tmp_path / "run" / "checkpoint-1" / LORA_FILE)
    after = load_file(tmp_path / "run" / LORA_FILE)
    assert before.keys() == after.keys()
    assert all(0 < (after[name] - before[name]).abs().max() < 5e-3 for name in before)  # two small steps from there
