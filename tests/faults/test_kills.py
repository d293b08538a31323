"""A run that is killed with SIGKILL and resumed equals one that is not; benchmarks/soak.py kills at every place."""

import pkgutil

import pytest

from faults import kills, stops

SAMPLE = (
    "while a clip is encoded", "in the middle of a row", "in torch.save", "before the manifest",
    "before a checkpoint is synced", "while an old checkpoint is deleted", "after the last checkpoint",
    "after the first best, before a checkpoint", "between the renames of a best", "between a best and its row",
    "before the result is renamed", "sft: before the result is renamed", "two ranks: the second in an update",
)  # fmt: skip


def test_every_place_is_a_function_of_today():
    """Those outside the samples are seen by benchmarks/soak.py only, and functions move."""
    for disturbed in (*kills.PLACES.values(), *stops.MOMENTS.values()):
        for name in filter(None, (disturbed.place.function, disturbed.place.within)):
            assert callable(pkgutil.resolve_name(name)), name


@pytest.mark.parametrize("name", SAMPLE)
def test_a_run_killed_at_this_place_equals_the_undisturbed_one_once_it_is_resumed(world, name):
    kills.check(world, name)


def test_a_run_killed_at_random_times_equals_the_undisturbed_one_once_it_is_resumed(world):
    kills.check_random(world, 1, kind="lora", ranks=1, longest=2)
