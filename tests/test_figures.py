"""Each cell of a table of measurements is the rounded value of the committed result that it comes from."""

import json
import re
from statistics import mean, stdev

import pytest
import rates
from conftest import ROOT

RUNS = ROOT / "benchmarks" / "results"
UPDATES = ("50", "100", "150", "200")


def result(name):
    return json.loads((RUNS / f"{name}.json").read_text())


def cells_of(page, head):
    """Returns the cells of the table whose head begins like this, by the first cell of their row."""
    text = (ROOT / page).read_text(encoding="utf-8")
    (rows,) = re.findall(rf"^\| *{re.escape(head)}.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.splitlines()]
    return {first: others for first, *others in cells}


def percent(share):
    return f"{100 * share:.0f} %"


# ---- what each table should hold: the first cell of a row, and its others --------------------------------------------


def ways():
    """The loss after some updates, means of the seeds."""
    names = [
        "1e-3",
        "1e-3, `--loraplus_lr_ratio 4`",
        "1e-3, `--loraplus_lr_ratio 16`",
        "2e-3",
        "2e-3, `--loraplus_lr_ratio 4`",
        "4e-3",
        "4e-3, `--lr_scheduler cosine`",
        "`--optimizer prodigy`, with decoupled decay, bias correction and safeguard",
        "the same, `--lr_scheduler cosine`",
    ]
    measured = result("rates-ways")["looks"]["film"]
    for name, way in zip(names, rates.KINDS["ways"], strict=True):
        seeds = measured[way].values()
        yield name, [f"{mean(seed['losses'][after] for seed in seeds):.3f}" for after in UPDATES]


def sweep():
    """The rates that `auto` chose, the best of the sweep, and the mean loss with either."""
    names = {"film": "the quickstart's old film", "negative": "negative colours", "bounce": "a motion, there and back"}

    def short(rate):
        return f"{float(rate):.1e}".replace("e-0", "e-")

    for look, measured in result("rates-sweep")["looks"].items():
        runs = {way.split()[1]: list(seeds.values()) for way, seeds in measured.items()}  # by rate
        assert {len(seeds) for seeds in runs.values()} == {3}
        losses = {rate: mean(seed["losses"]["400"] for seed in seeds) for rate, seeds in runs.items()}
        best = min(losses.keys() - {"auto"}, key=losses.get)
        chosen = ", ".join(short(seed["found"]["learning_rate"]) for seed in runs["auto"])
        yield names[look], [chosen, short(best), f"{losses['auto']:.4f}, {losses[best]:.4f}"]


def timesteps():
    """The change of the loss by another way to draw timesteps: means and standard errors over the seeds."""
    measured = result("rates-timesteps")["looks"]["film"]
    for rate in ("1e-3", "2e-3"):
        ways = [measured[f"--learning_rate {rate} --timestep_sampling {how}"] for how in ("uniform", "low_discrepancy")]
        pairs = [[way[seed]["losses"] for way in ways] for seed in ways[0]]
        changes = [[100 * (spread[after] / uniform[after] - 1) for uniform, spread in pairs] for after in UPDATES]
        yield rate, [f"{mean(change):+.1f} % ± {stdev(change) / len(change) ** 0.5:.1f}" for change in changes]


def quality():
    """The losses of two sweeps, the lowest in bold."""
    for name, who in {"diffusers' example": "theirs", "ours": "ours"}.items():
        losses = [run["loss"][0] for run in result("quality")["sweeps"][who].values()]
        yield name, [f"**{loss:.4f}**" if loss == min(losses) else f"{loss:.4f}" for loss in losses]


def preservation():
    """What is lost and kept, and the drift, means of the seeds."""
    names = {"": "nothing", "--regularization_data_root {others}": "`--regularization_data_root`, 15 plain clips"}
    shares = [
        "colour lost with the word",
        *(f"{what} without it" for what in ("colour kept", "shape right", "motion right")),
    ]
    for way, seeds in result("preservation")["ways"].items():
        runs = [run for seed, run in seeds.items() if seed != "mean"]
        kept = [percent(mean(run[share] for run in runs)) for share in shares]
        yield names.get(way, f"`{way}`"), [*kept, f"{mean(run['drift'] for run in runs):.3f}"]


def masks():
    """The colour lost, and the change in levels of 255, left and right."""
    names = {"no masks": "no masks", "--mask_floor 0": "masks, floor 0"}
    for way, seeds in result("masks")["ways"].items():
        halves = [seeds["seed 1"][side] for side in ("left", "right")]
        lost = [percent(half["colour lost"]) for half in halves]
        yield names.get(way, f"masks, `{way}`"), [*lost, *(f"{half['levels changed']:.1f}" for half in halves)]


def buckets():
    """Tokens per second of one and two processes, and seconds of compiling."""
    names = {
        "one bucket": "one bucket, 17x64x96",
        "three buckets": "three buckets (17x96x64, 9x64x96, too)",
        "four buckets, one of images": "four (and images, 1x64x96)",
    }
    measured = result("buckets")
    for key, name in names.items():
        tokens = [f"{measured[key][f'tokens per second, {ranks} ranks'][0]:,}" for ranks in (1, 2)]
        yield name, [*tokens, f"{measured[key]['seconds of compiling']:.0f}"]


def sizes():
    """The colour with the word, as a share of that without it, by size."""
    names = {
        "mixed sizes": "landscape, portrait, short clips and images, ten each",
        "one size": "landscape clips only",
        "images only": "images only",
    }

    def share(run, base):
        with_word = (1 - run["colour lost with the word"]) * base["colour with the word"]
        return with_word / (run["colour kept without it"] * base["colour without the word"])

    measured = result("sizes")
    for key, name in names.items():
        yield name, [f"{share(run, measured['base model'][size]):.2f}" for size, run in measured[key]["at"].items()]


TABLES = {
    ways: ("docs/lora.md", "| after 50 updates | 100 | 150 | 200 |"),
    sweep: ("docs/lora.md", "look | chosen |"),
    preservation: ("docs/lora.md", "| colour lost with the word |"),
    masks: ("docs/data.md", "| colour lost, left |"),
    buckets: ("docs/sizes.md", "| tokens per second, one process |"),
    sizes: ("docs/sizes.md", "trained on |"),
    timesteps: ("benchmarks/NOTES.md", "| after 50 updates | 100 | 150 | 200 |"),
    quality: ("benchmarks/NOTES.md", "loss after 200 updates, seed 0 |"),
}


@pytest.mark.parametrize("measured", TABLES, ids=lambda measured: measured.__name__)
def test_each_cell_is_the_rounded_value_of_its_result(measured):
    assert cells_of(*TABLES[measured]) == dict(measured())
