"""`python dataset.py check` and `export`: what is wrong with a dataset, and the frames that a model sees of it."""

import json
import re
from types import SimpleNamespace

import imageio
import numpy as np
import pytest
import torch
from conftest import damage_second_clip
from make_example import draw_clip, make_clips
from PIL import Image

from clips import check, export
from clips.facts import list_motion
from clips.frames import View, read_frames
from clips.listing import Clip

SIZE = ["--height", "64", "--width", "96", "--max_num_frames", "9"]
VIEW = View(64, 96, 8, 9, 0, 0, "center", 42)


@pytest.fixture
def folder(tmp_path):
    return make_clips(tmp_path / "clips", count=3)


def refused(capsys, program, line):
    with pytest.raises(SystemExit) as stop:
        program.main([str(word) for word in line])
    assert stop.value.code == 2
    return capsys.readouterr()


def test_a_good_dataset_passes_with_its_headline(folder, capsys):
    before = sorted(folder.rglob("*"))
    check.main([str(folder), *SIZE])
    assert "3 clips of 128x96 at 24 fps -> 96x64 at 8 fps; 3 of 9 frames" in capsys.readouterr().out
    assert sorted(folder.rglob("*")) == before


def test_motion_is_listed_with_stills_and_the_commands_that_split_at_cuts(tmp_path, capsys):
    red, blue = (np.array(draw_clip("circle", "red", way, 9, 64, 96)) for way in ("left", "up"))
    for name, shots in {"a b": [*red[:4], *(255 - blue[:5])], "still": [red[0]] * 9}.items():
        imageio.mimsave(tmp_path / f"{name}.mp4", shots, fps=8, macro_block_size=1)
        (tmp_path / f"{name}.txt").write_text(name)
    check.main([str(tmp_path), *SIZE])
    said = capsys.readouterr().out
    assert "stills, whose frames do not change and teach a model not to move: still.mp4" in said
    assert re.search(r"motion, in levels of 255 per second:\n  0\.\d still.mp4\n  \d+\.\d a b.mp4\n", said)
    (line,) = [line for line in said.splitlines() if line.startswith("a b.mp4: cuts to another shot at 0.44 s")]
    command = line.partition(": ffmpeg ")[2] or line.partition("): ")[2]
    assert f"'{tmp_path}/a b.mp4'" in command and "trim=start=0.438," in command
    assert command.endswith(f" '{tmp_path}/a b-2.mkv'")


@pytest.mark.parametrize("program", [check, export])
def test_a_dataset_of_which_drop_unfit_leaves_nothing_is_refused(folder, program, tmp_path, capsys):
    output = ["--output_dir", tmp_path / "out"] if program is export else []
    said = refused(capsys, program, [folder, "--buckets", "81x64x96", "--drop_unfit", *output])
    assert "--drop_unfit leaves out all clips" in said.err and said.out == ""


@pytest.mark.parametrize(
    ("buckets", "why"),
    [
        (["--buckets", "17x64x96", "25x64x96", "1x64x96"], "too short for 17 frames at 8 fps"),
        (["--buckets", "1x64x96"], "no size has more than one frame"),
        (["--max_num_frames", "1"], "no size has more than one frame"),
    ],
)
def test_it_is_said_why_a_video_is_seen_as_a_still(buckets, why, tmp_path, capsys):
    imageio.mimsave(tmp_path / "a.mp4", np.array(draw_clip("circle", "red", "left", 9, 64, 96)), fps=8)
    (tmp_path / "a.txt").write_text("a")
    check.main([str(tmp_path), *buckets])
    assert f"\n{why}, so seen as a still: a.mp4\n" in capsys.readouterr().out


def test_what_is_lost_is_counted_in_clips_not_in_windows(tmp_path, capsys):
    imageio.mimsave(tmp_path / "a.mp4", np.array(draw_clip("circle", "red", "left", 27, 64, 96)), fps=8)
    (tmp_path / "a.txt").write_text("a")
    check.main([str(tmp_path), "--buckets", "9x96x64", "17x96x64", "--clip_mode", "chunks", "--fps", "16"])
    said = capsys.readouterr().out
    assert "1 clip of 96x64 at 8 fps in 3 windows -> 3 of 17x96x64" in said
    assert "% of the picture (1 clip)" in said and "scaled up, so less sharp than others of this size: 1 clip" in said
    assert "so frames are seen twice: 1 clip" in said and "--buckets: no clip goes to 9x96x64" in said


