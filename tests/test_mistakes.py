"""What a person does wrong ends in exit code 2 and one message, with nothing written; ordinary mess works."""

import shutil
import subprocess
import sys

import imageio
import numpy as np
import pytest
from conftest import ROOT, damage_second_clip, training_options
from make_example import draw_clip, make_clips

import train_cogvideox_lora
from cogvideox.base_model import read_base_model


def assert_refused(capsys, call, parts):
    with pytest.raises(SystemExit) as stop:
        call()
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert all(part in error for part in parts), error
    assert "Traceback" not in error


def test_all_problems_of_a_dataset_are_told_together_before_a_model_loads(
    tiny_checkpoint, tmp_path, train, capsys, monkeypatch
):
    folder = make_clips(tmp_path / "clips", count=1)
    good = (folder / "videos.txt").read_text().strip()
    content = (folder / good).read_bytes()
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "truncated.mp4").write_bytes(content[: len(content) // 2])
    (folder / "random.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    imageio.mimsave(folder / "short.mp4", draw_clip("square", "red", "left", 3, 96, 128), macro_block_size=1)
    videos = [good, "missing.mp4", "empty.mp4", "truncated.mp4", "random.mp4", "", "short.mp4", "videos"]
    (folder / "videos.txt").write_text("\n".join(videos) + "\n")
    (folder / "prompts.txt").write_text("caption\n" * 9)
    for name in ("encoders.video_encoder", "encoders.caption_encoder", "lora.load_transformer"):
        monkeypatch.setattr(f"cogvideox.{name}", lambda *_, **__: pytest.fail("a model was loaded"))
    parts = [
        "8 problems in the dataset, nothing is trained",
        "videos.txt:6: blank line; write what is missing",
        "prompts.txt has 9 lines and videos.txt 8",
        "line 2: ", "missing.mp4: no such file",
        "line 3: ", "empty.mp4: the file is empty",
        "line 4: ", "truncated.mp4: cannot be read as a video",
        "line 5: ", "random.mp4: cannot be read as a video",
        "line 7: ", "short.mp4: has 3 frames, and none is left after --skip_frames_start 5",
        "line 8: ", "videos: is a folder; give the path of a video in it",
    ]  # fmt: skip
    call = lambda: train(tiny_checkpoint, tmp_path / "run", instance_data_root=folder, skip_frames_start=5)  # noqa: E731
    assert_refused(capsys, call, parts)
    assert not (tmp_path / "run").exists()
    assert [path.name for path in (folder / ".cogvideox_cache").iterdir()] == ["known"]  # what was read of good clips


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"instance_data_root": "/no/where"}, ["/no/where: no such folder", "--instance_data_root"]),
        ({"caption_column": "captions.txt"}, ["captions.txt: no such file", "--caption_column"]),
        ({"skip_frames_end": 32}, ["6 problems", "has 32 frames, and none is left"]),
        (
            {"resume_from_checkpoint": "latest"},
            ["--resume_from_checkpoint latest", "no complete checkpoint", "pass auto"],
        ),
        (
            {"resume_from_checkpoint": "checkpoint-7"},
            ["--resume_from_checkpoint checkpoint-7", "no such folder", "no checkpoint", "pass auto"],
        ),
        ({"lora_target_modules": ["to_q", "to_x"]}, ["--lora_target_modules to_x", "no such linear layer", "to_out.0"]),
        (
            {"blocks_to_swap": 3, "gradient_checkpointing": "full"},
            ["--blocks_to_swap 3: the transformer has 2", "pass at most that"],
        ),
        ({"report_to": "nonsense"}, ["nonsense", "--report_to"]),
        ({"lr_scheduler": "cosine", "lr_warmup_steps": 50}, ["--lr_warmup_steps 50: the run has 6 updates"]),
        ({"use_8bit_adam": True}, ["--use_8bit_adam: needs bitsandbytes", "pip install bitsandbytes"]),
        ({"report_to": "comet_ml"}, ["--report_to comet_ml: not installed", "pip install"]),
        (
            {"dataset_name": "someone/clips"},
            ["--dataset_name someone/clips: cannot be downloaded", "--instance_data_root"],
        ),
        ({"push_to_hub": True}, ["--push_to_hub: cannot create", "hf auth login"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_mistake_ends_in_a_message_that_names_the_way_out(tiny_checkpoint, clips, tmp_path, capsys, options, parts):
    line = training_options(tiny_checkpoint, clips, tmp_path / "run", **options)
    if "dataset_name" in options:
        at = line.index("--instance_data_root")
        del line[at : at + 2]
    assert_refused(capsys, lambda: train_cogvideox_lora.main(train_cogvideox_lora.parse_args(line)), parts)
    assert not (tmp_path / "run").exists()


def test_clips_are_checked_before_weights_are_downloaded(tiny_checkpoint, clips, tmp_path, monkeypatch, capsys):
    read = read_base_model
    monkeypatch.setattr(train_cogvideox_lora, "read_base_model", lambda *args: read(*args)._replace(folder=None))
    monkeypatch.setattr(train_cogvideox_lora, "download_weights", lambda base: pytest.fail("weights were downloaded"))
    bad = shutil.copytree(clips, tmp_path / "bad")
    first, *others = (bad / "videos.txt").read_text().splitlines()
    (bad / "videos.txt").write_text("\n".join(["nowhere.mp4", *others]))
    args = train_cogvideox_lora.parse_args(training_options(tiny_checkpoint, bad, tmp_path / "run"))
    parts = ["1 problem in the dataset", "line 1: ", "nowhere.mp4: no such file"]
    assert_refused(capsys, lambda: train_cogvideox_lora.main(args), parts)


def test_an_output_whose_videos_would_be_taken_for_clips_is_refused(tiny_checkpoint, tmp_path, train, capsys):
    (tmp_path / "clips").mkdir()
    for name in ("a.mp4", "a.txt"):
        (tmp_path / "clips" / name).write_text("x")
    output = tmp_path / "clips" / "run"
    options = {"instance_data_root": tmp_path / "clips", "validation_prompt": "a cat"}
    parts = [f"--output_dir {output}: is in {tmp_path / 'clips'}, where every video is taken for a clip", "elsewhere"]
    assert_refused(capsys, lambda: train(tiny_checkpoint, output, **options), parts)
    assert not output.exists()


def test_a_folder_that_is_no_cogvideox_model_is_refused(tiny_checkpoint, tmp_path, train, capsys):
    message = "no/such-model: found no model_index.json there (no such folder; the hub cannot be reached"
    assert_refused(capsys, lambda: train("no/such-model", tmp_path / "run"), [message])
    message = "nowhere: found no model_index.json there (no such folder; a hub name has the form"
    assert_refused(capsys, lambda: train(tmp_path / "nowhere", tmp_path / "run"), [message])
    assert_refused(
        capsys, lambda: train(tmp_path, tmp_path / "run"), ["found no model_index.json", "THUDM/CogVideoX-2b"]
    )
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    index = (other / "model_index.json").read_text()
    (other / "model_index.json").write_text(index.replace("CogVideoXPipeline", "StableDiffusionPipeline"))
    assert_refused(capsys, lambda: train(other, tmp_path / "run"), ["holds a StableDiffusionPipeline, not a CogVideoX"])
    for missing, message in {
        "vae": "the base model is not complete",
        "transformer/diffusion_pytorch_model.safetensors": "no weights in transformer/; download the base model again",
        "text_encoder": "no config in text_encoder/",
        "text_encoder/model.safetensors": "no weights in text_encoder/; download",
        "tokenizer/spiece.model": "no spiece.model in tokenizer/; download",
    }.items():
        broken = shutil.copytree(tiny_checkpoint, tmp_path / missing.replace("/", "-"))
        shutil.rmtree(broken / missing) if (broken / missing).is_dir() else (broken / missing).unlink()
        assert_refused(capsys, lambda: train(broken, tmp_path / "run"), [message])  # noqa: B023 - called at once
    call = lambda: train(tiny_checkpoint, tmp_path / "run", variant="fp16")  # noqa: E731
    assert_refused(capsys, call, ["no weights of --variant fp16 in transformer/"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variant", "options", "parts"),
    [
        ("2b", {"validation_images": "a.png", "validation_prompt": "a"}, ["--validation_images: ", "sees no image"]),
        ("5b", {"image_column": "images.txt"}, ["--image_column: ", "sees no image", "CogVideoX-5b-I2V"]),
        ("5b-I2V", {"height": 48}, ["--height 48", "learned positions for 9 frames of 64x96 pixels only"]),
        ("5b-I2V", {"max_num_frames": 5}, ["--max_num_frames 5", "learned positions for 9 frames"]),
        ("1.5-5B-I2V", {"mixed_precision": "fp16"}, ["in float16 an image's encoding can overflow", "bf16"]),
        ("1.5-5B", {"mixed_precision": "fp16"}, ["NaN in float16", "bf16"]),
    ],
)
def test_a_pairing_that_cannot_work_is_refused_before_weights_load(
    checkpoint_of, tmp_path, train, capsys, monkeypatch, variant, options, parts
):
    folder = checkpoint_of(variant)
    for name in ("encoders.video_encoder", "encoders.caption_encoder", "lora.load_transformer"):
        monkeypatch.setattr(f"cogvideox.{name}", lambda *_, **__: pytest.fail("a model was loaded"))
    assert_refused(capsys, lambda: train(folder, tmp_path / "run", **options), parts)
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_with_images_is_told_with_the_rest(checkpoint_of, tmp_path, train, capsys):
    """Clips that are too short for learned positions, which take only one length, are in the same message."""
    folder = make_clips(tmp_path / "clips", count=3)
    imageio.mimsave(folder / "short.mp4", draw_clip("square", "red", "left", 20, 96, 128), fps=24, macro_block_size=1)
    with open(folder / "videos.txt", "a") as videos, open(folder / "prompts.txt", "a") as prompts:
        videos.write("short.mp4\n")
        prompts.write("short\n")
    (folder / "noimage.png").write_bytes(b"no image")
    imageio.imwrite(folder / "good.png", np.zeros((50, 80, 3), np.uint8))
    (folder / "images.txt").write_text("good.png\nmissing.png\nnoimage.png\ngood.png\ngood.png\n")
    options = {"image_column": "images.txt", "validation_images": "none.png", "validation_prompt": "a"}
    call = lambda: train(checkpoint_of("5b-I2V"), tmp_path / "run", instance_data_root=folder, **options)  # noqa: E731
    parts = [
        "5 problems in the dataset",
        "prompts.txt has 4 lines and videos.txt 4 and images.txt 5",
        "--validation_images none.png: no such image",
        "line 2: ", "missing.png: no such file",
        "line 3: ", "noimage.png: cannot be read as an image",
        "line 4: ", "short.mp4: gives 5 frames at --fps 8, and this base model needs 9",
    ]  # fmt: skip
    assert_refused(capsys, call, parts)


def test_a_used_output_directory_is_not_mixed_up(tiny_checkpoint, tmp_path, train, capsys):
    options = {"max_train_steps": 2, "checkpointing_steps": 1}
    train(tiny_checkpoint, tmp_path / "run", **options)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    call = lambda: train(tiny_checkpoint, tmp_path / "run", **options)  # noqa: E731
    assert_refused(
        capsys, call, ["holds checkpoint-2 and pytorch_lora_weights.safetensors of an earlier run", "checkpoint auto"]
    )
    call = lambda: train(tiny_checkpoint, tmp_path / "run", resume_from_checkpoint="checkpoint-1", **options)  # noqa: E731
    assert_refused(capsys, call, ["holds checkpoint-2, which is later", "another --output_dir"])
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_another_checkpoint_cannot_resume_a_run(checkpoint_of, tmp_path, train, capsys):
    options = {"max_train_steps": 1, "checkpointing_steps": 1}
    train(checkpoint_of("2b"), tmp_path / "run", **options)
    call = lambda: train(checkpoint_of("5b"), tmp_path / "run", resume_from_checkpoint="latest", **options)  # noqa: E731
    assert_refused(capsys, call, ["checkpoint-1 was trained on another kind of CogVideoX", "args.json"])


def test_a_full_or_unwritable_cache_folder_ends_in_a_message(tiny_checkpoint, tmp_path, train, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    call = lambda: train(tiny_checkpoint, tmp_path / "run", latents_cache_dir=tmp_path / "file")  # noqa: E731
    assert_refused(capsys, call, ["cannot write the cache", "--latents_cache_dir"])

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    call = lambda: train(tiny_checkpoint, tmp_path / "run", latents_cache_dir=tmp_path / "full")  # noqa: E731
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 3
    error = capsys.readouterr().err
    assert "cannot write the cache (No space left on device)" in error and "make room" in error
    assert not (tmp_path / "run").exists()


def test_an_output_directory_that_cannot_be_written_is_told_before_encoding(tiny_checkpoint, tmp_path, train, capsys):
    (tmp_path / "file").write_text("")
    call = lambda: train(tiny_checkpoint, tmp_path / "file" / "run")  # noqa: E731
    assert_refused(capsys, call, [f"--output_dir {tmp_path}/file/run: {tmp_path}/file is not a writable folder"])


def test_a_damaged_clip_is_named_after_all_are_encoded_and_trained_on_if_that_is_allowed(
    tiny_checkpoint, tmp_path, train, capsys
):
    folder = make_clips(tmp_path / "clips", count=3)
    damage_second_clip(folder)
    call = lambda: train(tiny_checkpoint, tmp_path / "run", instance_data_root=folder)  # noqa: E731
    assert_refused(capsys, call, ["1 problem in the dataset", "line 2: ", "is damaged at ", "--allow_damaged"])
    encoded = {path: path.stat().st_mtime_ns for path in (folder / ".cogvideox_cache" / "latents").iterdir()}
    assert len(encoded) == 3
    train(tiny_checkpoint, tmp_path / "run", instance_data_root=folder, allow_damaged=True)
    assert "line 2: is damaged at " in capsys.readouterr().out
    assert encoded == {path: path.stat().st_mtime_ns for path in encoded}  # nothing was encoded again


def test_exit_code_and_message_of_the_real_command(tmp_path):
    (tmp_path / "prompt.txt").write_text("a cat\n")
    (tmp_path / "videos.txt").write_text("a.mp4\n")
    options = training_options("THUDM/CogVideoX-2b", tmp_path, tmp_path / "run", height=100)
    command = [sys.executable, ROOT / "train_cogvideox_lora.py", *options]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].endswith("--height 100: must be divisible by 16; nearest is 96")


def test_ordinary_mess_works(tiny_checkpoint, tmp_path, train):
    """Windows files, absolute paths, spaces, other alphabets, every usual rate, portrait, short clips, odd prompts."""
    folder, elsewhere = tmp_path / "my clips", tmp_path / "anders wo"
    folder.mkdir()
    elsewhere.mkdir()
    made = [
        ("ein schöner Film.mp4", 24, 32, 96, 128), ("映像.mp4", 25, 32, 128, 96), ("29.97.mp4", 29.97, 40, 96, 128),
        ("60 fps.mp4", 60, 70, 96, 128), ("short.mp4", 8, 3, 100, 130), ("wide.mp4", 8, 9, 66, 200),
    ]  # fmt: skip
    for name, fps, num_frames, height, width in made:
        where = elsewhere if name.startswith("29") else folder
        frames = draw_clip("circle", "blue", "up", num_frames, height, width)
        imageio.mimsave(where / name, frames, fps=fps, macro_block_size=1)
    videos = [str(elsewhere / name) if name.startswith("29") else name for name, *_ in made]
    prompts = ["un café, avec: du lait", "一只猫", "a cat ::: no separator here", "'quoted'", '"doubly"', "a" * 3000]
    (folder / "videos.txt").write_bytes("\ufeff".encode() + "\r\n".join(videos).encode() + b"\r\n")
    (folder / "prompts.txt").write_bytes("\r\n".join(prompts).encode() + b"\r\n\r\n")
    rows = train(
        tiny_checkpoint, tmp_path / "run", instance_data_root=folder, random_flip=True, video_reshape_mode="random"
    )
    assert len(rows) == 6 and all(np.isfinite(row["loss"]) for row in rows)
