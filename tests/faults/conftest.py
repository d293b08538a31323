"""The world in which runs are disturbed: made once for the tests of this folder."""

import pytest

from faults.harness import World


@pytest.fixture(scope="session")
def world(tiny_checkpoint, clips, tmp_path_factory):
    return World(tiny_checkpoint, clips, tmp_path_factory.mktemp("runs"))
