"""A run that ends once the loss on held-out clips no longer falls, and which of its weights are the result."""

import json

import pytest
import torch
from conftest import training_options
from make_example import make_clips
from safetensors.torch import load_file

import train_cogvideox_lora
from run import stopping, validation
from run.run_directory import read_best, read_metrics
from run.stopping import is_lower, reason, still_learned, validations_without_gain

HELD_OUT = {"validation_split": 2, "validation_steps": 1}
LORA_FILE = "pytorch_lora_weights.safetensors"


def courses(*losses):
    return list(enumerate(losses))


def test_lower_is_what_one_standard_error_of_the_clips_cannot_explain():
    assert is_lower([0.9, 1.9], [1.0, 2.0])
    assert not is_lower([0.7, 2.1], [1.0, 2.0])  # gains 0.3 and -0.1: 0.1 +- 0.2
    assert is_lower([0.99], [1.0]) and not is_lower([1.0], [1.0])


def test_a_steady_fall_is_a_gain_however_slow():
    slow = courses(*([1 - 0.001 * step, 2 - 0.001 * step] for step in range(50)))
    assert validations_without_gain(slow) == 0


def test_validations_that_jitter_about_a_level_are_without_gain():
    draw = torch.Generator().manual_seed(0)
    jitter = [(1 + 0.1 * torch.randn(4, generator=draw)).tolist() for _ in range(12)]
    falling = [[2.0] * 4, [1.5] * 4, [1.1] * 4]
    assert validations_without_gain(courses(*falling, *jitter)) >= 8
    assert validations_without_gain(courses(*falling)) == 0


def test_a_single_lucky_validation_is_smoothed():
    """Without smoothing, the drop of the second one could not be reached again: the run would seem to be at its end."""
    losses = courses([1.0], [0.5], [0.9], [0.8], [0.7], [0.6], [0.5])
    assert validations_without_gain(losses) == 0


def test_rows_without_losses_of_clips_are_left_out():
    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "validation_loss": 1.0, "validation_loss_t125": 1.0}]
    rows.append({"step": 3, "validation_loss_clip1": 2.0, "validation_loss_clip0": 1.0})
    assert stopping.of_each_clip(rows) == [(3, [1.0, 2.0])]
    assert reason(rows, {}) is None and reason(rows, {"options": {"stop_patience": 1}}) is None


def test_the_reason_names_the_clips_that_are_still_learned():
    rows = [
        {"step": step, "validation_loss_clip0": 1.0, "validation_loss_clip1": 1.0 - 0.1 * step} for step in range(1, 4)
    ]
    rows = [{**row, "validation_loss_clip0": 1.0 + 0.1 * row["step"]} for row in rows]
    assert still_learned(stopping.of_each_clip(rows), count=2) == [1]
    record = {"options": {"stop_patience": 2}, "held_out": ["a.mp4", "b.mp4"]}
    assert "over the 2 clips; since then it is lower on 1 of them: b.mp4" in reason(rows, record)


def test_validations_on_other_clips_are_forgotten():
    """After --change data, as many clips or others may be held out: only validations since then are compared."""
    rows = [{"step": step, "validation_loss_clip0": 1.0, "validation_loss_clip1": 1.0} for step in (1, 2, 3)]
    rows += [{"step": 4, "validation_loss_clip0": 2.0}, {"step": 5, "validation_loss_clip0": 2.5}]
    lineage = [{"checkpoint": "checkpoint-3", "step": 3, "changed": {"data: clips": ["a", "b"]}}]
    record = {"options": {"stop_patience": 1}, "held_out": ["a.mp4"], "lineage": lineage}
    assert "in 1 validations (--stop_patience), the loss" in reason(rows, record) and reason(rows[:4], record) is None
    unchanged = [{"checkpoint": "checkpoint-1", "step": 1, "changed": {"learning_rate": [1, 2]}}]
    assert reason(rows[:3], record | {"lineage": unchanged}) is not None


@pytest.mark.parametrize(("patience", "count", "is_said"), [(2, 2, True), (2, 3, False), (4, 1, True)])
def test_a_patience_that_cannot_run_out_is_said(patience, count, is_said):
    remark = stopping.remark_on_patience(patience, count)
    assert (remark is not None) == is_said
    assert not is_said or f"has {count} validations before its last update; it takes {patience + 1}" in remark


def with_losses(monkeypatch, losses):
    """Replaces the losses of two held-out clips by those given for each update."""
    measure = validation.held_out_losses

    def found(held_out, transformer, **options):
        measured, value = measure(held_out, transformer, **options), losses.pop(0)
        clips = {f"{stopping.CLIP_PREFIX}{clip}": value + 0.01 * clip for clip in range(2)}
        return measured | {"validation_loss": value} | clips

    monkeypatch.setattr(validation, "held_out_losses", found)


