"""What comes from others runs no code, is written nowhere else, and a token is written nowhere."""

import ast
import json
import os
import pickle
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import ROOT, reset_accelerate, training_options
from test_trackers import Failing

import train_cogvideox_lora
from clips import export
from run import hub, processes
from run.manifest import MANIFEST_FILE, write_manifest
from run.run_directory import STATE_FOLDER
from run.shards import INDEX_FILE, check_index

FOLDERS = [".", "clips", "cogvideox", "run", "pages", "examples", "benchmarks"]
# Each of them can run code that a file brings along.
UNSAFE = {"cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}


@pytest.mark.parametrize("path", [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))], ids=str)
def test_nothing_is_loaded_that_could_run_code(path):
    """Each torch.load says weights_only; pickle is there for the name of its error, and in run/shards.py to refuse."""
    if path.name == "shards.py":
        return
    module = ast.parse(path.read_text(encoding="utf-8"))
    imported = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported |= {node.module.split(".")[0]}
            names = {alias.name for alias in node.names}
            assert node.module != "pickle" or names == {"UnpicklingError"}, path
            assert node.module != "torch" or "load" not in names, path
        elif isinstance(node, ast.Attribute):
            assert ast.unparse(node.value) != "pickle" or node.attr == "UnpicklingError", path
        elif isinstance(node, ast.Call):
            name, options = ast.unparse(node.func), [ast.unparse(word) for word in node.keywords]
            assert name != "torch.load" or "weights_only=True" in options, path
            assert name not in ("eval", "exec", "yaml.load", "dcp.load"), (path, name)
            assert not {"allow_pickle=True", "trust_remote_code=True"} & set(options), path
    assert not imported & UNSAFE


class Harmful:
    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def harmful(folder):
    content = Harmful()
    content.folder = folder
    return content


