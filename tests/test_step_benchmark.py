"""benchmarks/step.py on a CPU, and the checks that tests/test_gpu.py repeats on a GPU."""

import json
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import step
import torch
from conftest import training_options
from safetensors.torch import load_file

import train_cogvideox_lora
from clips.order import Ranks
from clips.video import Video
from cogvideox import compute
from cogvideox.base_model import read_base_model
from cogvideox.lora_files import LORA_FILE
from cogvideox.objective import generator_for, training_loss
from run.run_directory import read_metrics

# ---- checks for any device -------------------------------------------------------------------------------------------


def trained(run):
    return {name: weight for name, weight in run.state.transformer.named_parameters() if weight.requires_grad}


def check_steps(*argv, steps=4, folder=None):
    """Losses stay finite, what is trained stays float32 over a base in the compute dtype, and all of it moves."""
    options = step.parse_args([*argv, "--warmup", "0", "--steps", str(steps)])
    run = step.prepare(options, folder)
    before = {name: weight.detach().clone() for name, weight in trained(run).items()}

    losses = step.measure(run, warmup=options.warmup, steps=options.steps).losses

    assert all(map(math.isfinite, losses))
    after = trained(run)
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    assert {weight.dtype for weight in run.state.transformer.parameters() if not weight.requires_grad} <= {run.dtype}
    assert all(weight.isfinite().all() for weight in after.values())
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def loss_and_gradients(run):
    """Of the first micro-batch, and how often a block was called for it."""
    block, calls, weights = run.state.transformer.transformer_blocks[0], [], trained(run)
    counter = block.register_forward_pre_hook(lambda *_: calls.append(1))
    with run.image_encoder() as encode_images:
        number, batch, _ = next(run.micro_batches())
        generator = generator_for(run.accelerator.device, run.args.seed, number)
        loss = training_loss(run.base, run.state.transformer, batch, generator, run.dtype, encode_images)
        run.accelerator.backward(loss)
    counter.remove()
    gradients = {name: weight.grad.clone() for name, weight in weights.items()}
    for weight in weights.values():
        weight.grad = None
    return loss.item(), gradients, len(calls)


def check_same_step(*argv, tolerance, calls=1, level="none", device=None, **options):
    """Loss and gradients are those of the plain step, up to `tolerance` times their size, after `compute.prepare`."""
    run = step.prepare(step.parse_args(argv))
    for name, weight in trained(run).items():
        if "lora_B" in name:  # zero at the start, and with them the gradients of lora_A
            torch.nn.init.normal_(weight, std=0.02)
    plain_loss, plain_gradients, plain_calls = loss_and_gradients(run)
    compute.prepare(run.state.transformer, level, compute.Options(**options), device)
    loss, gradients, changed_calls = loss_and_gradients(run)

    assert (plain_calls, changed_calls) == (1, calls)
    assert loss == pytest.approx(plain_loss, rel=tolerance)
    for name, gradient in plain_gradients.items():
        assert gradient.norm() > 0, name
        assert (gradients[name] - gradient).norm() <= tolerance * gradient.norm(), name


def check_training_script(monkeypatch, checkpoint, folder, **options):
    """The whole script on two clips that are never decoded: writing mp4 files needs an ffmpeg that may not be there."""
    clips = folder / "clips"
    clips.mkdir()
    (clips / "prompts.txt").write_text("a red circle\na blue square\n")
    (clips / "videos.txt").write_text("red.mp4\nblue.mp4\n")
    for name in ("red", "blue"):
        (clips / f"{name}.mp4").write_text(name)
    frames = torch.randint(0, 256, (9, 64, 96, 3), dtype=torch.uint8)
    video = Video(96, 64, 0, Fraction(1, 8), is_numbered=False, remarks=(), damage=())
    monkeypatch.setattr("clips.known.examine_video", lambda path: (video, np.arange(9)))
    monkeypatch.setattr("clips.frames.read_frames", lambda video, view, **options: frames)

    line = training_options(checkpoint, clips, folder / "run", max_train_steps=3, **options)
    train_cogvideox_lora.main(train_cogvideox_lora.parse_args(line))

    rows = read_metrics(folder / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows)
    weights = load_file(folder / "run" / LORA_FILE)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert all(weight.isfinite().all() and weight.any() for weight in weights.values())


