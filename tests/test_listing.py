"""Every layout of a folder gives the same clips; what does not fit is said with file and line."""

import argparse
import csv
import json
import os
import shutil
from pathlib import Path

import pytest
from make_example import make_clips
from PIL import Image

from clips.facts import examine, remarks
from clips.frames import View
from clips.listing import BESIDE, LISTS, SAT, Clip, Folder, find_layout, folder_option, read_clips, read_listing
from cogvideox.lora_files import LORA_FILE
from dataset import CachedClips, Data

VIEW = View(64, 96, 8, 9, 0, 0, "center", 42)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return make_clips(tmp_path_factory.mktemp("drawn"), count=3)


def lay_out(layout, drawn, folder):
    """Copies the drawn clips into a new folder of another layout."""
    folder.mkdir()
    videos = [drawn / line for line in (drawn / "videos.txt").read_text().splitlines()]
    captions = (drawn / "prompts.txt").read_text().splitlines()
    (folder / "videos").mkdir()
    rows = []
    for video, caption in zip(videos, captions):
        shutil.copy(video, folder / "videos" / video.name)
        rows.append({"file_name": f"videos/{video.name}", "text": caption})
        if layout == BESIDE:
            (folder / "videos" / f"{video.stem}.txt").write_text(caption)
        if layout == SAT:
            (folder / "labels").mkdir(exist_ok=True)
            (folder / "labels" / f"{video.stem}.txt").write_text(caption)
    if layout == LISTS:
        (folder / "videos.txt").write_text("\n".join(row["file_name"] for row in rows))
        (folder / "prompts.txt").write_text("\n".join(captions))
    if layout == "metadata.jsonl":
        (folder / layout).write_text("\n".join(map(json.dumps, rows)))
    if layout == "metadata.csv":
        with open(folder / layout, "w", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
    return folder


LAYOUTS = [LISTS, "metadata.jsonl", "metadata.csv", BESIDE, SAT]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_the_same_clips(layout, drawn, tmp_path):
    folder = lay_out(layout, drawn, tmp_path / "clips")
    assert find_layout(folder) == layout
    clips, problems = read_clips(folder, id_token="DISNEY")
    expected = (drawn / "prompts.txt").read_text().splitlines()
    assert problems == [] and [clip.caption for clip in clips] == [f"DISNEY {caption}" for caption in expected]
    assert [clip.video.read_bytes() for clip in clips] == [
        (drawn / line).read_bytes() for line in (drawn / "videos.txt").read_text().splitlines()
    ]
    assert [clip.line for clip in clips] == [1, 2, 3]


def test_a_parquet_table_is_read(drawn, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is optional: the message says how to install it")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = lay_out("no captions", drawn, tmp_path / "clips")
    names = sorted(path.name for path in (folder / "videos").iterdir())
    table = pyarrow.table({"file_name": [f"videos/{name}" for name in names], "caption": names})
    parquet.write_table(table, folder / "metadata.parquet")
    assert [clip.caption for clip in read_clips(folder)[0]] == names


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_each_layout_trains_a_lora(layout, drawn, tmp_path, tiny_checkpoint, train, capsys):
    folder = lay_out(layout, drawn, tmp_path / "clips")
    train(tiny_checkpoint, tmp_path / "run", instance_data_root=folder, max_train_steps=1)
    assert (tmp_path / "run" / LORA_FILE).is_file()
    assert f"{folder}: read as {layout}" in capsys.readouterr().out


@pytest.mark.parametrize(("layout", "named"), [(LISTS, "lines 1 and 2"), (BESIDE, "00.mp4 and 01.mp4")])
def test_remarks_name_clips_as_their_layout_does(layout, named, drawn, tmp_path):
    folder = lay_out(layout, drawn, tmp_path / "clips")
    first, second, *_ = sorted((folder / "videos").glob("*.mp4"))
    shutil.copy(first, second)
    clips, _ = read_clips(folder)
    said = remarks(clips, [examine(clip, VIEW)[0] for clip in clips], VIEW)
    expected = named.replace("00.mp4", first.name).replace("01.mp4", second.name)
    assert f"the same video more than once: {expected}" in said


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_an_image_is_a_clip_of_one_frame(tmp_path, suffix):
    Image.new("RGB", (96, 64), "red").save(tmp_path / f"still.{suffix}")
    (tmp_path / "still.txt").write_text("a red picture")
    (clip,), problems = read_clips(tmp_path)
    facts, _ = examine(clip, VIEW)
    assert problems == [] and (facts.width, facts.height, facts.num_frames, facts.num_seen) == (96, 64, 1, 1)


@pytest.mark.parametrize("other", LAYOUTS[1:])
def test_two_layouts_at_once_are_refused_unless_one_is_named(other, drawn, tmp_path):
    folder = lay_out(other, drawn, tmp_path / "clips")
    for name in ("videos.txt", "prompts.txt"):
        shutil.copy(drawn / name, folder)
    with pytest.raises(ValueError, match="fits 2 layouts .*two lists.*--caption_column"):
        read_clips(folder)
    assert len(read_clips(folder, "prompts.txt", "videos.txt")[0]) == 3


MISTAKES = {
    "no row": ({"metadata.jsonl": ""}, "metadata.jsonl: the table is empty"),
    "no json": ({"metadata.jsonl": "{}\nhello\n"}, "metadata.jsonl:2: not JSON"),
    "a list": ({"metadata.jsonl": "[1]\n"}, "metadata.jsonl:1: is a list; write one object per line"),
    "no caption column": ({"metadata.csv": "file_name,words\na.mp4,x\n"}, "has none of text, caption, prompt"),
    "two caption columns": (
        {"metadata.csv": "file_name,text,prompt\na.mp4,x,y\n"},
        "has more than one of text, prompt; pass the column of the captions as --caption_column",
    ),
    "no file column": ({"metadata.csv": "video,text\na.mp4,x\n"}, "no column file_name; it has video, text"),
    "an empty caption": (
        {"metadata.jsonl": '{"file_name": "a.mp4", "text": " "}'},
        "metadata.jsonl:1: text is ' '; write a text there",
    ),
    "a number": ({"metadata.jsonl": '{"file_name": "a.mp4", "text": 3}'}, "metadata.jsonl:1: text is 3"),
    "no file in a row": ({"metadata.jsonl": '{"file_name": null, "text": "x"}'}, "metadata.jsonl:1: file_name is None"),
    "a short row": ({"metadata.csv": "file_name,text\na.mp4\n"}, "metadata.csv:2: text is None"),
    "UTF-16": ({"metadata.csv": "file_name,text\n".encode("utf-16")}, "metadata.csv: is UTF-16 text"),
    "cp1252": ({"metadata.jsonl": '{"text": "caf\xe9"}'.encode("cp1252")}, "metadata.jsonl:1: not UTF-8 text"),
    "UTF-16 lists": ({"prompts.txt": "a cat".encode("utf-16"), "videos.txt": "a.mp4"}, "prompts.txt: is UTF-16 text"),
    "a caption missing": ({"a.mp4": "", "a.txt": "x", "b.mp4": ""}, "b.mp4: no caption: "),
    "a caption empty": ({"a.mp4": "", "a.txt": " \n"}, "a.txt is empty; write the caption"),
    "a label missing": ({"videos/a.mp4": "", "labels/b.txt": "x"}, "a.mp4: no caption: "),
    "no videos": ({"videos/a.doc": "", "labels/a.txt": "x"}, "no videos or images in it"),
    "nothing": ({}, "prompts.txt: no such file; write it, name another file"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_listing_is_said_with_its_place(name, tmp_path):
    files, message = MISTAKES[name]
    for file, content in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    _, problems = read_clips(tmp_path)
    assert any(message in problem for problem in problems), problems


def test_images_to_start_from_can_be_a_column_but_not_a_file_beside_a_clip(drawn, tmp_path):
    folder = lay_out("no captions", drawn, tmp_path / "clips")
    row = {"file_name": "videos/x.mp4", "text": "a cat", "image": "x.png"}
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    (clip,), _ = read_clips(folder, image_column="image")
    assert clip.image == folder / "x.png" and clip.place == "metadata.jsonl:1"
    beside = lay_out(BESIDE, drawn, tmp_path / "beside")
    with pytest.raises(ValueError, match="--image_column image: needs a list or a table"):
        read_clips(beside, image_column="image")


def named(path):
    return examine(Clip(path, "a cat", 1), VIEW)[1]


def test_a_path_that_is_no_file_is_said_with_what_it_is(drawn, tmp_path):
    (video, *_) = (drawn / line for line in (drawn / "videos.txt").read_text().splitlines())
    composed, apart = "caf\u00e9.mp4", "cafe\u0301.mp4"
    shutil.copy(video, tmp_path / composed)
    (tmp_path / "videos").mkdir()
    shutil.copy(video, tmp_path / "videos" / "a.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    assert named(tmp_path / composed) is None
    assert f"but there is {tmp_path / composed}" in named(tmp_path / apart)
    assert f"but there is {tmp_path / 'videos' / 'a.mp4'}" in named(tmp_path / "videos\\a.mp4")
    assert "is a folder" in named(tmp_path / "videos")
    assert "is not a plain file" in named(tmp_path / "pipe.mp4")
    assert "File name too long" in named(tmp_path / ("a" * 300 + ".mp4"))
    assert "no such file; correct the path" in named(tmp_path / "b.mp4")


# ---- several folders


def test_several_folders_are_one_dataset_and_each_clip_names_its_folder(drawn, tmp_path):
    lists, beside = lay_out(LISTS, drawn, tmp_path / "lists"), lay_out(BESIDE, drawn, tmp_path / "beside")
    table = lay_out("metadata.jsonl", drawn, tmp_path / "table")
    listing = read_listing([Folder(lists), Folder(beside, times=2), Folder(table)], id_token="DISNEY")
    assert listing.layouts == [LISTS, BESIDE, "metadata.jsonl"] and listing.problems == []
    assert listing.name == f"{lists}, {beside}=2, {table}"
    assert [clip.line for clip in listing.clips] == list(range(1, 10))
    assert [clip.times for clip in listing.clips] == [1] * 3 + [2] * 3 + [1] * 3
    first, beside_clip, row = listing.clips[0], listing.clips[3], listing.clips[8]
    assert first.problem("x").startswith(f"{lists}, line 1: ") and row.named == f"{table}, metadata.jsonl:3"
    assert beside_clip.named == f"{beside}, {beside_clip.video.name}"
    said = remarks(listing.clips, [examine(clip, VIEW)[0] for clip in listing.clips], VIEW)
    assert any(line.startswith(f"the same video more than once: {lists}, line 1, {beside}, ") for line in said)


def test_problems_of_several_folders_name_the_folder(drawn, tmp_path):
    lists, beside = lay_out(LISTS, drawn, tmp_path / "lists"), lay_out(BESIDE, drawn, tmp_path / "beside")
    (lists / "prompts.txt").write_text("a\n\nc\n")
    assert read_listing([Folder(beside), Folder(lists)]).problems[0].startswith(f"{lists}: prompts.txt:2: blank line")


def test_a_folder_with_a_number_is_shown_so_often(tmp_path):
    (tmp_path / "a=2").mkdir()
    assert folder_option(f"{tmp_path}/a=2") == Folder(tmp_path / "a=2")
    assert folder_option(f"{tmp_path}/a=2=3") == Folder(tmp_path / "a=2", 3)
    assert folder_option("a") == Folder(Path("a"))
    assert folder_option("~/a=3") == Folder(Path.home() / "a", 3)
    for text in ("a=0", "a=b", "a=-1", "a=1.5"):
        with pytest.raises(argparse.ArgumentTypeError, match="FOLDER=N shows its clips N times"):
            folder_option(text)
    with pytest.raises(ValueError, match="is named twice; name it once, with =2"):
        read_listing([Folder(tmp_path), Folder(tmp_path / "a=2" / "..")])


def test_an_epoch_shows_each_folder_as_often_as_it_is_to(drawn, tmp_path, tiny_checkpoint, train, capsys):
    first, second = lay_out(LISTS, drawn, tmp_path / "a"), lay_out(BESIDE, drawn, tmp_path / "b")
    for video in (second / "videos").glob("*.mp4"):  # other clips than those of the first folder
        video.write_bytes(video.read_bytes() + bytes(8))
    roots = [first, f"{second}=2"]
    rows = train(tiny_checkpoint, tmp_path / "run", instance_data_root=roots, num_train_epochs=1)
    assert len(rows) == 3 + 2 * 3
    said = capsys.readouterr().out
    assert (
        f"{first}: read as two lists\n{second}=2: read as a caption beside each clip" in said and "6 clips of" in said
    )
    record = json.loads((tmp_path / "run" / "args.json").read_text())
    assert record["options"]["instance_data_root"] == list(map(str, roots)) and record["clips"] == 9
    assert len(list((first / ".cogvideox_cache" / "latents").iterdir())) == 6


def test_a_held_out_clip_is_measured_once_however_often_others_are_shown():
    files = [[Path(f"{clip}")] for clip in range(4)]
    data = Data(CachedClips(files, [Path("c")] * 4), [(1,)] * 4, prompts={}, times=[2, 2, 1, 3])
    training, held_out = data.split(1, seed=0)
    assert len(held_out.shapes) == 1
    (out,) = (int(paths[0].name) for paths in held_out.clips.latents)
    shown = [int(paths[0].name) for paths in training.clips.latents]
    assert shown == [clip for clip in range(4) if clip != out for _ in range([2, 2, 1, 3][clip])]
