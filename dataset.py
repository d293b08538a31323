"""Encodes clips and captions once into a cache of latents and embeddings, and reads micro-batches from it.

Shapes: F frames, H height, W width, C channels; lower-case f c h w are latent sizes. L prompt tokens, D text width.
"""

import argparse
import gc
import itertools
import os
import random
import runpy
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

import torch

from clips.clean import remove_leftovers
from clips.entries import MOTION, Damaged, Header, Shapes, discard, find_stamp, read_entry, read_header, write_entry
from clips.facts import (
    ALL_UNFIT,
    Examined,
    Facts,
    count_clips,
    examine,
    facts_of,
    headline,
    is_known,
    list_problems,
    look_at_files,
    picture_size,
    remark_unfit,
    remarks,
)
from clips.frames import MEND, View, decode, decoding_threads, describe_damage, first_image
from clips.known import File, Notes, record_use
from clips.listing import Clip, Listing
from clips.masks import latent_mask, read_mask
from clips.motion import motion
from clips.order import WITHOUT_CAPTION, Item, Order, Ranks, Timeline, count_held_out
from clips.selection import Selection
from files import CannotContinue, hash_of, map_ahead

if TYPE_CHECKING:  # encoders are passed in: this module needs no model library
    from cogvideox.encoders import Encoder

WRITES_WAITING = 16  # bounds the memory of encoded clips that wait for the disk
READING_THREADS = 8  # of one process, which wait for the disk most of the time
SECONDS_PER_LIST = 30  # of notes on the files that are read for the first time
SECONDS_TO_APPEAR = 90  # for a file that another machine has written
AT_ONCE = "also when it has just been encoded again; check the disk, or pass another --latents_cache_dir"


class Data(NamedTuple):
    """An encoded dataset, or a part of one. A clip, here, is a window of one that is listed."""

    clips: "CachedClips"
    shapes: list[tuple[int, ...]]  # of each clip's cached latents, (2c, f, h, w)
    prompts: dict[str, Path]  # embeddings of the validation prompts, and of ""
    repeats: Sequence[int] = ()  # how often an epoch shows each clip; empty: once
    for_regularization: Sequence[bool] = ()  # of each clip; none where clips are made up
    groups: Sequence = ()  # of each clip: windows of which an epoch shows one have the same; empty: shows each
    facts: Sequence[Facts] = ()  # of each clip, however often it is shown; none where clips are made up
    labels: Sequence[str] = ()  # where each clip was read from, and its file
    record: dict | None = None  # hashes of what the whole dataset holds, for `run.course.check_content`
    selection: Selection | None = None
    remarks: tuple[str, ...] = ()  # on the dataset as a whole
    mend: Callable[[Damaged], None] | None = None  # encodes an entry of the cache again; None where clips are made up

    def read(self, item: Item) -> dict[str, torch.Tensor]:
        """Returns an item of `clips`; encodes again what is damaged of it in the cache."""
        return self._read(lambda: self.clips[item])

    def read_prompts(self) -> dict[str, torch.Tensor]:
        """Returns the embeddings [L, D] of the validation prompts, and of ""."""
        return {text: self._read(partial(self.clips.read_caption, path)) for text, path in self.prompts.items()}

    def _read(self, read: Callable):
        for _ in range(3):  # a clip has two entries, and both may be damaged
            item = read()
            if not isinstance(item, Damaged):
                return item
            self.mend(item)
        raise CannotContinue(
            f"{item.path} is damaged ({item.reason}), {AT_ONCE}, and start again with --resume_from_checkpoint auto; "
            "what is saved stays"
        )

    @property
    def has_images(self) -> bool:
        return "image" in self.read(Item(0))

    def first_image(self, clip: int) -> torch.Tensor:
        """Returns the image that an image-to-video model starts from, uint8 [H, W, C]."""
        return self.read(Item(clip))["image"]

    def split(self, held_out: float, seed: int) -> "Parts":
        """Returns the parts of a dataset; a video that is listed twice goes to one of them as a whole.

        Args:
            held_out: how many videos to hold out; below 1 a share of them.
        """
        video_of_clip = [of_clip.file.content for of_clip in self.facts] or [paths[0] for paths in self.clips.latents]
        kept = {clip for clip, is_kept in enumerate(self.for_regularization) if is_kept}
        learned = [(clip, video) for clip, video in enumerate(video_of_clip) if clip not in kept]
        videos = list(dict.fromkeys(video for _, video in learned))
        chosen = set(random.Random(f"{seed} held out").sample(videos, count_held_out(held_out, len(videos))))
        return Parts(
            training=self._take([clip for clip, video in learned if video not in chosen], self.repeats),
            held_out=self._take([clip for clip, video in learned if video in chosen])._replace(remarks=()),
            regularization=self._take(sorted(kept), self.repeats)._replace(remarks=()).without_plain_captions(),
        )

    def _take(self, clips: list[int], repeats: Sequence[int] | None = None) -> "Data":
        """Returns some of the clips, each as often as `repeats` tells, by default once."""
        shown = [(clip, copy) for clip in clips for copy in range(repeats[clip] if repeats else 1)]
        return self._replace(
            clips=self.clips.take([clip for clip, _ in shown]),
            shapes=[self.shapes[clip] for clip, _ in shown],
            groups=[(self.groups[clip], copy) for clip, copy in shown] if self.groups else (),
            labels=[self.labels[clip] for clip, _ in shown] if self.labels else (),
            repeats=(),
            for_regularization=(),
            facts=[self.facts[clip] for clip in clips] if self.facts else (),
        )

    def without_plain_captions(self) -> "Data":
        """Returns the same clips without the captions that lack the new word, where nothing is to read them."""
        return self._replace(clips=self.clips.without_plain_captions())

    def motion(self, fps: float) -> float | None:
        """Returns how much the videos move on average at a frame rate, in levels of 255 per second.

        None if there are only images, or if it is not known of all videos: caches of earlier versions do not tell it.
        """
        videos = [of_clip for of_clip in self.facts if of_clip.num_seen > 1]
        if not videos or any(of_clip.motion is None for of_clip in videos):
            return None
        return fmean(fps * of_clip.motion / of_clip.view.fps for of_clip in videos)

    def order(self, **settings) -> Order:
        """Returns the order in which training sees the clips; `settings` are further fields of `Order`."""
        return Order(
            shapes=self.shapes,
            groups=self.groups,
            num_captions=[len(paths) for paths in self.clips.captions],
            stills=frozenset(clip for clip, shape in enumerate(self.shapes) if shape[1] == 1),
            **settings,
        )

    def micro_batch(self, number: int, order: Order) -> tuple[list[str], dict[str, torch.Tensor]]:
        """Returns the labels of the clips in the micro-batch of this number, and the batch, read once more."""
        items = next(order.batches([number]))
        labels = [self.labels[item.clip] if self.labels else f"clip {item.clip}" for item in items]
        return labels, stacked([self.read(item) for item in items])

    def summary(self) -> str:
        return "\n".join([headline(self.facts, self.selection), *self.remarks])


