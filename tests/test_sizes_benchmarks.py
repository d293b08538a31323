"""The benchmarks of buckets, sizes, preservation, masks and learning rates: what they make of their measurements."""

import json
import subprocess
import sys
from functools import partial

import imageio
import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import buckets
import masks
import preservation
import rates
import sizes
import small

from clips.facts import examine
from clips.frames import View
from clips.listing import Columns, Folder, read_listing
from clips.masks import read_mask
from clips.selection import Selection, bucket_option
from cogvideox.base_model import read_base_model


@pytest.fixture(scope="module")
def base():
    return read_base_model(str(small.SMALL))


class MadeUp(buckets.Course):
    """A course whose clips are not drawn, and whose updates take as long as their longest batch has tokens."""

    def __init__(self, base, sizes, args):
        self.base, self.sizes, self.args = base, sizes, args
        self.max_tokens = args.clips * base.num_tokens(*base.latent_shape(*buckets.LANDSCAPE))

    def seconds(self, *, ranks, group, compiled=False):
        return [max(update) / 1000 for update in self.tokens(ranks, group)]


def test_an_update_has_the_tokens_of_its_batches(base):
    course = MadeUp(base, (buckets.LANDSCAPE, buckets.STILL), buckets.parse_args(["--updates", "9"]))
    clip, still = (base.num_tokens(*base.latent_shape(*size)) for size in course.sizes)
    assert course.max_tokens == 4 * clip
    of_images = {course.max_tokens // still * still, buckets.CLIPS % (course.max_tokens // still) * still} - {0}
    counts = [count for update in course.tokens(ranks=1, group=8) for count in update]
    assert set(counts) <= {4 * clip} | of_images and len(counts) == 9


def test_ranks_with_batches_of_one_bucket_wait_for_none(base):
    args = buckets.parse_args(["--updates", "40"])
    one = MadeUp(base, (buckets.LANDSCAPE,), args)
    several = MadeUp(base, tuple(buckets.DATASETS["four buckets, one of images"]), args)
    assert buckets.idle_share(one, 2, 8) == 0
    assert buckets.idle_share(several, 2, 8) <= buckets.idle_share(several, 2, 1)
    assert buckets.throughput(one, 2, 8) == pytest.approx(2000)


def test_the_sizes_of_the_benchmarks_are_buckets():
    for size in {*sizes.SAMPLED, sizes.STILL, *(size for of in buckets.DATASETS.values() for size in of)}:
        assert tuple(bucket_option(sizes.name_of(size))) == size


def test_shares_are_relative_to_the_base_model():
    names = ["colour with the word", "colour without the word", "motion with the word", "motion without the word"]
    base, tuned = ({"9x64x96": dict(zip(names, values))} for values in ((0.1, 0.2, 10, 20), (0.02, 0.19, 9, 21)))
    assert sizes.shares(base, tuned)["9x64x96"] == {
        "colour lost with the word": 0.8, "colour kept without it": 0.95, "motion with the word": 0.9,
        "motion without it": 1.05,
    }  # fmt: skip


def test_clips_of_mixed_sizes_are_as_many_as_asked(tmp_path):
    folder = sizes.make_clips(tmp_path, {(5, 16, 32): 3, (1, 32, 16): 5}, seed=0)
    captions = (folder / "prompts.txt").read_text().splitlines()
    assert len(captions) == len(list((folder / "videos").iterdir())) == 8
    assert sum(caption.startswith("FILM ") for caption in captions) == 3 + 3


def test_the_drift_is_compared_with_the_colour_that_is_taken_by_rank():
    runs = [{"drift": drift, "colour kept without it": kept} for drift, kept in ((0.1, 0.9), (0.5, 0.3), (0.2, 0.4))]
    assert preservation.summary({"": {"seed 1": runs[0]}, "--preserve 1": {"seed 1": runs[1], "seed 2": runs[2]}}) == {
        "runs": 3, "rank correlation": 1.0,
    }  # fmt: skip
    assert preservation.rank_correlation([(1, 3), (2, 2), (3, 1)]) == pytest.approx(-1)


def test_the_mask_of_the_benchmark_is_white_on_the_left_of_each_clip(tmp_path, monkeypatch):
    monkeypatch.setattr(masks, "FILMS", 1)
    data = masks.make_data(tmp_path)
    (clip,) = read_listing([Folder(data)], Columns(mask="masks.txt")).clips
    (facts,) = examine(clip, Selection(View(64, 96, 8, 17, 0, 0, "center", 0))).windows
    halves = masks.halves(read_mask(clip, facts.mask, facts.view, mirrored=False, file=facts.file).numpy()[..., None])
    assert halves["left"].mean() > 250 and halves["right"].mean() < 5 and halves["left"].shape == (17, 64, 48, 1)


@pytest.mark.parametrize("look", rates.LOOKS)
def test_the_clips_of_the_learning_rates_show_what_is_new(look, tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "LEARNED", 1)
    monkeypatch.setattr(rates, "HELD_OUT", 1)
    data = rates.make_clips(look, tmp_path)
    captions = (data / "prompts.txt").read_text().splitlines()
    assert len(captions) == 2 and all(caption.startswith(f"{look.upper()} a ") for caption in captions)
    frames = np.stack(imageio.mimread(next((data / "videos").iterdir()))).astype(int)
    assert len(frames) == 34
    is_back = abs(frames[0] - frames[-1]).mean() < 0.2 * abs(frames[0] - frames[17]).mean()
    assert is_back == (look == "bounce")


@pytest.mark.parametrize("stopped_after", [1, 2, 3])
def test_a_comparison_that_was_stopped_does_what_is_missing(stopped_after, tmp_path, capsys):
    file, done = tmp_path / "results.json", []

    def measure(way, seed):
        if len(done) == stopped_after:
            raise KeyboardInterrupt
        done.append((way, seed))
        return {"loss": seed}

    def compare(seeds):
        results = small.begun(file, {"updates": 4}, {"ways": {}})
        keep = partial(small.keep, file, results)
        small.run_ways(results["ways"], ["", "--preserve 1"], seeds, measure=measure, keep=keep)
        return results

    with pytest.raises(KeyboardInterrupt):
        compare([1, 2])
    stopped_after = None
    results = compare([1, 2])
    assert done == [("", 1), ("--preserve 1", 1), ("", 2), ("--preserve 1", 2)]
    assert results["ways"] == {way: {"seed 1": {"loss": 1}, "seed 2": {"loss": 2}} for way in ("", "--preserve 1")}
    assert json.loads(file.read_text()) == results and {"torch", "commit"} <= results.keys()
    with pytest.raises(SystemExit, match="results.json: was measured with other updates; move it away"):
        small.begun(file, {"updates": 5}, {"ways": {}})


def test_results_of_other_code_are_not_continued(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    small.keep(file, small.begun(file, {}, {"ways": {}}))
    monkeypatch.setattr(small, "commit", lambda: "another")
    with pytest.raises(SystemExit, match="was measured with other commit"):
        small.begun(file, {}, {"ways": {}})


def test_why_a_run_failed_is_said(tmp_path, capfd):
    with pytest.raises(subprocess.CalledProcessError):
        small.train(tmp_path / "nothing", tmp_path / "run", small.LANDSCAPE, updates=1, seed=1)
    assert "error: " in (said := capfd.readouterr().err) and "nothing" in said


def test_means_are_over_the_runs_of_a_way():
    assert preservation.mean({"seed 1": {"drift": 1.0}, "seed 2": {"drift": 2.0}}.values()) == {"drift": 1.5}


def test_the_options_of_the_comparisons_are_taken():
    for parse_args, words in ((rates.parse_args, ["ways"]), (masks.parse_args, []), (preservation.parse_args, [])):
        args = parse_args([*words, "--seeds", "4", "5", "--updates", "7"])
        assert (args.seeds, args.updates, args.output) == ([4, 5], 7, None)


def test_a_learning_rate_that_is_found_is_kept_beside_its_losses(tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "LEARNED", 1)
    monkeypatch.setattr(rates, "HELD_OUT", 1)
    found = rates.measure(rates.make_clips("film", tmp_path), "--learning_rate auto", seed=1, updates=1, every=1)
    assert list(found["losses"]) == ["0", "1"] and found["losses"]["0"] != found["losses"]["1"]
    assert found["found"]["updates_of_a_trial"] == 1
