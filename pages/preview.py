"""What the model will see of a dataset, as a picture and a table.

python dataset.py preview FOLDER [the data options of the training]
"""

import argparse
import io
import os
import sys
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

from clips import frames, listing
from clips.facts import Facts, count_clips, examine, headline, list_problems, remarks
from clips.frames import View, decode, first_image
from clips.listing import Clip, read_clips
from cogvideox.base_model import BaseModel, check_training, load_tokenizer, read_base_model
from cogvideox.encoders import cut_caption
from files import at_least, expanded_path, parse_options, publish

NUM_FRAMES = 5  # of each clip, first and last among them
CELL, GAP, MARGIN = 240, 6, 16  # pixels: a frame's longest side in the sheet, between frames, around rows
LEAST_WIDTH = 900  # pixels, for the captions of small frames
SIZE, SMALL = 16, 12  # of letters, pixels
CAPTION_LINES = 4
INK, FAINT, PAPER, RULE = (20, 20, 20), (120, 120, 120), (255, 255, 255), (225, 225, 225)

# Pillow finds them by name where a system keeps its fonts. The first has most alphabets, the others CJK.
FONTS = (
    "DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "NotoSansSC-Regular.otf",
    "SourceHanSansCN-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf",
    "Arial Unicode.ttf", "Hiragino Sans GB.ttc", "msyh.ttc", "arial.ttf",
)  # fmt: skip


class Row(NamedTuple):
    """A clip in the sheet."""

    cells: list[tuple[str, Image.Image]]  # what is written beneath, and the picture
    title: str
    caption: str


# ---- options ---------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    about = "Shows what a model will see of a dataset: prints a table of its clips, and draws some of them."
    parser = argparse.ArgumentParser("python dataset.py preview", description=about, allow_abbrev=False)
    path = expanded_path
    parser.add_argument("folder", type=path, metavar="FOLDER", help="with the two list files and the videos")
    data = parser.add_argument_group("data")
    listing.add_options(data)
    frames.add_options(data)
    data.add_argument("--seed", type=at_least(0), default=42, help="decides where --video_reshape_mode random cuts")
    sheet = parser.add_argument_group("picture").add_argument
    sheet("--output", type=path, metavar="FILE", help="a .png (default: preview.png in FOLDER)")
    sheet("--clips", type=at_least(1), default=40, metavar="N", help="draw at most N, evenly over the list")
    model = parser.add_argument_group("model, to see what it refuses and where its captions end").add_argument
    model("--pretrained_model_name_or_path", metavar="NAME", help="CogVideoX folder or hub name; no weights are read")
    model("--revision", help="branch, tag or commit of the hub repository")
    model("--cache_dir", type=path, help="folder for downloads (default: that of huggingface_hub)")
    args = parse_options(parser, argv)
    args.output = args.output or args.folder / "preview.png"
    frames.check_options(args, parser.error)
    return parser, args


def check_output(path: Path) -> None:
    """Refuses a file that cannot be written, before anything is decoded."""
    rule = "give another file with --output"
    if path.suffix.lower() != ".png":
        raise ValueError(f"--output {path}: the picture is a .png; {rule}")
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"--output {path}: {'is a folder' if path.is_dir() else f'no folder {path.parent}'}; {rule}")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--output {path}: {path.parent} is not writable; {rule}")


def read_base(args: argparse.Namespace) -> BaseModel | None:
    """What is to be trained, if it is given and can be trained with these options."""
    if not args.pretrained_model_name_or_path:
        return None
    base = read_base_model(args.pretrained_model_name_or_path, revision=args.revision, cache_dir=args.cache_dir)
    image_options = ["--image_column"] if args.image_column else []
    check_training(base, torch.bfloat16, args.max_num_frames, args.height, args.width, image_options)
    return base


# ---- the table -------------------------------------------------------------------------------------------------------


