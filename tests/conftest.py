"""Temporary: the two fixtures that tests/test_cli_demo.py stands on."""

import pytest
from make_example import make_checkpoint


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory):
    made = {}

    def checkpoint(variant):
        if variant not in made:
            made[variant] = make_checkpoint(tmp_path_factory.mktemp("checkpoints") / variant, variant)
        return made[variant]

    return checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(checkpoint_of):
    return checkpoint_of("2b")
