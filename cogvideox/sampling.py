"""Sampling: a video from models that are in memory, and the mp4 that it becomes."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import imageio
import numpy as np
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline
from PIL import Image

NUM_INFERENCE_STEPS = 50  # diffusers' default for CogVideoX


def noise_generator(seed: int) -> torch.Generator:
    """Returns the generator of a video's noise, as users of diffusers write it: the same noise on every device.

    The n-th of several videos of a prompt, counted from 0, has the seed of the first plus n.
    """
    return torch.Generator("cpu").manual_seed(seed)


def sample_video(
    transformer,
    vae,
    scheduler,
    prompt_embeds,
    negative_prompt_embeds,
    *,
    generator,
    image=None,
    before_each: Callable[[], None] = lambda: None,
    **options,
) -> list[Image.Image]:
    """Returns the frames of one video, sampled by diffusers' pipeline with models that are loaded already.

    Args:
        scheduler: the base model's; a copy is used, so that training's stays as it is.
        prompt_embeds, negative_prompt_embeds: [L, D], in the transformer's dtype.
        generator: from `noise_generator`.
        image: the first frame, uint8 [H, W, C]; None for text-to-video.
        before_each: called before each sampling step.
        options: further arguments of the pipeline's __call__, such as height, width and guidance_scale.
    """
    pipeline_class = CogVideoXPipeline if image is None else CogVideoXImageToVideoPipeline
    pipeline = pipeline_class(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=transformer,
        scheduler=type(scheduler).from_config(scheduler.config, timestep_spacing="trailing"),
    )
    pipeline.set_progress_bar_config(disable=True)
    if image is not None:
        options["image"] = Image.fromarray(image.numpy())
    options.setdefault("num_inference_steps", NUM_INFERENCE_STEPS)

    def after_step(_pipeline, _step: int, _timestep: int, tensors: dict) -> dict:
        before_each()
        return tensors

    before_each()
    return pipeline(
        prompt_embeds=prompt_embeds[None],
        negative_prompt_embeds=negative_prompt_embeds[None],
        generator=generator,
        callback_on_step_end=after_step,
        **options,
    ).frames[0]


def encode_mp4(frames: list[Image.Image], fps: int, comment: str = "") -> bytes:
    """Returns an mp4 as diffusers' `export_to_video` makes it, which takes no metadata; `comment` is in its."""
    metadata = ["-metadata", f"comment={comment}"] if comment else []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "video.mp4"
        with imageio.get_writer(file, fps=fps, quality=5, macro_block_size=16, output_params=metadata) as writer:
            for frame in frames:
                writer.append_data(np.array(frame))
        return file.read_bytes()
