"""Shows what the model will see of a dataset, as a picture and a table.

python dataset.py preview FOLDER [the data options of the training]
"""

import argparse
import bisect
import io
import itertools
import os
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

from clips import check, frames
from clips.facts import Facts, count_clips, examine, headline, list_problems, remarks
from clips.frames import MEND, View, decode, describe_damage, first_image
from clips.listing import Clip
from clips.video import Damage
from cogvideox.base_model import BaseModel, check_training, load_tokenizer, read_base_model
from cogvideox.encoders import cut_caption
from files import at_least, expanded_path, parse_options, publish, run_command

FRAMES_PER_CLIP = 5  # among them the first and the last
CELL, GAP, MARGIN = 240, 6, 16  # pixels: longest side of a frame in the sheet, between frames, around rows
LEAST_WIDTH = 900  # pixels; leaves room for captions where frames are small
TEXT_SIZE, LABEL_SIZE = 16, 12  # pixels
LINE_HEIGHT = 23  # pixels, of captions
CAPTION_LINES = 4
INK, FAINT, PAPER, RULE = (20, 20, 20), (120, 120, 120), (255, 255, 255), (225, 225, 225)

# Pillow finds them by name among the system's fonts; the first has most alphabets, most others have CJK.
FONTS = (
    "DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "NotoSansSC-Regular.otf",
    "SourceHanSansCN-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf",
    "Arial Unicode.ttf", "Hiragino Sans GB.ttc", "msyh.ttc", "arial.ttf",
)  # fmt: skip


def parse_args(argv: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    about = "Shows what a model will see of a dataset: prints a table of its clips, and draws some of them."
    parser = argparse.ArgumentParser("python dataset.py preview", description=about, allow_abbrev=False)
    path = expanded_path
    check.add_options(parser, flips=True)
    sheet = parser.add_argument_group("picture").add_argument
    sheet("--output", type=path, metavar="FILE", help=".png file to write (default: preview.png in FOLDER)")
    sheet("--clips", type=at_least(1), default=40, metavar="N", help="draw at most N clips, evenly spaced in the list")
    model = parser.add_argument_group("base model, to check its limits and where it cuts captions off").add_argument
    model("--pretrained_model_name_or_path", metavar="NAME", help="CogVideoX folder or hub name; no weights are read")
    model("--revision", help="branch, tag or commit of the hub repository")
    model("--cache_dir", type=path, help="folder for downloads (default: huggingface_hub's)")
    args = parse_options(parser, argv)
    args.output = args.output or args.folders[0].path / "preview.png"
    frames.check_options(args, parser.error)
    return parser, args


def check_output(path: Path) -> None:
    """Refuses a file that cannot be written, before anything is decoded."""
    remedy = "pass another file as --output"
    if path.suffix.lower() != ".png":
        raise ValueError(f"--output {path}: the picture is a .png; {remedy}")
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
    check_training(
        base,
        torch.bfloat16,
        num_frames=args.max_num_frames,
        height=args.height,
        width=args.width,
        image_options=image_options,
    )
    return base


# ---- the table -------------------------------------------------------------------------------------------------------


def table(root: Path, clips: list[Clip], facts: list[Facts | None], view: View) -> list[str]:
    """Returns the lines of the table: a heading, and a line per clip.

    Args:
        facts: one for each clip; None for a clip that cannot be used.
    """
    rows = [("clip", "file", "pixels", "fps", "seconds", "frames", "end unseen", "cropped", "scaled")]
    for clip, fact in zip(clips, facts):
        rows.append((str(clip.line), _name(root, clip.video), *(_describe(fact, view) if fact else ())))
    columns = itertools.zip_longest(*rows, fillvalue="")
    widths = [max(map(_terminal_width, column)) for column in columns]
    lines = []
    for row in rows:
        padding = [" " * (width - _terminal_width(cell)) for cell, width in zip(row, widths)]
        number, _, *figures = [space + cell for space, cell in zip(padding, row)]
        file = row[1] + padding[1]  # aligned to the left
        lines.append("  ".join([number, file, *(figures or ["cannot be used: see below"])]))
    return lines


def _terminal_width(text: str) -> int:
    """Returns how many columns of a terminal a text takes: a Chinese character takes two."""
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)


