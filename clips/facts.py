"""What the file of a clip holds, what of it the model sees, and what looks like an oversight.

What is wrong with a clip is returned as a sentence, so that a person sees all problems of a dataset at once.
"""

import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import decord

from clips.frames import SMALLEST_SIDE, View, choose_frames, covering_scale, read_image, read_timestamps
from clips.listing import Clip
from files import file_hash


class Facts(NamedTuple):
    """What the file of a video holds, and what the model gets of it."""

    width: int
    height: int
    fps: float  # the mean, where frames are unevenly spaced
    num_frames: int
    indices: list[int]  # of the frames that the model gets
    seen_until: float  # seconds from the start of the file
    content: str  # a hash

    @property
    def seconds(self) -> float:
        return self.num_frames / self.fps

    @property
    def unseen_seconds(self) -> float:
        """At the end; what is skipped at the start is what was asked for."""
        return max(self.seconds - self.seen_until, 0)

    @property
    def repeats(self) -> bool:
        """Whether the model gets a frame twice, because the file is slower than the model."""
        return len(set(self.indices)) < len(self.indices)

    def scale(self, view: View) -> float:
        return covering_scale(self.height, self.width, view.height, view.width)

    def cropped(self, view: View) -> float:
        """The share of the picture that is cut off."""
        return 1 - view.height * view.width / (self.height * self.width * self.scale(view) ** 2)


def examine(clip: Clip, view: View) -> tuple[Facts | None, str | None]:
    """What the model gets of a clip, or why it cannot be used."""
    for file in filter(None, (clip.video, clip.image)):
        if not file.is_file():
            return None, clip.problem("no such file; correct the path, which starts at the dataset's folder", file)
    try:
        facts = read_facts(clip.video, view)
    except ValueError as error:
        return None, clip.problem(str(error))
    if clip.image:
        try:
            read_image(clip.image, view.height, view.width)
        except ValueError as error:
            return None, clip.problem(str(error), clip.image)
    return facts, None


def read_facts(video: Path, view: View) -> Facts:
    """Facts of a file that is there.

    Raises:
        ValueError: it cannot be read, or not as `view` asks for.
    """
    if video.stat().st_size == 0:
        raise ValueError("the file is empty; copy it again, or remove the clip from the lists")
    try:
        reader = decord.VideoReader(str(video))  # reads to the end of the file, so a truncated one fails here
        timestamps = read_timestamps(reader)
        indices = choose_frames(timestamps, view)
        height, width, _ = reader[indices[-1]].shape
    except (RuntimeError, decord.DECORDError) as error:
        remedy = "play it to check, and re-encode it (ffmpeg -i in -c:v libx264 out.mp4) or remove it from the lists"
        raise ValueError(f"cannot be read as a video, the file is damaged or not a video; {remedy}") from error
    if min(height, width) < SMALLEST_SIDE:
        raise ValueError(f"is {width}x{height} pixels; decord reads videos from {SMALLEST_SIDE} pixels a side")
    if view.whole and len(indices) < view.max_num_frames:
        raise ValueError(
            f"gives {len(indices)} frames at --fps {view.fps}, and this checkpoint takes {view.max_num_frames}, no "
            "fewer; use a longer clip, or remove it from the lists"
        )
    span, intervals = timestamps[-1] - timestamps[0], len(timestamps) - 1
    fps = float(intervals / span) if span else reader.get_avg_fps()
    seen_until = float(timestamps[indices[0]] - timestamps[0]) + len(indices) / view.fps
    return Facts(width, height, fps, len(timestamps), indices, seen_until, file_hash(video))


def headline(facts: list[Facts], view: View) -> str:
    """What clips are, and what the model gets of them."""
    sizes = sorted({(fact.width, fact.height) for fact in facts}, key=math.prod)
    rates = sorted({round(fact.fps, 2) for fact in facts})
    lengths = sorted(Counter(len(fact.indices) for fact in facts).items(), reverse=True)
    return (
        f"{count_clips(len(facts))} of {_range([f'{width}x{height}' for width, height in sizes])} at "
        f"{_range([f'{rate:g}' for rate in rates])} fps -> {view.width}x{view.height} at {view.fps} fps; "
        + ", ".join(f"{count} of {length}{' frames' * (i == 0)}" for i, (length, count) in enumerate(lengths))
    )


def remarks(clips: list[Clip], facts: list[Facts], view: View) -> list[str]:
    """What the model does not see of clips, and what of them looks like an oversight, a line each.

    Args:
        facts: of each clip.
    """
    unseen = [fact.unseen_seconds for fact in facts if fact.unseen_seconds >= 0.05]
    cropped = [fact.cropped(view) for fact in facts if fact.cropped(view) >= 0.005]
    parts = [f"up to {max(unseen):.1f} s at the end ({count_clips(len(unseen))})"] if unseen else []
    parts += [f"up to {100 * max(cropped):.0f} % of the picture ({count_clips(len(cropped))})"] if cropped else []
    lines = [f"not seen: {', '.join(parts)}"] if parts else []
    larger = sum(fact.scale(view) > 1 for fact in facts)
    slower = sum(fact.repeats for fact in facts)
    lines += [f"scaled up, so less sharp than others of this size: {count_clips(larger)}"] if larger else []
    lines += [f"slower than {view.fps} fps, so some frames are seen twice: {count_clips(slower)}"] if slower else []
    return lines + _repetitions(clips, facts)


def _repetitions(clips: list[Clip], facts: list[Facts]) -> list[str]:
    """Videos and captions that stand in the lists more than once, the most frequent first."""
    videos, captions = {}, {}
    for clip, fact in zip(clips, facts):
        videos.setdefault(fact.content, []).append(clip.line)
        captions.setdefault(clip.caption, []).append(clip.line)
    lines = []
    for what, found in (("video", videos), ("caption", captions)):
        repeated = sorted((group for group in found.values() if len(group) > 1), key=len, reverse=True)
        if repeated:
            groups = [_and(group[:6], len(group)) for group in repeated[:5]]
            more = f"; and {len(repeated) - 5} more" if len(repeated) > 5 else ""
            lines.append(f"the same {what} more than once: lines {'; '.join(groups)}{more}")
    return lines


def count_clips(count: int) -> str:
    return f"{count} clip{'s' * (count != 1)}"


def _range(ascending: list[str]) -> str:
    return ascending[0] if len(ascending) == 1 else f"{ascending[0]} to {ascending[-1]}"


def _and(numbers: list[int], count: int) -> str:
    """The numbers in words, of `count` that there are."""
    *most, last = [*map(str, numbers), *([f"{count - len(numbers)} others"] if count > len(numbers) else [])]
    return f"{', '.join(most)} and {last}"


def list_problems(root: Path, problems: list[str], consequence: str) -> str:
    count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
    return f"{root}: {count} in the dataset, {consequence}:\n  " + "\n  ".join(problems)
