"""Examines clips: what a file holds, what of it the model sees, and what looks like an oversight.

The problem of a clip is returned as a sentence, so that a person sees all problems of a dataset at once.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from clips.frames import View, choose_source, count_of, covering_scale, read_image
from clips.known import File, Notes, file_key, look_at
from clips.listing import LFS, Clip, other_spelling
from clips.masks import refuse_misfit
from clips.motion import split_command
from clips.selection import Bucket, Selection, Unfit, lost_share, views_of
from files import file_hash, is_lfs_pointer, printable

LEAST_CUT, LEAST_UNSEEN_SECONDS = 0.005, 0.05  # share of the picture; less is not worth a word
MOST_LINES = 20  # of the message that lists problems
ALL_UNFIT = "--drop_unfit leaves out all clips: each is too short; name a shorter bucket, or take longer clips"
LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue


class Facts(NamedTuple):
    """What a video file holds, and what of it the model sees in one window."""

    width: int
    height: int
    fps: float  # mean, where frames are unevenly spaced
    num_frames: int
    num_seen: int  # frames that the model sees
    num_distinct: int  # of them: fewer where the file has fewer frames per second than the model
    seen_from: float  # time of the first of them, in seconds from the start of the file
    seen_until: float  # end of the last of them, likewise
    file: File
    view: View  # how the model sees it
    window: int = 0  # number of the window, in its clip
    image: str | None = None  # hash of the image that the video starts from
    mask: File | None = None  # whose white says what of it counts
    damage: str | None = None  # "is damaged at ..."; None: it is not, or has not been decoded yet
    # What `clips.motion.watch` says of it, where it has been decoded:
    motion: float | None = None
    is_still: bool = False
    cuts: tuple[float, ...] = ()
    is_all_white: bool = False  # whether its mask is, where that has been decoded

    @property
    def seconds(self) -> float:
        return self.num_frames / self.fps

    @property
    def bucket(self) -> Bucket:
        return Bucket(self.num_seen, self.view.height, self.view.width)

    def label(self, clip: Clip) -> str:
        """Returns how messages name the window: where its clip was read from, and where it begins."""
        return clip.problem(f"from {self.view.start:.2f} s" if self.view.start else "")

    def without_times(self) -> "Facts":
        """Returns facts that take little memory, also of long videos, and that nothing can be decoded by."""
        mask = self.mask and self.mask._replace(packed_times="")
        return self._replace(file=self.file._replace(packed_times=""), mask=mask)

    @property
    def scale(self) -> float:
        """The factor by which frames are resized; above 1 they are enlarged."""
        return covering_scale(self.height, self.width, self.view.height, self.view.width)

    @property
    def cropped(self) -> float:
        """The share of the picture that is cut off, from 0 to 1."""
        return lost_share(self.height, self.width, self.view.height, self.view.width)


class Files(NamedTuple):
    """What the files of a clip hold."""

    video: File
    image: str | None  # hash of the image that the video starts from
    mask: File | None


class Examined(NamedTuple):
    """What is known of a clip before it is decoded."""

    windows: list[Facts]  # of each window that the model sees; none where there is a problem
    problem: str | None = None  # why the clip cannot be used
    is_unfit: bool = False  # whether the clip is whole, but too short


def examine(clip: Clip, selection: Selection, notes: Notes | None = None, *, read_again: bool = False) -> Examined:
    """Returns the facts of a clip's windows, or its problem.

    Args:
        notes: what is known of its files, which need not be read then, and where what is found out is added.
        read_again: read them all the same.
    """
    try:
        files = look_at_files(clip, notes or Notes(), read_again=read_again)
    except ValueError as error:
        return Examined([], str(error))
    try:
        windows = [facts_of(clip.video, files.video, view) for view in _views(files.video, selection)]
    except ValueError as error:
        return Examined([], clip.problem(str(error)), isinstance(error, Unfit))
    return Examined(
        [facts._replace(image=files.image, mask=files.mask, window=number) for number, facts in enumerate(windows)]
    )


def look_at_files(clip: Clip, notes: Notes, *, read_again: bool = False) -> Files:
    """Returns what the files of a clip hold; raises a ValueError that names what is wrong."""
    for file in filter(None, (clip.video, clip.image, clip.mask)):
        if problem := _not_a_file(file):
            raise ValueError(clip.problem(problem, file))
    try:
        video = look_at(clip.video, notes, read_again=read_again)
    except ValueError as error:
        raise ValueError(clip.problem(str(error))) from error
    try:
        image = clip.image and _image_hash(clip.image, notes, read_again=read_again)
    except ValueError as error:
        raise ValueError(clip.problem(str(error), clip.image)) from error
    try:
        mask = clip.mask and look_at(clip.mask, notes, read_again=read_again)
        if mask:
            refuse_misfit(mask, video)
    except ValueError as error:
        raise ValueError(clip.problem(f"this mask {error}", clip.mask)) from error
    return Files(video, image, mask)


def picture_size(clip: Clip, notes: Notes, *, read_again: bool = False) -> tuple[int, int] | None:
    """Returns height and width of a clip's picture, None where `examine` says why it has none; adds to the notes."""
    try:
        video = look_at_files(clip, notes, read_again=read_again).video.video
    except ValueError:
        return None
    return video.height, video.width


