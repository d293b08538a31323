"""Preserving the base model's predictions where the new word is absent."""

import re

import pytest
import torch
from conftest import reset_accelerate, training_options, transformer_inputs
from peft.tuners.lora import LoraLayer

import train_cogvideox_lora
from cogvideox.base_model import load_transformer, read_base_model
from cogvideox.lora import Lora, add_lora, base_of
from cogvideox.objective import predicted_latents, preservation_loss
from cogvideox.quantized import PRECISIONS

LORA = Lora(rank=4, lora_alpha=4, lora_target_modules=("to_q", "to_k", "to_v", "to_out.0"))
WORD = {"id_token": "FILM", "preserve": 1}


def with_random_lora(checkpoint, **options):
    base = read_base_model(str(checkpoint))
    transformer = load_transformer(base, torch.float32)
    add_lora(transformer, LORA._replace(**options), torch.float32)
    for name, weight in transformer.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.1)
    return base, transformer


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.5}, {"base_precision": PRECISIONS[1]}])
def test_with_its_lora_off_the_transformer_is_the_base_model(tiny_checkpoint, options):
    base, transformer = with_random_lora(tiny_checkpoint, **options)
    plain = load_transformer(base, torch.float32)
    if options.get("base_precision"):
        add_lora(plain, LORA._replace(**options), torch.float32)  # its B is zero
    inputs = transformer_inputs(tiny_checkpoint) | {"return_dict": False}
    with torch.no_grad():
        expected, tuned = plain(**inputs)[0], transformer.eval()(**inputs)[0]
        assert torch.equal(base_of(transformer)(**inputs)[0], expected)
        assert not torch.equal(tuned, expected) and torch.equal(transformer(**inputs)[0], tuned)
    trained = [name for name, weight in transformer.named_parameters() if weight.requires_grad]
    assert trained and all("lora" in name for name in trained)


def test_a_teacher_that_fails_leaves_the_lora_on(tiny_checkpoint):
    _, transformer = with_random_lora(tiny_checkpoint)
    with pytest.raises(TypeError):
        base_of(transformer)(nothing=1)
    assert not any(module.disable_adapters for module in transformer.modules() if isinstance(module, LoraLayer))


def test_the_loss_is_the_squared_difference_of_the_two_predictions_on_the_plain_caption(tiny_checkpoint):
    base, transformer = with_random_lora(tiny_checkpoint)
    generator = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    batch = {name: torch.randn(2, 226, 32) for name in ("prompt_embeds", "plain_prompt_embeds")}
    batch["parameters"] = torch.randn(2, 8, 3, 8, 12)
    seen = []

    def record(**inputs):
        seen.append(inputs)
        return transformer(**inputs)

    loss = preservation_loss(base, record, batch, generator(), torch.float32, None, teacher=base_of(transformer))
    (inputs,) = seen
    assert torch.equal(inputs["encoder_hidden_states"], batch["plain_prompt_embeds"])
    expected = (transformer(**inputs)[0] - base_of(transformer)(**inputs)[0]).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and loss.item() > 0
    loss.backward()
    assert all(weight.grad is not None for weight in transformer.parameters() if weight.requires_grad)


def test_the_latents_are_those_that_the_base_model_predicts_for_the_plain_caption(tiny_checkpoint):
    """A model that predicts the velocity towards certain latents gives these, whatever the noise and the clip."""
    base, draw = read_base_model(str(tiny_checkpoint)), torch.Generator().manual_seed(5)
    scheduler = base.scheduler
    clip, expected = torch.randn(2, 4, 3, 8, 12, generator=draw), torch.randn(2, 4, 3, 8, 12, generator=draw)
    seen = []

    def towards_expected(hidden_states, timestep, encoder_hidden_states, **_):
        seen.append((timestep, encoder_hidden_states))
        a = scheduler.alphas_cumprod[timestep].view(-1, 1, 1, 1, 1)
        return ((a.sqrt() * hidden_states - expected) / (1 - a).sqrt(),)

    embeds = torch.randn(2, 226, 32, generator=draw)
    conditions = {"prompt_embeds": embeds, "rotary": None, "image_latents": None, "ofs": None}
    for _ in range(50):
        found = predicted_latents(towards_expected, scheduler, clip, draw, torch.float32, **conditions)
        assert torch.allclose(found, expected, atol=1e-4)
    timesteps = torch.cat([timestep for timestep, _ in seen])
    assert 500 <= timesteps.min() < 600 and 900 < timesteps.max() < 1000
    assert all(torch.equal(given, embeds) for _, given in seen)


