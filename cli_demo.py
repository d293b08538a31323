"""Makes a video from one prompt, with or without a LoRA or a fine-tuned transformer.

    python cli_demo.py --prompt "Mickey waves from a boat" --lora_path cogvideox-lora-single-gpu --output_path boat.mp4

Several LoRAs apply together, each at its scale: --lora_path style subject --lora_scale 0.8 0.5.
Size, frames, fps and scheduler are the base model's unless an option says otherwise. Mistakes in options, base model,
transformer, LoRA or input are reported before any weights are loaded.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple, NoReturn

import imageio
import numpy as np
import torch
from diffusers import (
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CogVideoXVideoToVideoPipeline,
)
from diffusers.utils import load_image
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image, ImageOps

from cogvideox.base_files import check_files
from cogvideox.base_model import IDENTITY, BaseModel, empty_transformer, reaches_hub, read_base_model, why_not_loaded
from cogvideox.budget import is_out_of_memory
from cogvideox.encoders import set_tiling
from cogvideox.lora import add_loras
from cogvideox.lora_files import LORA_FILE, LoraHeader, check_fits, find_lora_file, lora_file_in, read_header, read_lora
from cogvideox.sampling import NUM_INFERENCE_STEPS, encode_mp4, noise_generator
from files import at_least, finite, parse_options, publish

PIPELINES = {"t2v": CogVideoXPipeline, "i2v": CogVideoXImageToVideoPipeline, "v2v": CogVideoXVideoToVideoPipeline}
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


class TunedTransformer(NamedTuple):
    """A fully fine-tuned transformer, to replace the base model's; the weights stay on disk."""

    path: str  # a folder, or a hub name
    hub_options: dict  # arguments that find it there: subfolder and local_files_only
    config: dict
    base_model: str | None  # that it was fine-tuned from; None where it is not recorded


