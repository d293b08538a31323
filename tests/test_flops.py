"""benchmarks/flops.py against torch's FlopCounterMode, on forward and backward passes of the real transformer.

torch 2.13 counts attention's kernels of a GPU, not the one of a CPU, and no addmm in place: `counter` does.
"""

import flops
import pytest
import step
import torch
import torch.nn.functional as F
from diffusers import CogVideoXTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from cogvideox import compute
from cogvideox.base_model import empty_transformer
from cogvideox.lora import DEFAULT_TARGETS, Lora, add_lora
from cogvideox.objective import rotary_embedding

FLASH = torch.ops.aten._scaled_dot_product_flash_attention.default
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
SMALL = {
    "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 64, "in_channels": 4, "out_channels": 4,
    "time_embed_dim": 32, "text_embed_dim": 48, "max_text_seq_length": 10,
}  # fmt: skip
ROTARY = {"use_rotary_positional_embeddings": True}
CONFIGS = {
    "2b": SMALL,
    "5b": SMALL | ROTARY,
    "1.5": SMALL | ROTARY | {"patch_size_t": 2, "patch_bias": False},
    "1.5-I2V": SMALL | ROTARY | {"patch_size_t": 2, "patch_bias": False, "in_channels": 8, "ofs_embed_dim": 32},
}
FRAMES, HEIGHT, WIDTH = 4, 8, 12  # of the latents


def counter() -> FlopCounterMode:
    known = {
        ATTENTION: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value),
        BACKWARD: lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4]),
        torch.ops.aten.addmm_: lambda _, first, second, **__: 2 * first[0] * first[1] * second[1],
    }
    return FlopCounterMode(display=False, custom_mapping=known)


def transformer_of(config, trained, level="none", device="cpu"):
    with torch.device(device):
        transformer = CogVideoXTransformer3DModel.from_config(config)
        if not trained.sft:
            lora = Lora(trained.rank, trained.rank, list(trained.lora_target_modules))
            add_lora(transformer, lora, torch.float32)
    compute.prepare(transformer, level, compiled=False, backend="auto")
    return transformer.train()


def counted(config, trained, level="none", size=(FRAMES, HEIGHT, WIDTH), batch=1, device="cpu"):
    """Tokens of a clip, and FLOP of forward and backward pass."""
    made = step.random_base_model("tiny")._replace(transformer=dict(empty_transformer(config).config))
    config, (f, h, w) = made.transformer, size
    transformer = transformer_of(config, trained, level, device)
    with torch.device(device):
        inputs = {
            "hidden_states": torch.randn(batch, f, config["in_channels"], h, w),
            "encoder_hidden_states": torch.randn(batch, config["max_text_seq_length"], config["text_embed_dim"]),
            "timestep": torch.full((batch,), 500),
            "ofs": torch.full((1,), 2.0) if config["ofs_embed_dim"] else None,
            "image_rotary_emb": rotary_embedding(made, f, h, w, device),
        }
    with counter() as forward:
        predicted = transformer(**inputs, return_dict=False)[0]
    with counter() as backward:
        F.mse_loss(predicted, torch.zeros_like(predicted)).backward()
    return config, made.num_tokens(f, h, w), forward.get_total_flops(), backward.get_total_flops()


def lora(*targets, rank=3):
    return flops.Trained("lora", rank, targets or tuple(DEFAULT_TARGETS))


SFT = flops.Trained("sft", 0, ())


@pytest.mark.parametrize("variant", CONFIGS)
@pytest.mark.parametrize("trained", [lora(), lora(rank=16), SFT], ids=["rank 3", "rank 16", "sft"])
@pytest.mark.parametrize("level", compute.LEVELS)
def test_formula_is_what_autograd_computes(variant, trained, level):
    config, tokens, forward, backward = counted(CONFIGS[variant], trained, level)
    formula = flops.step_flops(config, tokens, trained)
    assert (formula.forward, formula.backward + formula.recomputed[level]) == (forward, backward)


