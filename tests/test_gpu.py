"""What only a GPU can prove: `pytest -m gpu`. The same checks run on a CPU in tests/test_step_benchmark.py."""

import gc

import pytest
import step
import torch
from make_example import VARIANTS
from test_step_benchmark import check_same_step, check_steps, check_training_script

from cogvideox.compute import LEVELS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# Blocks of the real width, so that the kernels are those of real training.
SMALL = ["--num_layers", "2", "--height", "256", "--width", "384", "--num_frames", "17"]
TWO_LAYERS = {model: ["--model", model, *SMALL] for model in ("2b", "5b", "1.5", "1.5-I2V")}
TWO_LAYERS["5b-I2V"] = ["--model", "5b-I2V", "--num_layers", "2"]  # whose positions know one size


@pytest.mark.parametrize("training_type", ["lora", "sft"])
@pytest.mark.parametrize("model, precision", [("2b", "fp16"), *((model, "bf16") for model in TWO_LAYERS)])
def test_what_is_trained_stays_float32_and_all_of_it_moves(tmp_path, model, precision, training_type):
    options = ["--mixed_precision", precision, "--training_type", training_type]
    check_steps(*TWO_LAYERS[model], *options, folder=tmp_path)


@pytest.mark.parametrize("precision", ["fp8", "int8"])
@pytest.mark.parametrize("model", ["2b", "5b"])
def test_a_lora_is_trained_over_a_quantised_base(model, precision):
    check_steps(*TWO_LAYERS[model], "--mixed_precision", "bf16", "--base_precision", precision)


@pytest.mark.parametrize("model", ["2b", "5b"])  # 1.5 takes a minute; benchmarks/prove.sh times it
@pytest.mark.parametrize("training_type", ["lora", "sft"])
def test_full_size_takes_three_steps(model, training_type):
    if training_type == "sft" and model != "2b":
        pytest.skip("16 bytes for each of 5.6 billion weights are 83 GiB before activations: that is what FSDP2 is for")
    options = ["--model", model, "--training_type", training_type, "--gradient_checkpointing"]
    if found := step.without_room(step.parse_args(options)):
        pytest.skip(f"does not fit, predicted: {found}")
    check_steps(*options, "--mixed_precision", "bf16", steps=3)


@pytest.mark.parametrize("level", ["attention", "full"])
@pytest.mark.parametrize("model", ["2b", "5b", "1.5"])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(model, level):
    # bfloat16 keeps 8 bits, and the backward pass of flash attention adds up in no fixed order.
    check_same_step(*TWO_LAYERS[model], "--mixed_precision", "bf16", tolerance=1e-2, calls=2, level=level)


@pytest.mark.parametrize("level", ["none", "attention", "full"])
@pytest.mark.parametrize("model", ["2b", "5b", "1.5"])
def test_compiled_blocks_change_neither_loss_nor_gradients(model, level):
    calls = 1 if level == "none" else 2
    options = ["--mixed_precision", "bf16"]
    check_same_step(*TWO_LAYERS[model], *options, tolerance=2e-2, calls=calls, level=level, compile=True)


EIGHT_LAYERS = {
    "small clips wait for copies": [*TWO_LAYERS["5b"], "--num_layers", "8"],
    "copies wait for large clips": ["--model", "2b", "--num_layers", "8"],
}


@pytest.mark.parametrize("size", EIGHT_LAYERS)
@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("level", ["attention", "full"])
def test_swapped_blocks_change_neither_loss_nor_gradients(level, precision, size):
    options = [*EIGHT_LAYERS[size], "--mixed_precision", "bf16", "--base_precision", precision]
    for _ in range(3):
        check_same_step(*options, tolerance=1e-2, calls=2, level=level, blocks_to_swap=8, device=torch.device("cuda"))


def test_swapped_blocks_leave_the_gpu():
    resident, swapped = (
        bytes_of_weights("--gradient_checkpointing", "--num_layers", "8", "--blocks_to_swap", count) for count in "08"
    )
    assert swapped < 0.5 * resident  # two of eight, and what is not in blocks


def bytes_of_weights(*switch):
    gc.collect()
    before = torch.cuda.memory_allocated()
    run = step.prepare(step.parse_args([*TWO_LAYERS["5b"], *switch]))
    after = torch.cuda.memory_allocated()
    del run
    return after - before


def test_gradient_checkpointing_saves_memory():
    none, attention, full = (bytes_of_a_step("--gradient_checkpointing", level) for level in LEVELS)
    assert full < attention < 0.5 * none


def bytes_of_a_step(*switch):
    gc.collect()  # the models of earlier runs
    options = step.parse_args([*TWO_LAYERS["2b"], "--num_layers", "6", "--steps", "1", "--warmup", "1", *switch])
    run = step.prepare(options)
    before = torch.cuda.memory_allocated()
    step.measure(run, warmup=options.warmup, steps=options.steps)
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("variant, precision", [("2b", "fp16"), *((variant, "bf16") for variant in VARIANTS)])
def test_training_script(monkeypatch, checkpoint_of, tmp_path, variant, precision):
    check_training_script(monkeypatch, checkpoint_of(variant), tmp_path, mixed_precision=precision)
