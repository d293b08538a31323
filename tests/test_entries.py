"""A cache to trust: any damage is found when a file is read, and what is damaged is encoded again to the same bits."""

import gc
import math
import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import reset_accelerate, training_options
from make_example import make_clips
from safetensors.torch import load, load_file, save

import dataset
import files
import train_cogvideox_lora
from clips.clean import clean, remove_leftovers
from clips.entries import Damaged, read_entry, read_header, to_bytes, write_entry
from clips.frames import View
from clips.known import record_use
from clips.listing import Folder, read_listing
from clips.order import Item, Ranks
from clips.selection import Selection
from cogvideox import encoders
from cogvideox.base_model import download_weights, read_base_model
from cogvideox.encoders import Encoder
from cogvideox.lora_files import LORA_FILE
from files import CannotContinue, find_leftovers, publish

VIEW = View(64, 96, 8, 9, 0, 0, "center", 0)
SHAPES = {"parameters": (2, 1, 2, 2), "image": (2, 2, 3)}
TENSORS = {
    "parameters": torch.arange(8.0, dtype=torch.bfloat16).reshape(2, 1, 2, 2),
    "image": torch.arange(12, dtype=torch.uint8).reshape(2, 2, 3),
}


# ---- one entry


@pytest.fixture
def entry(tmp_path):
    """Puts bytes into a file and reads it as an entry."""

    def read(content, verify=True, shapes=SHAPES):
        (tmp_path / "entry.safetensors").write_bytes(content)
        return read_entry(tmp_path / "entry.safetensors", shapes, verify=verify)

    return read


@pytest.mark.parametrize(
    "metadata", [{}, {"damage": "is damaged at 1.00 s (x)", "motion": "12.5"}], ids=["plain", "of a damaged clip"]
)
def test_every_flipped_bit_of_an_entry_is_found(monkeypatch, metadata):
    content = to_bytes(TENSORS, metadata)

    def entry(there):
        monkeypatch.setattr(Path, "read_bytes", lambda _: there)  # thousands of files would take seconds
        return read_entry(Path("entry.safetensors"), SHAPES, verify=True)

    assert torch.equal(entry(content)["image"], TENSORS["image"])
    assert b"} " in content, "without padding in the header, the test would not see whether its bits count"
    missed = []
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        if not isinstance(entry(bytes(flipped)), Damaged):
            missed.append(bit)
    assert missed == []


def test_200_bits_flipped_anywhere_in_what_a_run_has_cached_are_found(tiny_checkpoint, clips, tmp_path, train):
    cache, draw = tmp_path / "cache", random.Random(7)
    train(tiny_checkpoint, tmp_path / "run", latents_cache_dir=cache, encode_only=True)
    shapes = {"latents": {"parameters": (8, 3, 8, 12)}, "captions": {"prompt_embeds": (226, 32)}}
    paths = sorted(cache.glob("*/*.safetensors"))
    assert len(paths) == 6 + 7
    for _ in range(200):
        path = draw.choice(paths)
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        (tmp_path / "flipped.safetensors").write_bytes(content)
        for file, is_damaged in ((path, False), (tmp_path / "flipped.safetensors", True)):
            read = read_entry(file, shapes[path.parent.name], verify=True)
            assert isinstance(read, Damaged) == is_damaged


def test_equal_content_gives_equal_bytes():
    metadata = {"damage": "is damaged at 1.00 s (x)"}
    assert len({to_bytes(dict(pairs), metadata) for pairs in (TENSORS.items(), reversed(TENSORS.items()))}) == 1
    assert b'{"__metadata__": {"checksum": "' in to_bytes(TENSORS, metadata)[:40]
    assert to_bytes(TENSORS, metadata).index(b'"damage"') < to_bytes(TENSORS, metadata).index(b'"parameters"')