@pytest.fixture(scope="module")
def fine_tuned(tiny_checkpoint, clips, tmp_path_factory):
    """A run that has fine-tuned the whole transformer for an update."""
    folder = tmp_path_factory.mktemp("sft") / "run"
    line = training_options(tiny_checkpoint, clips, folder, training_type="sft", max_train_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        train_cogvideox_lora.main(train_cogvideox_lora.parse_args(line))
    reset_accelerate()
    return folder


@pytest.mark.parametrize("place", ["index", "value"])
def test_a_checkpoint_of_somebody_else_runs_no_code(tiny_checkpoint, fine_tuned, tmp_path, train, capsys, place):
    """Its manifest is right: whoever made it wrote that, too."""
    run, proof = shutil.copytree(fine_tuned, tmp_path / "run"), tmp_path / "code was run"
    checkpoint = run / "checkpoint-1"
    state = checkpoint / STATE_FOLDER
    if place == "index":
        (state / INDEX_FILE).write_bytes(pickle.dumps(harmful(proof)))
    else:
        key = "optimizer.param_groups.0.lr"
        (state / "other").mkdir()
        dcp.save({key: harmful(proof)}, checkpoint_id=state / "other", no_dist=True)
        with open(state / INDEX_FILE, "rb") as file, open(state / "other" / INDEX_FILE, "rb") as other:
            index, theirs = pickle.load(file), pickle.load(other)
        where = {found.fqn: found for found in index.storage_data}
        (stored,) = theirs.storage_data.values()
        stored.relative_path = f"other/{stored.relative_path}"
        index.storage_data[where[key]] = stored
        (state / INDEX_FILE).write_bytes(pickle.dumps(index))
    (checkpoint / MANIFEST_FILE).unlink()
    write_manifest(checkpoint)
    options = {"training_type": "sft", "max_train_steps": 2, "resume_from_checkpoint": "latest"}
    with pytest.raises(SystemExit) as stop:
        train(tiny_checkpoint, run, **options)
    assert stop.value.code == 2 and not proof.exists()
    assert "could run code" in (error := capsys.readouterr().err) and "resume from another checkpoint" in error


def test_a_damaged_index_is_refused_by_name(tmp_path):
    for content in (b"", b"\x80\x04K", b"no pickle", pickle.dumps(torch.nn.Linear)):
        (tmp_path / INDEX_FILE).write_bytes(content)
        with pytest.raises(ValueError, match=f"{INDEX_FILE}: .* resume from another checkpoint"):
            check_index(tmp_path / INDEX_FILE)


# ---- where a run writes


def files_in(folder):
    return {path for path in folder.rglob("*") if path.is_file()}


def test_lists_and_prompts_make_nothing_be_written_elsewhere(tiny_checkpoint, clips, tmp_path, train, monkeypatch):
    """Videos are read from wherever a list says; what is made of them is named by hashes and numbers."""
    data, elsewhere = tmp_path / "data" / "deep", tmp_path / "elsewhere"
    data.mkdir(parents=True)
    shutil.copytree(clips, elsewhere, ignore=shutil.ignore_patterns(".*"))
    names = [f"../../elsewhere/{line}" for line in (elsewhere / "videos.txt").read_text().split()]
    (data / "videos.txt").write_text("\n".join(names))
    (data / "prompts.txt").write_text("\n".join(["../../outside/a", "/outside/b", "..", "a\\..\\b", "~/c", "%2e%2e/d"]))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    before = files_in(tmp_path)
    options = {"validation_prompt": "../../outside:::/outside/x", "max_train_steps": 1, "report_to": "tensorboard"}
    options |= {"id_token": "../../word", "validation_split": 1}
    run = tmp_path / "run"
    train(tiny_checkpoint, run, instance_data_root=data, **options)
    new = files_in(tmp_path) - before
    assert {path.relative_to(tmp_path).parts[0] for path in new} == {"run", "data"}
    assert {path.relative_to(data).parts[0] for path in new if path.is_relative_to(data)} == {".cogvideox_cache"}
    videos = {path.name for path in (run / "validation").rglob("*.mp4")}
    assert videos == {"prompt-00_seed-3407.mp4", "prompt-01_seed-3407.mp4"}
    export.main([str(data), "--output_dir", str(tmp_path / "exported")])
    assert {path.relative_to(tmp_path).parts[0] for path in files_in(tmp_path) - before - new} <= {"exported", "data"}


@pytest.mark.parametrize("folder", ["..", "../elsewhere", "logs/../../elsewhere"])
def test_the_folder_of_trackers_does_not_lead_out_of_the_run(capsys, folder):
    with pytest.raises(SystemExit):
        train_cogvideox_lora.parse_args(training_options("m", "d", "o", logging_dir=folder))
    assert f"--logging_dir: {folder}: leads out of --output_dir" in capsys.readouterr().err


def test_the_folder_of_trackers_may_be_named_as_a_whole():
    for folder in ("/elsewhere/logs", "logs/deep", "a..b"):
        args = train_cogvideox_lora.parse_args(training_options("m", "d", "o", logging_dir=folder))
        assert str(args.logging_dir) == folder


# ---- the token

TOKEN = "hf_marker0token1of2a3test"


def all_that_is_written(folder):
    return b"".join(path.read_bytes() + str(path).encode() for path in files_in(folder))


@pytest.mark.parametrize("way", ["option", "environment"])
@pytest.mark.parametrize("failing", [None, "create", "upload", "tracker"])
def test_no_token_is_written_or_said(tiny_checkpoint, tmp_path, train, monkeypatch, capsys, way, failing):
    told = Failing("log" if failing == "tracker" else "never")
    monkeypatch.setattr(told, "happens", lambda moment: moment == told.moment and fail())
    monkeypatch.setattr(told, "store_init_configuration", lambda values: told.steps.append(values))
    start = processes.start

    def with_tracker(**options):
        accelerator, ranks = start(**options)
        accelerator.log_with = [told]
        return accelerator, ranks

    def fail(*_, **__):
        raise ConnectionError(f"Illegal header value b'Bearer {TOKEN}'")

    monkeypatch.setattr(processes, "start", with_tracker)
    repository = lambda name, **_: type("Url", (), {"repo_id": f"someone/{name}"})()  # noqa: E731
    monkeypatch.setattr(hub, "create_repo", fail if failing == "create" else repository)
    monkeypatch.setattr(hub, "upload_folder", fail if failing in ("create", "upload") else lambda **_: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN if way == "environment" else "")
    options = {"push_to_hub": True, "validation_prompt": "a cat", "validation_split": 1, "max_train_steps": 1}
    if way == "option":
        options["hub_token"] = TOKEN
    code = 0
    try:
        train(tiny_checkpoint, tmp_path / "run", **options)
    except SystemExit as stop:
        code = stop.code
    assert code == (3 if failing in ("create", "upload") else 0)
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err and TOKEN not in json.dumps(told.steps, default=str)
    written = all_that_is_written(tmp_path / "run")
    assert b"learning_rate" in written and TOKEN.encode() not in written