class Parts(NamedTuple):
    """An encoded dataset by what is done with it."""

    training: Data
    held_out: Data
    regularization: Data  # clips that show what the model is to keep

    def describe(self) -> list[str]:
        named = {"": self.training, "held out: ": self.held_out, "regularization: ": self.regularization}
        return [f"{name}{part.summary()}" for name, part in named.items() if part.shapes]


@contextmanager
def _imports_not_searched() -> Iterator[None]:
    """Keeps the garbage collector from searching all that was imported, again and again while many clips come in."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@_imports_not_searched()
def encode_dataset(
    listing: Listing,
    selection: Selection,
    *,
    cache: Path,
    prompts: list[str],
    random_flip: bool,
    video_encoder: "Encoder",
    text_encoder: "Encoder",
    progress: Callable[..., Iterable],
    ranks: Ranks,
    everyone: Ranks,
    used_by: Path,
    before_encoding: Callable[[list[Facts]], None] = lambda _: None,
    allow_damaged: bool = False,
    check_all: bool = False,
) -> Data:
    """Encodes what the cache does not hold yet, each rank its share, once everything has been checked.

    Args:
        prompts: further captions to encode, for validation.
        progress: wraps an iterable as tqdm does, called with (items, description, unit).
        ranks: the ranks that see the same cache, and so share its work.
        everyone: all ranks; where machines do not share a disk, each must have the whole dataset.
        used_by: output directory of the run, for which `clips.clean` keeps these files.
        before_encoding: called with the facts of the clips once they are known; may refuse the run.
        allow_damaged: remark on what the decoder reports of a damaged clip instead of refusing it.
        check_all: read all files again, also those whose size and time of change are as they were.

    Raises:
        ValueError: lists all problems: those of probing before anything is encoded, or else those of encoding.
    """
    notes, encoder = Notes(cache), video_encoder.fingerprint
    checked = check_clips(
        listing, selection, notes, ranks=ranks, everyone=everyone, progress=progress, check_all=check_all
    )
    clips, facts = checked.clips, checked.facts
    probed = probe_cache(facts, cache=cache, encoder=encoder, random_flip=random_flip)
    texts = [*itertools.chain(*(clip.captions + clip.plain_captions for clip in clips)), *prompts]
    captions = caption_paths(texts, cache, text_encoder.fingerprint)
    sources = Sources(clips, facts, [clip.paths for clip in probed], captions, video_encoder, text_encoder)
    files = list(itertools.chain(*sources.latents, captions.values()))
    before_encoding(facts)
    if ranks.index == 0:
        remove_leftovers(cache)
        record_use(cache, used_by, files)  # before hours of encoding, in which `clean` may be called
    _refuse(listing, everyone, encode_missing(sources, probed, cache, ranks=ranks, progress=progress))
    _wait_for_files(listing, files, everyone)
    headers = sound_headers(sources, notes, listing, ranks=ranks, everyone=everyone, progress=progress)
    if not allow_damaged:
        _refuse(listing, everyone, [c.problem(f"{h.damage}; {MEND}") for c, h in zip(clips, headers) if h.damage])
    facts, shapes = _decoded_facts(facts, headers), [header.shape for header in headers]
    data = _described(checked._replace(facts=facts), sources.cached_clips(shapes), shapes)
    return data._replace(
        prompts={prompt: captions[prompt] for prompt in prompts},
        labels=[of_clip.label(clip) for clip, of_clip in zip(clips, facts)],
        record=content_record(clips, facts, checked.selection, random_flip=random_flip),
        remarks=(*data.remarks, *_on_older_cache(sum(clip.is_outdated for clip in probed))),
        mend=partial(encode_again, sources._replace(facts=facts)),
    )


def _decoded_facts(facts: list[Facts], headers: list[Header]) -> list[Facts]:
    """Returns the facts with what was found out when the clips were decoded, and without what that needs."""
    return [
        of_clip.without_times()._replace(damage=header.damage, motion=header.motion)
        for of_clip, header in zip(facts, headers)
    ]


def _described(checked: "Checked", clips: "CachedClips", shapes: list[tuple[int, ...]]) -> Data:
    """Returns what is known of a dataset before it is encoded, with the files and the shapes of its latents."""
    return Data(
        clips=clips,
        shapes=shapes,
        repeats=[clip.repeats for clip in checked.clips],
        for_regularization=[clip.is_regularization for clip in checked.clips],
        groups=groups_of(checked.facts) if checked.selection.is_drawn else (),
        prompts={},
        facts=checked.facts,
        selection=checked.selection,
        remarks=(*remark_unfit(checked.dropped), *remarks(checked.clips, checked.facts, checked.selection)),
    )


def groups_of(facts: list[Facts]) -> list[int]:
    """Returns a number for each clip, the same for all windows of a listed one."""
    return list(itertools.accumulate(int(not of_clip.window) for of_clip in facts))


def describe_cache(parts: Parts) -> str:
    """Returns a line on what is encoded of the parts of a dataset, and where it is."""
    files = [part.clips for part in parts]
    num_clips = len({paths[0] for clips in files for paths in clips.latents})
    num_captions = len({path for clips in files for paths in clips.captions for path in paths})
    folder = files[0].latents[0][0].parents[1]
    return f"encoded: {count_clips(num_clips)}, captions: {num_captions}, in {folder}; nothing was trained"


def content_record(clips: list[Clip], facts: list[Facts], selection: Selection, *, random_flip: bool) -> dict:
    """Returns hashes that differ between datasets that are not the same to a model."""
    views = [of_clip.view.cache_key() | {"random_flip": random_flip} for of_clip in facts]
    return {
        "clips": len(clips),
        "videos": hash_of([[of_clip.file.content, of_clip.image, *_mask_content(of_clip)] for of_clip in facts]),
        "captions": hash_of([[*clip.captions, clip.repeats] + [None] * clip.is_regularization for clip in clips]),
        "frames": hash_of(views[0] if selection.is_plain else [views, selection.clip_mode]),
    }


def _mask_content(facts: Facts) -> list[str]:
    """Returns the hash of a clip's mask, nothing without one, as in the records of earlier versions."""
    return [facts.mask.content] if facts.mask else []


