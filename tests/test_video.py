"""Every kind of file that people have is read as ffmpeg reads it, from any start; what is damaged is said."""

import gc
import random
import re
import shutil
import subprocess
import sys

import av
import imageio_ffmpeg
import numpy as np
import pytest

from clips import video
from clips.frames import View, choose_source, read_frames
from clips.known import look_at
from clips.video import examine_video, read_pictures

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
X264 = "-c:v libx264 -preset veryfast -crf 12 -pix_fmt yuv420p"
X265 = "-c:v libx265 -preset ultrafast -pix_fmt yuv420p -x265-params log-level=error"
VIEW = View(
    height=240, width=320, fps=8, max_num_frames=9, skip_frames_start=0, skip_frames_end=0, crop="center", seed=0
)

# What makes each file: options for a drawn film of so many seconds, or the file that it is made from.
MADE = {
    "plain.mp4": (2, f"{X264} -g 20"),
    "gop60.mp4": (6, f"{X264} -g 60"),
    "single.mp4": (2, f"{X264} -frames:v 1"),
    "tiny.mp4": (1, f"{X264} -s 48x36"),
    "open_gop.mp4": (4, f"{X264} -x264-params open-gop=1:keyint=30:bframes=3:b-adapt=0"),
    "open_gop_hevc.mp4": (4, f"{X265}:open-gop=1:keyint=30:bframes=3"),
    "refreshed.mp4": (4, f"{X264} -x264-params intra-refresh=1:keyint=30"),
    "variable.mp4": (2, f"-vf setpts='if(lt(N,30),N/30,1+(N-30)/10)/TB' -fps_mode vfr {X264}"),
    "ntsc.mp4": (2, f"{X264} -r 30000/1001"),
    "late.mkv": (2, f"{X264} -output_ts_offset 5"),
    "b_frames.avi": (2, "-c:v mpeg4 -vtag xvid -q:v 2 -bf 2"),
    "b_frames.mp4": (2, "-c:v mpeg4 -q:v 2 -bf 2"),
    "program.mpg": (2, "-c:v mpeg2video -q:v 2 -bf 2"),
    "windows.wmv": (2, "-c:v wmv2 -q:v 2 -g 12"),
    "flash.flv": (2, "-c:v flv1 -q:v 2"),
    "motion.mov": (1, "-c:v mjpeg -q:v 3"),
    "camera.mov": (1, "-c:v prores"),
    "lossless.mkv": (1, "-c:v ffv1"),
    "theora.ogv": (2, "-c:v libtheora -q:v 7"),
    "vp8.webm": (2, "-c:v libvpx -b:v 1M -deadline realtime -cpu-used 6"),
    "alt_ref.webm": (4, "-c:v libvpx-vp9 -b:v 1M -auto-alt-ref 1 -lag-in-frames 16 -deadline realtime -cpu-used 6"),
    "av1.mp4": (1, "-c:v libaom-av1 -cpu-used 8 -crf 30"),
    "animation.gif": (2, "-vf fps=10"),
    "animation.apng": (2, "-vf fps=10 -f apng"),
    "full_range.mp4": (1, f"-vf scale=out_range=full:out_color_matrix=bt709 {X264} -color_range pc -colorspace bt709"),
    "full_chroma.mp4": (1, "-c:v libx264 -pix_fmt yuv444p"),
    "ten_bit.mp4": (1, "-c:v libx264 -crf 12 -pix_fmt yuv422p10le"),
    "grey.mkv": (1, "-c:v ffv1 -pix_fmt gray"),
    "sound.mp4": (2, f"-f lavfi -i sine=duration=2 {X264} -c:a aac"),
    "cut.mp4": ("gop60.mp4", "-ss 3.2 -to 5.5 -i {} -c copy"),
    "cut.mov": ("gop60.mp4", "-ss 1.5 -t 3 -i {} -c copy"),
    "cut.mkv": ("gop60.mp4", "-ss 1.5 -i {} -c copy"),
    "cut_open_gop.mp4": ("open_gop_hevc.mp4", "-ss 1.7 -i {} -c copy"),
    "transport.ts": ("gop60.mp4", "-i {} -c copy"),
    "cut.ts": ("open_gop_hevc.mp4", "-ss 1.7 -i {} -c copy"),
    "fragments.mp4": ("gop60.mp4", "-i {} -c copy -movflags frag_keyframe+empty_moov"),
    "h264.avi": ("plain.mp4", "-i {} -c copy"),
    "h264.flv": ("plain.mp4", "-i {} -c copy"),
    "raw.264": ("plain.mp4", "-i {} -c copy -bsf:v h264_mp4toannexb"),
    "raw.265": ("open_gop_hevc.mp4", "-i {} -c copy"),
    "rotated.mp4": ("plain.mp4", "-display_rotation 90 -i {} -c copy"),
    "rotated_back.mp4": ("plain.mp4", "-display_rotation -89.97 -i {} -c copy"),
    "upside_down.mkv": ("plain.mp4", "-display_rotation 180 -i {} -c copy"),
    "mirrored.mp4": ("plain.mp4", "-display_hflip -i {} -c copy"),
    "mirrored_turned.mp4": ("plain.mp4", "-display_rotation 90 -display_hflip -i {} -c copy"),
    "flipped_turned.mp4": ("plain.mp4", "-display_rotation 270 -display_vflip -i {} -c copy"),
    "with_cover.mp4": ("plain.mp4", "-i {0} -i {0} -map 1 -map 0 -c:v:0 png -frames:v:0 1 -c:v:1 copy "
                       "-disposition:v:0 attached_pic"),
    # Not read as they are shown, or not at all: see the tests by name.
    "anamorphic.mp4": (1, f"-vf setsar=4/3 {X264}"),
    "transparent.mov": (1, "-vf format=yuva444p10le,geq=lum='lum(X,Y)':cb='cb(X,Y)':cr='cr(X,Y)':a=X*3 -c:v prores_ks"),
    "tilted.mp4": ("plain.mp4", "-display_rotation 30 -i {} -c copy"),
    "interlaced.mp4": (1, f"-vf interlace,setfield=tff {X264} -flags +ildct+ilme"),
    "hlg.mp4": (1, f"{X265}:transfer=arib-std-b67:colorprim=bt2020:colormatrix=bt2020nc -color_trc arib-std-b67 "
                "-color_primaries bt2020 -colorspace bt2020nc"),
    "sound_only.mp4": (1, "-vn -f lavfi -i sine=duration=2 -map 1 -c:a aac"),
}  # fmt: skip
OTHERWISE = ["anamorphic.mp4", "transparent.mov", "tilted.mp4", "interlaced.mp4", "hlg.mp4", "sound_only.mp4"]
EXACT = [name for name in MADE if name not in OTHERWISE]


