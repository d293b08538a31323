"""The training script end to end, on tiny models: what it leaves behind, and what it must not depend on."""

import json
import os
import shutil
import signal
import subprocess
import sys

import imageio.v3 as iio
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, training_options, transformer_inputs
from diffusers import CogVideoXTransformer3DModel, DiffusionPipeline
from make_example import VARIANTS, make_clips
from PIL import Image
from safetensors.torch import load_file

import train_cogvideox_lora
from clips.video import examine_video, read_pictures
from cogvideox import lora
from cogvideox.lora_files import LORA_FILE
from cogvideox.sampling import sample_video
from run import checkpoints
from run.run_directory import list_checkpoints, read_metrics


def losses(rows):
    return [row["loss"] for row in rows if "loss" in row]


def lora_of(folder):
    return load_file(folder / LORA_FILE)


def assert_equal_weights(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- the whole road


def test_the_reference_command_leaves_videos_checkpoints_metrics_and_the_lora(tiny_checkpoint, clips, tmp_path, train):
    """The command in users' hands, at a small size: four epochs with two prompts."""
    rows = train(
        tiny_checkpoint, tmp_path / "run", cache_dir=tmp_path / "cache", enable_tiling=True, enable_slicing=True,
        caption_column="prompts.txt", video_column="videos.txt",
        validation_prompt="Mickey, with the captain: and friends:::Mickey and the bear",
        validation_prompt_separator=":::", num_validation_videos=1, validation_epochs=2, rank=8, mixed_precision="bf16",
        fps=8, skip_frames_start=0, skip_frames_end=0, train_batch_size=1, num_train_epochs=4, checkpointing_steps=10,
        gradient_accumulation_steps=1, learning_rate=1e-4, optimizer="AdamW", adam_beta1=0.9, adam_beta2=0.95,
    )  # fmt: skip
    run = tmp_path / "run"
    updates, validations = ([row for row in rows if name in row] for name in ("loss", "validation_motion"))
    assert [row["step"] for row in updates] == list(range(1, 25))
    assert set(updates[0]) == {
        "step", "epoch", "loss", "loss_smoothed", "lr", "grad_norm", "seconds", "peak_memory_gib"
    }  # fmt: skip
    assert [row["step"] for row in validations] == [0, 12, 24]
    assert set(validations[0]) == {"step", "epoch", "validation_motion", "data_motion", "peak_memory_gib"}
    assert rows[-1]["epoch"] == 4
    assert [path.name for path in list_checkpoints(run)] == [f"checkpoint-{n}" for n in (10, 20, 24)]
    assert (run / "checkpoint-20" / LORA_FILE).is_file() and (run / LORA_FILE).is_file()
    assert (run / "report.html").is_file()
    for step in (0, 12, 24):
        folder = run / "validation" / f"step-{step:06d}"
        videos = sorted(folder.glob("*.mp4"))
        assert [video.name for video in videos] == ["prompt-00_seed-3407.mp4", "prompt-01_seed-3407.mp4"]
        assert iio.imread(videos[0]).shape == (9, 64, 96, 3) and iio.immeta(videos[0])["fps"] == 8
        prompts = json.loads((folder / "prompts.json").read_text())
        assert list(prompts.values()) == ["Mickey, with the captain: and friends", "Mickey and the bear"]
    about = json.loads((run / "args.json").read_text())
    assert about["clips"] == 6 and about["options"]["rank"] == 8 and "hub_token" not in about["options"]


def test_a_second_run_encodes_nothing_again(tiny_checkpoint, tmp_path, train, monkeypatch):
    clips = make_clips(tmp_path / "clips", count=2)
    first = train(tiny_checkpoint, tmp_path / "a", instance_data_root=clips, validation_prompt="a cat")

    def fail(*_, **__):
        raise AssertionError("everything is in the cache")

    monkeypatch.setattr("cogvideox.encoders.caption_encoder", fail)
    monkeypatch.setattr("cogvideox.encoders.video_encoder", fail)
    second = train(tiny_checkpoint, tmp_path / "b", instance_data_root=clips, validation_prompt="a cat")
    assert losses(first) == losses(second)


def test_t5_and_vae_are_gone_before_the_transformer_comes(tiny_checkpoint, tmp_path, train, monkeypatch):
    import gc

    from diffusers import AutoencoderKLCogVideoX
    from transformers import T5EncoderModel

    load, looked = lora.load_transformer, []

    def look_around(*args):
        looked.append(True)
        gc.collect()
        encoders = [thing for thing in gc.get_objects() if isinstance(thing, AutoencoderKLCogVideoX | T5EncoderModel)]
        assert all(weight.device.type == "meta" for encoder in encoders for weight in encoder.parameters())
        return load(*args)

    monkeypatch.setattr("cogvideox.lora.load_transformer", look_around)
    train(tiny_checkpoint, tmp_path / "run", instance_data_root=make_clips(tmp_path / "clips", 1), max_train_steps=1)
    assert looked


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_lora_weight_moves_and_nothing_else_does(checkpoint_of, tmp_path, train, monkeypatch, variant):
    prepared = {}
    add_lora = lora.add_lora

    def keep(transformer, *args, **options):
        add_lora(transformer, *args, **options)
        prepared["transformer"] = transformer
        prepared["before"] = {name: weight.clone() for name, weight in transformer.state_dict().items()}

    monkeypatch.setattr("cogvideox.lora.add_lora", keep)
    train(checkpoint_of(variant), tmp_path / "run", max_train_steps=2)
    after = prepared["transformer"].state_dict()
    moved = {name for name, weight in after.items() if not torch.equal(weight, prepared["before"][name])}
    assert moved == {name for name in after if "lora_" in name}


def test_a_tiny_model_overfits_one_clip(tiny_checkpoint, tmp_path, train):
    every_layer = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_out", "text_proj"]
    rows = train(
        tiny_checkpoint, tmp_path / "run", instance_data_root=make_clips(tmp_path / "clips", 1), max_train_steps=200,
        learning_rate=1e-2, rank=32, lora_target_modules=every_layer, lr_scheduler="cosine", train_batch_size=1,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    first, last = sum(losses(rows[:4])) / 4, sum(losses(rows[-20:])) / 20
    assert last < first / 2


def downloaded(source, cache, name):
    """`source` as huggingface_hub lays a download out: no test has a network."""
    snapshot = cache / name / "snapshots" / ("0" * 40)
    shutil.copytree(source, snapshot)
    (cache / name / "refs").mkdir()
    (cache / name / "refs" / "main").write_text("0" * 40)


def test_hub_names_train_like_folders(tiny_checkpoint, clips, tmp_path, train):
    downloaded(tiny_checkpoint, tmp_path / "hub", "models--someone--tiny")
    downloaded(clips, tmp_path / "hub", "datasets--someone--clips")
    line = training_options("someone/tiny", "-", tmp_path / "a", cache_dir=tmp_path / "hub", max_train_steps=2)
    at = line.index("--instance_data_root")
    line[at : at + 2] = ["--dataset_name", "someone/clips"]
    train_cogvideox_lora.main(train_cogvideox_lora.parse_args(line))
    rows = read_metrics(tmp_path / "a")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert losses(rows) == losses(train(tiny_checkpoint, tmp_path / "b", max_train_steps=2))


# ---- strength


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapter_loads_at_its_trained_strength_with_no_flags(checkpoint_of, tmp_path, train, monkeypatch, variant):
    """And the pipeline then computes what the trained module computed, bit for bit."""
    trained = {}
    add_lora = lora.add_lora
    monkeypatch.setattr(
        lora,
        "add_lora",
        lambda transformer, *args, **options: trained.update(it=transformer) or add_lora(transformer, *args, **options),
    )
    folder = checkpoint_of(variant)
    train(folder, tmp_path / "run", rank=8, lora_alpha=4, max_train_steps=5, learning_rate=1e-2)

    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path / "run")
    scalings = {
        value
        for module in pipeline.transformer.modules()
        if hasattr(module, "lora_A")
        for value in module.scaling.values()
    }
    assert scalings == {0.5}

    inputs = transformer_inputs(folder)
    base = CogVideoXTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    with torch.no_grad():
        ours, theirs, without = (model(**inputs)[0] for model in (trained["it"].eval(), pipeline.transformer, base))
    assert torch.equal(ours, theirs)
    assert not torch.allclose(ours, without, atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_video_of_the_pipeline_changes_with_the_lora(checkpoint_of, tmp_path, train, variant):
    folder = checkpoint_of(variant)
    train(folder, tmp_path / "run", max_train_steps=2, learning_rate=1e-2)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    options = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 2}
    options |= {"image": Image.new("RGB", (96, 64), "red")} if variant.endswith("I2V") else {}

    def sample():
        return pipeline(prompt="a cat", generator=torch.Generator().manual_seed(0), output_type="pt", **options).frames

    without = sample()
    pipeline.load_lora_weights(tmp_path / "run")
    assert without.shape == (1, 9, 3, 64, 96) and torch.isfinite(sample()).all()
    assert not torch.allclose(sample(), without, atol=1e-4)


@pytest.mark.parametrize("variant", ["5b-I2V", "1.5-5B-I2V"])
def test_validation_starts_from_the_images_given_or_from_the_clips(checkpoint_of, tmp_path, train, variant):
    """Three prompts, an image for the second of them; the same prompt with another image is another video."""
    Image.new("RGB", (50, 80), "blue").save(tmp_path / "blue.png")
    started = []
    sample = sample_video

    def watch(*args, image, **options):
        started.append(image)
        return sample(*args, image=image, num_inference_steps=2, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("run.validation.sample_video", watch)
        train(
            checkpoint_of(variant), tmp_path / "run", max_train_steps=1, validation_prompt="a cat:::a cat:::a dog",
            validation_images=f":::{tmp_path}/blue.png:::", validate_first=False,
        )  # fmt: skip
    assert [image.shape for image in started] == [(64, 96, 3)] * 3
    assert (started[1] == torch.tensor([0, 0, 255])).all()
    assert len({image.numpy().tobytes() for image in started}) == 3  # first frames of the first and the third clip
    folder = tmp_path / "run" / "validation" / "step-000001"
    assert len({video.read_bytes() for video in folder.glob("*.mp4")}) == 3


def test_images_of_a_list_train_in_place_of_the_first_frames(checkpoint_of, clips, tmp_path, train):
    """And do not share their cache with them."""
    lines = []
    for i, line in enumerate((clips / "videos.txt").read_text().splitlines()):
        video, times = examine_video(clips / line)
        iio.imwrite(tmp_path / f"{i}.png", next(read_pictures(clips / line, video, times[:1].tolist(), [])))
        lines.append(str(tmp_path / f"{i}.png"))
    Image.new("RGB", (64, 64)).save(tmp_path / "5.png")
    (clips / "images.txt").write_text("\n".join(lines) + "\n")
    options = {"max_train_steps": 6, "learning_rate": 1e-30}  # still weights: a loss depends on its clip alone
    first = losses(train(checkpoint_of("5b-I2V"), tmp_path / "a", **options))
    listed = losses(train(checkpoint_of("5b-I2V"), tmp_path / "b", image_column="images.txt", **options))
    assert sum(a == b for a, b in zip(first, listed)) == 5


# ---- what must not matter


def test_validation_leaves_training_as_it_is(tiny_checkpoint, tmp_path, train):
    without = train(tiny_checkpoint, tmp_path / "a", max_train_steps=5)
    options = {"validation_prompt": "a cat:::a dog", "validation_steps": 2, "num_validation_videos": 2}
    with_validation = train(tiny_checkpoint, tmp_path / "b", max_train_steps=5, **options)
    assert losses(without) == losses(with_validation)
    assert_equal_weights(lora_of(tmp_path / "a"), lora_of(tmp_path / "b"))
    assert sorted(path.name for path in (tmp_path / "b" / "validation").iterdir()) == [
        "step-000000", "step-000002", "step-000004", "step-000005"
    ]  # fmt: skip


def test_gradient_checkpointing_and_workers_leave_the_losses_as_they_are(tiny_checkpoint, tmp_path, train):
    plain = train(tiny_checkpoint, tmp_path / "a", max_train_steps=4)
    other = train(
        tiny_checkpoint, tmp_path / "b", max_train_steps=4, gradient_checkpointing=True, dataloader_num_workers=2
    )
    assert losses(other) == pytest.approx(losses(plain), rel=1e-5)


def test_another_seed_gives_other_losses_and_the_same_seed_the_same(tiny_checkpoint, tmp_path, train):
    runs = [
        losses(train(tiny_checkpoint, tmp_path / str(i), max_train_steps=3, seed=seed))
        for i, seed in enumerate((1, 1, 2))
    ]
    assert runs[0] == runs[1] != runs[2]


RESUMABLE = {"max_train_steps": 7, "gradient_accumulation_steps": 2, "lr_scheduler": "cosine", "checkpointing_steps": 3}


def test_a_killed_run_that_resumes_equals_a_straight_run(tiny_checkpoint, clips, tmp_path, train):
    """Losses, learning rates and weights, bit for bit, after SIGKILL."""
    straight = train(tiny_checkpoint, tmp_path / "straight", random_flip=True, **RESUMABLE)
    options = training_options(tiny_checkpoint, clips, tmp_path / "killed", random_flip=True, **RESUMABLE)
    script = [sys.executable, ROOT / "tests" / "kill_after_checkpoint.py", "saved", "3"]
    assert subprocess.run([*script, *options], capture_output=True).returncode == -signal.SIGKILL
    assert [row["step"] for row in read_metrics(tmp_path / "killed")] == [1, 2, 3]

    resumed = train(
        tiny_checkpoint, tmp_path / "killed", random_flip=True, resume_from_checkpoint="latest", **RESUMABLE
    )
    for name in ("step", "epoch", "loss", "lr", "grad_norm"):
        assert [row[name] for row in resumed] == [row[name] for row in straight]
    assert_equal_weights(lora_of(tmp_path / "straight"), lora_of(tmp_path / "killed"))


def test_a_checkpoint_is_complete_or_absent(tiny_checkpoint, clips, tmp_path, train):
    options = training_options(tiny_checkpoint, clips, tmp_path / "run", **RESUMABLE | {"checkpoints_total_limit": 1})
    script = [sys.executable, ROOT / "tests" / "kill_after_checkpoint.py", "saving", "6"]
    assert subprocess.run([*script, *options], capture_output=True).returncode == -signal.SIGKILL
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-3"]
    rows = train(
        tiny_checkpoint, tmp_path / "run", resume_from_checkpoint="latest", checkpoints_total_limit=1, **RESUMABLE
    )
    assert [row["step"] for row in rows] == list(range(1, 8))
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-7"]
    assert not list((tmp_path / "run").glob(".*"))


def test_the_new_checkpoint_is_complete_before_an_old_one_goes(tiny_checkpoint, tmp_path, train, monkeypatch):
    removed = []
    rename = os.rename

    def watch(old, new):
        if old.name.startswith("checkpoint-"):
            removed.append((old.name, [c.name for c in list_checkpoints(tmp_path / "run")]))
        rename(old, new)

    monkeypatch.setattr(checkpoints.os, "rename", watch)
    train(tiny_checkpoint, tmp_path / "run", max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=2)
    assert removed == [
        ("checkpoint-1", ["checkpoint-1", "checkpoint-2", "checkpoint-3"]),
        ("checkpoint-2", ["checkpoint-2", "checkpoint-3", "checkpoint-4"]),
    ]


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "prodigy"])
def test_a_finished_run_can_be_extended(tiny_checkpoint, tmp_path, train, optimizer):
    """With the whole state of its optimizer, also what Prodigy knows of its step size."""
    if optimizer == "prodigy":
        pytest.importorskip("prodigyopt", reason="an optional package, in requirements-dev.txt")
    options = {"optimizer": optimizer, "learning_rate": 1.0 if optimizer == "prodigy" else 1e-2, "use_dora": True}
    straight = train(tiny_checkpoint, tmp_path / "a", max_train_steps=5, **options)
    train(tiny_checkpoint, tmp_path / "b", max_train_steps=3, **options)
    longer = train(tiny_checkpoint, tmp_path / "b", max_train_steps=5, resume_from_checkpoint="latest", **options)
    assert losses(longer) == losses(straight)
    assert_equal_weights(lora_of(tmp_path / "a"), lora_of(tmp_path / "b"))


