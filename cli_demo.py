"""Makes a video from one prompt, with or without a LoRA or a fine-tuned transformer.

    python cli_demo.py --prompt "Mickey waves from a boat" --lora_path cogvideox-lora-single-gpu --output_path boat.mp4

Size, frames, fps and scheduler are the checkpoint's own unless an option says otherwise. What is wrong with options,
checkpoint, transformer, LoRA or input is told before any weights are loaded.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import imageio
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CogVideoXVideoToVideoPipeline,
)
from diffusers.utils import export_to_video, load_image
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open

from files import parse_options

PIPELINES = {"t2v": CogVideoXPipeline, "i2v": CogVideoXImageToVideoPipeline, "v2v": CogVideoXVideoToVideoPipeline}
LORA_FILE = "pytorch_lora_weights.safetensors"
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of peft's init_lora_weights
NOT_FOUND = {
    HFValidationError: "a hub name has the form owner/name",
    LocalEntryNotFoundError: "the hub cannot be reached, and nothing of it is in the cache",
}
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
TELLS_CHECKPOINTS_APART = (
    "num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "patch_size_t",
    "use_rotary_positional_embeddings", "use_learned_positional_embeddings", "ofs_embed_dim",
)  # fmt: skip


class Transformer(NamedTuple):
    """A fully fine-tuned transformer, for the place of the checkpoint's own; the weights stay on disk."""

    path: str  # a folder, or a hub id
    subfolder: str | None  # of the hub's repository
    empty: CogVideoXTransformer3DModel  # without weights, on the meta device
    base_model: str | None


class Lora(NamedTuple):
    """What the header of a LoRA file says; the weights stay on disk."""

    file: Path
    shapes: dict  # {name of a weight: its shape}
    config: LoraConfig | None  # as trained; None where not recorded
    trained_on: dict  # the transformer config fields that tell checkpoints apart; empty where not recorded
    base_model: str | None

    @property
    def is_dora(self):
        return any(key.endswith(".lora_magnitude_vector") for key in self.shapes)


class Plan(NamedTuple):
    """What is to be made and with what, checked, before any weights are loaded."""

    model_path: str
    transformer: Transformer | None  # None: the checkpoint's own
    lora: Lora | None
    generate_type: str
    dtype: torch.dtype
    fps: int
    inputs: dict  # of the pipeline: height, width, and num_frames, image or video


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 or more")
    return int(text)


def parse_args(argv=None):
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    path, switch = os.path.expanduser, argparse.BooleanOptionalAction
    dtypes, offloads = ["float32", "float16", "bfloat16"], ["none", "model", "sequential"]

    models = parser.add_argument_group("models").add_argument
    models("--model_path", type=path, metavar="PATH", help="checkpoint, folder or hub id; default: what was trained")
    models("--transformer_path", type=path, metavar="PATH", help="fine-tuned (sft): run folder, checkpoint-N or hub id")
    models("--lora_path", type=path, metavar="PATH", help="run folder, checkpoint-N, .safetensors file or hub id")
    models("--lora_scale", type=float, default=1.0, metavar="X", help="times the trained strength; 1.0 = as trained")

    video = parser.add_argument_group("the video").add_argument
    video("--prompt", required=True, help="what the video shows")
    video("--generate_type", choices=PIPELINES, help="from text, image or video; default: t2v or i2v, by checkpoint")
    video("--image_or_video_path", type=path, metavar="FILE", help="i2v: the first image; v2v: the video to change")
    video("--output_path", type=path, default="output.mp4", metavar="FILE", help="the mp4; replaced if there is one")
    video("--num_frames", type=positive, metavar="N", help="4k + 1; default: the checkpoint's")
    video("--width", type=positive, metavar="PIXELS", help="a multiple of 16; default: the checkpoint's")
    video("--height", type=positive, metavar="PIXELS", help="a multiple of 16; default: the checkpoint's")
    video("--fps", type=positive, metavar="N", help="frames per second; default: 16 for CogVideoX 1.5, else 8")
    video("--num_videos_per_prompt", type=positive, default=1, metavar="N", help="more: out.mp4, out-1.mp4, ...")

    sampling = parser.add_argument_group("sampling").add_argument
    sampling("--num_inference_steps", type=positive, default=50, metavar="N", help="denoising steps")
    sampling("--guidance_scale", type=float, default=6.0, metavar="X", help="weight of the prompt; 1.0 or less: off")
    sampling("--seed", type=int, default=42, metavar="N", help="of the first video; each further one adds 1")

    machine = parser.add_argument_group("machine").add_argument
    machine("--dtype", choices=dtypes, help="of all networks; default: bfloat16 on a GPU, float32 on a CPU")
    machine("--cpu_offload", choices=offloads, default="none", help="GPU holds: all, one network, or one layer")
    machine("--enable_tiling", action=switch, default=True, help="decode in tiles: less memory, a little slower")
    machine("--enable_slicing", action=switch, default=False, help="decode a batch one by one; here it holds one video")
    args = parse_options(parser, argv)
    check_args(parser, args)
    return args


