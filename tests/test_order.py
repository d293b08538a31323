"""Which clips are in which micro-batch: pure functions of whole numbers, without videos and without torch."""

from collections import Counter
from itertools import chain, count, islice, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clips.order import WITHOUT_CAPTION, Item, Order

ONE = lambda _: 1  # noqa: E731
LONG, SHORT, STILL, TALL_STILL = (8, 13, 60, 90), (8, 3, 60, 90), (8, 1, 60, 90), (8, 1, 90, 60)
SHAPES = (LONG, SHORT, STILL, TALL_STILL)

EARLIER = [[(2, True)], [(5, True)], [(4, False)], [(1, True)], [(3, True)], [(0, False)]]


def order_of(shapes, seed=42, batch_size=ONE, **settings):
    stills = frozenset(clip for clip, shape in enumerate(shapes) if shape[1] == 1)
    return Order(shapes, seed, batch_size, stills=stills, **settings)


def clips_in(batches):
    return [item.clip for item in chain(*batches)]


def test_every_clip_is_seen_once_an_epoch_and_only_with_clips_of_its_shape():
    shapes = [LONG] * 7 + [SHORT] * 4 + [STILL]
    order = order_of(shapes, batch_size=lambda _: 3)
    for epoch in range(3):
        batches = order.epoch(epoch)
        assert sorted(clips_in(batches)) == list(range(12))
        assert all(len({shapes[item.clip] for item in batch}) == 1 for batch in batches)
        assert len(batches) == order.batches_per_epoch() == 6
    assert order.epoch(0) != order.epoch(1)
    assert order.epoch(0) != order._replace(seed=43).epoch(0)


def test_the_order_of_one_shape_is_that_of_earlier_versions():
    """Runs of theirs are resumed; the numbers are theirs."""
    order = order_of([LONG] * 6, seed=3407, random_flip=True, bucket_group=8)
    assert [[(item.clip, item.mirrored) for item in batch] for batch in order.epoch(2)] == EARLIER


def test_half_of_the_turns_are_mirrored_if_asked():
    order = order_of([LONG] * 400)
    assert 150 < sum(item.mirrored for (item,) in order._replace(random_flip=True).epoch(0)) < 250
    assert not any(item.mirrored for (item,) in order.epoch(0))


