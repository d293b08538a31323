"""The self-check passes what is right, in every way to compute, and finds whatever is broken on purpose."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import transformer_inputs
from safetensors.torch import load_file

from cogvideox import compute, lora, quantized, self_check, swapping
from cogvideox.base_model import load_transformer, read_base_model
from cogvideox.lora import Lora, add_lora
from cogvideox.lora_files import LORA_FILE

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
CPU = torch.device("cpu")


def checked(folder, dtype=torch.bfloat16, level="none", options=compute.PLAIN, **kind):
    """Returns the report on a transformer that is prepared as for training."""
    base, settings = read_base_model(str(folder)), Lora(4, 4.0, TARGETS, **kind)
    transformer = load_transformer(base, dtype)
    add_lora(transformer, settings, dtype)
    compute.prepare(transformer.train(), level, options, CPU)
    before = {name: weight.clone() for name, weight in transformer.named_parameters() if weight.requires_grad}
    inputs = {name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
              for name, value in transformer_inputs(folder).items()}  # fmt: skip
    report = self_check.check(
        base, transformer, settings, partial(transformer, **inputs), dtype=dtype, autocast=settings.use_dora
    )
    assert all(torch.equal(weight, dict(transformer.named_parameters())[name]) for name, weight in before.items())
    assert all(weight.grad is None for weight in transformer.parameters())
    return report


def wrong(report):
    return [one for one in report.compared if one.is_wrong]


@pytest.mark.parametrize("variant", ["2b", "5b", "5b-I2V", "1.5-5B", "1.5-5B-I2V"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_variant_passes(checkpoint_of, variant, dtype):
    report = checked(checkpoint_of(variant), dtype)
    assert wrong(report) == [] and len(report.compared) > 2 * (2 + 4 * len(TARGETS))


@pytest.mark.parametrize(
    "how",
    [
        {"level": "attention"}, {"level": "full"}, {"base_precision": "int8"}, {"base_precision": "fp8"},
        {"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "pissa"}, {"lora_dropout": 0.0},
        {"level": "full", "options": compute.PLAIN._replace(blocks_to_swap=2)},
        {"options": compute.PLAIN._replace(attention_backend="math")},
    ],
)  # fmt: skip
def test_every_way_to_compute_passes(tiny_checkpoint, how):
    assert wrong(checked(tiny_checkpoint, **how)) == []


def test_a_wrong_scale_of_the_lora_is_found(tiny_checkpoint, monkeypatch):
    forward = lora.FusedLora.forward

    def doubled(layer, x, *args):
        layer.scaling["default"] *= 2
        try:
            return forward(layer, x, *args)
        finally:
            layer.scaling["default"] /= 2

    monkeypatch.setattr(lora.FusedLora, "forward", doubled)
    assert wrong(checked(tiny_checkpoint))


def test_attention_whose_heads_are_swapped_is_found(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(
        compute, "scaled_dot_product",
        lambda q, k, v: F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v.flip(2)))).transpose(1, 2),
    )  # fmt: skip
    assert wrong(checked(tiny_checkpoint))


def test_a_quantised_weight_that_is_off_by_one_scale_is_found(tiny_checkpoint, monkeypatch):
    replace = quantized.quantize_linears

    def off(module, *args):
        replace(module, *args)
        layer = next(layer for layer in module.modules() if isinstance(layer, quantized.QuantizedLinear))
        layer.scale[3] *= 1.01

    monkeypatch.setattr(quantized, "quantize_linears", off)
    assert wrong(checked(tiny_checkpoint, base_precision="int8"))


def test_a_stale_swapped_block_is_found(tiny_checkpoint, monkeypatch):
    fetch = swapping.Swapper._copy

    def stale(swapper, slot, index):
        fetch(swapper, slot, 0)

    monkeypatch.setattr(swapping.Swapper, "_copy", stale)
    options = compute.PLAIN._replace(blocks_to_swap=2)
    assert wrong(checked(tiny_checkpoint, level="full", options=options))


@pytest.mark.parametrize("broken", ["gradient", "nan"])
def test_a_wrong_backward_pass_and_a_nan_are_found(tiny_checkpoint, monkeypatch, broken):
    forward = lora.FusedLora.forward

    def other(layer, x, *args):
        if broken == "nan":
            return forward(layer, x, *args) * float("nan")
        return forward(layer, x.detach() + (x - x.detach()) * 1.2, *args)

    monkeypatch.setattr(lora.FusedLora, "forward", other)
    assert wrong(checked(tiny_checkpoint))


def test_the_refusal_names_the_block_the_error_and_the_options_in_use(tiny_checkpoint):
    compared = [self_check.Compared(0, "output", 0.001, 0.001), self_check.Compared(1, "gradient of a", 0.5, 0.002)]
    message = self_check.Report(compared, 1.0).refusal(["--compile", "--base_precision int8"])
    for part in ("block 1", "gradient of a is 0.5, where theirs is 0.002 (1 of 2", "leave out --compile, --base_pre"):
        assert part in message
    assert self_check.Report(compared, 1.0).as_json()["wrong"] == ["block 1, gradient of a"]


def test_a_run_checks_itself_if_asked_and_records_the_figures(tiny_checkpoint, tmp_path, train, capsys):
    options = {"mixed_precision": "bf16", "gradient_checkpointing": "attention", "max_train_steps": 2}
    rows = train(tiny_checkpoint, tmp_path / "checked", self_check="always", **options)
    assert "outputs, gradients and weights of two blocks are those of diffusers and PEFT" in capsys.readouterr().out
    record = json.loads((tmp_path / "checked" / "args.json").read_text())["self_check"]
    assert record["wrong"] == [] and record["compared"] > 20
    plain = train(tiny_checkpoint, tmp_path / "plain", **options)
    assert "self-check" not in capsys.readouterr().out  # on a CPU
    assert [row["loss"] for row in rows] == [row["loss"] for row in plain]
    ours, theirs = (load_file(tmp_path / name / LORA_FILE) for name in ("checked", "plain"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_run_that_computes_something_else_is_refused(tiny_checkpoint, tmp_path, train, capsys, monkeypatch):
    forward = lora.FusedLora.forward
    monkeypatch.setattr(lora.FusedLora, "forward", lambda layer, x, *args: 1.05 * forward(layer, x, *args))
    options = {"self_check": "always", "gradient_checkpointing": "attention", "base_precision": "int8"}
    with pytest.raises(SystemExit) as end:
        train(tiny_checkpoint, tmp_path / "run", max_train_steps=2, **options)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "computes something else here than diffusers and PEFT do" in said
    assert "leave out --base_precision int8, --gradient_checkpointing attention, one after the other" in said


@pytest.mark.parametrize("options", [{"training_type": "sft"}, {"use_dora": True}])
def test_runs_under_autocast_pass(tiny_checkpoint, tmp_path, train, options):
    train(tiny_checkpoint, tmp_path / "run", max_train_steps=1, self_check="always", mixed_precision="bf16", **options)
    assert json.loads((tmp_path / "run" / "args.json").read_text())["self_check"]["wrong"] == []