@pytest.mark.parametrize("targets", [
    ["to_k"], ["to_out.0"], ["norm2.linear"], ["ff.net.0.proj", "ff.net.2"], ["norm1.linear", "to_q"],
    ["time_embedding.linear_1"], ["patch_embed.proj", "to_v"], ["text_proj"], ["norm_out.linear"], ["proj_out"],
], ids=" ".join)  # fmt: skip
@pytest.mark.parametrize("level", compute.LEVELS)
def test_what_needs_no_gradient_gets_none_whatever_the_lora_is_on(targets, level):
    trained = lora(*targets)
    config, tokens, forward, backward = counted(CONFIGS["1.5"], trained, level)  # whose patches go through a Linear
    formula = flops.step_flops(config, tokens, trained)
    assert (formula.forward, formula.backward + formula.recomputed[level]) == (forward, backward)


def test_clips_of_a_batch_cost_the_same_each():
    one, two = (counted(CONFIGS["5b"], lora(), batch=batch)[2:] for batch in (1, 2))
    assert two == tuple(2 * count for count in one)


@pytest.mark.parametrize("model, tera", {
    "2b": {"forward": 122, "attention": 73, "none": 355, "attention kept": 404, "full": 477},
    "5b": {"forward": 337, "attention": 163, "none": 922, "attention kept": 1096, "full": 1259},
    "1.5": {"forward": 1491, "attention": 1050, "none": 4566, "attention kept": 5007, "full": 6057},
}.items())  # fmt: skip
def test_formula_gives_what_was_calculated_by_hand(model, tera):
    """benchmarks/GPU_TODO.md derives seconds from these; rank 128, the model's own size."""
    formula = at_full_size(model, lora(rank=128))[2]
    levels = {"none": "none", "attention kept": "attention", "full": "full"}
    found = {"forward": formula.forward, "attention": formula.attention}
    found |= {name: formula.hardware(level) for name, level in levels.items()}
    assert {name: count / 1e12 for name, count in found.items()} == pytest.approx(tera, rel=0.005)


def at_full_size(model, trained):
    """Config, size of the latents, and the formula for a clip."""
    args, made = step.training_args(step.parse_args(["--model", model])), step.random_base_model(model)
    shape = made.latent_shape(args.max_num_frames, args.height, args.width)
    return made.transformer, shape, flops.step_flops(made.transformer, made.num_tokens(*shape), trained)


@pytest.mark.parametrize("model, level, trained", [
    ("2b", "none", lora(rank=128)), ("2b", "full", SFT), ("5b", "attention", lora(rank=128)),
    ("1.5-I2V", "full", lora(rank=128)),
])  # fmt: skip
def test_formula_is_what_the_meta_device_counts_at_full_size(model, level, trained, monkeypatch):
    """All blocks and tokens, nothing computed; attention by the kernel of a GPU, which the counter knows."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda query, key, value, **_: FLASH(query, key, value)[0])
    config, (f, h, w), formula = at_full_size(model, trained)
    f += -f % (config["patch_size_t"] or 1)
    _, _, forward, backward = counted(config, trained, level, (f, h, w), device="meta")
    assert (formula.forward, formula.backward + formula.recomputed[level]) == (forward, backward)


# ---- what GPUs can do, and the command -------------------------------------------------------------------------------


@pytest.mark.parametrize("name, peak", {
    "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H200": 989, "A100-SXM4-80GB": 312,
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb": None, "NVIDIA A10G": None, "CPU, x86_64": None,
}.items())  # fmt: skip
def test_a_peak_is_known_or_not_guessed(name, peak):
    assert flops.peak_tflops(name) == peak


def test_command_prints_the_parts_of_a_step(capsys):
    flops.main(["--model", "5b", "--rank", "64"])
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "5b, lora, 17,776 tokens a clip; TFLOP of its step:"
    printed = [float(line.split()[-1].replace(",", "")) for line in lines]
    formula = at_full_size("5b", lora(rank=64))[2]
    assert printed == pytest.approx([count / 1e12 for count in flops.rows(formula).values()], abs=0.06)