def check_args(parser, args):
    """Ends with a message where options do not go together."""
    kind, source, output = args.generate_type, args.image_or_video_path, Path(args.output_path)
    if kind == "t2v" and source:
        parser.error(f"--image_or_video_path {source}: t2v uses none; add --generate_type i2v or v2v")
    if kind in ("i2v", "v2v") and not source:
        parser.error(f"--generate_type {kind}: needs a file to start from; add --image_or_video_path")
    if kind == "v2v" and args.num_inference_steps < 2:
        parser.error(f"--num_inference_steps {args.num_inference_steps}: v2v runs 80 % of them; give 2 or more")
    if output.suffix != ".mp4" or output.is_dir():
        parser.error(f"--output_path {output}: must name an .mp4 file, such as {output / 'video.mp4'}")
    if args.lora_scale != 1 and not args.lora_path:
        parser.error(f"--lora_scale {args.lora_scale:g}: there is no LoRA to scale; add --lora_path")
    if args.cpu_offload != "none" and not torch.cuda.is_available():
        parser.error(f"--cpu_offload {args.cpu_offload}: no GPU here, all is on the CPU already; leave it out")


def first_line(error):
    """Of its message. diffusers words what huggingface_hub raised, which stays as the context, for all alike."""
    return NOT_FOUND.get(type(error.__context__)) or NOT_FOUND.get(type(error)) or str(error).strip().split("\n")[0]


def newest_below(folder, name):
    """A way out that names the newest folder in `folder` with `name` in it; None without one."""
    found = sorted(folder.glob(f"[!.]*/{name}"), key=os.path.getmtime)
    return f"the newest below it is {folder / found[-1].relative_to(folder).parts[0]}" if found else None


def other_option(folder):
    """A way out that names the option which `folder` is for; None where it is for none."""
    if (folder / "model_index.json").is_file():
        return "it is a checkpoint: give it as --model_path"
    if (folder / LORA_FILE).is_file():
        return "it is a LoRA: give it as --lora_path"
    if (folder / "transformer" / "config.json").is_file():
        return "it is a fine-tuned transformer: give it as --transformer_path"
    return None


def find_transformer(path):
    """The transformer's folder: given itself, or what has it."""
    for folder in (path / "transformer", path):
        if (folder / "config.json").is_file():
            return folder
    if path.is_file():
        raise FileNotFoundError(f"--transformer_path {path}: must be a folder; give the one that this file lies in")
    way_out = newest_below(path, "transformer/config.json") or other_option(path) or "give the folder that has it"
    raise FileNotFoundError(f"--transformer_path {path}: no transformer/ in this folder; {way_out}")


