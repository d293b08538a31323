"""Runs the training script and writes down what each rank's transformer received, and its LoRA after. For tests.

usage: witness.py FOLDER OPTIONS...
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import train_cogvideox_lora
from cogvideox import lora

folder, *options = sys.argv[1:]
seen = {"timesteps": [], "noisy": []}
add_lora = lora.add_lora


def watch(transformer, *args):
    def hook(module, args, inputs):
        seen["timesteps"].append(inputs["timestep"])
        seen["noisy"].append(inputs["hidden_states"])

    add_lora(transformer, *args)
    transformer.register_forward_pre_hook(hook, with_kwargs=True)
    seen["transformer"] = transformer


lora.add_lora = watch
train_cogvideox_lora.main(train_cogvideox_lora.parse_args(options))
lora = {name: weight for name, weight in seen["transformer"].named_parameters() if weight.requires_grad}
record = {"timesteps": torch.cat(seen["timesteps"]), "noisy": torch.cat(seen["noisy"]), "lora": lora}
torch.save(record, Path(folder) / f"rank-{os.environ['RANK']}.pt")