def run_ffmpeg(*arguments):
    return subprocess.run([FFMPEG, "-hide_banner", "-nostdin", "-y", *arguments], capture_output=True, check=True)


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Makes a file by its name in MADE when it is first asked for."""
    folder = tmp_path_factory.mktemp("media")

    def make(name):
        if not (folder / name).exists():
            source, options = MADE[name]
            if isinstance(source, str):
                run_ffmpeg(*options.format(make(source)).split(), str(folder / name))
            else:
                drawn = f"testsrc2=size=320x240:rate=30:duration={source}"
                run_ffmpeg("-f", "lavfi", "-i", drawn, *options.split(), str(folder / name))
        return folder / name

    return make


def as_ffmpeg_reads(path):
    """Returns ffmpeg's own frames, [F, H, W, C], and their times in seconds."""
    options = ["-map", "0:v:0", "-vf", "showinfo", "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    if path.name == "with_cover.mp4":
        options[1] = "0:v:1"
    result = run_ffmpeg("-i", str(path), *options, "-")
    times = re.findall(r"pts_time:\s*(\S+)", result.stderr.decode())
    width, height = map(int, re.search(r" s:(\d+)x(\d+) ", result.stderr.decode()).groups())
    return np.frombuffer(result.stdout, np.uint8).reshape(-1, height, width, 3), np.array(times, float)


@pytest.mark.parametrize("name", EXACT)
def test_frames_and_times_are_those_of_ffmpeg_from_any_start(media, name):
    truth, seconds = as_ffmpeg_reads(media(name))
    described, times = examine_video(media(name))
    assert (described.height, described.width) == truth.shape[1:3] and described.remarks == ()
    ours = (times - times[0]) * float(described.time_base)
    np.testing.assert_allclose(ours, seconds - seconds[0], atol=1e-3)

    draw, damage = random.Random(name), []
    for start in [0, *(draw.randrange(len(times)) for _ in range(3))]:
        indices = [min(start + 4 * i, len(times) - 1) for i in range(9)]
        pictures = list(read_pictures(media(name), described, times[indices].tolist(), damage))
        assert len(pictures) == 9
        for index, picture in zip(indices, pictures):
            difference = np.abs(picture.astype(int) - truth[index]).mean()
            assert difference <= (2 if name == "ten_bit.mp4" else 0), (index, difference)
    assert damage == []


def test_reading_the_end_of_a_long_file_decodes_two_groups_of_pictures_at_most(media, monkeypatch):
    described, times = examine_video(media("gop60.mp4"))
    decoded, frames = [], video._frames

    def counted(*arguments, **options):
        for frame in frames(*arguments, **options):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(video, "_frames", counted)
    list(read_pictures(media("gop60.mp4"), described, times[-9:].tolist(), []))
    assert len(decoded) <= 2 * 60 < len(times)


@pytest.mark.parametrize("name", ["plain.mp4", "rotated.mp4"])
def test_no_frame_waits_for_the_garbage_collector(media, name):
    path = media(name)
    gc.collect()
    gc.disable()
    try:
        described, times = examine_video(path)
        list(read_pictures(path, described, times[:9].tolist(), []))
        assert not [thing for thing in gc.get_objects() if isinstance(thing, av.VideoFrame)]
    finally:
        gc.enable()


def test_wide_pixels_are_shown_wide(media):
    described, _ = examine_video(media("anamorphic.mp4"))
    assert (described.width, described.height) == (427, 240)
    wide = media("anamorphic.mp4").with_name("wide.mp4")
    run_ffmpeg("-i", str(media("anamorphic.mp4")), "-vf", "scale=iw*sar:ih,setsar=1", *X264.split(), str(wide))
    as_shown, as_scaled = (read_frames(path, VIEW, mirrored=False).int() for path in (media("anamorphic.mp4"), wide))
    assert (as_shown - as_scaled).abs().float().mean() < 5  # ffmpeg's bicubic filter is another


def test_transparent_places_are_laid_over_black(media):
    path = media("transparent.mov")
    described, times = examine_video(path)
    assert described.remarks == ("is transparent in places, which are laid over black",)
    black = path.with_name("black.mkv")
    over = "color=black:size=320x240:rate=30[b];[b][0:v]overlay=shortest=1:format=gbrp"
    run_ffmpeg("-i", str(path), "-filter_complex", over, "-c:v", "ffv1", "-pix_fmt", "gbrp", str(black))
    (ours,) = read_pictures(path, described, [int(times[5])], [])
    assert np.abs(ours.astype(int) - as_ffmpeg_reads(black)[0][5]).mean() < 2


@pytest.mark.parametrize("name, remark", [("tilted.mp4", "turned by 30 degrees"), ("interlaced.mp4", "is interlaced")])
def test_what_is_not_shown_as_meant_is_remarked_on(media, name, remark):
    (said,) = examine_video(media(name))[0].remarks
    assert remark in said


@pytest.mark.parametrize(
    "name, problem", [("hlg.mp4", r"HDR video \(HLG\).*hlg-sdr\.mp4$"), ("sound_only.mp4", "holds no video")]
)
def test_what_cannot_be_used_is_refused_by_name(media, name, problem):
    with pytest.raises(ValueError, match=problem):
        examine_video(media(name))


@pytest.mark.parametrize("has_ffmpeg", [True, False])
def test_the_line_of_the_message_makes_sdr_beside_the_hdr_file(media, tmp_path, monkeypatch, has_ffmpeg):
    hdr = shutil.copy(media("hlg.mp4"), tmp_path / "my clip's.mp4")
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}" if has_ffmpeg else None)
    with pytest.raises(ValueError, match="is HDR video") as refused:
        examine_video(hdr)
    line = str(refused.value).partition("for example: ")[2]
    assert line.startswith("ffmpeg -i " if has_ffmpeg else '"$(python -c ')
    programs = tmp_path / "programs"
    programs.mkdir()
    name, program = ("ffmpeg", FFMPEG) if has_ffmpeg else ("python", sys.executable)
    (programs / name).write_text(f'#!/bin/sh\nexec "{program}" "$@"\n')
    (programs / name).chmod(0o755)
    subprocess.run(line, shell=True, check=True, capture_output=True, env={"PATH": str(programs)})
    sdr, times = examine_video(tmp_path / "my clip's-sdr.mp4")
    assert (sdr.width, sdr.height, len(times)) == (320, 240, 30)


