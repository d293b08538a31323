"""Lists, frames, cache and batches."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import imageio
import numpy as np
import pytest
import torch

import dataset
from clips.facts import examine
from clips.frames import View, choose_frames, read_frames, resize_and_crop, trainable_length
from clips.listing import Clip, Columns, Folder, Listing, Words, read_listing
from clips.order import Item, Ranks, make_timeline
from clips.selection import Selection
from cogvideox.encoders import Encoder
from files import CannotContinue

VIEW = View(64, 96, 8, 49, 0, 0, "center", 0)


def write(folder, prompts, videos):
    folder.mkdir(exist_ok=True)
    for name, content in (("prompts.txt", prompts), ("videos.txt", videos)):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    _, _, clips, problems, _ = read_listing([Folder(folder)], Columns("prompts.txt", "videos.txt"))
    return clips, problems


def make_video(path, num_frames=16, fps=8, height=96, width=128, value=None):
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    frames += np.linspace(0, 250, num_frames).astype(np.uint8)[:, None, None, None] if value is None else value
    imageio.mimsave(path, frames, fps=fps, macro_block_size=1)
    return path


# ---- lists


@pytest.mark.parametrize(
    "prompts",
    [
        b"a cat\r\na dog, with: a colon\r\n",
        b"\xef\xbb\xbfa cat\na dog, with: a colon",
        b"a cat\ra dog, with: a colon\r\n\n\n",
        b"  a cat  \n\ta dog, with: a colon\n",
    ],
    ids=["windows", "byte order mark", "old mac, blank lines at the end", "spaces around"],
)
def test_ordinary_text_files_are_read_alike(tmp_path, prompts):
    clips, problems = write(tmp_path, prompts, "a.mp4\nb.mp4\n")
    assert problems == []
    assert [clip.caption for clip in clips] == ["a cat", "a dog, with: a colon"]
    assert [clip.line for clip in clips] == [1, 2]


def test_characters_that_python_counts_as_line_ends_do_not_shift_captions(tmp_path):
    clips, problems = write(tmp_path, "one\u2028still one\ntwo\x0cstill two\n", "a.mp4\nb.mp4\n")
    assert problems == []
    assert [clip.video.name for clip in clips if "two" in clip.caption] == ["b.mp4"]


def test_paths_may_be_relative_absolute_from_home_and_hold_spaces_and_umlauts(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    clips, _ = write(tmp_path, "1\n2\n3\n", f"videos/ein schöner Film.mp4\n{tmp_path}/x.mp4\n~/y.mp4\n")
    assert [str(clip.video) for clip in clips] == [
        f"{tmp_path}/videos/ein schöner Film.mp4", f"{tmp_path}/x.mp4", "/somewhere/y.mp4"
    ]  # fmt: skip


def test_the_id_token_is_put_before_each_caption_with_one_space(tmp_path):
    write(tmp_path, "a cat\n", "a.mp4\n")
    clips = read_listing([Folder(tmp_path)], words=Words("DISNEY")).clips
    assert clips[0].caption == "DISNEY a cat"


@pytest.mark.parametrize(
    ("prompts", "videos", "expected"),
    [
        ("one\n\nthree\n", "a.mp4\nb.mp4\nc.mp4\n", ["prompts.txt:2: blank line"]),
        (
            "one\ntwo\n",
            "a.mp4\n\n\nb.mp4\n",
            ["videos.txt:2: blank", "videos.txt:3: blank", "2 lines and videos.txt 4"],
        ),
        ("one\ntwo\n", "a.mp4\n", ["prompts.txt has 2 lines and videos.txt 1"]),
        (b"ok\nna\xefve\n", "a.mp4\nb.mp4\n", ["prompts.txt:2: not UTF-8 text (byte 0xef, perhaps Windows-1252)"]),
        ("", "a.mp4\n", ["prompts.txt: the file is empty"]),
    ],
)
def test_problems_of_the_lists_are_all_told_with_file_and_line(tmp_path, prompts, videos, expected):
    _, problems = write(tmp_path, prompts, videos)
    assert len(problems) == len(expected)
    for problem, text in zip(problems, expected):
        assert text in problem


def test_a_blank_line_drops_no_caption_onto_another_video(tmp_path):
    clips, _ = write(tmp_path, "one\n\nthree\n", "a.mp4\nb.mp4\nc.mp4\n")
    assert [(clip.caption, clip.video.name) for clip in clips] == [("one", "a.mp4"), ("", "b.mp4"), ("three", "c.mp4")]


def test_a_near_file_name_is_named_with_the_option_that_takes_it(tmp_path):
    (tmp_path / "prompt.txt").write_text("a cat\n")
    (tmp_path / "videos.txt").write_text("a.mp4\n")
    problems = read_listing([Folder(tmp_path)], Columns("prompts.txt", "videos.txt")).problems
    assert "there is prompt.txt: pass --caption_column prompt.txt" in problems[0]


# ---- frames


@pytest.mark.parametrize(
    ("available", "most", "expected"),
    [(1, 49, 1), (4, 49, 1), (5, 49, 5), (8, 49, 5), (9, 49, 9), (16, 49, 9), (17, 49, 17), (48, 49, 41), (49, 49, 49),
     (200, 49, 49), (100, 13, 13), (12, 13, 9), (100, 81, 81)],
)  # fmt: skip
def test_clips_are_cut_to_8k_plus_1_frames(available, most, expected):
    assert trainable_length(available, most) == expected


@pytest.mark.parametrize("rate", [8, 24, 25, 29.97, 60])
def test_frames_are_chosen_by_their_time(rate):
    timestamps = np.arange(int(rate * 7)) / rate
    indices = choose_frames(timestamps, VIEW)
    assert len(indices) == 49
    assert np.abs(timestamps[indices] - np.arange(49) / 8).max() <= 0.5 / rate + 1e-9


def test_unevenly_spaced_frames_are_chosen_by_their_time_too():
    timestamps = np.array([0, 0.1, 0.2, 0.33, 1.0, 1.1, 1.125, 1.3])  # nothing between 0.33 and 1
    assert choose_frames(timestamps, VIEW._replace(max_num_frames=9)) == [0, 1, 2, 3, 3, 3, 4, 4, 4]


def test_skipped_frames_are_not_seen_and_are_counted_in_the_file():
    indices = choose_frames(np.arange(40) / 8, VIEW._replace(skip_frames_start=10, skip_frames_end=13))
    assert indices == list(range(10, 27))  # 17 of the 17 that are left


def test_the_clip_s_last_moment_is_not_lost_to_rounding():
    assert len(choose_frames(np.arange(49) / 8, VIEW)) == 49
    assert len(choose_frames(np.arange(49 * 3) / 24, VIEW)) == 49


def test_skipping_more_than_there_is_says_so():
    with pytest.raises(ValueError, match="has 10 frames, and none is left after --skip_frames_start 6"):
        choose_frames(np.arange(10) / 8, VIEW._replace(skip_frames_start=6, skip_frames_end=4))


@pytest.mark.parametrize("size", [(480, 720), (96, 128), (720, 405), (64, 96), (1080, 1920)])
def test_the_aspect_of_what_is_shown_is_kept(size):
    """A circle stays a circle: what is cut off is cut off evenly on both sides."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    radius = min(size) // 5
    circle = (255 * ((x - width / 2) ** 2 + (y - height / 2) ** 2 < radius**2)).astype(np.uint8)
    frames = torch.from_numpy(circle)[None, :, :, None].repeat(2, 1, 1, 3)
    shown = resize_and_crop(frames, 64, 96, (0.5, 0.5))
    assert shown.shape == (2, 64, 96, 3) and shown.dtype == torch.uint8
    rows, columns = ((shown[0, :, :, 0] > 127).any(axis).nonzero().flatten() for axis in (1, 0))
    assert abs(len(rows) - len(columns)) <= 1
    assert abs(rows.float().mean() - 31.5) <= 1 and abs(columns.float().mean() - 47.5) <= 1


