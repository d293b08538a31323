"""Reads a video file as a player shows it: when each frame is shown, and the pictures that are shown at given times.

FFmpeg decodes, through PyAV. A frame is identified by its presentation time: containers are often wrong about how many
frames they hold, and a file that was cut without re-encoding holds frames that nobody is to see.

Shapes: H height, W width, C channels.
"""

import itertools
import math
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.logging import Capture
from av.sidedata.sidedata import SideDataContainer
from av.stream import Disposition

NO_FRAME = "no frame where the file promises one"
FRAMES_COMPARED = 8  # decoded to see whether the packets of a file tell when its frames are shown
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}  # by their numbers in ITU-T H.273
TO_SDR = (
    "-vf zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709,tonemap=mobius:desat=0,"
    "zscale=t=bt709:m=bt709:r=tv,format=yuv420p -c:v libx264 -crf 16"
)
FFMPEG_OF_IMAGEIO = '"$(python -c "import imageio_ffmpeg; print(imageio_ffmpeg.get_ffmpeg_exe())")"'

av.logging.set_level(av.logging.ERROR)  # what FFmpeg reports is collected by `Capture`, nothing is printed
av.logging.set_skip_repeated(False)


class Video(NamedTuple):
    """How a file is read, and how a player shows it."""

    width: int  # pixels, upright and square
    height: int
    first: int  # when the first frame is shown, in units of time_base
    time_base: Fraction  # seconds; the unit of presentation times
    is_numbered: bool  # the file has no usable times: they are the numbers of its frames, and it is read from its start
    remarks: tuple[str, ...]  # what is unusual about its picture: "is interlaced ..."
    damage: tuple["Damage", ...]  # what its packets show of it, before any is decoded


class Damage(NamedTuple):
    seconds: float  # on the clock of the file, which may start late
    report: str  # in FFmpeg's words


class _Missing(Exception):
    """No frame is shown at a time that was asked for."""


# ---- what a file holds -----------------------------------------------------------------------------------------------


def examine_video(path: Path) -> tuple[Video, np.ndarray]:
    """Returns how a file is to be read, and when each of its frames is shown, ascending, int64 [F].

    All packets are read, but only the first frames are decoded where they show that the packets tell the times.

    Raises:
        ValueError: FFmpeg cannot read the file, it holds no video, or its colours are not for SDR screens.
    """
    damage, logs = [], []
    with _opened(path, logs) as (container, stream):
        packets = _packets(container, stream, damage)
        times = [packet.pts for packet in packets if packet.size and not packet.is_discard]
        if logs:  # of a short file, which opening reads to its end
            known = [time for time in times if time is not None]
            damage.append(Damage(float(max(known, default=0) * stream.time_base), _first_report(logs)))
        ordered = container.format.name != "avi"  # it stores the order of decoding: H.264 in it has wrong times
    with _opened(path) as (container, stream):
        first = list(itertools.islice(_frames(container, stream, []), FRAMES_COMPARED))
        rate = stream.codec_context.framerate or stream.guessed_rate
        time_base, pixel_shape = stream.time_base, stream.sample_aspect_ratio or 1
    if not first:
        raise ValueError("holds no frame that FFmpeg can decode; play it to check, and remove it")
    if None in times or not ordered or [frame.pts for frame in first] != sorted(times)[: len(first)]:
        with _opened(path) as (container, stream):
            times = [frame.pts for frame in _frames(container, stream, [])]
        ordered = None not in times and all(earlier < later for earlier, later in itertools.pairwise(times))
    is_numbered = not ordered or len(set(times)) < len(times)
    if is_numbered:
        if not rate:
            raise ValueError(
                "tells no times and no frame rate; re-encode it at the right one: ffmpeg -r 24 -i in out.mp4"
            )
        times, time_base = range(len(times)), 1 / Fraction(rate)
    times = np.array(sorted(times), np.int64)
    _refuse_hdr(path, first[0])
    width, height = _shown_size(first[0], pixel_shape)
    video = Video(
        width=width,
        height=height,
        first=int(times[0]),
        time_base=time_base,
        is_numbered=is_numbered,
        remarks=tuple(_remarks(first)),
        damage=tuple(damage),
    )
    return video, times


def _refuse_hdr(path: Path, frame: av.VideoFrame) -> None:
    if transfer := HDR_TRANSFERS.get(frame.color_trc):
        source, result = (shlex.quote(str(file)) for file in (path, path.with_name(f"{path.stem}-sdr.mp4")))
        raise ValueError(
            f"is HDR video ({transfer}), whose colours would be taken for washed-out SDR, and how bright it is meant "
            "to look is a matter of taste; make SDR of it with a tone curve that you like, let the new file take the "
            "name, row or line of this one, and move this one to another folder, for example: "
            f"{ffmpeg_program()} -i {source} {TO_SDR} {result}"
        )


