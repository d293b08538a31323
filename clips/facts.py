"""Examines clips: what a file holds, what of it the model sees, and what looks like an oversight.

The problem of a clip is returned as a sentence, so that a person sees all problems of a dataset at once.
"""

import itertools
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

from clips.frames import View, choose_source, covering_scale, read_image
from clips.known import File, Notes, file_key, look_at
from clips.listing import LFS, Clip, is_lfs_pointer, other_spelling
from files import file_hash

LEAST_CUT, LEAST_UNSEEN_SECONDS = 0.005, 0.05  # share of the picture; less is not worth a word
MOST_LINES = 20  # of the message that lists problems
LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue


class Facts(NamedTuple):
    """What a video file holds, and what of it the model sees."""

    width: int
    height: int
    fps: float  # mean, where frames are unevenly spaced
    num_frames: int
    num_seen: int  # frames that the model sees
    num_distinct: int  # of them: fewer where the file has fewer frames per second than the model
    seen_until: float  # end of the last of them, in seconds from the start of the file
    file: File
    image: str | None = None  # hash of the image that the video starts from
    damage: str | None = None  # "is damaged at ..."; None: it is not, or has not been decoded yet

    @property
    def seconds(self) -> float:
        return self.num_frames / self.fps

    @property
    def unseen_seconds(self) -> float:
        """Seconds at the end that the model does not see; frames skipped at the start are not counted."""
        return max(self.seconds - self.seen_until, 0)

    def without_times(self) -> "Facts":
        """Returns facts that take little memory, also of long videos, and that nothing can be decoded by."""
        return self._replace(file=self.file._replace(packed_times=""))

    def scale(self, view: View) -> float:
        """Returns the factor by which frames are resized; above 1 they are enlarged."""
        return covering_scale(self.height, self.width, view.height, view.width)

    def cropped(self, view: View) -> float:
        """Returns the share of the picture that is cut off, from 0 to 1."""
        return 1 - view.height * view.width / (self.height * self.width * self.scale(view) ** 2)


def examine(
    clip: Clip, view: View, notes: Notes | None = None, *, read_again: bool = False
) -> tuple[Facts | None, str | None]:
    """Returns the facts of a clip, or its problem: why the clip cannot be used.

    Args:
        notes: what is known of its files, which need not be read then, and where what is found out is added.
        read_again: read them all the same.
    """
    notes = notes or Notes()
    for file in filter(None, (clip.video, clip.image)):
        if problem := _not_a_file(file):
            return None, clip.problem(problem, file)
    try:
        facts = facts_of(clip.video, look_at(clip.video, notes, read_again=read_again), view)
    except ValueError as error:
        return None, clip.problem(str(error))
    if clip.image:
        try:
            image = _image_hash(clip.image, notes, read_again=read_again)
        except ValueError as error:
            return None, clip.problem(str(error), clip.image)
        facts = facts._replace(image=image)
    return facts, None


def is_known(clip: Clip, notes: Notes) -> bool:
    """Returns whether `examine` need not read any file of a clip."""
    try:
        video, image = file_key("video", clip.video), clip.image and file_key("image", clip.image)
    except OSError:
        return False
    return video in notes and (not image or image in notes)


def _not_a_file(path: Path) -> str | None:
    """Returns why a path is no file that can be read; None if it is one."""
    try:
        if path.is_file():
            return LFS if is_lfs_pointer(path) else None
        if path.is_dir():
            return "is a folder; give the path of a video in it"
        if path.exists():
            return "is not a plain file but a pipe or a device; copy its content into a file"
        if path.is_symlink():
            return f"is a link to {os.readlink(path)}, which is not there; copy the file itself to where the link is"
    except OSError as error:  # such as a name that is too long
        return f"{error.strerror}; correct the path"
    if there := other_spelling(path):
        return f"no such file, but there is {there}, which is spelt with other characters; write it so"
    if re.search(r"(^|/)[a-z0-9]{2,}:/", str(path)):
        return "is an address, and clips are read from files; download it, and give the path of the file"
    if re.search(r"(^|/)[A-Za-z]:[\\/]", str(path)):
        return "no such file; is a path of Windows: give it relative to the dataset's folder"
    return "no such file; correct the path, which is relative to the dataset's folder"


