"""The result on the hub: a repository, a card that says how to use it, the upload."""

from pathlib import Path

from huggingface_hub import ModelCardData, create_repo, upload_folder

from checkpoints import METRICS_FILE
from cogvideox import Checkpoint
from dataset import publish
from trainable import LORA_FILE, TRANSFORMER_FOLDER, Lora

CARD = """---
{header}
---
# CogVideoX, {what}

{about}

```python
import torch
from diffusers import {imports}
from diffusers.utils import export_to_video{image_import}

{load}
export_to_video(pipe({image}prompt="{prompt}").frames[0], "video.mp4", fps={fps})
```
"""
LOAD_LORA = """pipe = {pipeline}.from_pretrained("{base}", torch_dtype=torch.bfloat16).to("cuda")
pipe.load_lora_weights("{repo}")  # at the strength it was trained at"""
LOAD_TRANSFORMER = """transformer = CogVideoXTransformer3DModel.from_pretrained(
    "{repo}", subfolder="transformer", torch_dtype=torch.bfloat16
)
pipe = {pipeline}.from_pretrained("{base}", transformer=transformer, torch_dtype=torch.bfloat16).to("cuda")"""


def create_hub_repo(name: str, token: str | None) -> str:
    """The full name of the repository, made at the start so that a wrong token is found before training."""
    try:
        return create_repo(name, token=token, exist_ok=True).repo_id
    except Exception as error:  # without a network it is one of the HTTP library below, which changes with versions
        raise ValueError(
            f"--push_to_hub: cannot create {name} ({str(error).strip().splitlines()[0]}); log in with `hf auth login`, "
            "or pass --hub_token, or leave --push_to_hub away"
        ) from error


def model_card(repo: str, checkpoint: Checkpoint, options: dict) -> str:
    """What stands on the repository's page.

    Args:
        options: of the training script.
    """
    is_lora, takes_image = options["training_type"] == "lora", checkpoint.takes_image
    # The hub refuses a card whose base_model is not one of its own names.
    on_hub = {"base_model": checkpoint.name} if not Path(checkpoint.name).is_dir() else {}
    base = checkpoint.name if on_hub else Path(checkpoint.name).name
    tags = ["cogvideox", *["lora"] * is_lora, "image-to-video" if takes_image else "text-to-video"]
    pipeline = "CogVideoXImageToVideoPipeline" if takes_image else "CogVideoXPipeline"
    prompt = (options["validation_prompt"] or "a prompt").split(options["validation_prompt_separator"])[0]
    saved = Lora(**{name: options[name] for name in Lora._fields}).saved()
    lora, sft = f"A LoRA for {base}, rank {saved['r']}, alpha {saved['lora_alpha']:g}.", f"All weights of {base}."
    return CARD.format(
        header=ModelCardData(library_name="diffusers", tags=tags, **on_hub).to_yaml(),
        what="a LoRA" if is_lora else "fine-tuned",
        about=lora if is_lora else sft,
        imports=pipeline if is_lora else f"{pipeline}, CogVideoXTransformer3DModel",
        image_import=", load_image" if takes_image else "",
        load=(LOAD_LORA if is_lora else LOAD_TRANSFORMER).format(pipeline=pipeline, base=base, repo=repo),
        image='image=load_image("image.png"), ' if takes_image else "",
        prompt=prompt.strip().replace('"', "'"),
        fps=options["fps"],
    )


def push_to_hub(repo: str, output_dir: Path, checkpoint: Checkpoint, options: dict, token: str | None) -> None:
    """Uploads the result, a card and the validation videos; not the checkpoints."""
    publish(output_dir / "README.md", model_card(repo, checkpoint, options).encode())
    patterns = ["README.md", LORA_FILE, f"{TRANSFORMER_FOLDER}/**", "validation/**", "args.json", METRICS_FILE]
    upload_folder(repo_id=repo, folder_path=output_dir, allow_patterns=patterns, token=token)