def _describe(fact: Facts, view: View) -> tuple[str, ...]:
    """Returns the cells of the table from "pixels" on."""
    scale, unseen = fact.scale(view), fact.unseen_seconds
    return (
        f"{fact.width}x{fact.height}",
        f"{round(fact.fps, 2):g}",
        f"{fact.seconds:.2f}",
        f"{fact.num_frames} -> {fact.num_seen}",
        f"{unseen:.2f} s" if unseen >= 0.005 else "-",
        f"{100 * fact.cropped(view):.0f} %" if fact.cropped(view) >= 0.005 else "-",
        f"to {100 * scale:.0f} %" if scale != 1 else "-",
    )


def _name(root: Path, video: Path) -> str:
    """Returns the path relative to the dataset's folder, if it is inside."""
    return str(video.relative_to(root)) if video.is_relative_to(root) else str(video)


def spread(facts: list[Facts]) -> list[str]:
    """Returns lines on how often each size, rate and length occurs."""
    sizes = Counter(f"{fact.width}x{fact.height}" for fact in facts)
    rates = Counter(f"{round(fact.fps, 2):g}" for fact in facts)
    seconds = [fact.seconds for fact in facts]
    buckets = Counter(fact.num_seen for fact in facts)
    return [
        f"pixels: {_counts(sizes)}",
        f"fps: {_counts(rates)}",
        f"seconds: {min(seconds):.1f} to {max(seconds):.1f}, {sum(seconds):.0f} in all",
        f"frames, batched by length: {_counts(buckets)}",
    ]


def _counts(counter: Counter, limit: int = 8) -> str:
    parts = [f"{count} of {value}" for value, count in counter.most_common(limit)]
    if len(counter) > limit:
        parts.append(f"{len(counter) - limit} others")
    return ", ".join(parts)


def cut_captions(clips: list[Clip], base: BaseModel | None) -> list[str]:
    """Returns lines on the captions that are longer than the model reads, with the words that it does not see."""
    if not base:
        return ["captions: length not checked; pass --pretrained_model_name_or_path for its tokenizer"]
    tokenizer, max_length = load_tokenizer(base), base.transformer["max_text_seq_length"]
    longest, too_long = 0, []
    for clip in clips:
        num_tokens, cut_off = cut_caption(tokenizer, clip.caption, max_length)
        longest = max(longest, num_tokens)
        if cut_off:
            too_long.append(f"  {clip.named}: {num_tokens} tokens, cut off: {cut_off}")
    return [f"captions: {len(too_long)} longer than {max_length} tokens; the longest has {longest}", *too_long]


# ---- the picture -----------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A clip in the sheet."""

    cells: list[tuple[str, Image.Image]]  # label beneath the picture, and the picture
    title: str
    caption: str


