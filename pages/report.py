"""Turns a run directory into a page: report.html, one file that opens from disk and needs no network.

report_template.html holds its look and its script, which draws the curves and plays the videos; here it is filled with
what the run directory says. `python report.py RUN_DIR` makes the page anew.
"""

import argparse
import base64
import json
import math
import re
import statistics
import time
from html import escape
from pathlib import Path
from urllib.parse import quote

from files import publish
from run.run_directory import (
    ARGS_FILE,
    METRICS_FILE,
    REPORT_FILE,
    ValidationVideos,
    read_args,
    read_best,
    read_metrics,
    read_validation_videos,
)

TEMPLATE = Path(__file__).with_name("report_template.html.jinja")
POINTS_PER_CURVE = 1000
EMBEDDED_MIB = 100  # of videos; browsers give up on pages of several hundred
PACE_ROWS = 100  # the last ones, that say how long a step takes now


def write_report(output_dir: Path) -> Path:
    """The page of a run, at whatever point it stands, written anew to its directory."""
    run, best = read_args(output_dir), read_best(output_dir)
    rows, columns = read_metrics(output_dir), read_validation_videos(output_dir)
    drawn = panels(rows, best)
    name = output_dir.absolute().name
    parts = {
        "title": escape(f"{name}: training report"),
        "name": escape(name),
        "about": escape(" · ".join([run.get("checkpoint", ""), time.strftime("page made %Y-%m-%d %H:%M")]).strip(" ·")),
        "standing": standing(rows, run.get("options", {}).get("max_train_steps"), best),
        "curves": "".join(figure(number, panel) for number, panel in enumerate(drawn)) or _nothing("No curves yet."),
        "videos": video_grid(columns, best) if columns else _nothing("No validation videos yet."),
        "details": details(run),
        "data": json_for_script(drawn),
    }
    # In one pass: a prompt may hold what looks like a placeholder.
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], TEMPLATE.read_text(encoding="utf-8"))
    publish(output_dir / REPORT_FILE, page.encode())
    return output_dir / REPORT_FILE


def json_for_script(content) -> str:
    """JSON that can stand in a <script>: without "<", nothing in it can end that."""
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")


def _nothing(text: str) -> str:
    return f'<p class="nothing">{text}</p>'


# ---- where the run stands --------------------------------------------------------------------------------------------


def standing(rows: list[dict], total_steps: int | None, best: dict) -> str:
    """One sentence, as HTML."""
    if not rows:
        return "Nothing is logged yet."
    last, parts = rows[-1]["step"], []
    losses = [row for row in rows if row.get("loss") is not None]
    if losses and losses[-1].get("loss_smoothed") is not None:
        parts.append(f"the smoothed training loss is <b>{losses[-1]['loss_smoothed']:.4g}</b>")
    elif losses:
        recent = [row["loss"] for row in losses[-PACE_ROWS:]]
        values = f"of the last {len(recent)} rows" if len(recent) > 1 else "so far"
        parts.append(f"the mean training loss {values} is <b>{statistics.fmean(recent):.4g}</b>")
    parts += _best_validation(rows, best)
    paces = [row["seconds"] for row in rows if row.get("seconds") is not None][-PACE_ROWS:]
    if paces:
        seconds = statistics.median(paces)
        left = f", so about {duration(seconds * (total_steps - last))} remain" if last < (total_steps or 0) else ""
        parts.append(f"a step takes <b>{seconds:.3g} s</b>{left}")
    of_total = f" of {total_steps:,}" if total_steps else ""
    return f"At step <b>{last:,}</b>{of_total}{', ' if parts else ''}{'; '.join(parts)}."


def _best_validation(rows: list[dict], best: dict) -> list[str]:
    measured = {row["step"]: row["validation_loss"] for row in rows if row.get("validation_loss") is not None}
    if best:
        step, loss = best["step"], best["validation_loss"]
    elif measured:
        step, loss = min(measured.items(), key=lambda item: item[1])
    else:
        return []
    if step == 0:
        return [f"the validation loss is lowest at the base model, <b>{loss:.4g}</b>: training has not improved it yet"]
    change = ""
    if measured.get(0):
        percent = 100 * (loss / measured[0] - 1)
        change = f", {abs(percent):.3g} % {'below' if percent < 0 else 'above'} that of the base model"
    return [f"the best validation loss is <b>{loss:.4g}</b>, at step <b>{step:,}</b>{change}"]


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


# ---- curves ----------------------------------------------------------------------------------------------------------


