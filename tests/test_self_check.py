"""The self-check passes what is right, in every way to compute, and finds whatever is broken on purpose."""

import copy
import json
import shutil
from functools import partial

import pytest
import step
import torch
import torch.nn.functional as F
from conftest import transformer_inputs
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from cogvideox import compute, lora, quantized, rehearsal, self_check, swapping
from cogvideox.base_model import empty_transformer, load_transformer, read_base_model
from cogvideox.encoders import encode_images
from cogvideox.lora import Lora, add_lora
from cogvideox.lora_files import LORA_FILE
from cogvideox.meter import Meter, module_bytes
from cogvideox.objective import training_loss
from cogvideox.rehearsal import Settings

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
CPU = torch.device("cpu")


def checked(folder, dtype=torch.bfloat16, level="none", options=compute.PLAIN, targets=TARGETS, **kind):
    """Returns the report on a transformer that is prepared as for training."""
    base, settings = read_base_model(str(folder)), Lora(4, 4.0, targets, **kind)
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
    assert all(module.training for module in transformer.modules())
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
        {"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "pissa"}, {"lora_dropout": 0.2},
        {"level": "full", "options": compute.PLAIN._replace(blocks_to_swap=2)},
        {"options": compute.PLAIN._replace(attention_backend="math")},
    ],
)  # fmt: skip
def test_every_way_to_compute_passes(tiny_checkpoint, how):
    assert wrong(checked(tiny_checkpoint, **how)) == []


COMPILED = compute.PLAIN._replace(compile=True)


@pytest.mark.parametrize(
    ("level", "options"),
    [
        ("none", {}), ("attention", {}), ("full", {}), ("none", {"base_precision": "int8"}),
        ("attention", {"base_precision": "int8"}), ("full", {"blocks_to_swap": 2}),
    ],
)  # fmt: skip
def test_compiled_blocks_pass_and_are_those_of_training(compiled_without_a_compiler, tiny_checkpoint, level, options):
    kind = {name: value for name, value in options.items() if name == "base_precision"}
    counters = torch._dynamo.utils.counters
    counters.clear()
    report = checked(tiny_checkpoint, level=level, options=COMPILED._replace(**options), **kind)
    assert wrong(report) == []
    # As in training: one for the first block, whose input needs no gradient, and one for the middle block.
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiler_that_takes_another_function_is_found(monkeypatch, tiny_checkpoint, dtype):
    def wrong_compiler(graph, example_inputs):
        (gelu,) = (node for node in graph.graph.nodes if node.target is F.gelu)
        gelu.target, gelu.kwargs = F.silu, {}
        graph.recompile()
        return graph

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=wrong_compiler))
    assert wrong(checked(tiny_checkpoint, dtype, options=COMPILED))
    torch._dynamo.reset()


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


@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor writes C++ for a CPU")
def test_gradients_of_a_first_block_that_inductor_gets_wrong_are_found(tiny_checkpoint, monkeypatch):
    """Where attention's output is kept and its input needs no gradient, without what compute.prepare does about it."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch.nn.Module, "register_forward_hook", lambda *args: None)
    report = checked(tiny_checkpoint, torch.float32, "attention", COMPILED, targets=("ff.net.2",))
    torch._dynamo.reset()
    assert {one.block for one in wrong(report)} == {0}


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


class FusedAttention(TorchFunctionMode):
    """A GPU's attention, for meta tensors, in diffusers' processor as well."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return rehearsal.FLASH(*(args or [kwargs[name] for name in ("query", "key", "value")])[:3])[0]


@pytest.mark.parametrize(
    ("model", "clip", "options"),
    [
        ("2b", (480, 720, 49), {}), ("5b", (480, 720, 49), {"base_precision": "int8"}), ("5b-I2V", (480, 720, 49), {}),
        ("1.5", (768, 1360, 81), {}),
    ],
)  # fmt: skip
def test_it_takes_less_memory_than_an_update_with_full_recomputation(monkeypatch, model, clip, options):
    """Rehearsed on the meta device, at the base models' own sizes."""

    def saved_on_cpu():
        def unpack(saved):
            return torch.empty_strided(*saved[:2], dtype=saved[2], device="meta")

        return torch.autograd.graph.saved_tensors_hooks(lambda kept: (kept.shape, kept.stride(), kept.dtype), unpack)

    def empty_block(config):
        with _disable_current_modes():  # has no memory, in a run
            return empty_transformer(config)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", saved_on_cpu)
    monkeypatch.setattr(self_check, "empty_transformer", empty_block)
    monkeypatch.setattr(self_check, "_relative_error", lambda found, expected: 0.0)
    dequantised = self_check._weights_of
    monkeypatch.setattr(
        self_check, "_read_block", lambda base, number: dequantised(transformer.transformer_blocks[0]).items()
    )

    base, kind = step.random_base_model(model), Lora(128, 128.0, TARGETS[:4], **options)
    base = base._replace(scheduler=copy.deepcopy(base.scheduler))  # moves its tables to where the latents are
    settings = Settings(*clip, kind, gradient_checkpointing="full")
    models = rehearsal.models_of(base, step.T5S["published"], partial(torch.optim.AdamW, fused=True))
    transformer = rehearsal._transformer(base, settings, base.transformer["num_layers"])
    vae = rehearsal._image_encoder(base, settings)
    forward = partial(
        training_loss, base, transformer, rehearsal._batch(base, settings), rehearsal.MetaGenerator(), settings.dtype,
        partial(encode_images, vae) if vae else None,
    )  # fmt: skip
    with FusedAttention(), Meter() as meter:
        self_check.check(base, transformer, kind, forward, dtype=settings.dtype, autocast=False)
    held = module_bytes(transformer) + (module_bytes(vae) if vae else 0)
    assert held + meter.peak < 0.9 * rehearsal.rehearse("training", models, settings).peak_bytes


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
