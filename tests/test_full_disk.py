"""A disk that is full at one moment of a run: a small one, really full. What is saved is whole, a message names it."""

import json

import pytest
from conftest import reset_accelerate
from faults import surroundings
from faults.surroundings import Impossible, fill, small_disk

from cogvideox.lora_files import LORA_FILE
from run import dry_run
from run.checkpoints import damage
from run.run_directory import METRICS_FILE, list_checkpoints, read_metrics

BLOCK = 4096  # bytes, of tmpfs
RUN = {"max_train_steps": 4, "checkpointing_steps": 2}
SFT = RUN | {"training_type": "sft", "gradient_checkpointing": "full"}


@pytest.fixture
def disk(tmp_path, monkeypatch):
    monkeypatch.setattr(surroundings, "DISK_MIB", 32)
    try:
        with small_disk(tmp_path / "disk") as folder:
            yield folder
    except Impossible as reason:
        pytest.skip(str(reason))


def full_from(monkeypatch, disk, place, call=1, *, calls=None):
    """Fills the disk before the `call`-th call of the function at `place`; empties it again after `calls` of them."""
    module, _, name = place.rpartition(".")
    owner = __import__(module, fromlist=[name])
    function, made = getattr(owner, name), []

    def on_full_disk(*args, **options):
        made.append(1)
        if len(made) == call:
            end_block(disk / "run" / METRICS_FILE)
            fill(disk)
        try:
            return function(*args, **options)
        finally:
            if calls and len(made) == call + calls - 1:
                (disk / "filler").unlink()

    monkeypatch.setattr(owner, name, on_full_disk)


def end_block(metrics):
    """Fills the last block of the metrics, in which a full disk has room for another row."""
    if metrics.exists():
        row = {"step": 2, "reasons": ""}
        row["reasons"] = "x" * (-(metrics.stat().st_size + len(json.dumps(row)) + 1) % BLOCK)
        with open(metrics, "a") as file:
            file.write(json.dumps(row) + "\n")


def ends_with_3(call, capsys):
    with pytest.raises(SystemExit) as stop:
        call()
    reset_accelerate()
    error = capsys.readouterr().err
    assert stop.value.code == 3 and "Traceback" not in error, error
    return error


@pytest.mark.parametrize(
    ("place", "call", "options", "named", "saved"),
    [
        ("dataset.write_entry", 3, RUN, "cannot write the cache (No space left on device)", []),
        ("run.run_directory.start_records", 1, RUN, "run/args.json: No space left on device. What is saved", []),
        ("run.run_directory.append_metrics", 3, RUN, "run/metrics.jsonl: No space left on device. What is saved", [2]),
        ("torch.distributed.checkpoint.save", 2, SFT, "checkpoint-4 cannot be written (", [2]),
        ("cogvideox.lora.save_transformer", 2, SFT, "checkpoint-4 cannot be written (", [2]),
        ("cogvideox.lora.save_transformer", 3, SFT, "the result cannot be written (", [2, 4]),
        ("cogvideox.lora.save_lora", 3, RUN, "the result cannot be written (", [2, 4]),
    ],
)
def test_a_run_names_what_it_could_not_write_and_continues_once_there_is_room(
    tiny_checkpoint, disk, train, monkeypatch, capsys, place, call, options, named, saved
):
    options = options | {"latents_cache_dir": disk / "cache"}
    full_from(monkeypatch, disk, place, call)
    error = ends_with_3(lambda: train(tiny_checkpoint, disk / "run", **options), capsys)
    assert named in error and "No space left" in error, error
    checkpoints = list_checkpoints(disk / "run") if (disk / "run").exists() else []
    assert [path.name for path in checkpoints] == [f"checkpoint-{step}" for step in saved]
    assert not [found for path in checkpoints if (found := damage(path))]
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    (disk / "filler").unlink()
    rows = train(tiny_checkpoint, disk / "run", **options, resume_from_checkpoint="auto")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("run.validation.write_validation_videos", "the validation videos of update 2 are not written (/"),
        ("pages.report.write_report", "report.html is not written: "),
    ],
)
def test_what_training_does_not_need_costs_a_line(tiny_checkpoint, disk, train, monkeypatch, capsys, place, line):
    options = RUN | {"validation_prompt": "a cat", "validation_steps": 2, "validate_first": False}
    options |= {"validation_split": 1}
    full_from(monkeypatch, disk, place, calls=1)
    train(tiny_checkpoint, disk / "run", **options)
    said = capsys.readouterr().out
    assert said.count(line) == 1 and "No space left on device" in said, said
    rows = read_metrics(disk / "run")
    assert [row["step"] for row in rows if "validation_loss" in row] == [2, 4] and (disk / "run" / LORA_FILE).exists()
    assert (disk / "run" / "report.html").exists() and not list((disk / "run").rglob(".*"))


GIB = 2**30
OUTLOOK = dry_run.Outlook(num_trained=1, cache=2 * GIB, result=GIB, checkpoint=3 * GIB, num_checkpoints=2)


def free(monkeypatch, gib):
    usage = dry_run.shutil.disk_usage
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda path: usage(path)._replace(free=gib * GIB))


def test_cache_and_checkpoints_on_one_disk_need_room_together(tmp_path, monkeypatch):
    places = {"cache": tmp_path / "cache", "output_dir": tmp_path / "run"}
    free(monkeypatch, 9)
    dry_run.check_disk(OUTLOOK, **places)
    free(monkeypatch, 8)
    with pytest.raises(ValueError, match="--latents_cache_dir .*/cache and --output_dir .*/run: ") as refused:
        dry_run.check_disk(OUTLOOK, **places)
    assert "needs 9.00 GiB on this disk (cache 2.00, checkpoints 6.00, result 1.00), and 8.00" in str(refused.value)
    dry_run.check_disk(OUTLOOK, **places | {"output_dir": None})  # nothing is trained


def test_two_disks_are_checked_each_by_itself_and_told_together(tmp_path, disk, monkeypatch):
    places = {"cache": disk / "cache", "output_dir": tmp_path / "run"}
    free(monkeypatch, 7)
    dry_run.check_disk(OUTLOOK, **places)
    free(monkeypatch, 1)
    with pytest.raises(ValueError) as refused:
        dry_run.check_disk(OUTLOOK, **places)
    cache, output = str(refused.value).split("; --output_dir ")
    assert "(cache 2.00), and 1.00 are free; make room, or give a folder on another disk" in cache
    assert "(checkpoints 6.00, result 1.00), and 1.00 are free; make room, keep fewer checkpoints with" in output
