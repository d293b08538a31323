"""benchmarks/quality.py: its judge, its clock and its arithmetic.

The script that it compares with is no part of this repository: here ours stands in for it.
COGVIDEOX_REFERENCE=path/to/diffusers/examples/cogvideo/train_cogvideox_lora.py runs the comparison itself, too.
"""

import contextlib
import json
import math
import os
import time
import xml.etree.ElementTree as ElementTree

import curves
import pytest
import quality
import torch
import trial
import versus
from make_film import make_film

import train_cogvideox_lora
from clips.facts import examine
from clips.listing import Folder, read_listing
from clips.selection import selection_of
from run import validation

TINY = {"films": 3, "others": 1, "held_out": 2, "max_num_frames": 9, "rank": 2, "train_batch_size": 2}


@pytest.fixture
def tiny(tiny_checkpoint):
    return quality.Setting(base=tiny_checkpoint, **TINY)


def parse(folder, *words):
    return quality.parse_args(["--reference", __file__, "--output", str(folder / "quality.json"), *words])


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        (["--reference", "nowhere.py"], "--reference nowhere.py: no such file"),
        (["--updates", "0"], "--updates: 0: must be a whole number of at least 1"),
        (["--updates", "100"], "--sweep_updates 200: more than --updates 100"),
        (["--ways", "theirs"], "--ways: invalid choice: 'theirs'"),
    ],
)
def test_refuses_what_cannot_work(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        parse(tmp_path, *words)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_our_script_takes_the_shared_options():
    args = train_cogvideox_lora.parse_args(quality.shared_options(quality.SMALL, "clips", updates=9, seed=3))
    assert (args.rank, args.lora_alpha, args.train_batch_size, args.max_train_steps, args.seed) == (16, 16, 4, 9, 3)
    assert args.mixed_precision == "no" and args.checkpointing_steps > args.max_train_steps
    assert args.lora_target_modules == ["to_k", "to_out.0", "to_q", "to_v"]  # those of diffusers' example
    assert (args.lr_scheduler, args.lr_warmup_steps, args.learning_rate) == ("constant", 0, 1e-4)
    assert "5b" not in args.pretrained_model_name_or_path  # diffusers' example would load bfloat16


def test_the_clips_show_all_their_pixels_and_none_is_both_learned_and_held_out(tmp_path):
    quality.write_inputs(quality.SMALL, tmp_path)
    shared = train_cogvideox_lora.parse_args(quality.shared_options(quality.SMALL, "clips", updates=9, seed=3))
    chosen, hashes = selection_of(shared, with_image=False, whole=False), {}
    for name, count in (("clips", 40), ("held-out", 8)):
        _, _, clips, problems, _ = read_listing([Folder(tmp_path / name)])
        assert problems == [] and len(clips) == count
        (facts,), problem, _ = examine(clips[0], chosen)
        assert problem is None
        assert (facts.height, facts.width, facts.num_frames, facts.num_seen) == (64, 96, 17, 17)
        hashes[name] = {path.read_bytes() for path in (tmp_path / name / "videos").iterdir()}
    assert not hashes["clips"] & hashes["held-out"]


def test_the_updates_that_are_judged_end_with_the_last():
    assert quality.recorded_updates(12) == [5, 10, 12]
    assert quality.recorded_updates(400)[-3:] == [360, 380, 400]
    assert {100, 200} <= {*quality.recorded_updates(400)}


# ---- the judge -------------------------------------------------------------------------------------------------------


def test_the_judge_finds_the_loss_that_training_reports(tiny, train, tmp_path, monkeypatch):
    data, curve, labels, reported = make_film(tmp_path / "data", films=5, others=0, num_frames=9), {}, [], []
    held_out_losses = validation.held_out_losses

    def noting(held_out, transformer, **options):
        labels[:] = held_out.data.labels
        return held_out_losses(held_out, transformer, **options)

    options = {"rank": tiny.rank, "fps": tiny.fps, "validation_split": 2, "validation_steps": 2, "max_train_steps": 4}
    options |= {"seed": quality.JUDGE_SEED, "instance_data_root": data, "learning_rate": 0.01}
    with monkeypatch.context() as patch, trial.learning_curve(curve, {2, 4}):
        patch.setattr(validation, "held_out_losses", noting)
        rows = train(tiny.base, tmp_path / "run", **options)
    reported = [row["validation_loss"] for row in rows if "validation_loss" in row]

    held_out = tmp_path / "judged" / "held-out"
    held_out.mkdir(parents=True)
    for name in ("prompts.txt", "videos.txt"):
        lines = zip((data / "videos.txt").read_text().splitlines(), (data / name).read_text().splitlines())
        chosen = [line for video, line in lines if any(video in label for label in labels)]
        assert len(chosen) == 2
        (held_out / name).write_text("\n".join(chosen) + "\n")
    (held_out / "videos").symlink_to(data / "videos")
    (tmp_path / "judged" / "base-model").symlink_to(tiny.base)
    with quality.judging(tiny, tmp_path / "judged") as judge:
        judged = [judge(weights) for weights in curve["weights"]]
        assert judged == reported[1:] and len({*reported}) == 3
        assert judge(curve["weights"][0]) == judged[0]  # nothing is left of the one before
        with pytest.raises(ValueError, match="the scripts train different weights"):
            judge(dict(list(curve["weights"][0].items())[1:]))


# ---- the clock -------------------------------------------------------------------------------------------------------


@pytest.fixture
def optimizer_of(monkeypatch):
    """Makes optimizers of one weight, which is all that a curve copies."""

    def make():
        weight = torch.nn.Parameter(torch.ones(1))
        weight.grad = torch.ones(1)
        monkeypatch.setattr(trial, "lora_weights", lambda _: {"weight": weight})
        return torch.optim.AdamW([weight], lr=1.0, weight_decay=0)

    return make


@pytest.mark.parametrize("starts_again", ["another optimizer", "its state is cleared"])
def test_updates_are_those_since_the_optimizer_started_again_and_steps_are_all(optimizer_of, starts_again):
    curve, optimizer = {}, optimizer_of()
    with trial.learning_curve(curve, {1, 3}):
        for steps in (2, 3, 4):  # a search over two rates, then the run
            weight = optimizer.param_groups[0]["params"][0]
            if starts_again == "another optimizer":
                optimizer = optimizer_of()
            else:
                optimizer.state.clear()
                weight.data.fill_(1)
            for _ in range(steps):
                optimizer.step()
    assert [(row["update"], row["steps"]) for row in curve["rows"]] == [(1, 6), (3, 8)]
    assert [weights["weight"].item() for weights in curve["weights"]] == pytest.approx([0, -2], abs=1e-6)


def test_the_time_that_copying_takes_is_left_out(optimizer_of, monkeypatch):
    copy, curve = trial.cpu_copy, {}

    def slow_copy(tensor):
        time.sleep(0.2)
        return copy(tensor)

    monkeypatch.setattr(trial, "cpu_copy", slow_copy)
    optimizer = optimizer_of()
    with trial.learning_curve(curve, {1, 2, 3}):
        for _ in range(3):
            optimizer.step()
    assert 0 <= curve["rows"][-1]["at"] - curve["rows"][0]["at"] < 0.2


# ---- arithmetic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss, index", [(0.3, 1), (0.25, 3), (0.4, 0), (0.1, None)])
def test_a_loss_is_reached_at_the_first_record_at_or_below_it(loss, index):
    assert quality.first_at_or_below([0.4, 0.3, 0.35, 0.2], loss) == index


def made_up(seconds, losses, begin=10.0):
    """A run that is judged after every fifth update."""
    return {
        "update": [5 * (i + 1) for i in range(len(losses))],
        "steps": [5 * (i + 1) + 7 for i in range(len(losses))],
        "seconds": seconds,
        "seconds_of_updates": [second - begin for second in seconds],
        "loss": losses,
    }


COMPARISON = quality.Comparison("ours-best", "example-best", updates=10, aim=0.6)


def test_a_comparison_is_made_seed_by_seed():
    theirs = {"1": made_up([20, 40, 60], [0.3, 0.2, 0.1]), "2": made_up([20, 50, 80], [0.3, 0.25, 0.1])}
    ours = {"1": made_up([15, 20, 30], [0.3, 0.2, 0.1]), "2": made_up([15, 20, 30], [0.24, 0.2, 0.1])}
    ours["9"] = ours["1"]  # the other has not run with it
    found = quality.compare(COMPARISON, ours, theirs, batch_size=4)
    until = found["until_it"]
    assert (found["seeds"], found["probability_of_interval"], found["aim"]) == (2, 0.5, 0.6)
    assert until["loss"]["of_each_seed"] == [0.2, 0.25]
    assert until["updates"]["of_each_seed"] == [17, 12] and until["clips"]["of_each_seed"] == [68, 48]
    assert until["ratio"] == {"median": 0.4, "interval": [0.3, 0.5], "of_each_seed": [0.5, 0.3]}
    assert until["ratio_of_updates"]["of_each_seed"] == [round(10 / 30, 4), round(5 / 40, 4)]
    assert "in 0.4 (0.3 to 0.5) of its seconds, at most 0.6 is asked for" in quality.describe(found)


def test_the_other_side_may_have_had_its_loss_earlier():
    theirs, ours = {"1": made_up([20, 30, 40], [0.2, 0.3, 0.25])}, {"1": made_up([15, 20, 30], [0.3, 0.2, 0.1])}
    until = quality.compare(COMPARISON._replace(updates=15), ours, theirs, batch_size=4)["until_it"]
    assert (until["ratio"]["median"], until["ratio_of_firsts"]["median"]) == (0.5, 1.0)
    assert until["updates_of_other"]["median"] == 12


def test_a_loss_that_is_never_reached_counts_as_the_slowest():
    theirs = {str(seed): made_up([20, 40], [0.3, 0.2]) for seed in (1, 2, 3)}
    ours = {str(seed): made_up([15, 20], [0.3, loss]) for seed, loss in ((1, 0.2), (2, 0.21), (3, 0.1))}
    ratio = quality.compare(COMPARISON, ours, theirs, batch_size=4)["until_it"]["ratio"]
    assert ratio == {"median": 0.5, "interval": [0.5, None], "of_each_seed": [0.5, None, 0.5]}
    assert quality.median_and_range([math.inf, math.inf, 1.0])["median"] is None
    assert quality.compare(COMPARISON, ours, {}, batch_size=4) is None


def test_the_picture_has_a_line_and_a_band_for_each_way():
    runs = [made_up([20, 40, 60], [0.3, 0.2, 0.1]), made_up([22, 44, 70], [0.4, 0.2, 0.15])]
    assert curves.median_curve(runs)[0] == (21, 0.35, 0.3, 0.4)
    picture = curves.draw({"ours": runs, "theirs": runs[:1], "nobody's": []}, "title", seeds=2)
    root, space = ElementTree.fromstring(picture), "{http://www.w3.org/2000/svg}"
    assert len([path for path in root.iter(f"{space}path") if path.get("class") == "band"]) == 2
    texts = [text.text for text in root.iter(f"{space}text")]
    assert {"ours", "theirs", "0.2", "60", "seconds"} <= {*texts} and "nobody's" not in texts


# ---- the comparison --------------------------------------------------------------------------------------------------


@pytest.fixture
def lines(monkeypatch):
    """Command lines of all runs by their names; none is run, and a higher rate leaves a lower loss."""
    lines = {}

    def run_trial(folder, name, mode, script, options):
        lines[name] = [script.name, *options]
        rate = float(options[options.index("--learning_rate") + 1]) if "--learning_rate" in options else 1e-4
        updates = [int(update) for update in mode[2].split(",")]
        rows = [{"update": update, "steps": update, "at": time.time() + update} for update in updates]
        weights = [{"loss": torch.tensor(1 / (1 + 1e3 * rate * update))} for update in updates]
        curve = {"begin": time.time(), "rows": rows, "weights": weights, "threads": 1}
        torch.save(curve, folder / mode[1])

    @contextlib.contextmanager
    def judging(*_):
        yield lambda weights: weights["loss"].item()

    monkeypatch.setattr(quality, "run_trial", run_trial)
    monkeypatch.setattr(quality, "judging", judging)
    return lines


SHORT = ["--ways", "example", "example-best", "ours-best", "--updates", "20", "--sweep_updates", "10"]


def run(folder, tiny, *words):
    file = folder / "quality.json"
    quality.main(["--reference", __file__, "--output", str(file), *SHORT, *words], tiny)
    return json.loads(file.read_text())


def test_the_best_rate_of_each_sweep_is_run_with_every_seed(lines, tiny, tmp_path, capsys):
    words = ["--seeds", "1", "2", "--theirs_rates", "1e-3", "2e-3", "--ours_rates", "4e-3", "1e-3"]
    result = run(tmp_path, tiny, *words, "--picture", str(tmp_path / "quality.svg"))
    assert result["best"] == {"theirs": "0.002", "ours": "0.004"}
    names = ["sweep-theirs-0.001", "sweep-theirs-0.002", "sweep-ours-0.004", "sweep-ours-0.001"]
    assert [*lines] == names + [f"{way}-{seed}" for seed in (1, 2) for way in result["ways"]]
    assert lines["ours-best-2"][0] == quality.OURS.name and "0.004" in lines["ours-best-2"]
    assert "--learning_rate" not in lines["example-1"] and "--latents_cache_dir" not in lines["example-1"]
    assert [(found["way"], found["against"]) for found in result["summary"]] == [
        ("ours-best", "example-best"), ("ours-best", "example")
    ]  # fmt: skip
    assert result["summary"][0]["until_it"]["updates"]["of_each_seed"] == [5, 5]
    assert "ours-best reaches the loss of example-best after 10 updates" in capsys.readouterr().out
    ElementTree.parse(tmp_path / "quality.svg")


def test_what_a_stopped_benchmark_has_measured_is_not_measured_again(lines, tiny, tmp_path):
    words = ["--theirs_rates", "1e-3", "--ours_rates", "1e-3"]
    first = run(tmp_path, tiny, *words, "--seeds", "1")
    lines.clear()
    both = run(tmp_path, tiny, *words, "--seeds", "1", "2")
    assert [*lines] == ["example-2", "example-best-2", "ours-best-2"]
    assert all(both["ways"][way]["1"] == first["ways"][way]["1"] for way in first["ways"])
    lines.clear()
    run(tmp_path, tiny, "--theirs_rates", "1e-3", "--ours_rates", "1e-3", "3e-3", "--seeds", "1", "2")
    assert [*lines] == ["sweep-ours-0.003", "ours-best-1", "ours-best-2"]  # its best rate is another now


def test_results_of_another_comparison_are_not_continued(lines, tiny, tmp_path, capsys):
    words = ["--theirs_rates", "1e-3", "--ours_rates", "1e-3", "--seeds", "1"]
    run(tmp_path, tiny, *words)
    with pytest.raises(SystemExit, match="was measured with other shared_options; move it away"):
        run(tmp_path, tiny, *words, "--updates", "30")


def test_results_of_other_code_are_not_continued(lines, tiny, tmp_path, monkeypatch):
    words = ["--theirs_rates", "1e-3", "--ours_rates", "1e-3", "--seeds", "1"]
    assert run(tmp_path, tiny, *words)["about"]["commit"] == quality.commit()
    monkeypatch.setattr(quality, "commit", lambda: "another")
    with pytest.raises(SystemExit, match="was measured with other commit; move it away"):
        run(tmp_path, tiny, *words)


def test_the_picture_shows_the_seeds_that_it_names(lines, tiny, tmp_path, monkeypatch):
    words = ["--theirs_rates", "1e-3", "--ours_rates", "1e-3", "--picture", str(tmp_path / "quality.svg")]
    run(tmp_path, tiny, *words, "--seeds", "1", "2")
    drawn = []
    monkeypatch.setattr(curves, "draw", lambda lines, title, seeds: drawn.append((lines, seeds)) or "")
    run(tmp_path, tiny, *words, "--seeds", "2", "--ways", "example")
    ((found, seeds),) = drawn
    assert seeds == 1 and len(found) == 3 and {len(runs) for runs in found.values()} == {1}


def test_the_model_of_the_cpu_is_told(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some CPU @ 2.00GHz\n\nprocessor\t: 1\nmodel name\t: Some CPU\n")
    assert versus.processor_name(cpuinfo) == "Some CPU @ 2.00GHz"
    assert versus.processor_name(tmp_path / "none")


def test_our_script_can_stand_on_both_sides(tiny, tmp_path, monkeypatch):
    def run_trial(folder, name, mode, script, options):
        curve = {"threads": 1}
        monkeypatch.chdir(folder)
        with trial.learning_curve(curve, {int(update) for update in mode[2].split(",")}):
            train_cogvideox_lora.main(train_cogvideox_lora.parse_args([*options, "--output_dir", name]))
        torch.save(curve, mode[1])

    monkeypatch.setattr(quality, "run_trial", run_trial)
    words = ["--ways", "example", "ours-best", "--updates", "6", "--sweep_updates", "5", "--ours_rates", "1e-4"]
    result = run(tmp_path, tiny, *words, "--seeds", "1")
    example, ours = (result["ways"][way]["1"] for way in ("example", "ours-best"))
    assert example["update"] == [5, 6] and example["loss"] == ours["loss"]  # the same rate, the same run
    assert 0 < example["seconds_of_updates"][0] < example["seconds"][0] < example["seconds_of_process"]
    assert result["summary"][0]["until_it"]["updates"]["median"] in (5, 6)


@pytest.mark.skipif("COGVIDEOX_REFERENCE" not in os.environ, reason="COGVIDEOX_REFERENCE names no script to compare")
def test_both_scripts_learn(tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    words = ["--theirs_rates", "1e-3", "--ours_rates", "1e-3", "--seeds", "1", "--updates", "20"]
    result = run(tmp_path, quality.SMALL, *words, "--reference", os.environ["COGVIDEOX_REFERENCE"])
    for runs in result["ways"].values():
        losses = runs["1"]["loss"]
        assert losses[-1] < losses[0] and runs["1"]["threads"] == 1
