"""Clips decoded ahead, encoded in batches and written behind are cached as if each were encoded by itself."""

import math
import threading
from contextlib import nullcontext
from functools import partial

import imageio
import pytest
import torch
from make_example import draw_clip, make_clips
from safetensors.torch import load_file

import dataset
import files
from clips.facts import examine
from clips.frames import View, decoding_threads, read_frames
from clips.known import look_at
from clips.listing import Folder, read_listing
from clips.order import Item, Ranks
from clips.selection import Selection
from cogvideox import encoders
from cogvideox.base_model import download_weights, read_base_model
from cogvideox.encoders import Encoder, caption_encoder, clips_at_once, loaded_vae

VIEW = View(64, 96, 8, 9, 0, 0, "center", 0)


def encode(folder, checkpoint, cache, dtype=torch.float32, slicing=False, view=VIEW, ranks=None):
    """The cached latents and embeddings of the clips in `folder`, in order."""
    checkpoint = download_weights(read_base_model(str(checkpoint)))
    listing = read_listing([Folder(folder)])
    video_encoder, text_encoder = encoders.encoders(checkpoint, dtype, "cpu", tiling=False, slicing=slicing)
    data = dataset.encode_dataset(
        listing, Selection(view), cache=cache, prompts=[""], random_flip=False,
        video_encoder=video_encoder, text_encoder=text_encoder, progress=lambda items, *_: items,
        ranks=ranks or Ranks(), everyone=Ranks(), used_by=cache,
    )  # fmt: skip
    cached = [data.clips[Item(i)] for i in range(len(listing.clips))]
    return [item["parameters"] for item in cached], [item["prompt_embeds"] for item in cached]


@pytest.fixture(scope="module")
def mixed_clips(tmp_path_factory):
    """Seven clips; two, in the middle of the list, are shorter."""
    folder = make_clips(tmp_path_factory.mktemp("mixed"), count=7)
    for video in sorted((folder / "videos").iterdir())[2:5:2]:
        imageio.mimsave(video, draw_clip("square", "red", "left", 16, 96, 128), fps=24, macro_block_size=1)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_cached_is_each_clip_and_caption_encoded_alone(tiny_checkpoint, mixed_clips, tmp_path, dtype):
    parameters, prompt_embeds = encode(mixed_clips, tiny_checkpoint, tmp_path / "cache", dtype)

    clips = read_listing([Folder(mixed_clips)]).clips
    checkpoint = read_base_model(str(tiny_checkpoint))
    with loaded_vae(checkpoint, dtype, "cpu", tiling=False, slicing=False) as vae:
        for clip, cached in zip(clips, parameters):
            frames = read_frames(clip.video, VIEW, mirrored=False)
            video = (frames.float() / 127.5 - 1).to(dtype).permute(3, 0, 1, 2)[None]
            with torch.no_grad():
                alone = vae.encode(video).latent_dist.parameters[0]
            # torch computes the convolutions of a batch by another algorithm than those of one small clip.
            assert cached.shape == alone.shape and cached.dtype == dtype
            assert (cached - alone).float().square().mean().sqrt() < {torch.float32: 5e-5, torch.bfloat16: 0.05}[dtype]
    assert {cached.shape[1] for cached in parameters} == {2, 3}  # of 5 frames, and of 9
    with caption_encoder(checkpoint, dtype, "cpu") as encode_captions:
        for clip, cached in zip(clips, prompt_embeds):
            eps = 8 * torch.finfo(dtype).eps
            torch.testing.assert_close(cached, encode_captions([clip.caption])[0], atol=eps, rtol=eps)


def test_a_clip_in_a_batch_sees_nothing_of_the_others(tiny_checkpoint):
    """In float64, where rounding cannot hide it; over several groups of frames, which pass on states."""
    frames = torch.randint(0, 256, (3, 17, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    checkpoint = read_base_model(str(tiny_checkpoint))
    with loaded_vae(checkpoint, torch.float32, "cpu", tiling=False, slicing=False) as vae:
        together = encoders.encode_videos(vae.double(), frames)
        for clip, parameters in zip(frames, together):
            torch.testing.assert_close(parameters, encoders.encode_videos(vae, clip[None])[0], atol=1e-10, rtol=0)


def test_what_is_cached_does_not_depend_on_what_is_encoded_with_it(tiny_checkpoint, mixed_clips, tmp_path):
    """Bit for bit: by three ranks, and by a run that finds some of it done."""
    alone, _ = encode(mixed_clips, tiny_checkpoint, tmp_path / "alone")
    clips = read_listing([Folder(mixed_clips)]).clips
    facts = [examine(clip, Selection(VIEW)).windows[0] for clip in clips]
    probed = dataset.probe_cache(facts, cache=tmp_path / "shared", encoder="v", random_flip=False)
    new = dataset.missing_latents(clips, facts, probed)
    shares = [Ranks(index, 3).share(new) for index in range(3)]
    checkpoint = read_base_model(str(tiny_checkpoint))
    load = partial(encoders.video_encoder, checkpoint, torch.float32, "cpu", tiling=False, slicing=False)
    for share in shares:
        assert dataset.cache_latents(share, Encoder("v", load, clips_at_once), lambda items, *_: items) == []
    for probe, expected in zip(probed, alone):
        assert torch.equal(load_file(probe.paths[0])["parameters"], expected)

    first, *_, last = sorted((tmp_path / "alone" / "latents").iterdir())
    first.unlink(), last.unlink()
    again, _ = encode(mixed_clips, tiny_checkpoint, tmp_path / "alone")
    assert all(torch.equal(latents, expected) for latents, expected in zip(again, alone))


def test_slicing_encodes_each_clip_alone_bit_for_bit(tiny_checkpoint, mixed_clips, tmp_path):
    sliced, _ = encode(mixed_clips, tiny_checkpoint, tmp_path / "cache", slicing=True)
    clips = read_listing([Folder(mixed_clips)]).clips
    checkpoint = read_base_model(str(tiny_checkpoint))
    with encoders.video_encoder(checkpoint, torch.float32, "cpu", tiling=False, slicing=False) as encode_videos:
        for clip, cached in zip(clips, sliced):
            assert torch.equal(cached, encode_videos(read_frames(clip.video, VIEW, mirrored=False)[None])[0])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((49, 480, 720, 3), 1), ((81, 768, 1360, 3), 1), ((49, 64, 96, 3), 2), ((9, 64, 96, 3), 2), ((9, 480, 720, 3), 1),
     ((17, 128, 192, 3), 2), ((9, 240, 360, 3), 1), ((1, 480, 720, 3), 2), ((5, 480, 720, 3), 1)],
)  # fmt: skip
def test_small_clips_alone_are_encoded_together_and_never_in_more_memory_than_a_full_one(shape, expected):
    assert clips_at_once(shape) == expected
    frames, height, width, _ = shape
    in_work = min(frames, 15)  # the VAE takes eight at a time, the first time with what is left over
    assert expected == 1 or expected * in_work * height * width <= 9 * 480 * 720