def _image_hash(path: Path, notes: Notes, *, read_again: bool) -> str:
    """Returns the hash of an image file; raises a ValueError if it cannot be read as an image."""
    key = file_key("image", path)
    content = None if read_again else notes.get(key)
    if not content:
        read_image(path, 16, 16)
        content = file_hash(path)
        notes.add(key, content)
    return content


def facts_of(path: Path, file: File, view: View) -> Facts:
    """Returns the facts of a file; raises a ValueError if it gives too few frames."""
    video, indices, _, seconds = choose_source(path, file, view)
    if view.whole and len(indices) < view.max_num_frames:
        raise ValueError(
            f"gives {len(indices)} frames at --fps {view.fps}, and this base model needs {view.max_num_frames}; use a "
            "longer clip, or remove it"
        )
    span = float(seconds[-1] - seconds[0])
    return Facts(
        width=video.width,
        height=video.height,
        fps=(len(seconds) - 1) / span if span else float(view.fps),
        num_frames=len(seconds),
        num_seen=len(indices),
        num_distinct=len(set(indices)),
        seen_until=float(seconds[indices[0]] - seconds[0]) + len(indices) / view.fps,
        file=file,
    )


def motion(frames: torch.Tensor, fps: int) -> float | None:
    """Returns how much a second of video changes: the mean difference of successive frames times their rate.

    Args:
        frames: uint8 [F, H, W, C].

    Returns:
        Levels of 255 per second; None for a single frame.
    """
    if len(frames) < 2:
        return None
    differences = [(later.short() - frame.short()).abs().float().mean() for frame, later in itertools.pairwise(frames)]
    return fps * float(torch.stack(differences).mean())


def brightness(frames: torch.Tensor) -> float:
    """Returns the mean luma (ITU-R BT.601) of frames, uint8 [F, H, W, C], from 0 to 255."""
    columns = torch.stack([frame.float().mean(0) for frame in frames])  # [F, W, C]; ten times as fast as one mean
    return float(columns.double().mean((0, 1)) @ torch.tensor(LUMA, dtype=torch.float64))


def repetitions(clips: list[Clip], facts: list[Facts]) -> dict[str, list[list[Clip]]]:
    """Returns the clips that have the same video or the same caption: groups of them, the largest first."""
    contents = {"video": [fact.file.content for fact in facts], "caption": [clip.caption for clip in clips]}
    repeated = {}
    for kind, values in contents.items():
        groups = {}
        for clip, value in zip(clips, values):
            if value:  # a missing caption is a problem of its own
                groups.setdefault(value, []).append(clip)
        repeated[kind] = sorted((group for group in groups.values() if len(group) > 1), key=len, reverse=True)
    return repeated


def headline(facts: list[Facts], view: View) -> str:
    """Returns one line on the sizes, rates and lengths of all clips, in the files and as the model sees them."""
    sizes = sorted({(fact.width, fact.height) for fact in facts}, key=math.prod)
    rates = sorted({round(fact.fps, 2) for fact in facts})
    (longest, count), *others = sorted(Counter(fact.num_seen for fact in facts).items(), reverse=True)
    lengths = [f"{count} of {longest} frames", *(f"{count} of {length}" for length, count in others)]
    return (
        f"{count_clips(len(facts))} of {_range([f'{width}x{height}' for width, height in sizes])} at "
        f"{_range([f'{rate:g}' for rate in rates])} fps -> {view.width}x{view.height} at {view.fps} fps; "
        f"{', '.join(lengths)}"
    )


