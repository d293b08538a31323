"""benchmarks/preprocess.py on a CPU."""

import json
import statistics
import sys

import numpy as np
import preprocess
import pytest
import torch

from clips.frames import choose_frames, view_of

# What the benchmark asks of diffusers' script, which is not part of this repository, and no more.
SCRIPT = """
import decord
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

seen = []


class VideoDataset:
    def __init__(self, instance_data_root, caption_column, video_column, height, width, fps, max_num_frames):
        decord.bridge.set_bridge("torch")
        self.instance_prompts = (instance_data_root / caption_column).read_text().splitlines()
        self.instance_videos = []
        for name in (instance_data_root / video_column).read_text().splitlines():
            reader = decord.VideoReader(str(instance_data_root / name))
            frames = reader.get_batch(list(range(0, len(reader), len(reader) // max_num_frames))[:max_num_frames])
            frames = (frames / 127.5 - 1).permute(0, 3, 1, 2)
            self.instance_videos.append(resize(frames, [height, width], interpolation=InterpolationMode.BICUBIC))


def compute_prompt_embeddings(tokenizer, text_encoder, prompt, max_length, device, dtype, requires_grad):
    seen.append((prompt, max_length, device, dtype))
    tokens = tokenizer(prompt, padding="max_length", max_length=max_length, return_tensors="pt")
    return text_encoder(tokens.input_ids.to(device))[0]
"""


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def without_stand_in():
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("torchvision"):
            del sys.modules[name]


def test_prints_json_and_writes_the_same(tmp_path, capsys):
    file = tmp_path / "results" / "tiny.json"
    preprocess.main(["--model", "tiny", "--clips", "3", "--repeats", "2", "--output", str(file)])
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(file.read_text())
    assert set(result["seconds_per_clip_of_stages"]) == {"probe", "decode", "resize", "vae", "t5", "write"}
    assert min(result["seconds_per_clip_of_stages"].values()) > 0
    assert len(result["seconds"]) == 2 and result["reference"] is None
    assert result["clips_per_minute"] == pytest.approx(180 / statistics.median(result["seconds"]), rel=0.02)


def test_compares_with_a_script_on_the_same_clips_and_models(tmp_path, capsys, without_stand_in):
    (tmp_path / "script.py").write_text(SCRIPT)
    preprocess.main(["--model", "tiny", "--clips", "2", "--reference", str(tmp_path / "script.py")])
    result = json.loads(capsys.readouterr().out)
    compared = result["reference"]
    assert len(result["seconds"]) == len(compared["seconds"]) == 2 and compared["order"].startswith("ABBA")
    ratio = statistics.median(compared["seconds"]) / statistics.median(result["seconds"])
    assert compared["ratio_of_medians"] == pytest.approx(ratio, rel=0.02)


def test_ours_and_the_script_encode_the_same_frames(tmp_path, monkeypatch, without_stand_in):
    (tmp_path / "script.py").write_text(SCRIPT)
    work = preprocess.prepare(preprocess.parse_args(["--model", "tiny", "--clips", "2"]), tmp_path)
    encoded, encode = [], work.vae.encode
    monkeypatch.setattr(work.vae, "encode", lambda video: encoded.append(video) or encode(video))
    preprocess.run_ours(work)
    script = preprocess.reference.load_reference(tmp_path / "script.py")
    preprocess.run_reference(script, work)
    ours, theirs = encoded[0][:2], torch.cat(encoded[1:])  # one batch, filled up; one by one
    assert ours.shape == theirs.shape == (2, 3, 9, 64, 96) and ours.dtype == theirs.dtype
    assert (ours - theirs).float().abs().mean() < 2 / 127.5
    assert [prompt for prompt, *_ in script.seen] == [[text] for text in captions(work.folder)]
    preprocess.run_ours(work)  # decord gives arrays again, not the script's tensors


def captions(folder):
    return (folder / "prompts.txt").read_text().splitlines()


@pytest.mark.parametrize("num_frames", [9, 49])
def test_drawn_clips_give_every_third_frame(num_frames):
    """As the script chooses them, which knows no time."""
    args = preprocess.parse_args(["--model", "tiny", "--max_num_frames", str(num_frames)])
    view = view_of(args, with_image=False, whole=False)
    chosen = choose_frames(np.arange(3 * num_frames) / 24, view)
    assert chosen == list(range(0, 3 * num_frames, 3))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--reference", "no/where.py"], "--reference no/where.py: no such file"),
        (["--num_frames", "10"], "--max_num_frames 10: must be 4k + 1"),
        (["--clips", "0"], "must be a whole number of at least 1"),
    ],
)
def test_refuses_what_cannot_work(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        preprocess.main(argv)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
