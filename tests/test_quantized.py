"""Frozen weights in fewer bits: what they lose, what they save, and that a LoRA over them trains as over any others."""

import contextlib
from functools import cache
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pretrain
import pytest
import shapes
import step
import torch
from conftest import training_options, transformer_inputs
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

import train_cogvideox_lora as script
from cogvideox import compute, lora, quantized
from cogvideox.base_model import empty_transformer, load_transformer, read_base_model
from cogvideox.encoders import caption_encoder, encoders, video_encoder
from cogvideox.lora import Lora, trained_parameters
from cogvideox.lora_files import LORA_FILE
from cogvideox.objective import generator_for, training_loss
from cogvideox.quantized import QuantizedLinear
from run import processes
from run.run_directory import STATE_TENSORS

SMALL = pretrain.ROOT / "examples" / "small-cogvideox"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
NF4 = pytest.param(
    "nf4", marks=pytest.mark.skipif(not find_spec("bitsandbytes"), reason="bitsandbytes is not installed")
)
EVERY = ["fp8", "int8", NF4]


def with_lora(folder, precision, dtype=torch.float32):
    """A transformer with a LoRA that is not zero, the same for every precision."""
    torch.manual_seed(0)
    config = Lora(4, 4, TARGETS, base_precision=precision)
    transformer, _ = lora.with_lora(read_base_model(str(folder)), dtype, config, None)
    torch.manual_seed(1)
    for weight in trained_parameters(transformer):
        torch.nn.init.normal_(weight, std=0.05)
    return transformer.train()


def dequantized(transformer):
    """The same with plain layers, whose weights are what the quantised ones stand for."""
    for parent in list(transformer.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, QuantizedLinear):
                plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
                stored = [getattr(layer, name) for name in layer.stored]
                weight = quantized.dequantize(layer.precision, plain.weight.shape, layer.compute_dtype, *stored)
                plain.weight, plain.bias = torch.nn.Parameter(weight, requires_grad=False), layer.bias
                setattr(parent, name, plain)
    return transformer


def output_and_gradients(transformer, inputs):
    transformer.zero_grad()
    output = transformer(**inputs)[0]
    output.float().square().mean().backward()
    return output.detach(), [weight.grad.clone() for weight in trained_parameters(transformer)]


# ---- the formats


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_a_weight_is_off_by_half_a_step_of_its_row_at_most(precision, dtype):
    """int8: half a scale; fp8: half of 2^-3 of the number itself, and of 2^-9 scales next to zero; and dtype's own."""
    torch.manual_seed(0)
    weight = (torch.randn(64, 96) * torch.logspace(-3, 2, 64)[:, None]).to(dtype)
    weight[3] = 0
    stored = quantized.quantize(weight, precision)
    assert stored["weight"].dtype == quantized.ROWS[precision][0] and stored["scale"].shape == (64, 1)
    back = quantized.dequantize(precision, (64, 96), dtype, *stored.values())
    assert back.dtype == dtype and not back[3].any() and back.isfinite().all()
    size, scale = weight.float().abs(), stored["scale"].float()
    bound = scale / 2 if precision == "int8" else torch.maximum(size / 16, scale * 2**-10)
    assert ((back.float() - weight.float()).abs() <= bound * 1.001 + torch.finfo(dtype).eps * size).all()
    assert (back - weight).any()


