"""A checkpoint that a disk has damaged is passed over and named; the run that is resumed does not differ."""

from functools import partial

import pytest

from faults import damage


@pytest.mark.parametrize("kind", ["lora", "sft"])
def test_every_damage_to_a_file_of_a_checkpoint_is_found_and_the_file_is_named(world, kind):
    files = damage.files_of(world, kind)
    counted = [damage.check_found(world, kind, file, way, seed=0) for file in files for way in damage.WAYS]
    assert len(files) >= 4 and sum(counted) >= len(counted) - 1  # a bit of white space may be flipped in a manifest


SPOILT = {
    "weights": partial(damage.spoil_file, "pytorch_lora_weights.safetensors", "one bit flipped"),
    "empty": damage.empty_folder,
    "later": damage.later_format,
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_damaged_checkpoint_is_passed_over_and_the_resumed_run_equals_the_undisturbed_one(world, name):
    damage.check_passed_over(world, "lora", SPOILT[name], name, both=name == "empty")


def test_latest_refuses_where_no_checkpoint_is_whole(world):
    damage.check_passed_over(world, "lora", damage.empty_folder, "latest", both=True, resume_from="latest")
