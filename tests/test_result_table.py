"""benchmarks/table.py on files that step.py and versus.py wrote, or would have written."""

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