def test_a_run_ends_when_nothing_more_is_learned_and_its_best_weights_are_the_result(
    tiny_checkpoint, tmp_path, train, monkeypatch, capsys
):
    with_losses(monkeypatch, [1.0, 0.8, 0.6, 0.9, 0.9, 0.9, 0.9, 0.9])
    options = HELD_OUT | {"stop_patience": 2, "max_train_steps": 20}
    rows = train(tiny_checkpoint, tmp_path, **options)
    last = max(row["step"] for row in rows)
    assert last < 20 and (tmp_path / f"checkpoint-{last}").is_dir()
    said = capsys.readouterr().out
    assert (
        "the run ends here: in 2 validations (--stop_patience), the loss on held-out clips has fallen by no more"
        in said
    )
    assert "(update 2, the lowest loss on held-out clips)" in said
    result, best = (load_file(tmp_path / place / LORA_FILE) for place in ("", "checkpoint-best"))
    assert all(torch.equal(result[name], best[name]) for name in best) and best.keys() == result.keys()
    at_end = load_file(tmp_path / f"checkpoint-{last}" / LORA_FILE)
    assert any(not torch.equal(result[name], at_end[name]) for name in result)
    assert "held_out" in json.loads((tmp_path / "args.json").read_text())
    page = (tmp_path / "report.html").read_text()
    assert "in 2 validations (--stop_patience), the loss on held-out clips has fallen by no more than its" in page

    # The same command with --resume_from_checkpoint makes no further update.
    resumed = train(tiny_checkpoint, tmp_path, resume_from_checkpoint="auto", **options)
    assert max(row["step"] for row in resumed) == last
    assert "the run ends here" in capsys.readouterr().out


def test_a_run_that_still_learns_is_not_ended(tiny_checkpoint, tmp_path, train, monkeypatch, capsys):
    with_losses(monkeypatch, [1 - 0.1 * step for step in range(7)])
    rows = train(tiny_checkpoint, tmp_path, stop_patience=1, max_train_steps=6, **HELD_OUT)
    assert max(row["step"] for row in rows) == 6
    assert "cannot end this run" not in capsys.readouterr().out


def test_too_few_validations_for_the_patience_are_said_at_the_start(tiny_checkpoint, tmp_path, train, capsys):
    train(tiny_checkpoint, tmp_path, stop_patience=2, max_train_steps=2, **HELD_OUT)
    assert "--stop_patience 2: cannot end this run, which has 2 validations before its last" in capsys.readouterr().out


def test_the_best_on_other_clips_is_no_best(tiny_checkpoint, tmp_path, train, monkeypatch):
    """After --change data, other clips may be held out, on which every loss may be higher."""
    with_losses(monkeypatch, [1.0, 0.1, 0.9, 0.7, 0.8])
    options = HELD_OUT | {"result": "best", "checkpointing_steps": 1}
    train(tiny_checkpoint, tmp_path / "run", max_train_steps=1, **options)
    others = make_clips(tmp_path / "others", count=7)
    options |= {"resume_from_checkpoint": "latest", "change": ["data", "steps"], "instance_data_root": others}
    train(tiny_checkpoint, tmp_path / "run", max_train_steps=4, **options)
    assert read_best(tmp_path / "run")["step"] == 3


def test_the_losses_of_clips_have_the_mean_that_is_logged(tiny_checkpoint, tmp_path, train):
    train(tiny_checkpoint, tmp_path, stop_patience=5, max_train_steps=2, **HELD_OUT)
    rows = [row for row in read_metrics(tmp_path) if "validation_loss" in row]
    assert len(rows) == 3
    for row in rows:
        ((_, losses),) = stopping.of_each_clip([row])
        assert len(losses) == 2 and sum(losses) / 2 == pytest.approx(row["validation_loss"])


def test_the_best_whole_transformer_is_the_result(tiny_checkpoint, tmp_path, train, monkeypatch):
    with_losses(monkeypatch, [1.0, 0.5, 0.9, 0.9])
    options = HELD_OUT | {"training_type": "sft", "result": "best", "max_train_steps": 3}
    train(tiny_checkpoint, tmp_path, **options)
    name = "transformer/diffusion_pytorch_model.safetensors"
    result, best, last = (load_file(tmp_path / place / name) for place in ("", "checkpoint-best", "checkpoint-3"))
    assert all(torch.equal(result[key], best[key]) for key in best)
    assert any(not torch.equal(result[key], last[key]) for key in last)


@pytest.mark.parametrize("options", [{"stop_patience": 3}, {"result": "best"}])
def test_what_held_out_clips_decide_is_refused_without_them(options, capsys):
    with pytest.raises(SystemExit, match="2"):
        train_cogvideox_lora.parse_args(training_options("base", "clips", "out", **options))
    assert "is decided by the loss on held-out clips; add --validation_split" in capsys.readouterr().err
