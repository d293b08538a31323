"""cli_demo.py from options to mp4 on tiny checkpoints: what it makes, at which LoRA strength, what it refuses."""

import json
import shutil

import accelerate
import imageio
import numpy as np
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from make_example import draw_clip
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file

import cli_demo

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
    return cli_demo.load_pipeline(cli_demo.make_plan(args), args)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def lora(tiny_checkpoint, tmp_path):
    return make_lora(tiny_checkpoint, tmp_path / "run")


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
    assert "--num_frames 13: the VAE gives 16 for it" in capsys.readouterr().out
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
    plan = cli_demo.make_plan(parse("--model_path", checkpoint, "--output_path", tmp_path / "out.mp4"))
    assert (plan.inputs["height"], plan.inputs["width"]) == (768, 1360)


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
    ("t2v", "2b", 9), ("i2v", "5b-I2V", 9), ("v2v", "2b", 9), ("v2v", "1.5-5B", 8),
])  # fmt: skip
def test_every_generate_type_writes_a_video(kind, variant, num_frames, checkpoint_of, image, clip, tmp_path):
    source = {"t2v": [], "i2v": ["--image_or_video_path", image], "v2v": ["--image_or_video_path", clip]}[kind]
    options = ["--model_path", checkpoint_of(variant), "--generate_type", kind, *source]
    frames, _ = make_video(tmp_path / "out.mp4", *options)
    assert frames.shape == (num_frames, 64, 96, 3)


def red_centre(frame):
    """Where the red circle is, from 0 to 1 down and to the right."""
    red = frame[..., 0].astype(int) - frame[..., 1] > 80
    return [axis.mean() / size for axis, size in zip(np.nonzero(red), red.shape, strict=True)]


def test_v2v_takes_the_video_by_time_and_crops_it(clip):
    frames = cli_demo.read_source(
        parse("--generate_type", "v2v", "--image_or_video_path", clip), num_frames=5, fps=6, width_height=(96, 64)
    )["video"]
    reference, _ = read_video(clip)  # 24 fps, 96 x 128, of which 3:2 leaves 85 rows
    assert [frame.size for frame in frames] == [(96, 64)] * 5
    where = [red_centre(np.array(frame)) for frame in frames]
    expected = [red_centre(reference[4 * i, 5:91]) for i in range(5)]
    assert np.allclose(where, expected, atol=0.02)
    assert where[-1][1] - where[0][1] > 0.3


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


def test_lora_keeps_its_strength_when_layers_are_offloaded(tiny_checkpoint, lora, tmp_path):
    pipe = load(
        "--model_path", tiny_checkpoint, "--lora_path", lora, "--lora_scale", 3, "--output_path", tmp_path / "a.mp4"
    )
    inputs = {
        "hidden_states": torch.randn(1, 3, 4, 8, 12),
        "encoder_hidden_states": torch.randn(1, 226, 32),
        "timestep": torch.tensor([500]),
    }
    with torch.no_grad():
        straight = pipe.transformer(**inputs).sample
        accelerate.cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))  # what `sequential` does
        offloaded = pipe.transformer(**inputs).sample
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


def refusal(args, capsys):
    with pytest.raises(SystemExit) as stop:
        cli_demo.main(args)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_lora_of_another_checkpoint_is_refused_before_weights_load(checkpoint_of, image, tmp_path, no_weights, capsys):
    of_5b = make_lora(checkpoint_of("5b"), tmp_path / "5b")
    to_image = ["--model_path", checkpoint_of("5b-I2V"), "--generate_type", "i2v", "--image_or_video_path", image]
    message = refusal(parse("--lora_path", of_5b, *to_image), capsys)
    assert f"{of_5b}/pytorch_lora_weights.safetensors: trained on another checkpoint ({checkpoint_of('5b')})" in message
    assert "in_channels 4, here 8" in message

    smaller = shutil.copytree(checkpoint_of("2b"), tmp_path / "smaller")
    edit_json(smaller / "transformer" / "config.json", num_attention_heads=1, num_layers=1)
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
    "offload without a gpu": (["--cpu_offload", "model"], "--cpu_offload model: no GPU here"),
    "t2v with an image": (["--image_or_video_path", "a.png"], "--image_or_video_path a.png: t2v uses none"),
    "i2v without an image": (["--generate_type", "i2v"], "--generate_type i2v: needs a file"),
    "v2v of one step": (
        ["--generate_type", "v2v", "--image_or_video_path", "a", "--num_inference_steps", "1"],
        "--num_inference_steps 1: v2v runs 80 % of them",
    ),
    "not an mp4": (["--output_path", "video.gif"], "--output_path video.gif: must name an .mp4 file"),
    "no frames": (["--num_frames", "0"], "0: must be 1 or more"),
    "abbreviated": (["--num_steps", "2"], "unrecognized arguments"),
}