def evenly_spaced(count: int, limit: int) -> list[int]:
    """Returns at most `limit` of the indices below `count`, among them the first and the last."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, limit))})


def thumbnail(frame: torch.Tensor) -> Image.Image:
    """Returns a frame [H, W, C] as a picture, scaled down so that its longest side is at most CELL."""
    image = Image.fromarray(frame.numpy())
    scale = CELL / max(image.size)
    if scale >= 1:
        return image
    return image.resize([round(side * scale) for side in image.size], Image.Resampling.LANCZOS)


def clip_row(root: Path, clip: Clip, fact: Facts, view: View, *, random_flip: bool, damage: list[Damage]) -> Row:
    """Returns frames of a clip as training encodes them, between its image and a mirrored frame, if there are such.

    Args:
        damage: receives what the decoder reports.
    """
    shown = decode(clip, view, mirrored=False, file=fact.file, damage=damage)  # [F, H, W, C]
    cells = [(f"{i / view.fps:.2f} s", thumbnail(shown[i])) for i in evenly_spaced(len(shown), FRAMES_PER_CLIP)]
    if clip.image:
        cells.insert(0, ("image", thumbnail(first_image(clip, shown, view, mirrored=False, file=fact.file))))
    if random_flip:
        cells.append(("mirrored", thumbnail(shown[0].flip(1))))
    size, rate, seconds, counts, *_ = _describe(fact, view)
    title = f"{clip.line}: {_name(root, clip.video)}, {size}, {rate} fps, {seconds} s, frames {counts}"
    return Row(cells, title, clip.caption)


def draw_sheet(rows: list[Row]) -> tuple[Image.Image, set[str]]:
    """Returns the picture, and the characters that no font has, which it shows as boxes."""
    width = 2 * MARGIN + max(LEAST_WIDTH, *(sum(image.width + GAP for _, image in row.cells) - GAP for row in rows))
    drawn, missing = zip(*[draw_row(row, width) for row in rows])
    columns = into_columns([image.height for image in drawn], width)
    height = max(sum(drawn[i].height for i in column) for column in columns)
    sheet = Image.new("RGB", (width * len(columns), height), PAPER)
    for number, column in enumerate(columns):
        top = 0
        for i in column:
            sheet.paste(drawn[i], (number * width, top))
            top += drawn[i].height
    return sheet, set().union(*missing)


def draw_row(row: Row, width: int) -> tuple[Image.Image, set[str]]:
    """Returns the picture of one clip, and the characters that no font has.

    The picture shows its cells side by side, labels beneath, then title and caption and a rule.
    """
    lines, missing = [], set()  # text, font and colour of each line
    for text, colour, max_lines in ((row.title, FAINT, 1), (row.caption, INK, CAPTION_LINES)):
        font, lacking = font_for(text)
        lines += [(line, font, colour) for line in wrap(text, font, width - 2 * MARGIN, max_lines)]
        missing |= lacking
    cell_height = max(image.height for _, image in row.cells)
    text_top = MARGIN + cell_height + 2 * LABEL_SIZE
    picture = Image.new("RGB", (width, text_top + LINE_HEIGHT * len(lines) + MARGIN), PAPER)
    draw = ImageDraw.Draw(picture)
    left = MARGIN
    for label, image in row.cells:
        picture.paste(image, (left, MARGIN))
        draw.text((left, MARGIN + cell_height + 3), label, FAINT, fonts(LABEL_SIZE)[0])
        left += image.width + GAP
    for number, (line, font, colour) in enumerate(lines):
        draw.text((MARGIN, text_top + number * LINE_HEIGHT), line, colour, font)
    draw.line([(0, picture.height - 1), (width - 1, picture.height - 1)], RULE)
    return picture, missing


def into_columns(heights: list[int], width: int) -> list[list[int]]:
    """Divides rows of these heights into as few columns of this width as make a sheet no taller than wide.

    Returns the indices of each column's rows from top to bottom.
    """
    rows = list(range(len(heights)))
    for count in range(1, len(rows) + 1):
        size = -(-len(rows) // count)
        columns = [rows[start : start + size] for start in range(0, len(rows), size)]
        if max(sum(heights[i] for i in column) for column in columns) <= width * len(columns):
            break
    return columns


@lru_cache
def fonts(size: int) -> list[ImageFont.FreeTypeFont]:
    """Returns the FONTS that this system has, and Pillow's own, which has only Latin letters."""
    installed = []
    for name in FONTS:
        try:
            installed.append(ImageFont.truetype(name, size))
        except OSError:
            continue  # not on this system
    return [*installed, ImageFont.load_default(size)]


def font_for(text: str) -> tuple[ImageFont.FreeTypeFont, set[str]]:
    """Returns the font that has most of a text's characters, and the characters that it lacks."""
    characters = {character for character in text if character.isprintable() and not character.isspace()}
    lacking = [{character for character in characters if _lacks(font, character)} for font in fonts(TEXT_SIZE)]
    best = min(range(len(lacking)), key=lambda i: len(lacking[i]))
    return fonts(TEXT_SIZE)[best], lacking[best]


