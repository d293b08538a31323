"""Runs the training script and kills this process with SIGKILL, as a power cut would. For tests.

usage: kill_after_checkpoint.py (saved|saving) STEP OPTIONS...   after that checkpoint, or in the middle of writing it
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import train_cogvideox_lora
from run import checkpoints

moment, step, *options = sys.argv[1:]
original_save = checkpoints.save_checkpoint


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def save(*args, record, **options):
    if moment == "saving" and record["step"] == int(step):
        checkpoints.publish_folder = lambda *_: die()
    original_save(*args, record=record, **options)
    if record["step"] == int(step):
        die()


checkpoints.save_checkpoint = save
train_cogvideox_lora.main(train_cogvideox_lora.parse_args(options))
