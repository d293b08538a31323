"""The preview: a page of what the model will see of a dataset."""

import io
import os
import subprocess
import sys

import imageio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from conftest import ROOT, damage_second_clip
from make_example import draw_clip, make_clips
from PIL import Image

from clips import check, frames
from clips.facts import brightness, examine, facts_of, headline, remarks
from clips.frames import View, choose_frames, choose_source
from clips.listing import Clip, Columns, Folder, read_listing
from clips.motion import motion, watch
from clips.selection import Selection
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
    _, _, clips, problems, _ = read_listing([Folder(folder)], Columns("prompts.txt", "videos.txt"))
    examined = [examine(clip, Selection(view)) for clip in clips]
    windows = [facts for found in examined for facts in found.windows]
    return clips, windows, problems + [found.problem for found in examined if found.problem]


def refused(capsys, line):
    with pytest.raises(SystemExit) as stop:
        preview.main([str(word) for word in line])
    assert stop.value.code == 2
    return capsys.readouterr()


# ---- pictures and measures -------------------------------------------------------------------------------------------


def drawn(clip, view=VIEW, num_frames=5, side=96):
    (facts,), problem, _ = examine(clip, Selection(view))
    assert problem is None
    seen = frames.read_frames(clip.video, view, mirrored=False)
    return preview.draw(clip, facts, seen, num_frames=num_frames, side=side), facts, seen


def pixels(jpeg):
    return np.array(Image.open(io.BytesIO(jpeg)), np.int16)


def test_the_film_shows_the_model_s_own_frames_the_first_and_the_last_among_them(clips):
    clip, *_ = read_listing([Folder(clips)]).clips
    made, _, seen = drawn(clip)
    expected = np.concatenate([seen[i].numpy() for i in (0, 2, 4, 6, 8)], axis=1).astype(np.int16)
    film = pixels(made.film)
    assert made.film_frames == 5 and film.shape == expected.shape
    assert np.abs(film - expected).mean() < 6  # JPEG


def test_an_image_to_start_from_is_shown_where_the_model_sees_it(clips, tmp_path):
    imageio.imwrite(tmp_path / "blue.png", np.full((64, 96, 3), (0, 0, 255), np.uint8))
    clip = read_listing([Folder(clips)]).clips[0]._replace(image=tmp_path / "blue.png")
    assert drawn(clip)[0].image is None
    made, *_ = drawn(clip, VIEW._replace(with_image=True))
    assert np.abs(pixels(made.image)[5, 5] - (0, 0, 255)).max() < 6


@pytest.mark.parametrize(
    ("height", "width", "rectangle"),
    [(64, 96, (0, 0, 1, 1)), (64, 192, (0.25, 0, 0.5, 1)), (192, 96, (0, 1 / 3, 1, 1 / 3)), (32, 48, (0, 0, 1, 1))],
    ids=["exact", "wide", "tall", "small"],
)
def test_the_rectangle_is_what_the_model_sees_of_the_whole_picture(tmp_path, height, width, rectangle):
    noise = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    still = np.array(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))
    imageio.mimsave(tmp_path / "a.mp4", [still] * 9, fps=8, macro_block_size=1, quality=9)
    made, facts, seen = drawn(Clip(tmp_path / "a.mp4", "a", 1), side=max(height, width))
    found = frames.seen_rectangle(facts.file, VIEW)
    assert found == pytest.approx(rectangle)
    left, top, share_of_width, share_of_height = found
    box = (left * width, top * height, (left + share_of_width) * width, (top + share_of_height) * height)
    cropped = Image.open(io.BytesIO(made.uncropped)).crop([round(side) for side in box]).resize((96, 64))
    assert np.abs(np.array(cropped, np.int16) - seen[0].numpy()).mean() < 12


def ffmpeg(*options):
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, options)], check=True)


