"""Makes Markdown tables of the results of step.py and versus.py, by themselves or in the files of prove.sh.

    python benchmarks/table.py                                                   # all of benchmarks/results
    python benchmarks/table.py --results benchmarks/results/2b-*.json --update docs/hardware.md

With --update, the tables replace the text between the lines <!-- results --> and <!-- /results --> of a file. Between
<!-- proof --> and <!-- /proof -->, where a file has these lines, a table compares what is predicted for the steps of
prove.sh, computed when the table is made, with what prove.sh measured.
"""

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from proof import describe_outcome

from files import publish

RESULTS = Path(__file__).with_name("results")
BEGIN, END = "<!-- results -->", "<!-- /results -->"
PROOF_BEGIN, PROOF_END = "<!-- proof -->", "<!-- /proof -->"
STEP = ("step", "device", "seconds", "tokens per second", "MFU", "peak GiB", "versions")
VERSUS = (
    "against diffusers' example", "device", "seconds, ours", "theirs", "ours / theirs", "to the first update",
    "peak memory", "versions",
)  # fmt: skip
PROOF = ("run", "options", "predicted peak, GiB", "measured peak, GiB", "seconds per step", "GPU")
NOT_MEASURED = "not measured yet"
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


def results_in(content) -> list[dict]:
    """Returns the results in a file: of prove.sh, those of the runs that have passed; of other scripts, the one."""
    if not isinstance(content, dict):
        return []
    if not is_proof(content):
        return [content]
    runs = content["runs"].values()
    return [run["result"] for run in runs if run["exit_code"] == 0 and "result" in run]


def is_proof(content) -> bool:
    return isinstance(content, dict) and {"gpu", "runs"} <= content.keys()


def tables(files: list[Path]) -> str:
    """Returns both tables, or the only one that has rows, and a line about them; skips results of other scripts."""
    results = [result for file in files for result in results_in(json.loads(file.read_text()))]
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


def proof_table(files: list[Path]) -> str:
    """Returns a table of the steps of prove.sh, with what its files measured; says which were not measured."""
    contents = [json.loads(file.read_text()) for file in files]
    proofs = [content for content in contents if is_proof(content)]
    return markdown(PROOF, [row for step in steps_of_suite() for row in proof_rows(*step, proofs)])


def steps_of_suite() -> Iterator[tuple[str, str, float]]:
    """Yields name, description and predicted peak in GiB of the steps that prove.sh times, in its order."""
    import step  # imports torch, which the other tables do not need

    line = ["bash", str(Path(__file__).with_name("prove.sh")), "--dry"]
    environment = os.environ | {"PYTHON": sys.executable, "PROVE_MODEL": ""}
    output = subprocess.run(line, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    for command in output.splitlines():
        _, of_step, words = command.partition("benchmarks/step.py ")
        if of_step:
            options = step.parse_args([*shlex.split(words), "--mixed_precision", "bf16"])
            values = vars(step.training_args(options)) | {"num_layers": options.num_layers, "compile": options.compile}
            described = describe_step({"model": options.model, "options": values, "processes": 1})
            yield options.output.stem, described, step.predicted_peak_gib(options)


def proof_rows(name: str, described: str, predicted: float, proofs: list[dict]) -> list[tuple[str, ...]]:
    """Returns a row for each GPU on which a step was tried, or one that says that there is none."""
    start = (f"`{name}`", described, f"{predicted:.1f}")
    rows = []
    for proof in proofs:
        run = proof["runs"].get(name)
        if run is None:
            continue
        gpu = proof["gpu"].removeprefix("NVIDIA ")
        if run["exit_code"] == 0:
            result = run["result"]
            rows.append((*start, f"{result['peak_memory_gib']:.1f}", f"{result['seconds_per_step']:.4g}", gpu))
        else:
            rows.append((*start, describe_outcome(run), "-", gpu))
    return rows or [(*start, NOT_MEASURED, NOT_MEASURED, "-")]


def updated(file: Path, text: str, content: str, begin: str = BEGIN, end: str = END) -> str:
    """Returns the file's text with `content` between the markers; refuses one without exactly one pair of them."""
    if [text.count(begin), text.count(end)] != [1, 1] or text.index(begin) > text.index(end):
        raise ValueError(f"{file}: needs one line {begin}, and one {end} below; put them where the tables belong")
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}"


def updated_pages(pages: list[Path], results: list[Path], content: str) -> dict[Path, str]:
    """Returns the new text of each page; all are checked before one is written."""
    texts = {page: updated(page, page.read_text(encoding="utf-8"), content) for page in pages}
    with_proof = [page for page, text in texts.items() if PROOF_BEGIN in text or PROOF_END in text]
    proof = proof_table(results) if with_proof else ""
    return texts | {page: updated(page, texts[page], proof, PROOF_BEGIN, PROOF_END) for page in with_proof}


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        content = tables(args.results)
        texts = updated_pages(args.update, args.results, content)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for file, text in texts.items():
        publish(file, text.encode())
    if not texts:
        print(content)


if __name__ == "__main__":
    main()