def test_random_cropping_stays_where_it_was_drawn_and_differs_between_clips(tmp_path):
    view = VIEW._replace(crop="random", max_num_frames=9)
    gradient = np.broadcast_to(np.linspace(0, 255, 400).astype(np.uint8)[None, :, None], (96, 400, 3))
    videos = [tmp_path / f"{i}.mp4" for i in range(4)]
    for i, video in enumerate(videos):
        imageio.mimsave(video, [gradient] * (9 + i), fps=8, macro_block_size=1)
    first = [read_frames(video, view, mirrored=False) for video in videos]
    again = [read_frames(video, view, mirrored=False) for video in videos]
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert len({int(frames[0, 0, 0, 0]) for frames in first}) > 1


def test_mirrored_frames_are_the_mirror_image(tmp_path):
    video = make_video(tmp_path / "a.mp4")
    view = VIEW._replace(max_num_frames=9)
    assert torch.equal(read_frames(video, view, mirrored=True), read_frames(video, view, mirrored=False).flip(2))


def test_frames_read_are_the_frames_of_the_file(tmp_path):
    video = make_video(tmp_path / "a.mp4", num_frames=48, fps=24)
    frames = read_frames(video, VIEW._replace(max_num_frames=9), mirrored=False)
    expected = np.linspace(0, 250, 48)[::3][:9]  # every third of 24 is 8 a second
    assert np.abs(frames[:, 32, 48, 0].numpy() - expected).max() <= 3  # as far as the codec goes