def test_a_turned_and_a_stretched_file_are_outlined_as_a_player_shows_them(tmp_path):
    imageio.mimsave(tmp_path / "a.mp4", draw_clip("circle", "red", "left", 9, 64, 96), fps=8, macro_block_size=1)
    ffmpeg("-display_rotation", 90, "-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "turned.mp4")
    ffmpeg("-i", tmp_path / "a.mp4", "-vf", "setsar=2", tmp_path / "stretched.mp4")
    expected = {"turned": ((64, 96), (0, 5 / 18, 1, 4 / 9)), "stretched": ((192, 64), (0.25, 0, 0.5, 1))}
    for name, (size, rectangle) in expected.items():
        made, facts, seen = drawn(Clip(tmp_path / f"{name}.mp4", "a", 1), side=max(size))
        assert (facts.width, facts.height) == size and frames.seen_rectangle(facts.file, VIEW) == pytest.approx(
            rectangle
        )
        whole = Image.open(io.BytesIO(made.uncropped))
        assert whole.size == size
        (left, top, width, height), (across, down) = rectangle, size
        box = (left * across, top * down, (left + width) * across, (top + height) * down)
        cropped = whole.resize((96, 64), box=box)
        assert np.abs(np.array(cropped, np.int16) - seen[0].numpy()).mean() < 12


def test_a_random_crop_is_outlined_where_it_is(tmp_path):
    imageio.mimsave(tmp_path / "a.mp4", draw_clip("circle", "red", "left", 9, 64, 192), fps=8, macro_block_size=1)
    ((facts,), *_) = examine(Clip(tmp_path / "a.mp4", "a", 1), Selection(VIEW))
    places = [frames.seen_rectangle(facts.file, VIEW._replace(crop="random", seed=seed)) for seed in range(8)]
    assert len(set(places)) == 8
    assert all(0 <= left <= 0.5 and (top, width) == (0, 0.5) for left, top, width, _ in places)


def test_motion_and_brightness_measure_what_is_seen():
    still = torch.full((9, 8, 8, 3), 100, dtype=torch.uint8)
    assert motion(still, 8) == 0 and brightness(still) == pytest.approx(100)
    assert motion(still[:1], 8) is None
    rising = torch.arange(9, dtype=torch.uint8)[:, None, None, None].expand(9, 8, 8, 3)
    assert motion(rising * 2, 8) == pytest.approx(16) and motion(rising * 2, 16) == pytest.approx(32)
    assert motion(rising.flip(0), 8) == pytest.approx(8)  # also where it falls
    for channel, weight in enumerate((0.299, 0.587, 0.114)):  # red, green, blue
        coloured = torch.zeros(2, 4, 6, 3, dtype=torch.uint8)
        coloured[0, :, :3, channel] = 200  # a quarter of the pixels
        assert brightness(coloured) == pytest.approx(weight * 50)


def test_a_value_is_placed_among_those_of_all_clips():
    among = preview.range_of([0.0, *range(1, 10), 20.0])
    assert (among.lowest, among.low, among.high, among.highest) == (0, 1, 9, 20)
    assert preview.measure("motion", 5.0, among, "levels") == {
        "name": "motion", "value": 5.0, "unit": "levels", "lowest": 0, "highest": 20, "at": 25, "low": 5, "width": 40,
    }  # fmt: skip
    assert preview.range_of([3.0]).place(3.0) == 50 and preview.range_of([]) is None


@pytest.mark.parametrize(
    ("count", "limit", "indices"),
    [(3, 5, [0, 1, 2]), (9, 5, [0, 2, 4, 6, 8]), (49, 5, [0, 12, 24, 36, 48]), (1, 5, [0]), (7, 1, [0])],
)
def test_clips_and_frames_are_picked_evenly(count, limit, indices):
    assert preview.evenly_spaced(count, limit) == indices


# ---- facts -----------------------------------------------------------------------------------------------------------


def test_what_is_lost_and_what_looks_like_an_oversight_is_summed_up(tmp_path):
    videos = [("a.mp4", 64, 30, 90, 160), ("b.mp4", 20, 4, 66, 80), ("c.mp4", 5, 8, 64, 96)]
    folder = make_dataset(tmp_path / "clips", videos, ["a cat", "a dog", "a cat", "a cow", "a pig"])
    with open(folder / "videos.txt", "a") as lines:
        lines.write("copy.mp4\na.mp4\n")
    (folder / "copy.mp4").write_bytes((folder / "a.mp4").read_bytes())
    clips, facts, _ = read(folder)
    expected = "5 clips of 80x66 to 160x90 at 4 to 30 fps -> 96x64 at 8 fps; 4 of 9 frames, 1 of 5"
    assert headline(facts, Selection(VIEW)) == expected
    assert remarks(clips, facts, Selection(VIEW)) == [
        "not seen: up to 3.9 s at the end (4 clips), up to 19 % of the picture (4 clips)",
        "scaled up, so less sharp than others of this size: 1 clip",
        "slower than 8 fps, at least in places, so frames are seen twice: 1 clip",
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
    shown = preview.caption_of(Clip(None, caption, 7), tokenizer, base)
    assert shown["read"] + shown["cut_off"] == caption.strip() and shown["cut_off"] == cut
    assert shown["tokens"] == num_tokens
    assert preview.cut_captions([shown], base) == f"captions: 1 longer than 226 tokens; the longest has {num_tokens}"


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_shows_a_dataset(tmp_path, tiny_checkpoint):
    folder = make_clips(tmp_path / "clips", count=3)
    command = [sys.executable, ROOT / "dataset.py", "preview", folder, *SMALL, "--clips", "2", "--id_token", "STYLE"]
    command += ["--pretrained_model_name_or_path", tiny_checkpoint]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "3 clips of 128x96 at 24 fps -> 96x64 at 8 fps; 3 of 9 frames" in result.stdout
    assert "captions: 0 longer than 226 tokens" in result.stdout
    assert f"{folder / 'preview.html'}: 2 clips, 1 left out (--clips), " in result.stdout
    page = (folder / "preview.html").read_text()
    assert page.count("<article") == 2 and page.count("STYLE ") == 2 and "2 of 3 clips and windows are shown" in page


def test_captions_are_counted_for_all_clips_also_those_that_are_not_shown(tmp_path, tiny_checkpoint, capsys):
    captions = ["a red circle", "a red circle moves over grey ground " * 40, "a blue square"]
    folder = make_dataset(tmp_path / "clips", [(f"{i}.mp4", 9, 8, 64, 96) for i in range(3)], captions)
    model = ["--pretrained_model_name_or_path", str(tiny_checkpoint)]
    preview.main([str(folder), *SMALL, "--clips", "2", *model])
    assert "captions: 1 longer than 226 tokens" in capsys.readouterr().out
    assert "<del" not in (folder / "preview.html").read_text()  # it is the one between


def test_a_size_far_from_the_base_model_s_is_told(clips, tmp_path, tiny_checkpoint, capsys):
    page = tmp_path / "page.html"
    model = ["--pretrained_model_name_or_path", str(tiny_checkpoint), "--output", str(page), "--clips", "1"]
    preview.main([str(clips), "--height", "96", "--width", "160", "--max_num_frames", "9", *model])
    line = "--height 96 --width 160: the base model was made for 64x96"
    assert line in capsys.readouterr().out and line in page.read_text()


def test_clips_of_several_folders_are_told_apart(tmp_path):
    for name in "ab":
        make_dataset(tmp_path / name, [("same.mp4", 9, 8, 64, 96)])
    preview.main([str(tmp_path / "a"), str(tmp_path / "b"), *SMALL])
    page = (tmp_path / "a" / "preview.html").read_text()
    assert 'data-number="1"' in page and 'data-number="2"' in page
    assert f"({tmp_path}/b, line 1)" in page and f"has the same video as {tmp_path}/b, line 1" in page


def test_a_name_that_is_no_text_is_a_problem_with_a_card(tmp_path, capsys):
    name = os.fsdecode(b"\xff.mp4")
    imageio.mimsave(tmp_path / "a.mp4", draw_clip("circle", "red", "left", 9, 64, 96), fps=8, macro_block_size=1)
    (tmp_path / "a.mp4").rename(tmp_path / name)
    (tmp_path / name).with_suffix(".txt").write_text("a cat")
    said = refused(capsys, [tmp_path, *SMALL])
    assert "its name is not UTF-8, so that no list or page could hold it; rename it" in said.err
    assert "<b>?.mp4</b>" in (tmp_path / "preview.html").read_text()


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
    page = (folder / "preview.html").read_text()
    assert f"{folder}: 3 problems in the dataset, training refuses it:" in said.err
    for part in (
        "prompts.txt has 5 lines and videos.txt 4: line n of one belongs to line n of the other",
        f"line 3: {folder}/missing.mp4: no such file; correct the path, which is relative to the dataset&#39;s folder",
        f"line 4: {folder}/empty.mp4: the file is empty; copy it again",
    ):
        assert part.replace("&#39;", "'") in said.err and part in page
    assert page.count('class="film"') == 2 and page.count('class="problem"') == 3


def test_a_problem_is_on_the_card_of_its_clip_and_otherwise_above_all_cards(tmp_path, capsys):
    folder = make_clips(tmp_path / "clips", count=3)
    first, second, third = (folder / "videos.txt").read_text().split()
    (folder / "videos.txt").write_text(f"{first}\n{second}\n\n{third}\n")
    (folder / "prompts.txt").write_text("a\n\nc\nd\ne\n")
    said = refused(capsys, [folder, *SMALL])
    top, *articles = (folder / "preview.html").read_text().split("<article ")
    assert "3 problems in the dataset" in said.err and len(articles) == 3
    top = top[top.index('class="problems"') :]
    assert "videos.txt:3: blank line" in top and "prompts.txt has 5 lines and videos.txt 4" in top
    assert top.count('class="problem"') == 2 and "prompts.txt:2: blank line" in articles[1]
    assert 'class="film"' in articles[1] and "data-noted" in articles[1] and 'class="problem"' not in articles[0]


def test_a_caption_that_is_missing_is_told_on_the_card_also_in_one_of_several_folders(tmp_path, capsys):
    for name, texts in {"a": ["x", "y"], "b": ["x"]}.items():
        (tmp_path / name).mkdir()
        for text in "xy":
            path = tmp_path / name / f"{text}.mp4"
            imageio.mimsave(path, draw_clip("circle", "red", "left", 9, 64, 96), fps=8, macro_block_size=1)
        for text in texts:
            (tmp_path / name / f"{text}.txt").write_text(text)
    refused(capsys, [tmp_path / "a", tmp_path / "b", *SMALL])
    top, *articles = (tmp_path / "a" / "preview.html").read_text().split("<article ")
    assert 'class="problem"' not in top and [article.count('class="problem"') for article in articles] == [0, 0, 0, 1]


def test_many_clips_that_cannot_be_used_are_counted_above_those_that_have_a_card(tmp_path, capsys):
    for number in range(40):
        (tmp_path / f"{number:02d}.mp4").touch()
        (tmp_path / f"{number:02d}.txt").write_text("x")
    refused(capsys, [tmp_path, *SMALL, "--clips", "3"])
    top, *articles = (tmp_path / "preview.html").read_text().split("<article ")
    assert len(articles) == 3 and "3 of 40 clips and windows are shown" in articles[-1]
    assert "03.mp4: the file is empty" in top and "02.mp4" not in top and "... and 18 more like this" in top


def test_a_damaged_video_is_told_and_shown_where_it_is_allowed(tmp_path, capsys):
    folder = make_clips(tmp_path / "clips", count=2)
    damage_second_clip(folder)
    said = refused(capsys, [folder, *SMALL])
    assert "line 2: " in said.err and "is damaged at " in said.err and "--allow_damaged" in said.err
    preview.main([str(word) for word in [folder, *SMALL, "--allow_damaged"]])
    assert "is damaged at " in capsys.readouterr().out
    page = (folder / "preview.html").read_text()
    assert page.count('class="film"') == 2 and '<p class="remark">is damaged at ' in page


def test_a_dataset_without_a_clip_that_can_be_used_has_a_page_too(tmp_path, capsys):
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "a.txt").write_text("a cat")
    assert "the file is empty" in refused(capsys, [tmp_path, *SMALL]).err
    assert "None of the clips can be used." in (tmp_path / "preview.html").read_text()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--output", "/no/where/a.html"], ["--output /no/where/a.html: no folder /no/where", "pass another file"]),
        (["--output", "a.png"], ["--output a.png: the page is a .html file"]),
        (["--height", "100"], ["--height 100: must be divisible by 16"]),
        (["--pretrained_model_name_or_path", "no/such-model"], ["no/such-model: found no model_index.json"]),
    ],
)
def test_a_mistake_ends_in_a_message(clips, capsys, options, parts):
    said = refused(capsys, [clips, *SMALL, *options])
    assert all(part in said.err for part in parts), said.err
    assert not (clips / "preview.html").exists()