def test_of_many_clips_the_least_and_the_most_motion_is_listed():
    clips = [Clip(None, "a", line) for line in range(1, 51)]
    facts = [SimpleNamespace(motion=float(line), window=line % 2) for line in range(1, 51)]
    title, *lines = list_motion(clips, facts)
    assert lines[:2] == ["  1.0 line 1, window 2", "  2.0 line 2"] and lines[-1] == "  50.0 line 50"
    assert len(lines) == 21 and lines[10] == "  ... 30 more between ..."
    assert list_motion(clips[:1], [SimpleNamespace(motion=None, window=0)]) == []


def test_all_problems_are_listed_damage_that_only_decoding_finds_among_them(folder, capsys):
    damage_second_clip(folder)
    with open(folder / "videos.txt", "a") as videos, open(folder / "prompts.txt", "a") as prompts:
        videos.write("missing.mp4\n")
        prompts.write("a caption\n")
    said = refused(capsys, check, [folder, *SIZE])
    assert "2 problems in the dataset, training refuses it" in said.err
    assert "line 2: " in said.err and "is damaged at " in said.err and "line 4: " in said.err
    assert "2 clips of 128x96" in said.out


def test_damage_that_is_allowed_is_a_remark(folder, capsys):
    damage_second_clip(folder)
    check.main([str(folder), *SIZE, "--allow_damaged"])
    assert "line 2: is damaged at " in capsys.readouterr().out


def test_what_is_exported_is_what_the_model_gets(folder, tmp_path):
    export.main([str(folder), *SIZE, "--output_dir", str(tmp_path / "seen")])
    assert sorted(path.name for path in (tmp_path / "seen").iterdir()) == ["00001", "00002", "00003"]
    videos, captions = ((folder / name).read_text().splitlines() for name in ("videos.txt", "prompts.txt"))
    for number, (video, caption) in enumerate(zip(videos, captions), start=1):
        written = tmp_path / "seen" / f"{number:05d}"
        images = [np.array(Image.open(written / f"{i:03d}.png")) for i in range(9)]
        assert torch.equal(torch.from_numpy(np.stack(images)), read_frames(folder / video, VIEW, mirrored=False))
        about = json.loads((written / "frames.json").read_text())
        assert (about["source"], about["caption"]) == (str(folder / video), caption)
        assert about["times"] == pytest.approx([i / 8 for i in range(9)], abs=1e-3)
        assert len(list(written.iterdir())) == 10


def test_a_folder_with_something_in_it_is_not_written_into(folder, capsys):
    said = refused(capsys, export, [folder, *SIZE, "--output_dir", folder])
    assert "is not empty; pass a new folder" in said.err


def test_an_export_says_where_it_is(folder, tmp_path, capsys):
    export.main([str(folder), *SIZE, "--output_dir", str(tmp_path / "seen")])
    assert capsys.readouterr().out.endswith(
        f"{tmp_path}/seen: 3 folders of frames, 00001/ ...; frames.json in each says of which clip\n"
    )
    for video in (folder / "videos").iterdir():
        video.write_bytes(b"")
    said = refused(capsys, export, [folder, *SIZE, "--output_dir", tmp_path / "other"])
    assert "3 problems in the dataset, nothing is written" in said.err and "folders of frames" not in said.out


def test_an_export_into_the_dataset_is_refused(folder, capsys):
    for output in (folder / "seen", folder / "videos" / ".." / "seen"):
        said = refused(capsys, export, [folder, *SIZE, "--output_dir", output])
        assert f"--output_dir {output}: is in {folder}, where its pictures could be taken for clips" in said.err
        assert not (folder / "seen").exists()


def test_a_file_has_all_problems_of_which_the_message_tells_some(tmp_path, capsys):
    clips, problems = tmp_path / "clips", tmp_path / "problems.txt"
    clips.mkdir()
    for number in range(30):
        (clips / f"{number:02d}.mp4").touch()
        (clips / f"{number:02d}.txt").write_text("x")
    said = refused(capsys, check, [clips, *SIZE, "--problems_file", problems])
    assert "... and 11 more like this" in said.err
    assert "all 30, a line each: python dataset.py check FOLDER --problems_file FILE" in said.err
    lines = problems.read_text().splitlines()
    assert [line.partition(": ")[0] for line in lines] == [str(clips / f"{number:02d}.mp4") for number in range(30)]
    said = refused(capsys, check, [clips, *SIZE, "--problems_file", tmp_path / "none" / "problems.txt"])
    assert "must be a file in a folder that exists" in said.err


def test_the_file_of_a_good_dataset_is_empty(folder, tmp_path):
    (tmp_path / "problems.txt").write_text("of an earlier check")
    check.main([str(folder), *SIZE, "--problems_file", str(tmp_path / "problems.txt")])
    assert (tmp_path / "problems.txt").read_text() == ""
