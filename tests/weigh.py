"""Runs the training script under FSDP2 and writes down how many bytes of whole weights and of shards a rank holds.

usage: weigh.py FOLDER OPTIONS...
"""

import gc
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch.distributed.tensor import DTensor

import train_cogvideox_lora
from run import checkpoints

folder, *options = sys.argv[1:]
save_checkpoint = checkpoints.save_checkpoint


def weigh(*args, **options):
    gc.collect()
    weights = [thing for thing in gc.get_objects() if isinstance(thing, torch.nn.Parameter)]
    whole = {
        w.untyped_storage().data_ptr(): w.untyped_storage().nbytes() for w in weights if not isinstance(w, DTensor)
    }
    shards = sum(weight.to_local().nbytes for weight in weights if isinstance(weight, DTensor))
    (Path(folder) / f"rank-{os.environ['RANK']}.txt").write_text(f"{sum(whole.values())} {shards}")
    save_checkpoint(*args, **options)


checkpoints.save_checkpoint = weigh
train_cogvideox_lora.main(train_cogvideox_lora.parse_args(options))
