"""Runs on clips of several sizes and lengths, images among them: the real script on a tiny model."""

import json
import re
import shutil

import imageio
import pytest
import torch
from conftest import ROOT, training_options
from make_example import draw_clip
from PIL import Image
from safetensors.torch import load_file
from test_distributed import lora_of, rows_of, torchrun

import dataset
import train_cogvideox_lora
from clips import check, export
from cogvideox.objective import training_loss
from run.run_directory import read_metrics

BUCKETS = ["9x64x96", "9x96x64", "1x64x96"]
MIXED = {"buckets": BUCKETS, "random_flip": True, "lr_scheduler": "constant"}
FRAMES = {"landscape": (40, 96, 144), "portrait": (40, 144, 96), "long": (120, 96, 144)}  # at 24 fps


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Four landscape clips, three portrait ones, a long one, and four images, each with a caption beside it."""
    folder = tmp_path_factory.mktemp("mixed")
    kinds = ["landscape"] * 4 + ["portrait"] * 3 + ["long"]
    for number, kind in enumerate(kinds):
        shape, colour = ("circle", "square")[number % 2], ("red", "blue", "green")[number % 3]
        frames = draw_clip(shape, colour, "left", *FRAMES[kind])
        imageio.mimsave(folder / f"{number}-{kind}.mp4", frames, fps=24, macro_block_size=1)
        (folder / f"{number}-{kind}.txt").write_text(f"a {colour} {shape}, number {number}")
    for number, colour in enumerate(["red", "blue", "green", "white"]):
        Image.new("RGB", (144, 96), colour).save(folder / f"still-{number}.png")
        (folder / f"still-{number}.txt").write_text(f"a {colour} picture")
    return folder


@pytest.fixture
def batches(monkeypatch):
    """Shapes of the latents that the loss is computed on, and the captions' embeddings, in order."""
    seen = []

    def watch(base, transformer, batch, *args, **options):
        seen.append((tuple(batch["parameters"].shape), batch["prompt_embeds"]))
        return training_loss(base, transformer, batch, *args, **options)

    monkeypatch.setattr(train_cogvideox_lora, "training_loss", watch)
    return seen


def test_each_clip_is_trained_at_its_bucket_and_the_start_says_so(
    tiny_checkpoint, mixed, tmp_path, train, batches, capsys
):
    train(tiny_checkpoint, tmp_path / "run", instance_data_root=mixed, num_train_epochs=2, **MIXED)
    said = capsys.readouterr().out
    assert "12 clips of 96x144 to 144x96 at 8 to 24 fps -> 5 of 9x64x96, 3 of 9x96x64, 4 of 1x64x96" in said
    shapes = [shape for shape, _ in batches]
    for epoch in (shapes[:12], shapes[12:]):
        assert sorted(epoch) == sorted([(1, 8, 3, 8, 12)] * 5 + [(1, 8, 3, 12, 8)] * 3 + [(1, 8, 1, 8, 12)] * 4)
    options = json.loads((tmp_path / "run" / "args.json").read_text())["options"]
    assert options["buckets"] == BUCKETS


def test_the_start_says_how_many_images_a_share_shows_and_which_bucket_stays_empty(
    tiny_checkpoint, mixed, tmp_path, train, batches, capsys
):
    options = MIXED | {"buckets": [*BUCKETS, "17x64x64"], "image_share": 0.6, "num_train_epochs": 1}
    train(tiny_checkpoint, tmp_path / "run", instance_data_root=mixed, **options)
    said = capsys.readouterr().out
    assert "images: 12 of the 20 clips that an epoch shows, drawn from 4" in said
    assert "--buckets: no clip goes to 17x64x64" in said
    assert [shape[2] for shape, _ in batches].count(1) == 12


def test_auto_finds_the_sizes_and_the_lengths(tiny_checkpoint, mixed, tmp_path, train, batches, capsys):
    train(tiny_checkpoint, tmp_path / "run", instance_data_root=mixed, buckets="auto", num_train_epochs=1)
    assert "-> 5 of 9x64x96, 3 of 9x96x64, 4 of 1x64x96 (frames x height x width)" in capsys.readouterr().out
    assert {shape[3:] for shape, _ in batches} == {(8, 12), (12, 8)}


