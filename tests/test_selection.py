"""At which size, and in which windows, the model sees a clip: without videos and without torch."""

import argparse
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from clips.frames import View, choose_frames
from clips.selection import (
    LEAST_LOST,
    MODES,
    Bucket,
    Selection,
    Unfit,
    auto_size,
    auto_sizes,
    bucket_option,
    check_options,
    lost_share,
    selection_of,
    views_of,
)

VIEW = View(480, 720, 8, 49, 0, 0, "center", 42)
SIZES = ("49x480x720", "49x720x480", "25x480x720", "9x256x256", "1x480x720", "1x720x480")
BUCKETS = tuple(map(bucket_option, SIZES))


def named(*sizes, **options):
    return Selection(VIEW, tuple(map(bucket_option, sizes)), has_any_length=False, **options)


def times(num_frames, fps=24):
    return np.arange(num_frames) / fps


def bucket_of(height, width, num_frames, selection=None):
    views = views_of(height, width, times(num_frames), selection or named(*SIZES))
    (bucket,) = {Bucket(view.max_num_frames, view.height, view.width) for view in views}
    return str(bucket)


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("480x720", "must be FRAMESxHEIGHTxWIDTH, such as 49x480x720, or auto"),
        ("49x480x720x3", "must be FRAMESxHEIGHTxWIDTH"),
        ("49*480*720", "must be FRAMESxHEIGHTxWIDTH"),
        ("automatic", "must be FRAMESxHEIGHTxWIDTH"),
        ("48x480x720", "frames must be 8k + 1 or 5; nearest is 49"),
        ("13x480x720", "nearest is 17"),
        ("6x480x720", "nearest is 5"),
        ("0x480x720", "nearest is 1"),
        ("49x478x720", "height must be divisible by 16; nearest is 480"),
        ("49x480x0", "width must be divisible by 16; nearest is 16"),
    ],
)
def test_a_size_that_cannot_be_trained_at_is_refused_with_the_nearest(text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=re.escape(message)):
        bucket_option(text)


def options(**changes):
    named = {
        "height": 480, "width": 720, "fps": 8, "max_num_frames": 49, "skip_frames_start": 0, "skip_frames_end": 0,
        "video_reshape_mode": "center", "video_decoder": "pyav", "seed": 42, "buckets": [], "clip_mode": "start",
        "clips_per_video": None, "frame_sampling": "fps", "drop_unfit": False,
    }  # fmt: skip
    return SimpleNamespace(**named | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"buckets": ["auto", BUCKETS[0]]}, "--buckets auto: stands alone"),
        ({"buckets": [BUCKETS[0], BUCKETS[0]]}, "--buckets 49x480x720 49x480x720: names a size twice"),
        ({"clips_per_video": 3}, "--clips_per_video 3: --clip_mode start has one window of each clip"),
        ({"clips_per_video": 3, "clip_mode": "end"}, "--clips_per_video 3: --clip_mode end has one window"),
        ({"frame_sampling": "stretch", "clip_mode": "chunks"}, "--clip_mode chunks: --frame_sampling stretch shows"),
    ],
)
def test_options_that_exclude_each_other_are_refused(changes, message):
    refused = []
    check_options(options(**changes), refused.append)
    (problem,) = refused
    assert problem.startswith(message)


def test_the_first_bucket_that_is_a_video_is_the_size_of_videos_that_are_shown():
    selection = selection_of(options(buckets=[BUCKETS[4], BUCKETS[1]]), with_image=False, whole=False)
    assert (selection.view.max_num_frames, selection.view.height, selection.view.width) == (49, 720, 480)
    assert list(selection.by_option) == ["--buckets 1x480x720", "--buckets 49x720x480"]


def test_one_learned_size_allows_no_others():
    with pytest.raises(ValueError, match="--buckets auto: the base model has learned positions for one size only"):
        selection_of(options(buckets=["auto"]), with_image=True, whole=True)


# ---- buckets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "num_frames", "bucket"),
    [
        (720, 1280, 24 * 8, "49x480x720"),
        (1280, 720, 24 * 8, "49x720x480"),
        (720, 1280, 24 * 4, "25x480x720"),
        (1080, 1080, 24 * 8, "9x256x256"),  # the picture first, then the time
        (1280, 720, 24 * 4, "9x256x256"),  # the portrait bucket would need six seconds
        (720, 1280, 1, "1x480x720"),
        (1280, 720, 1, "1x720x480"),
        (720, 1280, 12, "1x480x720"),  # too short for all others
    ],
)
def test_a_clip_goes_where_least_of_it_is_lost(height, width, num_frames, bucket):
    assert bucket_of(height, width, num_frames, named(*SIZES)) == bucket