@pytest.mark.parametrize(("world", "clips"), [(1, 5), (2, 5), (3, 5), (8, 3)])
def test_ranks_share_out_the_sequence_that_one_rank_sees(world, clips):
    order = order_of([LONG] * clips)
    whole = list(islice(order.batches(count()), 24))
    for rank in range(world):
        assert list(islice(order.batches(count(rank, world)), 24 // world)) == whole[rank::world]
    assert list(islice(order.batches(count(17)), 7)) == whole[17:]


ORDERS = st.builds(
    lambda shapes, captions, windows, sizes, share, **settings: order_of(
        shapes,
        groups=[clip // windows for clip in range(len(shapes))] if windows > 1 and len(set(shapes)) == 1 else (),
        num_captions=[captions] * len(shapes),
        batch_size=lambda shape: sizes[shape],
        still_share=share if 0 < sum(shape[1] == 1 for shape in shapes) < len(shapes) else None,
        **settings,
    ),
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=60),
    captions=st.integers(1, 3),
    windows=st.integers(1, 4),
    sizes=st.fixed_dictionaries({shape: st.integers(1, 4) for shape in SHAPES}),
    share=st.sampled_from([None, 0.0, 0.25, 0.6]),
    seed=st.integers(0, 99),
    random_flip=st.booleans(),
    caption_dropout=st.sampled_from([0, 0.3]),
    bucket_group=st.integers(1, 8),
)


@settings(deadline=None)
@given(ORDERS, st.integers(0, 5))
def test_any_epoch_shows_each_clip_once_but_for_windows_and_stills(order, epoch):
    batches = order.epoch(epoch)
    assert len(batches) == order.batches_per_epoch()
    assert all(len({order.shapes[item.clip] for item in batch}) == 1 for batch in batches)
    assert all(len(batch) <= order.batch_size(order.shapes[batch[0].clip]) for batch in batches)
    shown = Counter(clips_in(batches))
    if order.groups:
        assert Counter(order.groups[clip] for clip in shown.elements()) == Counter(set(order.groups))
        return
    videos = [clip for clip in range(len(order.shapes)) if clip not in order.stills]
    assert all(shown[clip] == 1 for clip in videos)
    stills = [shown[clip] for clip in order.stills]
    if order.still_share is None:
        assert all(times == 1 for times in stills)
    else:
        assert sum(stills) == round(len(videos) * order.still_share / (1 - order.still_share))
        assert max(stills) - min(stills) <= 2  # one cycle may end in an epoch, and the next begin


@settings(deadline=None)
@given(ORDERS, st.integers(0, 200), st.integers(1, 8))
def test_any_rank_and_any_resumed_run_see_the_straight_sequence(order, first, world):
    whole = list(islice(order.batches(count()), first + 4 * world))
    for rank in range(world):
        assert list(islice(order.batches(count(first + rank, world)), 4)) == whole[first + rank :: world]


@settings(deadline=None)
@given(st.integers(1, 40), st.floats(0.05, 0.9), st.integers(0, 9))
def test_stills_take_turns_so_that_all_are_seen_equally_often(stills, share, seed):
    order = order_of([LONG] * 10 + [STILL] * stills, seed=seed, still_share=share)
    epochs = [[clip for clip in clips_in(order.epoch(epoch)) if clip in order.stills] for epoch in range(12)]
    times = Counter(chain(*epochs))
    assert max(times.values()) - min(times[clip] for clip in order.stills) <= 1
    assert {len(epoch) for epoch in epochs} == {round(10 * share / (1 - share))}


def test_windows_of_a_clip_take_turns():
    order = order_of([LONG] * 12, groups=[clip // 4 for clip in range(12)])
    epochs = [sorted(clips_in(order.epoch(epoch))) for epoch in range(8)]
    assert all([clip // 4 for clip in epoch] == [0, 1, 2] for epoch in epochs)
    for turns in (epochs[:4], epochs[4:]):
        assert sorted(chain(*turns)) == list(range(12))
    assert epochs[:4] != epochs[4:]


def test_captions_are_dropped_and_drawn_at_their_share():
    order = order_of([LONG] * 2000, num_captions=[1] * 1000 + [3] * 1000, caption_dropout=0.1)
    drawn = {item.clip: item.caption for item in chain(*order.epoch(3))}
    of_one, of_three = (Counter(drawn[clip] for clip in part) for part in (range(1000), range(1000, 2000)))
    assert set(of_one) == {WITHOUT_CAPTION, 0} and 70 < of_one[WITHOUT_CAPTION] < 130
    assert 70 < of_three[WITHOUT_CAPTION] < 130 and all(250 < of_three[caption] < 350 for caption in (0, 1, 2))
    without = order._replace(caption_dropout=0.0)
    assert WITHOUT_CAPTION not in {item.caption for item in chain(*without.epoch(3))}


def test_what_is_drawn_for_captions_moves_no_clip():
    plain, drawn = (order_of([LONG, SHORT] * 20, random_flip=True, caption_dropout=share) for share in (0, 0.5))
    for epoch in range(3):
        assert plain.epoch(epoch) == [[item._replace(caption=0) for item in batch] for batch in drawn.epoch(epoch)]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_groups_give_all_ranks_equal_work_but_at_the_ends_of_an_epoch(ranks):
    shapes = [LONG] * 203 + [SHORT] * 101 + [STILL] * 60
    grouped, plain = (order_of(shapes, bucket_group=size) for size in (8, 1))
    turns = {}
    for name, order in (("grouped", grouped), ("plain", plain)):
        of_rank = [islice(order.batches(count(rank, ranks)), 4 * len(shapes) // ranks) for rank in range(ranks)]
        turns[name] = [len({shapes[batch[0].clip] for batch in turn}) > 1 for turn in zip(*of_rank)]
    assert sum(turns["grouped"]) <= 4 * 2 * len(set(shapes)) < sum(turns["plain"]) / 2


def test_a_group_is_one_shape_that_begins_where_ranks_begin():
    shapes = [LONG] * 30 + [SHORT] * 21
    batches = list(islice(order_of(shapes, bucket_group=8).batches(count()), 51 * 8))
    whole = [batches[first : first + 8] for first in range(0, len(batches), 8)]
    alike = sum(len({shapes[batch[0].clip] for batch in group}) == 1 for group in whole)
    assert alike >= len(whole) * 0.7
    assert any(shapes[a[0].clip] != shapes[b[0].clip] for a, b in pairwise(batches))


def test_an_item_names_its_parts():
    assert Item(3) == (3, False, 0)
