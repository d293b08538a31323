"""The benchmarks of many clips and of the decoders measure what they say."""

import decoders
import imageio
import pytest
import scale
from make_example import draw_clip


@pytest.mark.parametrize("distinct", [False, True])
def test_a_second_start_on_scale_encodes_and_reads_nothing(tmp_path, monkeypatch, distinct):
    scale.make_dataset(tmp_path, 5, 2, distinct=distinct)
    assert scale.start(tmp_path / "clips", check_all=False)["clips"] == 5
    assert len(list((tmp_path / "clips" / ".cogvideox_cache" / "latents").iterdir())) == (5 if distinct else 2)
    for name in ("scale.encode_videos", "scale.encode_captions", "clips.known.examine_video"):
        monkeypatch.setattr(name, lambda *_: pytest.fail("read or encoded again"))
    assert scale.start(tmp_path / "clips", check_all=False)["clips"] == 5


def test_both_decoders_read_all_frames_in_turn(tmp_path):
    pytest.importorskip("decord", reason="decord has wheels for x86-64 only")
    path = tmp_path / "clip.mp4"
    imageio.mimsave(path, draw_clip("circle", "red", "left", 160, 64, 96), fps=24, macro_block_size=1)
    result = decoders.compare(path, 2, clips=2, threads=2)
    assert {name: len(seconds) for name, seconds in result["seconds"].items()} == {"pyav": 2, "decord": 2}
    rates = result["frames_per_second"]
    assert result["pyav_to_decord"] == pytest.approx(rates["pyav"] / rates["decord"], rel=0.01)
