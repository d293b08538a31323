"""Turns a run directory into report.html: one file that opens from disk and needs no network.

report_template.html.jinja holds the markup, the style, and the script that draws the curves and plays the videos. This
module computes what it shows. `python -m pages.report RUN_DIR` writes the page again.
"""

import argparse
import base64
import math
import re
import statistics
import time
from pathlib import Path
from urllib.parse import quote

from files import expanded_path, publish
from pages.template import load_template
from run import run_directory, stopping
from run.run_directory import ARGS_FILE, METRICS_FILE, REPORT_FILE, ValidationVideos
from run.validation import remark_on_drift

TEMPLATE = "report_template.html.jinja"
POINTS_PER_CURVE = 1000
EMBEDDED_MIB = 100  # of videos; browsers give up on pages of several hundred
RECENT_ROWS = 100  # enough for a mean loss, few enough for today's step time


def write_report(output_dir: Path) -> Path:
    """Writes the page of a run, finished or not, into its directory; returns the path of the page."""
    run, best = run_directory.read_args(output_dir), run_directory.read_best(output_dir)
    rows = run_directory.read_metrics(output_dir)
    about = [run.get("checkpoint", ""), time.strftime("page made %Y-%m-%d %H:%M")]
    page = load_template(TEMPLATE).render(
        name=output_dir.absolute().name,
        about=" · ".join(part for part in about if part),
        progress=progress(rows, run.get("options", {}).get("max_train_steps"), best),
        panels=panels(rows, best),
        ended=stopping.reason(rows, run),
        videos=video_grid(run_directory.read_validation_videos(output_dir), best.get("step")),
        run=run,
    )
    publish(output_dir / REPORT_FILE, page.encode())
    return output_dir / REPORT_FILE


# ---- progress --------------------------------------------------------------------------------------------------------


def progress(rows: list[dict], total_steps: int | None, best: dict) -> dict | None:
    """Returns how far a run has come, with None for what is not known; None where nothing is logged.

    Args:
        best: step and losses of the best checkpoint; empty where none is kept.
    """
    if not rows:
        return None
    step = rows[-1]["step"]
    training = having(rows, "loss")
    recent_losses = [row["loss"] for row in training[-RECENT_ROWS:]]
    recent_seconds = [row["seconds"] for row in having(rows, "seconds")[-RECENT_ROWS:]]
    step_seconds = statistics.median(recent_seconds) if recent_seconds else None
    steps_left = (total_steps or 0) - step
    return {
        "step": step,
        "total_steps": total_steps,
        "smoothed_loss": training[-1].get("loss_smoothed") if training else None,
        "mean_loss": statistics.fmean(recent_losses) if recent_losses else None,
        "mean_rows": len(recent_losses),
        "validation": best_validation(rows, best),
        "step_seconds": step_seconds,
        "remaining": duration(step_seconds * steps_left) if step_seconds is not None and steps_left > 0 else None,
    }


def having(rows: list[dict], name: str) -> list[dict]:
    """Returns the rows in which `name` has a value."""
    return [row for row in rows if row.get(name) is not None]


def best_validation(rows: list[dict], best: dict) -> dict | None:
    """Returns step and loss of the best validation, and its change in percent from the base model's if known."""
    losses = {row["step"]: row["validation_loss"] for row in having(rows, "validation_loss")}
    if best:
        step, loss = best["step"], best["validation_loss"]
    elif losses:
        step, loss = min(losses.items(), key=lambda item: item[1])
    else:
        return None
    return {"step": step, "loss": loss, "change_percent": 100 * (loss / losses[0] - 1) if losses.get(0) else None}


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


# ---- curves ----------------------------------------------------------------------------------------------------------


def panels(rows: list[dict], best: dict) -> list[dict]:
    """Returns what the page's script draws, one dictionary per plot, without plots of what was not measured."""
    training = [row for row in rows if "loss" in row]
    validation = [row for row in rows if "validation_loss" in row]
    gradient_note = "The size of the gradient before clipping; sudden peaks mean unstable training."
    preserved_note = "How far predictions are from the base model's without the new word, where --preserve is due."
    prior_note = "The loss on the clips of --regularization_data_root, which show what the model is to keep."
    drawn = [
        _loss_panel(training),
        _validation_panel(validation, best),
        _timestep_panel(validation),
        _plain_panel("Preservation loss", preserved_note, training, "preservation_loss", noisy=True),
        _plain_panel("Loss on regularization clips", prior_note, training, "prior_loss", noisy=True),
        _drift_panel(having(rows, "drift")),
        _motion_panel(having(rows, "validation_motion")),
        _plain_panel("Learning rate", "The size of the optimizer's steps.", training, "lr"),
        _plain_panel("Gradient norm", gradient_note, training, "grad_norm", noisy=True),
        _plain_panel("Seconds per step", "Without checkpoints and validation.", training, "seconds", noisy=True),
    ]
    return [panel for panel in drawn if panel["curves"]]


