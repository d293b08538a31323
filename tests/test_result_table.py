"""benchmarks/table.py on files that step.py and versus.py wrote, or would have written."""

import itertools
import json

import pytest
import step
import table
from conftest import ROOT

VERSIONS = {"torch": "2.13.0", "diffusers": "0.42.1", "peft": "0.21.2", "accelerate": "1.15.0"}
STEP = {
    "model": "2b", "device": "NVIDIA H100 80GB HBM3", "processes": 1, "versions": VERSIONS,
    "options": {
        "training_type": "lora", "rank": 128, "height": 480, "width": 720, "max_num_frames": 49, "train_batch_size": 1,
        "gradient_accumulation_steps": 1, "mixed_precision": "bf16", "gradient_checkpointing": "none",
        "attention_backend": "auto", "base_precision": "bf16", "num_layers": None, "compile": False,
    },
    "seconds_per_step": 0.8123, "tokens_per_second": 21883.5, "mfu": 0.4419, "peak_memory_gib": 32.14,
}  # fmt: skip
COLUMNS = ("seconds_per_update", "seconds_to_first_update", "peak_gib")
VERSUS = {
    "size": "2b", "versions": VERSIONS, "ours_options": ["--compile"],
    "command_lines": {"theirs": "theirs.py --rank 128 --train_batch_size 1 --mixed_precision bf16 --output_dir RUN"},
    "trials": [
        {"who": who, "device": "NVIDIA L4", "threads": 8, "seconds_per_update": seconds}
        for who, seconds in zip(("ours", "theirs", "theirs", "ours", "ours", "ours"), (9, 11, 13, 10, 100, 100))
    ],
    "ours_over_theirs": dict(zip(COLUMNS, (0.7917, 1.5, 1.04))), "ours_over_ours": dict.fromkeys(COLUMNS, 1.0),
}  # fmt: skip


@pytest.fixture
def files(tmp_path):
    """Writes results, and says where; the last has none that a table is made of."""

    def write(*results):
        for number, result in enumerate([*results, {"clips_per_minute": 3.0}, [{"model": "2b"}]]):
            (tmp_path / f"{number}.json").write_text(json.dumps(result))
        return sorted(tmp_path.glob("*.json"))

    return write


def row(text, start):
    return next(line for line in text.splitlines() if line.startswith(f"| {start}"))


def test_a_step_is_a_row(files):
    text = table.tables(files(STEP))
    assert row(text, "2b") == (
        "| 2b, 49x480x720, LoRA of rank 128, bf16 | H100 80GB HBM3 | 0.8123 | 21,884 | 44.2 % | 32.1 "
        "| torch 2.13.0, diffusers 0.42.1, peft 0.21.2 |"
    )
    assert "| against" not in text


@pytest.mark.parametrize("options, further, words", [
    ({"gradient_checkpointing": "full", "compile": True}, {}, "bf16, --gradient_checkpointing full, --compile"),
    ({"training_type": "sft", "mixed_precision": "no"}, {}, "all weights, float32"),
    ({"base_precision": "int8"}, {"processes": 8}, "bf16, --base_precision int8, 8 processes"),
    ({"num_layers": 3, "train_batch_size": 2}, {}, "bf16, --train_batch_size 2, --num_layers 3"),
])  # fmt: skip
def test_what_differs_is_named(options, further, words, files):
    result = STEP | {"options": STEP["options"] | options} | further
    assert f"{words} |" in table.tables(files(result))


def test_no_mfu_is_a_dash(files):
    for result in (STEP | {"mfu": None}, {name: value for name, value in STEP.items() if name != "mfu"}):
        assert "| 21,884 | - | 32.1 |" in table.tables(files(result))


def test_a_comparison_is_a_row_whose_seconds_are_those_of_its_rounds(files):
    text = table.tables(files(VERSUS))
    assert row(text, "2b") == (
        "| 2b, LoRA of rank 128, bf16; ours with --compile | L4 | 9.5 | 12 | 0.79 (1.00) | 1.50 (1.00) | 1.04 (1.00) "
        "| torch 2.13.0, diffusers 0.42.1, peft 0.21.2 |"
    )
    assert "MFU |" not in text


def test_rows_have_the_columns_of_their_table(files):
    lines = [line for line in table.tables(files(STEP, VERSUS)).splitlines() if line.startswith("|")]
    assert [line.count(" | ") for line in lines] == 3 * [len(table.STEP) - 1] + 3 * [len(table.VERSUS) - 1]


def test_what_the_scripts_write_is_understood(tmp_path):
    """That of a run now, and the comparisons that were measured."""
    step.main(["--model", "tiny", "--rank", "4", "--steps", "1", "--warmup", "0", "--output", str(tmp_path / "a.json")])
    measured = sorted((ROOT / "benchmarks" / "results").glob("versus-*.json"))
    text = table.tables([tmp_path / "a.json", *measured])
    assert row(text, "tiny").startswith("| tiny, 9x64x96, LoRA of rank 4, ")
    bf16 = json.loads((ROOT / "benchmarks" / "results" / "versus-cpu-compute-bf16.json").read_text())
    ratio, spread = (bf16[name]["seconds_per_update"] for name in ("ours_over_theirs", "ours_over_ours"))
    assert row(text, "compute, LoRA of rank 32, bf16").split(" | ")[4] == f"{ratio:.2f} ({spread:.2f})"
    assert len([line for line in text.splitlines() if line.startswith("|")]) == 2 * 2 + 1 + len(measured)


