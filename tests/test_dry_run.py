"""A dry run says what a run will do, and leaves nothing behind; a run that cannot fit is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import reset_accelerate, training_options

import train_cogvideox_lora
from cogvideox.budget import GIB
from run import processes
from run.run_directory import read_args


@pytest.fixture
def start(clips, capsys):
    """Runs the training script; returns its exit code and what it printed."""

    def run(base, output_dir, **options):
        data = options.pop("instance_data_root", clips)
        args = train_cogvideox_lora.parse_args(training_options(base, data, output_dir, **options))
        code = 0
        try:
            train_cogvideox_lora.main(args)
        except SystemExit as exit:
            code = exit.code
        reset_accelerate()
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


@pytest.fixture
def configs_only(tiny_checkpoint, tmp_path):
    """The json files of a base model: no weights, no tokenizer."""
    folder = tmp_path / "configs"
    for file in Path(tiny_checkpoint).rglob("*.json"):
        target = folder / file.relative_to(tiny_checkpoint)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    return folder


def files(*folders):
    return {path: path.stat().st_mtime_ns for folder in folders for path in Path(folder).rglob("*")}


def test_says_what_the_run_will_do_and_writes_nothing(configs_only, clips, tmp_path, start, monkeypatch):
    data = shutil.copytree(clips, tmp_path / "clips", ignore=shutil.ignore_patterns(".*"))
    monkeypatch.chdir(tmp_path)
    before = files(tmp_path)
    code, printed = start(
        configs_only, tmp_path / "run", instance_data_root=data, dry_run=True, num_train_epochs=2, random_flip=True,
        validation_prompt="a red circle", validation_split=1, checkpointing_steps=4, report_to="tensorboard",
    )  # fmt: skip
    assert code == 0
    assert files(tmp_path) == before
    assert "updates 1 to 10, clips in each: 1, epochs: 2" in printed and "held out: 1 clip" in printed
    for phase in ("text", "clips", "training", "validation"):
        assert re.search(rf"(?m)^{phase} .*\b\d+\.\d\d GiB, .* TFLOP", printed), phase
    assert re.search(r"cache: .* GiB; result: .* GiB; checkpoints: .* GiB each, 3 at a time", printed)


def test_says_what_the_run_then_needs(tiny_checkpoint, tmp_path, start):
    _, printed = start(tiny_checkpoint, tmp_path / "a", dry_run=True, max_train_steps=1)
    code, _ = start(tiny_checkpoint, tmp_path / "b", max_train_steps=1)
    peaks = read_args(tmp_path / "b")["memory_plan"]["peak_gib"]
    assert code == 0
    for phase, gib in peaks.items():
        assert f"{phase:<12}{gib:7.2f} GiB" in printed


def test_a_card_that_is_not_there(configs_only, tmp_path, start):
    options = {"dry_run": True, "attention_backend": "cudnn", "gradient_checkpointing": "auto"}
    code, printed = start(configs_only, tmp_path / "run", dry_run_gib=24, **options)
    assert code == 0 and "free: 24.0" in printed and "cudnn attention" in printed
    code, printed = start(configs_only, tmp_path / "run", dry_run_gib=0.001, **options)
    assert code == 2 and "training needs 0.0 GiB, as predicted, and 0.0 are free: " in printed
    code, _ = start(configs_only, tmp_path / "run", dry_run_gib=0.001, allow_oversubscription=True, **options)
    assert code == 0


def test_refuses_what_the_run_would_refuse(configs_only, clips, tmp_path, start, monkeypatch):
    data = shutil.copytree(clips, tmp_path / "clips", ignore=shutil.ignore_patterns(".*"))
    next(data.rglob("*.mp4")).write_bytes(b"")
    code, printed = start(configs_only, tmp_path / "run", instance_data_root=data, dry_run=True)
    assert code == 2 and "the file is empty" in printed
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1000))
    code, printed = start(configs_only, tmp_path / "run", dry_run=True)
    assert code == 2 and "the run needs" in printed and "make room" in printed


def test_a_run_that_cannot_fit_is_refused_before_anything_is_loaded(tiny_checkpoint, tmp_path, start, monkeypatch):
    monkeypatch.setattr(processes, "free_bytes", lambda device: 1000)
    code, printed = start(tiny_checkpoint, tmp_path / "run", max_train_steps=1)
    assert code == 2 and "--allow_oversubscription" in printed and not (tmp_path / "run").exists()
    code, printed = start(tiny_checkpoint, tmp_path / "run", max_train_steps=1, allow_oversubscription=True)
    assert code == 0 and "Result: " in printed


def test_options_without_effect_are_refused(tiny_checkpoint, clips, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_cogvideox_lora.parse_args(training_options(tiny_checkpoint, clips, tmp_path, dry_run_gib=24))
    assert "--dry_run_gib 24: does nothing without --dry_run" in capsys.readouterr().err


def test_free_memory_of_a_cpu_is_what_the_machine_and_the_control_group_leave(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    assert processes.free_bytes(cpu, tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 99 kB\nMemAvailable:    8388608 kB\n")
    assert processes.free_bytes(cpu, tmp_path) == 8 * GIB
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    for name, content in {"max": "max", "current": str(2 * GIB), "stat": f"anon 1\ninactive_file {GIB}\n"}.items():
        (group / f"memory.{name}").write_text(content)
    assert processes.free_bytes(cpu, tmp_path) == 8 * GIB
    (group / "memory.max").write_text(f"{4 * GIB}\n")
    assert processes.free_bytes(cpu, tmp_path) == 3 * GIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert processes.free_bytes(cpu, tmp_path) == 3 * GIB // 2


def test_the_plan_is_json(tiny_checkpoint, tmp_path, start):
    start(tiny_checkpoint, tmp_path, max_train_steps=1, gradient_checkpointing="auto", enable_tiling="auto")
    plan = json.loads((tmp_path / "args.json").read_text())["memory_plan"]
    assert (plan["gradient_checkpointing"], plan["tile_encoding"], plan["tile_decoding"]) == ("none", False, False)