def load_transformer_config(path):
    """Folder or hub id of the transformer, the subfolder there, and the config."""
    folder = Path(path)
    places = [(str(find_transformer(folder)), None)] if folder.exists() else [(path, "transformer"), (path, None)]
    for place, subfolder in places:
        try:
            return place, subfolder, CogVideoXTransformer3DModel.load_config(place, subfolder=subfolder)
        except (OSError, ValueError) as error:
            reason = error
    message = f"no such folder, nor a transformer on the hub; check it ({first_line(reason)})"
    raise FileNotFoundError(f"--transformer_path {path}: {message}") from reason


def read_transformer(path):
    """A `Transformer`, read from its config and, in a folder, the headers of its weights alone."""
    place, subfolder, config = load_transformer_config(path)
    kind, wanted = config.get("_class_name", "no model of diffusers"), CogVideoXTransformer3DModel.__name__
    if kind != wanted:
        raise ValueError(f"--transformer_path {place}: its config.json is of {kind}; give the folder of a {wanted}")
    tuned = Transformer(place, subfolder, empty_transformer(config), config.get("_name_or_path"))
    if Path(place).is_dir():
        check_weights(tuned)
    return tuned


def read_shapes(file, option):
    """{name of a weight: its shape}, and the metadata, from the header of a .safetensors file."""
    try:
        with safe_open(file, framework="pt") as weights:
            names = weights.keys()
            return {name: tuple(weights.get_slice(name).get_shape()) for name in names}, weights.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{option} {file}: cannot be read as .safetensors; copy it again ({error})") from error


def check_weights(tuned):
    """Raises where the folder's weights, in one file or in several with an index, are not those of its config."""
    folder, files = Path(tuned.path), [WEIGHTS_FILE]
    if (folder / f"{WEIGHTS_FILE}.index.json").is_file():
        index = json.loads((folder / f"{WEIGHTS_FILE}.index.json").read_text(encoding="utf-8"))
        files = sorted(set(index["weight_map"].values()))
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(f"--transformer_path {folder}: no {', '.join(missing)} in it; copy it again")
    shapes = {}
    for file in files:
        shapes |= read_shapes(folder / file, "--transformer_path")[0]
    expected = {name: tuple(weight.shape) for name, weight in tuned.empty.state_dict().items()}
    if wrong := sorted(shapes.items() ^ expected.items()):  # of which diffusers 0.42.1 would only warn
        name = wrong[0][0]
        rule = f"{name} is {shapes.get(name, 'missing')}, by its config.json {expected.get(name, 'not there')}"
        raise ValueError(f"--transformer_path {folder}: {rule}; give what save_pretrained wrote, as a whole")


def check_transformer(tuned, config, model_path):
    """Raises ValueError where the transformer is of another variant than the checkpoint that is `config`'s."""
    own = tuned.empty.config
    others = [name for name in TELLS_CHECKPOINTS_APART if own[name] != config[name]]
    if others:
        base = f" ({tuned.base_model})" if tuned.base_model else ""
        wrong = "; ".join(f"{name} {own[name]}, there {config[name]}" for name in others)
        raise ValueError(
            f"--transformer_path {tuned.path}: of another kind than --model_path {model_path}: {wrong}. "
            f"Give the checkpoint that it was fine-tuned from{base}"
        )


def find_lora(path):
    """The LoRA's file: given itself, in its folder, or fetched from the hub."""
    path = Path(path)
    if path.is_dir() and not (path / LORA_FILE).is_file():
        way_out = newest_below(path, LORA_FILE) or other_option(path) or "give the folder or file that has it"
        raise FileNotFoundError(f"--lora_path {path}: no {LORA_FILE} in this folder; {way_out}")
    if path.exists():
        return path / LORA_FILE if path.is_dir() else path
    try:
        return Path(hf_hub_download(str(path), LORA_FILE))
    except (OSError, ValueError) as error:
        message = f"--lora_path {path}: no such file or folder, nor a LoRA on the hub; check it ({first_line(error)})"
        raise FileNotFoundError(message) from error