def test_an_entry_of_an_earlier_version_is_read_and_checked_for_what_can_be_checked(entry, tmp_path):
    for metadata in (None, {"damage": "is damaged at 1.00 s (x)"}):
        read = entry(save(TENSORS, metadata))
        assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())
        assert read_header(tmp_path / "entry.safetensors") == ((2, 1, 2, 2), metadata and metadata["damage"], None)
    infinite = {"parameters": torch.full((2, 1, 2, 2), math.inf), "image": TENSORS["image"]}
    assert entry(save(infinite)).reason == "parameters holds NaN or infinity"


@pytest.mark.parametrize(("content", "reason"), [
    (b"", "not a whole file of tensors"),
    (b"not ours" * 20, "not a whole file of tensors"),
    (to_bytes(TENSORS, {})[:-1], "not a whole file of tensors"),
    (to_bytes(TENSORS, {}) + b"x", "not a whole file of tensors"),
    (to_bytes(TENSORS | {"parameters": torch.zeros(2, 1, 2, 3)}, {}), "the shape [2, 1, 2, 3] instead of [2, 1, 2, 2]"),
    (to_bytes({"parameters": TENSORS["parameters"]}, {}), "holds parameters instead of image, parameters"),
    (to_bytes({}, {}), "holds nothing instead of"),
    (to_bytes(TENSORS | {"parameters": torch.full((2, 1, 2, 2), math.nan)}, {}), "parameters holds NaN or infinity"),
    (save(TENSORS, {"format": "pt"}), "metadata of another program: format"),
], ids=lambda value: value[:24] if isinstance(value, str) else "")  # fmt: skip
def test_what_is_not_an_entry_of_this_clip_is_told_with_its_reason(entry, content, reason):
    assert reason in entry(content).reason


def test_after_the_first_time_form_and_shape_are_checked_still(entry):
    flipped = bytearray(to_bytes(TENSORS, {}))
    flipped[-1] ^= 1
    assert not isinstance(entry(bytes(flipped), verify=False), Damaged)
    assert isinstance(entry(bytes(flipped)[:-1], verify=False), Damaged)
    assert isinstance(entry(bytes(flipped), verify=False, shapes=SHAPES | {"image": (1, 1, 3)}), Damaged)


def test_what_is_gone_or_a_folder_is_damaged_too(tmp_path):
    assert read_entry(tmp_path / "gone", SHAPES, verify=True).reason == "No such file or directory"
    assert read_entry(tmp_path, SHAPES, verify=True).reason == "Is a directory"
    assert isinstance(read_header(tmp_path), Damaged) and isinstance(read_header(tmp_path / "gone"), Damaged)


# ---- runs


def flip(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)


def rewrite(change):
    def damage(path):
        write_entry(path, {name: change(tensor) for name, tensor in load(path.read_bytes()).items()})

    return damage


def fill_one(value):
    def change(tensor):
        tensor.view(-1)[5] = value
        return tensor

    return rewrite(change)


def into_folder(path):
    path.unlink()
    path.mkdir()
    (path / "notes.txt").write_text("mine")


KINDS = {
    "checksum": flip,
    "holds NaN or infinity": fill_one(math.nan),
    "infinity": fill_one(-math.inf),
    "instead of [": rewrite(lambda tensor: tensor[:, 1:].clone()),
    "not a whole file": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "not a whole file of tensors": lambda path: path.write_bytes(b""),
    "whole file of tensors": lambda path: path.write_bytes(b"<html>not found</html>" * 9),
    "Is a directory": into_folder,
    "holds weight instead of": lambda path: path.write_bytes(save({"weight": torch.zeros(3)})),
}


def cached_files(cache):
    return {path: path.read_bytes() for path in sorted(cache.glob("*/*.safetensors")) if path.is_file()}


def damage_all(paths, shift=0):
    """Damages each file, in another way than the one before; returns (path, reason)."""
    kinds = list(KINDS.items())
    done = []
    for number, path in enumerate(paths):
        reason, damage = kinds[(number + shift) % len(kinds)]
        damage(path)
        done.append((path, reason))
    return done


def assert_told(said, damaged):
    lines = [line for line in said.splitlines() if "it is encoded again" in line]
    for path, reason in damaged:
        (line,) = [line for line in lines if str(path) in line]
        assert reason in line and line.endswith("it is encoded again")
        assert line.startswith("line ") or line.startswith("--validation_prompt ")
    assert len(lines) == len(damaged)


