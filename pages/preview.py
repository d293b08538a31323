"""Shows what the model will see of a dataset, as one page: `python dataset.py preview FOLDER [data options]`.

preview_template.html.jinja holds the markup, and the script that plays, sorts and filters the clips.
"""

import argparse
import base64
import io
import os
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from clips import check, masks, selection
from clips.check import Seen
from clips.facts import (
    LEAST_CUT,
    LEAST_UNSEEN_SECONDS,
    Facts,
    brightness,
    count_clips,
    describe_cuts,
    grouped,
    repetitions,
    unseen_seconds,
    windows_by_clip,
)
from clips.frames import View, choose_source, first_image, seen_rectangle
from clips.listing import Clip
from clips.motion import split_command
from clips.selection import Selection
from clips.video import read_pictures
from cogvideox.base_model import BaseModel, check_training, load_tokenizer, read_base_model
from cogvideox.encoders import cut_caption
from files import at_least, expanded_path, parse_options, publish, run_command
from pages.template import load_template

TEMPLATE = "preview_template.html.jinja"
MOST_CLIPS = 1000  # on a page that a browser opens at once
# Up to how many clips: frames in a film, among them the first and the last, and their longest side in pixels.
# A page of 1,000 clips takes about 35 MB, and 50 where all are full of fine detail.
FILMS = ((30, 17, 288), (120, 17, 224), (400, 12, 160), (MOST_CLIPS, 10, 112))
QUALITY = 82  # of JPEG
STILL = "is a still: none of the frames that the model sees changes"
DIMMED = 0.25  # of its brightness is left


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    about = "Shows what a model will see of a dataset, as one HTML page."
    parser = argparse.ArgumentParser("python dataset.py preview", description=about, allow_abbrev=False)
    path = expanded_path
    check.add_options(parser, flips=True)
    page = parser.add_argument_group("page").add_argument
    clips = "show at most N clips, evenly spaced in the list"
    page("--output", type=path, metavar="FILE", help=".html file to write (default: preview.html in the first FOLDER)")
    page("--clips", type=at_least(1), default=MOST_CLIPS, metavar="N", help=clips)
    model = parser.add_argument_group("base model, to check its limits and where it cuts captions off").add_argument
    model("--pretrained_model_name_or_path", metavar="NAME", help="CogVideoX folder or hub name; no weights are read")
    model("--revision", help="branch, tag or commit of the hub repository")
    model("--cache_dir", type=path, help="folder for downloads (default: huggingface_hub's)")
    args = parse_options(parser, argv)
    args.output = args.output or args.folders[0].path / "preview.html"
    selection.check_options(args, parser.error)
    masks.check_options(args, parser.error)
    return parser, args


def check_output(path: Path) -> None:
    """Refuses a file that cannot be written, before anything is decoded."""
    remedy = "pass another file as --output"
    if path.suffix.lower() != ".html":
        raise ValueError(f"--output {path}: the page is a .html file; {remedy}")
    if path.is_dir():
        raise ValueError(f"--output {path}: is a folder; {remedy}")
    if not path.parent.is_dir():
        raise ValueError(f"--output {path}: no folder {path.parent}; {remedy}")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--output {path}: {path.parent} is not writable; {remedy}")


def base_of(args: argparse.Namespace) -> BaseModel | None:
    """Returns the base model, if one is named; refuses one that cannot be trained with these options."""
    if not args.pretrained_model_name_or_path:
        return None
    base = read_base_model(args.pretrained_model_name_or_path, revision=args.revision, cache_dir=args.cache_dir)
    image_options = ["--image_column"] if args.image_column else []
    check_training(base, torch.bfloat16, selection_of(args, base).by_option, image_options=image_options)
    return base


def selection_of(args: argparse.Namespace, base: BaseModel | None) -> Selection:
    if not base:
        return selection.selection_of(args, with_image=False, whole=False)
    return selection.selection_of(
        args, with_image=base.takes_image, whole=base.fixed_size is not None, largest_size=base.largest_size
    )


# ---- pictures --------------------------------------------------------------------------------------------------------


class Pictures(NamedTuple):
    """What the page shows and measures of a clip, made from the frames that the model sees."""

    film: bytes  # JPEG of some of them, side by side
    film_frames: int
    uncropped: bytes  # JPEG of the first of them, before it is cropped
    image: bytes | None  # JPEG of the image that the video starts from
    brightness: float


