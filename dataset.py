"""Clips and captions -> cached latents and embeddings, each encoded once -> micro-batches.

Shapes: F frames, H height, W width, C channels; lower-case f c h w are latent sizes. L prompt tokens, D text width.
"""

import argparse
import itertools
import os
import random
import runpy
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from clips.facts import Facts, examine, headline, list_problems, remarks
from clips.frames import View, decode, first_image
from clips.listing import Clip
from clips.order import Ranks, Timeline, count_held_out, epoch_batches, rank_batches
from cogvideox.encoders import Encoder
from files import file_hash, hash_of, publish

BYTES_DECODED_AHEAD = 2**30  # of all clips that are decoded before the encoder asks for them


class Data(NamedTuple):
    """What is left of a dataset once it is encoded."""

    clips: "CachedClips"
    shapes: list[tuple[int, ...]]  # of each clip's cached latents, (2c, f, h, w)
    prompts: dict[str, Path]  # embeddings of the validation prompts, and of ""
    facts: Sequence[Facts] = ()  # of each clip; none where clips are made up
    view: View | None = None
    remarks: tuple[str, ...] = ()  # on the dataset as a whole

    @property
    def has_images(self) -> bool:
        return "image" in self.clips[0, False]

    def first_image(self, clip: int) -> torch.Tensor:
        """What an image-to-video model is given to start from, uint8 [H, W, C]."""
        return self.clips[clip, False]["image"]

    def split(self, held_out: float, seed: int) -> tuple["Data", "Data"]:
        """What is trained on, and what is held out: `held_out` of the videos, below 1 a share, from 1 a number.

        A video that is listed twice goes as a whole to one of the two.
        """
        videos = list(dict.fromkeys(paths[0] for paths in self.clips.latents))
        chosen = random.Random(f"{seed} held out").sample(videos, count_held_out(held_out, len(videos)))
        chosen, everything = set(chosen), range(len(self.shapes))
        return (
            self._take([clip for clip in everything if self.clips.latents[clip][0] not in chosen]),
            self._take([clip for clip in everything if self.clips.latents[clip][0] in chosen])._replace(remarks=()),
        )

    def _take(self, clips: list[int]) -> "Data":
        latents, captions = self.clips.latents, self.clips.captions
        taken = CachedClips([latents[clip] for clip in clips], [captions[clip] for clip in clips])
        shapes, facts = [self.shapes[clip] for clip in clips], [self.facts[clip] for clip in clips if self.facts]
        return self._replace(clips=taken, shapes=shapes, facts=facts)

    def batches_per_epoch(self, batch_size: int) -> int:
        return len(epoch_batches(self.shapes, batch_size, seed=0, epoch=0, random_flip=False))

    def summary(self) -> str:
        return "\n".join([headline(self.facts, self.view), *self.remarks])


class Probed(NamedTuple):
    """What is known of a clip before it is encoded: where its latents belong, or why it cannot be used."""

    paths: list[Path]  # of the cached latents: as filmed, then mirrored if flips were asked for
    missing: list[bool]
    facts: Facts | None
    problem: str | None


# ---- encode what the cache does not hold -----------------------------------------------------------------------------