class VideoRequest(NamedTuple):
    """What to make and with what, checked before any weights are loaded."""

    base: BaseModel  # with the config of the transformer that replaces its own
    transformer: TunedTransformer | None  # None: the base model's
    loras: list[LoraHeader]
    generate_type: str
    dtype: torch.dtype
    fps: int
    inputs: dict  # arguments of the pipeline: height, width, and num_frames, image or video


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    path, switch, positive = os.path.expanduser, argparse.BooleanOptionalAction, at_least(1)
    dtypes, offloads = ["float32", "float16", "bfloat16"], ["none", "model", "sequential"]

    models = parser.add_argument_group("models").add_argument
    base = "base model: folder or hub name (default: what the transformer or the LoRA was trained on)"
    tuned = "fine-tuned transformer (sft): run directory, checkpoint-N or hub name"
    models("--model_path", type=path, metavar="PATH", help=base)
    models("--transformer_path", type=path, metavar="PATH", help=tuned)
    lora = "LoRA, or several: file, folder such as a run directory, or hub name, with or without /file"
    other = "apply a LoRA that was trained on another base model; its shapes have to fit"
    scale = "factor on the strength that was trained; one for all LoRAs, or one for each"
    models("--lora_path", type=path, nargs="+", default=[], metavar="PATH", help=lora)
    models("--lora_for_other_base", action=switch, default=False, help=other)
    models("--lora_scale", type=finite, nargs="+", default=[1.0], metavar="X", help=scale)

    video = parser.add_argument_group("the video").add_argument
    kind = "start from text, image or video (default: t2v or i2v, as the base model was made)"
    several = "videos to make: out.mp4, out-1.mp4, ..."
    beside = "show what the LoRA does: the video without it on the left, with it on the right"
    video("--prompt", required=True, help="what the video shows")
    video("--generate_type", choices=PIPELINES, help=kind)
    video("--image_or_video_path", type=path, metavar="FILE", help="i2v: the first image; v2v: the video to change")
    video("--output_path", type=path, default="output.mp4", metavar="FILE", help="mp4 to write; replaces an older one")
    video("--num_frames", type=positive, metavar="N", help="frames, 4k + 1 (default: the base model's)")
    video("--width", type=positive, metavar="PIXELS", help="a multiple of 16 (default: the base model's)")
    video("--height", type=positive, metavar="PIXELS", help="a multiple of 16 (default: the base model's)")
    video("--fps", type=positive, metavar="N", help="frames per second (default: those of the base model's training)")
    video("--num_videos_per_prompt", type=positive, default=1, metavar="N", help=several)
    video("--compare", action=switch, default=False, help=beside)

    sampling = parser.add_argument_group("sampling").add_argument
    guidance = "classifier-free guidance; 1.0 or less turns it off"
    steps = {"default": NUM_INFERENCE_STEPS, "metavar": "N"}
    sampling("--num_inference_steps", type=positive, **steps, help="denoising steps")
    sampling("--guidance_scale", type=finite, default=6.0, metavar="X", help=guidance)
    sampling("--use_dynamic_cfg", action=switch, default=False, help="increase the guidance over the sampling steps")
    sampling("--seed", type=int, default=42, metavar="N", help="seed of the first video; each further one adds 1")

    machine = parser.add_argument_group("machine").add_argument
    slicing = "decode a batch video by video; has no effect here, where a batch is one video"
    machine("--dtype", choices=dtypes, help="dtype of all networks (default: bfloat16 on a GPU, float32 on a CPU)")
    machine("--cpu_offload", choices=offloads, default="none", help="GPU holds everything, one network or one layer")
    machine("--enable_tiling", action=switch, default=True, help="decode in tiles: less memory, a little slower")
    machine("--enable_slicing", action=switch, default=False, help=slicing)
    args = parse_options(parser, argv)
    check_args(parser, args)
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with a message if options contradict each other."""
    kind, source, output = args.generate_type, args.image_or_video_path, Path(args.output_path)
    if kind == "t2v" and source:
        parser.error(f"--image_or_video_path {source}: t2v uses no file; add --generate_type i2v or v2v")
    if kind in ("i2v", "v2v") and not source:
        parser.error(f"--generate_type {kind}: needs a file to start from; add --image_or_video_path")
    if kind == "v2v" and args.use_dynamic_cfg:
        parser.error("--use_dynamic_cfg: diffusers' v2v has no such guidance; leave it out")
    if kind == "v2v" and args.num_inference_steps < 2:
        parser.error(f"--num_inference_steps {args.num_inference_steps}: v2v runs only 80 % of them; give 2 or more")
    if output.suffix != ".mp4" or output.is_dir():
        parser.error(f"--output_path {output}: must name an .mp4 file, such as {output / 'video.mp4'}")
    check_lora_options(parser, args)
    if args.cpu_offload != "none" and not torch.cuda.is_available():
        reason = "there is no GPU, everything is on the CPU already"
        parser.error(f"--cpu_offload {args.cpu_offload}: {reason}; leave it out")


def check_lora_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    scales, count = args.lora_scale, len(args.lora_path)
    given = " ".join(f"{scale:g}" for scale in scales)
    if scales != [1] and not count:
        parser.error(f"--lora_scale {given}: there is no LoRA to scale; add --lora_path")
    if len(scales) > 1 and len(scales) != count:
        parser.error(f"--lora_scale {given}: {len(scales)} scales for {count} LoRAs; give one for all, or one for each")
    if args.compare and not count:
        parser.error("--compare: shows a video without and with a LoRA, and there is none; add --lora_path")


# ---- fine-tuned transformers and LoRAs -------------------------------------------------------------------------------


def newest_below(folder: Path, name: str) -> str | None:
    """Names the newest folder in `folder` that holds `name`, for a message; None if there is none."""
    found = sorted(folder.glob(f"[!.]*/{name}"), key=os.path.getmtime)
    return f"the newest below it is {folder / found[-1].relative_to(folder).parts[0]}" if found else None


def other_option(folder: Path) -> str | None:
    """Names the option that `folder` is for, for a message; None if it is for none."""
    if (folder / "model_index.json").is_file():
        return "it is a base model: give it as --model_path"
    if (folder / LORA_FILE).is_file():
        return "it is a LoRA: give it as --lora_path"
    if (folder / "transformer" / "config.json").is_file():
        return "it is a fine-tuned transformer: give it as --transformer_path"
    return None


def find_transformer(path: Path) -> Path:
    """Returns the transformer's folder: `path` itself, or transformer/ in it."""
    for folder in (path / "transformer", path):
        if (folder / "config.json").is_file():
            return folder
    if path.is_file():
        raise FileNotFoundError(f"--transformer_path {path}: must be a folder; give the one that holds this file")
    way_out = newest_below(path, "transformer/config.json") or other_option(path) or "give the folder that holds it"
    raise FileNotFoundError(f"--transformer_path {path}: no transformer/ in this folder; {way_out}")