def test_what_a_base_model_refuses_is_refused_here_too(checkpoint_of, clips, tmp_path, capsys):
    model = ["--pretrained_model_name_or_path", checkpoint_of("5b-I2V")]
    assert "learned positions for 9 frames of 64x96" in refused(capsys, [clips, *SMALL, "--height", "48", *model]).err
    folder = make_dataset(tmp_path / "clips", [("short.mp4", 5, 8, 96, 128)])
    assert "gives 5 frames at --fps 8, and this base model needs 9" in refused(capsys, [folder, *SMALL, *model]).err


def test_stills_and_cuts_are_told_on_the_cards_and_above_them(tmp_path, capsys):
    """A clip with a cut, one that is still, and one that is neither."""
    red, blue = (
        draw_clip(shape, colour, "left", 9, 64, 96) for shape, colour in (("circle", "red"), ("square", "blue"))
    )
    red, blue = np.array(red), 255 - np.array(blue)
    for name, shots in {"a": [*red[:4], *(255 - blue[:5])], "b": [red[0]] * 9, "c": red}.items():
        imageio.mimsave(tmp_path / f"{name} 1.mp4", shots, fps=8, macro_block_size=1)
        (tmp_path / f"{name} 1.txt").write_text(name)
    preview.main([str(tmp_path), *SMALL])
    said = capsys.readouterr().out
    assert "stills, whose frames do not change and teach a model not to move: b 1.mp4" in said
    assert "more than one shot, with a cut between them: a 1.mp4" in said
    _, *articles = (tmp_path / "preview.html").read_text().split("<article ")
    assert "cuts to another shot at 0.44 s; split it there" in articles[0] and "a 1-2.mkv" in articles[0]
    assert "is a still" in articles[1] and 'class="remark"' not in articles[2]
    assert [article.count('title="a cut"') for article in articles] == [1, 0, 0]


