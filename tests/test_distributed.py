"""Several ranks, on CPU with gloo: started by torchrun and by `accelerate launch`, as users start them."""

import os
import shutil
import subprocess
import sys
from statistics import fmean

import imageio.v3 as iio
import pytest
import torch
from conftest import ROOT, training_options
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file

from clips.motion import motion
from cogvideox.lora_files import LORA_FILE
from run.run_directory import list_checkpoints, read_metrics

RUN = {
    "max_train_steps": 6, "lr_scheduler": "cosine", "checkpointing_steps": 3, "random_flip": True,
    "validation_split": 2, "validation_steps": 3, "ema_decay": 0.5,
}  # fmt: skip
ENVIRONMENT = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def launch(command, expected=0, **environment):
    result = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT | environment,
        timeout=300,
    )
    assert (result.returncode == 0) == (expected == 0), result.stderr[-3000:]
    return result


def torchrun(script, *options, expected=0):
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", 2, script, *options]
    return launch(command, expected)


def rows_of(folder):
    """All that is logged but time, memory and motion; runs with and without validation videos are compared."""
    other = ("seconds", "peak_memory_gib", "validation_motion", "data_motion")
    rows = [{name: value for name, value in row.items() if name not in other} for row in read_metrics(folder)]
    return [row for row in rows if row.keys() - {"step", "epoch"}]


def lora_of(folder):
    return load_file(folder / LORA_FILE)


@pytest.fixture(scope="module")
def two_ranks(tiny_checkpoint, clips, tmp_path_factory):
    """A straight run of two ranks with accumulation 2."""
    folder = tmp_path_factory.mktemp("two") / "run"
    options = {"gradient_accumulation_steps": 2, "validation_prompt": "a cat:::a dog:::a cow"}
    options = training_options(tiny_checkpoint, clips, folder, **RUN | options)
    result = torchrun(ROOT / "train_cogvideox_lora.py", *options)
    return folder, result


