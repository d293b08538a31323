"""Draws the pictures of docs/sizes.md: which windows of a clip each mode takes, and what buckets cut off.

    python examples/draw_modes.py

Windows and buckets are chosen by the code that training uses.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clips.frames import View, covering_scale
from clips.selection import SPREAD, Selection, bucket_option, lost_share, views_of

ROOT = Path(__file__).resolve().parents[1]
VIEW = View(480, 720, 8, 49, 0, 0, "center", 42)
SECONDS, FPS = 20, 24  # of the clip whose windows are drawn
MODES = (
    ("--clip_mode start", {}),
    ("--clip_mode middle", {"clip_mode": "middle"}),
    ("--clip_mode end", {"clip_mode": "end"}),
    ("--clip_mode uniform", {"clip_mode": "uniform"}),
    ("--clip_mode chunks", {"clip_mode": "chunks"}),
    ("--clip_mode random", {"clip_mode": "random"}),
    ("--frame_sampling stretch", {"is_stretched": True}),
)
PICTURES = (("phone, 1080x1920", 1920, 1080), ("film, 1280x720", 720, 1280), ("square, 1080x1080", 1080, 1080))
SIZES = (
    ("--height 480 --width 720", Selection(VIEW)),
    ("--buckets 49x480x720 49x720x480", [bucket_option(text) for text in ("49x480x720", "49x720x480")]),
    ("--buckets auto", "auto"),
)
STYLE = (
    "text{font:14px system-ui,sans-serif;fill:#333}.name{font:13px ui-monospace,monospace}"
    ".whole{fill:#dde3ea}.seen{fill:#3b82c4}.maybe{fill:#3b82c4;opacity:.45}.edge{fill:none;stroke:#7a8794}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.whole{fill:#39424d}.edge{stroke:#9aa7b4}}"
)


def svg(width: int, height: int, parts: list[str], title: str) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{title}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>\n"])


def rectangle(kind: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2"/>'


def draw_windows() -> str:
    """Returns a picture with a line for each mode: a clip of 20 seconds, and its windows."""
    left, across, row = 210, 560, 38
    parts, times = [], np.arange(SECONDS * FPS) / FPS
    for number, (name, options) in enumerate(MODES):
        y, selection = 24 + number * row, Selection(VIEW, **options)
        parts.append(f'<text class="name" x="8" y="{y + 17}">{name}</text>')
        parts.append(rectangle("whole", left, y + 2, across, 20))
        overlap = selection.clip_mode in SPREAD
        for window, view in enumerate(views_of(720, 1280, times, selection)):
            begin, seconds = view.start / SECONDS, view.max_num_frames / view.fps / SECONDS
            width, height = min(seconds, 1 - begin) * across - 2, 10 if overlap else 20
            place = left + begin * across, y + 2 + (window % 2 * 10 if overlap else 0)
            parts.append(rectangle("maybe" if selection.is_drawn else "seen", *place, width, height))
    y = 24 + len(MODES) * row
    for second in range(0, SECONDS + 1, 5):
        parts.append(f'<text x="{left + second / SECONDS * across - 8:.0f}" y="{y + 8}">{second} s</text>')
    return svg(
        left + across + 24, y + 24, parts, "which parts of a clip of 20 seconds each mode sees, 49 frames at 8 fps"
    )


def draw_buckets() -> str:
    """Returns a picture with a row for each choice of sizes: three clips, and what is seen of each."""
    side, column, row = 130, 250, 210
    parts = []
    for i, (name, _, _) in enumerate(PICTURES):
        parts.append(f'<text x="{20 + i * column}" y="22">{name}</text>')
    for j, (option, chosen) in enumerate(SIZES):
        top = 44 + j * row
        parts.append(f'<text class="name" x="20" y="{top + 10}">{option}</text>')
        selection = selection_of(chosen)
        for i, (_, height, width) in enumerate(PICTURES):
            (view,) = views_of(height, width, np.arange(240) / 24, selection)
            scale = side / max(height, width)
            x, y, drawn_width, drawn_height = 20 + i * column, top + 22, width * scale, height * scale
            covering = covering_scale(height, width, view.height, view.width)
            seen_width, seen_height = view.width / covering * scale, view.height / covering * scale
            parts.append(rectangle("whole", x, y, drawn_width, drawn_height))
            place = x + (drawn_width - seen_width) / 2, y + (drawn_height - seen_height) / 2
            parts.append(rectangle("seen", *place, seen_width, seen_height))
            parts.append(rectangle("edge", x, y, drawn_width, drawn_height))
            lost = 100 * lost_share(height, width, view.height, view.width)
            text = f"{view.max_num_frames}x{view.height}x{view.width}, {lost:.0f} % lost"
            parts.append(f'<text x="{x}" y="{y + side + 20:.0f}">{text}</text>')
    return svg(20 + len(PICTURES) * column, 44 + len(SIZES) * row, parts, "what three clips lose of their pictures")


def selection_of(chosen) -> Selection:
    if isinstance(chosen, Selection):
        return chosen
    if chosen == "auto":
        return Selection(VIEW, is_fitted=False).fitted((height, width) for _, height, width in PICTURES)
    return Selection(VIEW, tuple(chosen), has_any_length=False)


PICTURES_OF_PAGE = {"docs/windows.svg": draw_windows, "docs/buckets.svg": draw_buckets}


def main() -> None:
    for path, draw in PICTURES_OF_PAGE.items():
        (ROOT / path).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