@pytest.mark.parametrize("shape", [(64, 128), (640, 160), (192, 32)])
@pytest.mark.skipif(not find_spec("bitsandbytes"), reason="bitsandbytes is not installed")
def test_the_error_of_nf4_is_that_of_sixteen_levels(shape):
    """9.2 % of a normally distributed weight, whether or not its rows are whole blocks of 64."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    back = quantized.dequantize("nf4", shape, torch.float32, *quantized.quantize(weight, "nf4").values())
    assert (back - weight).norm() / weight.norm() == pytest.approx(0.092, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif(not find_spec("bitsandbytes"), reason="bitsandbytes is not installed")
def test_nf4_is_that_of_bitsandbytes(dtype):
    """Of its Linear4bit, which computes and keeps the weight by other code than ours."""
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    plain = torch.nn.Linear(128, 64, dtype=dtype)
    theirs = Linear4bit(128, 64, compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
    theirs.load_state_dict(plain.state_dict())
    theirs.to("cpu")
    x = torch.randn(8, 128, dtype=dtype, requires_grad=True)
    outputs = [layer(x) for layer in (theirs, QuantizedLinear(plain, "nf4"))]
    gradients = [torch.autograd.grad(output.float().square().sum(), x)[0] for output in outputs]
    for first, second in (outputs, gradients):
        assert torch.allclose(first, second, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("model, share", [("2b", 0.9926), ("5b", 0.9963)])
def test_the_layers_of_the_blocks_are_almost_all_of_the_weights(model, share):
    transformer = empty_transformer(step.MODELS[model].transformer)
    layers = [layer for layer in transformer.transformer_blocks.modules() if type(layer) is torch.nn.Linear]
    found = sum(layer.weight.numel() for layer in layers) / sum(weight.numel() for weight in transformer.parameters())
    assert found == pytest.approx(share, abs=0.0003)


@pytest.mark.parametrize(("precision", "bits"), [("fp8", 8), ("int8", 8), pytest.param("nf4", 4.127, marks=NF4.marks)])
def test_layers_of_the_blocks_alone_are_quantised_and_take_that_many_bits(precision, bits):
    transformer = load_transformer(read_base_model(str(SMALL)), torch.bfloat16)
    linear = {name for name, layer in transformer.named_modules() if isinstance(layer, torch.nn.Linear)}
    quantized.quantize_linears(transformer.transformer_blocks, precision)
    ours = {name: layer for name, layer in transformer.named_modules() if isinstance(layer, QuantizedLinear)}
    assert ours.keys() == {name for name in linear if name.startswith("transformer_blocks.")}
    weights = sum(layer.in_features * layer.out_features for layer in ours.values())
    kept = [buffer for layer in ours.values() for name, buffer in layer.named_buffers() if "code" not in name]
    assert 8 * sum(buffer.nbytes for buffer in kept) / weights == pytest.approx(bits, rel=0.02)
    assert not any(layer.state_dict().keys() - {"bias"} for layer in ours.values())


# ---- in the model


def plainly(transformer):
    pass


def recomputed(transformer):
    transformer.enable_gradient_checkpointing()


def recomputed_but_attention(transformer):
    compute.prepare(transformer, "attention")


def compiled(transformer):
    for block in transformer.transformer_blocks:
        block.compile(backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("prepare", [plainly, recomputed, recomputed_but_attention, compiled])
@pytest.mark.parametrize("precision", ["fp8", "int8"])
@pytest.mark.parametrize("autocast", [False, True])
def test_outputs_and_gradients_are_those_over_dequantised_weights(tiny_checkpoint, precision, autocast, prepare):
    """Bit for bit in float32, and in bfloat16 under autocast."""
    torch.compiler.reset()
    inputs, dtype = transformer_inputs(tiny_checkpoint), torch.bfloat16 if autocast else torch.float32
    results = []
    for change in (lambda transformer: transformer, dequantized):
        transformer = change(with_lora(tiny_checkpoint, precision, dtype))
        prepare(transformer)
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            results.append(output_and_gradients(transformer, inputs))
    (output, gradients), (expected, expected_gradients) = results
    assert torch.equal(output, expected)
    assert all(found.any() and torch.equal(found, other) for found, other in zip(gradients, expected_gradients))


@pytest.mark.parametrize("prepare", [plainly, compiled])
@pytest.mark.parametrize("precision", EVERY)
def test_no_dequantised_weight_is_kept_for_the_backward_pass(precision, prepare):
    """What is saved beyond the same model's plain layers is nothing, and their weights are not in it."""
    torch.compiler.reset()
    transformer = with_lora(SMALL, precision)
    shapes_of_weights = {
        (layer.out_features, layer.in_features) for layer in transformer.modules() if isinstance(layer, QuantizedLinear)
    }
    buffers = {buffer.untyped_storage().data_ptr() for buffer in transformer.buffers()}
    saved = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in buffers and tensor.dtype.is_floating_point:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    inputs = transformer_inputs(SMALL) | {"encoder_hidden_states": torch.randn(1, 24, 64)}
    prepare(transformer)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = transformer(**inputs)[0]
    assert saved and output.requires_grad
    found = [tuple(t.shape) for t in saved.values() if {tuple(t.shape), tuple(t.shape[::-1])} & shapes_of_weights]
    assert found == []


