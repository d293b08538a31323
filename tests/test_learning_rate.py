"""The learning rate: LoRA+, and what short trials find."""

import json
import math
import signal

import pytest
import torch
from conftest import training_options
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file

import train_cogvideox_lora
from cogvideox.base_model import load_transformer, read_base_model
from cogvideox.lora import Lora, add_lora, loraplus_parameters, trained_parameters
from files import CannotContinue
from run import course, optimizers, rate_search, validation

LORA = Lora(rank=4, lora_alpha=4, lora_target_modules=("to_q", "to_k", "to_v", "to_out.0"))


@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_plus_has_the_rates_of_pefts(tiny_checkpoint, use_dora):
    transformer = load_transformer(read_base_model(str(tiny_checkpoint)), torch.float32)
    add_lora(transformer, LORA._replace(use_dora=use_dora), torch.float32)
    optimizer = torch.optim.AdamW(trained_parameters(transformer), lr=1e-3)
    optimizers.multiply_learning_rate(optimizer, loraplus_parameters(transformer), 4.0)
    pefts = create_loraplus_optimizer(transformer, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4.0)

    def rates(optimizer):
        return {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}

    assert rates(optimizer) == rates(pefts) and set(rates(optimizer).values()) == {1e-3, 4e-3}


def test_a_resumed_run_of_lora_plus_equals_a_straight_one(tiny_checkpoint, tmp_path, train):
    options = {"loraplus_lr_ratio": 4, "lr_scheduler": "cosine", "checkpointing_steps": 2}
    straight = train(tiny_checkpoint, tmp_path / "a", max_train_steps=4, **options)
    train(tiny_checkpoint, tmp_path / "b", max_train_steps=4, **options)
    for folder in (tmp_path / "b").glob("checkpoint-4"):
        folder.rename(tmp_path / "aside")
    resumed = train(tiny_checkpoint, tmp_path / "b", max_train_steps=4, resume_from_checkpoint="latest", **options)

    def losses(rows):
        return [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in rows if "loss" in row]

    assert losses(resumed)[-2:] == losses(straight)[-2:]
    plain = train(tiny_checkpoint, tmp_path / "c", max_train_steps=4, lr_scheduler="cosine")
    assert losses(plain)[0][:2] == losses(straight)[0][:2] and losses(plain)[-1] != losses(straight)[-1]


@pytest.mark.parametrize("ratio", [3.0, 4.0, 0.7, 16.3])
def test_a_new_learning_rate_keeps_the_ratio_of_lora_plus(ratio):
    """To the last bit: a run on a rate that was found equals one on the same rate that was given."""
    rates = []
    for first, new in ((1.8e-3, 0.034), (0.034, 0.034)):
        weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
        optimizer = torch.optim.AdamW(weights, lr=first)
        optimizers.multiply_learning_rate(optimizer, weights[1:], ratio)
        schedule = optimizers.make_lr_scheduler(optimizer, "constant", warmup_steps=0, total_steps=9)
        course.set_learning_rate(optimizer, schedule, new)
        assert [group["lr"] for group in optimizer.param_groups] == schedule.get_last_lr()
        rates.append(schedule.get_last_lr())
    assert rates == [[0.034, 0.034 * ratio]] * 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"optimizer": "prodigy", "loraplus_lr_ratio": 4}, "--optimizer prodigy, which has one learning rate"),
        ({"training_type": "sft", "loraplus_lr_ratio": 4}, "--training_type sft"),
        ({"loraplus_lr_ratio": 0}, "--loraplus_lr_ratio 0.0: must be above 0"),
        ({"learning_rate": "inf"}, "--learning_rate inf: must be above 0 and finite"),
    ],
)
def test_rates_and_ratios_that_cannot_work_are_refused(options, expected, capsys):
    with pytest.raises(SystemExit, match="2"):
        train_cogvideox_lora.parse_args(training_options("base", "clips", "out", **options))
    assert expected in capsys.readouterr().err


# ---- --learning_rate auto --------------------------------------------------------------------------------------------


FIRST = rate_search.FIRST_RATES["lora"]


