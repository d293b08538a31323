"""The preview: a picture and a table of what the model will see of a dataset."""

import subprocess
import sys

import imageio
import numpy as np
import pytest
import torch
from conftest import ROOT, damage_second_clip
from make_example import draw_clip, make_clips
from PIL import Image

from clips import frames
from clips.facts import examine, facts_of, headline, remarks
from clips.frames import View, choose_frames, choose_source
from clips.listing import Clip, read_clips
from cogvideox.base_model import load_tokenizer, read_base_model
from cogvideox.encoders import cut_caption
from pages import preview

VIEW = View(height=64, width=96, fps=8, max_num_frames=9, skip_frames_start=0, skip_frames_end=0, crop="center", seed=0)
SMALL = ["--height", "64", "--width", "96", "--max_num_frames", "9"]


def make_dataset(folder, videos, captions=None):
    """Writes a dataset folder; `videos` are (name, frames, fps, height, width)."""
    folder.mkdir()
    for i, (name, num_frames, fps, height, width) in enumerate(videos):
        frames = draw_clip(("circle", "square")[i % 2], "red", "left", num_frames, height, width)
        imageio.mimsave(folder / name, frames, fps=fps, macro_block_size=1)
    (folder / "videos.txt").write_text("".join(f"{name}\n" for name, *_ in videos))
    (folder / "prompts.txt").write_text("".join(f"{caption}\n" for caption in captions or range(len(videos))))
    return folder


def read(folder, view=VIEW):
    clips, problems = read_clips(folder, "prompts.txt", "videos.txt")
    examined = [examine(clip, view) for clip in clips]
    return clips, [facts for facts, _ in examined], problems + [problem for _, problem in examined if problem]


def refused(capsys, line):
    with pytest.raises(SystemExit) as stop:
        preview.main([str(word) for word in line])
    assert stop.value.code == 2
    return capsys.readouterr()


# ---- the picture


def test_the_picture_shows_the_model_s_own_pixels(clips):
    (clip, *_), (fact, *_), _ = read(clips)
    sheet, missing = preview.draw_sheet([preview.clip_row(clips, clip, fact, VIEW, random_flip=True, damage=[])])
    shown = frames.read_frames(clip.video, VIEW, mirrored=False)
    expected = [*shown[[0, 2, 4, 6, 8]], frames.read_frames(clip.video, VIEW, mirrored=True)[0]]
    pixels = torch.from_numpy(np.array(sheet))
    for i, frame in enumerate(expected):
        left = preview.MARGIN + i * (96 + preview.GAP)
        assert torch.equal(pixels[preview.MARGIN : preview.MARGIN + 64, left : left + 96], frame)
    assert missing == set()


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (5, 1), (9, 2), (40, 3), (400, 9)])
def test_many_clips_are_drawn_in_columns_and_each_once_and_in_order(count, columns):
    found = preview.into_columns([166] * count, 932)
    assert len(found) == columns
    assert [i for column in found for i in column] == list(range(count))


def test_large_frames_are_scaled_down_whole():
    frame = torch.from_numpy(draw_clip("circle", "red", "left", 1, 480, 720)[0])
    small = preview.thumbnail(frame)
    assert small.size == (240, 160)
    assert np.abs(np.array(small, np.int16) - np.array(Image.fromarray(frame.numpy()).reduce(3))).mean() < 2


def test_an_image_to_start_from_stands_before_the_frames(clips, tmp_path):
    imageio.imwrite(tmp_path / "blue.png", np.full((64, 96, 3), (0, 0, 255), np.uint8))
    (clip, *_), (fact, *_), _ = read(clips)
    with_image = clip._replace(image=tmp_path / "blue.png")
    row = preview.clip_row(clips, with_image, fact, VIEW, random_flip=False, damage=[])
    assert [label for label, _ in row.cells] == ["image", "0.00 s", "0.25 s", "0.50 s", "0.75 s", "1.00 s"]
    assert row.cells[0][1].getpixel((5, 5)) == (0, 0, 255)


@pytest.mark.parametrize(
    ("count", "limit", "indices"),
    [(3, 5, [0, 1, 2]), (9, 5, [0, 2, 4, 6, 8]), (49, 5, [0, 12, 24, 36, 48]), (1, 5, [0]), (7, 1, [0])],
)
def test_clips_and_frames_are_picked_evenly(count, limit, indices):
    assert preview.evenly_spaced(count, limit) == indices


