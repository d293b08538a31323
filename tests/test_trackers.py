"""What the trackers are told. Those that are not installed are skipped; all of them work without a network."""

import json
import os
import sqlite3
import subprocess
import sys
import types

import pytest
import yaml
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType, ProjectConfiguration
from conftest import ROOT, training_options

import train_cogvideox_lora
from cogvideox.lora_files import LORA_FILE
from run import processes
from run.run_directory import start_records

OPTIONS = {"max_train_steps": 2, "validation_prompt": "a cat", "tracker_name": "name"}


def hparams(logs):
    (file,) = logs.glob("name/*/hparams.yml")
    return yaml.safe_load(file.read_text())


def test_numbers_and_switches_reach_the_tracker_as_such(tiny_checkpoint, tmp_path, train):
    pytest.importorskip("tensorboard", reason="an optional package, in requirements-dev.txt")
    train(tiny_checkpoint, tmp_path / "run", report_to="tensorboard", tracker_name="name", max_train_steps=1)
    config = hparams(tmp_path / "run" / "logs")
    assert config["rank"] == 4 and config["learning_rate"] == 1e-3 and config["use_dora"] is False
    assert config["validation_prompt"] == "None" and config["output_dir"] == str(tmp_path / "run")
    assert config["lora_target_modules"] == "['to_k', 'to_out.0', 'to_q', 'to_v']" and "hub_token" not in config


def test_a_tracker_gets_no_value_that_it_may_not_take(tmp_path):
    class Accelerator:
        is_main_process, logging_dir, log_with = False, "logs", ["any"]

        def init_trackers(self, name, config, init_kwargs):
            self.config = config

    accelerator, infinite = Accelerator(), float("inf")
    options = {"a": None, "b": tmp_path, "c": ["x"], "d": True, "e": 1, "f": infinite, "g": "text", "hub_token": "x"}
    start_records(accelerator, tmp_path, "name", {"options": options}, resumed_from=None, changed={})
    expected = {"a": "None", "b": str(tmp_path), "c": "['x']", "d": True, "e": 1, "f": infinite, "g": "text"}
    assert accelerator.config == expected and type(accelerator.config["d"]) is bool


@pytest.mark.parametrize(("environment", "folder"), [({}, "run/logs"), ({"WANDB_DIR": "elsewhere"}, "elsewhere")])
def test_wandb_is_told_its_folder(tmp_path, monkeypatch, environment, folder):
    """By accelerate's own tracker, around a stand-in for the package."""
    told = {}
    wandb = types.ModuleType("wandb")
    wandb.init, wandb.config = lambda **options: told.update(options), types.SimpleNamespace(update=lambda *_, **__: 0)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("accelerate.tracking.is_wandb_available", lambda: True)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    monkeypatch.delenv("WANDB_DIR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = ProjectConfiguration(str(tmp_path / "run"), "run/logs")
    accelerator = Accelerator(log_with="wandb", project_config=config)
    start_records(accelerator, tmp_path / "run", "name", {"options": {"rank": 4}}, resumed_from=None, changed={})
    assert told == {"project": "name", "dir": folder}


def run_script(checkpoint, clips, folder, tracker, **environment):
    """In a process of its own: trackers read where to write when they are imported."""
    line = training_options(checkpoint, clips, folder / "run", report_to=tracker, **OPTIONS)
    command = [sys.executable, ROOT / "train_cogvideox_lora.py", *line]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"} | environment
    subprocess.run(command, check=True, env=environment, cwd=folder, timeout=300)
    return (folder / "run" / "validation" / "step-000002" / "prompt-00_seed-3407.mp4").read_bytes()


def test_trackio_gets_scalars_options_and_videos(tiny_checkpoint, clips, tmp_path):
    pytest.importorskip("trackio", reason="an optional package")
    video = run_script(tiny_checkpoint, clips, tmp_path, "trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    (shown,) = (tmp_path / "trackio" / "media").rglob("*.mp4")
    assert shown.read_bytes() == video
    database = sqlite3.connect(tmp_path / "trackio" / "name.db")
    rows = "".join(str(row) for row in database.execute("SELECT step, metrics FROM metrics"))
    assert rows.count("train/loss") == 2 and "validation/prompt-00_seed-3407" in rows and "a cat" in rows
    (config,) = database.execute("SELECT config FROM configs").fetchone()
    assert json.loads(config)["rank"] == 4


def test_wandb_gets_options_and_videos(tiny_checkpoint, clips, tmp_path):
    pytest.importorskip("wandb", reason="an optional package")
    video = run_script(tiny_checkpoint, clips, tmp_path, "wandb", WANDB_MODE="offline")
    shown = [path.read_bytes() for path in tmp_path.glob("run/logs/wandb/offline-run-*/files/media/videos/*.mp4")]
    assert len(shown) == 2 and video in shown  # before the first update and after the last
    assert not (tmp_path / "wandb").exists()


class Failing(GeneralTracker):
    """Fails at one moment."""

    name, requires_logging_directory, tracker = "failing", False, None

    def __init__(self, moment):
        super().__init__()
        self.moment, self.steps = moment, []

    def happens(self, moment):
        if moment == self.moment:
            raise ConnectionError("the network is gone\nand more")

    def start(self):
        self.happens("start")

    def store_init_configuration(self, values):
        pass

    def log(self, values, step, **_):
        self.happens("log")
        self.steps.append(step)

    def finish(self):
        self.happens("finish")


@pytest.mark.parametrize("moment", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_named_once_and_training_continues(
    tiny_checkpoint, tmp_path, train, monkeypatch, capsys, moment
):
    """Another one beside it is told everything."""
    trackers, start = [Failing(moment), Failing("never")], processes.start

    def with_both(**options):
        accelerator, ranks = start(**options)
        accelerator.log_with = trackers
        return accelerator, ranks

    monkeypatch.setattr(processes, "start", with_both)
    rows = train(tiny_checkpoint, tmp_path / "run", max_train_steps=3)
    error = capsys.readouterr().err
    assert len(rows) == 3 and trackers[1].steps == [1, 2, 3] and (tmp_path / "run" / LORA_FILE).exists()
    assert error.count("the network is gone; training continues without it") == 1 and "and more" not in error


def test_the_name_of_a_project_is_no_path(capsys):
    with pytest.raises(SystemExit):
        train_cogvideox_lora.parse_args(training_options("m", "d", "o", tracker_name="../../elsewhere"))
    assert "../../elsewhere: must be a name, not a path" in capsys.readouterr().err