# ---- cache


@pytest.mark.parametrize(
    ("changes", "image", "names"),
    [
        ({}, None, ["db234ae465b0c4836be07ee34c66d1a366775be1", "47c4d016ea673bbe94fbe070d9e490005b924129"]),
        ({"seed": 7}, None, ["db234ae465b0c4836be07ee34c66d1a366775be1", "47c4d016ea673bbe94fbe070d9e490005b924129"]),
        ({"crop": "random"}, None, ["b9acb0e28380549c676307275c2ecedf128f9169"]),
        ({"with_image": True}, None, ["d99931b8863355623a0ea8daad96ebe7a6ac5912"]),
        ({"with_image": True, "whole": True}, Path("a.png"), ["c12993126df2442ba4b9d0e35b25ef30f166c932"]),
    ],
    ids=["as filmed and mirrored", "the seed does nothing", "random crop", "image-to-video", "an image of its own"],
)
def test_caches_of_earlier_versions_are_found(changes, image, names):
    """The names were computed by the version before the modules were split into folders; users have such files."""
    view = View(480, 720, 8, 49, 0, 0, "center", 42, video_decoder="decord")._replace(**changes)
    file = SimpleNamespace(content="video content")
    facts = SimpleNamespace(file=file, image=image and "image content", view=view, mask=None)
    flip = len(names) == 2
    (probed,) = dataset.probe_cache([facts], cache=Path("cache"), encoder="encoder", random_flip=flip)
    assert probed.paths == [Path(f"cache/latents/{name}.safetensors") for name in names]


def test_captions_cached_by_earlier_versions_are_found():
    path = dataset.cache_path(Path("cache"), "captions", caption="a cat", encoder="encoder")
    assert path == Path("cache/captions/53fe5786e77e060660122a00adf4b88e88820aa5.safetensors")


def test_whatever_changes_the_frames_changes_the_place_in_the_cache(tmp_path):
    def path(clip, view=VIEW, encoder="vae", random_flip=False):
        facts = examine(clip, Selection(view)).windows
        return dataset.probe_cache(facts, cache=tmp_path, encoder=encoder, random_flip=random_flip)[0].paths

    clip = Clip(make_video(tmp_path / "a.mp4"), "a", 1)
    other = Clip(make_video(tmp_path / "b.mp4", num_frames=17), "b", 2)
    changes = {"height": 80, "width": 112, "fps": 12, "max_num_frames": 9, "skip_frames_start": 1, "skip_frames_end": 1}
    paths = [path(clip)[0], path(other)[0], path(clip, encoder="other")[0], path(clip, random_flip=True)[1]]
    paths += [path(clip, VIEW._replace(**{name: value}))[0] for name, value in changes.items()]
    paths += [path(clip, VIEW._replace(crop="random", seed=seed))[0] for seed in (1, 2)]
    assert len(set(paths)) == len(paths)


def test_what_does_not_change_the_frames_does_not(tmp_path):
    original = make_video(tmp_path / "a.mp4")
    copy = tmp_path / "another name.mp4"
    copy.write_bytes(original.read_bytes())
    clips = [Clip(original, "a", 1), Clip(copy, "b", 2)]
    facts = [examine(clip, Selection(VIEW)).windows[0] for clip in clips]
    probe = partial(dataset.probe_cache, cache=tmp_path, encoder="vae", random_flip=False)
    first, second = probe(facts)
    (reseeded,) = probe([facts[0]._replace(view=VIEW._replace(seed=5))])
    assert first.paths == second.paths == reseeded.paths