def _on_older_cache(count: int) -> list[str]:
    if not count:
        return []
    return [
        f"encoded again: {count_clips(count)}; their cached latents are of frames that decord read, which may be wrong "
        "(--video_decoder decord uses those)"
    ]


class Checked(NamedTuple):
    """A dataset that can be trained on, before it is encoded."""

    clips: list[Clip]  # of each window
    facts: list[Facts]  # likewise
    selection: Selection  # fitted to the clips
    dropped: list[Clip]  # left out by --drop_unfit


def check_clips(
    listing: Listing,
    selection: Selection,
    notes: Notes,
    *,
    ranks: Ranks,
    everyone: Ranks,
    progress: Callable[..., Iterable],
    check_all: bool = False,
) -> Checked:
    """Returns the windows of the clips; refuses the clips that `encode_dataset` would refuse."""
    examined, selection = examine_clips(
        listing.clips, selection, notes, ranks=ranks, progress=progress, check_all=check_all
    )
    found = list(zip(listing.clips, examined))
    dropped = [clip for clip, of_clip in found if selection.drop_unfit and of_clip.is_unfit]
    problems = [of.problem for _, of in found if of.problem and not (selection.drop_unfit and of.is_unfit)]
    if dropped and not problems and len(dropped) == len(found):
        problems = [ALL_UNFIT]
    _refuse(listing, everyone, listing.problems + problems)
    windows = [(clip, facts) for clip, of_clip in found for facts in of_clip.windows]
    return Checked([clip for clip, _ in windows], [facts for _, facts in windows], selection, dropped)


def unencoded(checked: Checked, latent_shape: Callable) -> Data:
    """Returns the dataset without encoding it: its shapes and facts are real, its files do not exist.

    Args:
        latent_shape: number of frames, height, width -> (f, h, w).
    """
    files = [[Path(f"{of_clip.file.content}-{of_clip.image}")] for of_clip in checked.facts]
    captions = [[Path(caption) for caption in clip.captions] for clip in checked.clips]
    shapes = [(0, *latent_shape(*of_clip.bucket)) for of_clip in checked.facts]  # without the channels
    return _described(checked, CachedClips(files, captions), shapes)