@pytest.fixture(scope="module")
def small_losses():
    """Losses of the small trained model on eight drawn clips, always with the same noise, by timestep."""
    base, rng, device = read_base_model(str(SMALL)), np.random.default_rng(0), torch.device("cpu")
    scenes = [shapes.random_scene(rng) for _ in range(8)]
    clips = [torch.from_numpy(shapes.draw_clip(scene, 17, 64, 96, rng)) for scene in scenes]
    with video_encoder(base, torch.float32, device, tiling=False, slicing=False) as encode:
        batch = {"parameters": encode(torch.stack(clips))}
    with caption_encoder(base, torch.float32, device) as encode:
        batch["prompt_embeds"] = encode([scene.caption for scene in scenes])

    @torch.no_grad()
    def losses(precision):
        transformer = load_transformer(base, torch.float32).eval()
        if precision != "bf16":
            quantized.quantize_linears(transformer.transformer_blocks, precision)
        found = {}
        for t in (125, 375, 625, 875):
            arguments = base, transformer, batch, generator_for(device, t), torch.float32
            found[t] = training_loss(*arguments, timesteps=torch.full((8,), t)).item()
        return found

    return cache(losses)


@pytest.mark.parametrize(
    ("precision", "bound"), [("fp8", 0.02), ("int8", 0.002), pytest.param("nf4", 0.2, marks=NF4.marks)]
)
def test_the_loss_of_a_trained_model_moves_by_no_more_than_that(small_losses, precision, bound):
    base, found = small_losses("bf16"), small_losses(precision)
    assert found != base
    assert all(found[timestep] == pytest.approx(base[timestep], rel=bound) for timestep in base)


# ---- in a run


@pytest.mark.parametrize("precision", EVERY)
def test_every_lora_weight_moves_and_nothing_else_does(tiny_checkpoint, tmp_path, train, monkeypatch, precision):
    prepared = {}
    add_lora = lora.add_lora

    def everything(transformer):
        named = [*transformer.named_parameters(), *transformer.named_buffers()]
        return {name: tensor.view(torch.uint8) if tensor.dim() else tensor for name, tensor in named}

    def keep(transformer, *args, **options):
        add_lora(transformer, *args, **options)
        prepared["transformer"] = transformer
        prepared["before"] = {name: tensor.detach().clone() for name, tensor in everything(transformer).items()}

    monkeypatch.setattr(lora, "add_lora", keep)
    train(tiny_checkpoint, tmp_path / "run", max_train_steps=2, base_precision=precision, ema_decay=0.9)
    after = everything(prepared["transformer"])
    assert any(isinstance(layer, QuantizedLinear) for layer in prepared["transformer"].modules())
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, prepared["before"][name])}
    assert moved == {name for name in after if "lora_" in name}
    state = torch.load(tmp_path / "run" / "checkpoint-2" / STATE_TENSORS, weights_only=True)
    assert state["transformer"] and all("lora_" in name for name in state["transformer"])

    pipeline = DiffusionPipeline.from_pretrained(tiny_checkpoint)
    pipeline.load_lora_weights(tmp_path / "run")
    loaded = {name for name, _ in pipeline.transformer.named_parameters() if "lora_" in name}
    assert len(loaded) == len(load_file(tmp_path / "run" / LORA_FILE)) > 0


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_a_resumed_run_equals_a_straight_one(tiny_checkpoint, tmp_path, train, precision):
    options = {"base_precision": precision, "mixed_precision": "bf16", "gradient_checkpointing": True}
    straight = train(tiny_checkpoint, tmp_path / "a", max_train_steps=4, **options)
    train(tiny_checkpoint, tmp_path / "b", max_train_steps=2, **options)
    resumed = train(tiny_checkpoint, tmp_path / "b", max_train_steps=4, resume_from_checkpoint="latest", **options)
    assert [row["loss"] for row in resumed] == [row["loss"] for row in straight]