@pytest.mark.parametrize("accumulation", [1, 3, 4])
def test_a_resumed_run_may_have_updates_of_another_size(tiny_checkpoint, tmp_path, train, accumulation):
    """The clips and their noise go on where they were, now in other portions, and every portion counts in full."""
    options = {"learning_rate": 1e-30}  # still weights: a loss depends on its clips alone
    train(tiny_checkpoint, tmp_path / "run", max_train_steps=3, gradient_accumulation_steps=2, **options)
    later = {"max_train_steps": 5, "gradient_accumulation_steps": accumulation, "resume_from_checkpoint": "latest"}
    later["change"] = "batch"
    rows = train(tiny_checkpoint, tmp_path / "run", **options, **later)[3:]
    singles = losses(train(tiny_checkpoint, tmp_path / "one", max_train_steps=14, **options))
    portions = [singles[first : first + accumulation] for first in (6, 6 + accumulation)]
    assert losses(rows) == pytest.approx([sum(portion) / accumulation for portion in portions], rel=1e-4)
    assert [row["epoch"] for row in rows] == pytest.approx([(6 + n * accumulation) / 6 for n in (1, 2)], abs=1e-4)


def test_a_run_branches_off_from_a_checkpoint_of_another(tiny_checkpoint, tmp_path, train):
    options = {"max_train_steps": 4, "checkpointing_steps": 2}
    straight = train(tiny_checkpoint, tmp_path / "a", **options)
    branch = train(tiny_checkpoint, tmp_path / "b", resume_from_checkpoint=tmp_path / "a" / "checkpoint-2", **options)
    assert losses(branch) == losses(straight)