def load_transformer_config(path: str) -> tuple[str, dict, dict]:
    """Returns folder or hub name of the transformer, the arguments that find it there, and its config."""
    folder = Path(path)
    if folder.exists():
        candidates = [(str(find_transformer(folder)), {"local_files_only": True})]
    else:
        hub = {"local_files_only": not reaches_hub()}
        candidates = [(path, {"subfolder": "transformer", **hub}), (path, hub)]
    for source, hub_options in candidates:
        try:
            return source, hub_options, CogVideoXTransformer3DModel.load_config(source, **hub_options)
        except (OSError, ValueError) as error:
            last_error = error
    message = f"no such folder, nor a transformer on the hub; check it ({why_not_loaded(last_error)})"
    raise FileNotFoundError(f"--transformer_path {path}: {message}") from last_error


def read_transformer(path: str) -> TunedTransformer:
    """Reads a transformer's config and, in a folder, checks the headers of its weights."""
    source, hub_options, config = load_transformer_config(path)
    kind, wanted = config.get("_class_name", "no model of diffusers"), CogVideoXTransformer3DModel.__name__
    if kind != wanted:
        raise ValueError(f"--transformer_path {source}: its config.json is of {kind}; give the folder of a {wanted}")
    empty = empty_transformer(config)
    if Path(source).is_dir():
        check_weights(Path(source), empty)
    return TunedTransformer(source, hub_options, dict(empty.config), config.get("_name_or_path"))


def check_weights(folder: Path, empty: CogVideoXTransformer3DModel) -> None:
    """Refuses a folder whose weights, in one file or in several with an index, do not fit its config."""
    files, index = [WEIGHTS_FILE], folder / f"{WEIGHTS_FILE}.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(f"--transformer_path {folder}: no {', '.join(missing)} in it; copy it again")
    shapes = {}
    for file in files:
        shapes |= read_header(folder / file, "--transformer_path").shapes
    expected = {name: tuple(weight.shape) for name, weight in empty.state_dict().items()}
    if wrong := sorted(shapes.items() ^ expected.items()):  # diffusers 0.42.1 would only warn of that
        name = wrong[0][0]
        found = f"{name} is {shapes.get(name, 'missing')}, by its config.json {expected.get(name, 'not there')}"
        raise ValueError(f"--transformer_path {folder}: {found}; give what save_pretrained wrote, as a whole")


def check_transformer(tuned: TunedTransformer, base: BaseModel) -> None:
    """Refuses a transformer of another kind than the base model's."""
    own, there = tuned.config, base.transformer
    others = [name for name in (*IDENTITY, "ofs_embed_dim") if own[name] != there[name]]
    if others:
        made_from = f" ({tuned.base_model})" if tuned.base_model else ""
        wrong = "; ".join(f"{name} {own[name]}, there {there[name]}" for name in others)
        raise ValueError(
            f"--transformer_path {tuned.path}: of another kind than --model_path {base.name}: {wrong}. "
            f"Give the base model that it was fine-tuned from{made_from}"
        )


def find_lora(path: Path) -> Path:
    """Returns the LoRA's file, with advice where the folder holds something else."""
    found = f"--lora_path {path}"
    if path.is_dir() and not lora_file_in(path, found):
        way_out = newest_below(path, LORA_FILE) or other_option(path) or "give the folder or file that has it"
        raise FileNotFoundError(f"{found}: no {LORA_FILE} in this folder; {way_out}")
    return find_lora_file(path)


# ---- the base model, and what it is asked for ------------------------------------------------------------------------


def read_base(path: str, parts: tuple[str, ...]) -> BaseModel:
    """Reads the base model's configs; in a folder, its files must be whole, the weights of `parts` among them."""
    folder = Path(path)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        reason, way_out = "no model_index.json, so not a base model of diffusers", other_option(folder)
        raise FileNotFoundError(f"--model_path {path}: {reason}; {way_out or 'give its top folder'}")
    try:
        base = read_base_model(path, option="--model_path")
        if base.folder:
            check_files(base, parts)
    except ValueError as error:
        raise ValueError(f"--model_path {error}") from error
    return base._replace(name=path)  # for messages, as it was given


