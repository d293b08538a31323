"""What goes wrong around a run ends in its message, or is harmless."""

import pytest

from faults import surroundings

FULL_DISKS = ("before the metrics begin", "before a row", "in a checkpoint", "in a best", "in encoding")
SAMPLE = [name for name in surroundings.CHECKS if "a full disk" not in name or name.endswith(FULL_DISKS)]


@pytest.mark.parametrize("name", SAMPLE)
def test_this_ends_in_its_message_or_is_harmless(world, name):
    try:
        surroundings.CHECKS[name](world)
    except surroundings.Impossible as reason:
        pytest.skip(str(reason))