def test_a_run_that_preserves_starts_with_nothing_lost_and_logs_it(tiny_checkpoint, tmp_path, train):
    rows = train(tiny_checkpoint, tmp_path / "run", max_train_steps=12, preserve_every=1, **WORD)
    losses = [row["preservation_loss"] for row in rows]
    assert losses[0] == 0 and all(loss > 0 for loss in losses[1:])
    plain = train(tiny_checkpoint, tmp_path / "plain", max_train_steps=12, id_token="FILM")
    assert rows[0]["loss"] == plain[0]["loss"] and rows[-1]["loss"] != plain[-1]["loss"]
    assert all("preservation_loss" not in row for row in plain)


def test_the_weight_decides_how_much_is_kept(tiny_checkpoint, tmp_path, train):
    def kept(weight):
        options = WORD | {"preserve": weight, "learning_rate": 1e-2, "max_train_steps": 30}
        return train(tiny_checkpoint, tmp_path / f"run-{weight}", **options)[-1]["preservation_loss"]

    assert kept(10) < kept(1) < kept(1e-6)


def test_one_of_n_updates_is_preserved_also_in_a_resumed_run(tiny_checkpoint, tmp_path, train):
    options = WORD | {"preserve_every": 3, "gradient_accumulation_steps": 2, "max_train_steps": 7}
    rows = train(tiny_checkpoint, tmp_path / "run", checkpointing_steps=2, **options)
    assert ["preservation_loss" in row for row in rows] == [True, False, False] * 2 + [True]
    branch = {"resume_from_checkpoint": tmp_path / "run" / "checkpoint-2"}
    again = train(tiny_checkpoint, tmp_path / "branch", checkpointing_steps=2, **options, **branch)
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]


def test_a_caption_to_preserve_replaces_those_without_the_word(tiny_checkpoint, clips, tmp_path):
    def plain_embeds(**options):
        line = training_options(tiny_checkpoint, clips, tmp_path, **options)
        args = train_cogvideox_lora.parse_args(line)
        listed = train_cogvideox_lora.read_listing(args)
        return {caption for clip in listed.clips for caption in clip.plain_captions}

    captions = set((clips / "prompts.txt").read_text().splitlines())
    assert plain_embeds(**WORD) == captions and plain_embeds(id_token="FILM") == set()
    assert plain_embeds(preserve=1, preserve_prompt="a shape") == {"a shape"}
    assert plain_embeds(**WORD, caption_prefix="in", caption_suffix="now") == {f"in {text} now" for text in captions}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preserve": 1}, "--preserve 1: needs --id_token, whose absence means the base model, or --preserve_prompt"),
        ({"preserve": 1, "training_type": "sft"}, "--preserve 1: --training_type sft changes"),
        (WORD | {"init_lora_weights": "pissa"}, "--preserve 1: --init_lora_weights pissa changes"),
        ({"preserve_every": 3}, "--preserve_every 3: does nothing without --preserve"),
        ({"preserve_prompt": "a shape"}, "--preserve_prompt: does nothing without --preserve"),
        (WORD | {"preserve_prompt": "a FILM, dark"}, "--preserve_prompt 'a FILM, dark': contains --id_token FILM"),
        (
            WORD | {"drift_prompt": "a:::b FILM", "validation_split": 1},
            "--drift_prompt 'b FILM': contains --id_token FILM",
        ),
        ({"preserve": "nan"}, "nan: must be at least 0, and finite"),
        ({"preserve": -1}, "-1: must be at least 0"),
    ],
)
def test_what_cannot_be_preserved_is_refused(tiny_checkpoint, clips, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as end:
        train_cogvideox_lora.parse_args(training_options(tiny_checkpoint, clips, tmp_path, **options))
    assert end.value.code == 2 and re.search(message, capsys.readouterr().err)
    reset_accelerate()


@pytest.mark.parametrize("variant", ["2b", "5b", "5b-I2V", "1.5-5B", "1.5-5B-I2V"])
def test_every_variant_preserves(checkpoint_of, tmp_path, train, variant):
    options = WORD | {"gradient_checkpointing": "attention", "gradient_accumulation_steps": 2, "enable_slicing": True}
    rows = train(checkpoint_of(variant), tmp_path / "run", max_train_steps=2, **options)
    assert rows[0]["preservation_loss"] == 0 < rows[1]["preservation_loss"]


@pytest.mark.parametrize(
    "options", [{"blocks_to_swap": 1, "gradient_checkpointing": "full"}, {"base_precision": "int8"}]
)
def test_other_ways_to_compute_preserve_the_same(tiny_checkpoint, tmp_path, train, options):
    rows = train(tiny_checkpoint, tmp_path / "run", max_train_steps=3, **WORD | options)
    assert rows[0]["preservation_loss"] == 0 < rows[2]["preservation_loss"]
