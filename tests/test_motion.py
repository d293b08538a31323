"""How clips move: hard cuts are found where they are, and what only looks like one is not; stills; splitting."""

import re
import subprocess

import imageio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from clips import motion
from clips.frames import View, read_frames
from clips.known import look_at
from clips.motion import first_frames, small_pictures, split_command, watch

FPS, HEIGHT, WIDTH = 8, 64, 96
VIEW = View(HEIGHT, WIDTH, FPS, 49, 0, 0, "center", 0)
seeds = st.integers(0, 2**32 - 1)
drawn = settings(max_examples=40, deadline=None, derandomize=True)


def scene(draw, height=2 * HEIGHT, width=3 * WIDTH):
    """A picture with structure of many sizes around a colour, [H, W, C]."""
    picture, strength = np.full((height, width, 3), draw.uniform(20, 235, 3)), draw.uniform(20, 90)
    for octave in range(2, 7):
        noise = torch.tensor(draw.normal(0, 1, (1, 3, 2**octave, 2**octave * width // height)))
        coloured = F.interpolate(noise, (height, width), mode="bicubic")[0].permute(1, 2, 0).numpy()
        colourfulness = draw.uniform()
        grey = 1.5 * coloured.mean(-1, keepdims=True)
        picture += strength * (colourfulness * coloured + (1 - colourfulness) * grey) / (1.5 * (octave - 1))
    return picture.clip(0, 255)


def shot(draw, num_frames, speed=0.03, shake=0.0):
    """A camera that moves over a scene by `speed` of its picture per frame, and shakes; [F, H, W, C]."""
    picture, angle = scene(draw), draw.uniform(0, 2 * np.pi)
    steps = np.arange(num_frames)[:, None] * speed * np.array([np.sin(angle), np.cos(angle)])
    places = draw.uniform(0, 1, 2) + steps + draw.uniform(-shake, shake, (num_frames, 2))
    tops, lefts = (places * (HEIGHT, WIDTH)).astype(int).T
    rows, columns = np.arange(HEIGHT), np.arange(WIDTH)
    return np.stack(
        [picture[(top + rows) % (2 * HEIGHT)][:, (left + columns) % (3 * WIDTH)] for top, left in zip(tops, lefts)]
    )


def found(frames):
    return first_frames(small_pictures(torch.from_numpy(frames.clip(0, 255).astype(np.uint8))), FPS)


# ---- what is a cut, and what is not ----------------------------------------------------------------------------------


@drawn
@given(seeds, st.lists(st.integers(4, 20), min_size=2, max_size=4))
def test_hard_cuts_are_found_where_they_are(seed, lengths):
    draw = np.random.default_rng(seed)
    shots = [shot(draw, length, speed=draw.uniform(0, 0.04), shake=draw.uniform(0, 0.01)) for length in lengths]
    apart = [np.abs(a.mean((0, 1, 2)) - b.mean((0, 1, 2))).mean() for a, b in zip(shots, shots[1:])]
    if min(apart) > 25:  # of all shots, those whose colours differ
        assert found(np.concatenate(shots)) == np.cumsum(lengths)[:-1].tolist()


@drawn
@given(seeds, st.sampled_from([1, 2]), st.booleans())
def test_a_frame_or_two_of_another_shot_at_an_end_are_found(seed, length, at_start):
    draw = np.random.default_rng(seed)
    lengths = [length, 12] if at_start else [12, length]
    first, second = (shot(draw, count, speed=0.02) for count in lengths)
    if np.abs(first.mean((0, 1, 2)) - second.mean((0, 1, 2))).mean() > 25:
        assert found(np.concatenate([first, second])) == lengths[:1]


@drawn
@given(seeds, st.floats(0.1, 0.5))
def test_a_fast_pan_is_no_cut(seed, speed):
    assert found(shot(np.random.default_rng(seed), 25, speed=speed)) == []


@drawn
@given(seeds, st.integers(4, 10))
def test_a_pan_between_two_stops_is_no_cut(seed, length):
    draw = np.random.default_rng(seed)
    picture, places = scene(draw), np.concatenate([np.zeros(10), np.linspace(0, 1, length + 1), np.ones(10)])
    lefts = (places * 2 * WIDTH).astype(int)
    assert found(np.stack([picture[:HEIGHT, left : left + WIDTH] for left in lefts])) == []


@drawn
@given(seeds, st.floats(0.02, 0.2))
def test_a_shaking_camera_is_no_cut(seed, shake):
    assert found(shot(np.random.default_rng(seed), 25, speed=0.01, shake=shake)) == []


@drawn
@given(
    seeds, st.sampled_from([1, 2]), st.integers(0, 23), st.floats(0.3, 1), st.sampled_from(["white", "gain", "dark"])
)
def test_a_flash_is_no_cut(seed, length, start, strength, kind):
    frames = shot(np.random.default_rng(seed), 25)
    lit = slice(start, start + length)
    if kind == "white":
        frames[lit] += strength * (255 - frames[lit])
    else:
        frames[lit] *= 1 + strength if kind == "gain" else 1 - strength
    assert found(frames) == []


@drawn
@given(seeds, st.integers(3, 12), st.integers(2, 8), st.floats(0, 1), st.sampled_from(["out", "in", "to another"]))
def test_a_fade_is_no_cut(seed, length, start, phase, kind):
    draw = np.random.default_rng(seed)
    first, second = shot(draw, 25), shot(draw, 25) if kind == "to another" else np.zeros(())
    share = ((np.arange(25) - start + phase) / length).clip(0, 1)[:, None, None, None]
    frames = first * (1 - share) + second * share
    assert found(frames[::-1] if kind == "in" else frames) == []


# ---- stills ----------------------------------------------------------------------------------------------------------


def write(path, frames, fps=24, **options):
    imageio.mimsave(path, list(frames.clip(0, 255).astype(np.uint8)), fps=fps, macro_block_size=1, **options)
    return path


@pytest.mark.parametrize(("quality", "grain"), [(4, 0), (9, 0), (4, 6)])
def test_a_still_is_one_also_through_a_codec_and_with_grain(tmp_path, quality, grain):
    draw = np.random.default_rng(quality)
    picture = scene(draw, 480, 720)
    frames = np.repeat(picture[None], 24, 0) + grain * draw.normal(size=(24, 480, 720, 1))
    path = write(tmp_path / "still.mp4", frames, quality=quality)
    view = VIEW._replace(height=480, width=720)
    seen = watch(path, look_at(path), view, read_frames(path, view, mirrored=False))
    assert seen.is_still and seen.cuts == ()


def test_what_moves_in_a_corner_is_no_still():
    frames = torch.full((9, 240, 320, 3), 100, dtype=torch.uint8)
    for number, frame in enumerate(frames):
        frame[200:216, 10 + 2 * number : 26 + 2 * number] = 160
    assert not motion.is_still(small_pictures(frames))
    assert motion.is_still(small_pictures(frames[:1].expand(9, -1, -1, -1)))
    assert not motion.is_still(small_pictures(frames[:1]))  # an image is meant to be one


def test_motion_is_the_mean_difference_of_successive_frames_in_a_second():
    frames = torch.randint(0, 256, (7, 5, 6, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = (frames[1:].double() - frames[:-1].double()).abs().mean() * 8
    assert motion.motion(frames, 8) == pytest.approx(float(expected))
    assert motion.motion(frames[:1], 8) is None


# ---- times and splitting ---------------------------------------------------------------------------------------------


def film(lengths, seed=3):
    draw = np.random.default_rng(seed)
    return [shot(draw, length, speed=0.005) + light for length, light in zip(lengths, (0, 90, -90, 40))]


def watched(path, view=VIEW):
    return watch(path, look_at(path), view, read_frames(path, view, mirrored=False))


def ffmpeg(*options):
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, options)], check=True)


def run_pasted(command):
    subprocess.run(
        ["sh", "-c", re.sub(" -i ", " -v error -y -i ", command, count=1)], check=True, stdin=subprocess.DEVNULL
    )


@pytest.mark.parametrize("fps", [8, 24, 29.97, 60])
def test_the_time_of_a_cut_is_exact_between_the_frames_of_the_model(tmp_path, fps):
    lengths = [round(1.03 * fps), round(0.9 * fps), round(1.2 * fps)]
    path = write(tmp_path / "a.mp4", np.concatenate(film(lengths)), fps=fps)
    expected = [(sum(lengths[:count]) - 0.5) / fps for count in (1, 2)]
    assert watched(path).cuts == pytest.approx(expected, abs=1e-3)
    later = watched(path, VIEW._replace(skip_frames_start=round(fps / 2)))
    assert later.cuts == pytest.approx(expected, abs=1e-3)  # on the clock of the file


def test_cuts_that_the_model_does_not_see_are_not_told(tmp_path):
    path = write(tmp_path / "a.mp4", np.concatenate(film([24, 24])))
    assert len(watched(path).cuts) == 1
    assert watched(path, VIEW._replace(max_num_frames=5)).cuts == ()
    assert watched(path, VIEW._replace(skip_frames_start=24)).cuts == ()


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "gif"])
def test_the_command_splits_a_file_so_that_each_part_is_one_shot(tmp_path, suffix):
    """Also where the clock starts late, the sides are odd, and the name has characters of the shell."""
    folder = tmp_path / "it's $HOME & 100 %d"
    folder.mkdir()
    shots = [part[:, :63, :95] for part in film([25, 31, 22])]
    write(tmp_path / "a.mp4", np.concatenate(shots), output_params=["-pix_fmt", "yuv444p"], quality=9)
    path = folder / f'"a" b.{suffix}'
    sound = ["-f", "lavfi", "-i", "anullsrc"] if suffix != "gif" else []
    ffmpeg("-itsoffset", 0.31, "-i", tmp_path / "a.mp4", *sound, *["-shortest"] * bool(sound), path)
    video, seen = look_at(path).video, watched(path)
    assert len(seen.cuts) == 2
    run_pasted(split_command(path, video, seen.cuts))
    parts = [folder / f'"a" b-{number}.mkv' for number in (1, 2, 3)]
    assert [len(look_at(part).times) for part in parts] == [25, 31, 22]
    assert [watched(part).cuts for part in parts] == [(), (), ()]
    assert sorted(folder.iterdir()) == sorted([path, *parts])