def ffmpeg_program() -> str:
    """Returns how a shell calls ffmpeg, the one of imageio-ffmpeg where there is no other."""
    return "ffmpeg" if shutil.which("ffmpeg") else FFMPEG_OF_IMAGEIO


def _remarks(first: list[av.VideoFrame]) -> Iterator[str]:
    right, _ = _axes(first[0])
    angle = math.degrees(math.atan2(right[1], right[0]))
    tilt = abs(angle - 90 * round(angle / 90))
    if tilt > 1:
        yield f"is to be shown turned by {tilt:.0f} degrees beyond quarter turns, which is left out"
    if any(frame.interlaced_frame for frame in first):
        yield "is interlaced, so moving edges are combed; deinterlace it: ffmpeg -i in -vf bwdif out.mp4"
    if any(_has_alpha(frame) and frame.to_ndarray(format="rgba")[..., 3].min() < 255 for frame in first):
        yield "is transparent in places, which are laid over black"


# ---- pictures --------------------------------------------------------------------------------------------------------


def read_pictures(path: Path, video: Video, wanted: list[int], damage: list[Damage]) -> Iterator[np.ndarray]:
    """Yields the pictures shown at the times `wanted`, upright, uint8 [H, W, C].

    They have the file's pixels, which need not be square: where the file says so, they are to be scaled to the size of
    `video`. Neither memory nor time grow with the length of the file, if it finds its key frames.

    Args:
        wanted: in units of video.time_base, ascending; may repeat.
        damage: receives what FFmpeg reports of the file on the way. A frame that is lost is shown by the one before it.

    Raises:
        ValueError: no frame can be decoded.
    """
    done, known = 0, len(damage)
    if not video.is_numbered and wanted[0] > video.first:
        try:
            for picture in _read(path, video, wanted, damage, seek=True):
                yield picture
                done += 1
            return
        except _Missing:
            del damage[known:]
    yield from itertools.islice(_read(path, video, wanted, damage, seek=False), done, None)


def _read(path: Path, video: Video, wanted: list[int], damage: list[Damage], *, seek: bool) -> Iterator[np.ndarray]:
    """Yields the pictures; where one is missing, raises `_Missing` after seeking, else shows the one before it."""
    with _opened(path) as (container, stream):
        key_frame = _seek(container, stream, wanted[0]) if seek else None
        size, last, waiting = None, None, iter(wanted)
        time = next(waiting)
        for number, frame in enumerate(_frames(container, stream, damage, since=key_frame)):
            shown_at = number if video.is_numbered else frame.pts
            size = size or (frame.width, frame.height)  # of the first, where it changes, as ffmpeg does
            while time is not None and shown_at is not None and shown_at >= time:
                if shown_at > time:
                    if seek:
                        raise _Missing
                    damage.append(Damage(float(time * video.time_base), NO_FRAME))
                yield _picture(frame if shown_at == time or last is None else last, *size)
                time = next(waiting, None)
            if time is None:
                return
            last = frame
        if seek:
            raise _Missing
        if last is None:
            raise ValueError("holds no frame that FFmpeg can decode; play it to check, and remove it")
        for missing in (time, *waiting):
            damage.append(Damage(float(missing * video.time_base), NO_FRAME))
            yield _picture(last, *size)


def _seek(container: av.container.InputContainer, stream: av.VideoStream, time: int) -> int:
    """Seeks to the key frame before the last one that is shown by `time`; returns when that last one is shown.

    Not to the last: frames after it may refer to frames before it, in an open group of pictures or where a picture is
    refreshed in parts.
    """
    last = _key_frame_before(container, stream, time)
    first = _key_frame_before(container, stream, last - 1)
    container.seek(first, stream=stream)
    return last


def _key_frame_before(container: av.container.InputContainer, stream: av.VideoStream, time: int) -> int:
    with Capture():
        try:
            container.seek(time, stream=stream)
            key_frame = next((packet.pts for packet in container.demux(stream) if packet.is_keyframe), None)
        except av.error.FFmpegError:
            key_frame = None
    if key_frame is None or key_frame > time:
        raise _Missing
    return key_frame


