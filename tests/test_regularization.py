"""Clips that show what the model is to keep, beside those that it learns: prior preservation."""

import re

import pytest
import torch
from conftest import ROOT, reset_accelerate, training_options
from make_example import make_clips
from safetensors.torch import load_file
from test_distributed import rows_of, torchrun

import train_cogvideox_lora
from cogvideox.lora_files import LORA_FILE

WORD = {"id_token": "FILM", "max_train_steps": 4, "train_batch_size": 2}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Five clips of the class."""
    return make_clips(tmp_path_factory.mktemp("kept"), count=5, height=112)


@pytest.fixture
def calls(monkeypatch):
    """What each training loss is computed on: its captions and latents."""
    seen, loss = [], train_cogvideox_lora.training_loss

    def watch(base, transformer, batch, *args, **options):
        seen.append(batch)
        return loss(base, transformer, batch, *args, **options)

    monkeypatch.setattr(train_cogvideox_lora, "training_loss", watch)
    return seen


def weights_of(run):
    return load_file(run / LORA_FILE)


def test_a_batch_of_them_is_learned_beside_each_other_one_without_the_word(
    tiny_checkpoint, clips, kept, tmp_path, train, calls
):
    args = train_cogvideox_lora.parse_args(
        training_options(tiny_checkpoint, clips, tmp_path, regularization_data_root=kept, **WORD)
    )
    listed = train_cogvideox_lora.read_listing(args)
    shown = {clip.is_regularization: clip.caption.startswith("FILM ") for clip in listed.clips}
    assert shown == {False: True, True: False} and len(listed.clips) == 11
    rows = train(tiny_checkpoint, tmp_path / "run", regularization_data_root=kept, **WORD)
    assert len(calls) == 2 * 4 and all(row["prior_loss"] > 0 for row in rows)
    priors = calls[::2]  # each before the training loss of its micro-batch
    learned = {tensor.sum().item() for batch in calls[1::2] for tensor in batch["parameters"]}
    assert len(learned) == 6 and not learned & {tensor.sum().item() for b in priors for tensor in b["parameters"]}
    assert len({tensor.sum().item() for batch in priors[:3] for tensor in batch["parameters"]}) == 5, "not each in turn"


def test_the_gradient_is_that_of_the_weighted_sum(tiny_checkpoint, kept, tmp_path, train, calls):
    """The first loss is that of the run without them; the first gradient is not, and grows with the weight."""
    plain = train(tiny_checkpoint, tmp_path / "plain", **WORD)
    once = train(tiny_checkpoint, tmp_path / "once", regularization_data_root=kept, **WORD)
    weighted = train(tiny_checkpoint, tmp_path / "ten", regularization_data_root=kept, prior_loss_weight=10, **WORD)
    assert plain[0]["loss"] == once[0]["loss"] == weighted[0]["loss"]
    assert plain[0]["grad_norm"] != once[0]["grad_norm"] < weighted[0]["grad_norm"]
    assert once[0]["prior_loss"] == weighted[0]["prior_loss"] and "prior_loss" not in plain[0]


def test_none_of_them_is_held_out_and_a_resumed_run_equals_a_straight_one(
    tiny_checkpoint, kept, tmp_path, train, capsys
):
    options = WORD | {"regularization_data_root": kept, "validation_split": 2, "checkpointing_steps": 2}
    straight = train(tiny_checkpoint, tmp_path / "straight", **options)
    assert "held out: 2 clips" in (said := capsys.readouterr().out) and "regularization: 5 clips" in said
    resume = {"resume_from_checkpoint": tmp_path / "straight" / "checkpoint-2"}
    resumed = train(tiny_checkpoint, tmp_path / "resumed", **options, **resume)
    losses = [[(row["loss"], row["prior_loss"]) for row in rows if "loss" in row] for rows in (straight, resumed)]
    assert losses[0] == losses[1]
    ours, theirs = weights_of(tmp_path / "resumed"), weights_of(tmp_path / "straight")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_ranks_equal_one(tiny_checkpoint, clips, kept, tmp_path, train):
    options = WORD | {"regularization_data_root": kept, "prior_loss_weight": 0.5, "preserve": 1, "preserve_every": 2}
    torchrun(ROOT / "train_cogvideox_lora.py", *training_options(tiny_checkpoint, clips, tmp_path / "two", **options))
    train(tiny_checkpoint, tmp_path / "one", gradient_accumulation_steps=2, **options)
    for ours, theirs in zip(rows_of(tmp_path / "two"), rows_of(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_one_that_is_not_finite_is_named(tiny_checkpoint, clips, kept, tmp_path, train, monkeypatch, capsys):
    loss = train_cogvideox_lora.training_loss

    def of_third(base, transformer, batch, generator, *args, **options):
        value = loss(base, transformer, batch, generator, *args, **options)
        is_third = (
            generator.initial_seed()
            == train_cogvideox_lora.generator_for(
                generator.device, 3407, 2, train_cogvideox_lora.REGULARIZATION
            ).initial_seed()
        )
        return value * float("nan") if is_third else value

    monkeypatch.setattr(train_cogvideox_lora, "training_loss", of_third)
    train(tiny_checkpoint, tmp_path / "run", regularization_data_root=kept, **WORD)
    said = next(line for line in capsys.readouterr().out.splitlines() if "update 3 is skipped" in line)
    assert "loss nan" in said and said.count(f"{kept}, line") == 2 and str(clips) not in said


@pytest.mark.parametrize("options", [{"training_type": "sft"}, {"use_dora": True}, {"base_precision": "int8"}])
def test_other_ways_to_train_take_them(tiny_checkpoint, kept, tmp_path, train, options):
    rows = train(tiny_checkpoint, tmp_path / "run", regularization_data_root=kept, max_train_steps=2, **options)
    assert all(row["prior_loss"] > 0 for row in rows)


def test_other_clips_of_the_class_are_told_when_a_run_is_resumed(tiny_checkpoint, kept, tmp_path, train, capsys):
    options = WORD | {"checkpointing_steps": 2}
    train(tiny_checkpoint, tmp_path / "run", regularization_data_root=kept, **options)
    with pytest.raises(SystemExit):
        train(tiny_checkpoint, tmp_path / "run", resume_from_checkpoint="latest", **options | {"max_train_steps": 6})
    assert "the clips" in capsys.readouterr().err
    reset_accelerate()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior_loss_weight": 1}, "--prior_loss_weight: does nothing without --regularization_data_root"),
        ({"regularization_data_root": "x", "prior_loss_weight": 0}, "--prior_loss_weight 0: .* would do nothing"),
        ({"regularization_data_root": "x", "prior_loss_weight": -1}, "-1: must be at least 0"),
    ],
)
def test_a_weight_that_does_nothing_is_refused(tiny_checkpoint, clips, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as end:
        train_cogvideox_lora.parse_args(training_options(tiny_checkpoint, clips, tmp_path, **options))
    assert end.value.code == 2 and re.search(message, capsys.readouterr().err)
    reset_accelerate()


def test_the_same_clips_cannot_be_learned_and_kept(tiny_checkpoint, clips, tmp_path, train, capsys):
    with pytest.raises(SystemExit) as end:
        train(tiny_checkpoint, tmp_path / "run", regularization_data_root=clips, **WORD)
    assert end.value.code == 2 and "clips of --regularization_data_root must be others" in capsys.readouterr().err
    reset_accelerate()
