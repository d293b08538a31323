"""Memory does not grow with the number of clips."""

import subprocess
import sys

from conftest import ROOT


def peak_memory_gib(checkpoint, folder, clips):
    command = [sys.executable, ROOT / "tests" / "many_clips.py", checkpoint, folder, str(clips), "125"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(result.stdout.splitlines()[-1])


def test_a_thousand_clips_take_no_more_memory_than_ten(tiny_checkpoint, tmp_path):
    """Each of the thousand is seen once; kept in memory, their latents and captions would take 0.18 GiB."""
    few, many = (peak_memory_gib(tiny_checkpoint, tmp_path / str(clips), clips) for clips in (10, 1000))
    assert abs(many - few) < 0.05 * few