def choose_generate_type(args: argparse.Namespace, base: BaseModel, named_by: str) -> str:
    """Returns t2v, i2v or v2v; unless asked for, what the base model takes, which messages call `named_by`."""
    kind, source, takes_image = args.generate_type, args.image_or_video_path, base.takes_image
    if kind and takes_image != (kind == "i2v"):
        made_for, way_out = ("an image", "i2v") if takes_image else ("text only", "t2v or v2v")
        channels = f"in {base.transformer['in_channels']}, out {base.transformer['out_channels']}"
        reason = f"{named_by} is made to start from {made_for} (channels {channels})"
        raise ValueError(f"--generate_type {kind}: {reason}; use {way_out}, or another base model")
    if takes_image and not source:
        raise ValueError(f"--image_or_video_path: not given, and {named_by} starts from an image; add it")
    if not (kind or takes_image) and source:
        way_out = "add --generate_type v2v to change a video, or leave it out"
        raise ValueError(f"--image_or_video_path {source}: {named_by} starts from text only; {way_out}")
    return kind or ("i2v" if takes_image else "t2v")


def choose_size(args: argparse.Namespace, base: BaseModel) -> tuple[int, int]:
    """Returns height and width in pixels; unless asked for, the base model's."""
    published, most = base.published, base.sample_size
    # The config published with 1.5 has 300 x 300 latents, where its positions end, not the size it was trained at.
    positions_only = published.version == "1.5" and most == (2400, 2400)
    own = (published.height, published.width) if positions_only else most
    size = args.height or own[0], args.width or own[1]
    multiple = base.spatial_factor * base.transformer["patch_size"]
    for axis, flag in enumerate(("--height", "--width")):
        if size[axis] % multiple:
            nearest = multiple * max(1, round(size[axis] / multiple))
            raise ValueError(f"{flag} {size[axis]}: must be a multiple of {multiple}; nearest is {nearest}")
        if base.fixed_size and size[axis] != own[axis]:
            raise ValueError(f"{flag} {size[axis]}: this base model makes only {own[axis]}; leave it out")
        if published.version == "1.5" and size[axis] > most[axis]:
            raise ValueError(f"{flag} {size[axis]}: this base model's positions end at {most[axis]}; give at most that")
    return size


def choose_frames(args: argparse.Namespace, kind: str, base: BaseModel) -> int:
    """Returns the number of frames; unless asked for, the base model's."""
    config = base.transformer
    ratio, own, patch = config["temporal_compression_ratio"], config["sample_frames"], config["patch_size_t"]
    # diffusers 0.42.1 pads the latent frames of 1.5 to its patches in time for text and image, not for video.
    step = ratio * patch if patch and kind == "v2v" else ratio
    first = step - ratio + 1
    frames = args.num_frames or own - (own - first) % step
    if (frames - first) % step:
        nearest = first + step * max(0, round((frames - first) / step))
        raise ValueError(f"--num_frames {frames}: must be {step}k + {first}; nearest is {nearest}")
    if base.fixed_size and frames != own:
        raise ValueError(f"--num_frames {frames}: this base model makes only {own}; leave it out")
    latent_frames = (frames - 1) // ratio + 1
    if latent_frames % 2 == 0:
        print(f"--num_frames {frames}: the VAE decodes to {ratio * latent_frames}; only 8k + 1 come out as asked")
    return frames


def read_video(path: str, num_frames: int, fps: int) -> list[Image.Image]:
    """Returns the frames at 0, 1/fps, 2/fps, ... seconds of the video."""
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


def read_source(path: str | None, kind: str, *, num_frames: int, fps: int, width_height: tuple[int, int]) -> dict:
    """Returns arguments of the pipeline: num_frames, and what to start from, resized and cropped to the size."""
    if kind == "t2v":
        return {"num_frames": num_frames}
    if not Path(path).is_file():
        raise FileNotFoundError(f"--image_or_video_path {path}: no such file; check the path")
    try:
        if kind == "i2v":
            return {"num_frames": num_frames, "image": ImageOps.fit(load_image(path), width_height)}
        return {"video": [ImageOps.fit(frame, width_height) for frame in read_video(path, num_frames, fps)]}
    except (OSError, RuntimeError) as error:
        wanted, reason = "an image for i2v" if kind == "i2v" else "a video for v2v", why_not_loaded(error)
        raise ValueError(f"--image_or_video_path {path}: not readable; give {wanted} ({reason})") from error