def table(root: Path, clips: list[Clip], facts: list[Facts | None], view: View) -> list[str]:
    """A line per clip; columns are as wide as what stands in them."""
    rows = [("line", "file", "pixels", "fps", "seconds", "frames", "end unseen", "cropped", "scaled")]
    for clip, fact in zip(clips, facts):
        cells = _describe(fact, view) if fact else ("cannot be used: see below", *[""] * 6)
        rows.append((str(clip.line), _name(root, clip.video), *cells))
    usable = [row for row, fact in zip(rows, [True, *facts]) if fact]
    widths = [max(map(_columns, column)) for column in zip(*[row[:2] for row in rows])]
    widths += [max(map(_columns, column)) for column in zip(*[row[2:] for row in usable])]
    return ["  ".join(map(_pad, row, widths, range(len(row)))).rstrip() for row in rows]


def _pad(cell: str, width: int, column: int) -> str:
    space = " " * (width - _columns(cell))
    return cell + space if column == 1 else space + cell


def _columns(text: str) -> int:
    """How many places of a terminal a text takes: a Chinese character takes two."""
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)


def _describe(fact: Facts, view: View) -> tuple[str, ...]:
    scale, unseen = fact.scale(view), fact.unseen_seconds
    return (
        f"{fact.width}x{fact.height}",
        f"{round(fact.fps, 2):g}",
        f"{fact.seconds:.2f}",
        f"{fact.num_frames} -> {len(fact.indices)}",
        f"{unseen:.2f} s" if unseen >= 0.005 else "-",
        f"{100 * fact.cropped(view):.0f} %" if fact.cropped(view) >= 0.005 else "-",
        f"{'up ' * (scale > 1)}to {100 * scale:.0f} %" if scale != 1 else "-",
    )


def _name(root: Path, video: Path) -> str:
    """As it stands in the list, for most lists."""
    return str(video.relative_to(root)) if video.is_relative_to(root) else str(video)


def spread(facts: list[Facts]) -> list[str]:
    """How often each size and rate is there, and how long the files are."""
    sizes = Counter(f"{fact.width}x{fact.height}" for fact in facts)
    rates = Counter(f"{round(fact.fps, 2):g}" for fact in facts)
    seconds = [fact.seconds for fact in facts]
    buckets = Counter(len(fact.indices) for fact in facts)
    return [
        f"pixels: {_counts(sizes)}",
        f"fps: {_counts(rates)}",
        f"seconds: {min(seconds):.1f} to {max(seconds):.1f}, {sum(seconds):.0f} together",
        f"frames that are trained together: {_counts(buckets)}",
    ]


def _counts(counter: Counter, most: int = 8) -> str:
    parts = [f"{count} of {value}" for value, count in counter.most_common(most)]
    return ", ".join(parts) + (f", {len(counter) - most} others" if len(counter) > most else "")


def cut_captions(clips: list[Clip], base: BaseModel | None) -> list[str]:
    """Which captions are longer than the model reads, and exactly what is cut off of them."""
    if not base:
        return ["captions: length not checked; pass --pretrained_model_name_or_path for its tokenizer"]
    tokenizer, most = load_tokenizer(base), base.transformer["max_text_seq_length"]
    lengths = [(clip.line, *cut_caption(tokenizer, clip.caption, most)) for clip in clips]
    long = [f"  line {line}: {tokens} tokens, cut off: {cut}" for line, tokens, cut in lengths if cut]
    longest = max((tokens for _, tokens, _ in lengths), default=0)
    return [f"captions: {len(long)} longer than {most} tokens; the longest has {longest}", *long]


# ---- the picture -----------------------------------------------------------------------------------------------------


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of `count` places, first and last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


def thumbnail(frame: torch.Tensor) -> Image.Image:
    """A frame [H, W, C], smaller if its longest side is above CELL."""
    image = Image.fromarray(frame.numpy())
    scale = CELL / max(image.size)
    if scale >= 1:
        return image
    return image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS)


