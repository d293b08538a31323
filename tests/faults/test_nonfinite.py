"""Numbers that are not finite are skipped, named by their clip, and never saved; other updates are as without them."""

import pytest

from faults import nonfinite

SAMPLE = (
    "nan in parameters, update 4", "inf in prompt_embeds, update 1", "nan in loss, update 7",
    "inf in gradient, update 4", "1e+38 in gradient, update 4", "nan in parameters, updates 3, 4, 5",
    "nan in loss, updates 2, 3, 5, 6",
)  # fmt: skip


@pytest.mark.parametrize("name", SAMPLE)
def test_an_update_with_such_a_number_is_skipped_and_named_and_the_others_are_as_without_it(world, name):
    nonfinite.check(world, name)