def read_lora(path):
    """A `Lora`, read from the header of its file alone."""
    file = find_lora(path)
    shapes, header = read_shapes(file, "--lora_path")
    foreign = next((key for key in shapes if not key.startswith("transformer.") or ".lora" not in key), None)
    if foreign or not shapes:
        rule = "a LoRA in diffusers' format holds transformer.<layer>.lora_A.weight and the like; convert it first"
        raise ValueError(f"--lora_path {file}: holds {foreign or 'nothing'}; {rule}")
    settings = json.loads(header.get("lora_adapter_metadata", "{}"))
    settings = {key.removeprefix("transformer."): value for key, value in settings.items()}
    start = str(settings.get("init_lora_weights"))
    if start.startswith(CHANGES_THE_BASE):
        rule = f"init_lora_weights {start} changed the checkpoint's own weights, which are not in it"
        raise ValueError(f"--lora_path {file}: {rule}; convert it: peft's path_initial_model_for_weight_conversion")
    try:
        config = LoraConfig(**settings)
    except TypeError as error:
        raise ValueError(f"--lora_path {file}: this peft does not know its settings; update peft ({error})") from error
    trained_on = json.loads(header.get("cogvideox_transformer", "{}"))
    return Lora(file, shapes, config if settings else None, trained_on, header.get("base_model"))


def fits(part, shape, size):
    """Whether `part` of a LoRA, such as _A.weight, can have this shape beside a weight of `size` [out, in, ...]."""
    if part.startswith("_magnitude_vector"):  # of DoRA: [out], and [1, out, 1, 1] of a convolution
        return math.prod(shape) == size[0]
    axes = slice(1, None) if part.startswith(("_A", ".down", "_down")) else slice(1)  # in or out
    return size[axes] == shape[axes]


def check_lora(lora, transformer, checkpoint):
    """Raises ValueError where the LoRA was not trained on a checkpoint such as `transformer`, named `checkpoint`."""
    here = transformer.config
    wrong = [
        f"{name} {value}, here {here.get(name)}" for name, value in lora.trained_on.items() if value != here.get(name)
    ]
    sizes = {name.removesuffix(".weight"): tuple(weight.shape) for name, weight in transformer.named_parameters()}
    for key, shape in lora.shapes.items():
        layer, _, part = key.removeprefix("transformer.").partition(".lora")
        size = sizes.get(layer)
        if size is None or not fits(part, shape, size):
            wrong.append(f"{key} {list(shape)}, here {'no such layer' if size is None else list(size)}")
    if lora.config and not lora.config.rank_pattern:
        ranks = {shape[0] for key, shape in lora.shapes.items() if key.endswith("lora_A.weight")}
        wrong += [f"recorded as rank {lora.config.r}, its weights have {rank}" for rank in ranks - {lora.config.r}]
    if wrong:
        base = f" ({lora.base_model})" if lora.base_model else ""
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"--lora_path {lora.file}: trained on another checkpoint{base} than {checkpoint}: "
            f"{'; '.join(wrong[:3])}{more}. Give the one that it was trained on"
        )


def empty_transformer(config):
    """Without weights, on the meta device."""
    with torch.device("meta"):
        return CogVideoXTransformer3DModel.from_config(config)


def read_checkpoint(path, parts=("transformer", "vae", "text_encoder")):
    """The empty transformer, and how many pixels a latent spans on each side; `parts` must have their weights."""
    folder, known = Path(path), [pipeline.__name__ for pipeline in PIPELINES.values()]
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        way_out = other_option(folder) or "give its top folder"
        raise FileNotFoundError(f"--model_path {path}: no model_index.json, so not a diffusers checkpoint; {way_out}")
    try:
        pipeline_name = CogVideoXPipeline.load_config(path)["_class_name"]
        if pipeline_name in known:
            config = CogVideoXTransformer3DModel.load_config(path, subfolder="transformer")
            vae_config = AutoencoderKLCogVideoX.load_config(path, subfolder="vae")
    except (OSError, ValueError) as error:
        message = f"--model_path {path}: no whole checkpoint, as a folder or on the hub; check it ({first_line(error)})"
        raise FileNotFoundError(message) from error
    if pipeline_name not in known:
        raise ValueError(f"--model_path {path}: is a {pipeline_name}; give a CogVideoX, such as THUDM/CogVideoX-2b")
    for part in parts:
        if folder.is_dir() and not any(file.suffix in (".safetensors", ".bin") for file in (folder / part).glob("*")):
            raise FileNotFoundError(f"--model_path {path}: no weights in {part}/; download it again")
    return empty_transformer(config), 2 ** (len(vae_config["block_out_channels"]) - 1)