def encode_dataset(
    root: Path,
    clips: list[Clip],
    problems: list[str],
    view: View,
    *,
    cache: Path,
    prompts: list[str],
    random_flip: bool,
    video_encoder: Encoder,
    text_encoder: Encoder,
    progress: Callable[..., Iterable],
    ranks: Ranks,
    everyone: Ranks,
) -> Data:
    """Fills the cache with what it does not hold yet, each rank its share, after everything has been checked.

    Args:
        clips, problems: from `read_clips`.
        prompts: further captions to encode, for validation.
        progress: wraps an iteration, as tqdm does; called with (items, description, unit).
        ranks: that see the same cache, and so share its work.
        everyone: all ranks; where machines do not share a disk, each must have the whole dataset.

    Raises:
        ValueError: with all problems of the dataset at once, before anything is loaded or written.
    """
    refuse = partial(_refuse, root, everyone)
    probed = ranks.gather_shares(probe_clips(ranks.share(clips), view, cache, video_encoder.fingerprint, random_flip))
    refuse(problems + [clip.problem for clip in probed if clip.problem])

    captions = {
        text: cache_path(cache, "captions", caption=text, encoder=text_encoder.fingerprint)
        for text in [clip.caption for clip in clips] + prompts
    }
    new_captions = [(text, path) for text, path in captions.items() if not path.exists()]
    new_latents = _missing(clips, probed)
    ranks.wait()  # until all know what is missing, nobody writes
    if share := ranks.share(new_captions):
        with text_encoder.load() as encode:
            cache_captions(share, encode, text_encoder.at_once(()), progress)
    problems = []
    if share := ranks.share(new_latents):
        with video_encoder.load() as encode:
            problems = cache_latents(share, view, encode, video_encoder.at_once, progress)
    refuse(problems)  # also keeps every rank here until all have written their share

    latents = [found.paths for found in probed]
    written = [path for paths in latents for path in paths] + list(captions.values())
    if len(set(everyone.gather([hash_of([path.name for path in written])]))) > 1:
        raise ValueError(f"{root}: the machines of this run see different clips or captions there; copy one to all")
    for path in written:
        _wait_for(path)
    cached = CachedClips(latents, [captions[clip.caption] for clip in clips])
    shapes, prompts = [_latents_shape(paths[0]) for paths in latents], {text: captions[text] for text in prompts}
    facts = [found.facts for found in probed]
    return Data(cached, shapes, prompts, facts, view, tuple(remarks(clips, facts, view)))


def _missing(clips: list[Clip], probed: list[Probed]) -> list[tuple[Clip, bool, Path]]:
    """What `cache_latents` is to make, clips of one length together; a video that is listed twice is encoded once."""
    new = {
        path: (len(found.facts.indices), (clip, bool(mirrored), path))
        for clip, found in zip(clips, probed)
        for mirrored, path in enumerate(found.paths)
        if found.missing[mirrored]
    }
    return [work for _, work in sorted(new.values(), key=itemgetter(0))]


def check_clips(
    root: Path, clips: list[Clip], problems: list[str], view: View, *, ranks: Ranks, everyone: Ranks
) -> None:
    """Refuses what `encode_dataset` would, which has to know the VAE first; the arguments are its own."""
    with ThreadPoolExecutor() as threads:
        found = list(threads.map(lambda clip: examine(clip, view)[1], ranks.share(clips)))
    _refuse(root, everyone, problems + [problem for problem in ranks.gather_shares(found) if problem])


def _refuse(root: Path, everyone: Ranks, problems: list[str]) -> None:
    """Ends all ranks if one has a problem; what several have is told once."""
    if problems := list(dict.fromkeys(everyone.gather(problems))):
        raise ValueError(list_problems(root, problems, "nothing is trained"))


def probe_clips(clips: list[Clip], view: View, cache: Path, encoder: str, random_flip: bool) -> list[Probed]:
    """Opens each clip, and says where its latents belong."""
    with ThreadPoolExecutor() as threads:
        return list(threads.map(lambda clip: _probe(clip, view, cache, encoder, random_flip), clips))


def _probe(clip: Clip, view: View, cache: Path, encoder: str, random_flip: bool) -> Probed:
    facts, problem = examine(clip, view)
    if problem:
        return Probed([], [], None, problem)
    key = view.cache_key() | {"video": facts.content, "encoder": encoder}
    if view.with_image and clip.image:
        key["image"] = file_hash(clip.image)
    views = [False, True] if random_flip else [False]
    paths = [cache_path(cache, "latents", **key, mirrored=mirrored) for mirrored in views]
    return Probed(paths, [not path.exists() for path in paths], facts, None)


def cache_captions(
    work: list[tuple[str, Path]],
    encode: Callable[[list[str]], torch.Tensor],
    at_once: int,
    progress: Callable[..., Iterable],
) -> None:
    """Encodes captions into one file each.

    Args:
        work: (caption, file to write).
        encode: captions -> embeddings [B, L, D].
        at_once: how many to encode together.
    """
    batch = []
    with _written_behind([]) as write:
        for i, item in enumerate(progress(work, "Encoding captions", "caption"), start=1):
            batch.append(item)
            if len(batch) == at_once or i == len(work):
                prompt_embeds_of_batch = encode(_filled_up([text for text, _ in batch], at_once))
                for (_, path), prompt_embeds in zip(batch, prompt_embeds_of_batch):
                    write(write_cached, path, {"prompt_embeds": prompt_embeds})
                batch = []


