"""What goes wrong around a run ends in its message, or is harmless."""

import pytest

from faults import surroundings


@pytest.mark.parametrize("name", surroundings.CHECKS)
def test_this_ends_in_its_message_or_is_harmless(world, name):
    try:
        surroundings.CHECKS[name](world)
    except surroundings.Impossible as reason:
        pytest.skip(str(reason))