OPTIONS = {"max_train_steps": 6, "lora_dropout": 0.2}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_checkpoint, clips):
    """A run and its cache, of which each test takes a copy."""
    folder = tmp_path_factory.mktemp("undisturbed")
    options = training_options(tiny_checkpoint, clips, folder / "run", latents_cache_dir=folder / "cache", **OPTIONS)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ACCELERATE_USE_CPU", "true")
        train_cogvideox_lora.main(train_cogvideox_lora.parse_args(options))
    reset_accelerate()
    return folder


@pytest.fixture
def again(undisturbed, tiny_checkpoint, tmp_path, train):
    """Trains once more on a copy of the cache; asserts that cache and result are the same, bit for bit."""
    cache, base = tmp_path / "cache", download_weights(read_base_model(str(tiny_checkpoint)))
    _, text_encoder = encoders.encoders(base, torch.float32, "cpu", tiling=False, slicing=False)
    unread = dataset.caption_paths([""], cache, text_encoder.fingerprint)[""]  # nothing is sampled
    shutil.copytree(undisturbed / "cache", cache)
    before = cached_files(cache)

    def run(**options):
        train(tiny_checkpoint, tmp_path / "run", latents_cache_dir=cache, **OPTIONS | options)
        after = cached_files(cache)
        assert [path for path in before if after[path] != before[path]] == []
        ours, theirs = (load_file(folder / "run" / LORA_FILE) for folder in (tmp_path, undisturbed))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)

    run.cache, run.files = cache, [path for path in before if path != unread]
    return run


@pytest.mark.parametrize("shift", [0, 4])
def test_what_was_damaged_before_the_start_is_encoded_again_and_trains_to_the_same_bits(again, capfd, shift):
    damaged = damage_all(again.files, shift)
    again()
    assert_told(capfd.readouterr().err, damaged)
    (folder,) = again.cache.glob("*/*.safetensors.*")
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_damaged_in_the_middle_is_encoded_again_and_trains_to_the_same_bits(again, capfd, monkeypatch, workers):
    announce, damaged = train_cogvideox_lora.announce, []

    def announce_and_damage(run, *others):
        damaged.extend(damage_all(again.files, shift=workers))
        return announce(run, *others)

    monkeypatch.setattr(train_cogvideox_lora, "announce", announce_and_damage)
    again(dataloader_num_workers=workers)
    assert_told(capfd.readouterr().err, damaged)


@pytest.mark.parametrize(("change", "told"), [
    (lambda video: video.unlink(), "no such file"),
    (lambda video: video.write_bytes(video.read_bytes() + bytes(8)), "has changed since the start of this run"),
    (lambda video: video.write_bytes(b"x" * 99), "cannot be read as a video"),
], ids=["deleted", "changed", "damaged"])  # fmt: skip
def test_a_clip_that_cannot_be_encoded_again_ends_the_run_and_is_named(
    tiny_checkpoint, tmp_path, train, monkeypatch, capfd, change, told
):
    folder, announce = make_clips(tmp_path / "clips", count=1), train_cogvideox_lora.announce
    video = folder / (folder / "videos.txt").read_text().strip()

    def announce_and_damage(run, *others):
        change(video)
        flip(next((folder / ".cogvideox_cache" / "latents").iterdir()))
        return announce(run, *others)

    monkeypatch.setattr(train_cogvideox_lora, "announce", announce_and_damage)
    with pytest.raises(SystemExit) as end:
        train(tiny_checkpoint, tmp_path / "run", instance_data_root=folder, max_train_steps=2)
    assert end.value.code == 3
    message = capfd.readouterr().err.splitlines()[-1]
    for part in (str(video), told, "line 1: ", "--resume_from_checkpoint auto", "(checksum)"):
        assert part in message
    left = list((folder / ".cogvideox_cache" / "latents").iterdir())
    assert left == [], "the next start would not find it missing, and would stop in the middle again"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), OSError(28, "No space left on device")]
)
def test_where_encoding_is_impossible_the_run_ends_with_the_reason(
    tiny_checkpoint, tmp_path, train, monkeypatch, capfd, error
):
    folder, announce = make_clips(tmp_path / "clips", count=1), train_cogvideox_lora.announce

    def fail(*_, **__):
        raise error

    def announce_and_damage(run, *others):
        for path in (folder / ".cogvideox_cache" / "captions").iterdir():
            into_folder(path)
        monkeypatch.setattr("cogvideox.encoders.encode_captions", fail)
        return announce(run, *others)

    monkeypatch.setattr(train_cogvideox_lora, "announce", announce_and_damage)
    with pytest.raises(SystemExit) as end:
        train(tiny_checkpoint, tmp_path / "run", instance_data_root=folder, max_train_steps=2)
    assert end.value.code == 3
    message = capfd.readouterr().err.splitlines()[-1]
    for part in ("(Is a directory)", "line 1: ", "its caption: ", str(error).split("] ")[-1]):
        assert part in message
    assert len(list((folder / ".cogvideox_cache" / "captions").glob("*.safetensors"))) == 1  # that of "", not read


