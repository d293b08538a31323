"""A run that a signal ends has saved its last update, and its resumed run equals the undisturbed one."""

import signal

import pytest

from faults import stops

SAMPLE = (
    ("in encoding", signal.SIGINT), ("in the first validation", signal.SIGTERM), ("in an update", signal.SIGUSR1),
    ("in a later validation", signal.SIGTERM), ("in save", signal.SIGINT),
    ("two ranks: the second, in an update", signal.SIGTERM), ("two ranks: the second, in encoding", signal.SIGTERM),
)  # fmt: skip


@pytest.mark.parametrize(("name", "number"), SAMPLE)
def test_a_signal_at_this_moment_loses_no_update(world, name, number):
    stops.check(world, name, number)


def test_a_second_signal_after_five_seconds_ends_at_once(world):
    stops.check_second_signal(world)


@pytest.mark.parametrize("name", ["script, SIGINT to the group", "torchrun, the launcher killed"])
def test_a_signal_to_a_launcher_loses_no_update_and_leaves_no_process(world, name):
    stops.check_launched(world, name)
