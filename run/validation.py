"""Validation of the model in training: its loss on held-out clips, and videos of the validation prompts."""

import argparse
import contextlib
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from math import isfinite
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from clips.frames import CENTRE, read_image, resize_and_crop
from clips.motion import motion
from clips.order import Item, Ranks
from cogvideox.base_model import BaseModel
from cogvideox.budget import is_out_of_memory
from cogvideox.lora import base_of
from cogvideox.objective import Masking, generator_for, preservation_loss, training_loss
from cogvideox.sampling import encode_mp4, noise_generator, sample_video
from dataset import Data
from files import CannotContinue, at_least
from run import stopping, trackers
from run.run_directory import validation_folder, write_validation_videos
from run.trackers import Video

MOST_FAILURES = 3  # in a row
# Less than half is no chance: videos of the small model that differ only in their seeds spread by 2 to 15 percent
# around the mean of their prompt, and a validation always has the same prompts and seeds.
WELL_BELOW = 0.5
VALIDATIONS_WITHOUT_GAIN = 2  # a single one may be worse by chance
DRIFT_GROWTH = 1.1  # times what it was, below which a drift is taken to stay as it is


def add_options(parser: argparse.ArgumentParser) -> None:
    check = parser.add_argument_group("validation").add_argument
    check("--validation_prompt", metavar="TEXT", help="prompts to sample videos from during and after training")
    check("--validation_prompt_separator", default=":::", metavar="TEXT", help="text between two validation prompts")
    images = "first images of the validation videos, separated like the prompts (default: first frames of clips)"
    check("--validation_images", metavar="FILES", help=images)
    positive = at_least(1)
    check("--num_validation_videos", type=positive, default=1, metavar="N", help="videos per prompt, each with a seed")
    check("--validation_epochs", type=positive, default=50, metavar="N", help="epochs between validations")
    check("--validation_steps", type=positive, metavar="N", help="updates between further validations (default: none)")
    split = "videos to hold out for the validation loss: below 1 a share, from 1 a number; 0: none"
    check("--validation_split", type=float, default=0, metavar="P", help=split)
    patience = "end the run once N validations in a row bring no clear fall of the held-out loss (default: never)"
    check("--stop_patience", type=positive, metavar="N", help=patience)
    drift = "prompts to measure the drift from the base model on, beside the held-out captions without --id_token"
    check("--drift_prompt", metavar="TEXT", help=drift)
    switch = argparse.BooleanOptionalAction
    check("--validate_first", action=switch, default=True, help="validate the base model before training, too")
    check("--guidance_scale", type=float, default=6.0, help="classifier-free guidance scale of validation videos")
    check("--use_dynamic_cfg", action="store_true", help="increase the guidance over the sampling steps")


def check_options(args: argparse.Namespace, refuse: Callable[[str], None]) -> None:
    """Refuses values that cannot work; `refuse` ends the program with a message."""
    if not args.validation_prompt_separator or not all(prompts(args)):
        refuse(f"--validation_prompt {args.validation_prompt!r}: a prompt or the separator is empty; write both")
    if len(images(args)) > len(prompts(args)):
        refuse(f"--validation_images {args.validation_images!r}: more images than prompts; write a prompt for each")
    if not all(drift_prompts(args)):
        refuse(f"--drift_prompt {args.drift_prompt!r}: a prompt is empty; write all of them")
    if args.drift_prompt and not args.validation_split:
        refuse("--drift_prompt: the drift is measured on held-out clips; add --validation_split")
    if args.validation_split < 0 or (args.validation_split >= 1 and args.validation_split % 1):
        refuse(f"--validation_split {args.validation_split}: must be a share below 1, or a whole number of videos")


def prompts(args: argparse.Namespace) -> list[str]:
    return _separated(args.validation_prompt, args)


def drift_prompts(args: argparse.Namespace) -> list[str]:
    return _separated(args.drift_prompt, args)


def _separated(texts: str | None, args: argparse.Namespace) -> list[str]:
    return [text.strip() for text in texts.split(args.validation_prompt_separator)] if texts else []


def images(args: argparse.Namespace) -> list[Path | None]:
    """Returns the images of the first prompts, None for those left empty between two separators."""
    paths = _separated(args.validation_images, args)
    return [Path(path).expanduser() if path else None for path in paths]