def evenly_spaced(count: int, limit: int) -> list[int]:
    """Returns at most `limit` of the indices below `count`, among them the first and the last."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, limit))})


def film_size(num_clips: int) -> tuple[int, int]:
    """Returns how many frames a film has and their longest side in pixels, on a page of so many clips."""
    return next((size for most, *size in FILMS if num_clips <= most), FILMS[-1][1:])


def draw(
    clip: Clip, facts: Facts, seen_frames: torch.Tensor, mask: torch.Tensor | None = None, *, num_frames: int, side: int
) -> Pictures:
    """Returns the pictures of a window.

    Args:
        seen_frames: the frames that the model sees, uint8 [F, H, W, C].
        mask: uint8 [F, H, W]; what is black in it is dimmed in the film.
    """
    view, numbers = facts.view, evenly_spaced(len(seen_frames), num_frames)
    film_frames = seen_frames[numbers]
    if mask is not None:
        film_frames = dimmed(film_frames, mask[numbers])
    shown = [thumbnail(frame.numpy(), side) for frame in film_frames]
    width, height = shown[0].size
    film = Image.new("RGB", (width * len(shown), height))
    for number, frame in enumerate(shown):
        film.paste(frame, (number * width, 0))
    image = None
    if view.with_image and clip.image:
        image = jpeg(thumbnail(first_image(clip, seen_frames, view, mirrored=False, file=facts.file).numpy(), side))
    return Pictures(
        film=jpeg(film),
        film_frames=len(shown),
        uncropped=jpeg(uncropped_picture(clip, facts, view, side)),
        image=image,
        brightness=brightness(seen_frames),
    )


def dimmed(frames: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns frames, uint8 [F, H, W, C], darker where a mask, uint8 [F, H, W], is black."""
    light = DIMMED + (1 - DIMMED) * mask[..., None].float() / 255
    return (frames * light).round().byte()


def uncropped_picture(clip: Clip, facts: Facts, view: View, side: int) -> Image.Image:
    """Returns the first picture that is seen, with what is cropped away, as a player shows it."""
    video, _, times, _ = choose_source(clip.video, facts.file, view._replace(video_decoder="pyav"))
    picture = Image.fromarray(np.ascontiguousarray(next(read_pictures(clip.video, video, times[:1], []))))
    scale = side / max(video.width, video.height)
    return picture.resize((max(1, round(video.width * scale)), max(1, round(video.height * scale))))


def thumbnail(frame: np.ndarray, side: int) -> Image.Image:
    """Returns a frame [H, W, C] as a picture whose longest side is at most `side`."""
    picture = Image.fromarray(frame)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def jpeg(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=QUALITY)
    return content.getvalue()


# ---- cards -----------------------------------------------------------------------------------------------------------


class Range(NamedTuple):
    """Where most clips are, for a value of each."""

    lowest: float
    low: float  # a tenth of the clips is below
    high: float  # a tenth is above
    highest: float

    def place(self, value: float) -> float:
        """Returns where between the lowest and the highest a value is, in percent."""
        width = self.highest - self.lowest
        return 50.0 if not width else 100 * (value - self.lowest) / width


def range_of(values: list[float]) -> Range | None:
    return Range(*np.percentile(values, [0, 10, 90, 100]).tolist()) if values else None


def url(picture: bytes | None) -> str | None:
    return picture and f"data:image/jpeg;base64,{base64.b64encode(picture).decode()}"


def problems_of(seen: Seen) -> list[str]:
    return [*seen.clip.problems, *filter(None, [seen.problem])]


def cards(all_seen: list[Seen], captions: dict[int, dict], most_problems: int) -> list[dict]:
    """Returns what the page shows of each window that was drawn, and of the first clips that have only problems.

    Args:
        captions: `caption_of` each clip, by its place in the listing.
        most_problems: how many clips without pictures are shown for their problems.
    """
    usable = [seen for seen in all_seen if seen.facts and not seen.problem]
    first = [seen for seen in usable if not seen.facts.window]
    remarks = remarks_by_clip([seen.clip for seen in first], [seen.facts for seen in first])
    measured = [seen.made for seen in usable if seen.made]
    motions = range_of([seen.facts.motion for seen in usable if seen.made and seen.facts.motion is not None])
    levels = range_of([made.brightness for made in measured])
    windows = windows_by_clip([seen.facts for seen in usable])
    unseen = {id(facts): unseen_seconds(of_clip) for of_clip in windows for facts in of_clip}
    num_windows = {id(facts): len(of_clip) for of_clip in windows for facts in of_clip}
    shown, without_pictures = [], 0
    for seen in all_seen:
        problems = problems_of(seen)
        if not seen.made and (not problems or without_pictures == most_problems):
            continue
        without_pictures += not seen.made
        video = seen.clip.video
        card = {
            "number": seen.clip.line,
            "place": seen.clip.place,
            "file": video.name,
            "folder": str(video.parent),
            "problems": problems,
            "film": None,  # where there are no pictures
        }
        card |= captions[seen.clip.line]
        if seen.made:
            card["remarks"] = remarks[seen.clip.line] + [STILL] * seen.facts.is_still
            card["is_masked"] = seen.facts.mask is not None
            card["cuts"] = cuts_of(seen.clip, seen.facts)
            card |= picture_of(seen.facts, seen.made) | time_of(seen.facts, seen.clip, unseen[id(seen.facts)])
            card["window"], card["windows"] = seen.facts.window + 1, num_windows[id(seen.facts)]
            card["measures"] = [
                measure("motion", seen.facts.motion, motions, "levels of 255 per second"),
                measure("brightness", seen.made.brightness, levels, "of 255"),
            ]
        shown.append(card)
    return shown