# ---- in a browser ----------------------------------------------------------------------------------------------------


QUOTED = 'z "it\'s" <b> \N{CAT}'


@pytest.fixture(scope="module")
def shown(tmp_path_factory, tiny_checkpoint):
    """A page of clips that are still, fast, single frames, too long and empty, with names and captions like markup."""
    folder = tmp_path_factory.mktemp("shown") / 'my "clips" & <b>'
    folder.mkdir()
    still = [draw_clip("circle", "red", "left", 1, 64, 192)[0]] * 9
    for name, shots in {"still": still, "fast": draw_clip("square", "blue", "up", 9, 64, 96)}.items():
        imageio.mimsave(folder / f"{name}.mp4", shots, fps=8, macro_block_size=1)
    imageio.mimsave(folder / "one.mp4", still[:1], fps=8, macro_block_size=1)
    long = draw_clip("circle", "green", "left", 20, 128, 64)
    imageio.mimsave(folder / f"{QUOTED}.mp4", long, fps=8, macro_block_size=1)
    captions = {"still": "<script>document.title = 'broken'</script>", "fast": "一只猫 \N{CAT}", "one": "a & b"}
    captions[QUOTED] = "a red circle moves over grey ground " * 40
    for name, caption in (captions | {"missing": "gone"}).items():
        (folder / f"{name}.txt").write_text(caption)
    (folder / "missing.mp4").write_bytes(b"")
    with pytest.raises(SystemExit):
        preview.main([str(folder), *SMALL, "--random_flip", "--pretrained_model_name_or_path", str(tiny_checkpoint)])
    return folder / "preview.html"