def _refuse(listing: Listing, everyone: Ranks, problems: list[str]) -> None:
    """Raises the problems of all ranks on each of them, if there are any; each problem is listed once.

    Returns on no rank before all have called it, so that what each has written by then is there for all.
    """
    if problems := list(dict.fromkeys(everyone.gather(problems))):
        raise ValueError(list_problems(listing.name, problems, "nothing is trained"))


# ---- what the cache does not hold ------------------------------------------------------------------------------------


def examine_clips(
    clips: list[Clip],
    selection: Selection,
    notes: Notes,
    *,
    ranks: Ranks,
    progress: Callable[..., Iterable],
    check_all: bool,
) -> tuple[list[Examined], Selection]:
    """Returns what is known of each clip, and the selection, fitted to them.

    Each rank reads its share of the files that are not known.
    """
    share = ranks.share(clips)
    new = [clip for clip in share if check_all or not is_known(clip, notes)]
    read = partial(picture_size, notes=notes, read_again=check_all)
    published = time.monotonic()
    with closing(map_ahead(read, new, READING_THREADS)) as looked_at:
        for _ in zip(progress(new, "Reading clips", "clip"), looked_at):
            if time.monotonic() > published + SECONDS_PER_LIST:  # a first start may be stopped after hours
                notes.publish()
                published = time.monotonic()
    notes.publish()
    if not selection.is_fitted:
        sizes = [size for clip in share if (size := picture_size(clip, notes))]
        selection = selection.fitted(ranks.gather(sizes))
    return ranks.gather_shares([examine(clip, selection, notes) for clip in share]), selection


class Probed(NamedTuple):
    """What the cache holds of a clip."""

    paths: list[Path]  # of the cached latents: as filmed, then mirrored if flips were requested
    missing: list[bool]  # for each of the paths
    is_outdated: bool  # its latents are missing, but there are some of frames that decord read


def probe_cache(facts: list[Facts], *, cache: Path, encoder: str, random_flip: bool) -> list[Probed]:
    """Looks up the latents of clips.

    Args:
        encoder: fingerprint of the VAE.
    """
    there, probed = names_in(cache / "latents"), []
    versions = [False, True] if random_flip else [False]
    for of_clip in facts:
        key = of_clip.view.cache_key() | {"video": of_clip.file.content, "encoder": encoder}
        if of_clip.view.with_image and of_clip.image:
            key["image"] = of_clip.image
        if of_clip.mask:
            key["mask"] = of_clip.mask.content
        paths = [cache_path(cache, "latents", **key, mirrored=mirrored) for mirrored in versions]
        missing = [path.name not in there for path in paths]
        older = {name: value for name, value in key.items() if name != "video_decoder"}
        is_outdated = missing[0] and cache_path(cache, "latents", **older, mirrored=False).name in there
        probed.append(Probed(paths, missing, is_outdated))
    return probed


def caption_paths(captions: Iterable[str], cache: Path, encoder: str) -> dict[str, Path]:
    return {caption: cache_path(cache, "captions", caption=caption, encoder=encoder) for caption in captions}


class NewCaption(NamedTuple):
    """A caption to encode, and the file for its embeddings."""

    caption: str
    path: Path
    clip: Clip | None  # the first that has it; None: a validation prompt
    damaged: Damaged | None = None  # what is there

    def problem(self, description: str) -> str:
        if self.clip:
            return self.clip.problem(f"its caption: {description}")
        return f"--validation_prompt {self.caption!r}: {description}"


def missing_captions(clips: list[Clip], captions: dict[str, Path], cache: Path) -> list[NewCaption]:
    there = names_in(cache / "captions")
    first_clips = {caption: clip for clip in reversed(clips) for caption in clip.captions + clip.plain_captions}
    missing = [(caption, path) for caption, path in captions.items() if path.name not in there]
    return [NewCaption(caption, path, first_clips.get(caption)) for caption, path in missing]


class NewLatents(NamedTuple):
    """A clip to encode, and the file for its latents."""

    clip: Clip
    file: File
    view: View
    mirrored: bool
    path: Path
    mask: File | None = None
    damaged: Damaged | None = None  # what is there

    def problem(self, description: str) -> str:
        return self.clip.problem(description)


def missing_latents(clips: list[Clip], facts: list[Facts], probed: list[Probed]) -> list[NewLatents]:
    """Returns what is to be encoded, clips of one size together; a video that is listed twice is encoded once."""
    new = {}
    for clip, of_clip, probe in zip(clips, facts, probed):
        for mirrored, path, missing in zip([False, True], probe.paths, probe.missing):
            if missing:
                latents = NewLatents(clip, of_clip.file, of_clip.view, mirrored, path, of_clip.mask)
                new[path] = of_clip.bucket, latents
    return [latents for _, latents in sorted(new.values(), key=itemgetter(0))]


