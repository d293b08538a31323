"""An input with something wrong in it gives a message or a result, never a traceback."""

import pytest

from faults import mutations

COUNT = 40


@pytest.mark.parametrize("name", list(mutations.trials(None, COUNT)))
def test_this_input_ends_in_a_message_or_a_finite_result(world, name):
    kind, seed = name.split()
    mutations.check(world, kind, int(seed))