def cache_latents(
    work: list[tuple[Clip, bool, Path]],
    view: View,
    encode: Callable[[torch.Tensor], torch.Tensor],
    at_once: Callable[[tuple[int, ...]], int],
    progress: Callable[..., Iterable],
) -> list[str]:
    """Encodes clips into one file each, and returns what went wrong; what is done stays done.

    Threads decode the next clips and write the last ones while these are encoded: decord, torch and files leave the
    interpreter free, so processes would only add a start-up time and a copy of each clip.

    Args:
        work: (clip, mirrored, file to write); clips are encoded together where they follow on one another in one shape.
        encode: uint8 [B, F, H, W, C] -> parameters of the latents' distribution [B, 2c, f, h, w], mean, log-variance.
        at_once: how many clips of [F, H, W, C] to encode together.
    """
    problems, batch = [], []
    threads = decoding_threads(view)
    decoded = _ahead(partial(_frames_and_image, view), work, threads)
    with _written_behind(problems) as write, closing(decoded):

        def encode_batch():
            frames = [frames for _, frames, _ in batch]
            parameters = encode(torch.stack(_filled_up(frames, at_once(tuple(frames[0].shape)))))
            for ((clip, _, path), _, image), of_clip in zip(batch, parameters):
                write(_write_latents, clip, path, of_clip, image)
            batch.clear()

        for item, (frames, image) in zip(progress(work, "Encoding clips", "clip"), decoded):
            if isinstance(frames, str):
                problems.append((item[0].line, frames))
                continue
            if batch and batch[0][1].shape != frames.shape:
                encode_batch()
            batch.append((item, frames, image))
            if len(batch) >= at_once(tuple(frames.shape)):
                encode_batch()
        if batch:
            encode_batch()
    return [problem for _, problem in sorted(problems)]


def _filled_up(batch: list, size: int) -> list:
    """To the one size that batches have: what is made of a clip or caption then depends on nothing but itself.

    The last bits depend on the size of a batch, which would else differ between one rank and several, and after a stop.
    """
    return batch + batch[-1:] * (size - len(batch))


def decoding_threads(view: View) -> int:
    """One per core that this process has to itself, up to eight, as far as the memory for their clips allows."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    clip_bytes = view.max_num_frames * view.height * view.width * 3
    return max(1, min(8, cores, BYTES_DECODED_AHEAD // clip_bytes))


def _frames_and_image(view: View, item: tuple[Clip, bool, Path]) -> tuple[torch.Tensor | str, dict]:
    """Frames, or what is wrong with them, and what is kept beside the latents."""
    clip, mirrored, _ = item
    try:
        frames = decode(clip, view, mirrored)
    except ValueError as error:
        return str(error), {}
    return frames, {"image": first_image(clip, frames, view, mirrored)} if view.with_image else {}


def _write_latents(clip: Clip, path: Path, parameters: torch.Tensor, image: dict) -> tuple[int, str] | None:
    """Returns the line and what is wrong with it, if something is."""
    parameters = parameters.cpu()
    if not torch.isfinite(parameters).all():
        return clip.line, clip.problem("the VAE made NaN or infinity of it; train with --mixed_precision bf16")
    write_cached(path, {"parameters": parameters} | image)
    return None


def _ahead(call: Callable, items: Iterable, threads: int) -> Iterator:
    """What `call` makes of each item, in order; as many as there are threads are made before they are asked for."""
    items, pool = iter(items), ThreadPoolExecutor(threads)
    try:
        waiting = deque(pool.submit(call, item) for item in itertools.islice(items, threads))
        while waiting:
            made = waiting.popleft().result()
            waiting.extend(pool.submit(call, item) for item in itertools.islice(items, 1))
            yield made
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _written_behind(returned: list) -> Iterator[Callable]:
    """`write(call, *arguments)` in a thread; what fails there is raised by a later `write`, or at the end of the block.

    Args:
        returned: takes what the calls return, unless it is None.
    """
    pending = deque()
    with ThreadPoolExecutor(1) as thread:

        def finish(most_pending: int) -> None:
            while len(pending) > most_pending:
                if (result := pending.popleft().result()) is not None:
                    returned.append(result)

        def write(call: Callable, *arguments) -> None:
            finish(16)  # bounds what waits in memory
            pending.append(thread.submit(call, *arguments))

        yield write
        finish(0)


# ---- files of the cache ----------------------------------------------------------------------------------------------


def cache_path(cache: Path, kind: str, **content) -> Path:
    """File for what is made from `content`: whatever changes the result must be in it."""
    return cache / kind / f"{hash_of(content)}.safetensors"


def write_cached(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Publishes tensors; not by safetensors' save_file, which reports a full disk as an exception of its own."""
    try:
        publish(path, save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))
    except OSError as error:
        raise ValueError(
            f"{path.parent}: cannot write the cache ({error.strerror}); it takes about 5 MB a clip and 2 MB a caption: "
            "make room or give a writable folder with --latents_cache_dir, what is encoded already stays"
        ) from error