class Sources(NamedTuple):
    """What the files of the cache are encoded from, and by which encoders."""

    clips: list[Clip]
    facts: list[Facts]  # of each clip
    latents: list[list[Path]]  # of each clip: as filmed, then mirrored
    captions: dict[str, Path]
    video_encoder: "Encoder"
    text_encoder: "Encoder"

    def cached_clips(self, shapes: Sequence[tuple[int, ...]]) -> "CachedClips":
        """Returns the encoded clips; `shapes` are those of their latents."""
        shapes_of, keys = {}, [(shape, bool(of_clip.mask)) for shape, of_clip in zip(shapes, self.facts)]
        for (shape, has_mask), of_clip in zip(keys, self.facts):  # one for all clips of a size
            view = of_clip.view
            others = {"image": (view.height, view.width, 3)} if view.with_image else {}
            others |= {"mask": shape[1:]} if has_mask else {}
            shapes_of.setdefault((shape, has_mask), {"parameters": shape} | others)
        return CachedClips(
            self.latents,
            [[self.captions[caption] for caption in clip.captions] for clip in self.clips],
            latents_shapes=[shapes_of[key] for key in keys],
            caption_shape=self.text_encoder.shape_of(()),
            without_caption=self.captions.get(""),
            plain_captions=[[self.captions[caption] for caption in clip.plain_captions] for clip in self.clips],
        )

    def latents_at(self, damaged: list[Damaged]) -> list[NewLatents]:
        """Returns what the damaged latents among these files are encoded from."""
        there = {entry.path: entry for entry in damaged}
        probed = [Probed(paths, [path in there for path in paths], is_outdated=False) for paths in self.latents]
        new = missing_latents(self.clips, self.facts, probed)
        return [latents._replace(damaged=there[latents.path]) for latents in new]

    def caption_at(self, damaged: Damaged) -> NewCaption | None:
        """Returns the caption whose embeddings are damaged; None if the file is none of them."""
        for caption, path in self.captions.items():
            if path == damaged.path:
                clip = next((clip for clip in self.clips if caption in clip.captions + clip.plain_captions), None)
                return NewCaption(caption, path, clip, damaged)
        return None


# ---- encode ----------------------------------------------------------------------------------------------------------


def encode_missing(
    sources: Sources, probed: list[Probed], cache: Path, *, ranks: Ranks, progress: Callable
) -> list[str]:
    """Encodes this rank's share of what the cache does not hold; returns the problems of what cannot be encoded."""
    new_captions = missing_captions(sources.clips, sources.captions, cache)
    new_latents = missing_latents(sources.clips, sources.facts, probed)
    ranks.wait()  # no rank writes before all know what is missing
    problems = cache_captions(ranks.share(new_captions), sources.text_encoder, progress)
    return problems + cache_latents(ranks.share(new_latents), sources.video_encoder, progress)


def cache_captions(new: list[NewCaption], encoder: "Encoder", progress: Callable) -> list[str]:
    """Encodes captions into one file each; loads the encoder only if there are any.

    Args:
        encoder: encodes captions into embeddings [B, L, D].

    Returns:
        The problems of captions that could not be encoded. The others are stored.
    """
    if not new:
        return []
    batch_size, problems = encoder.at_once(()), []
    with encoder.load() as encode, _written_behind() as write:
        shown = progress(new, "Encoding captions", "caption")  # begins once the model is loaded
        captions = (caption for caption in shown if not is_encoded(caption))
        while batch := list(itertools.islice(captions, batch_size)):
            embeddings = encode(_filled_up([new.caption for new in batch], batch_size))
            for caption, prompt_embeds in zip(batch, embeddings):
                write(_write_caption, problems, caption, prompt_embeds)
    return problems


def is_encoded(new: NewCaption | NewLatents) -> bool:
    """Returns whether another run has encoded a clip or caption meanwhile."""
    stamp = find_stamp(new.path)
    return stamp is not None and (new.damaged is None or stamp != new.damaged.stamp)


def _write_caption(problems: list[str], new: NewCaption, prompt_embeds: torch.Tensor) -> None:
    prompt_embeds = prompt_embeds.cpu()
    if not torch.isfinite(prompt_embeds).all():
        problems.append(new.problem("T5 encodes it to NaN or infinity; train with --mixed_precision bf16"))
        return
    write_entry(new.path, {"prompt_embeds": prompt_embeds})


class Decoded(NamedTuple):
    """A clip between decoding and encoding."""

    new: NewLatents
    frames: torch.Tensor  # uint8 [F, H, W, C]
    image: torch.Tensor | None  # uint8 [H, W, C], to be stored beside the latents
    mask: torch.Tensor | None  # uint8 [F, H, W], to be stored at the latents' size
    damage: str  # what the decoder reported, to be stored as well; empty: nothing
    motion: float | None  # likewise; None for a single frame, and for a mirrored clip


