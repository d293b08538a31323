"""One published or local base model: its configs, what it allows, its weights.

What differs between base models is read from their configs, never from their names.
"""

import contextlib
import math
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
from huggingface_hub import constants, get_session, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx
from safetensors import safe_open
from transformers import AutoTokenizer, PretrainedConfig, T5Config, T5EncoderModel

SCHEDULERS = {"CogVideoXDDIMScheduler": CogVideoXDDIMScheduler, "CogVideoXDPMScheduler": CogVideoXDPMScheduler}
HUB_ERRORS = {
    HFValidationError: "a hub name has the form owner/name",
    LocalEntryNotFoundError: "the hub cannot be reached, and nothing of it is in the cache",
}


class Kind(NamedTuple):
    """A task, and what tells in a base model's files that it is made for it."""

    task: str
    pipelines: tuple[str, ...]  # that model_index.json may name
    inputs: int  # the transformer's input channels, as a multiple of its output channels, which are the VAE's


KINDS = (
    Kind("text-to-video",  ("CogVideoXPipeline", "CogVideoXVideoToVideoPipeline"), 1),  # the noisy video
    Kind("image-to-video", ("CogVideoXImageToVideoPipeline",),                     2),  # beside it the first image
)  # fmt: skip
# Counts in the configs of a base model on which it depends how long building it takes; published ones are far below.
MOST = {"num_layers": 1000, "layers_per_block": 100, "num_train_timesteps": 100_000}
FAR = 2  # times as many pixels, or as few, as a base model was made for
INSTEAD = "use a base model such as THUDM/CogVideoX-2b or THUDM/CogVideoX-5b-I2V"


class Published(NamedTuple):
    """A published base model and the clips that it was trained on."""

    name: str  # on the hub, below each of PUBLISHERS
    licence: str  # as its model card names it
    task: str
    version: str
    num_frames: int
    fps: int
    height: int
    width: int
    num_layers: int
    channels: int  # of a token in the transformer


PUBLISHERS = ("THUDM", "zai-org")  # the organisation was renamed; the hub knows both names
PUBLISHED = (
    Published("CogVideoX-2b",         "apache-2.0",        "text-to-video",  "1.0", 49,  8, 480,  720, 30, 1920),
    Published("CogVideoX-5b",         "cogvideox-license", "text-to-video",  "1.0", 49,  8, 480,  720, 42, 3072),
    Published("CogVideoX-5b-I2V",     "cogvideox-license", "image-to-video", "1.0", 49,  8, 480,  720, 42, 3072),
    Published("CogVideoX1.5-5B",      "cogvideox-license", "text-to-video",  "1.5", 81, 16, 768, 1360, 42, 3072),
    Published("CogVideoX1.5-5B-I2V",  "cogvideox-license", "image-to-video", "1.5", 81, 16, 768, 1360, 42, 3072),
)  # fmt: skip

# The transformer's config fields that tell the weights of one base model from those of another. Checkpoints and LoRA
# files record them: with a further field, older ones would be refused as another kind of CogVideoX.
IDENTITY = (
    "num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "patch_size_t",
    "use_rotary_positional_embeddings", "use_learned_positional_embeddings",
)  # fmt: skip