# ---- on a CPU --------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch):
    """Where there is one, tests/test_gpu.py uses it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("model", ["tiny", "tiny-I2V"])
@pytest.mark.parametrize("training_type", ["lora", "sft"])
def test_what_is_trained_stays_float32_and_all_of_it_moves(tmp_path, precision, model, training_type):
    options = ["--mixed_precision", precision, "--training_type", training_type]
    options += ["--rank", "4"] if training_type == "lora" else []
    check_steps("--model", model, *options, folder=tmp_path)


@pytest.mark.parametrize("level", ["attention", "full"])
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(level):
    check_same_step("--model", "tiny", "--rank", "4", tolerance=1e-6, calls=2, level=level)


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_the_base_can_be_quantised(precision, capsys):
    argv = ["--model", "tiny", "--rank", "4", "--base_precision", precision]
    check_steps(*argv)
    step.main([*argv, "--steps", "1", "--warmup", "0"])
    assert json.loads(capsys.readouterr().out)["options"]["base_precision"] == precision


def test_training_script_in_bf16(monkeypatch, tiny_checkpoint, tmp_path):
    check_training_script(monkeypatch, tiny_checkpoint, tmp_path, mixed_precision="bf16")


@pytest.mark.parametrize("switch", [[], ["--gradient_checkpointing"]])
def test_prints_json_and_writes_the_same(switch, tmp_path, capsys):
    file = tmp_path / "results" / "tiny.json"
    step.main(["--model", "tiny", "--steps", "2", "--warmup", "1", "--rank", "4", "--output", str(file), *switch])
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(file.read_text())
    assert len(result["losses"]) == len(result["seconds_of_each_step"]) == 2
    assert all(map(math.isfinite, result["losses"]))
    assert result["seconds_per_step"] > 0 and result["peak_memory_gib"] > 0
    assert result["model_flops"] > 0 and result["mfu"] is None  # the peak of a CPU is not known
    assert result["options"]["gradient_checkpointing"] == ("full" if switch else "none")
    assert result["trainable_weights"] == 2 * 4 * 2 * 4 * 64  # layers, targets, A and B, rank, width


def test_measuring_ends_after_its_seconds_but_not_before_two_updates(tmp_path):
    line, file = ["--model", "tiny", "--rank", "4", "--warmup", "1", "--profile", "1"], tmp_path / "tiny.json"
    step.main([*line, "--steps", "5", "--max_seconds", "0", "--output", str(file)])
    result = json.loads(file.read_text())
    assert len(result["losses"]) == len(result["seconds_of_each_step"]) == result["options"]["steps"] == 2
    assert result["kernels"]


def on_a_gpu_of(monkeypatch, gib):
    properties = SimpleNamespace(total_memory=int(gib * 2**30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def test_what_does_not_fit_into_the_gpu_is_refused_and_recorded_as_that(monkeypatch, tmp_path, capsys):
    on_a_gpu_of(monkeypatch, 23.6)
    file = tmp_path / "2b.json"
    with pytest.raises(SystemExit) as end:
        step.main(["--model", "2b", "--output", str(file)])
    assert end.value.code == 2
    assert "a step needs 30.3 GiB, as predicted, and this GPU has 23.6" in capsys.readouterr().err
    assert json.loads(file.read_text()) == {"does_not_fit": {"predicted_peak_gib": 30.294, "gpu_gib": 23.6}}


def test_only_what_does_not_fit_by_itself_is_refused(monkeypatch):
    on_a_gpu_of(monkeypatch, 23.6)
    none, full = (step.parse_args(["--model", "2b", *words]) for words in ([], ["--gradient_checkpointing"]))
    assert step.without_room(none) and not step.without_room(full)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not step.without_room(none)  # two processes may share the weights out


def test_a_profile_tells_what_takes_the_time_of_an_update(capsys):
    step.main(["--model", "tiny", "--steps", "1", "--warmup", "1", "--rank", "4", "--profile", "2"])
    result = json.loads(capsys.readouterr().out)
    calls = {row["kernel"]: row["calls"] for row in result["kernels"]}
    assert calls["aten::_scaled_dot_product_flash_attention_for_cpu"] == 2  # layers
    assert len(result["losses"]) == 1  # profiled updates are not timed
    times = [row["milliseconds"] for row in result["kernels"]]
    assert times == sorted(times, reverse=True) and times[-1] > 0


def test_an_update_counts_all_its_tokens(capsys):
    step.main(["--model", "tiny", "--steps", "1", "--warmup", "0", "--rank", "4", "--train_batch_size", "2",
               "--gradient_accumulation_steps", "3"])  # fmt: skip
    result = json.loads(capsys.readouterr().out)
    tokens = result["tokens_per_second"] * result["seconds_per_step"]
    assert tokens == pytest.approx(6 * result["tokens"], rel=0.01)


@pytest.mark.parametrize("name, peak", {
    "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H200": 989, "A100-SXM4-80GB": 312,
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb": None, "NVIDIA A10G": None, "CPU, x86_64": None,
}.items())  # fmt: skip
def test_a_peak_is_known_or_not_guessed(name, peak):
    assert step.peak_tflops(name) == peak


@pytest.mark.parametrize("precision, name, known", [
    ("bf16", "NVIDIA L4", True), ("no", "NVIDIA L4", False), ("bf16", "CPU, x86_64", False),
])  # fmt: skip
def test_mfu_is_the_share_of_the_peak_of_one_gpu(precision, name, known):
    line = ["--model", "tiny", "--rank", "4", "--gradient_checkpointing", "--train_batch_size", "2"]
    line += ["--gradient_accumulation_steps", "3", "--mixed_precision", precision]
    run = step.prepare(step.parse_args(line))
    found = step.rehearsed(run._replace(ranks=Ranks(0, 8)), name, seconds=1e-4)
    assert found["hardware_flops"] > found["model_flops"] > 0
    if known:
        assert found["peak_tflops"] == 121
        assert found["mfu"] == pytest.approx(found["model_flops"] / 121e12 / 1e-4, abs=1e-4)
        assert found["hfu"] == pytest.approx(found["hardware_flops"] / 121e12 / 1e-4, abs=1e-4)
    else:
        assert found["peak_tflops"] is found["mfu"] is found["hfu"] is None


@pytest.mark.parametrize("model, tokens", {"2b": 17776, "5b-I2V": 17776, "1.5-I2V": 45106, "tiny": 298}.items())
def test_tokens_of_a_clip_of_the_models_own_size(model, tokens):
    args = step.training_args(step.parse_args(["--model", model]))
    shape = (32, (args.max_num_frames - 1) // 4 + 1, args.height // 8, args.width // 8)
    assert step.random_base_model(model).num_tokens(*shape[1:]) == tokens


def test_tiny_is_what_a_tiny_checkpoint_on_disk_is(tiny_checkpoint):
    written = read_base_model(tiny_checkpoint)
    assert public(step.random_base_model("tiny").transformer) == public(written.transformer)


@pytest.mark.parametrize("model, variant", [
    ("tiny", "2b"), ("2b", "2b"), ("5b", "5b"), ("5b-I2V", "5b-I2V"), ("1.5", "1.5-5B"), ("1.5-I2V", "1.5-5B-I2V"),
    ("tiny-I2V", "5b-I2V"),
])  # fmt: skip
def test_models_differ_as_the_example_checkpoints_do(model, variant, checkpoint_of):
    written, made = read_base_model(checkpoint_of(variant)), step.random_base_model(model)
    for name in ("use_rotary_positional_embeddings", "patch_size", "patch_size_t", "use_learned_positional_embeddings"):
        assert made.transformer[name] == written.transformer[name], name
    assert bool(made.transformer["ofs_embed_dim"]) == bool(written.transformer["ofs_embed_dim"])
    assert made.takes_image == written.takes_image
    assert made.vae.get("invert_scale_latents", False) == written.vae["invert_scale_latents"]
    assert made.scheduler.__class__ is written.scheduler.__class__
    assert public(made.scheduler.config) == public(written.scheduler.config)
    assert made.vae["scaling_factor"] == written.vae["scaling_factor"]
    assert made.spatial_factor == written.spatial_factor


def public(config):
    return {name: value for name, value in config.items() if not name.startswith("_")}


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--steps", "0"], "argument --steps: 0: must be a whole number of at least 1"),
        (["--num_frames", "10"], "--max_num_frames 10: must be 4k + 1"),
        (["--model", "1.5", "--mixed_precision", "fp16"], "CogVideoX 1.5 gives NaN in float16"),
    ],
)
def test_refuses_what_cannot_work(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        step.main(argv)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