# ---- options that change the course


@pytest.mark.parametrize(
    "name", sorted({"linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup"})
)
def test_schedules_warm_up_and_end_where_they_should(tiny_checkpoint, tmp_path, train, name):
    rows = train(
        tiny_checkpoint, tmp_path / "run", max_train_steps=8, lr_scheduler=name, lr_warmup_steps=2, learning_rate=1e-3
    )
    rates = [row["lr"] for row in rows]
    assert rates[:3] == pytest.approx([0, 5e-4, 1e-3])
    assert rates[-1] == pytest.approx(1e-3) if name == "constant_with_warmup" else rates[-1] < 3e-4


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "prodigy"])
def test_optimizers_train(tiny_checkpoint, tmp_path, train, optimizer):
    if optimizer == "prodigy":
        pytest.importorskip("prodigyopt", reason="an optional package, in requirements-dev.txt")
    rate = 1.0 if optimizer == "prodigy" else 1e-3
    rows = train(tiny_checkpoint, tmp_path / "run", max_train_steps=3, optimizer=optimizer, learning_rate=rate)
    assert all(row["grad_norm"] > 0 for row in rows)
    assert all(weight.abs().max() > 0 for weight in lora_of(tmp_path / "run").values())


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_every_precision_trains_float32_lora_weights(tiny_checkpoint, tmp_path, train, precision):
    rows = train(tiny_checkpoint, tmp_path / "run", max_train_steps=3, mixed_precision=precision)
    assert all(0 < row["loss"] < 5 for row in rows)
    lora = lora_of(tmp_path / "run")
    assert {weight.dtype for weight in lora.values()} == {torch.float32}
    assert all(weight.abs().max() > 0 for weight in lora.values())