def _plain_panel(title: str, note: str, rows: list[dict], name: str, *, noisy: bool = False) -> dict:
    return _panel(title, note, [curve(rows, name, title.lower(), noisy=noisy)], zero=True)


def _panel(title: str, note: str, curves: list[dict], **options) -> dict:
    """Returns a plot of the curves that have points; the page's script says what the options do."""
    return {"title": title, "note": note, "curves": [line for line in curves if line["points"]]} | options


def _loss_panel(training: list[dict]) -> dict:
    training = thinned(training, "loss")
    raw, smoothed = curve(training, "loss", "each step", noisy=True), curve(training, "loss_smoothed", "smoothed")
    raw["faint"] = bool(smoothed["points"])
    note = "Noisy by nature: every step draws different clips and different amounts of noise. Look at the trend."
    return _panel("Training loss", note, [raw, smoothed], log=True)


def _validation_panel(validation: list[dict], best: dict) -> dict:
    note = (
        "On clips that are held out of training, with the same noise each time. Where it rises again, the model "
        "memorizes the training clips."
    )
    base_loss = next((row["validation_loss"] for row in validation if row["step"] == 0), None)
    options = {"log": True}
    if base_loss is not None:
        note += " Below the dashed line it is better than the base model."
        options["dashed"] = {"y": base_loss, "label": "base model"}
    if best:
        options["mark"] = {"x": best["step"], "y": best["validation_loss"], "label": "best"}
    return _panel("Validation loss", note, [curve(validation, "validation_loss", "validation loss")], **options)


def _timestep_panel(validation: list[dict]) -> dict:
    """The validation loss by timestep; as a change from the base model, if that was measured.

    The losses of different timesteps differ several times over, so on one axis no change would show.
    """
    named = _by_timestep(validation, "validation_loss")
    base = next((row for row in validation if row["step"] == 0), {})
    relative = bool(named) and all(base.get(name) for _, name in named)
    curves = [
        curve(validation, name, f"t = {timestep}", base=base[name] if relative else None) for timestep, name in named
    ]
    note = (
        "The same loss by timestep t, the amount of noise. Near 1000 the model sees almost pure noise and decides on "
        "composition and motion; near 0 it adds fine detail and style."
    )
    options = {"log": not relative}
    if relative:
        options |= {"unit": " %", "dashed": {"y": 0, "label": "base model"}}
        note += " As a change from the base model."
    return _panel("Validation loss by timestep", note, curves, **options)


def _drift_panel(measured: list[dict]) -> dict:
    """How far the predictions are from the base model's where the new word is absent."""
    note = (
        "How far the model is from the base model where the new word is absent: the mean squared difference of their "
        "predictions on the held-out clips, by timestep t as above. What a LoRA changes there was not asked for."
    )
    if remark := remark_on_drift(having(measured, "validation_loss")):
        note += f" Now, {remark}."
    mean = curve(measured, "drift", "drift")
    curves = [curve(measured, name, f"t = {timestep}") for timestep, name in _by_timestep(measured, "drift")]
    return _panel("Drift from the base model", note, [*curves, mean], zero=True)  # timesteps in the colours of above


def _by_timestep(rows: list[dict], name: str) -> list[tuple[int, str]]:
    """Returns the timesteps at which a value was measured, each with its name in metrics.jsonl."""
    names = {key for row in rows for key in row}
    return sorted((int(match[1]), key) for key in names if (match := re.fullmatch(rf"{name}_t(\d+)", key)))


def _motion_panel(sampled: list[dict]) -> dict:
    """The motion of the validation videos, with the base model's and the training clips' where they are known."""
    note = (
        "How much the validation videos change in a second, in levels of 255: the mean difference of successive frames "
        "times the frame rate. Where it falls far below the base model's and the training clips', motion dies."
    )
    options, of_data = {"zero": True}, sampled[-1].get("data_motion") if sampled else None
    if of_data is not None:
        options["dashed"] = {"y": of_data, "label": "mean of the training clips"}
    else:
        note += " That of the training clips is not known: an earlier version has encoded some, or all are images."
    if sampled and sampled[0]["step"] == 0:
        options["mark"] = {"x": 0, "y": sampled[0]["validation_motion"], "label": "base model"}
    return _panel("Motion of the videos", note, [curve(sampled, "validation_motion", "validation videos")], **options)