def choose_generate_type(args, config, checkpoint):
    """t2v, i2v or v2v; what the checkpoint, so named in messages, takes where not asked for."""
    kind, source, takes_image = args.generate_type, args.image_or_video_path, config.in_channels != config.out_channels
    if kind and takes_image != (kind == "i2v"):
        made_for, way_out = ("an image", "i2v") if takes_image else ("text alone", "t2v or v2v")
        raise ValueError(
            f"--generate_type {kind}: {checkpoint} is made to start from {made_for} (channels in "
            f"{config.in_channels}, out {config.out_channels}); use {way_out}, or another checkpoint"
        )
    if takes_image and not source:
        raise ValueError(f"--image_or_video_path: not given, and {checkpoint} starts from an image; add it")
    if not (kind or takes_image) and source:
        way_out = "add --generate_type v2v to change a video, or leave it out"
        raise ValueError(f"--image_or_video_path {source}: {checkpoint} starts from text alone; {way_out}")
    return kind or ("i2v" if takes_image else "t2v")


def choose_size(args, config, vae_factor):
    """Height and width in pixels; the checkpoint's where not asked for."""
    most = vae_factor * config.sample_height, vae_factor * config.sample_width
    # 1.5 was published with 300 x 300 latents: how far its positions go. It was trained at 768 x 1360 pixels.
    own = (768, 1360) if config.patch_size_t and most == (2400, 2400) else most
    size = args.height or own[0], args.width or own[1]
    multiple = vae_factor * config.patch_size
    for axis, flag in enumerate(("--height", "--width")):
        if size[axis] % multiple:
            nearest = multiple * max(1, round(size[axis] / multiple))
            raise ValueError(f"{flag} {size[axis]}: must be a multiple of {multiple}; nearest is {nearest}")
        if config.use_learned_positional_embeddings and size[axis] != own[axis]:
            raise ValueError(f"{flag} {size[axis]}: this checkpoint makes {own[axis]} only; leave it out")
        if config.patch_size_t and size[axis] > most[axis]:
            raise ValueError(f"{flag} {size[axis]}: this checkpoint's positions end at {most[axis]}; give at most that")
    return size


def choose_frames(args, kind, config):
    """Number of frames; the checkpoint's where not asked for."""
    ratio, own = config.temporal_compression_ratio, config.sample_frames
    # diffusers 0.42.1 pads the latent frames of 1.5 to its patches in time for text and image, not for video.
    step = ratio * config.patch_size_t if config.patch_size_t and kind == "v2v" else ratio
    first = step - ratio + 1
    frames = args.num_frames or own - (own - first) % step
    if (frames - first) % step:
        nearest = first + step * max(0, round((frames - first) / step))
        raise ValueError(f"--num_frames {frames}: must be {step}k + {first}; nearest is {nearest}")
    if config.use_learned_positional_embeddings and frames != own:
        raise ValueError(f"--num_frames {frames}: this checkpoint makes {own} only; leave it out")
    latent_frames = (frames - 1) // ratio + 1
    if latent_frames % 2 == 0:
        print(f"--num_frames {frames}: the VAE gives {ratio * latent_frames} for it; only 8k + 1 come out as asked")
    return frames