def test_scale_lr_multiplies_by_the_clips_of_an_update(tiny_checkpoint, tmp_path, train):
    rows = train(
        tiny_checkpoint, tmp_path / "run", max_train_steps=1, scale_lr=True, train_batch_size=2,
        gradient_accumulation_steps=3, learning_rate=1e-4,
    )  # fmt: skip
    assert rows[0]["lr"] == pytest.approx(6e-4)


def test_clips_of_different_length_train_together(tiny_checkpoint, tmp_path, train):
    clips = make_clips(tmp_path / "clips", count=2)
    short = make_clips(tmp_path / "short", count=2, num_frames=8)
    for name in ("prompts.txt", "videos.txt"):
        lines = (short / name).read_text().splitlines()
        lines = [str(short / line) for line in lines] if name == "videos.txt" else lines
        (clips / name).write_text((clips / name).read_text() + "\n".join(lines))
    train(tiny_checkpoint, tmp_path / "run", instance_data_root=clips, train_batch_size=4, num_train_epochs=2)
    assert len(read_metrics(tmp_path / "run")) == 4  # two batches an epoch, one of each shape


def test_tensorboard_gets_scalars_and_moving_pictures(tiny_checkpoint, tmp_path, train):
    pytest.importorskip("tensorboard", reason="an optional package, in requirements-dev.txt")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(
        tiny_checkpoint, tmp_path / "run", max_train_steps=2, report_to="tensorboard", validation_prompt="a cat",
        tracker_name="name",
    )  # fmt: skip
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "name"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    images = events.Images("validation/prompt-00_seed-3407")
    assert [image.step for image in images] == [0, 2]
    assert all(image.encoded_image_string.startswith(b"GIF89a") for image in images)