def order(page):
    return page.evaluate("[...document.querySelectorAll('article:not([hidden]) h2')].map(h => h.textContent).join(' ')")


def test_a_browser_shows_every_clip_and_loads_nothing(page, shown):
    page.open(shown)
    assert page.errors == []
    assert page.evaluate("document.title").endswith(": what the model sees")
    assert order(page) == "1 2 3 4 5"
    text = page.evaluate("document.body.textContent")
    for part in (
        "<script>document.title",
        "一只猫 \N{CAT}",
        f"{QUOTED}.mp4",
        "50 % of the picture is cut off",
        "67 % of the picture is cut off",
        "1.38 s at the end unseen",
        "none, as it is a single frame",
        "missing.mp4: the file is empty",
        "of 226 tokens; the words that are struck out are cut off",
    ):
        assert part in text, part
    caption = "[...document.querySelectorAll('del')].map(cut => [cut.textContent, cut.parentNode.textContent])"
    ((cut, whole),) = page.evaluate(caption)
    assert 0 < len(cut) < len(whole) and whole.endswith(cut)
    loaded = "[...document.images].every(image => image.complete && image.naturalWidth > 0)"
    page.wait(loaded)
    names = page.evaluate("performance.getEntriesByType('resource').map(entry => entry.name)")
    assert all(name.startswith("data:") for name in names)