def cache_latents(new: list[NewLatents], encoder: "Encoder", progress: Callable) -> list[str]:
    """Encodes clips into one file each; loads the encoder only if there are any.

    Threads decode the next clips and write the last ones while these are encoded: PyAV, torch and files release the
    interpreter lock, so processes would only add start-up time and a copy of each clip.

    Args:
        new: clips to encode; successive ones of one shape are encoded together.
        encoder: encodes uint8 [B, F, H, W, C] into the parameters of the latents' distribution [B, 2c, f, h, w], mean
            then log-variance.

    Returns:
        The problems of clips that could not be decoded or encoded, in the order of the list. The others are stored.
    """
    if not new:
        return []
    problems = []  # (line, problem), from all threads
    with (
        encoder.load() as encode,
        _written_behind() as write,
        closing(map_ahead(partial(_decode, problems), new, decoding_threads(clip.view for clip in new))) as decoded,
    ):
        clips = (clip for _, clip in zip(progress(new, "Encoding clips", "clip"), decoded) if clip)
        clips = (clip for clip in clips if not is_encoded(clip.new))
        for shape, clips_of_shape in itertools.groupby(clips, key=lambda clip: tuple(clip.frames.shape)):
            batch_size = encoder.at_once(shape)
            while batch := list(itertools.islice(clips_of_shape, batch_size)):
                batch_parameters = encode(torch.stack(_filled_up([clip.frames for clip in batch], batch_size)))
                for clip, parameters in zip(batch, batch_parameters):
                    write(_write_latents, problems, clip, parameters)
    return [problem for _, problem in sorted(problems)]


def _decode(problems: list[tuple[int, str]], new: NewLatents) -> Decoded | None:
    if is_encoded(new):
        return None
    view, damage = new.view, []
    try:
        frames = decode(new.clip, view, mirrored=new.mirrored, file=new.file, damage=damage)
        mask = new.mask and read_mask(new.clip, new.mask, view, mirrored=new.mirrored, file=new.file)
    except ValueError as error:
        problems.append((new.clip.line, str(error)))
        return None
    image = None
    if view.with_image:
        image = first_image(new.clip, frames, view, mirrored=new.mirrored, file=new.file)
    moved = None if new.mirrored else motion(frames, view.fps)  # a mirrored clip moves as much, and is not asked
    return Decoded(new, frames, image, mask, describe_damage(damage) if damage else "", moved)


def _write_latents(problems: list[tuple[int, str]], clip: Decoded, parameters: torch.Tensor) -> None:
    new, parameters = clip.new, parameters.cpu()
    if not torch.isfinite(parameters).all():
        problem = "the VAE encodes it to NaN or infinity; train with --mixed_precision bf16"
        problems.append((new.clip.line, new.clip.problem(problem)))
        return
    others = {} if clip.image is None else {"image": clip.image}
    others |= {} if clip.mask is None else {"mask": latent_mask(clip.mask, *parameters.shape[1:])}
    write_entry(new.path, {"parameters": parameters} | others, clip.damage, motion=clip.motion)


def _filled_up(batch: list, size: int) -> list:
    """Repeats the last item until the batch has the given size, which all batches of an encoder have.

    The last bits of a result depend on the size of its batch. With one size for all, a clip or caption is encoded to
    the same bits whatever the number of ranks, and after an interruption.
    """
    return batch + batch[-1:] * (size - len(batch))


@contextmanager
def _written_behind() -> Iterator[Callable]:
    """Gives `write(function, *arguments)`, which calls the function in a thread.

    What fails there is raised by a later `write`, or at the end of the block.
    """
    pending = deque()
    with ThreadPoolExecutor(1) as thread:

        def write(function: Callable, *arguments) -> None:
            if len(pending) > WRITES_WAITING:
                pending.popleft().result()
            pending.append(thread.submit(function, *arguments))

        yield write
        for written in pending:
            written.result()


# ---- files of the cache ----------------------------------------------------------------------------------------------


def cache_path(cache: Path, kind: str, **content) -> Path:
    """Returns the file for what is computed from `content`, which must hold all that changes the result."""
    return Path(cache, kind, f"{hash_of(content)}.safetensors")


def _wait_for_files(listing: Listing, files: list[Path], everyone: Ranks) -> None:
    """Waits until this machine sees what all ranks have written for the dataset.

    A network disk may show a file late: NFS caches for up to a minute that it does not exist.
    """
    if len(set(everyone.gather([hash_of([path.name for path in files])]))) > 1:
        raise ValueError(
            f"{listing.name}: the machines of this run see different clips or captions there; copy one to all machines"
        )
    there = {folder: names_in(folder) for folder in {path.parent for path in files}}
    for path in (path for path in files if path.name not in there[path.parent]):
        deadline = time.monotonic() + SECONDS_TO_APPEAR
        while not path.exists():
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{path}: another process has written this file, but this machine does not see it after "
                    f"{SECONDS_TO_APPEAR} s; start again (what has been encoded is kept), or put --latents_cache_dir "
                    "on another disk"
                )
            time.sleep(0.5)


def names_in(folder: Path) -> set[str]:
    """Returns the names of the files in a folder, which need not exist."""
    return set(os.listdir(folder)) if folder.is_dir() else set()


def sizes_in(folder: Path) -> dict[str, int]:
    """Returns the names and sizes in bytes of the files in a folder, which need not exist."""
    if not folder.is_dir():
        return {}
    sizes = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                with suppress(FileNotFoundError):  # removed meanwhile by `clean`
                    sizes[entry.name] = entry.stat().st_size
    return sizes