def test_an_option_that_the_checkpoint_overrules_is_refused_on_resuming(tiny_checkpoint, tmp_path, train, capsys):
    train(tiny_checkpoint, tmp_path / "run", max_train_steps=1, checkpointing_steps=1)
    with pytest.raises(SystemExit) as stop:
        train(tiny_checkpoint, tmp_path / "run", resume_from_checkpoint="latest", learning_rate=5e-4)
    assert stop.value.code == 2
    assert "--learning_rate 0.0005: checkpoint-1 was trained with 0.001" in capsys.readouterr().err


def test_only_options_that_were_given_are_listed_on_resuming(tiny_checkpoint, tmp_path, train, capsys):
    """Without --lora_alpha it follows --rank, which is then the one to mend; given, or differing, it is listed."""

    def refused(**options):
        with pytest.raises(SystemExit):
            train(tiny_checkpoint, tmp_path / "run", resume_from_checkpoint="latest", **options)
        AcceleratorState._reset_state(reset_partial_state=True)
        return capsys.readouterr().err

    train(tiny_checkpoint, tmp_path / "run", max_train_steps=1)
    error = refused(rank=8)
    assert "--rank 8: checkpoint-1 was trained with 4" in error and "--lora_alpha" not in error
    assert "A resumed run keeps --rank of its checkpoint: pass the same; or start" in error
    assert "--lora_alpha 2.0: checkpoint-1 was trained with 4" in refused(rank=8, lora_alpha=2)
    assert "--lora_alpha 2.0: checkpoint-1 was trained with 4" in refused(lora_alpha=2)
    error = refused(optimizer="prodigy", learning_rate=1.0)
    assert "--optimizer prodigy: " in error and "--learning_rate 1.0: checkpoint-1 was trained with 0.001" in error


def test_parse_args_fills_what_depends_on_another_option():
    args = train_cogvideox_lora.parse_args(training_options("m", "d", "o", rank=16))
    assert args.lora_alpha == 16
