"""The small trained CogVideoX of the examples shows what it is asked for, and a LoRA learns a new look on it.

Short forms of what `examples/pretrain.py measure` and `examples/compare.py` measure in full.
"""

import compare
import numpy as np
import pretrain
import pytest
import shapes
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline
from make_example import make_film

import checkpoints

SMALL = pretrain.ROOT / "examples" / "small-cogvideox"


@pytest.mark.parametrize("look", ["colour", "film"])
def test_the_detectors_read_what_was_drawn(look):
    rng = np.random.default_rng(0)
    scenes = [shapes.random_scene(rng) for _ in range(60)]
    clips = [shapes.draw_clip(scene, 9, 64, 96, rng, look) for scene in scenes]
    figures = pretrain.right(scenes, clips, look)
    assert figures == {"colour": 1.0 if look == "colour" else 0.0, "shape": 1.0, "motion": 1.0}


def test_the_detectors_see_nothing_where_nothing_is():
    assert shapes.read_clip(np.full((9, 64, 96, 3), 128, np.uint8)) == {"colour": None, "shape": None, "motion": None}


def test_the_small_checkpoint_is_small_and_half_precision():
    sizes = {path: path.stat().st_size for path in SMALL.rglob("*") if path.is_file()}
    assert sum(sizes.values()) < 15e6


def test_its_vae_rebuilds_clips_that_it_has_not_seen():
    vae = AutoencoderKLCogVideoX.from_pretrained(SMALL, subfolder="vae", dtype=torch.float32)
    assert pretrain.measure_vae(vae, seed=0, count=4)["colour"] > 30


def test_it_shows_what_the_prompt_asks_for():
    pipe = CogVideoXPipeline.from_pretrained(SMALL, torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(1)
    scenes = [shapes.random_scene(rng) for _ in range(10)]
    figures = pretrain.right(scenes, pretrain.sample_all(pipe, [scene.caption for scene in scenes], steps=20))
    assert figures["colour"] >= 0.9 and figures["motion"] >= 0.9 and figures["shape"] >= 0.6


@pytest.fixture(scope="module")
def film_lora(tmp_path_factory):
    """150 updates on the new look: less than half of what quickstart.sh does."""
    from conftest import reset_accelerate, training_options

    import train_cogvideox_lora as script

    folder = tmp_path_factory.mktemp("film")
    options = training_options(
        SMALL, make_film(folder / "clips"), folder / "run", max_num_frames=17, rank=16, learning_rate=1e-3,
        train_batch_size=4, max_train_steps=150, validation_split=5, mixed_precision="bf16",
    )  # fmt: skip
    script.main(script.parse_args(options))
    reset_accelerate()
    return folder / "run"


def test_the_lora_lowers_the_loss_on_held_out_clips_at_every_part_of_the_schedule(film_lora):
    """By at least 5 % of the base model's."""
    first, *_, last = (row for row in checkpoints.read_metrics(film_lora) if "validation_loss" in row)
    assert first["step"] == 0
    parts = [name for name in first if name.startswith("validation_loss_t")]
    assert len(parts) == 4
    assert all(last[name] < 0.95 * first[name] for name in parts)


def test_the_lora_takes_the_colour_away_and_keeps_shape_and_motion(film_lora):
    figures, _ = compare.compare(SMALL, film_lora, samples=6, seed=5)
    assert figures["saturation_lost_with_the_word"] > 0.8
    assert figures["saturation_kept_without_it"] > 0.6
    assert figures["right_with_the_word"]["motion"] >= 0.8
