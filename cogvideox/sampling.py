"""Sampling: a video from models that are in memory, and the mp4 that it becomes."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline
from diffusers.utils import export_to_video
from PIL import Image

NUM_INFERENCE_STEPS = 50  # diffusers' default for CogVideoX


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
        generator: of the initial noise, torch.Generator.
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


def encode_mp4(frames: list, fps: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return Path(export_to_video(frames, f"{folder}/video.mp4", fps=fps)).read_bytes()
