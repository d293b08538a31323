"""Is it learning? Clips held out, their loss at fixed noise, the best checkpoint, the averages."""

import json
import shlex
from statistics import fmean
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import training_options
from safetensors.torch import load_file

import cli_demo
import dataset
import train_cogvideox_lora
from clips.entries import write_entry
from clips.frames import View, read_frames
from clips.motion import motion
from clips.order import Item, Ranks
from cogvideox.base_model import load_transformer, read_base_model
from cogvideox.budget import MemoryPlan
from cogvideox.lora_files import LORA_FILE
from cogvideox.objective import generator_for, sample_latents
from run import validation
from run.run_directory import METRICS_FILE, STATE_TENSORS
from run.signals import StopRequest

TIMESTEPS = [125, 375, 625, 875]


def data_of(names):
    """Clips whose latents lie in files of these names."""
    clips = dataset.CachedClips([[name] for name in names], [[f"caption {i}"] for i in range(len(names))])
    return dataset.Data(clips, [(8, 3, 8, 12)] * len(names), {})


@pytest.mark.parametrize(("split", "count"), [(0, 0), (0.2, 2), (0.01, 1), (1, 1), (3, 3), (9, 9)])
def test_so_many_are_held_out(split, count):
    train, held_out, _ = data_of([f"video {i}" for i in range(10)]).split(split, seed=1)
    assert len(held_out.shapes) == count and len(train.shapes) == 10 - count
    together = train.clips.captions + held_out.clips.captions
    assert sorted(together) == [[f"caption {i}"] for i in range(10)]


def test_the_seed_decides_which_and_nothing_else():
    names = [f"video {i}" for i in range(10)]
    chosen = [data_of(names).split(3, seed)[1].clips.captions for seed in (1, 1, 2)]
    elsewhere = data_of([f"another cache/{name}" for name in names]).split(3, 1)[1].clips.captions
    assert chosen[0] == chosen[1] == elsewhere != chosen[2]


def test_a_video_that_is_listed_twice_is_not_in_both():
    for seed in range(20):
        train, held_out, _ = data_of(["a", "b", "a", "c", "b", "a"]).split(1, seed)
        assert not {name for (name,) in train.clips.latents} & {name for (name,) in held_out.clips.latents}