def test_a_resumed_run_on_mixed_sizes_equals_a_straight_one(tiny_checkpoint, mixed, tmp_path, train):
    options = MIXED | {"caption_dropout": 0.2, "image_share": 0.25, "train_batch_size": 2, "validation_split": 2}
    options |= {"clip_mode": "random", "clips_per_video": 3, "checkpointing_steps": 7, "instance_data_root": mixed}
    options |= {"id_token": "X", "preserve": 1, "lora_dropout": 0.1}
    straight = train(tiny_checkpoint, tmp_path / "straight", max_train_steps=20, **options)
    train(tiny_checkpoint, tmp_path / "resumed", max_train_steps=7, **options)
    resumed = train(
        tiny_checkpoint, tmp_path / "resumed", max_train_steps=20, resume_from_checkpoint="latest", **options
    )
    losses = [[row.get("loss", row.get("validation_loss")) for row in rows] for rows in (straight, resumed)]
    assert losses[0][-13:] == losses[1][-13:]
    ours, theirs = lora_of(tmp_path / "straight"), lora_of(tmp_path / "resumed")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_ranks_on_mixed_sizes_equal_one(tiny_checkpoint, mixed, tmp_path, train):
    options = MIXED | {"instance_data_root": mixed, "max_train_steps": 8, "bucket_group": 2, "id_token": "X"}
    options |= {"preserve": 1, "preserve_every": 2, "lora_dropout": 0.1}
    line = training_options(tiny_checkpoint, options.pop("instance_data_root"), tmp_path / "two", **options)
    torchrun(ROOT / "train_cogvideox_lora.py", *line)
    train(tiny_checkpoint, tmp_path / "one", instance_data_root=mixed, gradient_accumulation_steps=2, **options)
    for ours, theirs in zip(rows_of(tmp_path / "two"), rows_of(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    one, two = lora_of(tmp_path / "one"), lora_of(tmp_path / "two")
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


def test_tokens_decide_how_many_clips_a_batch_has(tiny_checkpoint, mixed, tmp_path, train, batches, capsys):
    """A clip of 9x64x96 has 226 + 3 * 4 * 6 tokens, an image 226 + 24."""
    train(
        tiny_checkpoint, tmp_path / "run", instance_data_root=mixed, max_tokens_per_batch=2 * 298, num_train_epochs=1,
        **MIXED,
    )  # fmt: skip
    counts = sorted(shape[:1] + shape[2:] for shape, _ in batches)
    assert counts == [(1, 3, 8, 12), (1, 3, 12, 8)] + [(2, 1, 8, 12)] * 2 + [(2, 3, 8, 12)] * 2 + [(2, 3, 12, 8)]
    assert "clips in each: 2, epochs: 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens_per_batch": 200}, "--max_tokens_per_batch 200: a clip of 9x64x96 .* has 298 tokens"),
        ({"max_tokens_per_batch": 400, "train_batch_size": 2}, "--max_tokens_per_batch: decides the clips in a batch"),
        ({"max_tokens_per_batch": 400, "scale_lr": True}, "--scale_lr: needs batches of one size"),
        ({"image_share": 1}, "--image_share: 1: must be at least 0 and below 1|1: must be at least 0"),
        ({"caption_dropout": -0.1}, "must be at least 0 and below 1"),
        ({"buckets": ["17x64x96"]}, "gives 14 frames at --fps 8, and the shortest bucket has 17.*--drop_unfit"),
        ({"buckets": ["1x64x96"], "image_share": 0.5}, "--image_share 0.5: the clips are only images; add videos"),
        ({"image_share": 0.05}, "--image_share 0.05: an epoch has too few videos for one image; pass at least 0.11"),
    ],
)
def test_what_cannot_work_is_refused(tiny_checkpoint, mixed, tmp_path, train, capsys, options, message):
    with pytest.raises(SystemExit) as end:
        train(tiny_checkpoint, tmp_path / "run", instance_data_root=mixed, **MIXED | options)
    assert end.value.code == 2
    assert re.search(message, capsys.readouterr().err, re.DOTALL)


@pytest.mark.parametrize(
    ("variant", "bucket", "message"),
    [
        ("5b-I2V", "9x96x64", "--buckets 9x96x64: .* has learned positions for 9 frames of 64x96 pixels only"),
        ("5b-I2V", "auto", "--buckets auto: the base model has learned positions for one size only"),
        ("1.5-5B", "9x96x64", "--buckets 9x96x64: the positions of .* end at 64x96 pixels"),
    ],
)
def test_a_size_that_the_base_model_cannot_take_is_refused(
    checkpoint_of, mixed, tmp_path, train, capsys, variant, bucket, message
):
    with pytest.raises(SystemExit):
        train(checkpoint_of(variant), tmp_path / "run", instance_data_root=mixed, buckets=bucket)
    assert re.search(message, capsys.readouterr().err)


