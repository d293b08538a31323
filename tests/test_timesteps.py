"""Timesteps by a low-discrepancy sequence."""

import json

import pytest
import torch
from conftest import training_options

import train_cogvideox_lora
from cogvideox.objective import generator_for, spread_timesteps
from run import course
from run.manifest import MANIFEST_FILE, write_manifest
from run.run_directory import STATE_FILE

TIMESTEPS = 1000


def spread(numbers, batch_size, seed=0):
    def generator():
        return generator_for(torch.device("cpu"), seed, "timesteps")

    return torch.cat([spread_timesteps(number, batch_size, TIMESTEPS, generator()) for number in numbers])


@pytest.mark.parametrize("batch_size", [1, 3, 4])
@pytest.mark.parametrize("first", [0, 123_457])
def test_any_stretch_of_a_run_fills_the_schedule_evenly(batch_size, first):
    """Independent draws would leave parts of the schedule out: of 64 draws in 16 parts, a part has 4 +- 2."""
    for count in (64, 1000):
        drawn = spread(range(first, first + count), batch_size)
        counts = torch.bincount(drawn * 16 // TIMESTEPS, minlength=16)
        assert len(drawn) == count * batch_size and len(counts) == 16
        assert (counts - len(drawn) / 16).abs().max() <= 2 * batch_size


def test_over_all_seeds_every_timestep_has_the_same_probability():
    """The first and another number, over 20,000 seeds: Pearson's statistic of 20 parts is within its range."""
    for number in (0, 7):
        drawn = torch.stack([spread([number], 2, seed) for seed in range(20_000)])  # [seeds, B]
        for place in drawn.T:
            counts = torch.bincount(place * 20 // TIMESTEPS, minlength=20)
            assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # 19 degrees of freedom, 1 in 1,000 is above


def test_the_timesteps_of_a_batch_are_equally_far_apart():
    for number in range(50):
        drawn = spread([number], 4).sort().values
        gaps = torch.cat([drawn.diff(), drawn[:1] + TIMESTEPS - drawn[-1:]])
        assert (gaps - 250).abs().max() <= 1


def test_other_seeds_have_other_timesteps_and_the_same_seed_the_same():
    assert torch.equal(spread(range(9), 2, seed=1), spread(range(9), 2, seed=1))
    assert not torch.equal(spread(range(9), 2, seed=1), spread(range(9), 2, seed=2))


def drawn_in_training(tiny_checkpoint, clips, output_dir, monkeypatch, **options):
    """Runs the training script; returns the timesteps of its updates, in their order."""
    drawn = []
    training_loss = train_cogvideox_lora.training_loss

    def record(base, transformer, *args, timesteps=None, **more):
        def recorder(**inputs):
            drawn.append(inputs["timestep"].tolist())
            return transformer(**inputs)

        return training_loss(base, recorder, *args, timesteps=timesteps, **more)

    monkeypatch.setattr(train_cogvideox_lora, "training_loss", record)
    line = training_options(tiny_checkpoint, clips, output_dir, **options)
    train_cogvideox_lora.main(train_cogvideox_lora.parse_args(line))
    return drawn


def test_training_takes_them_by_the_number_of_the_micro_batch_and_by_default_they_are_drawn(
    tiny_checkpoint, clips, tmp_path, monkeypatch
):
    options = {"max_train_steps": 3, "train_batch_size": 2, "seed": 5}
    spread_evenly = options | {"timestep_sampling": "low_discrepancy"}
    drawn = drawn_in_training(tiny_checkpoint, clips, tmp_path / "a", monkeypatch, **spread_evenly)
    assert drawn == [spread([number], 2, seed=5).tolist() for number in range(3)]
    independent = drawn_in_training(tiny_checkpoint, clips, tmp_path / "b", monkeypatch, **options)
    assert len(independent) == 3 and independent != drawn


def test_a_checkpoint_of_an_earlier_version_says_that_its_timesteps_were_independent(
    tiny_checkpoint, clips, tmp_path, train, capsys
):
    train(tiny_checkpoint, tmp_path, max_train_steps=2)
    state = tmp_path / "checkpoint-2" / STATE_FILE
    record = json.loads(state.read_text())
    for name in course.EARLIER:
        del record["options"][name]
    state.write_text(json.dumps(record))
    (state.parent / MANIFEST_FILE).unlink()
    write_manifest(state.parent)
    options = {"timestep_sampling": "low_discrepancy", "resume_from_checkpoint": "latest"}
    train(tiny_checkpoint, tmp_path, max_train_steps=3, **options)
    assert "--timestep_sampling low_discrepancy (was uniform)" in capsys.readouterr().out
