"""The result on the hub: its repository, the model card that says how to use it, the upload."""

import argparse
import re
import shlex
import sys
from pathlib import Path

from huggingface_hub import ModelCardData, create_repo, get_token, upload_folder
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from cogvideox.base_model import BaseModel, published_as
from cogvideox.lora import Lora
from cogvideox.lora_files import LORA_FILE, TRANSFORMER_FOLDER
from files import CannotContinue, publish, without_tokens
from run.run_directory import ARGS_FILE, METRICS_FILE, REPORT_FILE, VALIDATION_FOLDER, read_validation_videos
from run.signals import Stopped, ending_at_once

UPLOADED = [  # patterns in the run directory: the result, and what is told about it
    LORA_FILE, f"{TRANSFORMER_FOLDER}/**", "README.md", f"{VALIDATION_FOLDER}/**", ARGS_FILE, METRICS_FILE, REPORT_FILE,
]  # fmt: skip
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
LOAD_LORA = """pipe = {pipeline}.from_pretrained("{base_name}", torch_dtype=torch.bfloat16).to("cuda")
pipe.load_lora_weights("{repo}")  # at the strength it was trained at"""
LOAD_TRANSFORMER = """transformer = CogVideoXTransformer3DModel.from_pretrained(
    "{repo}", subfolder="transformer", torch_dtype=torch.bfloat16
)
pipe = {pipeline}.from_pretrained("{base_name}", transformer=transformer, torch_dtype=torch.bfloat16).to("cuda")"""


# ---- token -----------------------------------------------------------------------------------------------------------


def access_token(text: str) -> str:
    """Returns an access token of the hub; a type for argparse, whose messages do not repeat it."""
    if not re.fullmatch("[!-~]+", text):
        raise argparse.ArgumentTypeError(
            "an access token has at least one character and no spaces or letters with accents, and this one does not; "
            "copy it again, or leave it out if HF_TOKEN or `hf auth login` has it"
        )
    return text


def hide_token(token: str | None) -> None:
    """Takes the token out of the command line as Python shows it, which trackers log."""
    if token:
        sys.argv[:] = [word.replace(token, "...") for word in sys.argv]


def _reason(error: Exception, token: str | None) -> str:
    """Returns the first line of an error without any token; the HTTP library quotes headers that it refuses."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    for secret in filter(None, (token, get_token())):
        line = line.replace(secret, "...")
    return without_tokens(line)


# ---- repository ------------------------------------------------------------------------------------------------------


def create_hub_repo(name: str, token: str | None) -> str | None:
    """Creates the repository, before training so that a wrong token is found then, and returns its full name.

    Returns None if the hub cannot be reached; `push_to_hub` tries again.
    """
    try:
        return create_repo(name, token=token, exist_ok=True).repo_id
    except Exception as error:  # the HTTP library's errors pass through, and which one it is depends on the version
        reason = _reason(error, token)
        if not _is_refusal(error):
            print(f"--push_to_hub: the hub cannot be reached ({reason}); it is tried again after training")
            return None
        raise ValueError(
            f"--push_to_hub: cannot create {name} ({reason}); log in with `hf auth login`, or pass --hub_token, or "
            "leave --push_to_hub out"
        ) from error


def _is_refusal(error: Exception) -> bool:
    """Whether the hub, or its library, has said no; otherwise it did not answer, or is out of order or busy."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code < 500 and error.response.status_code != 429
    return isinstance(error, (ValueError, LocalTokenNotFoundError, OfflineModeIsEnabled))


# ---- card ------------------------------------------------------------------------------------------------------------


def _is_local(base: BaseModel) -> bool:
    return Path(base.name).is_dir()


def licence(base: BaseModel) -> dict:
    """Returns the entries on the licence in a card's header: none unless the base model is a published one."""
    published = None if _is_local(base) else published_as(base.name)
    if not published:
        return {}
    if published.licence == "apache-2.0":
        return {"license": published.licence}
    link = f"https://huggingface.co/{base.name}/blob/main/LICENSE"
    return {"license": "other", "license_name": published.licence, "license_link": link}


def last_validation(output_dir: Path) -> dict[str, str]:
    """Returns path, relative to the run directory, and prompt of each video of the last validation."""
    validations = read_validation_videos(output_dir)
    if not validations:
        return {}
    folder = validations[-1].folder.relative_to(output_dir)
    # Prompts become one line: a line of three dashes would end the card's header.
    return {f"{folder}/{name}": " ".join(prompt.split()) for name, prompt in sorted(validations[-1].prompts.items())}