def test_a_video_becomes_a_still_only_where_nothing_else_takes_it():
    assert bucket_of(480, 720, 200, named("1x480x720", "49x720x480")) == "49x720x480"


def test_where_the_base_model_takes_one_length_no_shorter_bucket_is_advised():
    chosen = named("49x480x720")
    chosen = chosen._replace(view=chosen.view._replace(whole=True))
    with pytest.raises(Unfit, match="the shortest bucket has 49; use a longer clip, remove it, or leave such"):
        bucket_of(480, 720, 70, chosen)


def test_a_clip_that_is_too_short_for_every_bucket_is_refused_with_its_length():
    with pytest.raises(Unfit, match="gives 24 frames at --fps 8, and the shortest bucket has 25; .*--drop_unfit"):
        bucket_of(480, 720, 70, named("49x480x720", "25x480x720"))


@settings(deadline=None, max_examples=300)
@given(
    buckets=st.lists(st.sampled_from(BUCKETS), min_size=1, max_size=4, unique=True),
    mode=st.sampled_from(MODES),
    windows=st.sampled_from([None, 1, 2, 5]),
    height=st.integers(64, 2160),
    width=st.integers(64, 2160),
    num_frames=st.integers(1, 600),
    fps=st.sampled_from([5, 8, 23.976, 25, 29.97, 60]),
    skipped=st.integers(0, 5),
    any_length=st.booleans(),
)
def test_every_window_of_any_clip_is_as_long_as_its_bucket_and_inside_the_clip(
    buckets, mode, windows, height, width, num_frames, fps, skipped, any_length
):
    assume(num_frames > skipped)
    if any_length:  # as "auto" makes them
        buckets = list({replace(bucket, num_frames=49): None for bucket in buckets})
    selection = Selection(
        VIEW._replace(skip_frames_start=skipped),
        tuple(buckets),
        has_any_length=any_length,
        clip_mode=mode,
        clips_per_video=windows if mode in ("uniform", "chunks", "random") else None,
    )
    seconds = times(num_frames, fps)
    try:
        views = views_of(height, width, seconds, selection)
    except Unfit:
        assert not any_length and min(bucket.num_frames for bucket in buckets) > (num_frames - skipped) * 8 / fps - 1
        return
    assert len({(view.height, view.width) for view in views}) == 1 and len(set(views)) == len(views)
    assert [view.start for view in views] == sorted(view.start for view in views)
    assert len(views) <= (windows or 600)
    for view in views:
        chosen = choose_frames(seconds, view)
        if not any_length:
            assert len(chosen) == view.max_num_frames
        assert min(chosen) >= skipped and max(chosen) < num_frames
        assert abs(seconds[chosen[0]] - seconds[skipped] - view.start) <= 0.5 / min(fps, 8) + 1e-6
    if mode == "chunks":
        for view, later in pairwise(views):
            assert later.start == pytest.approx(view.start + len(choose_frames(seconds, view)) / 8)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(90, 2160), st.integers(90, 2160)), min_size=1, max_size=12),
    st.sampled_from([480 * 720, 768 * 1360, 64 * 96]),
    st.sampled_from([None, (768, 1360)]),
)
def test_auto_sizes_suit_all_pictures(pictures, area, largest):
    sizes = auto_sizes(Counter(pictures), area, largest)
    for height, width in sizes:
        assert height % 16 == width % 16 == 0 and 0 < height * width <= area
        assert largest is None or (height <= largest[0] and width <= largest[1])
    for picture in pictures:
        own = lost_share(*picture, *auto_size(*picture, area, largest))
        assert min(lost_share(*picture, *size) for size in sizes) < max(LEAST_LOST, own + 1e-9)


@pytest.mark.parametrize(
    ("picture", "area", "largest", "size"),
    [
        ((480, 720), 480 * 720, None, (480, 720)),
        ((720, 1280), 480 * 720, None, (432, 768)),
        ((1280, 720), 480 * 720, None, (768, 432)),
        ((1080, 1080), 480 * 720, None, (576, 576)),
        ((1280, 720), 768 * 1360, (768, 1360), (768, 432)),
        ((768, 1360), 768 * 1360, (768, 1360), (768, 1360)),
    ],
)
def test_auto_keeps_the_aspect_ratio_and_the_number_of_pixels(picture, area, largest, size):
    assert auto_size(*picture, area, largest) == size