@pytest.mark.parametrize("options, message", OPTIONS.values(), ids=OPTIONS)
def test_options_that_cannot_work_are_refused(options, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        parse(*options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


MISTAKES = {  # name: (options, parts of the message); {2b} is that tiny checkpoint, {tmp} a folder with wrong things
    "no model": ("", "--model_path: not given, and there is no LoRA to tell it"),
    "no model in the lora": ("--lora_path {tmp}/foreign", "--model_path: not given", "does not say what it was"),
    "model is nowhere": ("--model_path {tmp}/nowhere", "--model_path {tmp}/nowhere: no whole checkpoint"),
    "model is a lora": ("--model_path {tmp}/foreign", "no model_index.json", "give it as --lora_path"),
    "model is a part": ("--model_path {2b}/transformer", "no model_index.json", "give its top folder"),
    "another family": ("--model_path {tmp}/flux", "is a FluxPipeline", "such as THUDM/CogVideoX-2b"),
    "half a download": ("--model_path {tmp}/half", "no weights in text_encoder/", "download it again"),
    "lora is nowhere": ("--lora_path {tmp}/no/lora/here", "--lora_path {tmp}/no/lora/here: no such file"),
    "lora a floor below": ("--lora_path {tmp}", "no pytorch_lora_weights.safetensors", "the newest below it is {tmp}/"),
    "lora is broken": ("--lora_path {tmp}/text.mp4", "cannot be read as .safetensors"),
    "lora of other tools": ("--lora_path {tmp}/kohya.safetensors", "holds lora_unet_to_q.alpha", "convert it first"),
    "lora of the future": ("--lora_path {tmp}/future", "update peft", "of_tomorrow"),
    "frames": ("--model_path {2b} --num_frames 11", "--num_frames 11: must be 4k + 1; nearest is 9"),
    "size": ("--model_path {2b} --height 100", "--height 100: must be a multiple of 16; nearest is 96"),
    "fp16 with 1.5": ("--model_path {1.5-5B} --dtype float16", "--dtype float16: gives NaN", "use bfloat16"),
    "1.5 too large": ("--model_path {1.5-5B} --width 112", "--width 112: this checkpoint's positions end at 96"),
    "1.5 v2v frames": (
        "--model_path {1.5-5B} --generate_type v2v --image_or_video_path {clip} --num_frames 9",
        "--num_frames 9: must be 8k + 5; nearest is 5",
    ),
    "t2v of an image model": ("--model_path {5b-I2V}", "--generate_type t2v", "in 8, out 4", "use i2v"),
    "i2v of a text model": ("--model_path {5b} --generate_type i2v --image_or_video_path {image}", "use t2v or v2v"),
    "i2v size": (
        "--model_path {5b-I2V} --generate_type i2v --image_or_video_path {image} --height 80",
        "--height 80: this checkpoint makes 64 only",
    ),
    "i2v frames": (
        "--model_path {5b-I2V} --generate_type i2v --image_or_video_path {image} --num_frames 17",
        "--num_frames 17: this checkpoint makes 9 only",
    ),
    "no image": ("--model_path {5b-I2V} --generate_type i2v --image_or_video_path no.png", "no.png: no such file"),
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


@pytest.fixture
def wrong_things(checkpoint_of, tmp_path):
    (tmp_path / "text.mp4").write_text("not a video, not a LoRA")
    save_file({"lora_unet_to_q.alpha": torch.ones(1)}, tmp_path / "kohya.safetensors")
    make_lora(checkpoint_of("2b"), tmp_path / "foreign", recorded=False)
    weight = {"transformer.proj_out.lora_A.weight": torch.ones(1, 64)}
    (tmp_path / "future").mkdir()
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.of_tomorrow": 1})}
    save_file(weight, tmp_path / "future" / "pytorch_lora_weights.safetensors", metadata)
    half = shutil.copytree(checkpoint_of("2b"), tmp_path / "half")
    (half / "text_encoder" / "model.safetensors").unlink()
    flux = shutil.copytree(checkpoint_of("2b"), tmp_path / "flux")
    edit_json(flux / "model_index.json", _class_name="FluxPipeline")
    return tmp_path


@pytest.mark.parametrize("options, parts", [(row[0], row[1:]) for row in MISTAKES.values()], ids=MISTAKES)
def test_a_mistake_ends_in_one_message(options, parts, checkpoint_of, wrong_things, image, clip, no_weights, capsys):
    places = {f"{{{variant}}}": checkpoint_of(variant) for variant in ("2b", "5b", "5b-I2V", "1.5-5B")}
    places |= {"{tmp}": wrong_things, "{image}": image, "{clip}": clip}

    def fill(text):
        for name, place in places.items():
            text = text.replace(name, str(place))
        return text

    output = wrong_things / "out" / "video.mp4"
    message = refusal(parse(*fill(options).split(), "--output_path", output), capsys)
    assert message.startswith("cli_demo.py: error: --")
    assert message.count("\n") == 1
    for part in parts:
        assert fill(part) in message
    assert not output.parent.exists()


def test_a_failed_write_leaves_the_old_video_alone(tmp_path, monkeypatch):
    path = tmp_path / "out.mp4"
    path.write_text("the old video")

    def stop_halfway(frames, name, fps):
        with open(name, "w") as file:
            file.write("half")
        raise OSError("disk full")

    monkeypatch.setattr(cli_demo, "export_to_video", stop_halfway)
    with pytest.raises(OSError, match="disk full"):
        cli_demo.publish([], path, fps=8)
    assert [file.name for file in tmp_path.iterdir()] == ["out.mp4"]
    assert path.read_text() == "the old video"


def test_a_tilde_expands_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    paths = ["--model_path", "--lora_path", "--output_path", "--image_or_video_path"]
    options = [text for path in paths for text in (path, f"~{path}.mp4".replace("~--", "~/"))]
    args = parse("--generate_type", "i2v", *options)
    assert all(getattr(args, path[2:]) == f"/home/someone/{path[2:]}.mp4" for path in paths)