def trials_of(best: float, *, diverges_above: float = float("inf")):
    """Returns a loss with its minimum at `best`, and the list of the rates at which it was asked for."""
    asked = []

    def loss_of(rate: float) -> float:
        asked.append(rate)
        return float("inf") if rate > diverges_above else 0.1 + abs(torch.tensor(rate / best).log().item())

    return loss_of, asked


@pytest.mark.parametrize("best", [1e-5, 5e-5, 3e-4, 1.1e-3, 1.8e-3, 7e-3, 4e-2])
def test_the_best_rate_is_found_within_half_a_step(best):
    """Rates are a factor of 1.73 apart on the side where the best is, so the nearest is at most 1.32 from it."""
    loss_of, asked = trials_of(best)
    found = rate_search.find(loss_of, FIRST, trial_updates=20, total_updates=20)
    assert len(asked) == len(set(asked)) <= rate_search.MOST_TRIALS and list(found.losses) == asked
    assert 1 / 1.36 < found.learning_rate / best < 1.36  # in two digits
    assert found.learning_rate == pytest.approx(min(found.losses, key=found.losses.get), rel=0.05)


def test_a_second_rate_that_is_worse_by_chance_does_not_end_the_way_up():
    by_step = {-1: 0.379, 0: 0.374, 1: 0.417, 1.5: 0.122, 2: 0.168, 3: float("inf")}  # measured, 15 updates each

    def loss_of(rate: float) -> float:
        steps = math.log(rate / FIRST, rate_search.SPACING)
        return next(loss for step, loss in by_step.items() if abs(step - steps) < 0.1)

    found = rate_search.find(loss_of, FIRST, trial_updates=15, total_updates=400)
    assert len(found.losses) == 5 and found.learning_rate == 1.8e-3


def test_rates_that_diverge_are_not_chosen_and_none_is_an_error():
    loss_of, asked = trials_of(1.0, diverges_above=1e-3)
    found = rate_search.find(loss_of, FIRST, trial_updates=20, total_updates=20)
    assert 5e-4 < found.learning_rate < 1e-3 and found.as_json()["loss_by_rate"]["1.8e-03"] is None
    with pytest.raises(CannotContinue, match="the loss is not finite with any of"):
        rate_search.find(lambda _: float("inf"), FIRST, trial_updates=1, total_updates=1)


def test_the_search_goes_on_downwards_where_the_first_rates_all_diverge():
    loss_of, asked = trials_of(3e-5, diverges_above=1e-4)
    found = rate_search.find(loss_of, FIRST, trial_updates=20, total_updates=20)
    assert len(asked) == rate_search.MOST_TRIALS and 1 / 1.4 < found.learning_rate / 3e-5 < 1.4


@pytest.mark.parametrize(("best", "is_said"), [(1e-9, True), (1e9, True), (1e-3, False)])
def test_a_best_rate_at_the_end_of_what_was_tried_is_said(best, is_said):
    loss_of, _ = trials_of(best)
    found = rate_search.find(loss_of, FIRST, trial_updates=20, total_updates=20)
    assert any("at the end of what was tried" in line for line in rate_search.describe(found)) == is_said


def test_what_is_no_learning_rate_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        train_cogvideox_lora.parse_args(training_options("base", "clips", "out", learning_rate="fast"))
    assert "'fast': must be a number above 0, or auto" in capsys.readouterr().err


def test_a_longer_run_has_a_lower_rate():
    assert rate_search.for_longer_run(1e-2, 20, 20) == 1e-2
    assert rate_search.for_longer_run(1e-2, 20, 2000) == 1e-3
    assert rate_search.for_longer_run(1.234e-2, 20, 10) == 1.2e-2


AUTO = {"learning_rate": "auto", "validation_split": 2}