@pytest.mark.parametrize("text", ["a cat sleeps " * 40, "a" * 900, "short"])
def test_captions_are_broken_to_fit_and_lose_no_word_where_there_is_room(text):
    font, _ = preview.font_for(text)
    lines = preview.wrap(text, font, 300, 1000)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(font.getlength(line) <= 300 for line in lines)
    short = preview.wrap(text, font, 300, 2)
    assert len(short) <= 2 and short[-1].endswith("...") == (len(lines) > 2)
    assert all(font.getlength(line) <= 300 for line in short)


def test_characters_that_no_font_has_are_told(clips, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preview, "FONTS", ())
    preview.fonts.cache_clear()
    folder = make_dataset(tmp_path / "clips", [("a.mp4", 9, 8, 96, 128)], ["a cat 猫"])
    preview.main([str(folder), *SMALL])
    preview.fonts.cache_clear()
    assert "because no installed font has them: 猫" in capsys.readouterr().out


# ---- the table


def test_the_table_tells_sizes_rates_and_what_is_cut(tmp_path):
    videos = [("wide.mp4", 64, 30, 90, 160), ("exact.mp4", 9, 8, 64, 96), ("large.mp4", 75, 25, 128, 192)]
    clips, facts, problems = read(make_dataset(tmp_path / "clips", videos))
    assert problems == []
    _, *rows = [line.split("  ") for line in preview.table(tmp_path / "clips", clips, facts, VIEW)]
    rows = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert rows == [
        ["1", "wide.mp4", "160x90", "30", "2.13", "64 -> 9", "1.01 s", "16 %", "to 71 %"],
        ["2", "exact.mp4", "96x64", "8", "1.12", "9 -> 9", "-", "-", "-"],
        ["3", "large.mp4", "192x128", "25", "3.00", "75 -> 9", "1.88 s", "-", "to 50 %"],
    ]


def test_what_is_lost_and_what_looks_like_an_oversight_is_summed_up(tmp_path):
    videos = [("a.mp4", 64, 30, 90, 160), ("b.mp4", 20, 4, 66, 80), ("c.mp4", 5, 8, 64, 96)]
    folder = make_dataset(tmp_path / "clips", videos, ["a cat", "a dog", "a cat", "a cow", "a pig"])
    with open(folder / "videos.txt", "a") as lines:
        lines.write("copy.mp4\na.mp4\n")
    (folder / "copy.mp4").write_bytes((folder / "a.mp4").read_bytes())
    clips, facts, _ = read(folder)
    expected = "5 clips of 80x66 to 160x90 at 4 to 30 fps -> 96x64 at 8 fps; 4 of 9 frames, 1 of 5"
    assert headline(facts, VIEW) == expected
    assert remarks(clips, facts, VIEW) == [
        "not seen: up to 3.9 s at the end (4 clips), up to 19 % of the picture (4 clips)",
        "scaled up, so less sharp than others of this size: 1 clip",
        "slower than 8 fps, so some frames are seen twice: 1 clip",
        "the same video more than once: lines 1, 4 and 5",
        "the same caption more than once: lines 1 and 3",
    ]


def test_facts_end_where_the_model_s_frames_do(tmp_path):
    (clip,), (fact,), _ = read(make_dataset(tmp_path / "clips", [("a.mp4", 64, 30, 96, 128)]), VIEW)
    assert choose_source(clip.video, fact.file, VIEW).indices == choose_frames(np.arange(64) / 30, VIEW)
    assert (fact.seconds, fact.seen_until) == pytest.approx((64 / 30, 9 / 8))
    later = facts_of(clip.video, fact.file, VIEW._replace(skip_frames_start=15))
    assert later.seen_until == pytest.approx(0.5 + 9 / 8)


