"""Every layout of a folder gives the same clips; what does not fit is said with file and line."""

import argparse
import csv
import io
import json
import os
import shutil
import wave
from pathlib import Path
from typing import NamedTuple

import pytest
from make_example import make_clips
from PIL import Image

from clips import check
from clips.facts import examine, grouped, list_problems, remarks
from clips.frames import View
from clips.listing import BESIDE, LISTS, SAT, Clip, Columns, Folder, Words, find_layout, folder_option, read_listing
from clips.selection import Selection
from cogvideox.lora_files import LORA_FILE
from dataset import CachedClips, Data

SELECTION = Selection(View(64, 96, 8, 9, 0, 0, "center", 42))


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
    _, _, clips, problems, _ = read_listing([Folder(folder)], words=Words("DISNEY"))
    expected = (drawn / "prompts.txt").read_text().splitlines()
    assert problems == [] and [clip.caption for clip in clips] == [f"DISNEY {caption}" for caption in expected]
    assert [clip.video.read_bytes() for clip in clips] == [
        (drawn / line).read_bytes() for line in (drawn / "videos.txt").read_text().splitlines()
    ]
    assert [clip.line for clip in clips] == [1, 2, 3]


@pytest.mark.parametrize(
    ("suffix", "end"), [("in oil", " in oil"), (", in oil", ", in oil"), ("，油画", "，油画"), ("", ""), (None, "")]
)
def test_words_are_put_around_captions_with_a_space_but_none_before_a_comma(suffix, end):
    words = Words("DISNEY", "a cartoon:", suffix)
    clip = words.around(Clip(Path("a.mp4"), "a cat", 1, other_captions=("a dog",)))
    assert clip.captions == (f"DISNEY a cartoon: a cat{end}", f"DISNEY a cartoon: a dog{end}")


@pytest.mark.parametrize(
    ("words", "is_problem", "is_said"),
    [
        (Words("circle"), False, True), (Words("circle", with_plain=True), True, True),
        (Words("circle", with_plain=True, plain_prompt="a shape"), False, True),
        (Words("circ", with_plain=True), False, False), (Words(None, with_plain=True), False, False),
    ],
)  # fmt: skip
def test_captions_that_have_the_new_word_already_are_said(drawn, tmp_path, words, is_problem, is_said):
    """A problem where captions without the word stand for what the base model knows: they would have it."""
    folder = lay_out("metadata.jsonl", drawn, tmp_path / "clips")
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    first, *others = (json.loads(line) for line in lines)
    found = [first | {"text": "a red circle, moving"}, *(row | {"text": "a square"} for row in others)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, found)))
    listed = read_listing([Folder(folder)], words=words)
    said = listed.problems if is_problem else listed.remarks
    assert any("1 captions contain --id_token circle, the first one that of" in line for line in said) == is_said
    assert bool(listed.problems) == is_problem
    kept = read_listing([Folder(folder, is_regularization=True)], words=words)
    assert any("--regularization_data_root shows what is to stay" in line for line in kept.problems) == is_said


