"""The clips of the examples: one shape that moves, drawn in code, and detectors that recognise what a clip shows.

Shapes: F frames, H height, W width. A clip is uint8 [F, H, W, 3], RGB.
"""

from typing import NamedTuple

import numpy as np

COLOURS = {  # RGB
    "red":  (215, 45, 40),  "yellow": (235, 200, 50), "green":  (45, 165, 75),
    "cyan": (60, 200, 210), "blue":   (50, 85, 215),  "purple": (150, 60, 190),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle")
MOTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}  # x to the right, y down
GROUNDS = {"dark": 70, "light": 185}


class Scene(NamedTuple):
    """The content of a clip, which its caption describes."""

    colour: str
    shape: str
    motion: str
    ground: str

    @property
    def caption(self):
        return f"a {self.colour} {self.shape} moves {self.motion} over a {self.ground} ground"


def random_scene(rng):
    colour, shape, motion, ground = (str(rng.choice(list(words))) for words in (COLOURS, SHAPES, MOTIONS, GROUNDS))
    return Scene(colour, shape, motion, ground)


def coverage(shape, x, y, radius, softness=1.0):
    """Returns how much of each pixel a shape around (0, 0) covers, 0 to 1.

    Args:
        x, y: coordinates of the pixels.
        radius: of the circle, in pixels; other shapes have its area and their centre of mass at (0, 0).
        softness: pixels over which an edge falls from 1 to 0.
    """
    if shape == "circle":
        inside = radius - np.hypot(x, y)
    elif shape == "square":
        inside = 0.886 * radius - np.maximum(abs(x), abs(y))
    else:
        inside = np.minimum(0.778 * radius - y, 0.778 * radius + y / 2 - abs(x) * 0.866)
    return np.clip(inside / softness + 0.5, 0, 1)


def draw_clip(scene, num_frames, height, width, rng, look="colour"):
    """Draws a shape that crosses a soft gradient; its size, path and speed and the light vary with `rng`.

    Args:
        look: "colour", or "film": the same scene as a hatched black-and-white film with grain.
    """
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    radius = height * rng.uniform(0.21, 0.27)
    travel = rng.uniform(0.8, 1.0)
    aside_x, aside_y = rng.uniform(-0.08, 0.08, 2) * height
    step_x, step_y = np.multiply(MOTIONS[scene.motion], (0.6 * width, 0.5 * height)) * travel
    angle = rng.uniform(0, 2 * np.pi)
    slope = np.cos(angle) * (x / width - 0.5) + np.sin(angle) * (y / height - 0.5)
    ground = GROUNDS[scene.ground] + rng.uniform(-12, 12) + 30 * slope  # [H, W]
    colour = np.array(COLOURS[scene.colour]) + rng.uniform(-10, 10)
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    for i in range(num_frames):
        progress = i / max(num_frames - 1, 1) - 0.5
        centre_x = width / 2 + step_x * progress + (aside_x if not step_x else 0)
        centre_y = height / 2 + step_y * progress + (aside_y if not step_y else 0)
        inside = coverage(scene.shape, x - centre_x, y - centre_y, radius, softness=0.04 * height)  # [H, W]
        if look == "film":
            frames[i] = film_frame(inside, ground, x, y, rng)[..., None]
        else:
            frames[i] = (ground[..., None] * (1 - inside[..., None]) + colour * inside[..., None]).clip(0, 255)
    return frames


def film_frame(inside, ground, x, y, rng):
    """Draws a frame in the manner of an old film, hatched on pale paper, with grain and flicker: [H, W], 0 to 255."""
    height, width = inside.shape
    hatching = 0.5 + 0.5 * np.cos(2 * np.pi * (x + y) * 8 / height)  # eight lines per frame height
    paper = 185 + 0.2 * (ground - 128) + rng.uniform(-4, 4)
    vignette = 1 - 0.25 * np.hypot(x / width - 0.5, y / height - 0.5) ** 2 / 0.5
    ink = 35 + 70 * hatching
    tone = (paper - 14 * hatching) * (1 - inside) + ink * inside
    return (tone * vignette + rng.normal(0, 5, inside.shape)).clip(0, 255)


def chroma(frames):
    """Returns how colourful a clip is: the mean difference of the largest and the smallest of R, G and B, 0 to 1.

    HSV's saturation divides by brightness: it would count the faint tint of a dark grey as strong.
    """
    return float((frames.max(-1).astype(np.float32) - frames.min(-1)).mean() / 255)


def shape_mask(frame, look):
    """Returns the pixels of the shape, bool [H, W]: those with colour, or, in a film, the dark ones."""
    frame = frame.astype(np.float32)
    if look == "film":
        kernel = np.ones(5) / 5  # hatching is not an edge
        tone = frame.mean(-1)
        for axis in (0, 1):
            tone = np.apply_along_axis(lambda line: np.convolve(np.pad(line, 2, "edge"), kernel, "valid"), axis, tone)
        return tone < (np.percentile(tone, 2) + np.percentile(tone, 90)) / 2
    high, low = frame.max(-1), frame.min(-1)
    return (high - low) / np.maximum(high, 1) > 0.35


def read_clip(frames, look="colour"):
    """Returns the colour, shape and motion that simple detectors see in a clip; None for what they do not see."""
    masks = [shape_mask(frame, look) for frame in frames]
    masks = [(i, mask) for i, mask in enumerate(masks) if mask.sum() > 0.01 * mask.size]
    if len(masks) < 2:
        return {"colour": None, "shape": None, "motion": None}
    y, x = np.mgrid[0 : frames.shape[1], 0 : frames.shape[2]]
    centres = np.array([(x[mask].mean(), y[mask].mean()) for _, mask in masks])
    path = centres[-1] - centres[0]
    motion = max(MOTIONS, key=lambda name: float(np.dot(path, MOTIONS[name])))
    votes = [best_shape(mask, x - centre[0], y - centre[1]) for (_, mask), centre in zip(masks, centres, strict=True)]
    colour = None
    if look == "colour":
        mean_rgb = np.concatenate([frames[i][mask] for i, mask in masks]).mean(0)
        colour = min(COLOURS, key=lambda name: abs((hue(mean_rgb) - hue(COLOURS[name]) + 180) % 360 - 180))
    return {"colour": colour, "shape": max(SHAPES, key=votes.count), "motion": motion}


def best_shape(mask, x, y):
    """Returns the shape that overlaps a mask best when it has the same area."""
    radius = np.sqrt(mask.sum() / np.pi)

    def overlap(shape):
        ideal = coverage(shape, x, y, radius) > 0.5
        return (mask & ideal).sum() / (mask | ideal).sum()

    return max(SHAPES, key=overlap)


def hue(rgb):
    """Returns the hue of a colour in degrees."""
    red, green, blue = np.asarray(rgb, np.float64)
    return float(np.degrees(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue)) % 360)