def test_the_outline_is_where_the_seen_part_is(page, shown):
    page.open(shown)
    found = """[...document.querySelectorAll("article")].filter(a => "frames" in a.dataset).map(a => {
        a.scrollIntoView();
        const [whole, seen] = [".frame", ".seen"].map(part => a.querySelector(part).getBoundingClientRect());
        return [(seen.x - whole.x) / whole.width, (seen.y - whole.y) / whole.height,
            seen.width / whole.width, seen.height / whole.height, whole.width / whole.height, whole.height]; })"""
    fast, one, still, tall = page.evaluate(found)
    assert fast == pytest.approx([0, 0, 1, 1, 1.5, 100], abs=0.01)
    assert one == still == pytest.approx([0.25, 0, 0.5, 1, 3, 50], abs=0.01)
    assert tall == pytest.approx([0, 1 / 3, 1, 1 / 3, 0.5, 168], abs=0.01)


def test_clips_are_sorted_and_filtered(page, shown):
    page.open(shown)
    assert page.evaluate("[...document.querySelectorAll('.file b')].map(name => name.textContent)") == [
        "fast.mp4", "missing.mp4", "one.mp4", "still.mp4", f"{QUOTED}.mp4",
    ]  # fmt: skip
    # Clips that cannot be used come first, and the single frame, which has no motion, last.
    orders = {"motion": "2 1 5 4 3", "-motion": "2 4 5 1 3", "cropped": "2 5 3 4 1", "unseen": "2 5 1 3 4"}
    for name, numbers in (orders | {"number": "1 2 3 4 5"}).items():
        page.evaluate(f"s = document.querySelector('select'); s.value = '{name}'; s.onchange()")
        assert order(page) == numbers, name
    levels = "[...document.querySelectorAll('[data-brightness]')].map(card => Number(card.dataset.brightness))"
    for name in ("brightness", "-brightness"):
        page.evaluate(f"s.value = '{name}'; s.onchange()")
        found = page.evaluate(levels)
        assert found == sorted(found, reverse=name == "brightness")
    page.evaluate("s.value = 'number'; s.onchange()")
    page.evaluate("n = document.querySelector('.noted'); n.click()")
    assert order(page) == "2 4 5" and "3 of 5 clips" in page.evaluate("document.querySelector('.tools').innerText")
    page.evaluate("n.click(); f = document.querySelector('[type=search]'); f.value = '猫'; f.oninput()")
    assert order(page) == "1"
    page.evaluate("f.value = 'STILL'; f.oninput()")
    assert order(page) == "4"
    page.evaluate("f.value = 'brightness'; f.oninput()")  # a word of the page, of no caption
    assert order(page) == "" and "0 of 5 clips" in page.evaluate("document.querySelector('.tools').innerText")


def test_a_clip_plays_and_stops(page, shown):
    page.open(shown)
    page.evaluate("p = document.querySelector('article:first-child .player'); p.scrollIntoView()")
    page.wait("p.style.backgroundImage.startsWith('url')")
    assert page.evaluate("p.style.backgroundPosition") == "0% 0px"
    page.evaluate("p.click()")
    page.wait("p.style.backgroundPosition !== '0% 0px'")
    assert page.evaluate("p.getAttribute('aria-pressed')") == "true"
    page.evaluate("p.click()")
    assert page.evaluate("p.style.backgroundPosition") == "0% 0px"
    page.evaluate("document.querySelector('.all').click()")
    page.wait("p.style.backgroundPosition !== '0% 0px'")
    assert page.evaluate("document.querySelectorAll('.playing').length") == 3  # not the single frame
    page.evaluate("document.querySelectorAll('.playing button').forEach(button => button.click())")
    assert page.evaluate("document.querySelector('.all').textContent") == "Play all"