def remarks_by_clip(clips: list[Clip], facts: list[Facts]) -> dict[int, list[str]]:
    """Returns what is remarkable about each clip, by its place in the listing.

    Args:
        facts: those of the first window of each clip.
    """
    found = {
        clip.line: [*of_clip.file.video.remarks, *filter(None, [of_clip.damage])] for clip, of_clip in zip(clips, facts)
    }
    for kind, groups in repetitions(clips, facts).items():
        for group in groups:
            for clip in group:
                other = next(other for other in group if other is not clip)
                more = f" and {len(group) - 2} more" if len(group) > 2 else ""
                found[clip.line].append(f"has the same {kind} as {other.named}{more}")
    for clip, of_clip in zip(clips, facts):
        if of_clip.num_distinct < of_clip.num_seen:
            found[clip.line].append("has fewer frames per second than the model sees, so some are seen twice")
    return found


def cuts_of(clip: Clip, facts: Facts) -> dict | None:
    """Returns a sentence on the cuts in a window, and the command that splits the file there; None without cuts."""
    if not facts.cuts:
        return None
    return {"text": describe_cuts(facts.cuts), "command": split_command(clip.video, facts.file.video, facts.cuts)}


def captions_of(clips: list[Clip], base: BaseModel | None) -> dict[int, dict]:
    """Returns `caption_of` each clip, by its place in the listing."""
    tokenizer = load_tokenizer(base) if base else None
    return {clip.line: caption_of(clip, tokenizer, base) for clip in clips}


def caption_of(clip: Clip, tokenizer, base: BaseModel | None) -> dict:
    """Returns a clip's caption in the part that the model reads and the part that is cut off, and its tokens."""
    if not tokenizer:
        return {"read": clip.caption, "cut_off": "", "tokens": None, "others": clip.other_captions}
    num_tokens, cut_off = cut_caption(tokenizer, clip.caption, base.transformer["max_text_seq_length"])
    read = clip.caption[: clip.caption.rindex(cut_off)] if cut_off else clip.caption
    return {"read": read, "cut_off": cut_off, "tokens": num_tokens, "others": clip.other_captions}


def picture_of(facts: Facts, made: Pictures) -> dict:
    """Returns a window's pictures, and what of the file's picture the model sees."""
    cropped, scale, view = facts.cropped, facts.scale, facts.view
    left, top, width, height = (100 * share for share in seen_rectangle(facts.file, view))
    return {
        "film": url(made.film),
        "film_frames": made.film_frames,
        "uncropped": url(made.uncropped),
        "uncropped_aspect": f"{facts.width} / {facts.height}",
        "image": url(made.image),
        "rectangle": f"left:{left:.2f}%;top:{top:.2f}%;width:{width:.2f}%;height:{height:.2f}%",
        "cropped": 100 * cropped if cropped >= LEAST_CUT else 0,
        "scale": 100 * scale,
        "bucket": str(facts.bucket),
        "aspect": f"{view.width} / {view.height}",
    }


def time_of(facts: Facts, clip: Clip, unseen: float) -> dict:
    """Returns which part of a clip's time the model sees, in percent of it, and its lengths in seconds and frames.

    Args:
        unseen: seconds that are in no window of the clip.
    """
    view, source = facts.view, choose_source(clip.video, facts.file, facts.view)
    begin = float(source.file_seconds[source.indices[0]])
    seconds = max(facts.seconds, facts.seen_until)
    return {
        "size": f"{facts.width}x{facts.height}",
        "fps": facts.fps,
        "seconds": facts.seconds,
        "num_frames": facts.num_frames,
        "num_seen": facts.num_seen,
        "seen_fps": view.fps,
        "seen_seconds": facts.num_seen / view.fps,
        "skipped": begin if begin >= LEAST_UNSEEN_SECONDS and not view.start else 0,
        "seen_from": 100 * begin / seconds,
        "seen_share": 100 * (facts.seen_until - begin) / seconds,
        "cut_at": [100 * cut / seconds for cut in facts.cuts],
        "unseen": unseen if unseen >= LEAST_UNSEEN_SECONDS else 0,
    }