@lru_cache(maxsize=65536)
def _lacks(font: ImageFont.FreeTypeFont, character: str) -> bool:
    """Returns whether the font draws a character as it draws one that does not exist."""
    drawn, nothing = font.getmask(character), font.getmask("\U0010ffff")
    return drawn.size == nothing.size and bytes(drawn) == bytes(nothing)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int) -> list[str]:
    """Breaks a text into lines of at most `width` pixels, at spaces where it can; "..." replaces the rest."""
    lines, rest = [], " ".join(text.split())
    while rest and len(lines) < max_lines:
        dots = "..." if len(lines) == max_lines - 1 and font.getlength(rest) > width else ""
        end = _fitting_length(rest, font, width - font.getlength(dots))
        space = rest.rfind(" ", 0, end + 1)
        if end < len(rest) and space > end / 2:  # Chinese and Japanese have none
            end = space
        lines.append(rest[:end].rstrip() + dots)
        rest = rest[end:].lstrip()
    return lines


def _fitting_length(text: str, font: ImageFont.FreeTypeFont, width: float) -> int:
    """Returns how many of the first characters fit; at least one, so that `wrap` terminates."""
    lengths = range(1, min(len(text), 1000) + 1)
    return max(1, bisect.bisect_right(lengths, width, key=lambda length: font.getlength(text[:length])))


# ---- the story -------------------------------------------------------------------------------------------------------


def write_sheet(args: argparse.Namespace, clips: list[Clip], facts: list[Facts], view: View) -> list[str]:
    """Draws some of the clips into a file; returns a problem for each clip that cannot be decoded to its end."""
    rows, problems, remarks_on_damage = [], [], []
    chosen = evenly_spaced(len(clips), args.clips)
    for i in tqdm(chosen, "Drawing clips", unit="clip"):
        damage = []
        try:
            row = clip_row(args.folders[0].path, clips[i], facts[i], view, random_flip=args.random_flip, damage=damage)
            rows.append(row)
        except ValueError as error:  # decoding stopped midway
            problems.append(str(error))
            continue
        if damage:
            found = remarks_on_damage if args.allow_damaged else problems
            found.append(clips[i].problem(f"{describe_damage(damage)}; {MEND}"))
    if not rows:
        return problems
    sheet, missing = draw_sheet(rows)
    content = io.BytesIO()
    sheet.save(content, "PNG")
    try:
        publish(args.output, content.getvalue())
    except OSError as error:
        raise ValueError(
            f"--output {args.output}: cannot be written ({error.strerror}); pass another file as --output"
        ) from error
    left_out = f", {len(clips) - len(chosen)} left out (--clips)" if len(clips) > len(chosen) else ""
    print(f"{args.output}: {count_clips(len(rows))}{left_out}")
    print(*remarks_on_damage, sep="\n", end="\n" * bool(remarks_on_damage))
    if missing:
        print(f"drawn as boxes, because no installed font has them: {' '.join(sorted(missing)[:40])}")
    return problems


def preview(args: argparse.Namespace) -> list[str]:
    """Prints the table, writes the picture of the clips that can be used, and returns the problems of the others."""
    listed = check.listing_of(args)
    clips, problems = listed.clips, listed.problems
    check_output(args.output)
    base = base_of(args)
    view = frames.view_of(
        args, with_image=base is not None and base.takes_image, whole=base is not None and base.fixed_size is not None
    )
    with ThreadPoolExecutor() as threads:
        examined = list(threads.map(partial(examine, view=view), clips))
    problems += [problem for _, problem in examined if problem]
    print(listed.describe())
    print(*table(args.folders[0].path, clips, [fact for fact, _ in examined], view), sep="\n")
    usable = [(clip, fact) for clip, (fact, _) in zip(clips, examined) if fact]
    if not usable:
        print("no picture: none of the clips can be used")
        return problems
    clips, facts = map(list, zip(*usable))
    lines = [headline(facts, view), *remarks(clips, facts, view), *spread(facts)]
    print("", *lines, *cut_captions(clips, base), sep="\n")
    return problems + write_sheet(args, clips, facts, view)


def main(argv: list[str] | None = None) -> None:
    parser, args = parse_args(argv)

    def program() -> None:
        if problems := preview(args):
            raise ValueError(list_problems(", ".join(map(str, args.folders)), problems, "training refuses it"))

    run_command(parser, program)


if __name__ == "__main__":
    main()
