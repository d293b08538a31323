"""Blocks that are copied from CPU memory before they compute give what blocks on the device give, bit for bit."""

import pytest
import torch
from conftest import make_checkpoint, transformer_inputs
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file
from test_compute import in_dtype, step, with_lora

from cogvideox import compute, swapping
from cogvideox.base_model import download_weights, load_transformer, read_base_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def aligned_weights(monkeypatch):
    """Weights lie in files as they come, and a CPU's products round otherwise where memory begins in odd places."""

    def load_aligned(*args):
        transformer = load_transformer(*args)
        for weight in transformer.parameters():
            weight.data = weight.data.clone()
        return transformer

    monkeypatch.setattr("cogvideox.lora.load_transformer", load_aligned)


@pytest.fixture(scope="module", params=["2b", "1.5-5B-I2V"])
def deep_checkpoint(request, tmp_path_factory):
    """Of five blocks, so that there are those in the middle and some that stay."""
    folder = make_checkpoint(tmp_path_factory.mktemp("deep"), request.param)
    transformer = CogVideoXTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    deeper = CogVideoXTransformer3DModel.from_config(transformer.config | {"num_layers": 5})
    deeper.save_pretrained(folder / "transformer")
    return folder


class CopiedLate(swapping.Swapper):
    """As a slow bus would do it: what is copied is not there before it is waited for."""

    def __init__(self, *args):
        self.late = [None, None]
        super().__init__(*args)

    def _copy(self, slot, index):
        self.slots[slot].fill_(255)  # NaN, to every dtype
        self.late[slot] = index

    def _wait(self, slot):
        if self.late[slot] is not None:
            super()._copy(slot, self.late[slot])
            self.late[slot] = None


def three_steps(folder, count, level, dtype=torch.float32, compiled=False, **changes):
    """Outputs and gradients of three training steps with a sampling step between them, and the swapped transformer."""
    checkpoint = download_weights(read_base_model(str(folder)))
    transformer = with_lora(checkpoint, dtype, **changes)
    compute.prepare(transformer, level, compute.Options(compile=compiled, blocks_to_swap=count), CPU)
    torch.manual_seed(4)
    results = []
    for _ in range(3):
        inputs = transformer_inputs(folder)
        results.append(step(transformer, inputs, dtype))
        with torch.no_grad():
            results.append((transformer(**in_dtype(inputs, dtype))[0], {}))
    return results, transformer


def check_equal(found, expected):
    for (output, gradients), (expected_output, expected_gradients) in zip(found, expected, strict=True):
        assert torch.equal(output, expected_output)
        assert gradients.keys() == expected_gradients.keys()
        assert all(torch.equal(gradients[name], gradient) for name, gradient in expected_gradients.items())


@pytest.mark.parametrize("swapper", [swapping.Swapper, CopiedLate])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("level", ["attention", "full"])
def test_swapped_blocks_change_nothing_however_fast_they_are_copied(
    deep_checkpoint, monkeypatch, swapper, count, level
):
    expected, _ = three_steps(deep_checkpoint, 0, level)
    monkeypatch.setattr(swapping, "Swapper", swapper)
    found, _ = three_steps(deep_checkpoint, count, level)
    check_equal(found, expected)


@pytest.mark.parametrize(
    "changes",
    [{"base_precision": "int8"}, {"base_precision": "fp8"}, {"use_dora": True}, {"lora_target_modules": ["ff.net.2"]}],
    ids=lambda changes: next(iter(changes)),
)
def test_every_kind_of_frozen_block_can_be_swapped(deep_checkpoint, changes):
    dtype = torch.float32 if "use_dora" in changes else torch.bfloat16
    expected, _ = three_steps(deep_checkpoint, 0, "full", dtype, **changes)
    found, _ = three_steps(deep_checkpoint, 5, "full", dtype, **changes)
    check_equal(found, expected)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_compiled_blocks_can_be_swapped(deep_checkpoint, compiled_without_a_compiler, precision):
    expected, _ = three_steps(deep_checkpoint, 0, "full", compiled=True, base_precision=precision)
    found, _ = three_steps(deep_checkpoint, 3, "full", compiled=True, base_precision=precision)
    check_equal(found, expected)