def latents_headers(paths: list[Path], notes: Notes, ranks: Ranks) -> list[Header | Damaged]:
    """Returns `read_header` of each file; each rank reads its share of the files that are not known."""
    there = {folder: sizes_in(folder) for folder in {path.parent for path in paths}}
    headers = []
    for path in ranks.share(paths):
        key = ["latents", path.name, there[path.parent].get(path.name)]
        if note := notes.get(key):
            shape, damage = note
            header = Header(tuple(shape), damage, notes.get([*key, MOTION]))
        else:
            header = read_header(path)
        if not isinstance(header, Damaged):
            notes.add(key, header[:2])  # all that earlier versions know
            if header.motion is not None:
                notes.add([*key, MOTION], header.motion)
        headers.append(header)
    notes.publish()
    return ranks.gather_shares(headers)


# ---- damaged files of the cache --------------------------------------------------------------------------------------


def sound_headers(
    sources: Sources, notes: Notes, listing: Listing, *, ranks: Ranks, everyone: Ranks, progress: Callable
) -> list[Header]:
    """Returns the shape and the damage of each clip's latents; encodes damaged ones again."""
    encoder, paths = sources.video_encoder, [paths[0] for paths in sources.latents]
    shapes = [encoder.shape_of((*of_clip.bucket, 3)) for of_clip in sources.facts]
    expected, headers = dict(zip(paths, shapes)), dict(zip(paths, latents_headers(paths, notes, ranks)))
    again = sources.latents_at(damaged_headers(headers, expected))
    for new in again if ranks.index == 0 else []:
        say_encoded_again(new)
    _refuse(listing, everyone, cache_latents(ranks.share(again), encoder, progress))
    paths_again = [new.path for new in again]  # in this order each rank reads what it has written
    headers |= zip(paths_again, latents_headers(paths_again, notes, ranks))
    still = [f"{entry.path} is damaged ({entry.reason}), {AT_ONCE}" for entry in damaged_headers(headers, expected)]
    _refuse(listing, everyone, still)
    return [headers[path] for path in paths]


def damaged_headers(headers: dict[Path, Header | Damaged], expected: dict[Path, tuple | None]) -> list[Damaged]:
    """Returns the files whose header cannot be read or tells another shape than the expected one."""
    damaged = []
    for path, header in headers.items():
        if isinstance(header, Damaged):
            damaged.append(header)
        elif expected[path] and header.shape != expected[path]:
            reason = f"parameters has the shape {list(header.shape)} instead of {list(expected[path])}"
            damaged.append(Damaged(path, reason, find_stamp(path)))
    return damaged


def say_encoded_again(new: NewCaption | NewLatents, before: str = "") -> None:
    line = new.problem(f"{new.path} is damaged ({new.damaged.reason}); it is encoded again")
    print(f"{before}{line}", file=sys.stderr, flush=True)


def encode_again(sources: Sources, damaged: Damaged) -> None:
    """Encodes a damaged file of the cache again, in the middle of a run, to the same bits as at its start.

    Raises:
        CannotContinue: the clip is no longer what it was, or cannot be encoded now.
    """
    new = sources.caption_at(damaged) or sources.latents_at([damaged])[0]
    say_encoded_again(new, before="\n")  # below the progress bar
    try:
        if isinstance(new, NewCaption):
            problems = cache_captions([new], sources.text_encoder, lambda items, *_: items)
        else:
            problems = _encode_unchanged(sources, new)
    except (OSError, ValueError, MemoryError, RuntimeError) as error:  # RuntimeError: PyTorch is out of memory
        problems, cause = [new.problem(f"{type(error).__name__}: {error}")], error
    else:
        cause = None
    if problems:
        with suppress(OSError):  # in a cache that cannot be written
            discard(damaged)
        raise CannotContinue(
            f"{damaged.path} is damaged ({damaged.reason}), and cannot be encoded again now: {problems[0]}. Put that "
            "right, and start again with --resume_from_checkpoint auto, which encodes it before the transformer is "
            "loaded; what is saved stays"
        ) from cause


def _encode_unchanged(sources: Sources, new: NewLatents) -> list[str]:
    """Encodes latents again; returns a problem if the clip is not the one that it was at the start."""
    try:
        files = look_at_files(new.clip, Notes(), read_again=True)
        facts = facts_of(new.clip.video, files.video, new.view)._replace(image=files.image, mask=files.mask)
    except ValueError as error:
        return [str(error)]
    cache, encoder = new.path.parents[1], sources.video_encoder
    (probed,) = probe_cache([facts], cache=cache, encoder=encoder.fingerprint, random_flip=True)
    if new.path not in probed.paths:
        return [new.problem("has changed since the start of this run")]
    return cache_latents([new._replace(file=facts.file, mask=facts.mask)], encoder, lambda items, *_: items)


# ---- micro-batches ---------------------------------------------------------------------------------------------------