def test_a_bound_number_of_clips_is_decoded_ahead():
    started, lock = [], threading.Lock()

    def call(item):
        with lock:
            started.append(item)
        return item * item

    made = files.map_ahead(call, iter(range(20)), threads=3)
    assert next(made) == 0
    assert set(started) <= {0, 1, 2, 3}
    assert list(made) == [i * i for i in range(1, 20)]


def test_a_stopped_reader_decodes_no_further():
    started, stop = [], threading.Event()

    def call(item):
        started.append(item)
        if item:
            stop.wait(5)
        return item

    made = files.map_ahead(call, iter(range(20)), threads=2)
    next(made)
    stop.set()
    made.close()
    assert max(started) <= 2


def test_threads_are_as_many_as_cores_and_memory_allow(monkeypatch):
    full, large = VIEW._replace(height=480, width=720, max_num_frames=49), VIEW._replace(height=4096, width=4096)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    assert decoding_threads([full]) == 8
    assert decoding_threads([full, large._replace(max_num_frames=81)]) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert decoding_threads([full]) == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert decoding_threads([full]) == 1


def new_latents(clips, folder):
    paths = [folder / f"{clip.line}.safetensors" for clip in clips]
    return [dataset.NewLatents(clip, look_at(clip.video), VIEW, False, path) for clip, path in zip(clips, paths)]


def test_problems_of_several_clips_are_told_in_the_order_of_the_list(tmp_path, mixed_clips, monkeypatch):
    """Problems of decoding and of the VAE, which are found at different times; the other clips are written."""
    clips = read_listing([Folder(mixed_clips)]).clips
    new = new_latents(clips, tmp_path)
    decode = dataset.decode

    def stop(clip, view, **options):
        if clip.line in (2, 6):
            raise ValueError(f"line {clip.line}: cannot be decoded")
        return decode(clip, view, **options)

    calls = iter(range(len(clips)))
    monkeypatch.setattr(dataset, "decode", stop)
    encode_videos = lambda frames: torch.full((1, 2, 3, 2, 2), math.nan if next(calls) == 2 else 0.0)  # noqa: E731
    encoder = Encoder("v", lambda: nullcontext(encode_videos), lambda shape: 1)
    problems = dataset.cache_latents(new, encoder, lambda items, *_: items)
    assert [problem.split(":")[0] for problem in problems] == ["line 2", "line 4", "line 6"]
    assert "the VAE encodes it to NaN or infinity" in problems[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{line}.safetensors" for line in (1, 3, 5, 7)]


def test_a_disk_that_fills_up_midway_ends_the_encoding_with_its_message(tmp_path, mixed_clips, monkeypatch):
    clips = read_listing([Folder(mixed_clips)]).clips
    new = new_latents(clips, tmp_path)

    def full(path, content):
        if path.name.startswith("7"):  # the last: nothing is written after it that could tell
            raise OSError(28, "No space left on device")
        files.publish(path, content)

    monkeypatch.setattr("clips.known.publish", full)
    encode_videos = lambda frames: torch.zeros(len(frames), 2, 3, 2, 2)  # noqa: E731
    encoder = Encoder("v", lambda: nullcontext(encode_videos), lambda shape: 1)
    with pytest.raises(files.CannotContinue, match="cannot write the cache .No space left on device"):
        dataset.cache_latents(new, encoder, lambda items, *_: items)
    assert len(list(tmp_path.iterdir())) == 6


def test_frames_read_in_parts_are_those_read_at_once(tmp_path, monkeypatch):
    """In a file with more frames than are seen, and in one with fewer, of which some are seen twice."""
    for fps in (24, 5):
        path = tmp_path / f"{fps}.mp4"
        imageio.mimsave(path, draw_clip("circle", "blue", "up", 60, 96, 128), fps=fps, macro_block_size=1)
        view = VIEW._replace(max_num_frames=17)
        parts = read_frames(path, view, mirrored=False)
        monkeypatch.setattr("clips.frames.PICTURES_AT_ONCE", 1000)
        assert torch.equal(parts, read_frames(path, view, mirrored=False))
        monkeypatch.undo()
