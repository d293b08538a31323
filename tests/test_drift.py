"""How far a LoRA's predictions are from the base model's where the new word is absent, in validation."""

import re

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, reset_accelerate, training_options
from test_distributed import rows_of, torchrun
from test_preservation import with_random_lora

import train_cogvideox_lora
from clips.order import Item, Ranks
from cogvideox.lora import base_of
from run import validation
from run.validation import HeldOut, quantiles, remark_on_drift

WORD = {"id_token": "FILM", "validation_split": 2, "validation_steps": 2, "max_train_steps": 4, "learning_rate": 1e-2}


class Clips:
    """Two clips as `dataset.Data` gives them."""

    shapes, labels = [(8, 3, 8, 12)] * 2, ["a.mp4", "b.mp4"]

    def __init__(self, *kinds):
        self.kinds = kinds

    def read(self, item):
        draw = torch.Generator().manual_seed(item.clip)
        embeds = {name: torch.randn(226, 32, generator=draw) for name in self.kinds}
        return {"parameters": torch.randn(8, 3, 8, 12, generator=draw), **embeds}

    def read_prompts(self):
        return {
            text: torch.randn(226, 32, generator=torch.Generator().manual_seed(len(text))) for text in ("", "a cat")
        }


def drifts(rows):
    return [row["drift"] for row in rows if "drift" in row]


@pytest.mark.parametrize(
    ("kinds", "prompts"),
    [(("prompt_embeds", "plain_prompt_embeds"), []), (("prompt_embeds",), ["a cat"]),
     (("prompt_embeds", "plain_prompt_embeds"), ["a cat"])],
)  # fmt: skip
def test_it_is_the_squared_difference_from_the_base_model_on_captions_without_the_word(
    tiny_checkpoint, monkeypatch, kinds, prompts
):
    base, transformer = with_random_lora(tiny_checkpoint)
    data, seen = Clips(*kinds), []
    held_out = HeldOut(Accelerator(), Ranks(), base, data, None, 3, torch.float32, agree=lambda *_: None)
    forward = type(transformer).forward

    def record(self, **inputs):
        seen.append(inputs)
        return forward(self, **inputs)

    monkeypatch.setattr(type(transformer), "forward", record)
    measured = validation.drift(held_out, transformer, prompts)
    # The base model predicts latents, then the target on them; the LoRA's prediction is the third.
    taught = seen[2::3]
    assert all(
        torch.equal(seen[3 * i + 1]["hidden_states"], inputs["hidden_states"]) for i, inputs in enumerate(taught)
    )
    monkeypatch.undo()
    texts = [data.read_prompts()[prompt] for prompt in prompts]
    if "plain_prompt_embeds" in kinds:
        texts += [data.read(Item(clip))["plain_prompt_embeds"] for clip in range(2)]
    given = [inputs["encoder_hidden_states"][0] for inputs in taught]
    assert len(taught) == 2 * 4 * len(kinds[1:] + tuple(prompts))
    assert all(any(torch.equal(embeds, text) for text in texts) for embeds in given)
    with torch.no_grad():
        transformer.eval()
        differences = [
            (transformer(**inputs)[0] - base_of(transformer)(**inputs)[0]).square().mean().item() for inputs in taught
        ]
    assert measured["drift"] == pytest.approx(sum(differences) / len(differences), rel=1e-4) and measured["drift"] > 0
    assert measured.keys() == {"drift", *(f"drift_t{timestep}" for timestep in quantiles(1000))}
    assert validation.drift(held_out, transformer, prompts) == measured


def test_a_run_with_a_word_starts_at_the_base_model_and_drifts(tiny_checkpoint, tmp_path, train, monkeypatch):
    batches, loss = [], train_cogvideox_lora.training_loss

    def watch(base, transformer, batch, *args, **options):
        batches.append(batch)
        return loss(base, transformer, batch, *args, **options)

    monkeypatch.setattr(train_cogvideox_lora, "training_loss", watch)
    rows = train(tiny_checkpoint, tmp_path / "run", **WORD)
    first, *later = drifts(rows)
    assert first == 0 and len(later) == 2 and all(value > 0 for value in later)
    assert not any("plain_prompt_embeds" in batch for batch in batches), "read from disk for nothing"
    without = train(tiny_checkpoint, tmp_path / "plain", **{k: v for k, v in WORD.items() if k != "id_token"})
    assert not drifts(without)
    assert "Drift from the base model" in (tmp_path / "run" / "report.html").read_text()


def test_prompts_alone_give_a_drift_and_change_nothing_else(tiny_checkpoint, tmp_path, train):
    plain = {name: value for name, value in WORD.items() if name != "id_token"}
    rows = train(tiny_checkpoint, tmp_path / "a", drift_prompt="a cat:::a dog", **plain)
    others = train(tiny_checkpoint, tmp_path / "b", **plain)
    assert len(drifts(rows)) == 3
    assert [row["loss"] for row in rows if "loss" in row] == [row["loss"] for row in others if "loss" in row]


def test_two_ranks_measure_what_one_does(tiny_checkpoint, clips, tmp_path, train):
    options = WORD | {"validation_split": 3, "drift_prompt": "a cat", "validate_first": False, "max_train_steps": 2}
    torchrun(ROOT / "train_cogvideox_lora.py", *training_options(tiny_checkpoint, clips, tmp_path / "two", **options))
    one = train(tiny_checkpoint, tmp_path / "one", gradient_accumulation_steps=2, **options)
    assert drifts(rows_of(tmp_path / "two")) == pytest.approx(drifts(one), rel=1e-3) and len(drifts(one)) == 1


def rows(*pairs):
    return [{"step": step, "validation_loss": loss, "drift": drift} for step, (loss, drift) in enumerate(pairs)]


@pytest.mark.parametrize(
    ("history", "is_said"),
    [
        ([], False),
        ([(1.0, 0.0)], False),
        ([(1.0, 0.0), (0.9, 0.1), (0.8, 0.2)], False),  # the loss falls
        ([(1.0, 0.0), (0.8, 0.1), (0.9, 0.2)], False),  # once may be chance
        ([(1.0, 0.0), (0.8, 0.1), (0.9, 0.2), (0.85, 0.2)], True),
        ([(1.0, 0.0), (0.8, 0.1), (0.9, 0.2), (0.85, 0.109)], False),  # it hardly grows
    ],
)
def test_a_drift_that_grows_while_nothing_is_gained_is_said(history, is_said):
    remark = remark_on_drift(rows(*history))
    assert bool(remark) == is_said
    if remark:
        assert "(0.2, 0.1 at update 1)" in remark and "its lowest is that of update 1" in remark


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drift_prompt": "a cat"}, "--drift_prompt: the drift is measured on held-out clips; add --validation_split"),
        ({"drift_prompt": "a:::", "validation_split": 1}, "a prompt is empty"),
        ({"drift_prompt": "a", "validation_split": 1, "training_type": "sft"}, "--drift_prompt: --training_type sft"),
        (
            {"drift_prompt": "a", "validation_split": 1, "init_lora_weights": "pissa"},
            "--drift_prompt: --init_lora_weights pissa",
        ),
    ],
)
def test_a_drift_that_cannot_be_measured_is_refused(tiny_checkpoint, clips, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as end:
        train_cogvideox_lora.parse_args(training_options(tiny_checkpoint, clips, tmp_path, **options))
    assert end.value.code == 2 and re.search(message, capsys.readouterr().err)
    reset_accelerate()