# ---- a file that holds the tables ------------------------------------------------------------------------------------


def test_update_replaces_what_stands_between_the_markers_and_nothing_else(files, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Ü\n\n<!-- results -->\nold | table\n<!-- /results -->\nend\n")
    line = ["--results", *map(str, files(STEP, VERSUS)), "--update", str(page)]
    table.main(line)
    once = page.read_text()
    table.main(line)
    assert page.read_text() == once
    assert once.startswith("# Ü\n\n<!-- results -->\n\n| step |") and once.endswith("\n\n<!-- /results -->\nend\n")
    assert "old" not in once and "L4" in once


@pytest.mark.parametrize("text", ["no markers", "<!-- results -->", "<!-- /results --> <!-- results -->",
                                  "<!-- results --><!-- results --><!-- /results -->"])  # fmt: skip
def test_no_file_is_changed_where_one_has_no_place_for_the_tables(text, files, tmp_path, capsys):
    good, bad = tmp_path / "good.md", tmp_path / "bad.md"
    good.write_text(f"{table.BEGIN}{table.END}")
    bad.write_text(text)
    with pytest.raises(SystemExit) as end:
        table.main(["--results", *map(str, files(STEP)), "--update", str(good), str(bad)])
    assert end.value.code == 2 and "bad.md: needs one line <!-- results -->" in capsys.readouterr().err
    assert (good.read_text(), bad.read_text()) == (f"{table.BEGIN}{table.END}", text)


def test_files_without_a_row_are_refused(files, capsys):
    with pytest.raises(SystemExit) as end:
        table.main(["--results", *map(str, files())])
    assert end.value.code == 2
    assert "2 files: none is a result of step.py or versus.py" in capsys.readouterr().err


# ---- what is predicted beside what prove.sh measured -----------------------------------------------------------------

PROOF = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "runs": {
        "2b-none": {"exit_code": 0, "result": STEP},
        "5b-none": {"exit_code": 3, "last_lines": ["out of memory"]},
        "tests": {"exit_code": 0},
    },
}
STEPS = [("2b-none", "2b, bf16", 30.29), ("5b-none", "5b, bf16", 69.9), ("5b-full", "5b, full", 18.3)]


def test_measured_values_are_beside_the_predicted_and_empty_cells_say_so(files, monkeypatch):
    monkeypatch.setattr(table, "steps_of_suite", lambda: STEPS)
    text = table.proof_table(files(PROOF))
    assert row(text, "`2b-none`") == "| `2b-none` | 2b, bf16 | 30.3 | 32.1 | 0.8123 | H100 80GB HBM3 |"
    assert row(text, "`5b-none`") == "| `5b-none` | 5b, bf16 | 69.9 | failed, exit code 3 | - | H100 80GB HBM3 |"
    assert row(text, "`5b-full`") == "| `5b-full` | 5b, full | 18.3 | not measured yet | not measured yet | - |"


def test_a_step_that_does_not_fit_as_predicted_has_a_row_that_says_so(files, monkeypatch):
    monkeypatch.setattr(table, "steps_of_suite", lambda: STEPS[:1])
    outcome = {"exit_code": 2, "result": {"does_not_fit": {"predicted_peak_gib": 30.29, "gpu_gib": 23.6}}}
    small = {"gpu": "NVIDIA GeForce RTX 4090", "runs": {"2b-none": outcome}}
    end = "30.3 | does not fit, predicted | - | GeForce RTX 4090 |"
    assert row(table.proof_table(files(small)), "`2b-none`") == f"| `2b-none` | 2b, bf16 | {end}"
    assert table.results_in(small) == []


def test_each_gpu_has_a_row(files, monkeypatch):
    monkeypatch.setattr(table, "steps_of_suite", lambda: STEPS[:1])
    text = table.proof_table(files(PROOF, PROOF | {"gpu": "NVIDIA L4"}))
    assert [line.split(" | ")[-1] for line in text.splitlines()[2:]] == ["H100 80GB HBM3 |", "L4 |"]


def test_what_has_passed_in_prove_is_in_the_table_of_steps_too(files):
    rows = [line for line in table.tables(files(PROOF)).splitlines() if line.startswith("|")]
    assert len(rows) == 3 and rows[2] == row(table.tables(files(STEP)), "2b")


def test_a_page_with_a_place_for_it_gets_the_predictions(files, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "steps_of_suite", lambda: STEPS)
    page = tmp_path / "page.md"
    page.write_text("<!-- proof -->old<!-- /proof -->\nbetween\n<!-- results --><!-- /results -->\n")
    table.main(["--results", *map(str, files(STEP)), "--update", str(page)])
    text = page.read_text()
    assert "old" not in text and "\nbetween\n" in text and text.count("not measured yet") == 6
    assert text.index("`2b-none`") < text.index("between") < text.index("21,884")


def test_the_page_has_the_steps_of_the_suite_with_their_predictions():
    page = (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
    for name, described, predicted in itertools.islice(table.steps_of_suite(), 3):  # all would take ten seconds
        assert f"| `{name}` | {described} | {predicted:.1f} |" in page, "run benchmarks/table.py --update on the page"