def panels(rows: list[dict], best: dict) -> list[dict]:
    """What the page's script draws, one dictionary per picture; none for what was not measured."""
    training = [row for row in rows if "loss" in row]
    validation = [row for row in rows if "validation_loss" in row]
    gradient = "How hard the loss pulls at the weights, before clipping; sudden peaks mean unstable training."
    drawn = [
        _loss_panel(training),
        _validation_panel(validation, best),
        _timestep_panel(validation),
        _plain_panel("Learning rate", "The size of the optimizer's steps.", training, "lr"),
        _plain_panel("Gradient norm", gradient, training, "grad_norm", noisy=True),
        _plain_panel("Seconds per step", "Without checkpoints and validation.", training, "seconds", noisy=True),
    ]
    return [panel for panel in drawn if panel["curves"]]


def _plain_panel(title: str, note: str, rows: list[dict], name: str, noisy: bool = False) -> dict:
    return _panel(title, note, [curve(rows, name, title.lower(), noisy)], zero=True)


def _panel(title: str, note: str, curves: list[dict], **more) -> dict:
    return {"title": title, "note": note, "curves": [line for line in curves if line["points"]]} | more


def _loss_panel(training: list[dict]) -> dict:
    training = thinned(training, "loss")
    raw, smoothed = curve(training, "loss", "each step", noisy=True), curve(training, "loss_smoothed", "smoothed")
    raw["faint"] = bool(smoothed["points"])
    note = "Noisy by nature, because every step draws other clips and other amounts of noise. Look at the trend."
    return _panel("Training loss", note, [raw, smoothed], log=True)


def _validation_panel(validation: list[dict], best: dict) -> dict:
    note = "On clips that are held out of training, with the same noise each time. Where it rises again, the model "
    note += "learns the training clips by heart."
    base = next((row["validation_loss"] for row in validation if row["step"] == 0), None)
    more = {"log": True}
    if base is not None:
        note += " Below the dashed line it is better than the base model."
        more["dashed"] = {"y": base, "label": "base model"}
    if best:
        more["mark"] = {"x": best["step"], "y": best["validation_loss"], "label": "best"}
    return _panel("Validation loss", note, [curve(validation, "validation_loss", "validation loss")], **more)


def _timestep_panel(validation: list[dict]) -> dict:
    """The validation loss by amount of noise; as a change from the base model, if that was measured.

    The losses themselves differ several times between the timesteps, so that no change would show on one axis.
    """
    found = {name for row in validation for name in row if re.fullmatch(r"validation_loss_t\d+", name)}
    names = sorted(found, key=lambda name: int(name.rpartition("_t")[2]))
    base = next((row for row in validation if row["step"] == 0), {})
    relative = bool(names) and all(base.get(name) for name in names)
    curves = [
        curve(validation, name, f"t = {name.rpartition('_t')[2]}", base=base[name] if relative else None)
        for name in names
    ]
    note = (
        "The same loss by timestep t, the amount of noise. Near 1000 the model sees almost pure noise and decides on "
    )
    note += "composition and motion; near 0 it adds fine detail and style."
    more = {"log": not relative}
    if relative:
        more |= {"unit": " %", "dashed": {"y": 0, "label": "base model"}}
        note += " As a change from the base model."
    return _panel("Validation loss by timestep", note, curves, **more)


def curve(rows: list[dict], name: str, label: str, noisy: bool = False, base: float | None = None) -> dict:
    """Points [step, value] of what the rows call `name`, or [step, change from `base` in percent, value].

    Args:
        noisy: single values may fall out of the axis, so that outliers do not flatten the rest.
    """
    points = []
    for row in thinned(rows, name):
        value, change = row[name], [] if base is None else [100 * (row[name] / base - 1)]
        points.append([row["step"], *(float(f"{number:.6g}") for number in (*change, value))])
    return {"label": label, "noisy": noisy, "points": points}


