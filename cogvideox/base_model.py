"""One published or local base model: its configs, what it allows, its weights.

What differs between base models is read from their configs, never from their names.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
)
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from transformers import AutoTokenizer, T5Config, T5EncoderModel

SCHEDULERS = {"CogVideoXDDIMScheduler": CogVideoXDDIMScheduler, "CogVideoXDPMScheduler": CogVideoXDPMScheduler}
NOT_FOUND = {
    HFValidationError: "no such folder, and no name of the hub's form",
    LocalEntryNotFoundError: "no such folder, the hub cannot be reached, and nothing of it is in the cache",
}

# The transformer's config fields that tell one checkpoint's weights from another's.
IDENTITY = (
    "num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "patch_size_t",
    "use_rotary_positional_embeddings", "use_learned_positional_embeddings",
)  # fmt: skip


class BaseModel(NamedTuple):
    """A checkpoint's configs, read before any of its weights."""

    name: str  # as the user gave it
    transformer: dict
    vae: dict
    scheduler: CogVideoXDDIMScheduler | CogVideoXDPMScheduler
    hub: dict  # revision, cache_dir and variant: which files to download
    folder: Path | None  # with its weights, once they are there

    @property
    def variant(self) -> str | None:
        return self.hub["variant"]

    @property
    def identity(self) -> dict:
        return {field: self.transformer[field] for field in IDENTITY}

    @property
    def takes_image(self) -> bool:
        """Whether the latents of a first image stand beside those of the noisy video."""
        return self.transformer["in_channels"] == 2 * self.transformer["out_channels"]

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent, 8."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    @property
    def fixed_size(self) -> tuple[int, int, int] | None:
        """Frames, height and width of every clip, where learned positions allow no others."""
        config = self.transformer
        sides = (self.spatial_factor * config[f"sample_{side}"] for side in ("height", "width"))
        return (config["sample_frames"], *sides) if config["use_learned_positional_embeddings"] else None

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Frames, height and width (f, h, w) of a clip's latents, as they are cached."""
        return (num_frames - 1) // 4 + 1, height // self.spatial_factor, width // self.spatial_factor

    def num_tokens(self, f: int, h: int, w: int) -> int:
        """Text and video tokens that the transformer attends to, for latents of f frames of h x w.

        CogVideoX 1.5 patches two frames at a time, and pads them to an even number.
        """
        config = self.transformer
        frames = -(-f // (config["patch_size_t"] or 1))
        return config["max_text_seq_length"] + frames * (h // config["patch_size"]) * (w // config["patch_size"])

    def describe(self) -> str:
        config = self.transformer
        task = "image-to-video" if self.takes_image else "text-to-video"
        positions = "rotary" if config["use_rotary_positional_embeddings"] else "sin-cos"
        positions += " and learned" * config["use_learned_positional_embeddings"]
        return (
            f"CogVideoX {task}, {config['num_layers']} layers of {config['num_attention_heads']} heads, "
            f"{positions} positions"
        )

    def remarks(self, num_frames: int, fps: int) -> list[str]:
        """What works, but may not be what was meant."""
        remarks = []
        if num_frames % 8 != 1:
            remarks.append(f"--max_num_frames {num_frames} is not 8k + 1: the VAE gives back videos of another length")
        if self.transformer["patch_size_t"] and fps != 16:
            remarks.append(f"--fps {fps}: CogVideoX 1.5 was made for 16, at which cli_demo.py shows its videos")
        return remarks


# ---- configs ---------------------------------------------------------------------------------------------------------


def read_base_model(name: str, revision: str | None = None, variant: str | None = None, cache_dir=None) -> BaseModel:
    """The configs of a folder or of a hub repository.

    Raises:
        ValueError: it cannot be found, or is no complete CogVideoX checkpoint.
    """
    local = Path(name).expanduser()
    name = str(local.resolve()) if local.is_dir() else name
    rule = "--pretrained_model_name_or_path takes a folder, or a hub name such as THUDM/CogVideoX-2b"
    hub = {"revision": revision, "cache_dir": cache_dir}
    try:
        index = DiffusionPipeline.load_config(name, **hub)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: found no model_index.json there ({_why(error, local)}); {rule}") from error
    if not index.get("_class_name", "").startswith("CogVideoX"):
        raise ValueError(f"{name}: holds a {index.get('_class_name')}, not a CogVideoX pipeline; {rule}")
    try:
        return BaseModel(
            name=name,
            transformer=dict(empty_transformer(_config(CogVideoXTransformer3DModel, name, "transformer", hub)).config),
            vae=_config(AutoencoderKLCogVideoX, name, "vae", hub),
            scheduler=SCHEDULERS[index["scheduler"][1]].from_pretrained(name, subfolder="scheduler", **hub),
            hub=hub | {"variant": variant},
            folder=local if local.is_dir() else None,
        )
    except (OSError, KeyError) as error:
        raise ValueError(f"{name}: the checkpoint is not complete ({error}); download it again") from error


def _why(error: Exception, local: Path) -> str:
    """That no model_index.json was found. diffusers words what huggingface_hub raised, the context, for all alike."""
    if any((local / part / "config.json").is_file() for part in ("", "transformer")):
        return "a transformer alone: put it in place of transformer/ in a copy of the checkpoint it was made from"
    return NOT_FOUND.get(type(error.__context__)) or str(error).strip().splitlines()[0]


def _config(model_class, name: str, subfolder: str, hub: dict) -> dict:
    return model_class.load_config(name, subfolder=subfolder, **hub)


def read_text_encoder_config(base: BaseModel) -> dict:
    """T5's config, from the checkpoint's folder or the hub; its weights need not be there.

    Raises:
        ValueError: it is missing.
    """
    where = {option: base.hub[option] for option in ("revision", "cache_dir") if option in base.hub}
    name = base.folder or base.name
    try:
        return T5Config.from_pretrained(name, subfolder="text_encoder", **where).to_dict()
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{base.name}: the checkpoint is not complete ({reason}); download it again") from error


def empty_transformer(config: dict) -> CogVideoXTransformer3DModel:
    """The transformer without memory for its weights: its module names and its config with all defaults."""
    # diffusers 0.42.1 lists there which values were defaults, and takes the default whatever the config says now.
    config = {name: value for name, value in config.items() if name != "_use_default_values"}
    with torch.device("meta"):
        return CogVideoXTransformer3DModel.from_config(config)


def empty_vae(config: dict) -> AutoencoderKLCogVideoX:
    """The VAE without memory for its weights."""
    with torch.device("meta"):
        return AutoencoderKLCogVideoX.from_config(config)


def empty_text_encoder(config: dict) -> T5EncoderModel:
    """T5 without memory for its weights."""
    with torch.device("meta"):
        return T5EncoderModel(T5Config(**config))


def check_training(
    base: BaseModel, dtype: torch.dtype, num_frames: int, height: int, width: int, image_options: list[str]
) -> None:
    """Refuses what this checkpoint cannot be trained on.

    Args:
        image_options: those that were given, which text-to-video has no use for.
    """
    config, name = base.transformer, base.name
    channels = f"{config['in_channels']} input channels for {config['out_channels']} output channels"
    if not base.takes_image and config["in_channels"] != config["out_channels"]:
        raise ValueError(
            f"{name}: {channels}: neither text-to-video nor image-to-video, which are what can be trained; use another"
        )
    if image_options and not base.takes_image:
        raise ValueError(
            f"{', '.join(image_options)}: {name} is a text-to-video checkpoint ({channels}) and sees no image; leave "
            "the option out, or use an image-to-video one such as THUDM/CogVideoX-5b-I2V"
        )
    if base.fixed_size not in (None, (num_frames, height, width)):
        frames, *size = base.fixed_size
        raise ValueError(
            f"--max_num_frames {num_frames} --height {height} --width {width}: {name} has learned positions for "
            f"{frames} frames of {size[0]}x{size[1]} pixels alone; pass those"
        )
    if dtype == torch.float16 and base.takes_image:
        raise ValueError(
            f"{name}: image-to-video is made for bfloat16, and in float16 an image's encoding can overflow "
            "unseen; pass --mixed_precision bf16, or no for float32"
        )
    if not config["patch_size_t"]:
        return
    if dtype == torch.float16:
        raise ValueError(f"{name}: CogVideoX 1.5 gives NaN in float16; pass --mixed_precision bf16, or no for float32")
    most = [base.spatial_factor * config[f"sample_{side}"] for side in ("height", "width")]
    if height > most[0] or width > most[1]:
        raise ValueError(
            f"--height {height} --width {width}: the positions of {name} end at {most[0]}x{most[1]} pixels; "
            "pass at most that"
        )


# ---- weights ---------------------------------------------------------------------------------------------------------


def download_weights(base: BaseModel) -> BaseModel:
    """The checkpoint with its weights in a folder: downloaded, where it is a hub name.

    Raises:
        ValueError: a file is missing that would be missed later, or not at all.
    """
    if not base.folder:
        try:
            folder = DiffusionPipeline.download(base.name, **base.hub)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{base.name}: cannot be downloaded ({reason}); try again, what came stays") from error
        base = base._replace(folder=Path(folder))
    for part in ("transformer", "vae", "text_encoder"):
        weights = [file for file in (base.folder / part).glob("*") if file.suffix in (".safetensors", ".bin")]
        if not any((base.variant or "") in file.name and file.stat().st_size > 1024 for file in weights):
            kind = f"weights{f' of --variant {base.variant}' * bool(base.variant)}"
            raise ValueError(f"{base.folder}: no {kind} in {part}/; download the checkpoint again")
    _check_tokenizer(base.folder)
    return base


def _check_tokenizer(folder: Path) -> None:
    """Transformers 5 would make one without a vocabulary, and not say so."""
    if not any((folder / "tokenizer" / name).is_file() for name in ("spiece.model", "tokenizer.json")):
        raise ValueError(f"{folder}: no spiece.model in tokenizer/; download the checkpoint again")


def load_tokenizer(base: BaseModel):
    """That of the captions; of a hub name nothing else is downloaded.

    Raises:
        ValueError: it cannot be had.
    """
    folder, name = base.folder, base.name
    if not folder:
        where = {option: base.hub[option] for option in ("revision", "cache_dir")}
        try:
            folder = Path(snapshot_download(name, allow_patterns="tokenizer/*", **where))
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{name}: its tokenizer cannot be downloaded ({reason}); try again") from error
    _check_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")


def load_transformer(base: BaseModel, dtype: torch.dtype) -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel.from_pretrained(
        base.folder, subfolder="transformer", dtype=dtype, variant=base.variant
    )