def test_a_parquet_table_is_read(drawn, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is optional: the message says how to install it")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = lay_out("no captions", drawn, tmp_path / "clips")
    names = sorted(path.name for path in (folder / "videos").iterdir())
    table = pyarrow.table({"file_name": [f"videos/{name}" for name in names], "caption": names})
    parquet.write_table(table, folder / "metadata.parquet")
    assert [clip.caption for clip in read_listing([Folder(folder)]).clips] == names


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
    clips = read_listing([Folder(folder)]).clips
    said = remarks(clips, [examine(clip, SELECTION).windows[0] for clip in clips], SELECTION)
    expected = named.replace("00.mp4", first.name).replace("01.mp4", second.name)
    assert f"the same video more than once: {expected}" in said


def test_what_stands_beside_a_caption_and_ends_as_no_clip_does_is_told(drawn, tmp_path):
    folder = lay_out(BESIDE, drawn, tmp_path / "clips")
    for name in ("a.xyz", "a.txt", "b", "b.txt", "c.json", "c\n.txt"):
        (folder / name).write_text("x")
    assert read_listing([Folder(folder)]).remarks == [
        f"{folder}: captions without a clip: c\\n.txt",
        f"{folder}: have a caption but not the ending of a video, so not used; convert them to .mp4: a.xyz, b",
    ]


@pytest.mark.parametrize("layout", [BESIDE, SAT])
def test_links_to_folders_in_which_clips_would_be_looked_for_are_told(layout, drawn, tmp_path):
    folder = lay_out(layout, drawn, tmp_path / "clips")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(folder / "videos", tmp_path / "elsewhere")
    (folder / "videos").symlink_to(tmp_path / "elsewhere" / "videos")
    if layout == SAT:  # the link that makes the layout is followed
        assert len(read_listing([Folder(folder)]).clips) == 3
        (tmp_path / "elsewhere" / "videos" / "more").symlink_to(tmp_path / "elsewhere")
        (told,) = read_listing([Folder(folder)]).remarks
        assert told == f"{folder}: links to folders, which are not followed; pass those folders as well: more"
    else:
        (problem,) = read_listing([Folder(folder)]).problems
        assert "holds no videos and no images" in problem
        assert problem.endswith("but links to folders, which are not followed (videos); pass those folders")


def test_clips_in_rarer_containers_are_found_by_their_endings(drawn, tmp_path):
    clip = next((drawn / "videos").glob("*.mp4"))
    for suffix in ("asf", "VOB", "h264", "f4v", "3g2", "y4m"):
        shutil.copy(clip, tmp_path / f"{suffix}.{suffix}")
        (tmp_path / f"{suffix}.txt").write_text("x")
    listed = read_listing([Folder(tmp_path)])
    assert len(listed.clips) == 6 and listed.problems == listed.remarks == []


def test_a_message_stays_in_its_line_whatever_a_file_is_called():
    problems = [f"a\nb\x1b[31m\udce9é 🎬{number}.mp4: no caption; write it" for number in range(2)]
    said = list_problems("clips", problems, "nothing is trained").splitlines()
    assert said[1:] == [f"  a\\nb\\x1b[31m\\udce9é 🎬{number}.mp4: no caption; write it" for number in range(2)]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_an_image_is_a_clip_of_one_frame(tmp_path, suffix):
    Image.new("RGB", (96, 64), "red").save(tmp_path / f"still.{suffix}")
    (tmp_path / "still.txt").write_text("a red picture")
    _, _, (clip,), problems, _ = read_listing([Folder(tmp_path)])
    (facts,) = examine(clip, SELECTION).windows
    assert problems == [] and (facts.width, facts.height, facts.num_frames, facts.num_seen) == (96, 64, 1, 1)


@pytest.mark.parametrize("other", LAYOUTS[1:])
def test_two_layouts_at_once_are_refused_unless_one_is_named(other, drawn, tmp_path):
    folder = lay_out(other, drawn, tmp_path / "clips")
    for name in ("videos.txt", "prompts.txt"):
        shutil.copy(drawn / name, folder)
    with pytest.raises(ValueError, match="fits 2 layouts .*two lists: prompts.txt, videos.txt.*--caption_column"):
        read_listing([Folder(folder)])
    assert len(read_listing([Folder(folder)], Columns("prompts.txt", "videos.txt")).clips) == 3


CLIP, FOLDER, PIPE = "a clip", "a folder", "a pipe"  # stand for what is no text
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
WEB_PAGE = "<!DOCTYPE html><html><body>404 Not Found</body></html>"
ROW = {"file_name": "a.mp4", "text": "x"}
BESIDE_A = {"a.mp4": CLIP, "a.txt": "x"}


def silence():
    """A second of it, as a .wav file."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    return file.getvalue()


class Mistake(NamedTuple):
    message: str  # a part of one of the problems; {root} is the folder
    files: dict  # of the folder: text, bytes, one of the above, or the Path that a link points to
    options: dict = {}


def in_lists(message, prompts, videos, files=None, **options):
    return Mistake(message, {"prompts.txt": prompts, "videos.txt": videos, "a.mp4": CLIP} | (files or {}), options)


def in_json(message, *rows, files=None, **options):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    return Mistake(message, {"metadata.jsonl": "\n".join(lines), "a.mp4": CLIP} | (files or {}), options)


def in_csv(message, table, **options):
    return Mistake(message, {"metadata.csv": table, "a.mp4": CLIP}, options)


MISTAKES = {
    # what a list can be
    "UTF-16": in_lists("prompts.txt: is UTF-16 text; save", "a cat".encode("utf-16"), "a.mp4"),
    "UTF-16 without a mark": in_lists("prompts.txt:1: not UTF-8 text (byte 0x00", "a cat".encode("utf-16-le"), "a.mp4"),
    "cp1252": in_lists("prompts.txt:2: not UTF-8 text (byte 0xe9", "x\ncaf\xe9".encode("cp1252"), "a.mp4\na.mp4"),
    "a blank line": in_lists("prompts.txt:2: blank line; write", "x\n\ny", "a.mp4\na.mp4\na.mp4"),
    "a blank line at the start": in_lists("videos.txt:1: blank line; write", "x\ny", "\na.mp4"),
    "unequal lengths": in_lists("prompts.txt has 2 lines and videos.txt 1: line n", "x\ny", "a.mp4"),
    "no line": in_lists("prompts.txt: the file is empty; write one line per clip", " \n\n", "a.mp4"),
    "one list": Mistake("prompts.txt: no such file; write it, name another", {"videos.txt": "a.mp4", "a.mp4": CLIP}),
    "a list of another name": Mistake(
        "but there is prompt.txt: pass --caption_column prompt.txt", {"prompt.txt": "x", "videos.txt": "a.mp4"}
    ),
    "a folder as a list": in_lists("prompts.txt: is not a plain file; write a text file", FOLDER, "a.mp4"),
    "a pipe as a list": in_lists("prompts.txt: is not a plain file; write a text file", PIPE, "a.mp4"),
    "a list that cannot be read": in_lists("prompts.txt: cannot be read (Input", Path("/proc/self/mem"), "a.mp4"),
    "lists from Git LFS": in_lists("videos.txt: is a Git LFS pointer, not the file", LFS_POINTER, LFS_POINTER),
    "one list for both": in_lists("videos.txt: is meant by --caption_col", "x", "a.mp4", caption="videos.txt"),
    "no list of images": in_lists("images.txt: no such file; write", "x", "a.mp4", image="images.txt"),
    "swapped lists": in_lists("line 1: {root}/x: no such file; correct the path", "a.mp4", "x"),
    # paths
    "a missing clip": in_lists("line 1: {root}/b.mp4: no such file; correct the path", "x", "b.mp4"),
    "a folder": in_lists("line 1: {root}/b: is a folder; give the path", "x", "b", {"b": FOLDER}),
    "a folder named as a clip": in_lists("{root}/b.mp4: is a folder; give the path", "x", "b.mp4", {"b.mp4": FOLDER}),
    "a pipe": in_lists("{root}/b.mp4: is not a plain file but a pipe", "x", "b.mp4", {"b.mp4": PIPE}),
    "a dead link": in_lists("is a link to /none.mp4, which is not", "x", "b.mp4", {"b.mp4": Path("/none.mp4")}),
    "a name too long": in_lists("File name too long; correct the path", "x", "a" * 300),
    "a name that is too long with accents apart": in_lists("no such file; correct the path", "x", "\xe9" * 120),
    "a home that is nobody's": in_lists("{root}/~nobody-here/a.mp4: no such file; correct", "x", "~nobody-here/a.mp4"),
    "an address": in_lists("is an address, and clips are read from files; download", "x", "https://host/a.mp4"),
    "an address in a table": in_json("metadata.jsonl:1: {root}/s3:/b/a.mp4: is an", ROW | {"file_name": "s3://b/a.mp4"}),
    "a drive of Windows": in_lists("is a path of Windows: give it relative to", "x", "C:\\clips\\a.mp4"),
    "slashes of Windows": in_lists("but there is {root}/b/a.mp4, which is spelt", "x", "b\\a.mp4", {"b/a.mp4": CLIP}),
    "NFD": in_lists("but there is {root}/caf\xe9.mp4", "x", "cafe\u0301.mp4", {"caf\xe9.mp4": CLIP}),
    "NFC": in_lists("but there is {root}/cafe\u0301.mp4", "x", "caf\xe9.mp4", {"cafe\u0301.mp4": CLIP}),
    "another case": in_lists("but there is {root}/a.mp4, which is spelt", "x", "A.MP4"),
    "no suffix": in_lists("but there is {root}/a.mp4, which is spelt", "x", "a"),
    "quotes": in_lists("but there is {root}/a.mp4, which is spelt", "x", '"a.mp4"'),
    # what a file can be
    "nothing in a video": Mistake("a.mp4: the file is empty; copy it again", {"a.mp4": "", "a.txt": "x"}),
    "nothing in an image": Mistake("a.png: the file is empty; copy it again", {"a.png": "", "a.txt": "x"}),
    "a web page": Mistake("a.mp4: cannot be read as a video", {"a.mp4": WEB_PAGE, "a.txt": "x"}),
    "a web page as a picture": Mistake("a.png: holds no frame that FFmpeg can", {"a.png": WEB_PAGE, "a.txt": "x"}),
    "a video from Git LFS": Mistake("fetch it with `git lfs pull`", {"a.mp4": LFS_POINTER, "a.txt": "x"}),
    "only sound": Mistake("a.mp4: holds no video, only sound", {"a.mp4": silence(), "a.txt": "x"}),
    # tables
    "no row": Mistake("metadata.jsonl: the table is empty; write one", {"metadata.jsonl": ""}),
    "only a header": in_csv("metadata.csv: the table is empty; write one row per clip", "file_name,text\n"),
    "no header": in_csv("none of text, caption, prompt; pass the column of the captions", "a.mp4,x\na.mp4,y\n"),
    "no JSON": in_json("metadata.jsonl:2: not JSON (Expecting value); write one object per line", ROW, "hello"),
    "JSON over several lines": Mistake("jsonl:1: not JSON", {"metadata.jsonl": json.dumps([ROW], indent=1)}),
    "a comma too many in JSON": in_json("no comma after it or after its last", '{"file_name": "a.mp4",}'),
    "two objects in a line": in_json("metadata.jsonl:1: not JSON (Extra data)", json.dumps(ROW) * 2),
    "a path of Windows in JSON": in_json("metadata.jsonl:1: not JSON (Invalid", '{"file_name": "C:\\clips\\a.mp4"}'),
    "JSON too deep": in_json("metadata.jsonl:1: not JSON (maximum recursion depth", "[" * 100_000),
    "a number too long": in_json("metadata.jsonl:1: not JSON (Exceeds the limit", '{"text": ' + "1" * 5000 + "}"),
    "a list in a line": in_json("metadata.jsonl:1: is a list; write one object per line", [1]),
    "cp1252 in a table": Mistake(
        "metadata.jsonl:1: not UTF-8 text", {"metadata.jsonl": '{"text": "caf\xe9"}'.encode("cp1252")}
    ),
    "UTF-16 in a table": in_csv("metadata.csv: is UTF-16 text; save", "file_name,text\n".encode("utf-16")),
    "a table from Git LFS": in_csv("metadata.csv: is a Git LFS pointer", LFS_POINTER),
    "Parquet from Git LFS": Mistake("metadata.parquet: is a Git LFS pointer", {"metadata.parquet": LFS_POINTER}),
    "semicolons": in_csv("metadata.csv:1: columns are separated by ';'; save it", "file_name;text\na.mp4;x\n"),
    "tabs": in_csv("metadata.csv:1: columns are separated by '\\t'; save it", "file_name\ttext\na.mp4\tx\n"),
    "a comma in a caption": in_csv("has more fields than the header, ['runs']; put", "file_name,text\na.mp4,x, runs\n"),
    "an open quote": in_csv("csv:3: not CSV (unexpected end", 'file_name,text\na.mp4,x\na.mp4,"y\na.mp4,z\n'),
    "a quote in quotes": in_csv("csv:2: not CSV (',' expected after '\"')", 'file_name,text\na.mp4,"x "y" z"\n'),
    "a field too long": in_csv("csv:2: not CSV (field larger than", "file_name,text\na.mp4," + "x" * 140_000),
    "a short row": in_csv("metadata.csv:2: text is None; write", "file_name,text\na.mp4\n"),
    "two columns of a name": in_csv("csv:1: has more than one column text; rename", "file_name,text,text\na.mp4,x,y\n"),
    "no column of captions": in_csv("has none of text, caption, prompt; pass", "file_name,words\na.mp4,x\n"),
    "two columns of captions": in_csv(
        "has more than one of text, prompt; pass the column of the captions as --caption_column",
        "file_name,text,prompt\na.mp4,x,y\n",
    ),
    "no column of files": in_csv("no column file_name; it has video, text: pass one", "video,text\na.mp4,x\n"),
    "an empty caption": in_json("metadata.jsonl:1: text is ' '; write a text there", ROW | {"text": " "}),
    "a number": in_json("metadata.jsonl:1: text is 3; write a text there", ROW | {"text": 3}),
    "a nested value": in_json("metadata.jsonl:1: text is {'en': 'x'}; write a text", ROW | {"text": {"en": "x"}}),
    "half a character": in_json("jsonl:1: text is 'a \\ud83d'; write", '{"file_name": "a.mp4", "text": "a \\ud83d"}'),
    "no file in a row": in_json("metadata.jsonl:2: file_name is None; write", ROW, {"text": "x"}),
    "no image in a row": in_json("image is None; write", ROW | {"image": None}, image="image"),
    "a missing image": in_json("{root}/b.png: no such file", ROW | {"image": "b.png"}, image="image"),
    "a video as the image": in_json("cannot be read as an image", ROW | {"image": "a.mp4"}, image="image"),
    "an image from Git LFS": in_json(
        "b.png: is a Git LFS", ROW | {"image": "b.png"}, files={"b.png": LFS_POINTER}, image="image"
    ),
    "a number as a mask": in_json("metadata.jsonl:1: mask is 3; write a text there", ROW | {"mask": 3}, mask="mask"),
    "a missing mask": in_json("{root}/b.png: no such file", ROW | {"mask": "b.png"}, mask="mask"),
    "a missing mask of a list": in_lists(
        "line 2: {root}/b.png: no such file; corr", "x\ny", "a.mp4\na.mp4", {"masks.txt": "\nb.png"}, mask="masks.txt"
    ),
    "a web page as a mask": in_json(
        "b.png: this mask holds no frame that FFmpeg", ROW | {"mask": "b.png"}, files={"b.png": WEB_PAGE}, mask="mask"
    ),
    "a mask from Git LFS": in_json(
        "b.png: is a Git LFS", ROW | {"mask": "b.png"}, files={"b.png": LFS_POINTER}, mask="mask"
    ),
    "masks with a line too many": in_lists(
        "and videos.txt 1 and masks.txt 2: line n of", "x", "a.mp4", {"masks.txt": "a.mp4\na.mp4"}, mask="masks.txt"
    ),
    "no masks in a list": in_lists(
        "masks.txt: the file is empty; write one line", "x", "a.mp4", {"masks.txt": "\n\n"}, mask="masks.txt"
    ),
    "one list for masks and videos": in_lists("videos.txt: is meant by --video", "x", "a.mp4", mask="videos.txt"),
    # columns that options name
    "another column of captions": in_json("no column words; it has file_name, text", ROW, caption="words"),
    "another column of files": in_json("pass one of them as --video_column", ROW, video="video"),
    "another column of images": in_json("no column image; it has file_name, text", ROW, image="image"),
    "one column for both": in_json("text: is meant by --video_column and by --capt", ROW, video="text"),
    "a table as a column": in_json("a table is found without being named", ROW, caption="metadata.jsonl"),
    "a column beside clips": Mistake(
        "--caption_column text: needs a list or a table, and {root} has a caption beside each clip; write",
        BESIDE_A,
        {"caption": "text"},
    ),
    "a list beside clips": Mistake("words.txt: no such file; write", BESIDE_A, {"caption": "words.txt"}),
    "another column of masks": in_json("pass one of them as --mask_column", ROW, mask="mask"),
    "no list of masks": in_lists("masks.txt: no such file; write it", "x", "a.mp4", mask="masks.txt"),
    "a mask column beside clips": Mistake("--mask_column m: needs a list", BESIDE_A, {"mask": "m"}),
    "an image column beside clips": Mistake("--image_column im: needs a list", BESIDE_A, {"image": "im"}),
    "a column of labels": Mistake(
        "--video_column file: needs a list or a table, and {root} has videos/ and labels/; write",
        {"videos/a.mp4": CLIP, "labels/a.txt": "x"},
        {"video": "file"},
    ),
    # a caption beside each clip, in videos/ and labels/, nowhere
    "a caption missing": Mistake("b.mp4: no caption: {root}/b.txt is missing; write it", BESIDE_A | {"b.mp4": CLIP}),
    "a caption empty": Mistake("a.txt is empty; write the caption", {"a.mp4": CLIP, "a.txt": " \n"}),
    "a caption that is a folder": Mistake(
        "b.mp4: no caption: {root}/b.txt is not a plain file; write", BESIDE_A | {"b.mp4": CLIP, "b.txt": FOLDER}
    ),
    "a caption in another case": Mistake(
        "b.txt is missing, but there is {root}/b.TXT; rename", BESIDE_A | {"b.mp4": CLIP, "b.TXT": "x"}
    ),
    "a caption that ends twice": Mistake(
        "{root}/b.txt is missing, but there is b.txt.txt, which Windows may show as b.txt; rename it to b.txt",
        BESIDE_A | {"b.mp4": CLIP, "b.txt.txt": "x"},
    ),
    "only captions in another case": Mistake("but there is {root}/b.TXT; rename", {"b.MP4": CLIP, "b.TXT": "x"}),
    "captions named as the whole file": Mistake(
        "{root}/b.txt is missing, but there is b.mp4.txt; rename it to b.txt", {"b.mp4": CLIP, "b.mp4.txt": "x"}
    ),
    "a name that is not UTF-8": Mistake(
        "its name is not UTF-8, so that no list or page could hold it; rename it",
        {"\udce9.mp4": CLIP, "\udce9.txt": "x"},
    ),
    "only captions that end twice": Mistake("but there is b.txt.txt, which", {"b.mp4": CLIP, "b.txt.txt": "x"}),
    "a caption with accents apart": Mistake(
        "but there is {root}/e\u0301.txt; rename it", BESIDE_A | {"\xe9.mp4": CLIP, "e\u0301.txt": "x"}
    ),
    "a caption in UTF-16": Mistake(
        "a.mp4: a.txt: is UTF-16 text; save", {"a.mp4": CLIP, "a.txt": "x".encode("utf-16")}
    ),
    "a caption from Git LFS": Mistake("a.mp4: a.txt: is a Git LFS pointer", {"a.mp4": CLIP, "a.txt": LFS_POINTER}),
    "a label missing": Mistake("a.mp4: no caption: {root}/labels/a.txt", {"videos/a.mp4": CLIP, "labels/b.txt": "x"}),
    "a label too many": Mistake(
        "labels/b.txt: no clip of this name", {"videos/a.mp4": CLIP, "labels/a.txt": "x", "labels/b.txt": "y"}
    ),
    "a thumbnail beside its clip": Mistake(
        "a.mp4: shares its caption with a.jpg; rename one of them", {"a.mp4": CLIP, "a.jpg": b"x", "a.txt": "x"}
    ),
    "no labels": Mistake("a.txt is missing; write it", {"videos/a.mp4": CLIP, "labels": FOLDER}),
    "no videos": Mistake("videos: no videos or images in it", {"videos/a.doc": "", "labels/a.txt": "x"}),
    "two tables": in_json("fits 2 layouts (metadata.jsonl; metadata.csv)", ROW, files={"metadata.csv": "text"}),
    "a table and captions": in_json(
        "(metadata.jsonl; a caption beside each clip: b/a.txt)", ROW, files={"b/a.mp4": CLIP, "b/a.txt": "x"}
    ),
    "lists and labels": in_lists(
        "fits 2 layouts (two lists: prompts.txt, videos.txt; videos/ and labels/)",
        "x",
        "a.mp4",
        {"videos": FOLDER, "labels": FOLDER},
    ),
    "nothing": Mistake("{root}: holds no videos and no images; copy clips and captions there", {}),
    "no clips": Mistake("{root}: holds no videos and no images, only a.doc; copy clips", {"a.doc": ""}),
    "only a video": Mistake("holds 1 video or image, but no captions: ", {"a.mp4": CLIP}),
    "lists of other names": Mistake(
        "no videos/ and labels/; write one of them, or name your lists with --caption_column and --video_column",
        {"a.mp4": CLIP, "prompt.txt": "x", "video.txt": "a.mp4"},
    ),
    "only videos": Mistake("holds 2 videos and images, but no captions: ", {"a.mp4": CLIP, "b/b.mp4": CLIP}),
    "the folder of several datasets": Mistake(
        "{root}: has datasets of their own in it (a, b, c and 1 more); pass the folders of the datasets in its place, "
        "several after each other: {root}/a {root}/b {root}/c ...",
        {
            "a/prompts.txt": "x", "a/videos.txt": "a.mp4", "b/metadata.jsonl": json.dumps(ROW), "b/a.mp4": CLIP,
            "c/videos/a.mp4": CLIP, "c/labels/a.txt": "x", "d/videos.txt": "a.mp4", "e": FOLDER, ".f/videos.txt": "",
        },
    ),
    "datasets beside captions beside clips": Mistake(
        "{root}: has datasets of their own in it (b); pass the folders",
        {"a/a.mp4": CLIP, "a/a.txt": "x", "b/b.mp4": CLIP, "b/videos.txt": "b.mp4", "b/prompts.txt": "x"},
    ),
    "a table of another name": Mistake("beside them metadata.json, but no", {"metadata.json": "[]", "a.mp4": CLIP}),
}  # fmt: skip


def problems_of(folder, options):
    """Returns all that training would refuse."""
    try:
        _, _, clips, problems, _ = read_listing([Folder(folder)], Columns(**options))
    except ValueError as error:
        return [str(error)]
    return problems + [problem for clip in clips if (problem := examine(clip, SELECTION).problem)]


def write(path, content, clip):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Path):
        path.symlink_to(content)
    elif content == FOLDER:
        path.mkdir()
    elif content == PIPE:
        os.mkfifo(path)
    elif content == CLIP:
        shutil.copy(clip, path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_dataset_is_said_with_its_place_and_the_way_out(name, drawn, tmp_path):
    mistake = MISTAKES[name]
    for file, content in mistake.files.items():
        write(tmp_path / file, content, next((drawn / "videos").iterdir()))
    problems, message = problems_of(tmp_path, mistake.options), mistake.message.replace("{root}", str(tmp_path))
    assert any(message in problem for problem in problems), problems
    assert all("; " in problem or ": pass " in problem for problem in problems)


def test_many_problems_are_told_by_kind_with_their_number(drawn, tmp_path, capsys):
    """As they are when the folder of several datasets is passed, or a disk is not there."""
    for number in range(40):
        (tmp_path / f"{number:02d}.mp4").touch()
    for name in ("00", "01"):
        (tmp_path / f"{name}.txt").write_text("x")
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "videos.txt").write_text("a.mp4")
    with pytest.raises(SystemExit):
        check.main([str(tmp_path)])
    said = capsys.readouterr().err
    first, *lines = said[said.index("python dataset.py check: error") :].splitlines()
    assert first.endswith("79 problems in the dataset, training refuses it:") and len(lines) <= 20
    assert "has datasets of their own in it (dataset)" in lines[0]
    assert lines[1].endswith("02.txt is missing; write it, or move the clip to another folder")
    assert "  ... and 33 more like this" in lines and "  ... and 35 more like this" in lines
    assert lines[7].startswith(f"  {tmp_path}/00.mp4: the file is empty")


def test_problems_of_many_kinds_are_not_all_told():
    problems = [f"line {number}: x; way out {chr(65 + number % 13)}" for number in range(30)]
    lines = grouped(problems)
    assert lines[:2] == ["line 0: x; way out A", "... and 2 more like this"] and len(lines) == 21
    assert lines[-1] == "... and 6 of 3 other kinds"
    assert grouped(problems[:20]) == problems[:20]


PARQUET_MISTAKES = {
    "no Parquet": (b"hello", "metadata.parquet: not Parquet (Could not open"),
    "nested": ({"file_name": ["a.mp4"], "text": [{"en": "x"}]}, "metadata.parquet, row 1: text is {'en': 'x'}; write"),
    "no file names": ({"video": [b"\0\1"], "text": ["x"]}, "no column file_name; it has video, text: pass"),
    "no row": ({"file_name": [], "text": []}, "metadata.parquet: the table is empty; write"),
}


@pytest.mark.parametrize("name", PARQUET_MISTAKES)
def test_a_mistake_in_a_parquet_table_is_said_with_its_place(name, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is optional: the message says how to install it")
    parquet = pytest.importorskip("pyarrow.parquet")
    content, message = PARQUET_MISTAKES[name]
    if isinstance(content, bytes):
        (tmp_path / "metadata.parquet").write_bytes(content)
    else:
        parquet.write_table(pyarrow.table(content), tmp_path / "metadata.parquet")
    problems = problems_of(tmp_path, {})
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("table", "caption"),
    [
        (b"file_name,text\ra.mp4,x\r", "x"),
        (b"\xef\xbb\xbffile_name, text\r\na.mp4, x\r\n", "x"),
        (b'file_name,text\n\na.mp4,"x, ""y""\nz"\n', 'x, "y" z'),
        (b'file_name,text\na.mp4,he says "hi"\n', 'he says "hi"'),
        (b"file_name,text,,\na.mp4,x,,\n", "x"),
        (b"file_name,text\na.mp4,x,,\n", "x"),
    ],
)
def test_a_csv_may_have_any_line_ends_spaces_and_quotes(table, caption, tmp_path):
    (tmp_path / "metadata.csv").write_bytes(table)
    _, _, (clip,), problems, _ = read_listing([Folder(tmp_path)])
    assert (clip.video, clip.caption, problems) == (tmp_path / "a.mp4", caption, [])


def test_a_file_is_no_folder_of_clips(tmp_path):
    (tmp_path / "clips.zip").write_text("x")
    with pytest.raises(FileNotFoundError, match="clips.zip: is a file, not a folder; pass the one that"):
        read_listing([Folder(tmp_path / "clips.zip")])


def test_images_to_start_from_can_be_a_column_but_not_a_file_beside_a_clip(drawn, tmp_path):
    folder = lay_out("no captions", drawn, tmp_path / "clips")
    row = {"file_name": "videos/x.mp4", "text": "a cat", "image": "x.png"}
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    (clip,) = read_listing([Folder(folder)], Columns(image="image")).clips
    assert clip.image == folder / "x.png" and clip.place == "metadata.jsonl:1"
    beside = lay_out(BESIDE, drawn, tmp_path / "beside")
    with pytest.raises(ValueError, match="--image_column image: needs a list or a table"):
        read_listing([Folder(beside)], Columns(image="image"))


def test_files_that_are_not_used_are_told(drawn, tmp_path):
    folder = lay_out(BESIDE, drawn, tmp_path / "clips")
    for name in ("IMG_1.HEIC", "orphan.txt"):
        (folder / name).write_bytes(b"x")
    assert read_listing([Folder(folder)]).remarks == [
        f"{folder}: not read; save them as JPEG or PNG: IMG_1.HEIC",
        f"{folder}: captions without a clip: orphan.txt",
    ]
    lists = lay_out(LISTS, drawn, tmp_path / "lists")
    assert read_listing([Folder(lists)]).remarks == []
    (lists / "other").symlink_to(folder)
    assert read_listing([Folder(lists)]).remarks == []  # lists may name files in it
    for number in range(5):
        (lists / f"{number}.mov").write_bytes(b"x")
    (told,) = read_listing([Folder(lists)]).remarks
    assert told == f"{lists}: in none of the two lists, so not used: 0.mov, 1.mov, 2.mov and 2 more"


# ---- several folders


def test_several_folders_are_one_dataset_and_each_clip_names_its_folder(drawn, tmp_path):
    lists, beside = lay_out(LISTS, drawn, tmp_path / "lists"), lay_out(BESIDE, drawn, tmp_path / "beside")
    table = lay_out("metadata.jsonl", drawn, tmp_path / "table")
    listing = read_listing([Folder(lists), Folder(beside, repeats=2), Folder(table)], words=Words("DISNEY"))
    assert listing.layouts == [LISTS, BESIDE, "metadata.jsonl"] and listing.problems == []
    assert listing.name == f"{lists}, {beside}=2, {table}"
    assert listing.describe().splitlines()[3:] == [f"{beside}: 3 clips, each shown 2 times an epoch, 6 in all"]
    assert [clip.line for clip in listing.clips] == list(range(1, 10))
    assert [clip.repeats for clip in listing.clips] == [1] * 3 + [2] * 3 + [1] * 3
    first, beside_clip, row = listing.clips[0], listing.clips[3], listing.clips[8]
    assert first.problem("x").startswith(f"{lists}, line 1: ") and row.named == f"{table}, metadata.jsonl:3"
    assert beside_clip.named == str(beside_clip.video)
    assert beside_clip.problem("x") == f"{beside_clip.video}: x"
    said = remarks(listing.clips, [examine(clip, SELECTION).windows[0] for clip in listing.clips], SELECTION)
    assert any(line.startswith("the same video more than once: ") and str(beside_clip.video) in line for line in said)


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
    for text in ("a=0", "a=b", "a=-1", "a=1.5", "a=\N{SUPERSCRIPT TWO}"):
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
    data = Data(CachedClips(files, [[Path("c")]] * 4), [(1,)] * 4, prompts={}, repeats=[2, 2, 1, 3])
    training, held_out, _ = data.split(1, seed=0)
    assert len(held_out.shapes) == 1
    (out,) = (int(paths[0].name) for paths in held_out.clips.latents)
    shown = [int(paths[0].name) for paths in training.clips.latents]
    assert shown == [clip for clip in range(4) if clip != out for _ in range([2, 2, 1, 3][clip])]
