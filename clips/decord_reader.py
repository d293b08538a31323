"""Reads frames with decord 0.6, for comparing with runs made by tools that use it; `clips/video.py` is the default.

decord numbers frames, and gives others than asked for in many files: see docs/data.md. So a file is read only if decord
tells the same times as FFmpeg.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

FRAMES_READ_AT_ONCE = 8
TOLERANCE = 2e-3  # seconds: decord's times are in float32, and containers round to milliseconds


def is_installed() -> bool:
    try:
        import decord  # noqa: F401
    except ImportError:
        return False
    return True


def frame_seconds(path: Path, expected: np.ndarray) -> np.ndarray:
    """Returns decord's time of every frame in seconds, [F], in float64.

    Args:
        expected: FFmpeg's times, which decord's must equal.

    Raises:
        ValueError: they differ, or decord cannot read the file.
    """
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(str(path))
        seconds = reader.get_frame_timestamp(range(len(reader)))[:, 0].astype(np.float64)
    except (RuntimeError, decord.DECORDError) as error:
        raise ValueError(f"decord cannot read it ({_first_line(error)}); use --video_decoder pyav") from error
    apart = seconds - seconds[:1], expected - expected[:1]
    if len(seconds) != len(expected) or np.abs(apart[0] - apart[1]).max() > TOLERANCE:
        raise ValueError(
            f"decord tells {len(seconds)} frames up to {seconds[-1]:.2f} s and FFmpeg {len(expected)} up to "
            f"{expected[-1]:.2f} s, or other times between, so decord gives wrong frames; use --video_decoder pyav"
        )
    return seconds


def read_pictures(path: Path, indices: list[int]) -> Iterator[np.ndarray]:
    """Yields frames by their numbers, uint8 [H, W, C]; a damaged file raises ValueError."""
    import decord

    try:
        reader = decord.VideoReader(str(path))
        for start in range(0, len(indices), FRAMES_READ_AT_ONCE):
            yield from reader.get_batch(indices[start : start + FRAMES_READ_AT_ONCE]).asnumpy()
    except (RuntimeError, decord.DECORDError) as error:
        raise ValueError(f"stopped in the middle of decoding: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
