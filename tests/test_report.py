"""The page of a run: what it says, that it needs nothing else, and that a browser shows it."""

import itertools
import json
import math
import random
import re

import imageio.v3 as iio
import jinja2
import numpy as np
import pytest

from files import write_json
from pages import report
from run.run_directory import append_metrics

PROMPTS = ['a <b>boat</b> & a "gull" </script> {{ 6 * 7 }} {% raw %}', "лодка уходит из гавани, 船が港を出る"]


def make_run(folder, steps=400, videos=(0, 100, 250, 400), smoothed=True, validation=True, frames=9):
    """A made-up run of two prompts with two seeds, of which videos of 96x64 pixels get clearer from step to step."""
    folder.mkdir(exist_ok=True)
    draw, loss_smoothed, measured = random.Random(0), 0.2, []
    for step in range(steps + 1):
        learned = 1 - math.exp(-3 * step / steps)
        if step and (loss := draw.lognormvariate(-1.9 - 0.25 * learned, 0.6)):
            loss_smoothed += 0.02 * (loss - loss_smoothed)
            row = {"step": step, "epoch": step / 40, "loss": loss, "lr": 1e-4 * min(1, step / (steps / 10))}
            row |= {"loss_smoothed": loss_smoothed} if smoothed else {}
            row |= {"grad_norm": math.inf if step == 3 else draw.lognormvariate(-1.5, 0.5)}
            append_metrics(folder, row | {"seconds": 60 if step == 1 else draw.gauss(4.2, 0.2)})
        if validation and step % (steps // 8) == 0:
            by_timestep = {
                f"validation_loss_t{t}": (0.3 - t / 4000) * (1 - gain * learned + over * (step / steps) ** 2)
                for t, gain, over in ((125, 0.04, 0.02), (375, 0.09, 0.03), (625, 0.2, 0.05), (875, 0.34, 0.13))
            }
            measured.append((sum(by_timestep.values()) / 4, step))
            row = {"step": step, "epoch": step / 40, "validation_loss": measured[-1][0]}
            row |= {"validation_motion": 30 * math.exp(-2 * step / steps), "data_motion": 24.0}
            append_metrics(folder, row | by_timestep)
    for step in videos:
        make_videos(folder / "validation" / f"step-{step:06d}", step / steps, frames)
    if measured:
        loss, step = min(measured)
        write_json(folder / "checkpoint-best" / "best.json", {"step": step, "validation_loss": loss})
    options = {"validation_prompt": ":::".join(PROMPTS), "max_train_steps": steps + 100, "rank": 64, "fps": 8}
    options |= {"lora_target_modules": ["to_q", "to_k"], "use_dora": False, "enable_tiling": True, "seed": None}
    run = {"checkpoint": "CogVideoX-2b: text-to-video, 30 layers", "clips": 69, "processes": 1, "options": options}
    run["data"] = ["69 clips: 69 of 49 frames", "8 clips held out"]
    write_json(folder / "args.json", run | {"versions": {"torch": "2.13.0", "peft": "0.21.2"}})
    return folder


def make_videos(folder, learned, frames):
    """A disc that moves over a gradient, under less and less noise."""
    folder.mkdir(parents=True)
    y, x = np.mgrid[:64, :96]
    names = {}
    for (i, prompt), seed in itertools.product(enumerate(PROMPTS), (42, 43)):
        noise, place = np.random.default_rng(seed), 16 + 30 * (seed - 42)
        clip = []
        for frame in range(frames):
            sky = np.stack([x * 1.2 + 40 * i, y * 2.2, 255 - y * 2], -1)
            disc = (x - 10 - 8 * frame) ** 2 + (y - place) ** 2 < 120
            picture = np.where(disc[..., None], (250, 200, 60), sky)
            picture = picture * learned + noise.uniform(0, 255, picture.shape) * (1 - learned)
            clip.append(picture.clip(0, 255).astype(np.uint8))
        name = f"prompt-{i:02d}_seed-{seed}.mp4"
        iio.imwrite(folder / name, np.stack(clip), fps=8, codec="libx264")
        names[name] = prompt
    write_json(folder / "prompts.json", names)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """With a video that is missing, and one that is none."""
    folder = make_run(tmp_path_factory.mktemp("runs") / "disney <lora>")
    (folder / "validation/step-000100/prompt-00_seed-42.mp4").unlink()
    (folder / "validation/step-000100/prompt-00_seed-43.mp4").write_bytes(b"no video")
    report.write_report(folder)
    return folder


def page_of(folder):
    return report.write_report(folder).read_text(encoding="utf-8")


def sentence_of(page):
    return re.sub("<.*?>", "", re.search(r'class="standing">(.*?)</p>', page)[1])


def panels_in(page):
    return json.loads(re.search(r'id="panels">(.*?)</script>', page, re.DOTALL)[1])


# ---- what the page says ----------------------------------------------------------------------------------------------


def test_the_page_refers_to_nothing_outside_itself(run_dir):
    page = page_of(run_dir)
    sources = re.findall(r"""(?:src|href|poster|action)\s*=\s*["']?([^"'\s>]+)""", page)
    assert len(sources) == 15 + 1  # videos and an empty icon
    assert all(source.startswith("data:") for source in sources)
    namespace = "http://www.w3.org/2000/svg"
    assert not re.search(r"https?://|@import|url\((?!#)", page.replace(namespace, ""))
    assert "default-src 'none'" in page


def test_what_a_person_wrote_cannot_become_markup_or_script(run_dir):
    page = page_of(run_dir)
    assert "a &lt;b&gt;boat&lt;/b&gt; &amp; a &#34;gull&#34; &lt;/script&gt; {{ 6 * 7 }} {% raw %}</div>" in page
    assert "<b>boat" not in page and "disney <lora>" not in page
    assert PROMPTS[1] in page
    assert page.count("</script>") == 2


def test_no_text_ends_the_script_that_draws_it(tmp_path, monkeypatch):
    drawn = [{"title": "</script><!--", "note": PROMPTS[0], "curves": []}]
    monkeypatch.setattr(report, "panels", lambda rows, best: drawn)
    page = page_of(tmp_path)
    assert page.count("</script>") == 2
    assert panels_in(page) == drawn


def test_the_sentence_says_where_the_run_stands(run_dir):
    assert re.fullmatch(
        r"At step 400 of 500, the smoothed training loss is 0\.\d+; the best validation loss is 0\.\d+, at step 250, "
        r"[\d.]+ % below that of the base model; a step takes 4\.\d+ s, so about 7 min remain\.",
        sentence_of(page_of(run_dir)),
    )


@pytest.mark.parametrize(
    ("rows", "total_steps", "best", "sentence"),
    [
        ([], 10, {}, "Nothing is logged yet."),
        ([{"step": 2, "loss": 0.5}], None, {}, "At step 2, the mean training loss so far is 0.5."),
        ([{"step": 7, "loss": None}], 7, {}, "At step 7 of 7."),
        (
            [{"step": 1, "loss": 0.5, "seconds": 9}, {"step": 2, "loss": 0.25, "seconds": 9}],
            1002,
            {},
            "At step 2 of 1,002, the mean training loss of the last 2 rows is 0.375; a step takes 9 s, "
            "so about 2 h 30 min remain.",
        ),
        (
            [{"step": 0, "validation_loss": 0.2}, {"step": 5, "validation_loss": 0.3}],
            None,
            {},
            "At step 5, the validation loss is lowest at the base model, 0.2: training has not improved it yet.",
        ),
        (
            [{"step": 5, "validation_loss": 0.3}],
            None,
            {"step": 4, "validation_loss": 0.25},
            "At step 5, the best validation loss is 0.25, at step 4.",
        ),
    ],
)
def test_the_sentence_leaves_out_what_is_not_known(tmp_path, rows, total_steps, best, sentence):
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    write_json(tmp_path / "args.json", {"options": {"max_train_steps": total_steps}})
    write_json(tmp_path / "checkpoint-best" / "best.json", best)
    assert sentence_of(page_of(tmp_path)) == sentence


def test_a_run_with_nothing_yet_has_a_page(tmp_path):
    page = page_of(tmp_path)
    for sentence in ("Nothing is logged yet.", "No curves yet.", "No validation videos yet.", "There is no args.json."):
        assert sentence in page
    assert panels_in(page) == []


def test_a_run_of_an_earlier_version_shows_what_it_has(tmp_path):
    page = page_of(make_run(tmp_path, steps=16, videos=(), smoothed=False, validation=False))
    titles = ["Training loss", "Learning rate", "Gradient norm", "Seconds per step"]
    assert [panel["title"] for panel in panels_in(page)] == titles
    loss = panels_in(page)[0]["curves"]
    assert [(curve["label"], curve["faint"]) for curve in loss] == [("each step", False)]


def test_a_last_line_half_written_is_no_point(tmp_path):
    append_metrics(tmp_path, {"step": 1, "loss": 0.5})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    assert panels_in(page_of(tmp_path))[0]["curves"][0]["points"] == [[1, 0.5]]


def test_every_option_and_the_data_are_on_the_page(run_dir):
    page = page_of(run_dir)
    for text in ("69 clips: 69 of 49 frames", "8 clips held out", "torch 2.13.0, peft 0.21.2", "All 8 options"):
        assert text in page
    for name, value in {"lora_target_modules": "to_q to_k", "use_dora": "off", "seed": "–", "rank": "64"}.items():
        assert f'<th scope="row">--{name}</th><td>{value}</td>' in page


# ---- curves ----------------------------------------------------------------------------------------------------------


def test_losses_by_timestep_are_changes_from_the_base_model(run_dir):
    panel = next(panel for panel in panels_in(page_of(run_dir)) if panel["title"] == "Validation loss by timestep")
    assert [curve["label"] for curve in panel["curves"]] == ["t = 125", "t = 375", "t = 625", "t = 875"]
    assert panel["dashed"] == {"y": 0, "label": "base model"}
    for curve in panel["curves"]:
        (_, _, base), *later = curve["points"]
        assert curve["points"][0][1] == 0 and len(later) == 8
        for _, percent, loss in later:
            assert percent == pytest.approx(100 * (loss - base) / base, abs=0.01)


def test_losses_by_timestep_stand_for_themselves_without_a_base_model():
    rows = [{"step": 5, "validation_loss": 0.3, "validation_loss_t50": 0.4, "validation_loss_t1000": 0.2}]
    mean, by_timestep = report.panels(rows, {})
    assert "dashed" not in mean and "dashed" not in by_timestep
    assert [(curve["label"], curve["points"]) for curve in by_timestep["curves"]] == [
        ("t = 50", [[5, 0.4]]),
        ("t = 1000", [[5, 0.2]]),
    ]


def test_losses_of_what_is_kept_have_curves_where_they_are_due():
    rows = [{"step": step, "loss": 0.3, "prior_loss": 0.2} for step in (1, 2)]
    rows[1]["preservation_loss"] = 0.1
    points = {panel["title"]: panel["curves"][0]["points"] for panel in report.panels(rows, {})}
    assert points["Preservation loss"] == [[2, 0.1]]
    assert points["Loss on regularization clips"] == [[1, 0.2], [2, 0.2]]


def motion_panel(rows):
    return next(panel for panel in report.panels(rows, {}) if panel["title"] == "Motion of the videos")


def test_motion_is_drawn_from_zero_beside_the_base_model_s_and_the_clips():
    rows = [{"step": step, "validation_motion": 20.0 - step, "data_motion": 12.5} for step in (0, 5, 10)]
    panel = motion_panel(rows)
    assert panel["curves"][0]["points"] == [[0, 20], [5, 15], [10, 10]] and panel["zero"]
    assert panel["dashed"] == {"y": 12.5, "label": "mean of the training clips"}
    assert panel["mark"] == {"x": 0, "y": 20, "label": "base model"} and "not known" not in panel["note"]


def test_motion_of_clips_that_is_not_known_is_said_to_be():
    panel = motion_panel([{"step": 5, "validation_motion": 20.0}])
    assert "dashed" not in panel and "mark" not in panel and "clips is not known" in panel["note"]


@pytest.mark.parametrize("count", [1, 1000, 1001, 2499, 100_000])
def test_thinning_keeps_the_ends_and_the_peaks(count):
    draw = random.Random(count)
    rows = [{"step": step, "loss": draw.random()} for step in range(1, count + 1)]
    rows[count // 2]["loss"], rows[count // 3]["loss"] = 50.0, -50.0
    kept = report.thinned(rows, "loss")
    assert len(kept) <= 1000 and (count > 1000 or kept == rows)
    assert kept[0] == rows[0] and kept[-1] == rows[-1]
    assert [row["step"] for row in kept] == sorted({row["step"] for row in kept})
    assert min(row["loss"] for row in kept) == min(row["loss"] for row in rows)
    assert max(row["loss"] for row in kept) == max(row["loss"] for row in rows)


def test_a_long_run_makes_a_small_page(tmp_path):
    lines = [
        json.dumps({"step": i, "loss": 1 / i, "loss_smoothed": 2 / i, "lr": 1e-4, "grad_norm": 1 / 3, "seconds": 1.5})
        for i in range(1, 50_001)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = page_of(tmp_path)
    assert len(page) < 200_000
    raw, smoothed = panels_in(page)[0]["curves"]
    assert [step for step, _ in raw["points"]] == [step for step, _ in smoothed["points"]]
    assert raw["points"][-1][0] == 50_000


# ---- videos ----------------------------------------------------------------------------------------------------------


def test_the_base_models_column_is_first_and_the_best_is_marked(run_dir):
    head = re.search(r"<thead>(.*?)</thead>", page_of(run_dir), re.DOTALL)[1]
    headings = [" ".join(re.sub("<.*?>", " ", heading).split()) for heading in re.findall(r"<th.*?</th>", head)]
    assert headings == ["prompt", "base model before training", "step 100", "step 250 best", "step 400"]


def test_a_video_that_is_missing_leaves_a_sentence_in_its_cell(run_dir):
    page = page_of(run_dir)
    assert page.count("prompt-00_seed-42.mp4 is missing") == 1
    assert page.count("<video ") == 15


def test_another_prompt_under_the_same_name_is_a_row_of_its_own(tmp_path):
    for step, prompt in ((1, "a boat"), (2, "a gull")):
        folder = tmp_path / "validation" / f"step-{step:06d}"
        write_json(folder / "prompts.json", {"prompt-00_seed-1.mp4": prompt})
        (folder / "prompt-00_seed-1.mp4").write_bytes(b"content")
    page = page_of(tmp_path)
    assert page.count("<video ") == 2 and page.count("not made at this step") == 2


def test_what_is_too_large_for_the_page_is_played_from_beside_it(tmp_path, monkeypatch):
    run = make_run(tmp_path, steps=16, videos=(0, 4, 8, 16), validation=False)
    of_two_steps = sum(file.stat().st_size for step in (0, 16) for file in run.glob(f"validation/*{step:02d}/*.mp4"))
    monkeypatch.setattr(report, "EMBEDDED_MIB", of_two_steps / 2**20)
    page = page_of(run)
    embedded = re.findall(r'aria-label="(base model|step \d+): [^"]*" src="data:', page)
    beside = re.findall(r'src="(validation/[^"]*)"', page)
    assert set(embedded) == {"base model", "step 16"} and len(embedded) == 8
    assert len(beside) == 8 and all((run / path).is_file() for path in beside)
    assert "The videos of 2 of 4 steps" in page


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_makes_the_page_anew(run_dir, capsys):
    (run_dir / "report.html").unlink()
    report.main([str(run_dir)])
    assert capsys.readouterr().out.strip() == str(run_dir / "report.html")
    assert (run_dir / "report.html").is_file()


def test_the_command_refuses_what_is_no_run_directory(tmp_path, capsys):
    with pytest.raises(SystemExit) as refusal:
        report.main([str(tmp_path)])
    assert refusal.value.code == 2
    assert "holds neither args.json nor metrics.jsonl" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_the_template_misses_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="progress"):
        report.load_template(report.TEMPLATE).render(name="run", about="", panels=[], videos=None, run=None)


# ---- in a browser ----------------------------------------------------------------------------------------------------


PLAYED = """[...document.querySelectorAll("video")].map(video =>
    ({time: video.currentTime, paused: video.paused, ready: video.readyState, width: video.videoWidth}))"""


def test_a_browser_draws_every_curve(page, run_dir):
    page.open(run_dir / "report.html")
    page.wait("document.querySelectorAll('.plot svg').length === 7")
    drawn = """[...document.querySelectorAll("figure")].map(figure => [figure.querySelector("h3").textContent,
        [...figure.querySelectorAll("polyline")].map(line => line.points.numberOfItems)])"""
    assert page.evaluate(drawn) == [
        ["Training loss", [400, 400]],
        ["Validation loss", [9]],
        ["Validation loss by timestep", [9, 9, 9, 9]],
        ["Motion of the videos", [9]],
        ["Learning rate", [400]],
        ["Gradient norm", [399]],  # one was infinite
        ["Seconds per step", [400]],
    ]
    assert page.evaluate("document.querySelectorAll('.plot line.dashed').length") == 3
    assert page.errors == []


@pytest.mark.parametrize("width", [400, 800, 1280])
def test_nothing_overlaps_or_leaves_its_frame(page, run_dir, width):
    page.open(run_dir / "report.html", width=width)
    page.wait("document.querySelectorAll('.plot svg').length === 7")
    overlapping = """[...document.querySelectorAll("svg")].flatMap(svg => {
        const labels = [...svg.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()]);
        const frame = svg.getBoundingClientRect();
        const outside = labels.filter(([, box]) => box.left < frame.left || box.right > frame.right);
        const pairs = labels.flatMap(([a, one], i) => labels.slice(i + 1).filter(([, other]) => one.left < other.right
            && other.left < one.right && one.top < other.bottom && other.top < one.bottom).map(([b]) => [a, b]));
        return [...pairs, ...outside.map(([text]) => [text])];
    })"""
    assert page.evaluate(overlapping) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # only the grid scrolls sideways


def test_the_pointer_reads_values(page, run_dir):
    page.open(run_dir / "report.html")
    page.wait("document.querySelectorAll('.plot svg').length === 7")
    box = page.evaluate("""(() => { const dot = document.querySelectorAll("figure")[2].querySelectorAll(".dot")[4];
        const box = dot.getBoundingClientRect(); return [box.x + box.width / 2, box.y]; })()""")
    page.move_pointer(*box)
    page.wait("document.querySelector('.readout:not([hidden])')")
    text = page.evaluate("document.querySelector('.readout:not([hidden])').innerText").split("\n")
    assert text[:2] == ["step", "200"]
    assert text[2] == "t = 125" and re.fullmatch(r"−\d\.\d+ %\s+\(0\.2\d+\)", text[3])
    assert len(text) == 10  # a name and a value of the step and of four curves


def test_the_loss_can_be_seen_on_a_logarithmic_axis(page, run_dir):
    page.open(run_dir / "report.html")
    page.wait("document.querySelectorAll('.plot svg').length === 7")
    heights = """[...document.querySelectorAll("figure")[0].querySelectorAll(".y-tick")].map(label =>
        [Number(label.textContent), Number(label.getAttribute("y"))])"""
    distances = []
    for _ in ("linear", "logarithmic"):
        ticks = page.evaluate(heights)
        assert len(ticks) >= 3
        (a, top), (b, middle), (c, bottom) = ticks[:3]
        distances.append(((top - middle) / (middle - bottom), (b - a) / (c - b), math.log(b / a) / math.log(c / b)))
        page.evaluate("document.querySelector('.legend input').click()")
    (linear, expected, _), (logarithmic, _, expected_logarithmic) = distances
    assert linear == pytest.approx(expected, rel=1e-3)
    assert logarithmic == pytest.approx(expected_logarithmic, rel=1e-3)
    assert page.errors == []


def test_the_videos_play_together(page, run_dir):
    page.open(run_dir / "report.html")
    # One of the files is no video: its cell says so, and the others do not wait for it.
    page.wait("document.querySelectorAll('video').length === 14")
    page.wait("[...document.querySelectorAll('video')].every(video => video.currentTime > 0.1 && !video.paused)")
    assert "this browser cannot play the file" in page.evaluate("document.querySelector('.grid').innerText")
    assert all(video["width"] == 96 and video["ready"] >= 2 for video in page.evaluate(PLAYED))
    # Counted, not timed, so that a busy machine changes nothing: none starts a lap before all have ended the last.
    page.evaluate("(() => { const time = document.querySelector('.time'); time.value = 0; time.oninput(); })()")
    page.evaluate("""window.laps = [...document.querySelectorAll("video")].map(video => {
        const counts = {ended: 0, ahead: 0};
        video.addEventListener("ended", () => {
            counts.ended++;
            counts.ahead = Math.max(counts.ahead, counts.ended - Math.min(...laps.map(other => other.ended)));
        });
        return counts;
    }), true""")
    page.evaluate("document.querySelector('.player button').click()")
    page.wait("laps.every(counts => counts.ended >= 3)")
    assert page.evaluate("Math.max(...laps.map(counts => counts.ahead))") == 1
    page.evaluate("document.querySelector('.player button').click()")
    paused = page.evaluate(PLAYED)
    assert all(video["paused"] for video in paused)
    assert page.evaluate("document.querySelector('.player button').textContent") == "Play"
    page.evaluate("document.querySelector('.player button').click()")
    page.wait("[...document.querySelectorAll('video')].every(video => !video.paused)")
    assert [entry for entry in page.errors if "no video" not in str(entry)] == []


def test_the_slider_shows_the_same_moment_of_all(page, run_dir):
    page.open(run_dir / "report.html")
    page.wait("[...document.querySelectorAll('video')].every(video => video.currentTime > 0)")
    page.evaluate("(() => { const time = document.querySelector('.time'); time.value = 0.5; time.oninput(); })()")
    page.wait("[...document.querySelectorAll('video')].every(video => !video.seeking)")
    assert len({round(video["time"], 3) for video in page.evaluate(PLAYED)}) == 1
    assert all(video["paused"] for video in page.evaluate(PLAYED))


def test_videos_beside_the_page_play_too(page, tmp_path, monkeypatch):
    run = make_run(tmp_path, steps=16, videos=(4, 16))
    monkeypatch.setattr(report, "EMBEDDED_MIB", 0)
    page.open(report.write_report(run))
    page.wait("[...document.querySelectorAll('video')].every(video => video.currentTime > 0.1)")
    assert len(page.evaluate(PLAYED)) == 8
    assert page.errors == []


def test_a_run_with_nothing_yet_shows_without_an_error(page, tmp_path):
    page.open(report.write_report(tmp_path))
    assert "Nothing is logged yet." in page.evaluate("document.body.innerText")
    assert page.evaluate("getComputedStyle(document.querySelector('.player')).display") == "none"
    assert page.errors == []