def _views(file: File, selection: Selection) -> list[View]:
    if selection.is_plain:  # the times need not be unpacked for it
        return [selection.view]
    times = file.times
    seconds = (times - times[0]) * float(file.video.time_base)
    return views_of(file.video.height, file.video.width, seconds, selection)


def is_known(clip: Clip, notes: Notes) -> bool:
    """Returns whether `examine` need not read any file of a clip."""
    try:
        keys = [file_key("video", file) for file in (clip.video, clip.mask) if file]
        keys += [file_key("image", clip.image)] if clip.image else []
    except OSError:
        return False
    return all(key in notes for key in keys)


def _not_a_file(path: Path) -> str | None:
    """Returns why a path is no file that can be read; None if it is one."""
    if re.search("[\ud800-\udfff]", str(path)):
        return "its name is not UTF-8, so that no list or page could hold it; rename it"
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
    """Returns the facts of a view of a file; raises a ValueError if it gives too few frames."""
    video, indices, _, seconds = choose_source(path, file, view)
    if view.whole and len(indices) < view.max_num_frames:
        raise Unfit(
            f"gives {count_of(len(indices))} at --fps {view.fps}, and this base model needs {view.max_num_frames}; "
            "use a longer clip, remove it, or leave out all such clips with --drop_unfit"
        )
    span, seen_from = float(seconds[-1] - seconds[0]), float(seconds[indices[0]] - seconds[0])
    return Facts(
        width=video.width,
        height=video.height,
        fps=(len(seconds) - 1) / span if span else float(view.fps),
        num_frames=len(seconds),
        num_seen=len(indices),
        num_distinct=len(set(indices)),
        seen_from=seen_from,
        seen_until=seen_from + len(indices) / view.fps,
        file=file,
        view=view,
    )


def brightness(frames: torch.Tensor) -> float:
    """Returns the mean luma (ITU-R BT.601) of frames, uint8 [F, H, W, C], from 0 to 255."""
    columns = torch.stack([frame.float().mean(0) for frame in frames])  # [F, W, C]; ten times as fast as one mean
    return float(columns.double().mean((0, 1)) @ torch.tensor(LUMA, dtype=torch.float64))


def repetitions(clips: Sequence[Clip], facts: Sequence[Facts]) -> dict[str, list[list[Clip]]]:
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


def headline(facts: list[Facts], selection: Selection) -> str:
    """Returns one line on the sizes, rates and lengths of all clips, in the files and as the model sees them."""
    files = [fact for fact in facts if not fact.window]
    sizes = sorted({(fact.width, fact.height) for fact in files}, key=math.prod)
    rates = sorted({round(fact.fps, 2) for fact in files})
    before = f"{_range([f'{width}x{height}' for width, height in sizes])} at {_range([f'{rate:g}' for rate in rates])}"
    windows = f" in {len(facts)} windows" if len(facts) > len(files) else ""
    return f"{count_clips(len(files))} of {before} fps{windows} -> {_buckets(facts, selection)}"