def test_a_file_in_the_cache_is_complete_or_absent(tmp_path, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CannotContinue, match="No space left on device.*--latents_cache_dir"):
        dataset.write_entry(tmp_path / "latents" / "a.safetensors", {"x": torch.zeros(2)})
    assert list((tmp_path / "latents").iterdir()) == []


def test_an_interrupted_encoding_pass_continues_where_it_was(tmp_path):
    clips = [Clip(make_video(tmp_path / f"{i}.mp4", num_frames=9 + i), str(i), i + 1) for i in range(4)]
    encoded = []

    def prepare(fail_at=None):
        def load():
            def encode(frames):
                if len(encoded) == fail_at:
                    raise KeyboardInterrupt
                encoded.append(frames)
                return torch.zeros(1, 2, (frames.shape[1] - 1) // 4 + 1, 2, 2)

            return _Context(encode)

        return dataset.encode_dataset(
            Listing([], [], clips, [], []), Selection(VIEW), cache=tmp_path / "cache", prompts=[""], random_flip=False,
            video_encoder=Encoder("v", load, lambda shape: 1),
            text_encoder=Encoder("t", lambda: _Context(lambda texts: torch.zeros(1, 3, 2)), lambda shape: 1),
            progress=lambda items, *_: items, ranks=Ranks(), everyone=Ranks(), used_by=tmp_path,
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        prepare(fail_at=2)
    assert len(encoded) == 2
    data = prepare()
    assert len(encoded) == 4
    prepare()
    assert len(encoded) == 4
    assert data.summary().splitlines() == [
        "4 clips of 128x96 at 8 fps -> 96x64 at 8 fps; 4 of 9 frames",
        "not seen: up to 0.4 s at the end (3 clips), up to 11 % of the picture (4 clips)",
    ]
    assert data.clips[Item(3)]["parameters"].shape == (2, 3, 2, 2)


class _Context:
    def __init__(self, value):
        self.value = value

    def __enter__(self):
        return self.value

    def __exit__(self, *_):
        return False


# ---- updates


@pytest.mark.parametrize(
    ("per_epoch", "per_step", "epochs", "expected"),
    [(70, 1, 10, 700), (70, 8, 10, 88), (25, 4, 10, 63), (3, 8, 10, 4), (5, 2, 1, 3)],
)
def test_epochs_become_updates_of_all_ranks(per_epoch, per_step, epochs, expected):
    timeline = make_timeline(
        batches_per_epoch=per_epoch, batches_per_step=per_step, epochs=epochs, max_steps=None, step=0, batches_seen=0
    )
    assert timeline.total_steps == expected
    assert timeline.epoch(expected) >= epochs > timeline.epoch(expected - 1)


def test_a_run_that_continues_with_other_ranks_still_sees_its_epochs():
    first = make_timeline(batches_per_epoch=10, batches_per_step=1, epochs=6, max_steps=None, step=0, batches_seen=0)
    second = make_timeline(
        batches_per_epoch=10, batches_per_step=4, epochs=6, max_steps=None, step=30, batches_seen=first.batches_seen(30)
    )
    assert (first.total_steps, second.total_steps, second.epoch(38)) == (60, 38, 6.2)


def test_epochs_end_once_however_they_fall_on_updates():
    timeline = make_timeline(batches_per_epoch=7, batches_per_step=3, epochs=7, max_steps=None, step=0, batches_seen=0)
    ends = [step for step in range(1, timeline.total_steps + 1) if timeline.due(step, None, 2)]
    assert ends == [5, 10, 14, 17]  # after 14, 28 and 42 micro-batches, and at the end


def test_shares_are_put_together_in_order():
    for world in (1, 2, 3, 5):
        items = list(range(7))
        shares = [Ranks(index, world).share(items) for index in range(world)]
        ranks = Ranks(0, world, gather=lambda mine: shares)  # noqa: B023 - called within the turn
        assert ranks.gather_shares(shares[0]) == items