def test_no_more_than_two_swapped_blocks_are_on_the_device(deep_checkpoint):
    def frozen_bytes(transformer):
        tensors = [weight for block in transformer.transformer_blocks for weight in block.parameters()]
        storages = {
            weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes()
            for weight in tensors
            if not weight.requires_grad
        }
        return sum(storages.values())

    _, plain = three_steps(deep_checkpoint, 0, "full")
    _, swapped = three_steps(deep_checkpoint, 5, "full")
    block = frozen_bytes(plain) / 5
    assert 2 * block <= frozen_bytes(swapped) < 2.1 * block  # their places; the rest is what aligns them


def test_a_block_is_on_its_way_while_the_one_before_it_computes(deep_checkpoint, monkeypatch):
    """The last of the way there is the first of the way back, and the last of a sampling step is before the first."""
    late = []

    class Watched(swapping.Swapper):
        def bring(self, index):
            late.append(index not in self.held)
            super().bring(index)

    monkeypatch.setattr(swapping, "Swapper", Watched)
    checkpoint = download_weights(read_base_model(str(deep_checkpoint)))
    transformer = with_lora(checkpoint)
    compute.prepare(transformer, "full", compute.Options(blocks_to_swap=5), CPU)
    for _ in range(3):
        step(transformer, transformer_inputs(deep_checkpoint))
    assert late == [True] + [False] * (3 * 10 - 1)
    with torch.no_grad():
        for _ in range(2):
            transformer(**transformer_inputs(deep_checkpoint))
    step(transformer, transformer_inputs(deep_checkpoint))
    assert len(late) == 50 and not any(late[30:])


def test_a_forward_pass_that_breaks_off_leaves_the_blocks_usable(deep_checkpoint):
    checkpoint = download_weights(read_base_model(str(deep_checkpoint)))
    inputs, results = transformer_inputs(deep_checkpoint), []
    for breaks in (False, True):
        transformer = with_lora(checkpoint)
        compute.prepare(transformer, "full", compute.Options(blocks_to_swap=5), CPU)
        if breaks:
            hook = transformer.transformer_blocks[3].register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                step(transformer, inputs)
            hook.remove()
        results.append(step(transformer, inputs))
    check_equal(results[1:], results[:1])


@pytest.mark.parametrize(("num_blocks", "count", "expected"), [
    (5, 0, []), (5, 1, [4]), (5, 2, [2, 4]), (6, 3, [1, 3, 5]), (5, 5, [0, 1, 2, 3, 4]),
])  # fmt: skip
def test_swapped_blocks_are_spread_evenly(num_blocks, count, expected):
    assert swapping.chosen(num_blocks, count) == expected


@pytest.mark.parametrize("options", [
    {}, {"gradient_checkpointing": "attention", "base_precision": "int8"},
    {"gradient_accumulation_steps": 2, "ema_decay": 0.9, "validation_split": 1, "validation_steps": 1,
     "validation_prompt": "a red circle"},
], ids=["plain", "int8", "accumulated"])  # fmt: skip
def test_a_run_with_swapped_blocks_trains_saves_and_resumes_as_one_without(tiny_checkpoint, tmp_path, train, options):
    options = {"gradient_checkpointing": "full", "max_train_steps": 4, "checkpointing_steps": 2} | options
    plain = train(tiny_checkpoint, tmp_path / "plain", **options)
    swapped = train(tiny_checkpoint, tmp_path / "swapped", blocks_to_swap=2, **options | {"max_train_steps": 2})
    swapped = train(tiny_checkpoint, tmp_path / "swapped", blocks_to_swap=1, resume_from_checkpoint="latest", **options)
    for name in ("loss", "validation_loss"):
        assert [row.get(name) for row in swapped] == [row.get(name) for row in plain]
    weights = [load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("plain", "swapped")]
    assert all(torch.equal(weights[1][name], weight) for name, weight in weights[0].items())