def test_auto_makes_no_bucket_for_a_few_percent():
    pictures = Counter({(720, 1280): 20, (718, 1280): 3, (1280, 720): 2})
    assert auto_sizes(pictures, 480 * 720, None) == [(432, 768), (768, 432)]


def test_auto_is_fitted_once_and_keeps_any_length():
    selection = Selection(VIEW, is_fitted=False).fitted([(720, 1280), (1280, 720)])
    assert list(map(str, selection.buckets)) == ["49x432x768", "49x768x432"]
    assert selection.fitted([(1, 1)]) == selection
    (view,) = views_of(1280, 720, times(60), selection)
    assert (view.height, view.width, view.max_num_frames, len(choose_frames(times(60), view))) == (768, 432, 49, 17)


# ---- windows ---------------------------------------------------------------------------------------------------------

LENGTH = 24 * 20 - 1  # 160 frames at the model's rate, and 49 of them in a window


@pytest.mark.parametrize(
    ("mode", "windows", "starts"),
    [
        ("start", None, [0]),
        ("middle", None, [55]),
        ("end", None, [111]),
        ("uniform", None, [0, 37, 74, 111]),
        ("uniform", 1, [55]),
        ("uniform", 2, [0, 111]),
        ("random", 3, [0, 56, 111]),
        ("chunks", None, [0, 49, 98, 147]),
        ("chunks", 2, [0, 49]),
    ],
)
def test_windows_are_where_their_mode_says(mode, windows, starts):
    views = views_of(480, 720, times(LENGTH), Selection(VIEW, clip_mode=mode, clips_per_video=windows))
    assert [view.start * 8 for view in views] == starts


def test_windows_of_a_clip_that_is_hardly_longer_are_not_repeated():
    assert len(views_of(480, 720, times(24 * 6 + 12), Selection(VIEW, clip_mode="uniform"))) == 1
    assert len(views_of(480, 720, times(24 * 8), Selection(VIEW, clip_mode="uniform"))) == 2


def test_what_is_left_of_chunks_goes_into_a_shorter_bucket_of_the_same_picture():
    selection = named("49x480x720", "25x480x720", "1x480x720", clip_mode="chunks")
    views = views_of(480, 720, times(24 * 10), selection)  # 80 frames
    assert [(view.start * 8, view.max_num_frames) for view in views] == [(0, 49), (49, 25)]


def test_where_the_base_model_takes_one_length_chunks_leave_no_shorter_window():
    whole = VIEW._replace(whole=True)
    views = views_of(480, 720, times(LENGTH), Selection(whole, clip_mode="chunks"))
    assert [(view.start * 8, len(choose_frames(times(LENGTH), view))) for view in views] == [
        (0, 49),
        (49, 49),
        (98, 49),
    ]


def test_where_the_base_model_takes_one_length_a_short_stretched_clip_is_refused_with_its_length():
    with pytest.raises(Unfit, match="gives 33 frames at --fps 8, and the shortest bucket has 49; use a longer clip"):
        views_of(480, 720, times(98), Selection(VIEW._replace(whole=True), is_stretched=True))


def test_a_stretched_clip_is_seen_from_its_first_to_its_last_frame():
    selection = Selection(VIEW, is_stretched=True)
    for seconds in (20, 9.3, 4.1):
        stamps = times(round(24 * seconds))
        (view,) = views_of(480, 720, stamps, selection)
        chosen = choose_frames(stamps, view)
        assert (chosen[0], chosen[-1]) == (0, len(stamps) - 1)
        assert len(chosen) == (49 if seconds > 6 else 33) and len(set(chosen)) == len(chosen)
        assert np.ptp(np.diff(stamps[chosen])) <= 1 / 24 + 1e-9


def test_a_plain_selection_is_the_view_of_earlier_versions():
    assert views_of(720, 1280, times(LENGTH), Selection(VIEW)) == [VIEW]
    assert VIEW.cache_key() == {
        "height": 480, "width": 720, "fps": 8, "max_num_frames": 49, "skip_frames_start": 0, "skip_frames_end": 0,
        "crop": "center", "seed": None, "video_decoder": "pyav",
    }  # fmt: skip
