"""Draws learning curves of several seeds as SVG, readable on white and on dark pages."""

import math
import statistics
from collections.abc import Callable

WIDTH, HEIGHT, LEFT, TOP = 560, 300, 64, 44  # of the plot, and its place in the picture
COLOURS = ("#d9772b", "#a05fc4", "#3b82c4", "#2f9e6e")
TICKS = (0.02, 0.03, 0.05, 0.07, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#333}.end{text-anchor:end}.middle{text-anchor:middle}"
    "path{fill:none;stroke-width:2}.grid{stroke:#7a8794;stroke-opacity:.3;stroke-width:1}.band{stroke:none;fill-opacity:.2}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}}"
)


def median_curve(runs: list[dict]) -> list[tuple[float, float, float, float]]:
    """Returns, for each recorded update, median seconds, median loss, smallest and largest loss of the runs."""
    points = []
    for seconds, losses in zip(zip(*(run["seconds"] for run in runs)), zip(*(run["loss"] for run in runs))):
        points.append((statistics.median(seconds), statistics.median(losses), min(losses), max(losses)))
    return points


def path(points: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def draw(lines: dict[str, list[dict]], title: str, seeds: int) -> str:
    """Returns a picture of loss against seconds; a line is the median of the runs, its band all of them.

    Args:
        lines: by label, runs with "seconds" and "loss" at the same updates.
    """
    found = {label: median_curve(runs) for label, runs in lines.items() if runs}
    last = max(points[-1][0] for points in found.values())
    lowest = min(point[2] for points in found.values() for point in points)
    highest = max(point[3] for points in found.values() for point in points)
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, math.inf) if last / step <= 8)

    def across(seconds: float) -> float:
        return LEFT + seconds / last * WIDTH

    def down(loss: float) -> float:
        return TOP + math.log(highest / loss) / math.log(highest / lowest) * HEIGHT

    parts = [f'<text x="{LEFT}" y="20">loss on held-out clips (median and range of {seeds} seeds)</text>']
    parts += grid(across, down, last=last, lowest=lowest, highest=highest, step=step)
    for number, (label, points) in enumerate(found.items()):
        colour, y = COLOURS[number % len(COLOURS)], TOP + HEIGHT + 68 + 20 * number
        band = [(across(x), down(low)) for x, _, low, _ in points]
        band += [(across(x), down(high)) for x, _, _, high in reversed(points)]
        parts.append(f'<path class="band" style="fill:{colour}" d="{path(band)}Z"/>')
        parts.append(f'<path stroke="{colour}" d="{path([(across(x), down(y)) for x, y, _, _ in points])}"/>')
        parts.append(f'<path stroke="{colour}" d="M{LEFT} {y - 4}h24"/><text x="{LEFT + 34}" y="{y}">{label}</text>')
    width, height = LEFT + WIDTH + 24, TOP + HEIGHT + 68 + 20 * len(found)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{title}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>\n"])


def grid(across: Callable[[float], float], down: Callable[[float], float], *, last, lowest, highest, step) -> list[str]:
    parts = []
    for loss in TICKS:
        if lowest <= loss <= highest:
            y = down(loss)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}h{WIDTH}"/>')
            parts.append(f'<text class="end" x="{LEFT - 8}" y="{y + 4:.1f}">{loss:g}</text>')
    for number in range(int(last / step) + 1 if math.isfinite(step) else 1):
        x = across(number * step) if number else LEFT
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}v{HEIGHT}"/>')
        parts.append(
            f'<text class="middle" x="{x:.1f}" y="{TOP + HEIGHT + 18}">{number * step if number else 0}</text>'
        )
    parts.append(f'<text class="middle" x="{LEFT + WIDTH / 2:.0f}" y="{TOP + HEIGHT + 38}">seconds</text>')
    return parts