def choose_model_path(args: argparse.Namespace, tuned: TunedTransformer | None, loras: list[LoraHeader]) -> str:
    """Returns the base model; unless given, what the transformer, or else the first LoRA that says, was trained on."""
    if args.model_path:
        return args.model_path
    if tuned and tuned.base_model:
        print(f"--model_path: not given; {tuned.base_model}, which the transformer was fine-tuned from")
        return os.path.expanduser(tuned.base_model)
    if recorded := [lora.base_model for lora in loras if lora.base_model]:
        print(f"--model_path: not given; {recorded[0]}, which the LoRA was trained on")
        return os.path.expanduser(recorded[0])
    silent = " and ".join(option for option in (args.transformer_path, *args.lora_path) if option)
    reason = f"{silent} does not say what it was trained on" if silent else "there is no LoRA or transformer to tell it"
    raise ValueError(f"--model_path: not given, and {reason}; give a base model, such as THUDM/CogVideoX-2b")


def make_request(args: argparse.Namespace) -> VideoRequest:
    """Reads and checks everything but weights."""
    tuned = read_transformer(args.transformer_path) if args.transformer_path else None
    loras = [read_lora(find_lora(Path(path))) for path in args.lora_path]
    parts = ("vae", "text_encoder") if tuned else ("transformer", "vae", "text_encoder")
    base = read_base(choose_model_path(args, tuned, loras), parts)
    named_by = f"--model_path {base.name}"
    if tuned:
        check_transformer(tuned, base)
        base, named_by = base._replace(transformer=tuned.config), f"--transformer_path {tuned.path}"
    for lora in loras:
        found, other = f"--lora_path {lora.file}", args.lora_for_other_base
        check_fits(lora, base, named_by=named_by, found=found, for_other_base=other)
    if any(lora.is_dora for lora in loras) and args.cpu_offload == "sequential":
        # peft 0.21.2 reads a layer's own weight from outside of it, where accelerate has none on the GPU.
        raise ValueError("--cpu_offload sequential: takes layers apart that a DoRA needs whole; give it as model")
    kind = choose_generate_type(args, base, named_by)
    dtype = args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    if dtype == "float16" and base.published.version == "1.5":
        raise ValueError("--dtype float16: gives NaN with CogVideoX 1.5; use bfloat16 or float32")
    (height, width), num_frames = choose_size(args, base), choose_frames(args, kind, base)
    fps = args.fps or base.published.fps
    source = read_source(args.image_or_video_path, kind, num_frames=num_frames, fps=fps, width_height=(width, height))
    make_output_folder(Path(args.output_path))
    names = f"{base.name} with {tuned.path}" if tuned else base.name
    print(f"{names}: {num_frames} frames of {width}x{height} at {fps} fps in {dtype}")
    inputs = {"height": height, "width": width, **source}
    return VideoRequest(
        base=base,
        transformer=tuned,
        loras=loras,
        generate_type=kind,
        dtype=getattr(torch, dtype),
        fps=fps,
        inputs=inputs,
    )


def make_output_folder(output: Path) -> None:
    folder = output.parent
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"--output_path {output}: {folder} cannot be written to; name another folder")


# ---- the video -------------------------------------------------------------------------------------------------------


def load_pipeline(request: VideoRequest, args: argparse.Namespace):
    """Loads the pipeline with its transformer and LoRA onto its device."""
    dtype, tuned, options = request.dtype, request.transformer, dict(request.base.hub)
    if tuned:  # the base model's is then neither loaded nor downloaded
        options["transformer"] = CogVideoXTransformer3DModel.from_pretrained(
            tuned.path, dtype=dtype, **tuned.hub_options
        )
    pipe = PIPELINES[request.generate_type].from_pretrained(request.base.name, dtype=dtype, **options)
    # With zero terminal SNR only trailing steps start from pure noise. The published configs say the same.
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="trailing")
    if request.loras:
        scales = args.lora_scale * (1 if len(args.lora_scale) > 1 else len(request.loras))
        apply_loras(pipe, request.loras, scales)
    set_tiling(pipe.vae, tiling=args.enable_tiling, slicing=args.enable_slicing)
    if args.cpu_offload == "model":
        pipe.enable_model_cpu_offload()
    elif args.cpu_offload == "sequential":
        pipe.enable_sequential_cpu_offload()
    else:
        pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    return pipe