def quantiles(num_train_timesteps: int, count: int = 4) -> list[int]:
    """Returns the middle timesteps of `count` equal parts of the noise schedule."""
    return [(2 * part + 1) * num_train_timesteps // (2 * count) for part in range(count)]


class HeldOut(NamedTuple):
    """Held-out clips, and all that a loss on them takes but the transformer."""

    accelerator: Accelerator
    ranks: Ranks
    base: BaseModel
    data: Data
    encode_images: Callable | None  # what `encoders.image_encoder` yields
    seed: int
    dtype: torch.dtype
    agree: Callable[[], None]  # called before each batch, on all ranks equally often; an exception ends the validation
    masking: Masking = Masking()  # what a clip's mask does to its loss


def held_out_losses(held_out: HeldOut, transformer, *, with_clips: bool = False) -> dict[str, float]:
    """Returns the mean loss over clips and timesteps, "validation_loss", and at each one, "validation_loss_t125" etc.

    Every rank must call it.

    Args:
        with_clips: add the mean loss of each clip, "validation_loss_clip0" etc.
    """
    name, loss = "validation_loss", partial(training_loss, transformer=transformer, masking=held_out.masking)
    losses = _losses(name, held_out, transformer, loss)
    return _means(name, losses) | (_means_of_clips(losses) if with_clips else {})


def drift(held_out: HeldOut, transformer, prompts: Sequence[str]) -> dict[str, float]:
    """Returns how far a LoRA's predictions are from those of the base model where the new word is absent.

    It is the mean squared difference, "drift", and at each timestep, "drift_t125" etc., as `preservation_loss` has it,
    with the held-out clips and the fixed noise of `held_out_losses`. The captions are those without the new word, where
    the data has them, and `prompts`, whose embeddings the data holds. Every rank must call it.
    """
    model = held_out.accelerator.unwrap_model(transformer)
    models = {"transformer": model, "teacher": base_of(model)}
    embeds = {text: embedding[None] for text, embedding in held_out.data.read_prompts().items() if text in prompts}

    def loss(batch: dict, generator: torch.Generator, **options) -> torch.Tensor:
        captions = [batch["plain_prompt_embeds"]] if "plain_prompt_embeds" in batch else []
        state, losses = generator.get_state(), []
        for plain in [*captions, *embeds.values()]:
            generator.set_state(state)  # the same noise for all
            of_caption = batch | {"plain_prompt_embeds": plain}
            losses.append(preservation_loss(batch=of_caption, generator=generator, **models, **options))
        return torch.stack(losses).mean()

    return _means("drift", _losses("drift", held_out, transformer, loss))


@torch.no_grad()
def _losses(name: str, held_out: HeldOut, transformer, loss_of: Callable[..., torch.Tensor]) -> dict[tuple, float]:
    """Returns a loss by clip and timestep; `name` is what a message calls it.

    Each pair of clip and timestep is a batch of its own with its own fixed noise: equal weights give equal losses, on
    any number of ranks.
    """
    base, ranks, data, device = held_out.base, held_out.ranks, held_out.data, held_out.accelerator.device
    timesteps = quantiles(base.scheduler.config.num_train_timesteps)
    jobs = [(clip, timestep) for clip in range(len(data.shapes)) for timestep in timesteps]
    fixed = {"base": base, "dtype": held_out.dtype, "encode": held_out.encode_images}
    losses = []
    with _without_dropout(transformer), failing_together(held_out.agree):
        for clip, timestep in _equal_share(ranks, jobs):
            held_out.agree()
            batch = {key: tensor[None] for key, tensor in data.read(Item(clip)).items()}
            generator = generator_for(device, held_out.seed, "held out", clip, timestep)
            at_timestep = torch.tensor([timestep], device=device)
            loss = loss_of(batch=batch, generator=generator, timesteps=at_timestep, **fixed)
            losses.append(((clip, timestep), loss.item()))
    losses = dict(ranks.gather(losses))
    if wrong := sorted(pair for pair, loss in losses.items() if not isfinite(loss)):
        clip, timestep = wrong[0]
        what = name.replace("validation_loss", "loss")
        raise NotFinite(
            f"the {what} on {len(wrong)} of {len(losses)} held-out pairs of clip and timestep is not finite, the first "
            f"one on {data.labels[clip]}, timestep {timestep}"
        )
    return losses


def _means(name: str, losses: dict[tuple, float]) -> dict[str, float]:
    """Returns the mean loss over clips and timesteps as `name`, and at each timestep as `name`_t125 etc."""
    of_timestep = {}
    for (_, timestep), loss in sorted(losses.items()):
        of_timestep.setdefault(timestep, []).append(loss)
    means = {f"{name}_t{timestep}": fmean(found) for timestep, found in of_timestep.items()}
    return {name: fmean(means.values())} | means


def _means_of_clips(losses: dict[tuple, float]) -> dict[str, float]:
    of_clip = {}
    for (clip, _), loss in sorted(losses.items()):
        of_clip.setdefault(clip, []).append(loss)
    return {f"{stopping.CLIP_PREFIX}{clip}": fmean(found) for clip, found in of_clip.items()}


def remark_on_drift(rows: list[dict]) -> str | None:
    """Returns a sentence if the drift grows while the loss on held-out clips no longer falls.

    Args:
        rows: of the validations so far, each with "step", "validation_loss" and "drift".
    """
    if not rows:
        return None
    best, last = min(rows, key=itemgetter("validation_loss")), rows[-1]
    since = sum(row["step"] > best["step"] for row in rows)
    if since < VALIDATIONS_WITHOUT_GAIN or last["drift"] <= DRIFT_GROWTH * best["drift"]:
        return None
    return (
        f"without the new word, the model drifts away from the base model ({last['drift']:.4g}, {best['drift']:.4g} at "
        f"update {best['step']}), while the loss on held-out clips no longer falls: its lowest is that of update "
        f"{best['step']}; docs/lora.md says what to do"
    )


class Failed(RuntimeError):
    """A validation has failed on one of the ranks; the cause is known on that one."""


class NotFinite(Failed):
    """A loss on held-out clips is not finite; all ranks know."""


def cause(failed: Failed, memory_advice: Callable[[], str]) -> str:
    """Returns why a validation has failed, and what helps where memory is short."""
    error = failed.__cause__
    if is_out_of_memory(error):
        torch.cuda.empty_cache()
        return memory_advice()
    return f"{type(error).__name__}: {error}" if error else str(failed)


@contextlib.contextmanager
def failing_together(agree: Callable) -> Iterator[None]:
    """Ends the block on all ranks if it fails on one of them; its last turn is followed by one more call of `agree`.

    What ends the run (CannotContinue) ends it here as it does in an update.

    Blocks may be nested: each ends with its own call.
    """
    try:
        yield
        agree()
    except (Failed, CannotContinue):
        raise
    except Exception as error:  # whatever else it is, training may continue
        agree(error)


@contextlib.contextmanager
def _without_dropout(transformer) -> Iterator[None]:
    transformer.eval()
    try:
        yield
    finally:
        transformer.train()


def _equal_share(ranks: Ranks, jobs: list) -> list:
    """Returns equally many jobs for every rank, some of them twice: the ranks of a sharded model compute together."""
    turns = -(-len(jobs) // ranks.count) * ranks.count
    return ranks.share(list(itertools.islice(itertools.cycle(jobs), turns)))


def cases(data: Data, prompts: list[str], images: list[Path | None], height: int, width: int) -> list[tuple]:
    """Returns pairs of a prompt and its first image, uint8 [H, W, C]; None unless the data has images.

    A prompt without an image of its own gets the first image of a clip, cropped to this size where its own is another.
    """
    if not data.has_images:
        return [(prompt, None) for prompt in prompts]
    images, found = images + [None] * (len(prompts) - len(images)), []
    for number, image in enumerate(images):
        picture = read_image(image, height, width) if image else data.first_image(number % len(data.shapes))
        found.append(resize_and_crop(picture[None], height, width, CENTRE)[0])
    return list(zip(prompts, found))


def sample_videos(
    accelerator,
    ranks: Ranks,
    base: BaseModel,
    transformer,
    *,
    vae: AbstractContextManager,
    cases: list[tuple[str, torch.Tensor | None]],
    prompt_embeds: dict[str, torch.Tensor],
    output_dir: Path,
    step: int,
    seeds: Iterable[int],
    fps: int,
    video_options: dict,
    comment_of: Callable[[str, int, Path | None], str],
    agree: Callable[[], None],
) -> dict[str, float]:
    """Samples every case with every seed, each rank its share; the main rank writes and logs the videos.

    Returns their mean motion, "validation_motion"; nothing for single frames. The noise depends only on the seed, as in
    `cli_demo.py`, so that videos of different steps can be compared. It comes from generators of its own, so that
    training continues unchanged. Every rank must call it.

    Args:
        vae: context manager that loads the VAE for the length of a `with` block.
        cases: (prompt, first image, uint8 [H, W, C], or None).
        prompt_embeds: embeddings [L, D] of the prompts and of "", the unconditional prompt of guidance.
        video_options: of `sample_video`.
        comment_of: returns what a video's metadata say, by prompt, seed and the path of its first image.
        agree: called before each sampling step, on all ranks equally often; ends the validation by an exception.
    """
    jobs = [(i, prompt, image, seed) for i, (prompt, image) in enumerate(cases) for seed in seeds]
    embeds = {text: embedding.to(accelerator.device) for text, embedding in prompt_embeds.items()}
    own_jobs, is_quiet = _equal_share(ranks, jobs), not accelerator.is_main_process
    progress = tqdm(own_jobs, f"Validation, step {step}", unit="video", leave=False, disable=is_quiet)
    videos, motions, folder = [], {}, validation_folder(output_dir, step)
    with _without_dropout(transformer), failing_together(agree), vae as loaded_vae:
        for i, prompt, image, seed in progress:
            frames = sample_video(
                accelerator.unwrap_model(transformer),
                loaded_vae,
                base.scheduler,
                embeds[prompt],
                embeds[""],
                image=image,
                generator=noise_generator(seed),
                before_each=agree,
                **video_options,
            )
            image_path = None if image is None else folder / _image_name(i)
            mp4 = encode_mp4(frames, fps, comment=comment_of(prompt, seed, image_path))
            videos.append(Video(f"prompt-{i:02d}_seed-{seed}.mp4", prompt, mp4))
            motions[i, seed] = motion(torch.from_numpy(np.stack(frames)), fps)
    # Gathered as bytes: the main rank, which writes them, need not share a disk with the others.
    videos = list({video.name: video for video in ranks.gather(videos)}.values())
    motions = dict(ranks.gather(list(motions.items()))).values()
    if accelerator.is_main_process:
        _write(accelerator, output_dir, step, videos=videos, cases=cases)
    return {} if None in motions else {"validation_motion": fmean(motions)}


def remark_on_motion(sampled: float, base: float | None, data: float | None) -> str | None:
    """Returns a sentence if validation videos move far less than the base model's or the training clips do.

    Not if they move more than the base model's: then they are on the way up, to clips that move more.

    Args:
        base, data: motion of the base model's videos and of the training clips; None: not known.
    """
    known = {"the base model's by": base, "the training clips by": data}
    known = {name: value for name, value in known.items() if value is not None}
    is_below_base = base is None or sampled < base
    if not known or not is_below_base or sampled >= WELL_BELOW * max(known.values()):
        return None
    compared = " and ".join(f"{name} {value:.1f}" for name, value in known.items())
    return (
        f"the validation videos move little, by {sampled:.1f} levels of 255 per second, {compared}; docs/data.md says "
        "what to do when motion dies"
    )


def _write(accelerator, output_dir: Path, step: int, *, videos: list[Video], cases: list[tuple]) -> None:
    images = {_image_name(i): _png(image) for i, (_, image) in enumerate(cases) if image is not None}
    try:
        folder = write_validation_videos(output_dir, step, videos, images)
    except OSError as error:
        where = f"{error.filename}: {error.strerror}"
        print(f"\nthe validation videos of update {step} are not written ({where}); training continues")
    else:
        trackers.log_videos(accelerator, folder, videos, step)


def _image_name(number: int) -> str:
    return f"prompt-{number:02d}.png"


def _png(image: torch.Tensor) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image.numpy()).save(content, "PNG")
    return content.getvalue()
