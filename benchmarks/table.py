"""Tables in Markdown of what step.py and versus.py measured.

    python benchmarks/table.py                                                   # all of benchmarks/results
    python benchmarks/table.py --results benchmarks/results/2b-*.json --update docs/hardware.md

With --update they replace what stands in that file between the lines <!-- results --> and <!-- /results -->.
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
VERSUS = ("against diffusers' example", "device", "seconds, ours", "theirs", "ours / theirs", "to the first update",
          "peak memory", "versions")  # fmt: skip
ABOUT = "By `benchmarks/table.py`, from what `step.py` and `versus.py` wrote to `benchmarks/results`."
ABOUT_STEP = "MFU counts no recomputation."
ABOUT_VERSUS = "In brackets: the ratio of two runs of ours, which differs from 1 by chance alone."


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    option = parser.add_argument
    files = {"type": Path, "nargs": "+", "metavar": "FILE"}
    option("--results", **files, default=sorted(RESULTS.glob("*.json")), help="default: those in benchmarks/results")
    option("--update", **files, default=[], help=f"put the tables between {BEGIN} and {END} there")
    return parser


# ---- rows ------------------------------------------------------------------------------------------------------------


def step_row(result: dict) -> tuple[str, ...]:
    """A row of what step.py wrote, as the columns of `STEP`."""
    mfu = result.get("mfu")  # None, or a file from before it was reported
    return (
        describe_step(result), result["device"].removeprefix("NVIDIA "), f"{result['seconds_per_step']:.4g}",
        f"{result['tokens_per_second']:,.0f}", "-" if mfu is None else f"{100 * mfu:.1f} %",
        f"{result['peak_memory_gib']:.1f}", versions(result),
    )  # fmt: skip


def describe_step(result: dict) -> str:
    """What was trained on what, and those of its options that are not the defaults."""
    options = result["options"]
    trained = "all weights" if options["training_type"] == "sft" else f"LoRA of rank {options['rank']}"
    size = "x".join(str(options[name]) for name in ("max_num_frames", "height", "width"))
    words = [result["model"], size, trained, precision(options["mixed_precision"])]
    plain = {"train_batch_size": 1, "gradient_accumulation_steps": 1, "gradient_checkpointing": "none"}
    plain |= {"attention_backend": "auto", "base_precision": "bf16", "compile": False, "num_layers": None}
    plain |= {"blocks_to_swap": 0}
    words += [switch(name, options[name]) for name, default in plain.items() if options.get(name, default) != default]
    words += [f"{result['processes']} processes"] if result["processes"] > 1 else []
    return ", ".join(words)


def versus_row(result: dict) -> tuple[str, ...]:
    """A row of what versus.py wrote, as the columns of `VERSUS`."""
    compared = result["trials"][:-2]  # the last two are for "ours_over_ours"
    device = compared[0]["device"].removeprefix("NVIDIA ")
    device += f", {compared[0]['threads']} threads" if device == "CPU" else ""
    seconds = (
        f"{statistics.mean(run['seconds_per_update'] for run in compared if run['who'] == who):.4g}"
        for who in ("ours", "theirs")
    )
    shares = (
        f"{result['ours_over_theirs'][name]:.2f} ({result['ours_over_ours'][name]:.2f})"
        for name in ("seconds_per_update", "seconds_to_first_update", "peak_gib")
    )
    return describe_versus(result), device, *seconds, *shares, versions(result)


def describe_versus(result: dict) -> str:
    """Size and options of both scripts, and what ours alone was given."""
    line = result["command_lines"]["theirs"]
    value = {name: re.search(rf"--{name} (\S+)", line)[1] for name in ("rank", "train_batch_size", "mixed_precision")}
    words = [result["size"], f"LoRA of rank {value['rank']}", precision(value["mixed_precision"])]
    words += [switch("train_batch_size", value["train_batch_size"])] if value["train_batch_size"] != "1" else []
    words += ["--gradient_checkpointing"] if "--gradient_checkpointing" in line.split() else []
    own = result.get("ours_options")  # files from before that option have none
    return ", ".join(words) + (f"; ours with {' '.join(own)}" if own else "")


def precision(mixed_precision: str) -> str:
    return {"no": "float32"}.get(mixed_precision, mixed_precision)


def switch(name: str, value) -> str:
    return f"--{name}" if value is True else f"--{name} {value}"


def versions(result: dict) -> str:
    return ", ".join(f"{package} {result['versions'][package]}" for package in ("torch", "diffusers", "peft"))


# ---- tables ----------------------------------------------------------------------------------------------------------


def tables(files: list[Path]) -> str:
    """Both tables, or the one that there are rows for; results of other scripts are left out.

    Raises:
        ValueError: there is not one result of the two.
    """
    results = [json.loads(file.read_text()) for file in files]
    results = [result for result in results if isinstance(result, dict)]
    step = [step_row(result) for result in results if "seconds_per_step" in result]
    versus = [versus_row(result) for result in results if "ours_over_theirs" in result]
    if not step + versus:
        raise ValueError(f"{len(files)} files: none is a result of step.py or versus.py; pass some with --results")
    kinds = [kind for kind in ((STEP, step, ABOUT_STEP), (VERSUS, versus, ABOUT_VERSUS)) if kind[1]]
    about = " ".join([ABOUT, *(note for _, _, note in kinds)])
    return "\n\n".join([*(markdown(columns, rows) for columns, rows, _ in kinds), about])


def markdown(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows))


def updated(text: str, content: str) -> str:
    """The text with `content` between its markers.

    Raises:
        ValueError: it has not just one place for it.
    """
    if [text.count(BEGIN), text.count(END)] != [1, 1] or text.index(BEGIN) > text.index(END):
        raise ValueError(f"needs one line {BEGIN}, and one {END} below; put them where the tables are to stand")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{rest.split(END)[1]}"


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        content = tables(args.results)
        texts = {file: updated_file(file, content) for file in args.update}  # all are right before one is written
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for file, text in texts.items():
        publish(file, text.encode())
    if not texts:
        print(content)


def updated_file(file: Path, content: str) -> str:
    try:
        return updated(file.read_text(encoding="utf-8"), content)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


if __name__ == "__main__":
    main()