def read_video(path, num_frames, fps):
    """Frames at 0, 1/fps, 2/fps, ... seconds of the video."""
    frames = []
    with imageio.get_reader(path, format="ffmpeg") as reader:
        rate = reader.get_meta_data()["fps"]
        wanted = [round(i * rate / fps) for i in range(num_frames)]
        for position, frame in enumerate(reader):
            frames += [Image.fromarray(frame)] * wanted.count(position)
            if len(frames) == num_frames:
                return frames
    way_out = "give a longer video, a smaller --num_frames or a higher --fps"
    raise ValueError(f"--image_or_video_path {path}: {len(frames)} frames at {fps} fps, not {num_frames}; {way_out}")


def read_source(path, kind, num_frames, fps, width_height):
    """Keyword arguments of the pipeline: num_frames, or what to start from, resized, then cropped."""
    if kind == "t2v":
        return {"num_frames": num_frames}
    if not Path(path).is_file():
        raise FileNotFoundError(f"--image_or_video_path {path}: no such file; check the path")
    try:
        if kind == "i2v":
            return {"num_frames": num_frames, "image": ImageOps.fit(load_image(path), width_height)}
        return {"video": [ImageOps.fit(frame, width_height) for frame in read_video(path, num_frames, fps)]}
    except (OSError, RuntimeError) as error:
        wanted = "an image for i2v" if kind == "i2v" else "a video for v2v"
        raise ValueError(f"--image_or_video_path {path}: not readable; give {wanted} ({first_line(error)})") from error


def choose_model_path(args, tuned, lora):
    """The checkpoint; what the transformer, or else the LoRA, was trained on where not given."""
    if args.model_path:
        return args.model_path
    trained = {"the transformer was fine-tuned from": tuned, "the LoRA was trained on": lora}
    for how, part in trained.items():
        if part and part.base_model:
            print(f"--model_path: not given; {part.base_model}, which {how}")
            return os.path.expanduser(part.base_model)
    silent = " and ".join(option for option in (args.transformer_path, args.lora_path) if option)
    reason = f"{silent} does not say what it was trained on" if silent else "there is no LoRA or transformer to tell it"
    raise ValueError(f"--model_path: not given, and {reason}; give a checkpoint, such as THUDM/CogVideoX-2b")


def make_plan(args):
    """Reads and checks all that is not weights."""
    tuned = read_transformer(args.transformer_path) if args.transformer_path else None
    lora = read_lora(args.lora_path) if args.lora_path else None
    model_path = choose_model_path(args, tuned, lora)
    checkpoint = f"--model_path {model_path}"
    if tuned:
        own, vae_factor = read_checkpoint(model_path, parts=("vae", "text_encoder"))
        check_transformer(tuned, own.config, model_path)
        transformer, checkpoint = tuned.empty, f"--transformer_path {tuned.path}"
    else:
        transformer, vae_factor = read_checkpoint(model_path)
    if lora:
        check_lora(lora, transformer, checkpoint)
    if lora and lora.is_dora and args.cpu_offload == "sequential":
        # peft 0.21.2 reads a layer's own weight from outside of it, where accelerate has none on the GPU.
        raise ValueError("--cpu_offload sequential: takes layers apart that a DoRA needs whole; give it as model")
    config = transformer.config
    kind = choose_generate_type(args, config, checkpoint)
    dtype = args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    if dtype == "float16" and config.patch_size_t:
        raise ValueError("--dtype float16: gives NaN with CogVideoX 1.5; use bfloat16 or float32")
    (height, width), num_frames = choose_size(args, config, vae_factor), choose_frames(args, kind, config)
    fps = args.fps or (16 if config.patch_size_t else 8)
    source = read_source(args.image_or_video_path, kind, num_frames, fps, (width, height))
    folder = Path(args.output_path).parent
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"--output_path {args.output_path}: {folder} cannot be written to; name another folder")
    names = f"{model_path} with {tuned.path}" if tuned else model_path
    print(f"{names}: {num_frames} frames of {width}x{height} at {fps} fps in {dtype}")
    inputs = {"height": height, "width": width, **source}
    return Plan(model_path, tuned, lora, kind, getattr(torch, dtype), fps, inputs)


