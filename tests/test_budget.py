"""What fits is decided by the predicted peaks, here made up: GiB of a 5b at its own size, roughly."""

from types import SimpleNamespace

import pytest

from cogvideox import budget
from cogvideox.budget import GIB
from cogvideox.lora import Lora
from cogvideox.rehearsal import Phase, Settings

LORA = Lora(128, 128, ("to_q", "to_k", "to_v", "to_out.0"))
AUTO = Settings(480, 720, 49, LORA, gradient_checkpointing="auto")
MODELS = SimpleNamespace(base=SimpleNamespace(transformer={"num_layers": 42}))


def made_up(phase, models, settings):
    lora = settings.lora
    lighter = (10 if settings.blocks_to_swap else 0) + (5 if lora and lora.base_precision == "int8" else 0)
    training = {"none": 70, "attention": 22.6, "full": 18.3}[settings.gradient_checkpointing]
    peaks = {
        "text": 5 if settings.text_encoder_precision == "int8" else 9.1,
        "clips": 2.1 if settings.tile_encoding else 6.7,
        "training": training - lighter + (0 if lora else 80),
        "validation": (16 if settings.tile_decoding else 27) - lighter,
    }
    return Phase(phase, round(peaks[phase] * GIB), 0)


@pytest.fixture(autouse=True)
def made_up_peaks(monkeypatch):
    monkeypatch.setattr(budget, "rehearse", made_up)


def decide(free_gib, settings=AUTO, tiling="auto"):
    return budget.decide(MODELS, settings, tiling=tiling, free_bytes=free_gib and round(free_gib * GIB))


@pytest.mark.parametrize("free_gib, level, encoding, decoding", [
    (None, "none", False, False), (79, "none", False, False), (77, "attention", False, False),
    (24, "full", False, True), (8, "full", True, True),
])  # fmt: skip
def test_the_fastest_level_and_as_few_tiles_as_fit(free_gib, level, encoding, decoding):
    plan = decide(free_gib)
    assert (plan.gradient_checkpointing, plan.tile_encoding, plan.tile_decoding) == (level, encoding, decoding)


@pytest.mark.parametrize("backend", ["math", "flash3"])
def test_auto_keeps_no_output_of_attention_that_cannot_be_kept(backend):
    assert decide(77, AUTO._replace(attention_backend=backend)).gradient_checkpointing == "full"


def test_swapped_blocks_are_recomputed():
    assert decide(None, AUTO._replace(blocks_to_swap=1)).gradient_checkpointing == "attention"


@pytest.mark.parametrize("tiling", ["never", "always"])
def test_what_the_options_say_is_not_decided(tiling):
    plan = decide(1, AUTO._replace(gradient_checkpointing="none"), tiling)
    assert plan.tile_encoding == plan.tile_decoding == (tiling == "always")
    assert (plan.gradient_checkpointing, plan.level_peaks) == ("none", ())


def test_a_phase_that_does_not_fit_has_a_remedy_if_there_is_one():
    remedies = {remedy.phase: remedy.options for remedy in decide(12).remedies}
    assert remedies == {"training": "--blocks_to_swap 42", "validation": "--blocks_to_swap 42"}
    remedies = {remedy.phase: remedy.options for remedy in decide(9, tiling="never").remedies}
    assert remedies == {
        "text": "--text_encoder_precision int8",
        "training": "--blocks_to_swap 42 --base_precision int8",
        "validation": "--enable_tiling --blocks_to_swap 42",
    }
    whole = decide(16, AUTO._replace(lora=None))
    assert {remedy.phase: remedy.options for remedy in whole.remedies}["training"] == (
        "--training_type lora --blocks_to_swap 42"
    )


def test_recomputation_is_no_remedy_for_validation_but_what_swapping_needs():
    lora = AUTO._replace(gradient_checkpointing="none")
    remedies = {remedy.phase: remedy.options for remedy in decide(10, lora, tiling="always").remedies}
    assert remedies["validation"] == "--gradient_checkpointing full --blocks_to_swap 42"
    remedies = {remedy.phase: remedy.options for remedy in decide(19, lora, tiling="never").remedies}
    assert remedies["validation"] == "--enable_tiling"


def test_tight_is_warned_of_and_impossible_refused():
    tight, impossible = decide(19, tiling="always"), decide(14, tiling="always")
    assert [phase.name for phase in tight.tight] == ["training"] and not tight.impossible
    assert [phase.name for phase in impossible.impossible] == ["training", "validation"]
    assert budget.describe(tight)[-1] == (
        "training may not fit: needs 21.1 of 19.0 GiB (predicted 18.3, 10 % and 1 GiB); with --blocks_to_swap 42 it "
        "would need 10.1; or lower --max_num_frames, --height and --width"
    )
    assert budget.refusal(impossible).startswith(
        "training needs 18.3 GiB, as predicted, and 14.0 are free: with --blocks"
    )
    assert budget.refusal(impossible).endswith("or pass --allow_oversubscription to try all the same")


def test_a_run_begins_with_what_it_needs_and_what_was_decided():
    assert budget.describe(decide(77)) == [
        "memory, predicted: text 9.1, clips 6.7, training 22.6, validation 27.0 GiB; free: 77.0",
        "--gradient_checkpointing auto: attention needs 25.9 of 77.0 GiB (predicted 22.6, 10 % and 1 GiB); none would "
        "need 78.0",
        "--enable_tiling auto: no tiles, there is room",
    ]
    assert decide(77).as_json() == {
        "gradient_checkpointing": "attention",
        "tile_encoding": False,
        "tile_decoding": False,
        "peak_gib": {"text": 9.1, "clips": 6.7, "training": 22.6, "validation": 27},
        "free_gib": 77,
    }


@pytest.mark.parametrize(
    ("measured", "is_largest", "is_said"),
    [(10, True, False), (10.9, True, False), (9.1, True, False), (11.2, True, True), (8.8, True, True),
     (11.2, False, True), (8.8, False, False), (2, False, False)],
)  # fmt: skip
def test_a_peak_that_is_not_as_predicted_is_said(measured, is_largest, is_said):
    """A peak below the prediction only where the update is the one that was predicted."""
    phases = (Phase("text", 99 * GIB, 0), Phase("training", 10 * GIB, 0))
    remark = budget.remark_on_peak(budget.MemoryPlan("full", False, False, phases), measured, is_largest=is_largest)
    assert (remark is not None) == is_said
    assert not is_said or f"took {measured:.1f} GiB at their peak, and 10.0 GiB were predicted" in remark
    without_phases = budget.MemoryPlan("full", False, False)
    assert budget.remark_on_peak(without_phases, measured, is_largest=is_largest) is None