def test_a_run_with_the_rate_that_was_found_is_a_run_with_that_rate(tiny_checkpoint, tmp_path, train, capsys):
    """The trials leave nothing behind: weights, optimizer, average, order and noise are those of a fresh run."""
    options = {"max_train_steps": 3, "ema_decay": 0.9, "loraplus_lr_ratio": 2, "lr_scheduler": "cosine"}
    rows = train(tiny_checkpoint, tmp_path / "auto", **AUTO | options)
    said = capsys.readouterr().out
    assert "learning rate auto: 4 to 9 trials of 3 updates, each" in said
    found = json.loads((tmp_path / "auto" / "args.json").read_text())["learning_rate_found"]
    assert f"learning rate {found['learning_rate']:g}: the best of the trials" in said
    assert f"trial {len(found['loss_by_rate'])}: learning rate" in said
    assert 4 <= len(found["loss_by_rate"]) <= 9 and found["updates_of_a_trial"] == 3
    assert "Learning rates that were tried" in (tmp_path / "auto" / "report.html").read_text()

    options |= {"learning_rate": found["learning_rate"], "validation_split": 2}
    given = train(tiny_checkpoint, tmp_path / "given", **options)
    keys = ("step", "loss", "grad_norm", "lr", "validation_loss")
    assert [[row.get(key) for key in keys] for row in rows] == [[row.get(key) for key in keys] for row in given]
    weights = [load_file(tmp_path / run / "pytorch_lora_weights.safetensors") for run in ("auto", "given")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_a_resumed_run_takes_the_rate_that_its_checkpoint_has(tiny_checkpoint, tmp_path, train, capsys):
    options = AUTO | {"checkpointing_steps": 2, "max_train_steps": 4, "lr_scheduler": "linear"}
    straight = train(tiny_checkpoint, tmp_path / "a", **options)
    train(tiny_checkpoint, tmp_path / "b", **options)
    (tmp_path / "b" / "checkpoint-4").rename(tmp_path / "aside")
    capsys.readouterr()
    resumed = train(tiny_checkpoint, tmp_path / "b", resume_from_checkpoint="latest", **options)
    assert "trials" not in capsys.readouterr().out
    keys = ("step", "loss", "lr")
    assert [[row.get(key) for key in keys] for row in resumed] == [[row.get(key) for key in keys] for row in straight]
    found = [json.loads((tmp_path / run / "args.json").read_text())["learning_rate_found"] for run in ("a", "b")]
    assert found[0] == found[1] is not None


def test_other_batches_of_a_resumed_run_leave_the_rate_that_was_found(tiny_checkpoint, tmp_path, train, capsys):
    """A number is a new peak, by which --scale_lr could change; what was found is in the checkpoint only."""
    train(tiny_checkpoint, tmp_path, max_train_steps=2, **AUTO)
    found = json.loads((tmp_path / "args.json").read_text())["learning_rate_found"]["learning_rate"]
    options = AUTO | {"max_train_steps": 4, "train_batch_size": 2, "change": ["batch", "steps"]}
    rows = train(tiny_checkpoint, tmp_path, resume_from_checkpoint="latest", **options)
    assert found != FIRST and [row["lr"] for row in rows if row["step"] > 2 and "lr" in row] == [found, found]


def test_a_run_that_is_made_longer_says_which_rate_it_would_have(tiny_checkpoint, tmp_path, train, capsys):
    """The checkpoint's rate is kept; passed as a number, it is no change."""
    train(tiny_checkpoint, tmp_path, max_train_steps=2, **AUTO)
    found = json.loads((tmp_path / "args.json").read_text())["learning_rate_found"]
    capsys.readouterr()
    again = {"resume_from_checkpoint": "latest", "change": "steps"}
    rates = [row["lr"] for row in train(tiny_checkpoint, tmp_path, max_train_steps=4, **AUTO | again) if "lr" in row]
    longer = rate_search.for_longer_run(float(found["best_trial"]), 2, 4)
    said = f"{found['learning_rate']:g} was found for a run of 2 updates; for 4 it would be {longer:g}: --learning_rate"
    assert said in capsys.readouterr().out and set(rates) == {found["learning_rate"]}
    options = AUTO | again | {"learning_rate": found["learning_rate"], "max_train_steps": 5}
    assert {row["lr"] for row in train(tiny_checkpoint, tmp_path, **options) if "lr" in row} == set(rates)
    with pytest.raises(SystemExit, match="2"):
        train(tiny_checkpoint, tmp_path, **options | {"learning_rate": 1e-5})
    assert f"--learning_rate 1e-05: checkpoint-5 was trained with {found['learning_rate']}" in capsys.readouterr().err


def test_auto_is_refused_where_another_rate_was_trained_with(tiny_checkpoint, tmp_path, train, capsys):
    train(tiny_checkpoint, tmp_path, max_train_steps=1, validation_split=2)
    with pytest.raises(SystemExit, match="2"):
        train(tiny_checkpoint, tmp_path, resume_from_checkpoint="latest", max_train_steps=1, **AUTO)
    said = capsys.readouterr().err
    assert "checkpoint-1 was trained with 0.001; pass that, or another number and --change learning_rate" in said


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ((KeyError, "parameters"), "the trials of learning rates have failed: KeyError: 'parameters'"),
        ((torch.OutOfMemoryError, "CUDA out of memory"), "have failed: out of memory in training; by the prediction, "),
    ],
)
def test_an_error_in_a_trial_is_no_high_loss(tiny_checkpoint, tmp_path, train, monkeypatch, capsys, error, expected):
    def failing(*args, **options):
        kind, words = error
        raise kind(words)  # a new one: its traceback holds the models

    monkeypatch.setattr(validation, "training_loss", failing)
    with pytest.raises(SystemExit, match="3"):
        train(tiny_checkpoint, tmp_path, max_train_steps=3, **AUTO)
    said = capsys.readouterr()
    assert expected in said.err and "trial 1:" not in said.out


