"""The comparison of tests/same_bits.py, on run directories made here; no run is made."""

import json

import imageio.v3 as iio
import numpy as np
import pytest
import same_bits
import torch
from safetensors.torch import save_file

TENSORS = {"a": torch.tensor([0.0, 1.0]), "b": torch.ones(2, 3, dtype=torch.bfloat16)}
ROWS = [{"step": 1, "loss": 0.5, "lr": 1e-3, "grad_norm": 2.0, "seconds": 0.1}, {"step": 1, "validation_loss": 0.25}]


@pytest.fixture
def read_run(tmp_path):
    """Writes a run directory and returns what is compared of it."""

    def read(rows=ROWS, tensors=TENSORS, alpha="4", grey=0, result="pytorch_lora_weights.safetensors"):
        run = tmp_path / str(len(list(tmp_path.iterdir())))
        for path in (run / result, run / "validation" / "step-000001" / "prompt-00_seed-42.mp4"):
            path.parent.mkdir(parents=True, exist_ok=True)
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        save_file(tensors, run / result, {"alpha": alpha})
        frames = np.full((2, 16, 16, 3), grey, dtype=np.uint8)
        iio.imwrite(run / "validation" / "step-000001" / "prompt-00_seed-42.mp4", frames, fps=8)
        return same_bits.read_run(run)

    return read


def test_equal_runs_have_no_difference_whatever_time_they_took(read_run):
    slower = [ROWS[0] | {"seconds": 9.9, "clips_per_second": 3}, ROWS[1]]
    assert same_bits.first_difference(read_run(), read_run(rows=slower)) is None


@pytest.mark.parametrize("options, expected", [
    ({"rows": [ROWS[0] | {"loss": 0.5000000001}, ROWS[1]]}, "metrics.jsonl:1: loss: 0.5 in base, 0.5000000001 in new"),
    ({"rows": ROWS[:1]}, "metrics.jsonl:2: step: 1 in base, absent in new"),
    ({"rows": [*ROWS, {"step": 2}]}, "metrics.jsonl:3: step: absent in base, 2 in new"),
    ({"tensors": TENSORS | {"a": torch.tensor([-0.0, 1.0])}}, "weights.safetensors: a: torch.float32 [2] sum 1.0"),
    ({"tensors": TENSORS | {"b": TENSORS["b"].float()}}, "weights.safetensors: b: torch.bfloat16 [2, 3] sum 6.0"),
    ({"tensors": {"a": TENSORS["a"]}}, "absent in new"),
    ({"alpha": "8"}, "metadata alpha: 4 in base, 8 in new"),
    ({"grey": 99}, "validation/step-000001/prompt-00_seed-42.mp4: sha256"),
    ({"result": "transformer/a.safetensors"}, "lora_weights.safetensors: metadata alpha: 4 in base, absent in new"),
])  # fmt: skip
def test_what_differs_first_is_named_with_both_values(read_run, options, expected):
    assert expected in same_bits.first_difference(read_run(), read_run(**options))


def test_a_run_without_a_result_is_not_the_same_as_another(read_run):
    with pytest.raises(RuntimeError, match="without a result"):
        read_run(result="elsewhere/model.safetensors")


def test_a_cache_that_is_written_again_differs(tmp_path):
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "clip.safetensors").write_bytes(b"1")
    before = same_bits.modification_times(tmp_path)
    assert same_bits.first_difference(before, same_bits.modification_times(tmp_path)) is None
    (tmp_path / "known.txt").write_bytes(b"2")  # notes on the clips are not what was encoded
    assert same_bits.first_difference(before, same_bits.modification_times(tmp_path)) is None
    (tmp_path / "caption.safetensors").write_bytes(b"3")
    assert "absent in base" in same_bits.first_difference(before, same_bits.modification_times(tmp_path))
