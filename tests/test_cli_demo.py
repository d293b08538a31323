"""cli_demo.py from options to mp4 on tiny checkpoints: what it makes, at which LoRA strength, what it refuses."""

import json
import os
import shutil

import accelerate
import imageio
import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from make_example import draw_clip
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, safe_open, save_file

import cli_demo
from cogvideox.sampling import encode_mp4

RECORDED = (
    "num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "patch_size_t",
    "use_rotary_positional_embeddings", "use_learned_positional_embeddings",
)  # fmt: skip


def make_lora(checkpoint, folder, rank=4, alpha=2, times=1.0, recorded=True, **config):
    """A LoRA whose weights are far from zero, its `lora_B` multiplied by `times`, as the trainer writes it."""
    transformer = CogVideoXTransformer3DModel.from_pretrained(checkpoint, subfolder="transformer")
    config = {"r": rank, "lora_alpha": alpha, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]} | config
    torch.manual_seed(1)
    transformer.add_adapter(LoraConfig(**config))
    weights = {f"transformer.{name}": weight for name, weight in get_peft_model_state_dict(transformer).items()}
    for name in weights:
        if "lora_B" in name:
            weights[name] = torch.randn_like(weights[name]) * times
    metadata = {
        "lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()}),
        "cogvideox_transformer": json.dumps({key: transformer.config[key] for key in RECORDED}),
        "base_model": str(checkpoint),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "pytorch_lora_weights.safetensors", metadata if recorded else {"format": "pt"})
    return folder


def tune(checkpoint, folder, **config):
    """A run directory with a transformer whose weights all differ from the checkpoint's, as the trainer writes it."""
    transformer = CogVideoXTransformer3DModel.from_pretrained(checkpoint, subfolder="transformer")
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in transformer.parameters():
            weight += 0.1 * torch.randn_like(weight)
    transformer.save_pretrained(folder / "transformer", **config)
    return folder


def parse(*options):
    return cli_demo.parse_args(["--prompt", "a red circle", "--num_inference_steps", "2", *map(str, options)])


def make_video(output, *options):
    """Frames [F, H, W, 3] and frames per second of the mp4 that `options` make."""
    cli_demo.main(parse("--output_path", output, *options))
    return read_video(output)


def read_video(path):
    with imageio.get_reader(path) as reader:
        return np.stack([frame for frame in reader]), reader.get_meta_data()["fps"]


def load(*options):
    args = parse(*options)
    return cli_demo.load_pipeline(cli_demo.make_request(args), args)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def lora(tiny_checkpoint, tmp_path):
    return make_lora(tiny_checkpoint, tmp_path / "run")


@pytest.fixture
def tuned(tiny_checkpoint, tmp_path):
    return tune(tiny_checkpoint, tmp_path / "sft")


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.mp4"
    imageio.mimsave(path, draw_clip("circle", "red", "right", 32, 96, 128), fps=24, macro_block_size=1)
    return path


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    imageio.imwrite(path, draw_clip("circle", "red", "right", 1, 96, 128)[0])
    return path


@pytest.fixture
def transformer_inputs():
    return {
        "hidden_states": torch.randn(1, 3, 4, 8, 12),
        "encoder_hidden_states": torch.randn(1, 226, 32),
        "timestep": torch.tensor([500]),
    }