def load_pipeline(plan, args):
    """The pipeline with its transformer and LoRA, on its device."""
    given = {}
    if plan.transformer:  # the checkpoint's own is then neither loaded nor, from the hub, downloaded
        path, subfolder, *_ = plan.transformer
        given["transformer"] = CogVideoXTransformer3DModel.from_pretrained(path, subfolder=subfolder, dtype=plan.dtype)
    pipe = PIPELINES[plan.generate_type].from_pretrained(plan.model_path, dtype=plan.dtype, **given)
    # Zero terminal SNR: only trailing steps begin where there is nothing but noise. The published configs say the same.
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="trailing")
    if plan.lora:
        apply_lora(pipe, plan.lora, args.lora_scale)
    if args.enable_tiling:
        # The tile of the published VAEs. diffusers 0.42.1 takes half the size in the VAE's config, and where that is no
        # multiple of 48 x 40 its stitched video is larger than asked for.
        pipe.vae.enable_tiling(tile_sample_min_height=240, tile_sample_min_width=360)
    if args.enable_slicing:
        pipe.vae.enable_slicing()
    if args.cpu_offload == "model":
        pipe.enable_model_cpu_offload()
    elif args.cpu_offload == "sequential":
        pipe.enable_sequential_cpu_offload()
    else:
        pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    return pipe


def apply_lora(pipe, lora, lora_scale):
    """Loads the LoRA at `lora_scale` times its trained strength, and tells what its layers then apply."""
    pipe.load_lora_weights(str(lora.file.parent), weight_name=lora.file.name, adapter_name="lora")
    pipe.set_adapters("lora", lora_scale)  # times alpha/rank, which diffusers has from the file
    pipe.transformer.eval()  # diffusers 0.42.1 leaves the LoRA's layers training: with a lora_dropout, it is on
    trained = "no strength recorded: taken as 1"
    if lora.config:
        root, rank, alpha = lora.config.use_rslora, lora.config.r, lora.config.lora_alpha
        strength = alpha / (math.sqrt(rank) if root else rank)
        trained = f"trained strength alpha/{'sqrt(rank)' if root else 'rank'} = {strength:g}"
    layers = [module for module in pipe.transformer.modules() if isinstance(module, BaseTunerLayer)]
    ranks, applied = {layer.r["lora"] for layer in layers}, {layer.scaling["lora"] for layer in layers}
    ranks, applied = ("/".join(f"{value:g}" for value in sorted(values)) for values in (ranks, applied))
    kept = "; the magnitudes of its DoRA as trained" if lora.is_dora else ""  # peft 0.21.2 scales the directions alone
    print(f"LoRA {lora.file}: rank {ranks}, {trained}, --lora_scale {lora_scale:g} -> applied at {applied}{kept}")


def publish(frames, path, fps):
    """Writes the mp4 under another name in the same folder, then renames it: complete or absent."""
    unfinished = path.with_name(f".{path.stem}-{os.getpid()}.mp4")
    try:
        export_to_video(frames, str(unfinished), fps=fps)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def main(args):
    try:
        plan = make_plan(args)
    except (ValueError, OSError) as error:
        print(f"cli_demo.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    pipe = load_pipeline(plan, args)
    for i in range(args.num_videos_per_prompt):  # diffusers 0.42.1 sets its own num_videos_per_prompt back to 1
        path = Path(args.output_path)
        path = path.with_stem(f"{path.stem}-{i}") if i else path
        frames = pipe(
            prompt=args.prompt,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=torch.Generator().manual_seed(args.seed + i),  # on the CPU: same noise on every device
            max_sequence_length=pipe.transformer.config.max_text_seq_length,
            **plan.inputs,
        ).frames[0]
        publish(frames, path, plan.fps)
        print(f"{path}: {len(frames)} frames, seed {args.seed + i}")


if __name__ == "__main__":
    main(parse_args())