def test_a_lack_of_memory_in_a_trials_update_names_what_takes_less(
    tiny_checkpoint, tmp_path, train, monkeypatch, capsys
):
    def failing(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_cogvideox_lora, "training_loss", failing)
    with pytest.raises(SystemExit, match="3"):
        train(tiny_checkpoint, tmp_path, max_train_steps=3, **AUTO)
    assert "out of memory in training; by the prediction, " in capsys.readouterr().err


def test_a_trial_has_no_warm_up(tiny_checkpoint, tmp_path, train, monkeypatch):
    seen = []
    update = train_cogvideox_lora.update

    def record(*args, **options):
        measured = update(*args, **options)
        seen.append(measured.learning_rate)
        return measured

    monkeypatch.setattr(train_cogvideox_lora, "update", record)
    options = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 2, "max_train_steps": 3}
    train(tiny_checkpoint, tmp_path, **AUTO | options)
    assert seen[:3] == [FIRST] * 3 and seen[-3] == 0 < seen[-2] < seen[-1]


def test_a_signal_ends_the_trials(tiny_checkpoint, tmp_path, train, monkeypatch, capsys):
    held_out_losses = train_cogvideox_lora.held_out_losses

    def interrupted(run, **options):
        assert options == {"with_drift": False}
        run.stop.number = signal.SIGTERM
        return held_out_losses(run, **options)

    monkeypatch.setattr(train_cogvideox_lora, "held_out_losses", interrupted)
    with pytest.raises(SystemExit) as ended:
        train(tiny_checkpoint, tmp_path, max_train_steps=3, **AUTO)
    assert ended.value.code == 143
    assert "the same command starts again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "needs held-out clips to judge by; add --validation_split"),
        ({"validation_split": 2, "optimizer": "prodigy"}, "--optimizer prodigy finds its own learning rate"),
        ({"validation_split": 2, "scale_lr": True}, "--scale_lr would change what was found"),
        (
            {"validation_split": 2, "resume_from_checkpoint": "auto", "change": "learning_rate"},
            "it is found before the first update only; with --change learning_rate, pass a number",
        ),
    ],
)
def test_what_cannot_be_found_is_refused(options, expected, capsys):
    with pytest.raises(SystemExit, match="2"):
        train_cogvideox_lora.parse_args(training_options("base", "clips", "out", learning_rate="auto", **options))
    assert f"--learning_rate auto: {expected}" in capsys.readouterr().err