def test_another_base_precision_is_refused_on_resuming(tiny_checkpoint, tmp_path, train, capsys):
    train(tiny_checkpoint, tmp_path / "run", max_train_steps=1, base_precision="int8")
    with pytest.raises(SystemExit):
        train(tiny_checkpoint, tmp_path / "run", resume_from_checkpoint="latest")
    assert "--base_precision bf16: checkpoint-1 was trained with int8" in capsys.readouterr().err


def test_it_is_refused_where_no_lora_is_trained(capsys):
    line = training_options("m", "d", "o", training_type="sft", base_precision="int8")
    with pytest.raises(SystemExit):
        script.parse_args(line)
    assert "--base_precision: does nothing with --training_type sft" in capsys.readouterr().err


def test_it_is_refused_under_fsdp(monkeypatch):
    monkeypatch.setattr(processes, "start", lambda **options: (SimpleNamespace(is_fsdp2=True), None))
    args = script.parse_args(training_options("m", "d", "o", base_precision="fp8"))
    with pytest.raises(ValueError, match="--base_precision fp8: FSDP cannot shard quantised weights"):
        script.start(args)


@pytest.mark.skipif(bool(find_spec("bitsandbytes")), reason="bitsandbytes is installed")
def test_nf4_names_the_package_that_is_missing_before_anything_is_encoded(tiny_checkpoint, tmp_path, train, capsys):
    with pytest.raises(SystemExit):
        train(tiny_checkpoint, tmp_path / "run", base_precision="nf4", latents_cache_dir=tmp_path / "cache")
    assert "--base_precision nf4: needs bitsandbytes; pip install bitsandbytes" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


# ---- T5


def embeddings(folder, dtype, precision):
    captions = ["a red circle moves left over a dark ground", "", "a yellow square"]
    checkpoint = read_base_model(str(folder))
    with caption_encoder(checkpoint, dtype, "cpu", precision) as encode:
        return encode(captions).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", ["tiny", "small"])
def test_embeddings_of_an_int8_t5_are_near_those_of_a_plain_one(tiny_checkpoint, which, dtype):
    folder = tiny_checkpoint if which == "tiny" else SMALL
    plain, eight = (embeddings(folder, dtype, precision) for precision in ("bf16", "int8"))
    error = (eight - plain).norm(dim=-1) / plain.norm(dim=-1)  # [captions, L]
    assert 0 < error.max() < 0.03


def test_a_t5_in_eight_bits_has_a_cache_of_its_own_and_one_on_the_cpu_has_not(tiny_checkpoint):
    checkpoint = read_base_model(str(tiny_checkpoint))
    cpu = torch.device("cpu")
    keys = [
        encoders(checkpoint, torch.float32, cpu, tiling=False, slicing=False, **text)[1].fingerprint
        for text in (
            {},
            {"text_precision": "bf16", "text_device": "cpu"},
            {"text_precision": "bf16", "text_device": "meta"},
            {"text_precision": "int8", "text_device": "cpu"},
        )
    ]
    assert keys[0] == keys[1] == keys[2] != keys[3]


def test_a_run_with_t5_in_eight_bits_on_the_cpu(tiny_checkpoint, clips, tmp_path, train):
    """Captions are another model's, so losses differ; where it runs changes nothing."""
    options = {"max_train_steps": 2, "latents_cache_dir": tmp_path / "cache"}
    runs = [
        [row["loss"] for row in train(tiny_checkpoint, tmp_path / str(i), **options, **more)]
        for i, more in enumerate(
            ({}, {"text_encoder_device": "cpu"}, {"text_encoder_precision": "int8", "text_encoder_device": "cpu"})
        )
    ]
    assert runs[0] == runs[1] != runs[2]
    assert runs[2] == pytest.approx(runs[0], rel=0.01)
