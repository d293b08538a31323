"""What is trained, and that its file means the same to plain diffusers."""

import json
import math
import shutil

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import transformer_inputs
from diffusers import CogVideoXTransformer3DModel, DiffusionPipeline
from safetensors.torch import load_file, safe_open, save

from cogvideox.base_model import empty_transformer, load_transformer, read_base_model
from cogvideox.lora import Lora, add_lora, check_lora, is_target, with_lora
from cogvideox.lora_files import LORA_FILE
from files import CannotContinue, publish

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
ALL_LINEAR = [*TARGETS, "ff.net.0.proj", "ff.net.2"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lora_weights_are_float32_over_any_base(tiny_checkpoint, dtype):
    transformer = load_transformer(read_base_model(str(tiny_checkpoint)), dtype)
    add_lora(transformer, Lora(4, 8, TARGETS), dtype)
    trained = {name: weight for name, weight in transformer.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 4 * 2  # A and B of four layers in two blocks
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert {w.dtype for name, w in transformer.named_parameters() if name not in trained} == {dtype}


def test_full_size_adapters_have_the_published_number_of_weights():
    for layers, heads, expected in ((30, 30, 58_982_400), (42, 48, 132_120_576)):
        transformer = empty_transformer(
            {"num_layers": layers, "num_attention_heads": heads, "use_rotary_positional_embeddings": heads == 48}
        )
        with torch.device("meta"):
            add_lora(transformer, Lora(128, 128, TARGETS), torch.float32)
        assert sum(weight.numel() for weight in transformer.parameters() if weight.requires_grad) == expected


@pytest.mark.parametrize("targets", [["to_q", "to_typo"], ["norm_q"], ["transformer_blocks"]])
def test_a_target_that_is_no_linear_layer_is_named(tiny_checkpoint, targets):
    checkpoint = read_base_model(str(tiny_checkpoint))
    with pytest.raises(ValueError, match=f"--lora_target_modules {targets[-1]}: .* ff.net.0.proj"):
        check_lora(checkpoint, Lora(4, 4, targets), None)


def test_a_target_that_is_also_a_convolution_is_refused_with_the_name_of_the_layer(checkpoint_of):
    """CogVideoX 1.5 has a linear layer there."""
    checkpoint = read_base_model(str(checkpoint_of("2b")))
    with pytest.raises(ValueError, match="proj: is also patch_embed.proj, a Conv2d.*: ff.net.0.proj$"):
        check_lora(checkpoint, Lora(4, 4, ["to_q", "proj"]), None)
    check_lora(read_base_model(str(checkpoint_of("1.5-5B"))), Lora(4, 4, ["to_q", "proj"]), None)


@pytest.mark.parametrize("target", ["to_q", "to_out.0", "attn1.to_k", "ff.net.2", "proj_out", "linear"])
def test_a_target_means_the_layers_that_peft_takes(tiny_checkpoint, target):
    transformer = empty_transformer(read_base_model(str(tiny_checkpoint)).transformer)
    names = [name for name, _ in transformer.named_modules()]
    with torch.device("meta"):
        add_lora(transformer, Lora(4, 4, [target]), torch.float32)
    taken = {name for name, module in transformer.named_modules() if hasattr(module, "lora_A")}
    assert taken == {name for name in names if is_target(name, target)} != set()


# ---- kinds of LoRA

KINDS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "dropout": {"lora_dropout": 0.3},
    "feed-forward": {"lora_target_modules": ALL_LINEAR},
    **{init: {"init_lora_weights": init} for init in ("gaussian", "orthogonal", "olora", "pissa", "pissa_niter_4")},
    "pissa-rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "pissa-dora": {"init_lora_weights": "pissa", "use_dora": True, "use_rslora": True},
    "dora-feed-forward": {"use_dora": True, "lora_target_modules": ALL_LINEAR, "lora_dropout": 0.1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_lora_means_to_plain_diffusers_what_was_trained(
    tiny_checkpoint, tmp_path, train, monkeypatch, kind
):
    """After training with it: same outputs in a plain pipeline with no flags, and others than without it."""
    trained = {}
    make = with_lora

    def keep(*args, **options):
        trained["transformer"], export = make(*args, **options)
        return trained["transformer"], export

    monkeypatch.setattr("cogvideox.lora.with_lora", keep)
    options = {"rank": 8, "lora_alpha": 4, "max_train_steps": 3, "learning_rate": 1e-2} | KINDS[kind]
    train(tiny_checkpoint, tmp_path / "run", **options)
    pipeline = DiffusionPipeline.from_pretrained(tiny_checkpoint)
    pipeline.load_lora_weights(tmp_path / "run")
    scale = 4 / math.sqrt(8) if "rslora" in kind or "pissa-dora" in kind else 4 / 8
    scales = [module.scaling for module in pipeline.transformer.modules() if hasattr(module, "lora_A")]
    assert all(value == pytest.approx(scale) for scaling in scales for value in scaling.values())
    inputs = transformer_inputs(tiny_checkpoint)
    base = CogVideoXTransformer3DModel.from_pretrained(tiny_checkpoint, subfolder="transformer")
    with torch.no_grad():
        ours, theirs, without = (
            model(**inputs)[0] for model in (trained["transformer"].eval(), pipeline.transformer, base)
        )
    exact = not kind.startswith(("pissa", "olora"))  # those are taken out of the weights and put back, in float32
    assert torch.equal(ours, theirs) if exact else torch.allclose(ours, theirs, atol=2e-5)
    assert not torch.allclose(ours, without, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_before_training_every_kind_is_the_model_that_it_starts_from(tiny_checkpoint, kind, dtype):
    checkpoint = read_base_model(str(tiny_checkpoint))
    options = {"rank": 8, "lora_alpha": 4, "lora_target_modules": TARGETS} | KINDS[kind]
    transformer, _ = with_lora(checkpoint, dtype, Lora(**options), None)
    base = load_transformer(checkpoint, torch.float32)
    with torch.no_grad():
        for name, layer in transformer.named_modules():
            if not hasattr(layer, "lora_A"):
                continue
            frozen, weight = layer.get_base_layer().weight.float(), base.get_submodule(name).weight
            merged = frozen + layer.get_delta_weight("default").float()
            if layer.lora_magnitude_vector:
                magnitude = layer.lora_magnitude_vector["default"].weight
                norm = torch.linalg.vector_norm(merged, dim=1)
                assert torch.allclose(magnitude, norm, rtol=1e-5)
            tolerance = 1e-5 if dtype == torch.float32 else 2**-8 * weight.abs().max().item()
            assert torch.allclose(merged, weight, atol=tolerance), name


def test_what_is_recorded_is_what_an_old_peft_knows(tiny_checkpoint, tmp_path, train):
    """And no lora_dropout, with which diffusers would sample; but a rank_pattern, which diffusers 0.34 to 0.39 read."""
    train(tiny_checkpoint, tmp_path / "run", max_train_steps=1, lora_dropout=0.5)
    with safe_open(tmp_path / "run" / LORA_FILE, framework="pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    fields = {"r", "lora_alpha", "target_modules", "rank_pattern"}
    assert set(settings) == {f"transformer.{field}" for field in fields} and settings["transformer.rank_pattern"] == {}


def test_dropout_drops_and_depends_on_the_seed_alone(tiny_checkpoint, tmp_path, train):
    options = {"max_train_steps": 4, "learning_rate": 1e-2}
    runs = [
        [row["loss"] for row in train(tiny_checkpoint, tmp_path / str(i), lora_dropout=p, **options)]
        for i, p in enumerate((0.0, 0.5, 0.5))
    ]
    assert runs[0] != runs[1] == runs[2]


def test_validation_does_not_drop_out(tiny_checkpoint, tmp_path, train):
    """LoRA weights that do not move give the base model's videos, dropout or not."""
    options = {"max_train_steps": 1, "learning_rate": 1e-30, "validation_prompt": "a cat", "init_lora_weights": "olora"}
    for name, dropout in (("a", 0.0), ("b", 0.9)):
        train(tiny_checkpoint, tmp_path / name, lora_dropout=dropout, **options)
    first, second = (iio.imread(next((tmp_path / name).glob("validation/*/*.mp4"))) for name in ("a", "b"))
    assert np.array_equal(first, second)


# ---- --lora_path


@pytest.mark.parametrize("kind", [{}, {"use_dora": True, "use_rslora": True, "lora_alpha": 2}])
def test_a_run_starts_from_an_existing_lora(tiny_checkpoint, tmp_path, train, kind):
    train(tiny_checkpoint, tmp_path / "a", max_train_steps=3, learning_rate=1e-2, **kind)
    still = {"max_train_steps": 1, "learning_rate": 1e-30}
    train(tiny_checkpoint, tmp_path / "b", lora_path=tmp_path / "a", **still, **kind)
    first, second = (load_file(tmp_path / name / LORA_FILE) for name in ("a", "b"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_file_without_a_strength_starts_at_the_strength_that_diffusers_gives_it(tiny_checkpoint, tmp_path, train):
    """That is 1, whatever alpha was; another one is refused."""
    train(tiny_checkpoint, tmp_path / "a", max_train_steps=3, learning_rate=1e-2, lora_alpha=2)
    bare = tmp_path / "bare" / LORA_FILE
    publish(bare, save(load_file(tmp_path / "a" / LORA_FILE)))
    checkpoint = read_base_model(str(tiny_checkpoint))
    check_lora(checkpoint, Lora(4, 4, TARGETS), bare)
    transformer, _ = with_lora(checkpoint, torch.float32, Lora(4, 4, TARGETS), bare)
    pipeline = DiffusionPipeline.from_pretrained(tiny_checkpoint)
    pipeline.load_lora_weights(bare.parent)
    inputs = transformer_inputs(tiny_checkpoint)
    with torch.no_grad():
        assert torch.equal(transformer.eval()(**inputs)[0], pipeline.transformer(**inputs)[0])
    with pytest.raises(ValueError, match="continue with --rank 4 --lora_alpha 4"):
        check_lora(checkpoint, Lora(4, 2, TARGETS), bare)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa changed the base"),
        ({"rank_pattern": {"to_q": 8}}, "was made with rank_pattern"),
    ],
)
def test_a_lora_that_changes_the_base_or_has_several_ranks_is_refused(tiny_checkpoint, tmp_path, settings, message):
    adapter = {f"transformer.{name}": value for name, value in ({"r": 4, "lora_alpha": 4} | settings).items()}
    layer = "transformer.transformer_blocks.0.attn1.to_q"
    weights = {f"{layer}.lora_A.weight": torch.zeros(8, 64), f"{layer}.lora_B.weight": torch.zeros(64, 8)}
    file = tmp_path / LORA_FILE
    publish(file, save(weights, {"lora_adapter_metadata": json.dumps(adapter)}))
    with pytest.raises(ValueError, match=message):
        check_lora(read_base_model(str(tiny_checkpoint)), Lora(4, 4, TARGETS), file)
    publish(file, save({"lora_unet_to_q.lora_down.weight": torch.zeros(4, 64)}))
    with pytest.raises(ValueError, match="holds lora_unet_to_q.*, which belongs to no LoRA of CogVideoX"):
        check_lora(read_base_model(str(tiny_checkpoint)), Lora(4, 4, TARGETS), file)


def test_a_run_that_resumes_does_not_need_what_it_started_from(tiny_checkpoint, tmp_path, train):
    train(tiny_checkpoint, tmp_path / "a", max_train_steps=3, learning_rate=1e-2)
    options = {"lora_path": tmp_path / "a"}
    straight = train(tiny_checkpoint, tmp_path / "straight", max_train_steps=4, **options)
    train(tiny_checkpoint, tmp_path / "b", max_train_steps=2, **options)
    shutil.rmtree(tmp_path / "a")
    resumed = train(tiny_checkpoint, tmp_path / "b", max_train_steps=4, resume_from_checkpoint="latest", **options)
    assert [row["loss"] for row in resumed] == [row["loss"] for row in straight]


@pytest.mark.parametrize(
    ("trained", "options", "message"),
    [
        ({}, {"rank": 8}, "rank 8, alpha 8.; continue with --rank 4 --lora_alpha 4, and"),
        ({"lora_alpha": 2}, {}, "continue with --rank 4 --lora_alpha 2, and"),
        (
            {"use_dora": True, "use_rslora": True},
            {},
            "continue with --rank 4 --lora_alpha 4 --use_dora --use_rslora, and",
        ),
        ({"init_lora_weights": "pissa"}, {}, "continue with --rank 8 --lora_alpha 8, and"),
        ({}, {"lora_target_modules": ALL_LINEAR}, "--lora_target_modules: it has no .*ff.net.0.proj"),
        ({"lora_target_modules": ALL_LINEAR}, {}, "--lora_target_modules: it has .*ff.net"),
    ],
)
def test_a_lora_that_does_not_fit_the_options_is_refused(tiny_checkpoint, tmp_path, train, trained, options, message):
    train(tiny_checkpoint, tmp_path / "a", max_train_steps=1, **trained)
    lora = {"rank": 4, "lora_target_modules": TARGETS} | options
    with pytest.raises(ValueError, match=message):
        check_lora(read_base_model(str(tiny_checkpoint)), Lora(**{"lora_alpha": lora["rank"]} | lora), tmp_path / "a")


def test_a_lora_of_another_variant_is_refused(checkpoint_of, tmp_path, train, capsys):
    train(checkpoint_of("5b"), tmp_path / "a", max_train_steps=1)
    with pytest.raises(SystemExit):
        train(checkpoint_of("2b"), tmp_path / "b", lora_path=tmp_path / "a")
    assert "trained on another base model (" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train(checkpoint_of("2b"), tmp_path / "b", lora_path=tmp_path)
    assert f"--lora_path {tmp_path}: no {LORA_FILE}; give a run" in capsys.readouterr().err


def test_an_init_that_a_layer_has_too_few_directions_for_is_refused(tiny_checkpoint):
    """Its file could not be loaded: the matrices would have another rank than the file says."""
    checkpoint = read_base_model(str(tiny_checkpoint))
    lora = Lora(32, 32, ["to_q", "proj_out"], init_lora_weights="olora")
    with pytest.raises(ValueError, match="--rank 32: proj_out has only 16 directions for --init_lora_weights olora"):
        check_lora(checkpoint, lora, None)
    check_lora(checkpoint, lora._replace(init_lora_weights="default"), None)


def test_a_rank_stabilised_pissa_goes_on_with_its_rounded_alpha(tiny_checkpoint, tmp_path, train):
    train(tiny_checkpoint, tmp_path / "a", max_train_steps=1, lora_alpha=2, use_rslora=True, init_lora_weights="pissa")
    options = {"rank": 8, "lora_alpha": 2.8284, "use_rslora": True}  # 2 sqrt(2)
    assert train(tiny_checkpoint, tmp_path / "b", max_train_steps=1, lora_path=tmp_path / "a", **options)


# ---- --save_precision


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_the_lora_is_saved_in_the_precision_asked_for_and_trained_in_float32(
    name, dtype, tiny_checkpoint, tmp_path, train
):
    """The values are the rounded ones; a checkpoint's state is as without it, and a resumed run may ask for another."""
    options = {"max_train_steps": 2, "checkpointing_steps": 1}
    plain = train(tiny_checkpoint, tmp_path / "a", **options)
    rows = train(tiny_checkpoint, tmp_path / "b", save_precision=name, **options)
    assert [row["loss"] for row in rows] == [row["loss"] for row in plain]
    expected, saved = (load_file(tmp_path / run / LORA_FILE) for run in "ab")
    assert {weight.dtype for weight in saved.values()} == {dtype}
    assert all(torch.equal(saved[key], weight.to(dtype)) for key, weight in expected.items())
    shutil.rmtree(tmp_path / "b" / "checkpoint-2")
    train(tiny_checkpoint, tmp_path / "b", resume_from_checkpoint="latest", **options)
    resumed = load_file(tmp_path / "b" / LORA_FILE)
    assert all(torch.equal(resumed[key], weight) for key, weight in expected.items())


def test_a_whole_transformer_is_saved_in_the_precision_asked_for(tiny_checkpoint, tmp_path, train):
    train(tiny_checkpoint, tmp_path / "run", training_type="sft", max_train_steps=1, save_precision="fp16")
    (file,) = (tmp_path / "run" / "transformer").glob("*.safetensors")
    assert {weight.dtype for weight in load_file(file).values()} == {torch.float16}


def test_a_weight_that_float16_cannot_hold_is_refused(tiny_checkpoint, tmp_path):
    base = read_base_model(str(tiny_checkpoint))
    transformer, export = with_lora(base, torch.float32, Lora(4, 4, TARGETS), save_dtype=torch.float16)
    weights = {name: weight.data for name, weight in transformer.named_parameters() if weight.requires_grad}
    next(iter(weights.values()))[0] = 1e5
    with pytest.raises(CannotContinue, match="--save_precision fp16: a weight is above 65,504; pass bf16"):
        export(weights, tmp_path)
    assert not list(tmp_path.iterdir())