def curve(rows: list[dict], name: str, label: str, *, noisy: bool = False, base: float | None = None) -> dict:
    """Points [step, value] of the column `name`, or [step, change from `base` in percent, value].

    Args:
        noisy: the axis may cut single values off, so that outliers do not flatten the rest.
    """
    points = []
    for row in thinned(rows, name):
        values = [row[name]] if base is None else [100 * (row[name] / base - 1), row[name]]
        points.append([row["step"], *(float(f"{value:.6g}") for value in values)])
    return {"label": label, "noisy": noisy, "points": points}


def thinned(rows: list[dict], name: str) -> list[dict]:
    """Returns at most POINTS_PER_CURVE of the rows that have a finite value, with every peak among them.

    These are the first, the last, and the lowest and the highest of each stretch between.
    """
    rows = [row for row in having(rows, name) if math.isfinite(row[name])]
    if len(rows) <= POINTS_PER_CURVE:
        return rows
    size = math.ceil(len(rows[1:-1]) / ((POINTS_PER_CURVE - 2) // 2))
    kept = {0, len(rows) - 1}
    for start in range(1, len(rows) - 1, size):
        stretch = range(start, min(start + size, len(rows) - 1))
        kept |= {min(stretch, key=lambda i: rows[i][name]), max(stretch, key=lambda i: rows[i][name])}
    return [rows[i] for i in sorted(kept)]


# ---- videos ----------------------------------------------------------------------------------------------------------


def video_grid(columns: list[ValidationVideos], best_step: int | None) -> dict | None:
    """Returns a row of videos per prompt and seed, with a cell per step; None where there are no videos yet."""
    if not columns:
        return None
    embedded = embedded_steps(columns)
    rows = []
    for file, prompt in sorted({row for column in columns for row in column.prompts.items()}):
        seed = re.search(r"seed-(\d+)", file)
        cells = [_cell(column, file, prompt, embed=column.step in embedded) for column in columns]
        rows.append({"prompt": prompt, "name": f"seed {seed[1]}" if seed else file, "cells": cells})
    steps_beside = len(columns) - len(embedded)  # whose videos are in files beside the page
    steps = [column.step for column in columns]
    return {"steps": steps, "best_step": best_step, "rows": rows, "steps_beside": steps_beside}


def embedded_steps(columns: list[ValidationVideos]) -> set[int]:
    """Returns the steps whose videos go into the page: the base model, then the latest, up to EMBEDDED_MIB."""
    bytes_left, steps = EMBEDDED_MIB * 2**20, set()
    for column in columns[:1] + columns[:0:-1]:
        files = [column.folder / name for name in column.prompts]
        bytes_left -= sum(file.stat().st_size for file in files if file.is_file())
        if bytes_left < 0:
            break
        steps.add(column.step)
    return steps


def _cell(column: ValidationVideos, file: str, prompt: str, *, embed: bool) -> dict:
    """Returns a video's URL and a text that describes it; where there is no video, None and the reason."""
    path = column.folder / file
    if column.prompts.get(file) != prompt:
        return {"source": None, "text": "not made at this step"}
    if not path.is_file():
        return {"source": None, "text": f"{file} is missing"}
    if embed:
        source = f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"
    else:
        source = f"{column.folder.parent.name}/{column.folder.name}/{quote(file)}"
    return {"source": source, "text": f"{f'step {column.step}' if column.step else 'base model'}: {prompt}"}


# ---- the command -----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m pages.report", description="Writes report.html of a run directory again.", allow_abbrev=False
    )
    parser.add_argument("run_dir", type=expanded_path, metavar="RUN_DIR", help="--output_dir of a training run")
    run_dir = parser.parse_args(argv).run_dir
    if not any((run_dir / name).is_file() for name in (ARGS_FILE, METRICS_FILE)):
        parser.error(f"{run_dir}: holds neither {ARGS_FILE} nor {METRICS_FILE}; pass the --output_dir of a run")
    print(write_report(run_dir))


if __name__ == "__main__":
    main()