def load_prompt_embeds(path: Path) -> torch.Tensor:
    return load_file(path)["prompt_embeds"]  # [L, D]


def _wait_for(path: Path, seconds: float = 90) -> None:
    """A disk in the network shows another machine's new file with a delay: nfs remembers "not there" for a minute."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise ValueError(
                f"{path}: another process has encoded this, but this machine does not see it after {seconds:.0f} s; "
                "start again, what is encoded stays, or put --latents_cache_dir on another disk"
            )
        time.sleep(0.5)


def _latents_shape(path: Path) -> tuple[int, ...]:
    """Shape (2c, f, h, w) of cached latents, read from the file's header alone."""
    try:
        with safe_open(path, framework="pt") as file:
            return tuple(file.get_slice("parameters").get_shape())
    except SafetensorError as error:
        raise ValueError(f"{path}: this file of the cache is damaged ({error}); delete it, it is made again") from error


# ---- batches ---------------------------------------------------------------------------------------------------------


class CachedClips(torch.utils.data.Dataset):
    """Items (clip, mirrored), read from disk.

    Each gives its latents' "parameters" [2c, f, h, w], its caption's "prompt_embeds" [L, D], and, if it was kept, the
    "image" that it starts from, uint8 [H, W, C].
    """

    def __init__(self, latents: list[list[Path]], captions: list[Path]):
        self.latents, self.captions = latents, captions

    def __getitem__(self, item):
        clip, mirrored = item
        return load_file(self.latents[clip][mirrored]) | {"prompt_embeds": load_prompt_embeds(self.captions[clip])}


def micro_batches(
    data: Data, timeline: Timeline, ranks: Ranks, *, batch_size: int, seed: int, random_flip: bool, num_workers: int
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Endless (number, batch) of this rank; a batch is what `CachedClips` gives, stacked."""
    first = timeline.first_batch + ranks.index
    numbers = itertools.count(first, ranks.count)
    loader = torch.utils.data.DataLoader(
        data.clips,
        batch_sampler=rank_batches(data.shapes, batch_size, seed, random_flip, numbers),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or it would draw from the global one
    )
    return _read_ahead(zip(itertools.count(first, ranks.count), loader))


def _read_ahead(items: Iterator) -> Iterator:
    """The items of an endless iterator; a thread reads the next one while the GPU computes with this one."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items)
        while True:
            item = following.result()
            following = thread.submit(next, items)
            yield item


if __name__ == "__main__":
    usage = "python dataset.py preview FOLDER [options]   (see python dataset.py preview --help)"
    parser = argparse.ArgumentParser(usage=usage, description="Shows what a model will see of a dataset.")
    parser.add_argument("command", choices=["preview"])
    parser.parse_args(sys.argv[1:2])
    del sys.argv[1]
    runpy.run_module("pages.preview", run_name="__main__")  # not imported: pages/ is a floor above
