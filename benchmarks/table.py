"""Makes Markdown tables of the results of step.py and versus.py.

    python benchmarks/table.py                                                   # all of benchmarks/results
    python benchmarks/table.py --results benchmarks/results/2b-*.json --update docs/hardware.md

With --update, the tables replace the text between the lines <!-- results --> and <!-- /results --> of a file.
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from files import publish

RESULTS = Path(__file__).with_name("results")
BEGIN, END = "<!-- results -->", "<!-- /results -->"
STEP = ("step", "device", "seconds", "tokens per second", "MFU", "peak GiB", "versions")
VERSUS = (
    "against diffusers' example", "device", "seconds, ours", "theirs", "ours / theirs", "to the first update",
    "peak memory", "versions",
)  # fmt: skip
STEP_DEFAULTS = {
    "train_batch_size": 1, "gradient_accumulation_steps": 1, "gradient_checkpointing": "none",
    "attention_backend": "auto", "base_precision": "bf16", "compile": False, "num_layers": None, "blocks_to_swap": 0,
}  # fmt: skip
ABOUT = "Made by `benchmarks/table.py` from the results of `step.py` and `versus.py` in `benchmarks/results`."
ABOUT_STEP = "MFU does not count recomputation."
ABOUT_VERSUS = "In brackets: the ratio of two runs of ours, which differs from 1 only by chance."


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    option = parser.add_argument
    files = {"type": Path, "nargs": "+", "metavar": "FILE"}
    results = "results to make tables of (default: all in benchmarks/results)"
    option("--results", **files, default=sorted(RESULTS.glob("*.json")), help=results)
    option("--update", **files, default=[], help=f"files to write the tables into, between {BEGIN} and {END}")
    return parser


def step_row(result: dict) -> tuple[str, ...]:
    """Returns the row of a result of step.py, with the columns of `STEP`."""
    mfu = result.get("mfu")  # None where it is not known; older files lack it
    return (
        describe_step(result),
        result["device"].removeprefix("NVIDIA "),
        f"{result['seconds_per_step']:.4g}",
        f"{result['tokens_per_second']:,.0f}",
        "-" if mfu is None else f"{100 * mfu:.1f} %",
        f"{result['peak_memory_gib']:.1f}",
        versions(result),
    )


def describe_step(result: dict) -> str:
    """Returns model, clip size, what is trained, and the options that differ from their defaults."""
    options = result["options"]
    trained = "all weights" if options["training_type"] == "sft" else f"LoRA of rank {options['rank']}"
    size = "x".join(str(options[name]) for name in ("max_num_frames", "height", "width"))
    parts = [result["model"], size, trained, precision(options["mixed_precision"])]
    for name, default in STEP_DEFAULTS.items():
        if options.get(name, default) != default:
            parts.append(as_typed(name, options[name]))
    if result["processes"] > 1:
        parts.append(f"{result['processes']} processes")
    return ", ".join(parts)


def versus_row(result: dict) -> tuple[str, ...]:
    """Returns the row of a result of versus.py, with the columns of `VERSUS`."""
    compared = result["trials"][:-2]  # the last two are for "ours_over_ours"
    device = compared[0]["device"].removeprefix("NVIDIA ")
    if device == "CPU":
        device = f"CPU, {compared[0]['threads']} threads"

    def seconds(who: str) -> str:
        return f"{statistics.mean(run['seconds_per_update'] for run in compared if run['who'] == who):.4g}"

    def ratio(name: str) -> str:
        return f"{result['ours_over_theirs'][name]:.2f} ({result['ours_over_ours'][name]:.2f})"

    return (
        describe_versus(result),
        device,
        seconds("ours"),
        seconds("theirs"),
        ratio("seconds_per_update"),
        ratio("seconds_to_first_update"),
        ratio("peak_gib"),
        versions(result),
    )


def describe_versus(result: dict) -> str:
    """Returns size and options of both scripts, and the options that only ours was given."""
    line = result["command_lines"]["theirs"]
    value = {name: re.search(rf"--{name} (\S+)", line)[1] for name in ("rank", "train_batch_size", "mixed_precision")}
    parts = [result["size"], f"LoRA of rank {value['rank']}", precision(value["mixed_precision"])]
    if value["train_batch_size"] != "1":
        parts.append(as_typed("train_batch_size", value["train_batch_size"]))
    if "--gradient_checkpointing" in line.split():
        parts.append("--gradient_checkpointing")
    description = ", ".join(parts)
    ours_options = result.get("ours_options")  # older files lack it
    return f"{description}; ours with {' '.join(ours_options)}" if ours_options else description


def precision(mixed_precision: str) -> str:
    return {"no": "float32"}.get(mixed_precision, mixed_precision)


def as_typed(name: str, value) -> str:
    return f"--{name}" if value is True else f"--{name} {value}"


def versions(result: dict) -> str:
    return ", ".join(f"{package} {result['versions'][package]}" for package in ("torch", "diffusers", "peft"))


def tables(files: list[Path]) -> str:
    """Returns both tables, or the only one that has rows, and a line about them; skips results of other scripts."""
    results = [json.loads(file.read_text()) for file in files]
    results = [result for result in results if isinstance(result, dict)]
    step_rows = [step_row(result) for result in results if "seconds_per_step" in result]
    versus_rows = [versus_row(result) for result in results if "ours_over_theirs" in result]
    paragraphs, notes = [], [ABOUT]
    for columns, rows, note in ((STEP, step_rows, ABOUT_STEP), (VERSUS, versus_rows, ABOUT_VERSUS)):
        if rows:
            paragraphs.append(markdown(columns, rows))
            notes.append(note)
    if not paragraphs:
        raise ValueError(f"{len(files)} files: none is a result of step.py or versus.py; pass some with --results")
    return "\n\n".join([*paragraphs, " ".join(notes)])


def markdown(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows))


def updated(file: Path, content: str) -> str:
    """Returns the file's text with `content` between its markers; refuses one without exactly one pair of them."""
    text = file.read_text(encoding="utf-8")
    if [text.count(BEGIN), text.count(END)] != [1, 1] or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{file}: needs one line {BEGIN}, and one {END} below; put them where the tables belong")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{rest.split(END)[1]}"


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        content = tables(args.results)
        texts = {file: updated(file, content) for file in args.update}  # all are checked before one is written
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for file, text in texts.items():
        publish(file, text.encode())
    if not texts:
        print(content)


if __name__ == "__main__":
    main()
