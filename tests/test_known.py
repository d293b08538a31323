"""What is known of files is used as long as they do not change, and only then."""

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from make_example import make_clips
from PIL import Image

from clips import facts, known
from clips.clean import clean
from clips.facts import examine
from clips.frames import View
from clips.known import CACHE, File, Notes, look_at, record_use
from clips.listing import Folder, read_listing
from clips.selection import Selection
from clips.video import Damage, examine_video

VIEW = View(64, 96, 8, 9, 0, 0, "center", 42)


@pytest.fixture
def clips(tmp_path):
    return read_listing([Folder(make_clips(tmp_path / "clips", count=3))]).clips


@pytest.fixture
def read_files(monkeypatch):
    """The videos that are read, in order."""
    read = []

    def examine_and_tell(path):
        read.append(path)
        return examine_video(path)

    monkeypatch.setattr(known, "examine_video", examine_and_tell)
    return read


def test_a_known_file_is_not_read_and_gives_the_same_facts(clips, tmp_path, read_files):
    notes = Notes(tmp_path / "cache")
    first = [examine(clip, Selection(VIEW), notes) for clip in clips]
    notes.publish()
    assert read_files == [clip.video for clip in clips]
    later, slower = Notes(tmp_path / "cache"), Selection(VIEW._replace(fps=4))
    assert [examine(clip, Selection(VIEW), later) for clip in clips] == first
    assert [examine(clip, slower, later).windows[0].num_seen for clip in clips] == [5, 5, 5]
    assert len(read_files) == 3
    examine(clips[0], Selection(VIEW), later, read_again=True)
    assert len(read_files) == 4


