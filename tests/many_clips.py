"""Trains on many cached clips; prints the peak memory of the process. For tests.

usage: many_clips.py CHECKPOINT FOLDER CLIPS UPDATES

What would take minutes is left out: decoding, the VAE, and most of the transformer's work, which sees a corner of the
latents. What training reads lies in the cache all the same.
"""

import contextlib
import sys
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

import train_cogvideox_lora
from clips import frames, known
from clips.video import Video
from cogvideox import encoders, objective
from run.run_directory import peak_memory_gib

checkpoint, folder, clips, updates = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
folder.mkdir()
names = [f"{i}.mp4" for i in range(clips)]
for name in names:
    (folder / name).write_text(name)
(folder / "videos.txt").write_text("\n".join(names))
(folder / "prompts.txt").write_text("\n".join(f"caption {name}" for name in names))


@contextlib.contextmanager
def encoder(*_, **__):
    yield lambda frames: torch.randn(len(frames), 8, 13, 16, 24)  # 156 KiB: 1,000 of them cannot hide in the process


video = Video(720, 480, 0, Fraction(1, 8), is_numbered=False, remarks=(), damage=())
known.examine_video = lambda path: (video, np.arange(49))
frames.read_frames = lambda video, view, **options: torch.zeros(1, 1, 1, 3, dtype=torch.uint8)
encoders.video_encoder = encoder
sample_latents = objective.sample_latents
objective.sample_latents = lambda parameters, *others: sample_latents(parameters[..., :2, :2], *others)
options = ["--pretrained_model_name_or_path", checkpoint, "--instance_data_root", str(folder), "--rank", "4"]
options += ["--output_dir", str(folder / "run"), "--max_train_steps", updates, "--train_batch_size", "8"]
options += ["--height", "128", "--width", "192"]  # of those latents
train_cogvideox_lora.main(train_cogvideox_lora.parse_args([*options, "--mixed_precision", "no"]))
print(peak_memory_gib(torch.device("cpu")))