def _buckets(facts: list[Facts], selection: Selection) -> str:
    """Returns how many windows have which size, the longest first, and the most frequent of equally long ones."""
    counts = Counter(fact.bucket for fact in facts).items()
    view, counts = selection.view, sorted(counts, key=lambda item: (-item[0].num_frames, -item[1]))
    rate = "stretched over each clip" if selection.is_stretched else f"at {view.fps} fps"
    if selection.buckets:
        return f"{', '.join(f'{count} of {bucket}' for bucket, count in counts)} (frames x height x width) {rate}"
    (longest, count), *others = [(bucket.num_frames, count) for bucket, count in counts]
    lengths = [f"{count} of {longest} frames", *(f"{count} of {length}" for length, count in others)]
    return f"{view.width}x{view.height} {rate}; {', '.join(lengths)}"


def unseen_seconds(windows: list[Facts]) -> float:
    """Returns how many seconds of a file are in none of its windows; skipped ones at the start are not counted."""
    seen = sorted((window.seen_from, window.seen_until) for window in windows)
    unseen, until = 0.0, seen[0][0] if windows[0].view.start == 0 else 0.0
    for begin, end in seen:
        unseen += max(begin - until, 0)
        until = max(until, end)
    return unseen + max(windows[0].seconds - until, 0)


def windows_by_clip(facts: list[Facts]) -> list[list[Facts]]:
    """Returns the windows of each clip, which follow each other in `facts`."""
    windows = []
    for fact in facts:
        windows += [[]] if not fact.window else []
        windows[-1].append(fact)
    return windows


def remarks(clips: list[Clip], facts: list[Facts], selection: Selection) -> list[str]:
    """Returns one line for each thing that the model does not see or that looks like an oversight."""
    lines, not_seen, fps = [], [], selection.view.fps
    windows = windows_by_clip(facts)
    unseen = [unseen_seconds(of_clip) for of_clip in windows]
    if unseen := [seconds for seconds in unseen if seconds >= LEAST_UNSEEN_SECONDS]:
        where = "at the end" if selection.clip_mode == "start" else "outside the windows"
        not_seen.append(f"up to {max(unseen):.1f} s {where} ({count_clips(len(unseen))})")
    if cropped := _clips_of(clips, facts, lambda fact: fact.cropped >= LEAST_CUT):
        most = max(fact.cropped for fact in facts)
        not_seen.append(f"up to {100 * most:.0f} % of the picture ({count_clips(len(cropped))})")
    if not_seen:
        lines.append(f"not seen: {', '.join(not_seen)}")
    if enlarged := _clips_of(clips, facts, lambda fact: fact.scale > 1):
        lines.append(f"scaled up, so less sharp than others of this size: {count_clips(len(enlarged))}")
    if slower := _clips_of(clips, facts, lambda fact: fact.num_distinct < fact.num_seen):
        lines.append(f"slower than {fps} fps, at least in places, so frames are seen twice: {count_clips(len(slower))}")
    if stills := _clips_of(clips, facts, lambda fact: fact.num_seen == 1 < fact.num_frames):
        shortest = selection.shortest_video
        why = f"too short for {shortest} frames at {fps} fps" if shortest else "no size has more than one frame"
        lines.append(f"{why}, so seen as a still: {_enumeration(stills)}")
    if unmoved := _clips_of(clips, facts, lambda fact: fact.is_still):
        lines.append(f"stills, whose frames do not change and teach a model not to move: {_enumeration(unmoved)}")
    if cut := [clip for clip, _, _ in cuts_by_clip(clips, facts)]:
        lines.append(f"more than one shot, with a cut between them: {_enumeration(cut)}")
    if empty := [str(bucket) for bucket in selection.empty(fact.bucket for fact in facts)]:
        lines.append(f"--buckets: no clip goes to {', '.join(empty)}")
    clips, facts = zip(*[(clip, fact) for clip, fact in zip(clips, facts) if not fact.window])
    return lines + _masks(clips, windows) + _pictures(clips, facts) + _repetitions(clips, facts)


def _clips_of(clips: list[Clip], facts: list[Facts], applies: Callable[[Facts], bool]) -> list[Clip]:
    """Returns the clips that have a window to which something applies, each once."""
    return list({clip.line: clip for clip, fact in zip(clips, facts) if applies(fact)}.values())


def cuts_by_clip(clips: list[Clip], facts: list[Facts]) -> list[tuple[Clip, Facts, list[float]]]:
    """Returns each clip with cuts in what the model sees of it, the facts of one of its windows, and all its cuts."""
    found = {}
    for clip, fact in zip(clips, facts):
        found.setdefault(clip.line, (clip, fact, set()))[-1].update(fact.cuts)
    return [(clip, fact, sorted(cuts)) for clip, fact, cuts in found.values() if cuts]