@pytest.mark.parametrize("kind", ["latents", "captions"])
def test_it_ends_the_run_in_a_validation_too(tiny_checkpoint, tmp_path, train, monkeypatch, capfd, kind):
    """It is no failed validation: training would run into the same clip, or go on without its held-out loss."""
    folder, losses = make_clips(tmp_path / "clips", count=2), train_cogvideox_lora.held_out_losses

    def refuse(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def damage_and_validate(run, **options):
        for path in (run.held_out.clips.latents if kind == "latents" else run.held_out.clips.captions)[0]:
            flip(path)
        for video in folder.rglob("*.mp4"):
            video.unlink()
        monkeypatch.setattr("cogvideox.encoders.encode_captions", refuse)
        return losses(run, **options)

    monkeypatch.setattr(train_cogvideox_lora, "held_out_losses", damage_and_validate)
    options = {"instance_data_root": folder, "validation_split": 1, "validation_steps": 1, "validate_first": False}
    with pytest.raises(SystemExit) as end:
        train(tiny_checkpoint, tmp_path / "run", **options, max_train_steps=3)
    assert end.value.code == 3
    message = capfd.readouterr().err.splitlines()[-1]
    assert "is damaged (checksum), and cannot be encoded again now: " in message and "has failed" not in message


def test_held_out_clips_and_prompts_are_mended_too(checkpoint_of, tmp_path, train, monkeypatch, capfd):
    folder, announce, damaged = make_clips(tmp_path / "clips", count=2), train_cogvideox_lora.announce, []
    options = {"instance_data_root": folder, "max_train_steps": 1, "validation_split": 1}
    options |= {"validation_prompt": "a red circle", "latents_cache_dir": tmp_path / "cache"}
    monkeypatch.setattr("cogvideox.sampling.NUM_INFERENCE_STEPS", 2)
    before = train(checkpoint_of("5b-I2V"), tmp_path / "a", **options)
    contents = cached_files(tmp_path / "cache")
    assert len(contents) == 2 + 4

    def announce_and_damage(run, *others):
        damaged.extend(damage_all(contents))
        return announce(run, *others)

    monkeypatch.setattr(train_cogvideox_lora, "announce", announce_and_damage)
    after = train(checkpoint_of("5b-I2V"), tmp_path / "b", **options)
    assert cached_files(tmp_path / "cache") == contents
    assert_told(capfd.readouterr().err, damaged)
    measured = {"seconds": 0, "peak_memory_gib": 0}
    assert [row | measured for row in after] == [row | measured for row in before]
    one, two = (iio.imread(next(run.rglob("step-000001/*.mp4"))) for run in (tmp_path / "a", tmp_path / "b"))
    assert np.array_equal(one, two)


# ---- encoding


def no_progress(items, *_):
    return items


def prepare(folder, cache, encode_videos=None, encode_captions=None, used_by="run", **options):
    """Encodes a folder with encoders that are made up; returns the data."""
    zeros = lambda frames: torch.zeros(len(frames), 2, 3, 8, 12)  # noqa: E731
    ones = lambda texts: torch.ones(len(texts), 3, 2)  # noqa: E731
    return dataset.encode_dataset(
        read_listing([Folder(folder)]), Selection(VIEW), cache=cache, prompts=[""], random_flip=False,
        video_encoder=Encoder("v", lambda: nullcontext(encode_videos or zeros), lambda shape: 1),
        text_encoder=Encoder("t", lambda: nullcontext(encode_captions or ones), lambda shape: 1),
        progress=no_progress, ranks=Ranks(), everyone=Ranks(), used_by=cache / used_by, **options,
    )  # fmt: skip


def test_captions_that_encode_to_infinity_are_all_named_and_not_stored(tmp_path):
    folder = make_clips(tmp_path / "clips", count=3)
    (folder / "prompts.txt").write_text("fine\ntoo much\nfar too much\n")
    encode = lambda texts: torch.full((len(texts), 3, 2), math.inf if "too" in texts[0] else 0.0)  # noqa: E731
    with pytest.raises(ValueError, match="2 problems") as refused:
        prepare(folder, tmp_path / "cache", encode_captions=encode)
    for line in (2, 3):
        assert f"line {line}: " in str(refused.value)
    assert "its caption: T5 encodes it to NaN or infinity" in str(refused.value)
    assert len(list((tmp_path / "cache" / "captions").iterdir())) == 1 + 1
    assert len(list((tmp_path / "cache" / "latents").iterdir())) == 3


def test_the_garbage_collector_leaves_out_what_was_imported_only_while_clips_are_prepared(tmp_path):
    left_out = []

    def encode(texts):
        left_out.append(gc.get_freeze_count())
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        prepare(make_clips(tmp_path / "clips", count=1), tmp_path / "cache", encode_captions=encode)
    assert left_out[0] > 10_000 and gc.get_freeze_count() == 0


def test_what_another_run_has_encoded_meanwhile_is_not_encoded_twice(tmp_path):
    folder, cache, encoded = make_clips(tmp_path / "clips", count=4), tmp_path / "cache", []

    def first(what):
        """Encodes one, during which another run encodes everything."""

        def encode(batch):
            if not encoded:
                encoded.append(what)
                prepare(folder, cache, used_by="other", encode_videos=count, encode_captions=count_captions)
            return count(batch) if what == "clip" else count_captions(batch)

        return encode

    def count(frames):
        encoded.append("clip of a run")
        return torch.zeros(len(frames), 2, 3, 8, 12)

    def count_captions(texts):
        encoded.append("caption of a run")
        return torch.ones(len(texts), 3, 2)

    data = prepare(folder, cache, encode_videos=first("clip"), encode_captions=first("caption"))
    assert encoded.count("caption of a run") == 5 + 1 and encoded.count("clip of a run") == 4
    assert len(data.shapes) == 4 and data.read(Item(3))["parameters"].shape == (2, 3, 8, 12)

    shutil.rmtree(cache / "latents")
    encoded.clear()
    prepare(folder, cache, encode_videos=first("clip"))
    assert encoded.count("clip of a run") == 4 + 1


def test_what_another_rank_has_mended_is_not_encoded_again(tmp_path, capsys):
    folder, cache, calls = make_clips(tmp_path / "clips", count=1), tmp_path / "cache", []

    def encode(frames):
        calls.append(1)
        return torch.zeros(len(frames), 2, 3, 8, 12)

    data = prepare(folder, cache, encode)
    (path,) = (cache / "latents").iterdir()
    sound = path.read_bytes()
    flip(path)
    damaged = data.clips[Item(0)]
    assert damaged.reason == "checksum"
    publish(path, sound)
    data.mend(damaged)  # as if it had been found at the same time
    data.read(Item(0))
    assert len(calls) == 1


def test_a_disk_that_damages_whatever_is_written_ends_the_run(tmp_path, monkeypatch):
    folder, cache = make_clips(tmp_path / "clips", count=1), tmp_path / "cache"
    data = prepare(folder, cache)
    (path,) = (cache / "latents").iterdir()

    def publish_and_flip(path, content):
        publish(path, content)
        flip(path)

    flip(path)
    monkeypatch.setattr("clips.known.publish", publish_and_flip)
    with pytest.raises(CannotContinue, match="also when it has just been encoded again; check the disk"):
        data.read(Item(0))
    path.write_bytes(b"")
    monkeypatch.setattr("clips.known.publish", lambda path, content: publish(path, content[:-1]))
    with pytest.raises(ValueError, match="also when it has just been encoded again; check the disk"):
        prepare(folder, cache)


def test_an_entry_is_verified_once_in_a_run(tmp_path, monkeypatch):
    folder, verified = make_clips(tmp_path / "clips", count=2), []
    data = prepare(folder, tmp_path / "cache")

    def read(path, shapes, verify):
        verified.append(verify)
        return read_entry(path, shapes, verify=verify)

    monkeypatch.setattr(dataset, "read_entry", read)
    for _ in range(3):
        data.read(Item(0)), data.read(Item(1))
    assert verified == [True] * 4 + [False] * 8


# ---- leftovers


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def leftovers(tmp_path):
    """A cache with temporary files, those to be removed in `gone`."""
    folder, host, here = tmp_path / "cache" / "latents", files._host(), os.getpid()
    folder.mkdir(parents=True)
    gone = [
        f".a.safetensors.{host}.{dead_process()}.00000001",
        ".b.safetensors.elsewhere-1.1.00000002",
        ".c.txt.00000003",
    ]
    kept = [f".d.safetensors.{host}.{here}.00000004", f".e.safetensors.elsewhere-1.{here}.00000005", ".f.json.00000006"]
    for name in (*gone, *kept, ".nfs0123456789abcdef", ".keep"):
        (folder / name).write_bytes(b"x" * 1000)
    for name in (*gone[1:], ".keep"):
        os.utime(folder / name, (time.time() - 90_000,) * 2)
    return tmp_path / "cache", gone


def names(cache):
    return {path.name for path in (cache / "latents").iterdir()}


def test_a_start_removes_what_dead_runs_have_left_and_nothing_of_a_live_one(leftovers, tmp_path, capsys):
    cache, gone = leftovers
    before = names(cache)
    prepare(make_clips(tmp_path / "clips", count=1), cache)
    assert before - names(cache) == set(gone)
    assert "removed 3 unfinished files of runs that were killed" in capsys.readouterr().out
    remove_leftovers(cache)
    assert capsys.readouterr().out == ""


def test_clean_removes_them_too(leftovers, tmp_path):
    cache, gone = leftovers
    before = names(cache)
    record_use(cache, tmp_path, [])
    assert "would drop 3 files" in clean(cache, unused_days=30, dry_run=True)
    assert names(cache) == before
    clean(cache, unused_days=30, dry_run=False)
    assert before - names(cache) == set(gone)


def test_a_machine_of_the_same_name_is_another_host(leftovers, monkeypatch):
    """Copies of one image share their names: what one writes on a shared disk is alive to the other."""
    cache, (own, *_) = leftovers
    read = Path.read_text
    another_boot = "fedcba98-0000-4000-8000-000000000000\n"
    monkeypatch.setattr(Path, "read_text", lambda path, **how: another_boot if path.name == "boot_id" else read(path))
    assert own in names(cache) and own not in [path.name for path in find_leftovers(cache / "latents")]


def test_what_a_killed_process_leaves_is_known_by_its_name(tmp_path):
    """A process ends between writing and renaming."""
    script = "import os, sys, files, pathlib\nos.replace = lambda *_: os._exit(9)\n"
    script += "files.publish(pathlib.Path(sys.argv[1]), b'1')"
    ended = subprocess.run([sys.executable, "-c", script, tmp_path / "a.b.txt"], cwd=Path(files.__file__).parent)
    assert ended.returncode == 9
    (left,) = tmp_path.iterdir()
    assert find_leftovers(tmp_path) == [left]
    assert left.name.startswith(".a.b.txt.")
