"""memory.py against counts of the bytes that the real modules hold, on a CPU and on the meta device."""

import contextlib
import importlib.util
import json
from functools import partial

import diffusers
import pytest
import step
import torch
import torch.nn.functional as F
from conftest import ROOT
from live_bytes import LiveBytes, saved_bytes
from peft.tuners.lora import LoraLayer
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import T5EncoderModel

from cogvideox import compute, memory
from cogvideox.base_model import (
    empty_text_encoder,
    empty_transformer,
    empty_vae,
    read_base_model,
    read_text_encoder_config,
)
from cogvideox.lora import DEFAULT_TARGETS, Lora, add_lora, trained_parameters
from cogvideox.memory import GIB, Settings
from cogvideox.objective import rotary_embedding

FEED_FORWARD = (*DEFAULT_TARGETS, "ff.net.0.proj", "ff.net.2")
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention.default


def settings_of(model, **options):
    model = step.MODELS[model]
    return Settings(model.height, model.width, model.max_num_frames, **options)


def compute_as_on_a_gpu(transformer, settings):
    """LoRA weights are cast in their products; autocast runs LayerNorms in float32, which it does not on a CPU."""

    def product(layer, x):
        return F.linear(x, layer.weight.to(x.dtype))

    def norm(layer, x):
        with torch.autocast("cpu", enabled=False):
            return F.layer_norm(x.float(), layer.normalized_shape, layer.weight, layer.bias, layer.eps)

    for layer in list(transformer.modules()):
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
            for matrix in (*layer.lora_A.values(), *layer.lora_B.values()):
                matrix.forward = partial(product, matrix)
        elif isinstance(layer, torch.nn.LayerNorm) and settings.autocast:
            layer.forward = partial(norm, layer)


def trained_transformer(config, settings, device="cpu"):
    with torch.device(device):
        transformer = diffusers.CogVideoXTransformer3DModel.from_config(config)
        if not settings.sft:
            lora = Lora(settings.rank, settings.rank, list(settings.lora_target_modules))
            add_lora(transformer.to(settings.dtype), lora, settings.dtype)
    transformer.set_attn_processor(compute.AttentionByTokens())
    compute_as_on_a_gpu(transformer, settings)
    return transformer.train()


def autocast(settings):
    return torch.autocast("cpu", settings.dtype) if settings.autocast else contextlib.nullcontext()


# ---- what a block saves ----------------------------------------------------------------------------------------------


LORA = {"dtype": torch.bfloat16, "rank": 16}
FLOAT32, SFT = {"dtype": torch.float32}, {"training_type": "sft"}