def list_cuts(clips: list[Clip], facts: list[Facts]) -> list[str]:
    """Returns a line on each clip that is more than one shot, with the command that splits it."""
    return grouped(
        [
            f"{clip.named}: {describe_cuts(cuts)}: {split_command(clip.video, fact.file.video, cuts)}"
            for clip, fact, cuts in cuts_by_clip(clips, facts)
        ]
    )


def describe_cuts(cuts: Sequence[float]) -> str:
    *first, last = [f"{cut:.2f}" for cut in cuts]
    times = f"{', '.join(first)} and {last}" if first else last
    return f"cuts to another shot at {times} s; split it there, and put the parts in its place, each with a caption"


def remark_unfit(unfit: list[Clip]) -> list[str]:
    """Returns a line on the clips that --drop_unfit leaves out."""
    return [f"left out, because too short (--drop_unfit): {_enumeration(unfit)}"] if unfit else []


def _masks(clips: Sequence[Clip], windows: list[list[Facts]]) -> list[str]:
    """Returns lines on how many clips have a mask, and on masks that leave nothing out."""
    masked, lines = sum(bool(of_clip[0].mask) for of_clip in windows), []
    if masked:
        whole = f"; of {count_clips(len(windows) - masked)} everything counts" if masked < len(windows) else ""
        lines.append(f"with a mask: {count_clips(masked)}{whole}")
    if white := [clip for clip, of_clip in zip(clips, windows) if all(fact.is_all_white for fact in of_clip)]:
        lines.append(f"masks that are white everywhere, and so leave nothing out: {_enumeration(white)}")
    return lines


def _pictures(clips: Sequence[Clip], facts: Sequence[Facts]) -> list[str]:
    """Returns the lines on what is unusual about the pictures of some videos."""
    clips_of_remark = {}
    for clip, fact in zip(clips, facts):
        for remark in (*fact.file.video.remarks, *filter(None, [fact.damage])):
            clips_of_remark.setdefault(remark, []).append(clip)
    return [f"{_enumeration(group)}: {remark}" for remark, group in clips_of_remark.items()]


def _repetitions(clips: Sequence[Clip], facts: Sequence[Facts]) -> list[str]:
    """Returns the lines on videos and captions that are listed more than once, the most frequent first."""
    lines = []
    for kind, groups in repetitions(clips, facts).items():
        if groups:
            more = f"; and {len(groups) - 5} more" if len(groups) > 5 else ""
            lines.append(f"the same {kind} more than once: {'; '.join(map(_enumeration, groups[:5]))}{more}")
    return lines


def list_motion(clips: list[Clip], facts: list[Facts]) -> list[str]:
    """Returns a line on the motion of each window, the least first; of many windows only the least and the most."""
    moving = sorted(
        (fact.motion, clip.line, fact.window, clip.named) for clip, fact in zip(clips, facts) if fact.motion is not None
    )
    lines = [
        f"  {value:.1f} {printable(named)}{f', window {window + 1}' if window else ''}"
        for value, _, window, named in moving
    ]
    if len(lines) > MOST_LINES:
        most = lines[-MOST_LINES // 2 :]
        lines = [*lines[: MOST_LINES // 2], f"  ... {len(lines) - MOST_LINES} more between ...", *most]
    return ["motion, in levels of 255 per second:", *lines] if lines else []


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
    text = printable(f"{', '.join(first)} and {last}" if first else last)
    return f"line{'s' if first else ''} {text}" if from_lists else text


def list_problems(root: Path | str, problems: list[str], consequence: str) -> str:
    """Returns the error message for problems whose consequence is, for example, "nothing is trained"."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = grouped(problems)
    if len(problems) > MOST_LINES:
        lines.append(f"all {len(problems)}, a line each: python dataset.py check FOLDER --problems_file FILE")
    return f"{root}: {count} in the dataset, {consequence}:\n  " + "\n  ".join(lines)


def grouped(problems: list[str]) -> list[str]:
    """Returns all problems, or of more than MOST_LINES some of each kind, and how many more there are of it."""
    problems = [printable(problem) for problem in problems]
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