def values_of(numbers) -> str:
    return "/".join(f"{number:g}" for number in sorted(set(numbers)))


def apply_loras(pipe, loras: list[LoraHeader], scales: list[float]) -> None:
    """Loads the LoRAs at `scales` times their trained strength, and prints the strengths that their layers apply."""
    adapters = add_loras(pipe.transformer, loras, scales)
    layers = [module for module in pipe.transformer.modules() if isinstance(module, BaseTunerLayer)]
    for lora, adapter, scale in zip(loras, adapters, scales):
        print_strength(lora, scale, adapter, [layer for layer in layers if adapter in layer.scaling])


def print_strength(lora: LoraHeader, lora_scale: float, adapter: str, layers: list[BaseTunerLayer]) -> None:
    ranks = values_of(layer.r[adapter] for layer in layers)
    applied = values_of(layer.scaling[adapter] for layer in layers)
    trained = "no strength recorded: taken as 1"
    if lora.strength_from:
        name = "sqrt(rank)" if lora.settings.get("use_rslora") else "rank"
        strengths = values_of(lora.strengths.values())
        source = "" if lora.strength_from == "metadata" else f" ({lora.strength_from})"
        trained = f"trained strength alpha/{name} = {strengths}{source}"
    # peft 0.21.2 scales only the directions of a DoRA.
    kept = "; the magnitudes of its DoRA as trained" if lora.is_dora else ""
    print(f"LoRA {lora.file}: rank {ranks}, {trained}, --lora_scale {lora_scale:g} -> applied at {applied}{kept}")


def make_frames(pipe, request: VideoRequest, args: argparse.Namespace, seed: int) -> list[Image.Image]:
    options = request.inputs | ({"use_dynamic_cfg": True} if args.use_dynamic_cfg else {})
    return pipe(
        prompt=args.prompt,
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        generator=noise_generator(seed),
        max_sequence_length=pipe.transformer.config.max_text_seq_length,
        **options,
    ).frames[0]


def side_by_side(left: list[Image.Image], right: list[Image.Image]) -> list[Image.Image]:
    return [Image.fromarray(np.hstack([np.array(one), np.array(other)])) for one, other in zip(left, right)]


def make_videos(request: VideoRequest, args: argparse.Namespace) -> None:
    pipe = load_pipeline(request, args)
    output = Path(args.output_path)
    for i in range(args.num_videos_per_prompt):  # diffusers 0.42.1 sets its own num_videos_per_prompt back to 1
        path = output.with_stem(f"{output.stem}-{i}") if i else output
        frames = make_frames(pipe, request, args, seed=args.seed + i)
        if args.compare:
            pipe.transformer.disable_adapters()
            frames = side_by_side(make_frames(pipe, request, args, seed=args.seed + i), frames)
            pipe.transformer.enable_adapters()
        publish(path, encode_mp4(frames, request.fps))
        print(f"{path}: {len(frames)} frames, seed {args.seed + i}{', the LoRA on the right' * args.compare}")


def less_memory(args: argparse.Namespace) -> str:
    """Returns the options that would need less memory than those given."""
    offloads = {"none": "--cpu_offload model", "model": "--cpu_offload sequential, which is slower"}
    offload = offloads.get(args.cpu_offload) if torch.cuda.is_available() else None
    ways_out = [offload, None if args.enable_tiling else "--enable_tiling", "fewer --num_frames"]
    return " or ".join(filter(None, ways_out))


def main(args: argparse.Namespace) -> None:
    try:
        request = make_request(args)
    except (ValueError, OSError) as error:
        end(str(error), code=2)
    try:
        make_videos(request, args)
    except OSError as error:
        end(str(error), code=3)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        end(f"out of memory; pass {less_memory(args)}", code=3)


def end(message: str, *, code: int) -> NoReturn:
    print(f"cli_demo.py: error: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main(parse_args())