def draw_row(root: Path, clip: Clip, fact: Facts, view: View, random_flip: bool) -> Row:
    """Frames as training encodes them; the image that it starts from before, a mirrored one behind.

    Raises:
        ValueError: the video stops in the middle of decoding.
    """
    shown = decode(clip, view, mirrored=False)  # [F, H, W, C]
    cells = [(f"{i / view.fps:.2f} s", thumbnail(shown[i])) for i in evenly(len(shown), NUM_FRAMES)]
    if clip.image:
        cells.insert(0, ("image", thumbnail(first_image(clip, shown, view, mirrored=False))))
    if random_flip:
        cells.append(("mirrored", thumbnail(decode(clip, view, mirrored=True)[0])))
    size, rate, seconds, counts, *_ = _describe(fact, view)
    title = f"line {clip.line}: {_name(root, clip.video)}, {size}, {rate} fps, {seconds} s, frames {counts}"
    return Row(cells, title, clip.caption)


def draw_sheet(rows: list[Row]) -> tuple[Image.Image, set[str]]:
    """The picture, and the characters that no font has, which it shows as boxes."""
    inner = max(LEAST_WIDTH, *(sum(image.width + GAP for _, image in row.cells) - GAP for row in rows))
    texts, missing = [], set()
    for row in rows:
        texts.append([])
        for text, most, colour in ((row.title, 1, FAINT), (row.caption, CAPTION_LINES, INK)):
            font, lacks = font_for(text)
            missing |= lacks
            texts[-1] += [(line, font, colour) for line in wrap(text, font, inner, most)]
    heights = [_row_height(row, lines) for row, lines in zip(rows, texts)]
    width = inner + 2 * MARGIN
    columns = into_columns(heights, width)
    tallest = max(sum(heights[i] for i in column) for column in columns)
    sheet = Image.new("RGB", (width * len(columns), tallest), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, column in enumerate(columns):
        left, top = number * width, 0
        for i in column:
            _place_row(sheet, draw, left, top, rows[i], texts[i])
            top += heights[i]
            draw.line([(left, top - 1), (left + width - 1, top - 1)], RULE)
    return sheet, missing


def into_columns(heights: list[int], width: int) -> list[list[int]]:
    """Which rows stand in which column, from top to bottom: as few columns as make a sheet no taller than wide."""
    for count in range(1, len(heights) + 1):
        most = -(-len(heights) // count)
        columns = [list(range(start, min(start + most, len(heights)))) for start in range(0, len(heights), most)]
        if max(sum(heights[i] for i in column) for column in columns) <= width * len(columns):
            break
    return columns


def _row_height(row: Row, lines: list) -> int:
    return 2 * MARGIN + max(image.height for _, image in row.cells) + 2 * SMALL + _line_height() * len(lines)


def _line_height() -> int:
    return round(1.45 * SIZE)


def _place_row(sheet: Image.Image, draw: ImageDraw.ImageDraw, left: int, top: int, row: Row, lines: list) -> None:
    start, left, top = left + MARGIN, left + MARGIN, top + MARGIN
    tallest = max(image.height for _, image in row.cells)
    for label, image in row.cells:
        sheet.paste(image, (left, top))
        draw.text((left, top + tallest + 3), label, FAINT, fonts(SMALL)[0])
        left += image.width + GAP
    top += tallest + 2 * SMALL
    for line, font, colour in lines:
        draw.text((start, top), line, colour, font)
        top += _line_height()


@lru_cache
def fonts(size: int) -> list[ImageFont.FreeTypeFont]:
    """Those that this system has, and Pillow's own, which has Latin letters alone."""
    found = []
    for name in FONTS:
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:
            continue  # not on this system
    return [*found, ImageFont.load_default(size)]


def font_for(text: str) -> tuple[ImageFont.FreeTypeFont, set[str]]:
    """The font that has most of a text's characters, and those that it lacks."""
    characters = {character for character in text if character.isprintable() and not character.isspace()}
    lacking = [{character for character in characters if _lacks(font, character)} for font in fonts(SIZE)]
    best = min(range(len(lacking)), key=lambda i: len(lacking[i]))
    return fonts(SIZE)[best], lacking[best]


@lru_cache(maxsize=65536)
def _lacks(font: ImageFont.FreeTypeFont, character: str) -> bool:
    """Whether the font draws what it draws for a character that cannot be."""
    drawn, nothing = font.getmask(character), font.getmask("\U0010ffff")
    return drawn.size == nothing.size and bytes(drawn) == bytes(nothing)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """Lines of at most `width` pixels, broken at spaces where there are some; three dots where `most` is too few."""
    lines, rest = [], " ".join(text.split())
    while rest and len(lines) < most:
        dots = "..." if len(lines) == most - 1 and font.getlength(rest) > width else ""
        end = _fitting(rest, font, width - font.getlength(dots))
        space = rest.rfind(" ", 0, end + 1)
        if end < len(rest) and space > end / 2:  # Chinese and Japanese have none
            end = space
        lines.append(rest[:end].rstrip() + dots)
        rest = rest[end:].lstrip()
    return lines


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: float) -> int:
    """How many of the first characters fit; at least one, so that `wrap` comes to an end."""
    low, high = 1, min(len(text), 1000)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low


# ---- the story -------------------------------------------------------------------------------------------------------


def write_sheet(args, clips: list[Clip], facts: list[Facts], view: View) -> list[str]:
    """Draws some of the clips into a file; returns what is wrong with those that cannot be decoded to their end."""
    rows, problems = [], []
    chosen = evenly(len(clips), args.clips)
    for i in tqdm(chosen, "Drawing clips", unit="clip"):
        try:
            rows.append(draw_row(args.folder, clips[i], facts[i], view, args.random_flip))
        except ValueError as error:
            problems.append(str(error))
    if rows:
        sheet, missing = draw_sheet(rows)
        content = io.BytesIO()
        sheet.save(content, "PNG")
        try:
            publish(args.output, content.getvalue())
        except OSError as error:
            raise ValueError(f"--output {args.output}: cannot be written ({error.strerror}); give another") from error
        left_out = len(clips) - len(chosen)
        print(f"{args.output}: {count_clips(len(rows))}" + f", {left_out} left out (--clips)" * (left_out > 0))
        if missing:
            print(f"shown as boxes there, for want of a font that has them: {' '.join(sorted(missing)[:40])}")
    return problems


def preview(args: argparse.Namespace) -> list[str]:
    """Prints the table and writes the picture of the clips that can be used; returns what is wrong with the others."""
    clips, problems = read_clips(args.folder, args.caption_column, args.video_column, args.image_column, args.id_token)
    check_output(args.output)
    base = read_base(args)
    view = frames.view_of(
        args, with_image=base is not None and base.takes_image, whole=base is not None and base.fixed_size is not None
    )
    with ThreadPoolExecutor() as threads:
        examined = list(threads.map(partial(examine, view=view), clips))
    problems += [problem for _, problem in examined if problem]
    print(*table(args.folder, clips, [fact for fact, _ in examined], view), sep="\n")
    good = [(clip, fact) for clip, (fact, _) in zip(clips, examined) if fact]
    if not good:
        print("no picture: none of the clips can be used")
        return problems
    clips, facts = map(list, zip(*good))
    lines = [headline(facts, view), *remarks(clips, facts, view), *spread(facts)]
    print("", *lines, *cut_captions(clips, base), sep="\n")
    return problems + write_sheet(args, clips, facts, view)


def main(argv: list[str] | None = None) -> None:
    parser, args = parse_args(argv)
    try:
        if problems := preview(args):
            raise ValueError(list_problems(args.folder, problems, "training refuses it"))
    except (ValueError, FileNotFoundError) as error:
        sys.stdout.flush()
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