def test_two_ranks_equal_one_rank_with_twice_the_accumulation(two_ranks, tiny_checkpoint, tmp_path, train):
    """The same clips with the same noise, so the same losses, the same schedule and the same weights."""
    folder, _ = two_ranks
    train(tiny_checkpoint, tmp_path / "one", gradient_accumulation_steps=4, **RUN)
    for ours, theirs in zip(rows_of(folder), rows_of(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    one, two = lora_of(tmp_path / "one"), lora_of(folder)
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


def test_two_ranks_say_once_what_they_will_do_and_write_nothing(tiny_checkpoint, clips, tmp_path):
    before = sorted(clips.rglob("*"))
    options = training_options(tiny_checkpoint, clips, tmp_path / "run", max_train_steps=6, dry_run=True)
    result = torchrun(ROOT / "train_cogvideox_lora.py", *options)
    lines = [line for line in result.stdout.splitlines() if line.startswith("training")]
    assert len(lines) == 1 and "GiB" in lines[0]
    assert not (tmp_path / "run").exists() and sorted(clips.rglob("*")) == before


def test_ranks_share_the_validation_and_all_of_it_arrives(two_ranks):
    folder, _ = two_ranks
    names = [path.name for path in sorted((folder / "validation" / "step-000006").glob("*.mp4"))]
    assert names == [f"prompt-{i:02d}_seed-3407.mp4" for i in range(3)]
    (row,) = [row for row in read_metrics(folder) if row["step"] == 6 and "validation_motion" in row]
    videos = [torch.from_numpy(iio.imread(folder / "validation" / "step-000006" / name)) for name in names]
    assert row["validation_motion"] == pytest.approx(fmean(motion(video, 8) for video in videos), rel=0.2)  # of mp4


def test_only_one_rank_speaks(two_ranks):
    _, result = two_ranks
    assert result.stdout.count("\n4 clips of 128x96 at 24 fps -> 96x64 at 8 fps; 4 of 9 frames") == 1


def test_captions_that_are_cut_off_are_counted_over_all_ranks(tiny_checkpoint, clips, tmp_path):
    options = training_options(tiny_checkpoint, clips, tmp_path / "run", id_token="word " * 250, encode_only=True)
    result = torchrun(ROOT / "train_cogvideox_lora.py", *options)
    told = [line for line in (result.stdout + result.stderr).splitlines() if "longer and cut off" in line]
    count = len(set((clips / "prompts.txt").read_text().splitlines()))
    assert len(told) == 1 and f"CogVideoX reads 226 tokens of a caption; {count} captions are longer" in told[0]


def test_killed_ranks_that_resume_equal_a_straight_run(two_ranks, tiny_checkpoint, clips, tmp_path):
    straight, _ = two_ranks
    options = training_options(tiny_checkpoint, clips, tmp_path / "run", gradient_accumulation_steps=2, **RUN)
    torchrun(ROOT / "tests" / "kill_after_checkpoint.py", "saved", 3, *options, expected=1)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-3"]
    torchrun(ROOT / "train_cogvideox_lora.py", *options, "--resume_from_checkpoint", "latest")
    assert rows_of(tmp_path / "run") == rows_of(straight)
    one, two = lora_of(straight), lora_of(tmp_path / "run")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_ranks_with_swapped_blocks_equal_one_rank_whose_blocks_stay(tiny_checkpoint, clips, tmp_path, train):
    """Of five blocks, so that places are given to others."""
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    config = CogVideoXTransformer3DModel.load_config(checkpoint, subfolder="transformer")
    torch.manual_seed(0)
    deeper = CogVideoXTransformer3DModel.from_config(dict(config) | {"num_layers": 5})
    deeper.save_pretrained(checkpoint / "transformer")
    options = {"max_train_steps": 3, "gradient_checkpointing": "full"}
    train(checkpoint, tmp_path / "one", gradient_accumulation_steps=4, **options)
    options |= {"gradient_accumulation_steps": 2, "blocks_to_swap": 5}
    torchrun(ROOT / "train_cogvideox_lora.py", *training_options(checkpoint, clips, tmp_path / "two", **options))
    for two, one in zip(rows_of(tmp_path / "two"), rows_of(tmp_path / "one"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)


def test_two_ranks_go_on_where_one_rank_was_with_updates_of_another_size(tiny_checkpoint, clips, tmp_path, train):
    """Six micro-batches by one rank, then portions of four by two: the same sequence of clips and noise."""
    options = {"checkpointing_steps": 3, "learning_rate": 1e-30}  # still weights: a loss depends on its clips alone
    train(tiny_checkpoint, tmp_path / "run", max_train_steps=3, gradient_accumulation_steps=2, **options)
    later = {"max_train_steps": 5, "gradient_accumulation_steps": 2, "resume_from_checkpoint": "latest"}
    line = training_options(tiny_checkpoint, clips, tmp_path / "run", **options | later)
    torchrun(ROOT / "train_cogvideox_lora.py", *line)
    singles = [row["loss"] for row in train(tiny_checkpoint, tmp_path / "one", max_train_steps=14, **options)]
    expected = [sum(singles[first : first + 4]) / 4 for first in (6, 10)]
    assert [row["loss"] for row in rows_of(tmp_path / "run")[3:]] == pytest.approx(expected, rel=1e-4)


def test_accelerate_launch_with_the_multi_config_does_what_torchrun_does(two_ranks, tiny_checkpoint, clips, tmp_path):
    folder, _ = two_ranks
    options = training_options(tiny_checkpoint, clips, tmp_path / "run", gradient_accumulation_steps=2, **RUN)
    config = ROOT / "accelerate_config_machine_multi.yaml"
    launch([
        "accelerate.commands.launch", "--config_file", config, "--num_machines", 1, "--num_processes", 2,
        "--main_process_port", 0, ROOT / "train_cogvideox_lora.py", *options,
    ])  # fmt: skip
    assert rows_of(tmp_path / "run") == rows_of(folder)


def test_ranks_draw_different_noise_and_timesteps_and_hold_equal_weights(tiny_checkpoint, clips, tmp_path):
    """Also with more ranks than clips; each rank writes down what it saw."""
    few = tmp_path / "one clip"
    few.mkdir()
    for name in ("prompts.txt", "videos.txt"):
        line = (clips / name).read_text().splitlines()[0]
        (few / name).write_text(str(clips / line) if name == "videos.txt" else line)
    options = training_options(tiny_checkpoint, few, tmp_path / "run", max_train_steps=2)
    torchrun(ROOT / "tests" / "witness.py", tmp_path, *options)
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2))
    assert len(first["timesteps"]) == 2 and not torch.equal(first["timesteps"], second["timesteps"])
    assert not torch.allclose(first["noisy"], second["noisy"])
    assert first["lora"].keys() == second["lora"].keys()
    assert all(torch.equal(first["lora"][name], second["lora"][name]) for name in first["lora"])
    assert any(weight.abs().max() > 0 for name, weight in first["lora"].items() if "lora_B" in name)


def test_a_bad_dataset_ends_all_ranks_with_one_message(tiny_checkpoint, clips, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "prompts.txt").write_text("one\ntwo\nthree\n")
    (bad / "videos.txt").write_text("a.mp4\nb.mp4\nc.mp4\n")
    options = training_options(tiny_checkpoint, bad, tmp_path / "run")
    result = torchrun(ROOT / "train_cogvideox_lora.py", *options, expected=1)
    assert result.stderr.count("3 problems in the dataset, nothing is trained:\n  line 1: ") == 1
    assert "exitcode  : 2" in result.stderr