class BaseModel(NamedTuple):
    """The configs of a base model, read before any of its weights."""

    name: str  # as the user gave it
    transformer: dict
    vae: dict
    scheduler: CogVideoXDDIMScheduler | CogVideoXDPMScheduler
    hub: dict  # which files to download, and whether: revision, cache_dir, local_files_only, variant
    folder: Path | None  # with the weights; None until they are downloaded

    @property
    def variant(self) -> str | None:
        return self.hub["variant"]

    @property
    def identity(self) -> dict:
        return {field: self.transformer[field] for field in IDENTITY}

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the transformer's weights on disk."""
        file = next((self.folder / "transformer").glob("*.safetensors"), None)
        if not file:
            raise ValueError(f"{self.folder}: no .safetensors file in transformer/; download the base model again")
        with safe_open(file, framework="pt") as weights:
            return weights.get_tensor(next(iter(weights.keys()))).dtype

    @property
    def kind(self) -> Kind:
        config = self.transformer
        return next(kind for kind in KINDS if kind.inputs * config["out_channels"] == config["in_channels"])

    @property
    def published(self) -> Published:
        """The first published base model of the same task and version."""
        version = "1.5" if self.transformer["patch_size_t"] else "1.0"
        return next(row for row in PUBLISHED if (row.task, row.version) == (self.kind.task, version))

    @property
    def takes_image(self) -> bool:
        """Whether the transformer's input holds the latents of a first image beside those of the noisy video."""
        return self.kind.task == "image-to-video"

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent in height and in width, 8."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    @property
    def sample_size(self) -> tuple[int, int]:
        """Height and width in pixels that the transformer's config names."""
        return tuple(self.spatial_factor * self.transformer[f"sample_{side}"] for side in ("height", "width"))

    @property
    def fixed_size(self) -> tuple[int, int, int] | None:
        """Frames, height and width of every clip where learned positions allow no others; None elsewhere."""
        config = self.transformer
        return (config["sample_frames"], *self.sample_size) if config["use_learned_positional_embeddings"] else None

    @property
    def largest_size(self) -> tuple[int, int] | None:
        """Height and width at which the positions of CogVideoX 1.5 end; None elsewhere."""
        return self.sample_size if self.published.version == "1.5" else None

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Frames, height and width (f, h, w) of a clip's latents, as they are cached."""
        return (num_frames - 1) // 4 + 1, height // self.spatial_factor, width // self.spatial_factor

    def num_tokens(self, f: int, h: int, w: int) -> int:
        """Number of text and video tokens that the transformer attends to, for latents of f frames of h x w.

        CogVideoX 1.5 patches two frames at a time, and pads them to an even number.
        """
        config = self.transformer
        frames = -(-f // (config["patch_size_t"] or 1))
        return config["max_text_seq_length"] + frames * (h // config["patch_size"]) * (w // config["patch_size"])

    def describe(self) -> str:
        config = self.transformer
        positions = "rotary" if config["use_rotary_positional_embeddings"] else "sin-cos"
        if config["use_learned_positional_embeddings"]:
            positions += " and learned"
        return (
            f"CogVideoX {self.published.task}, {config['num_layers']} layers of {config['num_attention_heads']} heads, "
            f"{positions} positions"
        )

    def remarks(self, sizes: dict[str, tuple[int, int, int]], fps: int) -> list[str]:
        """Returns sentences on settings that work, but may not be what was meant.

        Args:
            sizes: frames, height and width of the clips, by the options that name them.
        """
        remarks = [
            f"{option}: {num_frames} frames are not 8k + 1, and the VAE gives back videos of another length"
            for option, (num_frames, _, _) in sizes.items()
            if num_frames % 8 != 1
        ]
        if self.published.version == "1.5" and fps != self.published.fps:
            trained = f"CogVideoX 1.5 was trained at {self.published.fps}"
            remarks.append(f"--fps {fps}: {trained}, at which cli_demo.py writes its videos")
        # 1.5-I2V allows sizes far beyond those that it was trained on, and a small model is in no table.
        usual = min(self.sample_size[0], self.published.height), min(self.sample_size[1], self.published.width)
        for option, (_, height, width) in sizes.items():
            if not 1 / FAR <= height * width / math.prod(usual) <= FAR:
                made = f"the base model was made for {usual[0]}x{usual[1]}, and sizes far from that give worse videos"
                remarks.append(f"{option}: {made}")
        return remarks


def published_as(name: str) -> Published | None:
    """Returns the published base model with this hub name, such as THUDM/CogVideoX-2b."""
    publisher, _, model = name.partition("/")
    return next((row for row in PUBLISHED if publisher in PUBLISHERS and row.name == model), None)


def published_like(num_layers: int, channels: int) -> list[str]:
    """Returns names of the published base models whose blocks have these sizes, and at least so many of them."""
    return [row.name for row in PUBLISHED if row.channels == channels and row.num_layers >= num_layers]


def read_base_model(
    name: str,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir=None,
    option: str = "--pretrained_model_name_or_path",
) -> BaseModel:
    """Reads the configs from a folder or a hub repository; raises ValueError if no complete CogVideoX is there.

    Args:
        option: that named the base model, for the message.
    """
    local = Path(name).expanduser()
    name = str(local.resolve()) if local.is_dir() else name
    rule = f"{option} takes a folder, or a hub name such as THUDM/CogVideoX-2b"
    hub = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local.is_dir() or not reaches_hub()}
    try:
        index = DiffusionPipeline.load_config(name, **hub)
        if not isinstance(index, dict):
            raise ValueError("model_index.json holds no JSON object")
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: found no model_index.json there ({_why_no_index(error, local)}); {rule}") from error
    kind = _kind_of(name, index.get("_class_name"))
    try:
        transformer = CogVideoXTransformer3DModel.load_config(name, subfolder="transformer", **hub)
        vae = AutoencoderKLCogVideoX.load_config(name, subfolder="vae", **hub)
        _check_class(name, "transformer", transformer, CogVideoXTransformer3DModel.__name__)
        _check_class(name, "vae", vae, AutoencoderKLCogVideoX.__name__)
        _check_counts(name, "transformer", transformer)
        _check_counts(name, "vae", vae)
        transformer = dict(empty_transformer(transformer).config)
        _check_channels(name, kind, transformer, vae)
        scheduler = _scheduler_class(name, index)
        noise_schedule = scheduler.load_config(name, subfolder="scheduler", **hub)
        _check_class(name, "scheduler", noise_schedule, *SCHEDULERS)
        _check_counts(name, "scheduler", noise_schedule)
        return BaseModel(
            name=name,
            transformer=transformer,
            vae=vae,
            scheduler=scheduler.from_config(noise_schedule),
            hub=hub | {"variant": variant},
            folder=local if local.is_dir() else None,
        )
    except OSError as error:
        raise ValueError(f"{name}: the base model is not complete ({error}); download it again") from error


def _kind_of(name: str, pipeline: str | None) -> Kind:
    """Returns the kind of base model whose model_index.json names this pipeline; refuses what is in none of KINDS."""
    kind = next((kind for kind in KINDS if pipeline in kind.pipelines), None)
    if not kind:
        fun = " (CogVideoX-Fun, which has other inputs)" if "Fun" in str(pipeline) else ""
        known = " or a ".join(known for kind in KINDS for known in kind.pipelines)
        raise ValueError(f"{name}: holds a {pipeline}{fun}, not a {known}; {INSTEAD}")
    return kind


def _check_class(name: str, part: str, config: dict, *wanted: str) -> None:
    found = config.get("_class_name")
    if found not in wanted:
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        raise ValueError(f"{name}: {part}/{file} is of a {found}, not of a {' or '.join(wanted)}; {INSTEAD}")


def _check_channels(name: str, kind: Kind, transformer: dict, vae: dict) -> None:
    """Refuses a transformer whose channels do not go with the pipeline of this kind, or with the VAE."""
    inputs, outputs, latents = transformer["in_channels"], transformer["out_channels"], vae["latent_channels"]
    if inputs != kind.inputs * outputs:
        raise ValueError(
            f"{name}: has a transformer of {inputs} input channels for {outputs} output channels, but model_index.json "
            f"names a {kind.task} pipeline, which takes {kind.inputs * outputs}: probably "
            f"{_probably(inputs, outputs)}; {INSTEAD}"
        )
    if latents != outputs:
        raise ValueError(
            f"{name}: has a VAE of {latents} latent channels, but the transformer has {outputs} output channels, "
            "which must be as many; take vae/ and transformer/ from the same base model"
        )


def _probably(inputs: int, outputs: int) -> str:
    """Returns what a transformer is whose channels do not go with its pipeline."""
    kinds = {
        outputs: "a text-to-video transformer with the model_index.json of another base model",
        2 * outputs: "CogVideoX-Fun Control, which sees a second video, or an image-to-video transformer with the "
        "model_index.json of another base model",
        2 * outputs + 1: "CogVideoX-Fun InP, which sees a masked video and its mask",  # one channel for the mask
    }
    return kinds.get(inputs, "a model for another task")


def _scheduler_class(name: str, index: dict) -> type:
    scheduler = index.get("scheduler", [None, None])[1]
    if scheduler not in SCHEDULERS:
        wrong = f"the scheduler in model_index.json is {scheduler}, not {' or '.join(SCHEDULERS)}"
        raise ValueError(f"{name}: {wrong}; take model_index.json and scheduler/ from the published model")
    return SCHEDULERS[scheduler]


def reaches_hub() -> bool:
    """Whether the hub answers one request; False where HF_HUB_OFFLINE is set.

    huggingface_hub 2.4 asks six times for a file that is not in the cache, which takes 23 seconds without a network.
    """
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except (httpx.TransportError, OfflineModeIsEnabled):
        return False
    return True


def why_not_loaded(error: Exception) -> str:
    """Returns in one line why a library could not load something.

    diffusers has one message for all that huggingface_hub raises, which stays the context of its own error.
    """
    known = HUB_ERRORS.get(type(error.__context__)) or HUB_ERRORS.get(type(error))
    return known or str(error).strip().split("\n")[0]


def _why_no_index(error: Exception, local: Path) -> str:
    if any((local / part / "config.json").is_file() for part in ("", "transformer")):
        return "only a transformer: put it in place of transformer/ in a copy of the base model that it was made from"
    return why_not_loaded(error) if local.exists() else f"no such folder; {why_not_loaded(error)}"


def read_text_encoder_config(base: BaseModel) -> dict:
    """Reads T5's config, for which no weights need be there; raises ValueError if it is missing or another model's."""
    where = {"subfolder": "text_encoder", **_where(base)}
    try:
        found = PretrainedConfig.get_config_dict(base.folder or base.name, **where)[0].get("model_type")
        config = T5Config.from_pretrained(base.folder or base.name, **where)
    except OSError as error:
        reason = why_not_loaded(error)
        raise ValueError(f"{base.name}: the base model is not complete ({reason}); download it again") from error
    if not found:
        raise ValueError(f"{base.name}: the base model is not complete (no config in text_encoder/); download it again")
    if found != (wanted := T5Config.model_type):
        raise ValueError(f"{base.name}: text_encoder/config.json is of a {found}, not of a {wanted}; {INSTEAD}")
    config = config.to_dict()
    _check_counts(base.name, "text_encoder", config)
    return config


def _where(base: BaseModel) -> dict:
    """Keyword arguments of functions that read from the hub and know no `variant`."""
    return {option: value for option, value in base.hub.items() if option != "variant"}


def _check_counts(name: str, part: str, config: dict) -> None:
    """Refuses a config with which building the part would take hours, or the memory of the machine."""
    for field, most in MOST.items():
        if isinstance(count := config.get(field), int) and count > most:
            raise ValueError(
                f"{name}: {part}/ has {field} {count:,} in its config, and no base model has more than {most:,}; take "
                "that folder from the published model"
            )


@contextlib.contextmanager
def _buildable(part: str):
    """Turns what the libraries raise for values that fit no model into a message."""
    try:
        yield
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {why_not_loaded(error)}"
        raise ValueError(
            f"{part} of the base model: its config describes no model that can be built ({reason}); take that folder "
            "from the published model"
        ) from error


def empty_transformer(config: dict) -> CogVideoXTransformer3DModel:
    """Builds the transformer on the meta device, without memory for its weights; its config has all defaults."""
    # diffusers 0.42.1 lists there which values were defaults, and takes the default whatever the config says now.
    config = {name: value for name, value in config.items() if name != "_use_default_values"}
    with torch.device("meta"), _buildable("transformer/"):
        return CogVideoXTransformer3DModel.from_config(config)


def empty_vae(config: dict) -> AutoencoderKLCogVideoX:
    with torch.device("meta"), _buildable("vae/"):
        return AutoencoderKLCogVideoX.from_config(config)


def empty_text_encoder(config: dict) -> T5EncoderModel:
    with torch.device("meta"), _buildable("text_encoder/"):
        return T5EncoderModel(T5Config(**config))


def check_training(
    base: BaseModel, dtype: torch.dtype, sizes: dict[str, tuple[int, int, int]], image_options: list[str]
) -> None:
    """Raises ValueError for what this base model cannot be trained on.

    Args:
        sizes: frames, height and width of the clips, by the options that name them.
        image_options: the options given that only image-to-video has a use for.
    """
    config, name = base.transformer, base.name
    channels = f"{config['in_channels']} input channels for {config['out_channels']} output channels"
    if image_options and not base.takes_image:
        raise ValueError(
            f"{', '.join(image_options)}: {name} is a text-to-video model ({channels}) and sees no image; leave "
            "the option out, or use an image-to-video model such as THUDM/CogVideoX-5b-I2V"
        )
    for option, size in sizes.items():
        if base.fixed_size not in (None, tuple(size)):
            fixed_frames, fixed_height, fixed_width = base.fixed_size
            raise ValueError(
                f"{option}: {name} has learned positions for {fixed_frames} frames of {fixed_height}x{fixed_width} "
                "pixels only; pass those"
            )
    if dtype == torch.float16 and base.takes_image:
        raise ValueError(
            f"{name}: image-to-video is made for bfloat16, and in float16 an image's encoding can overflow "
            "unseen; pass --mixed_precision bf16, or no for float32"
        )
    if base.published.version == "1.5" and dtype == torch.float16:
        raise ValueError(f"{name}: CogVideoX 1.5 gives NaN in float16; pass --mixed_precision bf16, or no for float32")
    for option, (_, height, width) in sizes.items() if base.largest_size else ():
        most_height, most_width = base.largest_size
        if height > most_height or width > most_width:
            raise ValueError(
                f"{option}: the positions of {name} end at {most_height}x{most_width} pixels; pass at most that"
            )


def download_weights(base: BaseModel) -> BaseModel:
    """Returns the base model with the folder of its weights, downloaded where it is a hub name."""
    if not base.folder:
        try:
            folder = DiffusionPipeline.download(base.name, **base.hub)
        except (OSError, ValueError) as error:
            reason = why_not_loaded(error)
            raise ValueError(f"{base.name}: cannot be downloaded ({reason}); try again, what came stays") from error
        base = base._replace(folder=Path(folder))
    return base


def _check_tokenizer(folder: Path) -> None:
    # Transformers 5 builds a tokenizer without a vocabulary where there is none, and does not say so.
    if not any((folder / "tokenizer" / name).is_file() for name in ("spiece.model", "tokenizer.json")):
        raise ValueError(f"{folder}: no spiece.model in tokenizer/; download the base model again")


def load_tokenizer(base: BaseModel):
    """Loads T5's tokenizer and downloads nothing else; raises ValueError if it fails or is of no use."""
    folder = base.folder
    if not folder:
        try:
            folder = Path(snapshot_download(base.name, allow_patterns="tokenizer/*", **_where(base)))
        except (OSError, ValueError) as error:
            reason = why_not_loaded(error)
            raise ValueError(f"{base.name}: its tokenizer cannot be downloaded ({reason}); try again") from error
    _check_tokenizer(folder)
    with _buildable(str(folder / "tokenizer")):
        tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")
        for options in ({}, {"padding": "max_length", "max_length": 16, "truncation": True}):
            tokenizer("a caption", **options)  # reads what loading does not
    return tokenizer


def load_transformer(base: BaseModel, dtype: torch.dtype) -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel.from_pretrained(
        base.folder, subfolder="transformer", dtype=dtype, variant=base.variant
    )