def test_no_shot_loses_a_frame_where_its_length_in_milliseconds_is_rounded_up(tmp_path):
    path = write(tmp_path / "a.mp4", np.concatenate(film([48, 48, 36])))
    run_pasted(split_command(path, look_at(path).video, watched(path).cuts))
    parts = [look_at(tmp_path / f"a-{number}.mkv").times for number in (1, 2, 3)]
    assert [len(times) for times in parts] == [48, 48, 36]
    assert [times[0] for times in parts] == [0, 0, 0]


def test_a_file_of_uneven_times_is_split_with_all_its_frames(tmp_path):
    write(tmp_path / "a.mp4", np.concatenate(film([25, 31])), fps=24)
    path = tmp_path / "uneven.mp4"
    ffmpeg("-i", tmp_path / "a.mp4", "-vf", "select='not(eq(mod(n,7),3))'", "-fps_mode", "vfr", path)
    seen = watched(path)
    run_pasted(split_command(path, look_at(path).video, seen.cuts))
    parts = [look_at(tmp_path / f"uneven-{number}.mkv") for number in (1, 2)]
    assert sum(len(part.times) for part in parts) == len(look_at(path).times)
    kept = [number for number in range(56) if number % 7 != 3]
    assert [len(part.times) for part in parts] == [sum(number < 25 for number in kept), sum(n >= 25 for n in kept)]