@pytest.mark.parametrize("heads, side, batch, rotary", [(2, 96, 3, False), (4, 128, 1, True)])
@pytest.mark.parametrize("options", [
    LORA, LORA | FLOAT32, LORA | {"rank": 64} | FLOAT32, LORA | {"lora_target_modules": FEED_FORWARD},
    LORA | {"lora_target_modules": ("to_out.0",)}, LORA | {"lora_target_modules": ("to_q", "norm1.linear")},
    SFT, SFT | FLOAT32,
], ids=lambda options: " ".join(str(value) for value in options.values()))  # fmt: skip
def test_a_block_saves_what_the_formula_says(options, heads, side, batch, rotary):
    settings = Settings(side, side, 9, train_batch_size=batch, **options)
    config = {
        "num_layers": 1, "num_attention_heads": heads, "time_embed_dim": 32, "text_embed_dim": 32, "in_channels": 4,
        "out_channels": 4, "max_text_seq_length": 20, "use_rotary_positional_embeddings": rotary,
    }  # fmt: skip
    made = step.random_base_model("tiny")._replace(transformer=dict(empty_transformer(config).config))
    tokens = memory.count_tokens(made, settings)
    transformer, dtype = trained_transformer(made.transformer, settings), settings.dtype
    block, width = transformer.transformer_blocks[0], heads * 64
    shapes = (batch, tokens.video, width), (batch, tokens.text, width)
    states = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    temb = torch.randn(batch, 32, dtype=dtype, requires_grad=settings.sft)
    tables = rotary_embedding(made, 3, side // 8, side // 8, "cpu")

    def forward():
        with autocast(settings):
            return block(*states, temb, tables)

    weights = memory.count_weights(made.transformer, settings)
    counted = saved_bytes(forward, [*block.parameters(), *(tables or [])])
    assert memory.saved_by_block(made.transformer, weights, settings, tokens) == pytest.approx(counted, rel=0.03)


# ---- a training step -------------------------------------------------------------------------------------------------


def flash_attention(query, key, value, **_):
    """The GPU's kernel, so that on the meta device its outputs have their layout there."""
    return ATTENTION(query.to(value.dtype), key.to(value.dtype), value)[0]


def keep_attention():
    def policy(context, operation, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if operation is ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


RECOMPUTE = {"attention": {"context_fn": keep_attention}, "full": {}}


@pytest.mark.parametrize("model, level, options", [
    ("2b", "none", {}), ("2b", "attention", {}), ("5b", "full", {}), ("1.5-I2V", "attention", {}),
    ("5b", "full", {"train_batch_size": 2, "rank": 32, "lora_target_modules": FEED_FORWARD}),
    ("2b", "none", SFT | FLOAT32), ("2b", "full", SFT | FLOAT32),
])  # fmt: skip
def test_a_step_at_full_size_peaks_where_predicted(model, options, level, monkeypatch):
    """Forward, loss and backward of three blocks, on the meta device: nothing is computed."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", flash_attention)
    settings, batch = settings_of(model, gradient_checkpointing=level, **options), options.get("train_batch_size", 1)
    made = step.random_base_model(model, num_layers=3)
    config = made.transformer
    transformer = trained_transformer(config, settings, "meta")
    if level != "none":
        recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, **RECOMPUTE[level])
        transformer.enable_gradient_checkpointing(recompute)
    f, h, w = (settings.max_num_frames - 1) // 4 + 1, settings.height // 8, settings.width // 8
    f += -f % (config["patch_size_t"] or 1)
    with torch.device("meta"):
        inputs = {
            "hidden_states": torch.empty(batch, f, config["in_channels"], h, w, dtype=settings.dtype),
            "encoder_hidden_states": torch.empty(batch, 226, 4096, dtype=settings.dtype),
            "timestep": torch.empty(batch, dtype=torch.int64),
            "ofs": torch.empty(1, dtype=settings.dtype) if config["ofs_embed_dim"] else None,
            "image_rotary_emb": rotary_embedding(made, f, h, w, "meta"),
        }
    with LiveBytes() as counted:
        predicted = transformer(**inputs, return_dict=False)[0]
        F.mse_loss(predicted.float(), torch.empty_like(predicted, dtype=torch.float32)).backward()

    parts = memory.training_parts(made, settings)
    resident = sum(parts[name] for name in ("frozen weights", "trained weights", "optimizer", "moving average"))
    assert parts["peak"] - resident == pytest.approx(counted.peak / GIB, rel=0.05)


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["tiny", "tiny-I2V"])
@pytest.mark.parametrize("options", [LORA, SFT])
def test_weights_of_two_blocks_tell_those_of_all(model, options):
    config = step.random_base_model(model, num_layers=5).transformer
    settings = settings_of(model, **options)
    transformer = trained_transformer(config, settings)
    weights = memory.count_weights(config, settings)
    frozen = [weight for weight in transformer.parameters() if not weight.requires_grad]
    assert weights.trained == sum(weight.numel() for weight in trained_parameters(transformer))
    assert weights.frozen == sum(weight.numel() for weight in (*frozen, *transformer.buffers()))


@pytest.mark.parametrize("model, count", [("2b", 58_982_400), ("5b", 132_120_576)])
def test_a_lora_of_rank_128_has_as_many_weights_as_published(model, count):
    assert memory.count_weights(step.random_base_model(model).transformer, settings_of(model)).trained == count


def test_a_quantized_base_shrinks_by_its_linear_layers_alone():
    made = step.random_base_model("5b")
    weights = memory.count_weights(made.transformer, settings_of("5b"))
    in_blocks = 42 * (4 + 8) * 3072**2 + 42 * 2 * 512 * 6 * 3072  # attention and feed-forward; the norms' modulation
    assert weights.blocks_linear == in_blocks
    saved = [
        memory.base_bytes(weights, settings_of("5b", base_precision="bf16"))
        - memory.base_bytes(weights, settings_of("5b", base_precision=precision))
        for precision in ("fp8", "int8", "nf4")
    ]
    assert saved == pytest.approx([in_blocks, in_blocks, 1.47 * in_blocks], rel=0.002)  # but for the scales


# ---- VAE and T5 ------------------------------------------------------------------------------------------------------


SMALL = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
TINY = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 2, "latent_channels": 8, "norm_num_groups": 4}


@pytest.mark.parametrize("config, size", [
    (SMALL, (9, 64, 96)), (SMALL, (25, 64, 64)), (TINY, (1, 64, 96)), ({}, (9, 768, 1360)),
])  # fmt: skip
@pytest.mark.parametrize("way", ["encode", "decode"])
def test_the_vae_peaks_where_predicted(config, size, way):
    """The published one at its published sizes, too, where convolutions are split, on the meta device."""
    vae = empty_vae(config).eval()
    config, (F_, H, W) = dict(vae.config), size
    latents = ((F_ - 1) // 4 + 1, H // 8, W // 8)
    shape = (3, *size) if way == "encode" else (config["latent_channels"], *latents)
    inputs = torch.empty(1, *shape, device="meta")
    with torch.no_grad(), LiveBytes() as counted:
        getattr(vae, way)(inputs)
    predicted = memory.encoder_peak(config, *size) if way == "encode" else memory.decoder_peak(config, *latents)
    assert 4 * predicted == pytest.approx(counted.peak, rel=0.03)


@pytest.mark.parametrize("way", ["encode", "decode"])
def test_tiles_peak_where_predicted(way):
    made = step.random_base_model("2b")._replace(vae=SMALL | {"block_out_channels": (8, 8, 8, 8)})
    settings = Settings(256, 384, 9, dtype=torch.float32, tile_encoding=True, tile_decoding=True)
    vae = empty_vae(made.vae).eval()
    vae.enable_tiling(*memory.TILE)
    shape = (1, 3, 9, 256, 384) if way == "encode" else (1, 4, 3, 32, 48)
    inputs = torch.empty(shape, device="meta")
    with torch.no_grad(), LiveBytes() as counted:
        getattr(vae, way)(inputs)
    if way == "encode":
        predicted = memory.encoding_bytes(made, settings) - 3 * 9 * 256 * 384 * 5  # the clip was there before
    else:
        predicted = memory.decoding_bytes(made, settings)
    assert predicted == pytest.approx(counted.peak, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_t5_weighs_what_transformers_loads(tiny_checkpoint, dtype):
    config = read_text_encoder_config(read_base_model(tiny_checkpoint))
    encoder = T5EncoderModel.from_pretrained(tiny_checkpoint, subfolder="text_encoder", dtype=dtype)
    assert memory.text_bytes(config, dtype, num_tokens=0) == sum(weight.nbytes for weight in encoder.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_t5_takes_as_much_for_a_caption_as_predicted(dtype):
    config = {"d_model": 4096, "d_ff": 10240, "num_heads": 64, "num_layers": 2, "feed_forward_proj": "gated-gelu"}
    encoder = empty_text_encoder(config).to(dtype).eval()
    tokens = torch.zeros(1, 226, dtype=torch.int64, device="meta")
    with torch.no_grad(), LiveBytes() as counted:
        encoder(tokens)
    predicted = memory.text_bytes(config, dtype, 226) - memory.text_bytes(config, dtype, 0)
    # Transformers 5.17 takes a fifth less than 5.23. Either is under a hundredth of the weights.
    assert predicted == pytest.approx(counted.peak, rel=0.25)


# ---- what is made of it ----------------------------------------------------------------------------------------------


def test_sampling_peaks_where_predicted(monkeypatch):
    """Two clips through a transformer of two blocks, at full size, without gradients."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", flash_attention)
    for model in ("2b", "5b"):
        made, settings = step.random_base_model(model, num_layers=2), settings_of(model)
        transformer = trained_transformer(made.transformer, settings, "meta")
        inputs = [torch.empty(2, 13, 16, 60, 90, dtype=torch.bfloat16, device="meta"),
                  torch.empty(2, 226, 4096, dtype=torch.bfloat16, device="meta")]  # fmt: skip
        tables = rotary_embedding(made, 13, 60, 90, "meta")
        with torch.no_grad(), LiveBytes() as counted:
            transformer(*inputs, torch.empty(2, dtype=torch.int64, device="meta"), image_rotary_emb=tables)
        weights = memory.count_weights(made.transformer, settings)
        assert memory.sampling_bytes(made, settings, weights) == pytest.approx(counted.peak, rel=0.1)


@pytest.mark.parametrize("free_gib, level, reason", [
    (77, "attention", "attention needs 25.9 of 77.0 GiB (predicted 22.6, 10 % and 1 GiB); none would need 78.0"),
    (79, "none", "none needs 78.0 of 79.0 GiB (predicted 70.0, 10 % and 1 GiB)"),
    (24, "full", "full needs 21.2 of 24.0 GiB"),
    (16, "full", "which may not do: with --blocks_to_swap 42 it would need 10.3; or lower --max_num_frames"),
    (None, "none", "no GPU"),
])  # fmt: skip
def test_auto_takes_the_fastest_level_that_fits(free_gib, level, reason):
    chosen, why = memory.choose_checkpointing(free_gib, step.random_base_model("5b"), settings_of("5b"))
    assert chosen == level
    assert reason in why


def test_summary_is_one_line_that_names_what_does_not_fit():
    phases = {"text": 9.62, "clips": 5.2, "training": 19.3, "validation": 26.04}
    line = "memory, predicted: text 9.6, clips 5.2, training 19.3, validation 26.0 GiB"
    assert memory.summary(phases, None) == line
    assert memory.summary(phases, 40) == f"{line}; this GPU has 40.0"
    assert memory.summary(phases, 15.5) == f"{line}; this GPU has 15.5, too little for training and validation"


def test_phases_hold_what_is_in_memory_with_them(tiny_checkpoint):
    """More of anything never takes less, and what concerns one phase leaves the others alone."""
    made = read_base_model(tiny_checkpoint)
    text = read_text_encoder_config(made)
    base = Settings(64, 96, 9, rank=4)
    phases = memory.predict(made, text, base)
    changes = {
        "rank": (8, {"training", "validation"}), "train_batch_size": (2, {"training"}),
        "ema": (True, {"training", "validation"}), "optimizer": ("prodigy", {"training", "validation"}),
        "max_num_frames": (17, {"clips", "training", "validation"}),
        "training_type": ("sft", {"training", "validation"}),
    }  # fmt: skip
    for name, (value, grown) in changes.items():
        other = memory.predict(made, text, base._replace(**{name: value}))
        assert {phase for phase in phases if other[phase] > phases[phase]} == grown, name
        assert all(other[phase] >= phases[phase] for phase in phases), name
    without = memory.predict(made, text, base._replace(samples=False))
    assert without == {phase: phases[phase] for phase in ("text", "clips", "training")}


# ---- benchmarks/memory.py --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command():
    """By its path: the module at the top has the same name."""
    spec = importlib.util.spec_from_file_location("benchmarks_memory", ROOT / "benchmarks" / "memory.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_command_prints_and_writes_the_prediction(command, tmp_path, capsys):
    line = ["--model", "tiny", "--rank", "8", "--gradient_checkpointing", "--base_precision", "nf4", "--free_gib", "24"]
    command.main([*line, "--output", str(tmp_path / "tiny.json")])
    printed, written = capsys.readouterr().out, json.loads((tmp_path / "tiny.json").read_text())
    settings = settings_of("tiny", rank=8, gradient_checkpointing="full", base_precision="nf4")
    predicted = memory.training_parts(step.random_base_model("tiny"), settings)["peak"]
    assert written["training_gib"]["peak"] == written["phases_gib"]["training"] == pytest.approx(predicted, abs=1e-3)
    assert "memory, predicted: text 0.0" in printed and "this GPU has 24.0" in printed


def test_command_without_a_gpu_says_nothing_of_one(command, capsys):
    command.main(["--model", "5b", "--gradient_checkpointing", "--blocks_to_swap", "42"])
    printed = capsys.readouterr().out
    assert "training 8.5" in printed and "saves nothing" not in printed


def test_command_shows_what_auto_would_choose(command, capsys):
    line = ["--model", "5b", "--gradient_checkpointing", "auto", "--enable_tiling", "auto"]
    command.main([*line, "--free_gib", "24"])
    printed = capsys.readouterr().out
    assert "--gradient_checkpointing auto: full needs 21.2 of 24.0 GiB" in printed
    assert "--enable_tiling auto: tiles for validation" in printed
    assert float(printed.split("validation")[1].split()[0]) == pytest.approx(16.1, abs=0.1)  # in tiles
    with pytest.raises(SystemExit):
        command.parse_args(line)
    assert "auto: depends on the GPU; pass --free_gib" in capsys.readouterr().err


@pytest.mark.parametrize("level", compute.LEVELS)
def test_command_compares_with_a_result_of_its_own_options(command, level, tmp_path, capsys):
    settings = settings_of("2b", rank=64, gradient_checkpointing=level)
    options = {name: value for name, value in settings._asdict().items() if name != "dtype"}
    options |= {"mixed_precision": "bf16", "steps": 10}
    measured = memory.training_parts(step.random_base_model("2b"), settings)["peak"] / 1.25
    (tmp_path / "2b.json").write_text(
        json.dumps({"model": "2b", "device": "H100", "options": options, "peak_memory_gib": measured})
    )
    (tmp_path / "cpu.json").write_text(
        json.dumps({"model": "2b", "device": "CPU, x86_64", "options": options, "peak_memory_gib": measured})
    )
    command.main(["--measured", str(tmp_path / "2b.json"), str(tmp_path / "cpu.json")])
    _, gpu, cpu = capsys.readouterr().out.splitlines()
    assert gpu.endswith("+25.0%") and cpu.endswith("no peak of a GPU in it")


def test_command_refuses_a_quantized_base_that_is_trained(command, capsys):
    with pytest.raises(SystemExit):
        command.main(["--training_type", "sft", "--base_precision", "int8"])
    assert "--base_precision int8: sft trains the base; leave it out" in capsys.readouterr().err
