"""Trackers (tensorboard, wandb, trackio, comet_ml): what they are told. One that fails is named once and left out."""

import argparse
import io
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import imageio.v3 as iio
from PIL import Image

from files import expanded_path, without_tokens


def folder_of_logs(text: str) -> Path:
    """Returns the folder of --logging_dir; a type for argparse."""
    folder = expanded_path(text)
    if ".." in Path(os.path.normpath(folder)).parts:
        raise argparse.ArgumentTypeError(f"{text}: leads out of --output_dir; give a name in it, or a whole path")
    return folder


class Video(NamedTuple):
    name: str
    prompt: str
    mp4: bytes


def start(accelerator, project: str, config: dict, options: dict[str, dict]) -> None:
    """Opens the trackers, each by itself.

    Args:
        options: further arguments of a tracker, by its name.
    """
    kinds, opened = accelerator.log_with, []
    for kind in kinds:
        accelerator.log_with, accelerator.trackers = [kind], []
        if _succeeds(str(kind), lambda: accelerator.init_trackers(project, config, options)):
            opened += accelerator.trackers
    accelerator.log_with, accelerator.trackers = kinds, opened


def log(accelerator, values: dict[str, float], step: int) -> None:
    _tell(accelerator, lambda tracker: tracker.log(values, step=step))


def log_videos(accelerator, folder: Path, videos: list[Video], step: int) -> None:
    """Logs the videos to the trackers that show videos: tensorboard, wandb, trackio."""
    loggers = {"tensorboard": _log_to_tensorboard, "wandb": _log_to_wandb, "trackio": _log_to_trackio}

    def show(tracker) -> None:
        if tracker.name in loggers:
            loggers[tracker.name](tracker, folder, videos, step)

    _tell(accelerator, show)


def end(accelerator) -> None:
    """Closes the trackers, and then the processes' connections."""
    _tell(accelerator, lambda tracker: tracker.finish())
    accelerator.trackers = []
    accelerator.end_training()


def _tell(accelerator, action: Callable) -> None:
    told = [(tracker, _succeeds(tracker.name, partial(action, tracker))) for tracker in accelerator.trackers]
    accelerator.trackers = [tracker for tracker, is_well in told if is_well]


def _succeeds(name: str, action: Callable[[], None]) -> bool:
    """Returns whether a tracker has done something; training continues without one that has not."""
    try:
        action()
    except Exception as error:  # of whichever package it is, and of the network
        reason = without_tokens((str(error).strip() or type(error).__name__).splitlines()[0])
        print(f"\n{name}: {reason}; training continues without it, metrics.jsonl has everything", file=sys.stderr)
        return False
    return True


def _log_to_tensorboard(tracker, folder: Path, videos: list[Video], step: int) -> None:
    from tensorboard.compat.proto.summary_pb2 import Summary

    # Animated GIFs: tensorboard's own add_video writes nothing without moviepy.

    for video in videos:
        frames = [Image.fromarray(frame) for frame in iio.imread(folder / video.name)]
        duration = 1000 / iio.immeta(folder / video.name)["fps"]  # milliseconds
        gif = io.BytesIO()
        frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0)
        width, height = frames[0].size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif.getvalue())
        summary = Summary(value=[Summary.Value(tag=f"validation/{Path(video.name).stem}", image=image)])
        tracker.writer.file_writer.add_summary(summary, step)
        tracker.writer.add_text(f"validation/{Path(video.name).stem}", video.prompt, step)


def _log_to_wandb(tracker, folder: Path, videos: list[Video], step: int) -> None:
    import wandb

    shown = [wandb.Video(str(folder / video.name), caption=video.prompt, format="mp4") for video in videos]
    tracker.tracker.log({"validation": shown}, step=step)


def _log_to_trackio(tracker, folder: Path, videos: list[Video], step: int) -> None:
    import trackio

    shown = {
        f"validation/{Path(video.name).stem}": trackio.Video(folder / video.name, caption=video.prompt)
        for video in videos
    }
    tracker.tracker.log(shown, step=step)