def test_a_share_of_images_without_images_is_refused_before_anything_is_encoded(tiny_checkpoint, tmp_path, train):
    with pytest.raises(SystemExit):
        train(tiny_checkpoint, tmp_path / "run", image_share=0.5, latents_cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache" / "latents").exists()


def test_auto_stays_within_the_positions_of_the_base_model(checkpoint_of, mixed, tmp_path, train, batches):
    train(checkpoint_of("1.5-5B"), tmp_path / "run", instance_data_root=mixed, buckets="auto", num_train_epochs=1)
    assert {shape[3:] for shape, _ in batches} == {(8, 12), (6, 4)}  # at most 64 pixels high


def test_clips_that_fit_nowhere_are_left_out_only_where_asked(tiny_checkpoint, mixed, tmp_path, train, capsys):
    rows = train(
        tiny_checkpoint, tmp_path / "run", instance_data_root=mixed, buckets=["17x64x96", "17x96x64"], drop_unfit=True,
        num_train_epochs=1,
    )  # fmt: skip
    assert len(rows) == 1
    said = capsys.readouterr().out
    assert "left out, because too short (--drop_unfit): 0-landscape.mp4, 1-landscape.mp4" in said
    assert "1 clip of 144x96 at 24 fps -> 1 of 17x64x96" in said


def test_all_windows_of_a_video_are_held_out_together(tiny_checkpoint, mixed, tmp_path, monkeypatch, train):
    parts = []

    def watch(data, *args):
        parts.append(split(data, *args))
        return parts[-1]

    split = dataset.Data.split
    monkeypatch.setattr(dataset.Data, "split", watch)
    train(
        tiny_checkpoint, tmp_path / "run", instance_data_root=mixed, clip_mode="chunks", validation_split=5,
        max_train_steps=1,
    )  # fmt: skip
    (whole,) = parts
    training, held_out = ({facts.file.content for facts in part.facts} for part in (whole.training, whole.held_out))
    assert not training & held_out and len(training | held_out) == 12
    assert len(whole.training.facts) + len(whole.held_out.facts) == 11 + 4 and not whole.regularization.facts


def test_windows_of_one_video_are_other_clips_in_the_cache(tiny_checkpoint, mixed, tmp_path, train):
    train(
        tiny_checkpoint, tmp_path / "run", instance_data_root=mixed, clip_mode="uniform", clips_per_video=3,
        latents_cache_dir=tmp_path / "cache", encode_only=True,
    )  # fmt: skip
    entries = [load_file(path)["parameters"] for path in (tmp_path / "cache" / "latents").iterdir()]
    assert len(entries) == 12 + 2 * 8 and len({tuple(entry.flatten().tolist()) for entry in entries}) > 20


def test_captions_are_dropped_to_the_empty_prompt(tiny_checkpoint, mixed, tmp_path, train, batches):
    train(tiny_checkpoint, tmp_path / "run", instance_data_root=mixed, num_train_epochs=4, caption_dropout=0.5)
    embeddings = [tuple(embeds.flatten().tolist()) for _, embeds in batches]
    most, count = max(((one, embeddings.count(one)) for one in set(embeddings)), key=lambda pair: pair[1])
    assert 16 <= count <= 32 and len(embeddings) == 48
    cache = [load_file(path)["prompt_embeds"] for path in (mixed / ".cogvideox_cache" / "captions").iterdir()]
    assert any(tuple(entry.flatten().tolist()) == most for entry in cache)


def test_several_captions_of_a_clip_are_all_trained_on(tiny_checkpoint, mixed, tmp_path, train, batches, capsys):
    folder = tmp_path / "clips"
    folder.mkdir()
    shutil.copy(mixed / "0-landscape.mp4", folder / "a.mp4")
    for name, words in {"a": "a circle", "a.1": "a red circle", "a.2": "a circle that moves left"}.items():
        (folder / f"{name}.txt").write_text(words)
    train(tiny_checkpoint, tmp_path / "run", instance_data_root=folder, num_train_epochs=20)
    assert len({tuple(embeds.flatten().tolist()) for _, embeds in batches}) == 3
    assert "captions without a clip" not in capsys.readouterr().out
    table = tmp_path / "table"
    table.mkdir()
    shutil.copy(mixed / "0-landscape.mp4", table / "a.mp4")
    words = ["a circle", "a red circle", "a circle that moves left"]
    (table / "metadata.jsonl").write_text(json.dumps({"file_name": "a.mp4", "text": words}) + "\n")
    rows = train(tiny_checkpoint, tmp_path / "run-of-table", instance_data_root=table, num_train_epochs=20)
    assert [row["loss"] for row in rows] == [row["loss"] for row in read_metrics(tmp_path / "run")]


def test_check_and_export_see_the_same_windows_as_training(mixed, tmp_path, capsys):
    line = [str(mixed), "--buckets", *BUCKETS, "--clip_mode", "chunks"]
    check.main(line)
    assert (
        "12 clips of 96x144 to 144x96 at 8 to 24 fps in 15 windows -> 8 of 9x64x96, 3 of 9x96x64"
        in capsys.readouterr().out
    )
    export.main([*line, "--output_dir", str(tmp_path / "frames")])
    assert sorted(path.name for path in (tmp_path / "frames").iterdir())[7:12] == [
        "00008", "00008-2", "00008-3", "00008-4", "00009",
    ]  # fmt: skip
    first = json.loads((tmp_path / "frames" / "00008" / "frames.json").read_text())["times"]
    second = json.loads((tmp_path / "frames" / "00008-2" / "frames.json").read_text())["times"]
    assert second[0] - first[-1] == pytest.approx(1 / 8, abs=1 / 48)
    with pytest.raises(SystemExit):
        check.main([str(mixed), "--buckets", "17x64x96"])
    assert "and the shortest bucket has 17" in capsys.readouterr().err


def test_a_validation_video_begins_with_an_image_of_its_own_size(checkpoint_of, mixed, tmp_path, train, monkeypatch):
    """Also where the clip that gives the image is in another bucket."""
    sampled = []

    def watch(*_, image, height, width, **options):
        sampled.append((tuple(image.shape), image.float().mean((0, 1)).tolist()))
        assert (height, width) == (64, 96)
        return [Image.new("RGB", (96, 64))] * 9

    monkeypatch.setattr("run.validation.sample_video", watch)
    prompts = ":::".join(f"prompt {number}" for number in range(12))
    train(
        checkpoint_of("1.5-5B-I2V"), tmp_path / "run", instance_data_root=mixed, buckets=["9x64x96", "5x64x48"],
        max_train_steps=1, validation_prompt=prompts, drop_unfit=True, enable_slicing=True, validate_first=False,
    )  # fmt: skip
    assert [shape for shape, _ in sampled] == [(64, 96, 3)] * 12


def test_memory_is_predicted_for_the_largest_bucket_and_the_fullest_batch(checkpoint_of):
    folder = str(checkpoint_of("5b"))
    base = train_cogvideox_lora.read_base_model(folder)

    def settings(*options):
        line = ["--pretrained_model_name_or_path", folder, "--instance_data_root", "d", *options]
        args = train_cogvideox_lora.parse_args(line)
        return train_cogvideox_lora.memory_settings(args, base, torch.bfloat16, torch.device("cuda"), 1)

    plain = settings("--max_num_frames", "9", "--height", "64", "--width", "96")
    mixed = settings("--buckets", "1x96x96", "9x64x96", "5x64x96")
    assert mixed == plain and mixed.in_training == mixed
    still = settings("--buckets", "1x128x128", "5x64x64")  # fewer pixels, and 64 tokens beside the caption's for 32
    assert (still.max_num_frames, still.height) == (5, 64) and still.in_training.largest_batch == (1, 1, 128, 128)
    shorter = settings("--max_num_frames", "17", "--height", "64", "--width", "96", "--max_tokens_per_batch", "600")
    assert shorter.largest_batch == (2, 9, 64, 96), "one clip of 17 frames has 346 tokens, two of 9 frames 596"
    filled = settings("--buckets", "1x96x96", "9x64x96", "--max_tokens_per_batch", "600")
    assert filled == plain._replace(largest_batch=(2, 9, 64, 96))  # 2 x 298 tokens; of images 2 x 262
    assert (filled.in_training.train_batch_size, filled.in_training.max_num_frames) == (2, 9)