@torch.no_grad()
def run(transformer, inputs):
    return transformer(**inputs).sample


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test where a pipeline is loaded."""
    monkeypatch.setattr(cli_demo, "load_pipeline", lambda *_: pytest.fail("weights were loaded"))


@pytest.mark.parametrize("variant, fps", [("2b", 8), ("5b", 8), ("1.5-5B", 16)])
def test_sizes_frames_and_fps_default_to_the_checkpoint(variant, fps, checkpoint_of, tmp_path):
    frames, rate = make_video(tmp_path / "new" / "out.mp4", "--model_path", checkpoint_of(variant))
    assert (frames.shape, rate) == ((9, 64, 96, 3), fps)
    assert frames.std() > 1
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.mp4"]


def test_sizes_frames_and_fps_can_be_asked_for(tiny_checkpoint, tmp_path, capsys):
    options = ["--height", 80, "--width", 64, "--num_frames", 13, "--fps", 10, "--enable_slicing"]
    frames, rate = make_video(tmp_path / "out.mp4", "--model_path", tiny_checkpoint, *options)
    assert "--num_frames 13: the VAE decodes to 16" in capsys.readouterr().out
    assert (frames.shape, rate) == ((16, 80, 64, 3), 10)


def test_a_video_in_tiles_has_the_size_asked_for(tiny_checkpoint, tmp_path):
    options = ["--model_path", tiny_checkpoint, "--height", 256, "--width", 64, "--num_frames", 1]
    tiled, _ = make_video(tmp_path / "tiled.mp4", *options)
    whole, _ = make_video(tmp_path / "whole.mp4", *options, "--no-enable_tiling")
    assert tiled.shape == whole.shape == (1, 256, 64, 3)
    assert 0 < np.abs(tiled.astype(int) - whole).mean() < 5


def test_the_published_size_of_1_5_is_768_x_1360_although_its_positions_go_further(checkpoint_of, tmp_path):
    checkpoint = shutil.copytree(checkpoint_of("1.5-5B"), tmp_path / "checkpoint")
    edit_json(checkpoint / "transformer" / "config.json", sample_height=300, sample_width=300)
    request = cli_demo.make_request(parse("--model_path", checkpoint, "--output_path", tmp_path / "out.mp4"))
    assert (request.inputs["height"], request.inputs["width"]) == (768, 1360)


@pytest.mark.parametrize("variant", ["2b", "5b"])
def test_scheduler_is_the_checkpoints_own_and_trailing(variant, checkpoint_of, tmp_path):
    checkpoint = shutil.copytree(checkpoint_of(variant), tmp_path / "checkpoint")
    config = checkpoint / "scheduler" / "scheduler_config.json"
    edit_json(config, timestep_spacing="leading")
    scheduler = load("--model_path", checkpoint, "--output_path", tmp_path / "out.mp4").scheduler
    expected = json.loads(config.read_text())
    assert (type(scheduler).__name__, scheduler.config.timestep_spacing) == (expected["_class_name"], "trailing")
    assert scheduler.config.snr_shift_scale == expected["snr_shift_scale"]


@pytest.mark.parametrize("kind, variant, num_frames", [
    ("t2v", "2b", 9), ("i2v", "5b-I2V", 9), ("i2v", "1.5-5B-I2V", 9), ("v2v", "2b", 9), ("v2v", "1.5-5B", 8),
])  # fmt: skip
def test_every_generate_type_writes_a_video(kind, variant, num_frames, checkpoint_of, image, clip, tmp_path):
    source = {"t2v": [], "i2v": ["--image_or_video_path", image], "v2v": ["--image_or_video_path", clip]}[kind]
    options = ["--model_path", checkpoint_of(variant), "--generate_type", kind, *source]
    frames, _ = make_video(tmp_path / "out.mp4", *options)
    assert frames.shape == (num_frames, 64, 96, 3)


@pytest.mark.parametrize("variant", ["5b-I2V", "1.5-5B-I2V"])
def test_an_image_to_video_checkpoint_takes_the_image_unasked(variant, checkpoint_of, image, tmp_path):
    other = tmp_path / "other.png"
    imageio.imwrite(other, draw_clip("square", "blue", "left", 1, 96, 128)[0])
    options = ["--model_path", checkpoint_of(variant), "--image_or_video_path"]
    unasked, asked, of_other = (
        make_video(tmp_path / "out.mp4", *options, *rest)[0]
        for rest in ([image], [image, "--generate_type", "i2v"], [other])
    )
    assert np.array_equal(unasked, asked)
    assert not np.array_equal(unasked, of_other)


def red_centre(frame):
    """Where the red circle is, from 0 to 1 down and to the right."""
    red = frame[..., 0].astype(int) - frame[..., 1] > 80
    return [axis.mean() / size for axis, size in zip(np.nonzero(red), red.shape, strict=True)]


def test_v2v_takes_the_video_by_time_and_crops_it(clip):
    frames = cli_demo.read_source(clip, "v2v", num_frames=5, fps=6, width_height=(96, 64))["video"]
    reference, _ = read_video(clip)  # 24 fps, 96 x 128, of which 3:2 leaves 85 rows
    assert [frame.size for frame in frames] == [(96, 64)] * 5
    where = [red_centre(np.array(frame)) for frame in frames]
    expected = [red_centre(reference[4 * i, 5:91]) for i in range(5)]
    assert np.allclose(where, expected, atol=0.02)
    assert where[-1][1] - where[0][1] > 0.2


def test_each_of_several_videos_is_that_of_its_own_seed(tiny_checkpoint, tmp_path):
    options = ["--model_path", tiny_checkpoint]
    make_video(tmp_path / "out.mp4", *options, "--num_videos_per_prompt", 2, "--seed", 5)
    for name, seed in (("out.mp4", 5), ("out-1.mp4", 6)):
        alone, _ = make_video(tmp_path / "alone.mp4", *options, "--seed", seed)
        assert np.array_equal(read_video(tmp_path / name)[0], alone)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("settings, trained, told", [
    ({"rank": 4, "alpha": 2}, 0.5, "rank 4, trained strength alpha/rank = 0.5"),
    ({"rank": 4, "alpha": 4, "use_rslora": True}, 2.0, "rank 4, trained strength alpha/sqrt(rank) = 2"),
    ({"rank": 9, "alpha": 6, "use_rslora": True}, 2.0, "rank 9, trained strength alpha/sqrt(rank) = 2"),
    ({"rank": 4, "alpha": 2, "recorded": False}, 1.0, "rank 4, no strength recorded: taken as 1"),
])  # fmt: skip
def test_lora_applies_at_its_trained_strength_times_lora_scale(
    settings, trained, told, scale, tiny_checkpoint, tmp_path, capsys
):
    folder = make_lora(tiny_checkpoint, tmp_path / "run", **settings)
    options = ["--model_path", tiny_checkpoint, "--lora_path", folder, "--lora_scale", scale]
    pipe = load(*options, "--output_path", tmp_path / "out.mp4")
    applied = {module.scaling["lora"] for module in pipe.transformer.modules() if isinstance(module, BaseTunerLayer)}
    assert applied == {trained * scale}
    line = f"{told}, --lora_scale {scale:g} -> applied at {trained * scale:g}"
    assert f"LoRA {folder}/pytorch_lora_weights.safetensors: {line}\n" in capsys.readouterr().out


def test_lora_scale_is_seen_in_the_video(tiny_checkpoint, lora, tmp_path):
    base = ["--model_path", tiny_checkpoint]
    without, at_0, at_1, at_4, doubled = (
        make_video(tmp_path / "out.mp4", *base, *options)[0]
        for options in (
            [],
            ["--lora_path", lora, "--lora_scale", 0],
            ["--lora_path", lora],
            ["--lora_path", lora, "--lora_scale", 4],
            ["--lora_path", make_lora(tiny_checkpoint, tmp_path / "doubled", times=2, recorded=False)],
        )
    )
    assert np.array_equal(at_0, without)
    assert not np.array_equal(at_1, without)
    assert not np.array_equal(at_4, at_1)
    assert np.array_equal(at_4, doubled)  # alpha/rank 0.5 times 4 is what weights of twice the size do at 1


def scaled(folder, other, factor, name="lora_B"):
    """A copy of a LoRA whose `lora_B` are multiplied."""
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    shutil.copytree(folder, other)
    with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = file.metadata()
    weights = {key: weight * factor if name in key else weight for key, weight in weights.items()}
    save_file(weights, other / "pytorch_lora_weights.safetensors", metadata)
    return other


def test_several_loras_apply_together_each_at_its_scale(tiny_checkpoint, lora, tmp_path, transformer_inputs, capsys):
    """One LoRA twice at 0.25 and 0.75 is the LoRA at 1; on other layers, or of another rank, they add up, too."""
    base = ["--model_path", tiny_checkpoint, "--output_path", tmp_path / "out.mp4"]
    other = make_lora(tiny_checkpoint, tmp_path / "other", rank=3, target_modules=["ff.net.2"])
    straight, twice, both, halves = (
        run(load(*base, *options).transformer, transformer_inputs)
        for options in (
            ["--lora_path", lora],
            ["--lora_path", lora, lora, "--lora_scale", 0.25, 0.75],
            ["--lora_path", lora, other, "--lora_scale", 0.5],
            ["--lora_path", scaled(lora, tmp_path / "a", 0.5), scaled(other, tmp_path / "b", 0.5)],
        )
    )
    assert torch.allclose(twice, straight, atol=1e-5)
    assert torch.allclose(both, halves, atol=1e-5) and not torch.allclose(both, straight, atol=1e-2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" -> ")[1] for line in lines if line.startswith("LoRA")][1:4] == [
        "applied at 0.125", "applied at 0.375", "applied at 0.25"
    ]  # fmt: skip


def test_compare_shows_the_base_on_the_left_and_the_lora_on_the_right(tiny_checkpoint, lora, tmp_path, monkeypatch):
    """Also in the second of two videos: the LoRA is switched on again."""
    made = []
    encode = cli_demo.encode_mp4
    monkeypatch.setattr(
        cli_demo, "encode_mp4", lambda frames, fps: made.append(np.stack(frames)) or encode(frames, fps)
    )
    base, of_lora = ["--model_path", tiny_checkpoint], ["--lora_path", lora, "--lora_scale", 2]
    two = ["--num_videos_per_prompt", 2]
    for options in (two, [*of_lora, *two], [*of_lora, *two, "--compare"]):
        shown, _ = make_video(tmp_path / "out.mp4", *base, *options)
    assert shown.shape == (9, 64, 192, 3)
    for number in (0, 1):
        without, with_lora, compared = made[number::2]
        assert np.array_equal(compared, np.concatenate([without, with_lora], axis=2))
        assert not np.array_equal(without, with_lora)


KINDS_OF_LORA = {
    "DoRA": {"use_dora": True},
    "DoRA at rsLoRA's strength": {"use_dora": True, "use_rslora": True},
    "with dropout": {"lora_dropout": 0.5},
    "DoRA on a convolution": {"use_dora": True, "target_modules": ["patch_embed.proj"]},
    "with biases": {"lora_bias": True},
}


@pytest.mark.parametrize("settings", KINDS_OF_LORA.values(), ids=KINDS_OF_LORA)
def test_a_lora_of_any_kind_does_what_it_did_in_training(settings, tiny_checkpoint, tmp_path, transformer_inputs):
    folder = make_lora(tiny_checkpoint, tmp_path / "run", **settings)
    trained = CogVideoXTransformer3DModel.from_pretrained(tiny_checkpoint, subfolder="transformer")
    without = run(trained, transformer_inputs)
    config = {"r": 4, "lora_alpha": 2, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]} | settings
    trained.add_adapter(LoraConfig(**config))
    weights = load_file(folder / "pytorch_lora_weights.safetensors")
    weights = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    assert any("lora_magnitude_vector" in name for name in weights) == settings.get("use_dora", False)
    assert not set_peft_model_state_dict(trained, weights).unexpected_keys
    pipe = load("--lora_path", folder, "--output_path", tmp_path / "out.mp4")
    expected = run(trained.eval(), transformer_inputs)
    assert not torch.equal(expected, without)
    assert torch.equal(run(pipe.transformer, transformer_inputs), expected)


def test_a_magnitude_vector_of_another_size_is_refused(tiny_checkpoint, tmp_path, no_weights, capsys):
    file = make_lora(tiny_checkpoint, tmp_path / "run", use_dora=True) / "pytorch_lora_weights.safetensors"
    weights, name = load_file(file), "transformer.transformer_blocks.0.attn1.to_q.lora_magnitude_vector"
    weights[name] = weights[name][None]  # [1, out], as some write it
    save_file(weights, file)
    cli_demo.make_request(
        parse("--model_path", tiny_checkpoint, "--lora_path", file, "--output_path", tmp_path / "a.mp4")
    )
    weights[name] = torch.ones(63)
    save_file(weights, file)
    message = refusal(parse("--model_path", tiny_checkpoint, "--lora_path", file), capsys)
    assert f"{name} [63], here [64, 64]. Give the one" in message


def test_the_magnitudes_of_a_dora_stay_at_any_scale(tiny_checkpoint, tmp_path, capsys):
    folder = make_lora(tiny_checkpoint, tmp_path / "run", use_dora=True)
    load("--lora_path", folder, "--lora_scale", 0.5, "--output_path", tmp_path / "out.mp4")
    told = "alpha/rank = 0.5, --lora_scale 0.5 -> applied at 0.25; the magnitudes of its DoRA as trained\n"
    assert told in capsys.readouterr().out


def test_a_dora_is_not_offloaded_by_layer(tiny_checkpoint, tmp_path, no_weights, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    folder = make_lora(tiny_checkpoint, tmp_path / "run", use_dora=True)
    message = refusal(parse("--lora_path", folder, "--cpu_offload", "sequential"), capsys)
    assert "--cpu_offload sequential: takes layers apart that a DoRA needs whole" in message


def test_lora_keeps_its_strength_when_layers_are_offloaded(tiny_checkpoint, lora, tmp_path, transformer_inputs):
    options = ["--model_path", tiny_checkpoint, "--lora_path", lora, "--lora_scale", 3]
    pipe = load(*options, "--output_path", tmp_path / "a.mp4")
    straight = run(pipe.transformer, transformer_inputs)
    accelerate.cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))  # what `sequential` does
    offloaded = run(pipe.transformer, transformer_inputs)
    assert torch.equal(straight, offloaded)
    assert pipe.transformer.transformer_blocks[0].attn1.to_q.scaling == {"lora": 1.5}


def test_lora_runs_in_the_dtype_of_the_checkpoint(tiny_checkpoint, lora, tmp_path):
    options = ["--lora_path", lora, "--dtype", "bfloat16", "--output_path", tmp_path / "out.mp4"]
    pipe = load("--model_path", tiny_checkpoint, *options)
    assert {weight.dtype for weight in pipe.transformer.parameters()} == {torch.bfloat16}
    cli_demo.main(parse("--model_path", tiny_checkpoint, *options))


def test_lora_alone_brings_its_checkpoint(lora, tiny_checkpoint, tmp_path):
    file = lora / "pytorch_lora_weights.safetensors"
    alone, _ = make_video(tmp_path / "alone.mp4", "--lora_path", file)
    named, _ = make_video(tmp_path / "named.mp4", "--lora_path", lora, "--model_path", tiny_checkpoint)
    assert np.array_equal(alone, named)


def test_a_tuned_transformer_makes_the_video_of_a_pipeline_with_it_in_its_place(tiny_checkpoint, tuned, tmp_path):
    by_hand = CogVideoXPipeline.from_pretrained(tiny_checkpoint)
    weights = load_file(tuned / "transformer" / "diffusion_pytorch_model.safetensors")
    by_hand.transformer.load_state_dict(weights)
    frames = by_hand(
        "a red circle", height=64, width=96, num_frames=9, num_inference_steps=2,
        generator=torch.Generator().manual_seed(42),
    ).frames[0]  # fmt: skip
    cli_demo.publish(tmp_path / "by-hand.mp4", encode_mp4(frames, fps=8))
    options = ["--model_path", tiny_checkpoint]
    base, _ = make_video(tmp_path / "base.mp4", *options)
    for folder in (tuned, tuned / "transformer"):
        made, _ = make_video(tmp_path / "made.mp4", *options, "--transformer_path", folder)
        assert np.array_equal(made, read_video(tmp_path / "by-hand.mp4")[0])
        assert not np.array_equal(made, base)


def test_a_tuned_transformer_brings_its_checkpoint_and_needs_no_other_transformers_weights(
    tiny_checkpoint, tmp_path, capsys
):
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    one, several = tune(checkpoint, tmp_path / "one"), tune(checkpoint, tmp_path / "n", max_shard_size="100KB")
    assert len(list((several / "transformer").glob("diffusion_pytorch_model-*-of-*.safetensors"))) > 1
    (checkpoint / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    options = ["--dtype", "bfloat16", "--output_path", tmp_path / "out.mp4"]
    pipes = [load("--transformer_path", folder, *options) for folder in (one, several)]
    assert f"--model_path: not given; {checkpoint}, which the transformer was fine-tuned" in capsys.readouterr().out
    states = [pipe.transformer.state_dict() for pipe in pipes]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(weight, states[1][name]) for name, weight in states[0].items())
    assert {weight.dtype for weight in states[0].values()} == {torch.bfloat16}


@pytest.mark.parametrize("variant", ["5b-I2V", "1.5-5B-I2V"])
def test_a_tuned_transformer_of_an_image_model_starts_from_the_image(variant, checkpoint_of, image, tmp_path):
    folder = tune(checkpoint_of(variant), tmp_path / "run")
    frames, _ = make_video(tmp_path / "out.mp4", "--transformer_path", folder, "--image_or_video_path", image)
    assert frames.shape == (9, 64, 96, 3)


def test_sizes_and_frames_are_those_of_the_tuned_transformer(checkpoint_of, tmp_path):
    folder = tune(checkpoint_of("5b"), tmp_path / "run")
    edit_json(folder / "transformer" / "config.json", sample_height=10, sample_frames=17)
    request = cli_demo.make_request(parse("--transformer_path", folder, "--output_path", tmp_path / "out.mp4"))
    assert request.inputs == {"height": 80, "width": 96, "num_frames": 17}


def put_in_the_hubs_cache(folder, name, tmp_path, monkeypatch, below="."):
    snapshot = tmp_path / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot / below)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_a_base_model_in_the_hubs_cache_is_loaded_from_there_where_the_hub_cannot_be_reached(
    tiny_checkpoint, tmp_path, monkeypatch
):
    put_in_the_hubs_cache(tiny_checkpoint, "someone/tiny", tmp_path, monkeypatch)
    monkeypatch.setattr("cogvideox.base_model.reaches_hub", lambda: False)
    from_pretrained, asked = CogVideoXPipeline.from_pretrained, []
    monkeypatch.setattr(
        CogVideoXPipeline, "from_pretrained", lambda *name, **how: asked.append(how) or from_pretrained(*name, **how)
    )
    load("--model_path", "someone/tiny", "--output_path", tmp_path / "out.mp4")
    assert [how["local_files_only"] for how in asked] == [True]


@pytest.mark.parametrize("below", ["transformer", "."])
def test_a_tuned_transformer_may_be_on_the_hub(below, tiny_checkpoint, tuned, tmp_path, monkeypatch):
    put_in_the_hubs_cache(tuned / "transformer", "someone/tuned", tmp_path, monkeypatch, below)
    pipe = load("--transformer_path", "someone/tuned", "--output_path", tmp_path / "out.mp4")
    weights = load_file(tuned / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weights[name], weight) for name, weight in pipe.transformer.named_parameters())


def test_a_lora_applies_to_the_tuned_transformer_that_it_was_trained_on(
    tiny_checkpoint, tuned, tmp_path, transformer_inputs
):
    whole = shutil.copytree(tiny_checkpoint, tmp_path / "whole")
    shutil.rmtree(whole / "transformer")
    shutil.copytree(tuned / "transformer", whole / "transformer")
    lora = ["--lora_path", make_lora(whole, tmp_path / "run", use_dora=True)]  # whose magnitudes are those of `tuned`
    options = ["--model_path", tiny_checkpoint, "--transformer_path", tuned]
    expected, both, without = (
        run(load(*row, "--output_path", tmp_path / "out.mp4").transformer, transformer_inputs)
        for row in (["--model_path", whole, *lora], [*options, *lora], options)
    )
    assert torch.equal(both, expected)
    assert not torch.equal(without, expected)


def refusal(args, capsys):
    with pytest.raises(SystemExit) as stop:
        cli_demo.main(args)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_lora_of_another_checkpoint_is_refused_before_weights_load(checkpoint_of, image, tmp_path, no_weights, capsys):
    of_5b = make_lora(checkpoint_of("5b"), tmp_path / "5b")
    to_image = ["--model_path", checkpoint_of("5b-I2V"), "--generate_type", "i2v", "--image_or_video_path", image]
    message = refusal(parse("--lora_path", of_5b, *to_image), capsys)
    assert f"{of_5b}/pytorch_lora_weights.safetensors: trained on another base model ({checkpoint_of('5b')})" in message
    assert "in_channels 4, here 8" in message

    smaller = shutil.copytree(checkpoint_of("2b"), tmp_path / "smaller")
    config = CogVideoXTransformer3DModel.load_config(smaller, subfolder="transformer")
    config |= {"num_attention_heads": 1, "num_layers": 1}
    CogVideoXTransformer3DModel.from_config(config).save_pretrained(smaller / "transformer")
    of_2b = make_lora(checkpoint_of("2b"), tmp_path / "2b", recorded=False)
    message = refusal(parse("--lora_path", of_2b, "--model_path", smaller), capsys)
    assert "transformer_blocks.0.attn1.to_k.lora_A.weight [4, 64], here [32, 32]; " in message
    assert "and 13 more" in message


@pytest.mark.parametrize("target", ["patch_embed.proj", "proj_out", "ff.net.0.proj", "norm1.linear"])
def test_lora_on_any_layer_fits_its_own_checkpoint(target, tiny_checkpoint, tmp_path):
    folder = make_lora(tiny_checkpoint, tmp_path / "run", target_modules=[target], use_dora=target == "proj_out")
    load("--lora_path", folder, "--output_path", tmp_path / "out.mp4")


OPTIONS = {
    "lora scale without a lora": (["--lora_scale", "0.5"], "--lora_scale 0.5: there is no LoRA"),
    "scales of other loras": (
        ["--lora_path", "a", "b", "--lora_scale", "1", "2", "3"],
        "--lora_scale 1 2 3: 3 scales for 2 LoRAs; give one",
    ),
    "comparison without a lora": (["--compare"], "--compare: shows a video without and with a LoRA, and there is none"),
    "scale is no number": (["--lora_path", "a", "--lora_scale", "nan"], "--lora_scale: nan: must be a finite number"),
    "guidance without end": (["--guidance_scale", "inf"], "--guidance_scale: inf: must be a finite number"),
    "v2v with dynamic guidance": (
        ["--generate_type", "v2v", "--image_or_video_path", "a", "--use_dynamic_cfg"],
        "--use_dynamic_cfg: diffusers'",
    ),
    "offload without a gpu": (["--cpu_offload", "model"], "--cpu_offload model: there is no GPU"),
    "t2v with an image": (["--generate_type", "t2v", "--image_or_video_path", "a.png"], "a.png: t2v uses no file"),
    "i2v without an image": (["--generate_type", "i2v"], "--generate_type i2v: needs a file"),
    "v2v of one step": (
        ["--generate_type", "v2v", "--image_or_video_path", "a", "--num_inference_steps", "1"],
        "--num_inference_steps 1: v2v runs only 80 % of them",
    ),
    "not an mp4": (["--output_path", "video.gif"], "--output_path video.gif: must name an .mp4 file"),
    "no frames": (["--num_frames", "0"], "0: must be a whole number of at least 1"),
    "abbreviated": (["--num_steps", "2"], "--num_steps: unknown option"),
}


@pytest.mark.parametrize("options, message", OPTIONS.values(), ids=OPTIONS)
def test_options_that_cannot_work_are_refused(options, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        parse(*options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


MISTAKES = {  # name: (options, parts of the message); {2b} is that tiny checkpoint, {tmp} a folder with wrong things
    "no model": ("", "--model_path: not given, and there is no LoRA or transformer to tell it"),
    "no model in the transformer": ("--transformer_path {2b}", "--model_path: not given, and {2b} does not say what"),
    "no model in the lora": ("--lora_path {tmp}/foreign", "--model_path: not given", "does not say what it was"),
    "model is nowhere": ("--model_path {tmp}/nowhere", "{tmp}/nowhere: found no model_index.json", "form owner/name"),
    "model is on no hub": ("--model_path no/such-model", "no/such-model: found no model_index", "cannot be reached"),
    "model is a lora": ("--model_path {tmp}/foreign", "no model_index.json", "give it as --lora_path"),
    "model is a transformer": ("--model_path {tmp}/sft", "no model_index.json", "give it as --transformer_path"),
    "model is a part": ("--model_path {2b}/transformer", "no model_index.json", "give its top folder"),
    "another family": ("--model_path {tmp}/flux", "holds a FluxPipeline", "such as THUDM/CogVideoX-2b"),
    "half a download": ("--model_path {tmp}/half", "no weights in text_encoder/", "download the base model again"),
    "lora is nowhere": ("--lora_path {tmp}/no/lora/here", "--lora_path {tmp}/no/lora/here: no such file"),
    "lora a floor below": ("--lora_path {tmp}/lora-runs", "no pytorch_lora_weights.saf", "it is {tmp}/lora-runs/1"),
    "one of several loras": (
        "--lora_path {tmp}/several", "{tmp}/several: holds several files: a.safetensors, b.safetensors; give one"
    ),
    "lora is broken": ("--lora_path {tmp}/text.mp4", "cannot be read as .safetensors"),
    "lora is a transformer": ("--lora_path {tmp}/sft", "no pytorch_lora_weights", "give it as --transformer_path"),
    "lora is a checkpoint": ("--lora_path {2b}", "no pytorch_lora_weights", "give it as --model_path"),
    "lora without its base": (
        "--lora_path {tmp}/pissa", "init_lora_weights pissa_niter_4 changed the base model's own weights", "convert it"
    ),
    "lora of another transformer": (
        "--transformer_path {tmp}/sft --lora_path {tmp}/of-5b",
        "than --transformer_path {tmp}/sft/transformer: use_rotary_positional_embeddings True, here False",
    ),
    "transformer is nowhere": ("--transformer_path {tmp}/no/where", "{tmp}/no/where: no such folder, nor a transf"),
    "transformer a floor below": ("--transformer_path {tmp}/runs", "the newest below it is {tmp}/runs/checkpoint-10\n"),
    "transformer is a lora": ("--transformer_path {tmp}/foreign", "no transformer/", "give it as --lora_path"),
    "transformer is a file": (
        "--transformer_path {tmp}/sft/transformer/diffusion_pytorch_model.safetensors", "must be a folder"
    ),
    "transformer is empty": ("--transformer_path {tmp}/empty", "no transformer/ in this folder; give the folder that"),
    "transformer is a vae": ("--transformer_path {2b}/vae", "is of AutoencoderKLCogVideoX", "CogVideoXTransformer3DM"),
    "transformer is a t5": ("--transformer_path {2b}/text_encoder", "is of no model of diffusers"),
    "transformer config is text": ("--transformer_path {tmp}/broken", "not a valid JSON file"),
    "transformer of another kind": (
        "--transformer_path {tmp}/sft --model_path {1.5-5B}",
        "--transformer_path {tmp}/sft/transformer: of another kind than --model_path {1.5-5B}: patch_size_t None, ",
        "there 2; use_rotary_positional_embeddings False, there True. Give",
        "fine-tuned from ({2b})",
    ),
    "transformer that sees no ofs": (
        "--transformer_path {tmp}/no-ofs --model_path {1.5-5B-I2V}", "ofs_embed_dim None, there 32."
    ),
    "transformer without weights": ("--transformer_path {tmp}/bare", "no diffusion_pytorch_model.safetensors in it"),
    "transformer without a shard": (
        "--transformer_path {tmp}/shards", "no diffusion_pytorch_model-00002-of-0000", "copy it again"
    ),
    "transformer cut short": ("--transformer_path {tmp}/cut", "diffusion_pytorch_model.safetensors: cannot be read"),
    "transformer half of one": (
        "--transformer_path {tmp}/half-of-one", "proj_out.bias is missing, by its config.json (16,)", "as a whole"
    ),
    "transformer's base is nowhere": (
        "--transformer_path {tmp}/moved", "--model_path {tmp}/away: found no model_index.json"
    ),
    "i2v of a tuned text model": (
        "--transformer_path {tmp}/sft --generate_type i2v --image_or_video_path {image}",
        "--generate_type i2v: --transformer_path {tmp}/sft/transformer is made to start from text only",
    ),
    "lora of another model": (
        "--lora_path {tmp}/kohya.safetensors", "holds lora_unet_to_q.alpha", "give the file of a LoRA"
    ),
    "lora of the future": ("--lora_path {tmp}/future", "update peft", "of_tomorrow"),
    "frames": ("--model_path {2b} --num_frames 11", "--num_frames 11: must be 4k + 1; nearest is 9"),
    "size": ("--model_path {2b} --height 100", "--height 100: must be a multiple of 16; nearest is 96"),
    "fp16 with 1.5": ("--model_path {1.5-5B} --dtype float16", "--dtype float16: gives NaN", "use bfloat16"),
    "1.5 too large": ("--model_path {1.5-5B} --width 112", "--width 112: this base model's positions end at 96"),
    "1.5 v2v frames": (
        "--model_path {1.5-5B} --generate_type v2v --image_or_video_path {clip} --num_frames 9",
        "--num_frames 9: must be 8k + 5; nearest is 5",
    ),
    "t2v of an image model": ("--model_path {5b-I2V} --generate_type t2v", "in 8, out 4", "use i2v"),
    "v2v of an image model": (
        "--model_path {1.5-5B-I2V} --generate_type v2v --image_or_video_path {clip}", "made to start from an image"
    ),
    "image model alone": (
        "--model_path {5b-I2V}", "--image_or_video_path: not given", "--model_path {5b-I2V} starts from an image"
    ),
    "text model with an image": (
        "--model_path {5b} --image_or_video_path {image}", "--image_or_video_path {image}: --model_path {5b} starts",
        "add --generate_type v2v",
    ),
    "i2v of a text model": ("--model_path {5b} --generate_type i2v --image_or_video_path {image}", "use t2v or v2v"),
    "i2v size": (
        "--model_path {5b-I2V} --image_or_video_path {image} --height 80",
        "--height 80: this base model makes only 64",
    ),
    "i2v frames": (
        "--model_path {5b-I2V} --generate_type i2v --image_or_video_path {image} --num_frames 17",
        "--num_frames 17: this base model makes only 9",
    ),
    "no image": ("--model_path {5b-I2V} --image_or_video_path no.png", "no.png: no such file"),
    "image is text": (
        "--model_path {5b-I2V} --generate_type i2v --image_or_video_path {tmp}/text.mp4",
        "{tmp}/text.mp4: not readable; give an image for i2v",
    ),
    "video is text": (
        "--model_path {2b} --generate_type v2v --image_or_video_path {tmp}/text.mp4",
        "{tmp}/text.mp4: not readable; give a video for v2v",
    ),
    "video is an image": (
        "--model_path {2b} --generate_type v2v --image_or_video_path {image}",
        "image.png: not readable; give a video for v2v",
    ),
    "short video": (
        "--model_path {2b} --generate_type v2v --image_or_video_path {clip} --num_frames 17",
        "clip.mp4: 11 frames at 8 fps, not 17",
        "give a longer video",
    ),
}  # fmt: skip


def make_transformers(checkpoint_of, folder):
    """`sft`, which is as it should be, and others that are not."""
    weights = "diffusion_pytorch_model.safetensors"
    sft = tune(checkpoint_of("2b"), folder / "sft")
    broken = {name: shutil.copytree(sft, folder / name) for name in ("broken", "bare", "cut", "half-of-one", "moved")}
    parts = {name: path / "transformer" for name, path in broken.items()}
    (parts["broken"] / "config.json").write_text("not JSON")
    (parts["bare"] / weights).unlink()
    (parts["cut"] / weights).write_bytes((parts["cut"] / weights).read_bytes()[:-100])
    half = load_file(parts["half-of-one"] / weights)
    save_file({name: half[name] for name in half if name != "proj_out.bias"}, parts["half-of-one"] / weights)
    edit_json(parts["moved"] / "config.json", _name_or_path=str(folder / "away"))
    shards = tune(checkpoint_of("2b"), folder / "shards", max_shard_size="100KB") / "transformer"
    next(shards.glob("diffusion_pytorch_model-00002-*")).unlink()
    no_ofs = CogVideoXTransformer3DModel.load_config(checkpoint_of("1.5-5B-I2V"), subfolder="transformer")
    no_ofs = CogVideoXTransformer3DModel.from_config(no_ofs, ofs_embed_dim=None)
    no_ofs.save_pretrained(folder / "no-ofs" / "transformer")
    for age, name in ((1, "checkpoint-10"), (2, "checkpoint-9"), (0, ".checkpoint-11.incomplete")):
        shutil.copytree(sft, folder / "runs" / name)
        os.utime(folder / "runs" / name / "transformer" / "config.json", (1e9 - age, 1e9 - age))
    (folder / "empty").mkdir()


@pytest.fixture(scope="module")
def wrong_things(checkpoint_of, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("wrong")
    (tmp_path / "text.mp4").write_text("not a video, not a LoRA")
    save_file({"lora_unet_to_q.alpha": torch.ones(1)}, tmp_path / "kohya.safetensors")
    make_lora(checkpoint_of("2b"), tmp_path / "foreign", recorded=False)
    make_lora(checkpoint_of("2b"), tmp_path / "lora-runs" / "1")
    (tmp_path / "several").mkdir()
    for name in "ab":
        save_file({}, tmp_path / "several" / f"{name}.safetensors")
    weight = {"transformer.proj_out.lora_A.weight": torch.ones(1, 64)}
    for name, setting in {"future": {"of_tomorrow": 1}, "pissa": {"init_lora_weights": "pissa_niter_4"}}.items():
        (tmp_path / name).mkdir()
        metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": setting[key] for key in setting})}
        save_file(weight, tmp_path / name / "pytorch_lora_weights.safetensors", metadata)
    half = shutil.copytree(checkpoint_of("2b"), tmp_path / "half")
    (half / "text_encoder" / "model.safetensors").unlink()
    make_transformers(checkpoint_of, tmp_path)
    make_lora(checkpoint_of("5b"), tmp_path / "of-5b")
    flux = shutil.copytree(checkpoint_of("2b"), tmp_path / "flux")
    edit_json(flux / "model_index.json", _class_name="FluxPipeline")
    return tmp_path


@pytest.mark.parametrize("options, parts", [(row[0], row[1:]) for row in MISTAKES.values()], ids=MISTAKES)
def test_a_mistake_ends_in_one_message(options, parts, checkpoint_of, wrong_things, image, clip, no_weights, capsys):
    places = {f"{{{variant}}}": checkpoint_of(variant) for variant in ("2b", "5b", "5b-I2V", "1.5-5B", "1.5-5B-I2V")}
    places |= {"{tmp}": wrong_things, "{image}": image, "{clip}": clip}

    def fill(text):
        for name, place in places.items():
            text = text.replace(name, str(place))
        return text

    output = wrong_things / "out" / "video.mp4"
    capsys.readouterr()  # the progress of making the checkpoints
    message = refusal(parse(*fill(options).split(), "--output_path", output), capsys)
    assert message.startswith("cli_demo.py: error: --")
    assert message.count("\n") == 1
    for part in parts:
        assert fill(part) in message
    assert not output.parent.exists()


def test_a_failed_write_leaves_the_old_video_alone(tmp_path, monkeypatch):
    path = tmp_path / "out.mp4"
    path.write_text("the old video")

    def stop(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr("files.os.fsync", stop)
    with pytest.raises(OSError, match="disk full"):
        cli_demo.publish(path, b"half")
    assert [file.name for file in tmp_path.iterdir()] == ["out.mp4"]
    assert path.read_text() == "the old video"


def test_a_tilde_expands_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    paths = ["--model_path", "--transformer_path", "--lora_path", "--output_path", "--image_or_video_path"]
    options = [text for path in paths for text in (path, f"~{path}.mp4".replace("~--", "~/"))]
    args = parse("--generate_type", "i2v", *options)
    expected = {path[2:]: f"/home/someone/{path[2:]}.mp4" for path in paths}
    expected["lora_path"] = [expected["lora_path"]]
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("error", "options", "expected"),
    [
        ((torch.OutOfMemoryError, "CUDA out of memory"), [], "out of memory; pass fewer --num_frames"),
        ((RuntimeError, "DefaultCPUAllocator: not enough memory"), ["--no-enable_tiling"], "--enable_tiling or fewer"),
        ((OSError, 28, "No space left on device", "out.mp4"), [], "No space left on device: 'out.mp4'"),
    ],
)  # fmt: skip
def test_what_ends_the_sampling_is_a_message(tiny_checkpoint, tmp_path, monkeypatch, capsys, error, options, expected):
    def failing(*args, **options):
        kind, *words = error
        raise kind(*words)  # a new one: its traceback holds the models

    monkeypatch.setattr(cli_demo, "make_frames", failing)
    with pytest.raises(SystemExit, match="3"):
        make_video(tmp_path / "out.mp4", "--model_path", tiny_checkpoint, *options)
    assert expected in capsys.readouterr().err and not (tmp_path / "out.mp4").exists()