class CachedClips(torch.utils.data.Dataset):
    """Encoded clips, read from disk by the items of `clips.order`.

    What is read has its latents' "parameters" [2c, f, h, w], its caption's "prompt_embeds" [L, D], and, if it was
    stored, the "image" that the clip starts from, uint8 [H, W, C]; or it is the first of its files that is damaged.
    A clip with a mask has its "mask" [f, h, w], from 0 to 1. Where there are plain captions, it has
    "plain_prompt_embeds" [L, D] as well. A file is verified when it is first read.
    """

    def __init__(
        self,
        latents: list[list[Path]],
        captions: list[list[Path]],
        latents_shapes: Sequence[Shapes] = (),
        caption_shape: tuple[int, ...] | None = None,
        without_caption: Path | None = None,
        plain_captions: list[list[Path]] = (),
    ):
        """Takes the files of each clip, and the shapes of what they hold, none where there are no such files."""
        self.latents, self.captions, self.without_caption = latents, captions, without_caption
        self.plain_captions = plain_captions if any(plain_captions) else ()
        self.latents_shapes, self.caption_shape = latents_shapes, caption_shape
        self.verified = set()  # by this process

    def take(self, clips: Sequence[int]) -> "CachedClips":
        """Returns some of the clips, in this order."""
        shapes = [self.latents_shapes[clip] for clip in clips] if self.latents_shapes else ()
        files = [self.latents[clip] for clip in clips], [self.captions[clip] for clip in clips]
        plain = [self.plain_captions[clip] for clip in clips] if self.plain_captions else ()
        shared = {"caption_shape": self.caption_shape, "without_caption": self.without_caption}
        return CachedClips(*files, latents_shapes=shapes, plain_captions=plain, **shared)

    def without_plain_captions(self) -> "CachedClips":
        clips = self.take(range(len(self.latents)))
        clips.plain_captions = ()
        return clips

    def __getitem__(self, item: Item) -> dict[str, torch.Tensor] | Damaged:
        clip, mirrored, caption = item
        latents = self._read(self.latents[clip][mirrored], self.latents_shapes[clip])
        paths = {"prompt_embeds": self.captions[clip]}
        if self.plain_captions:
            paths["plain_prompt_embeds"] = self.plain_captions[clip]
        is_dropped = caption == WITHOUT_CAPTION
        embeds = {
            name: self.read_caption(self.without_caption if is_dropped else of_captions[caption])
            for name, of_captions in paths.items()
        }
        damaged = next((read for read in (latents, *embeds.values()) if isinstance(read, Damaged)), None)
        return damaged or latents | embeds

    def read_caption(self, path: Path) -> torch.Tensor | Damaged:
        read = self._read(path, {"prompt_embeds": self.caption_shape})
        return read if isinstance(read, Damaged) else read["prompt_embeds"]  # [L, D]

    def _read(self, path: Path, shapes: Shapes) -> dict[str, torch.Tensor] | Damaged:
        read = read_entry(path, shapes, verify=path not in self.verified)
        if not isinstance(read, Damaged):
            self.verified.add(path)
        return read


def stacked(items: list[dict[str, torch.Tensor] | Damaged]) -> dict[str, torch.Tensor] | Damaged:
    """Returns a batch, or the first damaged file that one of its items needs.

    It has a "mask" if one of the clips has one; of the others everything counts.
    """
    damaged = next((item for item in items if isinstance(item, Damaged)), None)
    if damaged:
        return damaged
    if any("mask" in item for item in items):
        items = [{"mask": torch.ones(item["parameters"].shape[1:])} | item for item in items]
    return torch.utils.data.default_collate(items)


def micro_batches(
    data: Data,
    order: Order,
    timeline: Timeline,
    ranks: Ranks,
    *,
    num_workers: int,
    in_worker: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Yields (number, batch) of this rank without end; a batch holds items of `CachedClips`, stacked.

    What is found damaged while reading ahead is encoded again when its batch is asked for, in the caller's thread.

    Args:
        in_worker: called at the start of each of the `num_workers` processes.
    """
    numbers = partial(itertools.count, timeline.first_batch + ranks.index, ranks.count)
    loader = torch.utils.data.DataLoader(
        data.clips,
        batch_sampler=order.batches(numbers()),
        collate_fn=stacked,
        num_workers=num_workers,
        worker_init_fn=in_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # the default would draw from the global generator
    )
    read = zip(numbers(), loader)
    # A thread reads the next batch while the GPU computes with this one.
    for number, batch in map_ahead(lambda _: next(read), itertools.repeat(None), threads=1):
        if isinstance(batch, Damaged):
            _, batch = data.micro_batch(number, order)
        yield number, batch


if __name__ == "__main__":
    programs = {"preview": "pages.preview", "check": "clips.check", "export": "clips.export", "clean": "clips.clean"}
    usage = "python dataset.py {preview,check,export,clean} FOLDER [options]   (see python dataset.py check --help)"
    parser = argparse.ArgumentParser(usage=usage, description="Shows and checks what a model will see of a dataset.")
    parser.add_argument("command", choices=list(programs))
    command = parser.parse_args(sys.argv[1:2]).command
    del sys.argv[1]
    runpy.run_module(programs[command], run_name="__main__")  # not imported: imports run down only