def thinned(rows: list[dict], name: str, limit: int = POINTS_PER_CURVE) -> list[dict]:
    """The rows that have a value, at most `limit`: the first, the last, and of each stretch between the lowest and the
    highest, so that no peak is lost."""
    rows = [row for row in rows if row.get(name) is not None and math.isfinite(row[name])]
    if len(rows) <= limit:
        return rows
    size = math.ceil(len(rows[1:-1]) / ((limit - 2) // 2))
    kept = {0, len(rows) - 1}
    for start in range(1, len(rows) - 1, size):
        stretch = range(start, min(start + size, len(rows) - 1))
        kept |= {min(stretch, key=lambda i: rows[i][name]), max(stretch, key=lambda i: rows[i][name])}
    return [rows[i] for i in sorted(kept)]


def figure(number: int, panel: dict) -> str:
    title, note = escape(panel["title"]), escape(panel["note"])
    return (
        f'<figure data-panel="{number}"><figcaption><h3>{title}</h3><p>{note}</p></figcaption>'
        '<div class="legend"></div><div class="plot"></div></figure>\n'
    )


# ---- videos ----------------------------------------------------------------------------------------------------------


def video_grid(columns: list[ValidationVideos], best: dict) -> str:
    """A row per prompt and seed, a column per step."""
    cases = sorted({case for column in columns for case in column.prompts.items()})
    embedded = embedded_steps(columns)
    head = "".join(_heading(column.step, best) for column in columns)
    body = ""
    for case in cases:
        cells = "".join(_cell(column, *case, column.step in embedded) for column in columns)
        body += f"<tr>{_row_heading(*case)}{cells}</tr>\n"
    note = ""
    if beside := len(columns) - len(embedded):
        note = (
            f"The videos of {beside} of {len(columns)} steps would make this page too large, so it plays the files in "
        )
        note = f'<p class="note">{note}<code>validation</code>: they show while it lies in the run directory.</p>'
    return (
        f'{note}<div class="grid" tabindex="0"><table><thead><tr><th scope="col">prompt</th>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def embedded_steps(columns: list[ValidationVideos]) -> set[int]:
    """The steps whose videos go into the page: the base model, then the latest, as far as EMBEDDED_MIB goes."""
    left, chosen = EMBEDDED_MIB * 2**20, set()
    for column in columns[:1] + columns[:0:-1]:
        files = [column.folder / name for name in column.prompts]
        left -= sum(file.stat().st_size for file in files if file.is_file())
        if left < 0:
            break
        chosen.add(column.step)
    return chosen


def _heading(step: int, best: dict) -> str:
    name, about = (f"step {step:,}", "") if step else ("base model", "<small>before training</small>")
    if best.get("step") == step:
        about += '<span class="best">best</span>'
    return f'<th scope="col"{"" if step else " class=base"}>{name} {about}</th>'


def _row_heading(file: str, prompt: str) -> str:
    seed = re.search(r"seed-(\d+)", file)
    return (
        f'<th scope="row"><div class="prompt">{escape(prompt) or "(empty prompt)"}</div>'
        f"<small>{f'seed {seed[1]}' if seed else escape(file)}</small></th>"
    )


def _cell(column: ValidationVideos, file: str, prompt: str, embed: bool) -> str:
    path = column.folder / file
    if column.prompts.get(file) != prompt:
        return '<td class="empty">not made at this step</td>'
    if not path.is_file():
        return f'<td class="empty">{escape(file)} is missing</td>'
    source = f"{column.folder.parent.name}/{column.folder.name}/{quote(file)}"
    if embed:
        source = f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
    label = escape(f"{f'step {column.step}' if column.step else 'base model'}: {prompt}")
    return f'<td><video muted loop playsinline preload="auto" aria-label="{label}" src="{source}"></video></td>'


# ---- details ---------------------------------------------------------------------------------------------------------


def details(run: dict) -> str:
    """What was trained on, with which options and packages."""
    if not run:
        return _nothing("There is no args.json.")
    lines = [line for summary in run.get("data", []) for line in summary.splitlines()]
    facts = [(name, f"{run[name]:,}") for name in ("clips", "processes") if name in run]
    facts += [("versions", ", ".join(f"{package} {version}" for package, version in run.get("versions", {}).items()))]
    options = [(f"--{name}", _typed(value)) for name, value in run.get("options", {}).items()]
    return (
        "".join(f"<p>{escape(line)}</p>\n" for line in lines)
        + _table(facts)
        + f"<details><summary>All {len(options)} options</summary>{_table(options)}</details>"
    )


def _table(pairs: list[tuple[str, str]]) -> str:
    rows = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>\n' for name, value in pairs)
    return f'<table class="pairs">{rows}</table>'


def _typed(value) -> str:
    """As a person would write it on a command line."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "–" if value is None else str(value)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Makes report.html of a run directory anew.", allow_abbrev=False)
    parser.add_argument("run_dir", type=lambda path: Path(path).expanduser(), help="--output_dir of the training")
    run_dir = parser.parse_args(argv).run_dir
    if not any((run_dir / name).is_file() for name in (ARGS_FILE, METRICS_FILE)):
        parser.error(f"{run_dir}: holds neither args.json nor metrics.jsonl; pass the --output_dir of a training")
    print(write_report(run_dir))


if __name__ == "__main__":
    main()