def _header(base: BaseModel, options: dict, videos: dict[str, str]) -> str:
    is_lora = options["training_type"] == "lora"
    data = {
        "library_name": "diffusers",
        "pipeline_tag": base.published.task,
        "tags": ["cogvideox", "lora"] if is_lora else ["cogvideox"],
    }
    # The hub refuses a card whose base_model is not one of its own names.
    if not _is_local(base):
        data |= {"base_model": base.name, "base_model_relation": "adapter" if is_lora else "finetune"}
    data |= licence(base)
    if options["id_token"]:
        data["instance_prompt"] = options["id_token"]
    if videos:
        data["widget"] = [{"text": prompt, "output": {"url": path}} for path, prompt in videos.items()]
    return ModelCardData(**data).to_yaml()


def _licence_text(base: BaseModel) -> str:
    known = licence(base)
    if not known:
        return "The licence of the base model applies; the training script does not know it."
    name = "Apache-2.0" if known["license"] == "apache-2.0" else f"the [CogVideoX License]({known['license_link']})"
    return f"The base model is published under {name}, which applies to this, too."


def _example_prompt(options: dict) -> str:
    prompt = options["validation_prompt"] or " ".join(filter(None, [options["id_token"], "a prompt"]))
    return prompt.split(options["validation_prompt_separator"])[0].strip().replace('"', "'")


def model_card(repo: str, base: BaseModel, options: dict, videos: dict[str, str]) -> str:
    """Returns the text of the repository's page.

    Args:
        options: of the training script.
        videos: prompt of each video, by its path in the repository.
    """
    is_lora, takes_image = options["training_type"] == "lora", base.takes_image
    base_name = Path(base.name).name if _is_local(base) else base.name
    pipeline = "CogVideoXImageToVideoPipeline" if takes_image else "CogVideoXPipeline"
    about = f"All weights of {base_name}."
    if is_lora:
        saved = Lora(**{name: options[name] for name in Lora._fields}).saved()
        about = f"A LoRA for {base_name}, rank {saved['r']}, alpha {saved['lora_alpha']:g}."
    links = "\n".join(f"- [{Path(path).name}]({path}): {prompt}" for path, prompt in videos.items())
    return CARD.format(
        header=_header(base, options, videos),
        what="a LoRA" if is_lora else "fine-tuned",
        about=about,
        imports=pipeline if is_lora else f"{pipeline}, CogVideoXTransformer3DModel",
        image_import=", load_image" if takes_image else "",
        load=(LOAD_LORA if is_lora else LOAD_TRANSFORMER).format(pipeline=pipeline, base_name=base_name, repo=repo),
        image='image=load_image("image.png"), ' if takes_image else "",
        prompt=_example_prompt(options),
        fps=options["fps"],
        gallery=GALLERY.format(links=links) if videos else "",
        licence=_licence_text(base),
    )


# ---- upload ----------------------------------------------------------------------------------------------------------


def upload_command(repo: str, output_dir: Path) -> str:
    """Returns the command line that uploads what `push_to_hub` does."""
    words = ["hf", "upload", repo, str(output_dir), "."]
    return shlex.join(words + [word for pattern in UPLOADED for word in ("--include", pattern)])


def push_to_hub(
    repo: str | None, output_dir: Path, base: BaseModel, *, name: str, options: dict, token: str | None, signal: int = 0
) -> None:
    """Uploads the result, its card, the validation videos and the report; not the checkpoints.

    Args:
        repo: from `create_hub_repo`.
        name: of the repository, where `repo` is None.
        signal: one that has arrived before; the upload is then left out.

    Raises:
        CannotContinue: the upload has failed; the message has the command for later.
        Stopped: `signal` is not 0; the same command. A signal in the upload ends the process with it.
    """
    later = f"The result is in {output_dir}; upload it with: {upload_command(repo or name, output_dir)}"
    if signal:
        raise Stopped(signal, f"--push_to_hub: stopped before the upload. {later}")
    print(f"uploading to {repo or name}", flush=True)
    try:
        card = model_card(repo or name, base, options, last_validation(output_dir))
        publish(output_dir / "README.md", card.encode())
        with ending_at_once(f"--push_to_hub: stopped in the upload. {later}"):
            repo = repo or create_repo(name, token=token, exist_ok=True).repo_id
            upload_folder(repo_id=repo, folder_path=output_dir, allow_patterns=UPLOADED, token=token)
    except Exception as error:  # as in create_hub_repo
        raise CannotContinue(f"--push_to_hub: the upload has failed ({_reason(error, token)}). {later}") from error
