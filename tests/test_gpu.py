"""What only a GPU can prove: `pytest -m gpu`. The same checks run on a CPU in tests/test_step_benchmark.py."""

import gc

import pytest
import step
import torch
from test_step_benchmark import check_gradient_checkpointing, check_steps, check_training_script

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Blocks of the real width, so that the kernels are those of real training.
TWO_LAYERS = {model: ["--model", model, "--num_layers", "2", "--height", "256", "--width", "384", "--num_frames", "17"]
              for model in ("2b", "5b", "1.5")}  # fmt: skip


@pytest.mark.parametrize("model, precision", [("2b", "bf16"), ("2b", "fp16"), ("5b", "bf16"), ("1.5", "bf16")])
def test_lora_stays_float32_and_all_of_it_moves(model, precision):
    check_steps(*TWO_LAYERS[model], "--mixed_precision", precision)


@pytest.mark.parametrize("model", TWO_LAYERS)
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(model):
    # bfloat16 keeps 8 bits, and the backward pass of flash attention adds up in no fixed order.
    check_gradient_checkpointing(*TWO_LAYERS[model], "--mixed_precision", "bf16", tolerance=1e-2)


def test_gradient_checkpointing_saves_memory():
    assert bytes_of_a_step("--gradient_checkpointing") < 0.5 * bytes_of_a_step()


def bytes_of_a_step(*switch):
    gc.collect()  # the models of earlier runs
    options = step.parse_args([*TWO_LAYERS["2b"], "--num_layers", "6", "--steps", "1", "--warmup", "1", *switch])
    run, optimizer, lr_scheduler = step.prepare(options)
    before = torch.cuda.memory_allocated()
    step.measure(run, optimizer, lr_scheduler, options.warmup, options.steps)
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("variant, precision", [("2b", "bf16"), ("2b", "fp16"), ("5b", "bf16"), ("1.5-5B", "bf16")])
def test_training_script(monkeypatch, checkpoint_of, tmp_path, variant, precision):
    check_training_script(monkeypatch, checkpoint_of(variant), tmp_path, mixed_precision=precision)