@pytest.mark.parametrize("content", [b"", b"text\n", b"\0" * 4096])
def test_what_is_no_video_is_refused(tmp_path, content):
    (tmp_path / "clip.mp4").write_bytes(content)
    with pytest.raises(ValueError, match="damaged or not a video"):
        examine_video(tmp_path / "clip.mp4")


@pytest.mark.parametrize("name", ["plain.mp4", "gop60.mp4", "b_frames.avi", "program.mpg", "transport.ts", "flash.flv"])
@pytest.mark.parametrize("seed", range(3))
def test_flipped_bits_are_reported_with_their_time(media, tmp_path, name, seed):
    content, draw = bytearray(media(name).read_bytes()), random.Random(seed)
    for _ in range(20):
        content[draw.randrange(len(content) // 4, len(content) * 3 // 4)] ^= 1 << draw.randrange(8)
    (tmp_path / name).write_bytes(content)
    damage = []
    try:
        described, times = examine_video(tmp_path / name)
        list(read_pictures(tmp_path / name, described, times.tolist(), damage))
    except ValueError as error:
        damage.append(str(error))
    assert damage
    assert any(isinstance(entry, str) or entry.seconds > 0 for entry in damage)


@pytest.mark.parametrize("name", ["fragments.mp4", "late.mkv", "h264.flv", "vp8.webm"])
def test_a_file_that_ends_early_is_reported(media, tmp_path, name):
    content = media(name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    described, times = examine_video(tmp_path / name)
    damage = list(described.damage)
    pictures = list(read_pictures(tmp_path / name, described, times.tolist(), damage))
    assert damage and len(pictures) == len(times)


def test_damage_is_refused_unless_it_is_asked_for(media, tmp_path):
    content = bytearray(media("plain.mp4").read_bytes())
    content[len(content) // 3 : len(content) // 3 + 500] = bytes(500)
    (tmp_path / "clip.mp4").write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged at \d\.\d\d s .*--allow_damaged"):
        read_frames(tmp_path / "clip.mp4", VIEW, mirrored=False)
    damage = []
    read_frames(tmp_path / "clip.mp4", VIEW, mirrored=False, damage=damage)
    assert damage


def test_decord_reads_what_both_time_alike_and_refuses_the_rest(media):
    pytest.importorskip("decord", reason="decord has wheels for x86-64 only")
    by_decord = VIEW._replace(video_decoder="decord")
    plain = [read_frames(media("plain.mp4"), view, mirrored=False).int() for view in (VIEW, by_decord)]
    assert (plain[0] - plain[1]).abs().float().mean() < 1
    for name in ("cut.mp4", "h264.avi", "av1.mp4"):
        with pytest.raises(ValueError, match="--video_decoder pyav"):
            choose_source(media(name), look_at(media(name)), by_decord)