def remarks(clips: list[Clip], facts: list[Facts], view: View) -> list[str]:
    """Returns one line for each thing that the model does not see or that looks like an oversight."""
    lines, not_seen = [], []
    if unseen := [fact.unseen_seconds for fact in facts if fact.unseen_seconds >= LEAST_UNSEEN_SECONDS]:
        not_seen.append(f"up to {max(unseen):.1f} s at the end ({count_clips(len(unseen))})")
    if cropped := [fact.cropped(view) for fact in facts if fact.cropped(view) >= LEAST_CUT]:
        not_seen.append(f"up to {100 * max(cropped):.0f} % of the picture ({count_clips(len(cropped))})")
    if not_seen:
        lines.append(f"not seen: {', '.join(not_seen)}")
    if enlarged := sum(fact.scale(view) > 1 for fact in facts):
        lines.append(f"scaled up, so less sharp than others of this size: {count_clips(enlarged)}")
    if slower := sum(fact.num_distinct < fact.num_seen for fact in facts):
        lines.append(f"slower than {view.fps} fps, at least in places, so frames are seen twice: {count_clips(slower)}")
    if stills := [clip for clip, fact in zip(clips, facts) if fact.num_seen == 1 < fact.num_frames]:
        lines.append(f"too short for 5 frames at {view.fps} fps, so seen as a still: {_enumeration(stills)}")
    return lines + _pictures(clips, facts) + _repetitions(clips, facts)


def _pictures(clips: list[Clip], facts: list[Facts]) -> list[str]:
    """Returns the lines on what is unusual about the pictures of some videos."""
    clips_of_remark = {}
    for clip, fact in zip(clips, facts):
        for remark in (*fact.file.video.remarks, *filter(None, [fact.damage])):
            clips_of_remark.setdefault(remark, []).append(clip)
    return [f"{_enumeration(group)}: {remark}" for remark, group in clips_of_remark.items()]


def _repetitions(clips: list[Clip], facts: list[Facts]) -> list[str]:
    """Returns the lines on videos and captions that are listed more than once, the most frequent first."""
    lines = []
    for kind, groups in repetitions(clips, facts).items():
        if groups:
            more = f"; and {len(groups) - 5} more" if len(groups) > 5 else ""
            lines.append(f"the same {kind} more than once: {'; '.join(map(_enumeration, groups[:5]))}{more}")
    return lines


def count_clips(count: int) -> str:
    return "1 clip" if count == 1 else f"{count} clips"


def _range(ascending: list[str]) -> str:
    return ascending[0] if len(ascending) == 1 else f"{ascending[0]} to {ascending[-1]}"


def _enumeration(clips: list[Clip]) -> str:
    """Returns "lines 1, 4 and 5", or the rows or files of the clips, with at most six of them spelt out."""
    from_lists = clips[0].place is None
    names = [str(clip.line) if from_lists else clip.named for clip in clips]
    if len(names) > 6:
        others = len(names) - 6
        names = [*names[:6], f"{others} other{'s' * (others > 1)}"]
    *first, last = names
    text = f"{', '.join(first)} and {last}" if first else last
    return f"line{'s' if first else ''} {text}" if from_lists else text


def list_problems(root: Path | str, problems: list[str], consequence: str) -> str:
    """Returns the error message for problems whose consequence is, for example, "nothing is trained"."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"{root}: {count} in the dataset, {consequence}:\n  " + "\n  ".join(grouped(problems))


def grouped(problems: list[str]) -> list[str]:
    """Returns all problems, or of more than MOST_LINES some of each kind, and how many more there are of it."""
    if len(problems) <= MOST_LINES:
        return problems
    kinds = {}
    for problem in problems:
        kinds.setdefault(_kind(problem), []).append(problem)
    each, lines = max(1, MOST_LINES // len(kinds) - 1), []
    for of_kind in (shown := list(kinds.values())[: MOST_LINES // 2]):
        lines += of_kind[:each]
        lines += [f"... and {len(of_kind) - each} more like this"] if len(of_kind) > each else []
    if others := len(problems) - sum(map(len, shown)):
        lines.append(f"... and {others} of {len(kinds) - len(shown)} other kinds")
    return lines


def _kind(problem: str) -> str:
    """Returns what the problems of a kind have in common: their way out, after the last semicolon."""
    _, semicolon, remedy = problem.rpartition("; ")
    return re.sub(r"\d+", "", remedy.partition(":")[0]) if semicolon else problem