@pytest.mark.parametrize("split", ["6", "7", "0.95"])
def test_something_must_be_left_to_train_on(split, tiny_checkpoint, clips, tmp_path, train, capsys):
    with pytest.raises(SystemExit) as end:
        train(tiny_checkpoint, tmp_path / "run", validation_split=split)
    assert end.value.code == 2
    assert f"--validation_split {split}: holds out all of the 6 videos; hold out fewer" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_loss_on_held_out_clips_is_the_training_loss_at_fixed_noise(tiny_checkpoint, clips, tmp_path, train):
    """Computed here once more, from the cache and the formula; two of six clips, before any update."""
    rows = train(tiny_checkpoint, tmp_path / "run", validation_split=2, max_train_steps=1)
    checkpoint = read_base_model(str(tiny_checkpoint))
    transformer = load_transformer(checkpoint, torch.float32)
    lines = (clips / "prompts.txt").read_text().splitlines()
    stub = dataset.Data(dataset.CachedClips([[i] for i in range(6)], [[line] for line in lines]), [()] * 6, {})
    captions = stub.split(2, 3407)[1].clips.captions
    args = train_cogvideox_lora.parse_args(training_options(tiny_checkpoint, clips, tmp_path, validation_split=2))
    _, held_out = cached(args, checkpoint)
    assert len(captions) == len(held_out.shapes) == 2
    expected = {}
    for timestep in TIMESTEPS:
        losses = []
        for clip in range(2):
            generator = generator_for(torch.device("cpu"), 3407, "held out", clip, timestep)
            item = held_out.clips[Item(clip)]
            latents = sample_latents(item["parameters"][None], checkpoint.vae["scaling_factor"], generator)
            noise = torch.randn(latents.shape, generator=generator)
            t = torch.tensor([timestep])
            with torch.no_grad():
                predicted = transformer(
                    checkpoint.scheduler.add_noise(latents, noise, t), item["prompt_embeds"][None], t
                ).sample
            losses.append((predicted - checkpoint.scheduler.get_velocity(latents, noise, t)).square().mean().item())
        expected[f"validation_loss_t{timestep}"] = fmean(losses)
    assert rows[0]["step"] == 0
    assert {name: rows[0][name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert rows[0]["validation_loss"] == pytest.approx(fmean(expected.values()), rel=1e-5)


def cached(args, checkpoint):
    class Here:
        mixed_precision = "no"
        device, is_main_process, print = torch.device("cpu"), False, staticmethod(print)

    whole = MemoryPlan("none", tile_encoding=False, tile_decoding=False)
    _, parts = train_cogvideox_lora.prepare_data(
        args, Here, Ranks(), base=checkpoint, dtype=torch.float32, memory_plan=whole, stop=StopRequest()
    )
    return parts.training, parts.held_out


def test_every_kind_of_checkpoint_has_the_four_parts_of_its_schedule():
    assert validation.quantiles(1000) == TIMESTEPS


def test_validation_on_held_out_clips_leaves_training_as_it_is(tiny_checkpoint, tmp_path, train):
    """Also that of the moving average, with dropout on; only what is trained on changes with the split."""
    options = {"validation_split": 2, "max_train_steps": 4, "lora_dropout": 0.3}
    often = train(tiny_checkpoint, tmp_path / "a", validation_steps=1, ema_decay=0.5, **options)
    once = train(tiny_checkpoint, tmp_path / "b", validate_first=False, **options)[:-1]
    often = [row for row in often if "loss" in row]
    for name in ("loss", "grad_norm", "loss_smoothed"):
        assert [row[name] for row in often] == [row[name] for row in once if "loss" in row]


def test_the_best_checkpoint_is_that_of_the_lowest_loss_and_never_the_base_model(tiny_checkpoint, tmp_path, train):
    rows = train(
        tiny_checkpoint, tmp_path / "run", validation_split=2, validation_steps=2, max_train_steps=8,
        checkpointing_steps=2, learning_rate=0.1,
    )  # fmt: skip
    losses = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    assert list(losses) == [0, 2, 4, 6, 8]
    best = min((loss, step) for step, loss in losses.items() if step)[1]
    folder = tmp_path / "run" / "checkpoint-best"
    assert json.loads((folder / "best.json").read_text())["step"] == best
    ours, theirs = (load_file(path / LORA_FILE) for path in (folder, tmp_path / "run" / f"checkpoint-{best}"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_moving_average_is_what_is_saved(tiny_checkpoint, tmp_path, train):
    """Computed here once more, from the weights in training that each checkpoint holds."""
    decay, steps = 0.7, 5
    train(tiny_checkpoint, tmp_path / "run", ema_decay=decay, max_train_steps=steps, checkpointing_steps=1)
    states = [torch.load(tmp_path / "run" / f"checkpoint-{step}" / STATE_TENSORS) for step in range(1, steps + 1)]
    for name, average in states[-1]["average"].items():
        expected = states[0]["transformer"][name]  # the first update replaces what is not trained yet
        for n, state in enumerate(states[1:], start=1):
            now = min(decay, (1 + n) / (10 + n))
            expected = now * expected + (1 - now) * state["transformer"][name]
        assert torch.allclose(average, expected, atol=1e-7)
        assert not torch.equal(average, states[-1]["transformer"][name])
    saved = load_file(tmp_path / "run" / LORA_FILE)
    kept = {name.replace(".default", ""): value for name, value in states[-1]["average"].items()}
    assert all(torch.equal(value, kept[name.removeprefix("transformer.")]) for name, value in saved.items())


def test_a_resumed_run_goes_on_with_average_best_and_smoothed_loss(tiny_checkpoint, tmp_path, train):
    options = {"validation_split": 0.3, "ema_decay": 0.6, "checkpointing_steps": 2, "validation_steps": 2}
    straight = train(tiny_checkpoint, tmp_path / "a", max_train_steps=6, **options)
    train(tiny_checkpoint, tmp_path / "b", max_train_steps=2, **options)
    resumed = train(tiny_checkpoint, tmp_path / "b", max_train_steps=6, resume_from_checkpoint="latest", **options)
    for row in straight + resumed:
        row.pop("seconds", None)
        del row["peak_memory_gib"]
    assert resumed == straight
    for place in ("", "checkpoint-best"):
        one, two = (load_file(tmp_path / run / place / LORA_FILE) for run in "ab")
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_validation_that_was_missed_is_made_up_for(tiny_checkpoint, tmp_path, train):
    """As after a kill between a checkpoint and its validation."""
    options = {"validation_split": 2, "checkpointing_steps": 2, "validation_steps": 2, "max_train_steps": 4}
    straight = train(tiny_checkpoint, tmp_path / "run", **options)
    path = tmp_path / "run" / METRICS_FILE
    path.write_text("".join(line for line in path.read_text().splitlines(True) if '"step": 4, ' not in line))
    resumed = train(tiny_checkpoint, tmp_path / "run", resume_from_checkpoint="latest", **options)
    assert resumed[-1]["validation_loss"] == straight[-1]["validation_loss"]


# ---- motion ----------------------------------------------------------------------------------------------------------


def test_the_motion_of_the_videos_is_logged_beside_that_of_the_clips(tiny_checkpoint, clips, tmp_path, train):
    """Computed here once more, from the clips and from the videos, of whose noise an mp4 loses some."""
    options = {"validation_prompt": "a cat:::a dog", "validation_split": 2, "validation_steps": 2, "max_train_steps": 2}
    rows = train(tiny_checkpoint, tmp_path / "run", **options)
    rows = [row for row in rows if "validation_loss" in row]
    assert [row["step"] for row in rows] == [0, 2]
    for row in rows:
        videos = sorted((tmp_path / "run").glob(f"validation/step-{row['step']:06d}/*.mp4"))
        sampled = [motion(torch.from_numpy(iio.imread(video)), 8) for video in videos]
        assert len(videos) == 2 and row["validation_motion"] == pytest.approx(fmean(sampled), rel=0.2)
    seen = View(64, 96, 8, 9, 0, 0, "center", 0)
    files = [clips / name for name in (clips / "videos.txt").read_text().split()]
    data = dataset.Data(dataset.CachedClips([[file] for file in files], [[]] * 6), [()] * 6, {})
    held_out = data.split(2, 3407).held_out
    trained_on = [file for file in files if [file] not in held_out.clips.latents]
    expected = [motion(read_frames(file, seen, mirrored=False), 8) for file in trained_on]
    assert len(expected) == 4
    assert [row["data_motion"] for row in rows] == pytest.approx([fmean(expected)] * 2)


def test_the_motion_of_clips_is_left_out_where_an_earlier_version_has_encoded_one(tiny_checkpoint, tmp_path, train):
    """And nothing is encoded again, nor does anything else change."""
    options = {"validation_prompt": "a cat", "max_train_steps": 2, "latents_cache_dir": tmp_path / "cache"}
    first = train(tiny_checkpoint, tmp_path / "a", **options)
    assert [row["step"] for row in first if "data_motion" in row] == [0, 2]
    entry = sorted((tmp_path / "cache" / "latents").iterdir())[0]
    write_entry(entry, load_file(entry))
    before = entry.stat().st_mtime_ns
    second = train(tiny_checkpoint, tmp_path / "b", **options)
    assert entry.stat().st_mtime_ns == before and not any("data_motion" in row for row in second)
    for name in ("step", "loss", "grad_norm", "validation_motion"):
        assert [row.get(name) for row in first] == [row.get(name) for row in second]


def test_motion_of_clips_is_told_at_the_rate_of_the_videos():
    """Where a clip is stretched, the model sees it faster."""
    view = View(64, 96, 8, 9, 0, 0, "center", 0)
    clip = SimpleNamespace(num_seen=9, motion=20.0, view=view)
    slow, still = (SimpleNamespace(num_seen=9, motion=2.0, view=view._replace(fps=2)), SimpleNamespace(num_seen=1))
    data = data_of(["a", "b", "c"])
    assert data._replace(facts=[clip, slow, still]).motion(8) == 14
    assert data._replace(facts=[clip, SimpleNamespace(num_seen=9, motion=None)]).motion(8) is None
    assert data._replace(facts=[still]).motion(8) is None and data.motion(8) is None


@pytest.mark.parametrize(
    ("sampled", "base", "data", "remarked"),
    [
        (9.9, 20, 20, True),
        (10.1, 20, 20, False),
        (9, 20, None, True),
        (9, None, 20, True),
        (9, None, None, False),
        (0.5, 20, 0.1, True),  # stills: it dies as it does in the data
        (6, 5, 20, False),  # on the way up from a base model that moves less
        (4, 5, 20, True),
        (6, 20, 5, True),
        (0, 0, 0, False),
    ],
)
def test_motion_that_falls_to_less_than_half_is_remarked_on(sampled, base, data, remarked):
    remark = validation.remark_on_motion(sampled, base, data)
    assert bool(remark) == remarked
    if remarked:
        assert f"by {sampled:.1f} levels" in remark and "docs/data.md" in remark


def test_motion_that_dies_is_said_in_the_run(tiny_checkpoint, tmp_path, train, monkeypatch, capsys):
    measured = iter([20.0, 9.0, 18.0])
    monkeypatch.setattr(validation, "motion", lambda frames, fps: next(measured))
    options = {"validation_prompt": "a cat", "validation_steps": 2, "max_train_steps": 4}
    rows = train(tiny_checkpoint, tmp_path / "run", **options)
    assert [row["validation_motion"] for row in rows if "validation_motion" in row] == [20, 9, 18]
    lines = [line for line in capsys.readouterr().out.splitlines() if "move little" in line]
    data = next(row["data_motion"] for row in rows if "data_motion" in row)
    found = f"by 9.0 levels of 255 per second, the base model's by 20.0 and the training clips by {data:.1f}; "
    assert len(lines) == 1 and lines[0].startswith(f"update 2: the validation videos move little, {found}")


def test_the_smoothed_loss_is_a_mean_at_first(tiny_checkpoint, tmp_path, train):
    rows = train(tiny_checkpoint, tmp_path / "run", max_train_steps=10)
    assert rows[-1]["loss_smoothed"] == pytest.approx(fmean(row["loss"] for row in rows), rel=1e-6)


# ---- videos


def told_comment(video):
    return iio.immeta(video, plugin="pyav")["comment"]


def told_command(video):
    """What the metadata of a video says, as arguments of cli_demo.py."""
    words = shlex.split(told_comment(video))
    assert words[:2] == ["python", "cli_demo.py"]
    return words[2:]


@pytest.mark.parametrize("variant, options", [
    ("2b", {"use_dynamic_cfg": True, "guidance_scale": 3.0, "ema_decay": 0.9, "mixed_precision": "bf16"}),
    ("5b-I2V", {}),
    ("2b", {"training_type": "sft"}),
], ids=["2b", "5b-I2V", "sft"])  # fmt: skip
def test_the_command_in_a_validation_video_makes_it_again_bit_for_bit(
    variant, options, checkpoint_of, tmp_path, train, monkeypatch
):
    """Before training, at a checkpoint, and at the end; the second video of a prompt has the seed plus 1."""
    monkeypatch.setattr("cogvideox.sampling.NUM_INFERENCE_STEPS", 2)
    options |= {"validation_steps": 1, "checkpointing_steps": 1, "max_train_steps": 2, "learning_rate": 0.05}
    prompt = 'a cat\'s "tail"'
    train(checkpoint_of(variant), tmp_path / "run", validation_prompt=prompt, num_validation_videos=2, **options)
    videos = sorted((tmp_path / "run" / "validation").glob("step-*/*.mp4"))
    made = {video: iio.imread(video) for video in videos}
    assert [video.name for video in videos] == 3 * ["prompt-00_seed-3407.mp4", "prompt-00_seed-3408.mp4"]
    assert len({frames.tobytes() for frames in made.values()}) == len(made)
    for video in (videos[0], videos[3], videos[4]):
        words = ["--num_inference_steps", "2", "--output_path", str(tmp_path / "again.mp4")]
        cli_demo.main(cli_demo.parse_args([*told_command(video), *words]))
        assert np.array_equal(iio.imread(tmp_path / "again.mp4"), made[video]), video


def test_the_command_in_a_video_names_weights_that_are_saved(tiny_checkpoint, tmp_path, train, monkeypatch):
    """Where the best is the result, the last weights are in a checkpoint only; at other validations nowhere."""
    monkeypatch.setattr("cogvideox.sampling.NUM_INFERENCE_STEPS", 2)
    options = {"validation_steps": 1, "checkpointing_steps": 3, "max_train_steps": 2, "validation_split": 2}
    train(tiny_checkpoint, tmp_path, validation_prompt="a cat", result="best", **options)
    _, first, last = sorted((tmp_path / "validation").glob("step-*/*.mp4"))
    assert str(tmp_path / "checkpoint-2") in told_command(last)
    assert told_comment(first) == f"update 1 of {tmp_path}, whose weights were not saved"


def test_the_last_validation_is_what_cli_demo_makes_of_the_run_directory(tiny_checkpoint, tmp_path, train, monkeypatch):
    monkeypatch.setattr("cogvideox.sampling.NUM_INFERENCE_STEPS", 2)
    train(tiny_checkpoint, tmp_path / "run", validation_prompt="a cat", max_train_steps=1, learning_rate=0.05)
    options = ["--lora_path", tmp_path / "run", "--prompt", "a cat", "--seed", 3407, "--num_inference_steps", 2]
    options += ["--output_path", tmp_path / "again.mp4"]
    cli_demo.main(cli_demo.parse_args(list(map(str, options))))
    again = iio.imread(tmp_path / "again.mp4")
    for step, is_same in ((1, True), (0, False)):
        (video,) = (tmp_path / "run" / "validation" / f"step-00000{step}").glob("*.mp4")
        assert np.array_equal(again, iio.imread(video)) == is_same