def measure(name: str, value: float | None, among: Range | None, unit: str) -> dict:
    """Returns a value of a clip, and where it is among those of all clips."""
    if value is None:
        return {"name": name, "value": None, "unit": unit}
    low, high = among.place(among.low), among.place(among.high)
    return {
        "name": name,
        "value": value,
        "unit": unit,
        "lowest": among.lowest,
        "highest": among.highest,
        "at": among.place(value),
        "low": low,
        "width": high - low,
    }


# ---- the page --------------------------------------------------------------------------------------------------------


def spread(facts: list[Facts]) -> list[str]:
    """Returns lines on how often each size, rate and length occurs."""
    files = [fact for fact in facts if not fact.window]
    sizes = Counter(f"{fact.width}x{fact.height}" for fact in files)
    rates = Counter(f"{round(fact.fps, 2):g}" for fact in files)
    seconds = [fact.seconds for fact in files]
    buckets = Counter(str(fact.bucket) for fact in facts)
    return [
        f"pixels: {_counts(sizes)}",
        f"fps: {_counts(rates)}",
        f"seconds: {min(seconds):.1f} to {max(seconds):.1f}, {sum(seconds):.0f} in all",
        f"buckets: {_counts(buckets)}",
    ]


def _counts(counter: Counter, limit: int = 8) -> str:
    parts = [f"{count} of {value}" for value, count in counter.most_common(limit)]
    if len(counter) > limit:
        parts.append(f"{len(counter) - limit} others")
    return ", ".join(parts)


def cut_captions(captions: list[dict], base: BaseModel | None) -> str:
    """Returns a line on the captions that are longer than the model reads."""
    if not base:
        return "captions: length not checked; pass --pretrained_model_name_or_path for its tokenizer"
    too_long, longest = sum(bool(caption["cut_off"]) for caption in captions), max(c["tokens"] for c in captions)
    length = base.transformer["max_text_seq_length"]
    return f"captions: {too_long} longer than {length} tokens; the longest has {longest}"


def read(args: argparse.Namespace, clips: list[Clip], chosen: Selection) -> tuple[list[Seen], Selection]:
    """Examines all clips, and draws the windows that the page shows."""
    examined, chosen = check.examine_all(clips, chosen)
    all_seen = check.unseen(clips, examined, chosen)
    drawn = evenly_spaced(len(all_seen), args.clips) if all_seen else []
    num_frames, side = film_size(len(drawn))
    make = partial(draw, num_frames=num_frames, side=side)
    for number, seen in zip(drawn, check.see([all_seen[i] for i in drawn], make=make, damaged=args.allow_damaged)):
        all_seen[number] = seen
    return check.refused_whole(all_seen), chosen


def write_page(output: Path, page: str) -> None:
    try:
        publish(output, page.encode(errors="replace"))  # a file's name need not be text
    except OSError as error:
        raise ValueError(f"--output {output}: cannot be written ({error.strerror}); pass another file") from error


def preview(args: argparse.Namespace) -> None:
    """Writes the page, and prints its summary; raises a ValueError that lists the problems, if there are any."""
    listed = check.listing_of(args)
    check_output(args.output)
    base = base_of(args)
    all_seen, chosen = read(args, listed.clips, selection_of(args, base))
    captions = captions_of(listed.clips, base)
    shown = cards(all_seen, captions, most_problems=args.clips)
    on_cards = {problem for card in shown for problem in card["problems"]}
    others = [problem for problem in check.all_problems(listed, all_seen) if problem not in on_cards]
    facts = [seen.facts for seen in all_seen if seen.facts and not seen.problem]
    lines = check.describe(listed, all_seen, chosen)
    if lines and base:
        lines += base.remarks(chosen.by_option, chosen.view.fps)
    spread_lines = [*spread(facts), cut_captions(list(captions.values()), base)] if facts else []
    page = load_template(TEMPLATE).render(
        name=listed.name,
        about=" · ".join(filter(None, [base and base.describe(), time.strftime("page made %Y-%m-%d %H:%M")])),
        layouts=listed.describe().splitlines(),
        lines=lines[1:],
        spread=[line.split(": ", 1) for line in spread_lines],
        problems=grouped(others),
        cards=shown,
        num_windows=len(all_seen),
        mirrored=args.random_flip,
        max_tokens=base and base.transformer["max_text_seq_length"],
    )
    write_page(args.output, page)
    for line in lines + spread_lines:
        print(line)
    left_out = f", {len(all_seen) - len(shown)} left out (--clips)" if len(all_seen) > len(shown) else ""
    print(f"{args.output}: {count_clips(len(shown))}{left_out}, {len(page) / 1e6:.1f} MB; open it in a browser")
    check.refuse_problems(listed, all_seen, "training refuses it")


def main(argv: list[str] | None = None) -> None:
    parser, args = parse_args(argv)
    run_command(parser, lambda: preview(args))


if __name__ == "__main__":
    main()