@pytest.mark.parametrize("change", ["content", "time", "name"])
def test_a_file_that_changed_is_read_again(clips, tmp_path, read_files, change):
    notes, video = Notes(tmp_path / "cache"), clips[0].video
    look_at(video, notes)
    if change == "content":
        video.write_bytes(clips[1].video.read_bytes())
    if change == "time":
        status = video.stat()
        os.utime(video, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    if change == "name":
        video = video.rename(video.with_name("b\tc\n.mp4"))
    file = look_at(video, notes)
    notes.publish()
    assert len(read_files) == 2 and look_at(video, Notes(tmp_path / "cache")) == file


def test_everything_about_a_file_survives_a_note(tmp_path, clips, monkeypatch):
    video, _ = examine_video(clips[0].video)
    video = video._replace(first=-7, remarks=("is interlaced",), damage=(Damage(0.5, "lost"),))
    times = np.cumsum(np.random.default_rng(0).integers(1, 2**40, 1000)) - 7
    times -= times[0] + 7
    monkeypatch.setattr(known, "examine_video", lambda path: (video, times))
    notes = Notes(tmp_path)
    file = look_at(clips[0].video, notes)
    notes.publish()
    later = look_at(clips[0].video, Notes(tmp_path))
    assert later == file == File(file.content, video, file.packed_times) and (later.times == times).all()


def test_an_image_to_start_from_is_known_as_well(clips, tmp_path, monkeypatch):
    Image.new("RGB", (96, 64)).save(tmp_path / "a.png")
    notes, clip = Notes(), clips[0]._replace(image=tmp_path / "a.png")
    first = examine(clip, Selection(VIEW), notes)
    monkeypatch.setattr(facts, "read_image", lambda *_: pytest.fail("read again"))
    assert examine(clip, Selection(VIEW), notes) == first and first.windows[0].image


def test_later_notes_count(clips, tmp_path):
    for number in range(20):
        notes = Notes(tmp_path)
        notes.add(["video"], number)
        notes.add(["same"], 0)
        notes.publish()
        assert Notes(tmp_path).get(["video"]) == number
    assert sum(path.read_text().count("same") for path in (tmp_path / "known").iterdir()) == 1


def test_threads_add_notes_while_they_are_published(tmp_path):
    notes = Notes(tmp_path, read_only=True)
    with ThreadPoolExecutor(8) as threads:
        added = [threads.submit(notes.add, ["video", number], number) for number in range(20_000)]
        while not all(future.done() for future in added):
            notes.publish()
    notes.publish()
    assert len(notes.known) == 20_000 and [future.result() for future in added] == [None] * 20_000


def test_a_complete_cache_that_cannot_be_written_is_used(tiny_checkpoint, tmp_path, train, monkeypatch):
    folder = make_clips(tmp_path / "clips", count=1)
    train(tiny_checkpoint, tmp_path / "a", instance_data_root=folder, encode_only=True)

    def refuse(path, content):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(known, "publish", refuse)
    assert train(tiny_checkpoint, tmp_path / "b", instance_data_root=folder, max_train_steps=1)


def test_notes_that_are_only_read_are_not_written(clips, tmp_path):
    notes = Notes(tmp_path / "cache", read_only=True)
    look_at(clips[0].video, notes)
    notes.publish()
    assert not (tmp_path / "cache").exists()


# ---- clean


def write(path, days_old=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * 1000)
    age(path, days_old)
    return path


def age(path, days):
    seconds = path.stat().st_mtime - days * 86400
    os.utime(path, (seconds, seconds))


OTHERS = ("my-lora", ".ipynb_checkpoints")


def names(cache):
    return sorted(
        path.name
        for folder in ("latents", "captions")
        for path in (cache / folder).glob("*")
        if path.stem not in OTHERS
    )


def test_clean_keeps_what_a_run_uses_that_exists_and_what_is_new(tmp_path, clips):
    cache, run = tmp_path / "cache", tmp_path / "run"
    run.mkdir()
    used, caption = (
        write(cache / "latents" / f"{1:040x}.safetensors", 90),
        write(cache / "captions" / f"{2:040x}.safetensors", 90),
    )
    gone = write(cache / "latents" / f"{3:040x}.safetensors", 90)
    write(cache / "latents" / f"{4:040x}.safetensors", 90)
    write(cache / "latents" / f"{5:040x}.safetensors", 2)
    write(cache / "latents" / ".leftover.safetensors.ab12cd34", 90)
    record_use(cache, run, [used, caption])
    record_use(cache, tmp_path / "deleted", [gone])
    write(cache / "latents" / "my-lora.safetensors", 90)  # of another kind: never dropped
    (cache / "latents" / ".ipynb_checkpoints").mkdir()
    assert "would drop 2 files of 0.0 MB" in clean(
        cache, unused_days=30, dry_run=True
    )  # the deleted run started just now
    for use in (cache / "uses").iterdir():
        age(use, 90)
    assert "would drop 4 files" in clean(cache, unused_days=30, dry_run=True)
    assert len(names(cache)) == 6
    said = clean(cache, unused_days=30, dry_run=False)
    assert said.endswith("dropped 4 files of 0.0 MB; 3 encoded clips and captions are there")
    assert names(cache) == [f"{number:040x}.safetensors" for number in (1, 2, 5)]
    assert len(list((cache / "uses").iterdir())) == 1
    clean(cache, unused_days=0, dry_run=False)
    assert names(cache) == [f"{number:040x}.safetensors" for number in (1, 2)]


def test_a_run_that_starts_again_refers_to_what_it_uses_now(tmp_path):
    cache, run = tmp_path / "cache", tmp_path / "run"
    run.mkdir()
    first, second = (write(cache / "latents" / f"{number:040x}.safetensors", 90) for number in (1, 2))
    record_use(cache, run, [first])
    record_use(cache, run, [second])
    clean(cache, unused_days=30, dry_run=False)
    assert names(cache) == [f"{2:040x}.safetensors"]


def test_clean_forgets_files_that_are_gone(tmp_path, clips):
    cache = tmp_path / "cache"
    for clip in clips:
        notes = Notes(cache)
        look_at(clip.video, notes)
        notes.publish()
    clips[0].video.unlink()
    record_use(cache, tmp_path, [])
    assert len(Notes(cache).known) == 3
    clean(cache, unused_days=30, dry_run=False)
    assert len(list((cache / "known").iterdir())) == 1 and len(Notes(cache).known) == 2


def test_clean_without_a_cache_says_so(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="no cache in which a training has recorded .*; pass the dataset's folder"
    ):
        clean(tmp_path / "cache", unused_days=30, dry_run=False)


# ---- training


def test_encode_only_fills_the_cache_and_a_later_run_encodes_and_reads_nothing(
    tiny_checkpoint, tmp_path, train, capsys, monkeypatch
):
    folder, run = make_clips(tmp_path / "clips", count=2), tmp_path / "run"
    train(tiny_checkpoint, run, instance_data_root=folder, encode_only=True)
    said = capsys.readouterr().out
    assert f"encoded: 2 clips, captions: 2, in {folder / CACHE}; nothing was trained" in said
    assert not run.exists() and len(list((folder / CACHE / "latents").iterdir())) == 2
    with monkeypatch.context() as patched:
        for name in ("clips.known.examine_video", "cogvideox.encoders.video_encoder", "clips.entries.safe_open"):
            patched.setattr(name, lambda *_, **__: pytest.fail("read or encoded again"))
        assert len(train(tiny_checkpoint, run, instance_data_root=folder, max_train_steps=1)) == 1
    use = json.loads(next((folder / CACHE / "uses").iterdir()).read_text())
    assert use["output_dir"] == str(run) and len(use["files"]) == 2 + 3


def test_check_all_finds_a_change_that_size_and_time_hide(tiny_checkpoint, tmp_path, train, capsys):
    folder = make_clips(tmp_path / "clips", count=1)
    video = folder / (folder / "videos.txt").read_text().strip()
    train(tiny_checkpoint, tmp_path / "a", instance_data_root=folder, encode_only=True)
    status, content = video.stat(), bytearray(video.read_bytes())
    content[-1] ^= 1  # in the encoder's name at the end of the file
    video.write_bytes(content)
    os.utime(video, ns=(status.st_atime_ns, status.st_mtime_ns))
    latents = folder / CACHE / "latents"
    train(tiny_checkpoint, tmp_path / "a", instance_data_root=folder, encode_only=True)
    assert len(list(latents.iterdir())) == 1
    train(tiny_checkpoint, tmp_path / "a", instance_data_root=folder, encode_only=True, check_all=True)
    assert len(list(latents.iterdir())) == 2
    use = next((folder / CACHE / "uses").iterdir()).read_text()
    train(tiny_checkpoint, tmp_path / "a", instance_data_root=folder, encode_only=True)
    assert next((folder / CACHE / "uses").iterdir()).read_text() == use  # what was read last counts
