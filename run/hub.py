"""The result on the hub: a repository, a card that says how to use it, the upload."""

from pathlib import Path

from huggingface_hub import ModelCardData, create_repo, upload_folder

from cogvideox.base_model import BaseModel
from cogvideox.lora import Lora
from cogvideox.lora_files import LORA_FILE, TRANSFORMER_FOLDER
from files import publish
from run.run_directory import ARGS_FILE, METRICS_FILE, REPORT_FILE, VALIDATION_FOLDER, read_validation_videos

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
{gallery}
## Licence

{licence}
"""
GALLERY = """
## Validation videos

<Gallery />

{links}
"""
# As their pages on the hub say; the organisation has been renamed, and the hub knows both names.
PUBLISHERS = ("THUDM", "zai-org")
APACHE = ("CogVideoX-2b",)
COGVIDEOX_LICENSE = ("CogVideoX-5b", "CogVideoX-5b-I2V", "CogVideoX1.5-5B", "CogVideoX1.5-5B-I2V")
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


def _is_local(base_model: BaseModel) -> bool:
    return Path(base_model.name).is_dir()


def licence(base_model: BaseModel) -> dict:
    """What a card's header says of the base model's licence: nothing unless it is one of those published."""
    if _is_local(base_model):
        return {}
    publisher, _, name = base_model.name.partition("/")
    if publisher in PUBLISHERS and name in APACHE:
        return {"license": "apache-2.0"}
    if publisher in PUBLISHERS and name in COGVIDEOX_LICENSE:
        link = f"https://huggingface.co/{base_model.name}/blob/main/LICENSE"
        return {"license": "other", "license_name": "cogvideox-license", "license_link": link}
    return {}


def last_validation(output_dir: Path) -> dict[str, str]:
    """Path of each video of the last validation, relative to the run directory, and its prompt."""
    validations = read_validation_videos(output_dir)
    if not validations:
        return {}
    folder = validations[-1].folder.relative_to(output_dir)
    # In one line: a line of three dashes would end the card's header.
    return {f"{folder}/{name}": " ".join(prompt.split()) for name, prompt in sorted(validations[-1].prompts.items())}


def _header(base_model: BaseModel, options: dict, videos: dict[str, str]) -> str:
    is_lora = options["training_type"] == "lora"
    data = {
        "library_name": "diffusers",
        "pipeline_tag": "image-to-video" if base_model.takes_image else "text-to-video",
        "tags": ["cogvideox", *["lora"] * is_lora],
    }
    # The hub refuses a card whose base_model is not one of its own names.
    if not _is_local(base_model):
        data |= {"base_model": base_model.name, "base_model_relation": "adapter" if is_lora else "finetune"}
    data |= licence(base_model)
    if options["id_token"]:
        data["instance_prompt"] = options["id_token"]
    if videos:
        data["widget"] = [{"text": prompt, "output": {"url": path}} for path, prompt in videos.items()]
    return ModelCardData(**data).to_yaml()


def _licence_text(base_model: BaseModel) -> str:
    known = licence(base_model)
    if not known:
        return "That of the base model applies; the training script does not know it."
    name = "Apache-2.0" if known["license"] == "apache-2.0" else f"the [CogVideoX License]({known['license_link']})"
    return f"The base model is published under {name}, which applies to this, too."


def _example_prompt(options: dict) -> str:
    prompt = options["validation_prompt"] or " ".join(filter(None, [options["id_token"], "a prompt"]))
    return prompt.split(options["validation_prompt_separator"])[0].strip().replace('"', "'")


def model_card(repo: str, base_model: BaseModel, options: dict, videos: dict[str, str]) -> str:
    """What stands on the repository's page.

    Args:
        options: of the training script.
        videos: path in the repository and prompt.
    """
    is_lora, takes_image = options["training_type"] == "lora", base_model.takes_image
    base = Path(base_model.name).name if _is_local(base_model) else base_model.name
    pipeline = "CogVideoXImageToVideoPipeline" if takes_image else "CogVideoXPipeline"
    saved = Lora(**{name: options[name] for name in Lora._fields}).saved()
    lora, sft = f"A LoRA for {base}, rank {saved['r']}, alpha {saved['lora_alpha']:g}.", f"All weights of {base}."
    links = "\n".join(f"- [{Path(path).name}]({path}): {prompt}" for path, prompt in videos.items())
    return CARD.format(
        header=_header(base_model, options, videos),
        what="a LoRA" if is_lora else "fine-tuned",
        about=lora if is_lora else sft,
        imports=pipeline if is_lora else f"{pipeline}, CogVideoXTransformer3DModel",
        image_import=", load_image" if takes_image else "",
        load=(LOAD_LORA if is_lora else LOAD_TRANSFORMER).format(pipeline=pipeline, base=base, repo=repo),
        image='image=load_image("image.png"), ' if takes_image else "",
        prompt=_example_prompt(options),
        fps=options["fps"],
        gallery=GALLERY.format(links=links) if videos else "",
        licence=_licence_text(base_model),
    )


def push_to_hub(repo: str, output_dir: Path, base_model: BaseModel, options: dict, token: str | None) -> None:
    """Uploads the result, a card, the validation videos and the report; not the checkpoints."""
    card = model_card(repo, base_model, options, last_validation(output_dir))
    publish(output_dir / "README.md", card.encode())
    result = [LORA_FILE, f"{TRANSFORMER_FOLDER}/**"]
    about = ["README.md", f"{VALIDATION_FOLDER}/**", ARGS_FILE, METRICS_FILE, REPORT_FILE]
    upload_folder(repo_id=repo, folder_path=output_dir, allow_patterns=result + about, token=token)