def _picture(frame: av.VideoFrame, width: int, height: int) -> np.ndarray:
    """Returns the frame as it is to be shown, over black, uint8 [H, W, C]; converts colours as ffmpeg does."""
    options = {"width": width, "height": height, "interpolation": "BICUBIC"}
    if _has_alpha(frame):
        rgba = frame.to_ndarray(format="rgba", **options)
        picture = (rgba[..., :3].astype(np.uint16) * rgba[..., 3:] + 127) // 255
        picture = picture.astype(np.uint8)
    else:
        picture = frame.to_ndarray(format="rgb24", **options)
    right, down = _axes(frame)
    if _is_quarter_turned(frame):
        picture, right, down = picture.swapaxes(0, 1), down, right
    return picture[:: -1 if down[1] < 0 else 1, :: -1 if right[0] < 0 else 1]


def _has_alpha(frame: av.VideoFrame) -> bool:
    return any(component.is_alpha for component in frame.format.components)


def _axes(frame: av.VideoFrame) -> tuple[tuple[float, float], tuple[float, float]]:
    """Returns where the display matrix takes a picture's right and down: (x, y) of each."""
    # `frame.side_data` of PyAV 18 makes a cycle with the frame, whose memory then waits for the garbage collector.
    matrix = SideDataContainer(frame).get("DISPLAYMATRIX")
    if matrix is None:
        return (1, 0), (0, 1)
    a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), np.int32) / 2**16
    return (a, b), (c, d)


def _is_quarter_turned(frame: av.VideoFrame) -> bool:
    right, _ = _axes(frame)
    return abs(right[1]) > abs(right[0])


def _shown_size(frame: av.VideoFrame, pixel_shape: Fraction) -> tuple[int, int]:
    """Returns width and height as a player shows them, which makes pixels square by their width."""
    width, height = round(frame.width * pixel_shape), frame.height
    return (height, width) if _is_quarter_turned(frame) else (width, height)


# ---- packets and frames ----------------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path, logs: list | None = None) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Opens a file and its first video that is no cover picture; `logs` receives what FFmpeg reports."""
    try:
        with Capture() as reports:
            container = av.open(str(path))
    except av.error.FFmpegError as error:
        raise ValueError(
            f"cannot be read as a video: the file is damaged or not a video ({error.strerror}); play it to check, and "
            "re-encode it (ffmpeg -i in -c:v libx264 out.mp4) or remove it"
        ) from error
    if logs is not None:
        logs += reports
    with container:
        stream = next((s for s in container.streams.video if not s.disposition & Disposition.attached_pic), None)
        if stream is None:
            raise ValueError("holds no video, only sound or pictures; remove it")
        if stream.codec_context is None:
            raise ValueError("is coded in a way that FFmpeg does not know; re-encode it with the program that made it")
        stream.thread_count = 1  # so that FFmpeg's reports come in this thread; several files are read at once
        yield container, stream


def _packets(
    container: av.container.InputContainer, stream: av.VideoStream, damage: list[Damage]
) -> Iterator[av.Packet]:
    packets, seconds = container.demux(stream), 0.0
    while True:
        with Capture() as logs:
            try:
                packet = next(packets, None)
            except av.error.FFmpegError as error:
                packet, logs = None, [(0, "", str(error))]
        if logs:
            damage.append(Damage(seconds, _first_report(logs)))
        if packet is None:
            return
        if packet.pts is not None:
            seconds = float(packet.pts * packet.time_base)
        yield packet


def _frames(
    container: av.container.InputContainer, stream: av.VideoStream, damage: list[Damage], since: int | None = None
) -> Iterator[av.VideoFrame]:
    """Yields the frames from the first key frame on.

    Args:
        damage: receives what FFmpeg reports of frames shown at `since` or later; what a file begins with before its
            first frame, such as the rest of a broadcast, is no damage.
    """
    begun = False
    for packet in _packets(container, stream, damage):
        if not begun and since is not None and packet.size and not packet.is_keyframe:
            continue
        with Capture() as logs:
            try:
                frames = packet.decode()
            except av.error.FFmpegError as error:
                frames, logs = [], [(0, "", str(error))]
        reports = [_first_report(logs)] if logs else []
        reports += ["parts of a picture are lost"] * any(frame.is_corrupt for frame in frames)
        reports += ["a packet is incomplete"] * packet.is_corrupt
        if reports and begun and (since is None or packet.pts is None or packet.pts >= since):
            damage.append(Damage(float((packet.pts or 0) * stream.time_base), reports[0]))
        begun = begun or bool(frames) or since is not None
        yield from frames


def _first_report(logs: list[tuple[int, str, str]]) -> str:
    return logs[0][2].strip()
