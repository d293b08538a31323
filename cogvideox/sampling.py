"""A video from the model in training."""

from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline
from PIL import Image


def sample_video(
    transformer, vae, scheduler, prompt_embeds, negative_prompt_embeds, *, image=None, generator, **options
) -> list:
    """Frames (PIL images) of one video, sampled by diffusers' pipeline around the models that are already loaded.

    Args:
        scheduler: the checkpoint's own; a copy is used, so that training's stays as it is.
        prompt_embeds, negative_prompt_embeds: [L, D], in the transformer's dtype.
        image: the first frame, uint8 [H, W, C]; None for text-to-video.
        options: of the pipeline's __call__: height, width, num_frames, guidance_scale, use_dynamic_cfg.
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
    return pipeline(
        prompt_embeds=prompt_embeds[None],
        negative_prompt_embeds=negative_prompt_embeds[None],
        generator=generator,
        **options,
    ).frames[0]
