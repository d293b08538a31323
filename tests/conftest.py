"""What the tests stand on: tiny checkpoints, a small dataset, and the training script run in this process."""

import gc
import os
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it: no test may reach for the network

import browser
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from make_example import make_checkpoint, make_clips

import train_cogvideox_lora
from cogvideox.base_model import read_base_model
from cogvideox.objective import rotary_embedding
from run.run_directory import read_metrics

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def fresh_accelerate(request, monkeypatch):
    """Accelerate keeps its state for the whole process; a test must not see that of another, nor a GPU unasked."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    reset_accelerate()
    if request.node.get_closest_marker("gpu"):
        gc.collect()  # accelerate leaves cycles around models
        torch.cuda.empty_cache()


def reset_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory):
    made = {}

    def checkpoint(variant):
        if variant not in made:
            made[variant] = make_checkpoint(tmp_path_factory.mktemp("checkpoints") / variant, variant)
        return made[variant]

    return checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(checkpoint_of):
    return checkpoint_of("2b")


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Six clips of 32 frames at 24 fps, 128x96 pixels."""
    return make_clips(tmp_path_factory.mktemp("clips"))


def damage_second_clip(folder):
    """Overwrites a part of the second video with zeros, as a bad disk does."""
    video = folder / (folder / "videos.txt").read_text().splitlines()[1]
    content = bytearray(video.read_bytes())
    at = content.index(b"mdat") + 1500
    content[at : at + 300] = bytes(300)
    video.write_bytes(content)


def training_options(checkpoint, clips, output_dir, **options):
    """Command line of a short run at 64x96 pixels and 9 frames; True and False stand for switches."""
    values = {
        "pretrained_model_name_or_path": checkpoint,
        "instance_data_root": clips,
        "output_dir": output_dir,
        "height": 64,
        "width": 96,
        "max_num_frames": 9,
        "rank": 4,
        "learning_rate": 1e-3,
        "seed": 3407,
        "mixed_precision": "no",
    }
    if options.get("training_type") == "sft":
        del values["rank"]
    values |= options
    line = []
    for name, value in values.items():
        if value is False:
            name, value = f"no-{name}", True
        line += [f"--{name}"] if value is True else [f"--{name}", *map(str, value if type(value) is list else [value])]
    return line


def transformer_inputs(folder):
    """Random ones of the right shapes."""
    checkpoint = read_base_model(str(folder))
    config = checkpoint.transformer
    f = 4 if config["patch_size_t"] else 3
    return {
        "hidden_states": torch.randn(1, f, config["in_channels"], 8, 12),
        "encoder_hidden_states": torch.randn(1, 226, 32),
        "timestep": torch.tensor([500]),
        "ofs": torch.full((1,), 2.0) if config["ofs_embed_dim"] else None,
        "image_rotary_emb": rotary_embedding(checkpoint, f, 8, 12, "cpu"),
        "return_dict": False,
    }


@pytest.fixture
def train(clips):
    """Runs the training script in this process; returns the rows of metrics.jsonl."""

    def run(checkpoint, output_dir, **options):
        data = options.pop("instance_data_root", clips)
        args = train_cogvideox_lora.parse_args(training_options(checkpoint, data, output_dir, **options))
        train_cogvideox_lora.main(args)
        reset_accelerate()
        return read_metrics(output_dir)

    return run


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of a headless browser."""
    if browser.CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome: cannot look at the page")
    with browser.opened(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture
def compiled_without_a_compiler(monkeypatch):
    """All of torch.compile but its last stage, which needs a C++ compiler and half a minute."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()