def test_the_words_that_are_cut_off_are_those_whose_tokens_are(tiny_checkpoint):
    base = read_base_model(str(tiny_checkpoint))
    tokenizer = load_tokenizer(base)
    caption = "a red circle moves over grey ground, and then a blue square moves left " * 14
    read_tokens = tokenizer(caption, max_length=226, truncation=True).input_ids
    seen = tokenizer.decode(read_tokens, skip_special_tokens=True)
    num_tokens, cut = cut_caption(tokenizer, caption, 226)
    assert num_tokens == len(tokenizer(caption, verbose=False).input_ids) > 226
    assert cut and (seen + cut).replace(" ", "") == caption.replace(" ", "")
    assert cut_caption(tokenizer, "a red circle", 226)[1] == ""
    line = preview.cut_captions([Clip(None, caption, 7)], base)[1]
    assert line == f"  line 7: {num_tokens} tokens, cut off: {cut}"


# ---- the command


def test_the_command_shows_a_dataset(tmp_path, tiny_checkpoint):
    folder = make_clips(tmp_path / "clips", count=3)
    command = [sys.executable, ROOT / "dataset.py", "preview", folder, *SMALL, "--clips", "2", "--id_token", "STYLE"]
    command += ["--pretrained_model_name_or_path", tiny_checkpoint]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "3 clips of 128x96 at 24 fps -> 96x64 at 8 fps; 3 of 9 frames" in result.stdout
    assert "captions: 0 longer than 226 tokens" in result.stdout
    assert f"{folder / 'preview.png'}: 2 clips, 1 left out" in result.stdout
    assert Image.open(folder / "preview.png").width == preview.LEAST_WIDTH + 2 * preview.MARGIN


def test_without_a_command_its_usage_is_shown():
    result = subprocess.run([sys.executable, ROOT / "dataset.py"], capture_output=True, text=True)
    assert result.returncode == 2 and "usage: python dataset.py {preview,check,export,clean} FOLDER" in result.stderr


def test_problems_are_told_as_training_tells_them_and_the_good_clips_shown(tmp_path, capsys):
    folder = make_clips(tmp_path / "clips", count=2)
    with open(folder / "videos.txt", "a") as videos, open(folder / "prompts.txt", "a") as prompts:
        videos.write("missing.mp4\nempty.mp4\n")
        prompts.write("a\nb\nc\n")
    (folder / "empty.mp4").write_bytes(b"")
    said = refused(capsys, [folder, *SMALL])
    for part in (
        f"{folder}: 3 problems in the dataset, training refuses it:",
        "prompts.txt has 5 lines and videos.txt 4: line n of one belongs to line n of the other",
        f"line 3: {folder}/missing.mp4: no such file; correct the path, which is relative to the dataset's folder",
        f"line 4: {folder}/empty.mp4: the file is empty; copy it again",
    ):
        assert part in said.err
    assert "preview.png: 2 clips" in said.out and said.out.count("cannot be used") == 2
    assert (folder / "preview.png").exists()


def test_a_damaged_video_is_shown_and_told(tmp_path, capsys):
    folder = make_clips(tmp_path / "clips", count=2)
    damage_second_clip(folder)
    said = refused(capsys, [folder, *SMALL])
    assert "line 2: " in said.err and "is damaged at " in said.err and "--allow_damaged" in said.err
    assert "preview.png: 2 clips" in said.out
    preview.main([str(word) for word in [folder, *SMALL, "--allow_damaged"]])
    assert "is damaged at " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--output", "/no/where/a.png"], ["--output /no/where/a.png: no folder /no/where", "pass another file"]),
        (["--output", "a.jpg"], ["--output a.jpg: the picture is a .png"]),
        (["--height", "100"], ["--height 100: must be divisible by 16"]),
        (["--pretrained_model_name_or_path", "no/such-model"], ["no/such-model: found no model_index.json"]),
    ],
)
def test_a_mistake_ends_in_a_message(clips, capsys, options, parts):
    said = refused(capsys, [clips, *SMALL, *options])
    assert all(part in said.err for part in parts), said.err
    assert not (clips / "preview.png").exists()


def test_what_a_base_model_refuses_is_refused_here_too(checkpoint_of, clips, tmp_path, capsys):
    model = ["--pretrained_model_name_or_path", checkpoint_of("5b-I2V")]
    assert "learned positions for 9 frames of 64x96" in refused(capsys, [clips, *SMALL, "--height", "48", *model]).err
    folder = make_dataset(tmp_path / "clips", [("short.mp4", 5, 8, 96, 128)])
    assert "gives 5 frames at --fps 8, and this base model needs 9" in refused(capsys, [folder, *SMALL, *model]).err