def test_a_clip_plays_at_its_own_speed_from_its_first_frame(page, shown):
    page.open(shown)
    page.evaluate("p = document.querySelector('article:first-child .player'); p.scrollIntoView()")
    page.wait("p.style.backgroundImage.startsWith('url')")
    # The clock of the page is the test's, so that a busy machine changes nothing.
    page.evaluate("""(() => {
        frames = []; performance.now = () => 5000; requestAnimationFrame = call => { next = call; };
        p.click();
        for (const seconds of [0, 0.1, 0.13, 0.5, 1.1, 1.13, 1.5]) {
            next(5000 + 1000 * seconds);
            frames.push(Math.round(parseFloat(p.style.backgroundPosition) / 100 * 8)); } })()""")
    assert page.evaluate("frames") == [0, 0, 1, 4, 8, 0, 3]  # 9 frames at 8 fps


@pytest.mark.parametrize("calm", [False, True])
def test_a_clip_plays_under_the_pointer_unless_motion_is_not_wanted(page, shown, calm):
    page.open(shown)
    motion = {"name": "prefers-reduced-motion", "value": "reduce" if calm else "no-preference"}
    page.send("Emulation.setEmulatedMedia", features=[motion])
    page.evaluate("p = document.querySelector('article:first-child .player'); p.scrollIntoView({block: 'center'})")
    page.wait("p.style.backgroundImage.startsWith('url')")
    x, y = page.evaluate("(box => [box.x + 50, box.y + 50])(p.getBoundingClientRect())")
    page.move_pointer(x, y)
    page.wait("p.matches(':hover')")
    assert page.evaluate("document.querySelectorAll('.playing').length") == (0 if calm else 1)
    page.move_pointer(x, 5)
    page.wait("!p.matches(':hover')")
    assert page.evaluate("document.querySelectorAll('.playing').length") == 0


def test_a_clip_is_played_with_the_keyboard(page, shown):
    page.open(shown)
    page.evaluate("p = document.querySelector('article:first-child .player'); p.focus()")
    for kind in ("rawKeyDown", "char", "keyUp"):
        page.send("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")
    page.wait("p.getAttribute('aria-pressed') === 'true'")


def test_a_mirrored_first_frame_is_shown_where_clips_are_mirrored(page, shown):
    page.open(shown)
    assert page.evaluate("document.querySelectorAll('.mirrored').length") == 4
    page.evaluate("m = document.querySelector('.mirrored'); m.scrollIntoView()")
    page.wait("m.style.backgroundImage.startsWith('url')")
    assert page.evaluate("getComputedStyle(m).transform") == "matrix(-1, 0, 0, 1, 0, 0)"


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_in_light_and_dark(page, shown, dark):
    page.open(shown, width=390, dark=dark)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert (page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 28)") == dark
    assert page.errors == []


def test_a_thousand_clips_open(page, clips, tmp_path, monkeypatch, capsys):
    video = read_listing([Folder(clips)]).clips[0].video
    num_frames, side = preview.film_size(1000)
    made, facts, seen = drawn(Clip(video, "a", 1), side=side, num_frames=num_frames)
    facts = facts._replace(**watch(video, facts.file, VIEW, seen)._asdict())
    monkeypatch.setattr(check, "_look", lambda window, *_, **__: window._replace(made=made))
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "videos.txt").write_text(f"{video}\n" * 1200)
    (folder / "prompts.txt").write_text("".join(f"caption {number}\n" for number in range(1200)))
    preview.main([str(folder), *SMALL])
    assert "1000 clips, 200 left out (--clips)" in capsys.readouterr().out
    assert (folder / "preview.html").stat().st_size < 60e6
    page.open(folder / "preview.html")
    assert page.errors == [] and page.evaluate("document.querySelectorAll('article').length") == 1000
    page.evaluate("f = document.querySelector('[type=search]'); f.value = 'caption 1199'; f.oninput()")
    assert order(page) == "1200"
