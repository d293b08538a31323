"""What may fail while training goes on: memory, disk, validation, other processes."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from functools import partial

import pytest
import step
import torch
from conftest import ROOT, reset_accelerate, training_options
from faults.harness import free_port
from safetensors.torch import load_file
from test_distributed import torchrun

import train_cogvideox_lora
from clips.order import Ranks
from cogvideox import budget, encoders
from cogvideox.lora_files import LORA_FILE
from cogvideox.objective import velocity_loss
from run import checkpoints, dry_run, guard, processes, signals, validation
from run.run_directory import list_checkpoints, read_metrics


def ended(call, code):
    with pytest.raises(SystemExit) as stop:
        call()
    reset_accelerate()
    assert stop.value.code == code


def failing(times, error, call):
    """The function, which raises the error in its first calls."""
    left = [times]

    def fail(*args, **options):
        if left[0]:
            left[0] -= 1
            raise error
        return call(*args, **options)

    return fail


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported at some other call"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_out_of_memory_in_an_update_names_what_would_need_less(
    tiny_checkpoint, tmp_path, train, monkeypatch, capsys, error
):
    loss, seen = train_cogvideox_lora.training_loss, []

    def out_of_memory(*args, **options):
        seen.append(1)
        if len(seen) == 3:
            raise error
        return loss(*args, **options)

    monkeypatch.setattr(train_cogvideox_lora, "training_loss", out_of_memory)
    options = {"max_train_steps": 4, "checkpointing_steps": 2, "gradient_checkpointing": "none"}
    ended(lambda: train(tiny_checkpoint, tmp_path / "run", **options), 3)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    said = "out of memory in training; by the prediction, each by itself, the cheapest first: "
    assert f"{said}--gradient_checkpointing full (" in error
    assert "GiB less)" in error and "auto continues from the last checkpoint, or begins again where there is" in error
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-2"]


@pytest.mark.parametrize("encoded", ["captions", "videos"])
def test_out_of_memory_in_encoding_names_what_would_need_less(
    tiny_checkpoint, clips, tmp_path, train, monkeypatch, capsys, encoded
):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    encode = getattr(encoders, f"encode_{encoded}")
    monkeypatch.setattr(encoders, f"encode_{encoded}", failing(1, error, encode))
    options = {"max_train_steps": 1, "latents_cache_dir": tmp_path / "cache"}
    ended(lambda: train(tiny_checkpoint, tmp_path / "run", **options), 3)
    error = capsys.readouterr().err
    assert "Traceback" not in error and "out of memory in encoding; by the prediction, if it was captions, " in error
    captions, of_clips = error.split("; if it was clips, ")
    assert "--text_encoder_precision int8 (" in captions and captions.endswith("or use a machine with more memory")
    assert "--enable_slicing (" in of_clips and "lower --max_num_frames, --height and --width" in of_clips
    assert "what is encoded stays, and the same command continues" in of_clips
    assert train(tiny_checkpoint, tmp_path / "run", **options)


def test_another_error_of_an_update_is_a_fault_and_keeps_its_traceback(tiny_checkpoint, tmp_path, train, monkeypatch):
    monkeypatch.setattr(train_cogvideox_lora, "training_loss", failing(1, RuntimeError("shapes differ"), None))
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(tiny_checkpoint, tmp_path / "run", max_train_steps=1)


ON_THE_SECOND_RANK = """
import os, sys, time, torch
sys.path.insert(0, {root!r})
import train_cogvideox_lora
loss, seen = train_cogvideox_lora.training_loss, []

def disturbed(*args, **options):
    seen.append(1)
    if os.environ["RANK"] == "1" and len(seen) == 3:
        {disturb}
    return loss(*args, **options)

train_cogvideox_lora.training_loss = disturbed
train_cogvideox_lora.main(train_cogvideox_lora.parse_args())
"""


def of_two_ranks(checkpoint, clips, folder, disturb, **options):
    """Returns what a run says whose second rank is disturbed in its third update."""
    script = folder / "script.py"
    script.write_text(ON_THE_SECOND_RANK.format(root=str(ROOT), disturb=disturb))
    options = training_options(checkpoint, clips, folder / "run", max_train_steps=4, checkpointing_steps=2, **options)
    error = torchrun(script, *options, expected=1).stderr
    assert "exitcode  : 3" in error and 'train_cogvideox_lora.py", line' not in error, error
    assert [path.name for path in list_checkpoints(folder / "run")] == ["checkpoint-2"]
    return error


def test_out_of_memory_on_one_rank_ends_all_and_is_said_by_that_one(tiny_checkpoint, clips, tmp_path):
    disturb = "raise torch.OutOfMemoryError('CUDA out of memory')"
    error = of_two_ranks(tiny_checkpoint, clips, tmp_path, disturb)
    assert "[rank 1] error: out of memory in training; by the prediction" in error


def test_a_rank_that_is_slower_than_the_timeout_is_told_from_one_that_is_gone(tiny_checkpoint, clips, tmp_path):
    error = of_two_ranks(tiny_checkpoint, clips, tmp_path, "time.sleep(20)", ddp_timeout=10)
    assert "another process has not answered within --ddp_timeout seconds" in error and "Timed out waiting" in error
    assert "raise --ddp_timeout. Start all of them again with --resume_from_checkpoint auto" in error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("[pair.cc:553] Connection closed by peer [127.0.0.1]:3484. This is typically caused by", "is gone"),
        ("NCCL error: remote process exited or there was a network error\nncclRemoteError: A call failed", "is gone"),
        ("[unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete", "--ddp_timeout"),
        ("Application timeout caused pair closure", "--ddp_timeout"),
        ("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1) ran for 600081", "--ddp_timeout"),
        ("wait timeout after 4000ms, keys: /default_pg/0//cuda//0", "--ddp_timeout"),
    ],
)
def test_what_the_libraries_say_of_another_process_becomes_a_message(monkeypatch, capsys, error, words):
    """Only in a run of several processes: of one, it is a fault."""

    def fail():
        with processes._ending_explained():
            raise RuntimeError(error)

    with pytest.raises(RuntimeError):
        fail()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    ended(fail, 3)
    assert words in (said := capsys.readouterr().err) and error in said and ("--ddp_timeout" in said) == ("--" in words)


def test_a_validation_without_memory_for_its_encoder_does_not_end_training(
    checkpoint_of, tmp_path, train, monkeypatch, capsys
):
    """Of first images: it is loaded for the held-out loss before anything is computed."""
    encoder, calls = encoders.image_encoder, []

    def out_of_memory(*args, **options):
        calls.append(1)
        if len(calls) == 2:  # the first one is for the updates
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encoder(*args, **options)

    monkeypatch.setattr(encoders, "image_encoder", out_of_memory)
    options = {"validation_split": 1, "validation_steps": 1, "max_train_steps": 2, "validate_first": False}
    rows = train(checkpoint_of("5b-I2V"), tmp_path / "run", **options)
    assert "the validation after update 1 has failed: out of memory in validation" in capsys.readouterr().out
    assert [row["step"] for row in rows if "validation_loss" in row] == [2]


def test_what_is_said_to_save_memory_saves_it_by_the_rehearsal(checkpoint_of, monkeypatch, capsys):
    """The figure of each option is the difference of two rehearsals, and the option alone makes it."""
    line = ["--pretrained_model_name_or_path", str(checkpoint_of("5b")), "--instance_data_root", "d", "--rank", "4"]
    args = train_cogvideox_lora.parse_args([*line, "--height", "64", "--width", "96", "--max_num_frames", "9"])
    base = train_cogvideox_lora.read_base_model(args.pretrained_model_name_or_path, None, None, None)
    settings = train_cogvideox_lora.memory_settings(args, base, torch.bfloat16, torch.device("cuda"), 1)
    models = train_cogvideox_lora.rehearsed_models(args, base)
    before = budget.rehearse("training", models, settings).peak_bytes
    lines = budget.savings("training", models, settings)
    smaller = settings._replace(gradient_checkpointing="full")
    saved = (before - budget.rehearse("training", models, smaller).peak_bytes) / budget.GIB
    assert lines[0] == f"--gradient_checkpointing full ({saved:.1f} GiB less)"
    assert len(lines) == len(set(lines)) and all(" GiB less)" in line for line in lines)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("a codec is missing")])
def test_a_validation_that_fails_does_not_end_training(tiny_checkpoint, tmp_path, train, monkeypatch, capsys, error):
    without = train(tiny_checkpoint, tmp_path / "a", max_train_steps=4)
    monkeypatch.setattr(validation, "sample_video", failing(2, error, validation.sample_video))
    options = {"validation_prompt": "a cat", "validation_steps": 2, "max_train_steps": 4, "validate_first": False}
    rows = train(tiny_checkpoint, tmp_path / "b", **options | {"validation_steps": 1})
    said = capsys.readouterr().out
    assert said.count("has failed: ") == 2 and "; training continues" in said
    is_memory = isinstance(error, torch.OutOfMemoryError)
    assert ("out of memory in validation; by the prediction" in said) == is_memory
    assert ("RuntimeError: a codec is missing" in said) != is_memory
    assert [row["loss"] for row in rows if "loss" in row] == [row["loss"] for row in without]
    assert sorted(path.name for path in (tmp_path / "b" / "validation").iterdir()) == ["step-000003", "step-000004"]


def test_three_failed_validations_in_a_row_end_the_run(tiny_checkpoint, tmp_path, train, monkeypatch, capsys):
    monkeypatch.setattr(validation, "sample_video", failing(99, RuntimeError("a codec is missing"), None))
    options = {"validation_prompt": "a cat", "validation_steps": 1, "max_train_steps": 9, "checkpointing_steps": 1}
    ended(lambda: train(tiny_checkpoint, tmp_path / "run", **options), 3)
    error = capsys.readouterr().err
    assert (
        "the validation after update 2 has failed: RuntimeError: a codec is missing" in error
        and "3 have failed in a row" in error
    )
    assert list_checkpoints(tmp_path / "run")[-1].name == "checkpoint-2"


@pytest.mark.parametrize("place", ["torch.save", "run.checkpoints.write_manifest", "files.os.fsync"])
def test_a_full_disk_ends_with_a_message_and_whole_checkpoints(
    tiny_checkpoint, tmp_path, train, monkeypatch, capsys, place
):
    """What torch raises for it depends on where it happens; here it is the system's own error."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    save = checkpoints.save_checkpoint

    def save_on_a_full_disk(*args, record, **options):
        with pytest.MonkeyPatch.context() as patch:
            if record["step"] == 4:
                patch.setattr(place, failing(99, full, None))
            save(*args, record=record, **options)

    monkeypatch.setattr(checkpoints, "save_checkpoint", save_on_a_full_disk)
    options = {"max_train_steps": 4, "checkpointing_steps": 2, "checkpoints_total_limit": 1}
    ended(lambda: train(tiny_checkpoint, tmp_path / "run", **options), 3)
    assert "checkpoint-4 cannot be written (No space left on device). checkpoint-2 is whole" in capsys.readouterr().err
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    monkeypatch.undo()
    rows = train(tiny_checkpoint, tmp_path / "run", **options, resume_from_checkpoint="auto")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and not list((tmp_path / "run").glob(".*"))


def test_a_checkpoint_is_not_begun_where_there_is_no_room(tiny_checkpoint, tmp_path, train, monkeypatch, capsys):
    usage = checkpoints.shutil.disk_usage
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage(path)._replace(free=1000))
    monkeypatch.setattr(dry_run, "check_disk", lambda *_, **__: None)  # room at the start
    ended(lambda: train(tiny_checkpoint, tmp_path / "run", max_train_steps=2), 3)
    error = capsys.readouterr().err
    assert "checkpoint-2: needs 0.00 GiB, and " in error and "nothing is saved yet. Free some space" in error
    assert list_checkpoints(tmp_path / "run") == [] and len(read_metrics(tmp_path / "run")) == 2


def test_a_run_without_room_for_cache_and_checkpoint_is_refused_before_encoding(
    tiny_checkpoint, clips, tmp_path, train, monkeypatch, capsys
):
    usage = dry_run.shutil.disk_usage
    monkeypatch.setattr(dry_run.shutil, "disk_usage", lambda path: usage(path)._replace(free=1000))
    monkeypatch.setattr("cogvideox.encoders.video_encoder", lambda *_, **__: pytest.fail("a model was loaded"))
    options = {"latents_cache_dir": tmp_path / "cache", "max_train_steps": 1}
    ended(lambda: train(tiny_checkpoint, tmp_path / "run", **options), 2)
    assert f"--latents_cache_dir {tmp_path}/cache" in (error := capsys.readouterr().err)
    assert "the run needs 0.00 GiB on this disk (cache 0.00, checkpoints 0.00, result 0.00), and 0.00 are" in error


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_disk_that_is_really_full_ends_with_a_message(tiny_checkpoint, tmp_path, train, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine does not allow mounts")
    try:
        options = {"max_train_steps": 40, "checkpointing_steps": 2, "logging_steps": 100}
        ended(lambda: train(tiny_checkpoint, disk / "run", **options), 3)
        assert "GiB free" in (error := capsys.readouterr().err) or "No space left" in error
        whole = list_checkpoints(disk / "run")
        assert whole and all(checkpoints.damage(checkpoint) is None for checkpoint in whole)
        assert torch.isfinite(load_file(whole[-1] / LORA_FILE).popitem()[1]).all()
    finally:
        subprocess.run(["umount", disk], check=True)


def half_a_row(path):
    path.write_text(path.read_text() + '{"step": \n' + json.dumps({"step": 3}) + "\n")


def words_for_numbers(path):
    path.write_text(path.read_text() + '{"step": 2, "loss_smoothed": "low"}\n')


def other_lineage(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lineage": 3}))


def folder_instead(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("name", "harm", "damage"),
    [
        ("metrics.jsonl", half_a_row, "line 3 is no row of metrics"),
        ("metrics.jsonl", words_for_numbers, "line 3 is no row of metrics"),
        ("metrics.jsonl", folder_instead, "is a folder, and must be a file"),
        ("args.json", half_a_row, "damaged"),
        ("args.json", other_lineage, "damaged (its lineage is no list of checkpoints)"),
        ("args.json", folder_instead, "is a folder, and must be a file"),
    ],
)
def test_damaged_records_are_refused_by_name_before_anything_is_encoded(
    tiny_checkpoint, tmp_path, train, capsys, name, harm, damage
):
    train(tiny_checkpoint, tmp_path / "run", max_train_steps=2)
    path = tmp_path / "run" / name
    harm(path)
    options = {"max_train_steps": 3, "latents_cache_dir": tmp_path / "cache"}
    origin = str(tmp_path / "run" / "checkpoint-2")
    for folder, resumed in (("run", "latest"), ("run", "checkpoint-2"), ("branch", origin)):
        resume = partial(train, tiny_checkpoint, tmp_path / folder, **options, resume_from_checkpoint=resumed)
        ended(resume, 2)
        assert f"{path}: {damage}" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_a_result_without_a_whole_checkpoint_is_kept_and_the_way_out_is_one(tiny_checkpoint, tmp_path, train, capsys):
    run = tmp_path / "run"
    train(tiny_checkpoint, run, max_train_steps=1)
    (run / "checkpoint-1" / "manifest.json").write_text("{")
    for resumed, looks, is_there in (("auto", {"dry_run": True}, True), ("auto", {}, True), ("latest", {}, False)):
        ended(partial(train, tiny_checkpoint, run, resume_from_checkpoint=resumed, **looks), 2)
        said = capsys.readouterr().err
        assert f"--resume_from_checkpoint {resumed}: {run} holds no complete checkpoint" in said
        assert ("its manifest.json is missing or damaged" in said) == is_there, "what is set aside is told"
        assert f"start in another --output_dir, with --lora_path {run} to train that result further" in said
    assert train(tiny_checkpoint, tmp_path / "further", max_train_steps=1, lora_path=run)


@pytest.mark.parametrize("model", ["tiny", "tiny-I2V"])
def test_reading_a_micro_batch_again_warns_of_nothing(model):
    base, image_latents = step.random_base_model(model), torch.zeros(2, 3, 4, 8, 12)

    def loss_of(transformer):
        return velocity_loss(
            transformer,
            base.scheduler,
            torch.zeros(2, 3, 4, 8, 12),
            prompt_embeds=torch.zeros(2, 5, 32),
            rotary=None,
            generator=torch.Generator().manual_seed(0),
            dtype=torch.float32,
            image_latents=image_latents if base.takes_image else None,
            timesteps=torch.tensor([3, 900]),
        )

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert guard.drawn_timesteps(loss_of, base.transformer["out_channels"]) == [3, 900]


def test_what_is_advised_where_float16_overflows_works(tiny_checkpoint, tmp_path, train):
    """A resumed run keeps its precision, so the advice leads into another run."""
    advice = guard.advice([], precision="fp16", learning_rate=1e-4)
    for words in ("another --output_dir", "--mixed_precision bf16", "--lora_path with the last checkpoint"):
        assert words in advice
    train(tiny_checkpoint, tmp_path / "run", max_train_steps=1)
    learned = tmp_path / "run" / "checkpoint-1"
    assert train(tiny_checkpoint, tmp_path / "b", mixed_precision="bf16", max_train_steps=1, lora_path=learned)


def test_a_dry_run_begins_where_the_run_would(tiny_checkpoint, tmp_path, train, capsys):
    """With all checkpoints damaged, auto starts from the beginning."""
    run = tmp_path / "run"
    train(tiny_checkpoint, run, max_train_steps=1)
    (run / "checkpoint-1" / "manifest.json").write_text("{")
    (run / LORA_FILE).unlink()
    train(tiny_checkpoint, run, max_train_steps=2, resume_from_checkpoint="auto", dry_run=True)
    assert "updates 1 to 2" in (said := capsys.readouterr().out) and "checkpoint-1: its manifest.json is" in said


def test_what_killed_runs_left_is_removed_by_the_next(tiny_checkpoint, tmp_path, train):
    run, options = tmp_path / "run", {"validation_prompt": "a cat", "validation_split": 1, "checkpointing_steps": 1}
    train(tiny_checkpoint, run, max_train_steps=1, **options)
    (run / ".checkpoint-2.incomplete").mkdir()
    (run / ".args.json.host-1.99.0123abcd").write_text("{")
    (run / "validation" / "step-000001" / ".a.mp4.0123abcd").write_text("")
    os.rename(run / "checkpoint-best", run / ".checkpoint-best.previous")  # killed in its replacement
    train(tiny_checkpoint, run, max_train_steps=2, resume_from_checkpoint="auto", **options)
    assert not [path for path in run.rglob(".*")] and (run / "checkpoint-best" / "best.json").is_file()


def test_damaged_records_are_named_and_do_not_end_training(tiny_checkpoint, tmp_path, train, capsys):
    run, options = tmp_path / "run", {"validation_split": 1, "checkpointing_steps": 1, "validation_prompt": "a cat"}
    train(tiny_checkpoint, run, max_train_steps=1, **options)
    (run / "checkpoint-best" / "best.json").write_text("{")
    (run / "validation" / "step-000001" / "prompts.json").write_text("[]")
    train(tiny_checkpoint, run, max_train_steps=2, resume_from_checkpoint="auto", **options)
    said = capsys.readouterr().out
    assert "renamed to damaged-checkpoint-best" in said and "report.html is not written: " in said
    assert "prompts.json: damaged" in said and (run / "checkpoint-best" / "best.json").is_file()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_all_processes_of_a_run_finishes_the_update_and_saves(
    tiny_checkpoint, clips, tmp_path, train, number
):
    """To the workers of its data loader as well, as a terminal and Slurm send it; and the resumed run loses nothing."""
    options = {"max_train_steps": 400, "dataloader_num_workers": 1, "checkpointing_steps": 1000}
    line = [sys.executable, ROOT / "train_cogvideox_lora.py"]
    line += training_options(tiny_checkpoint, clips, tmp_path / "run", **options)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        deadline = time.monotonic() + 120
        while not read_metrics(tmp_path / "run") and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number, error
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    assert checkpoint.name == f"checkpoint-{read_metrics(tmp_path / 'run')[-1]['step']}" and checkpoint.name in error
    if number == signal.SIGTERM:
        step = int(checkpoint.name.removeprefix("checkpoint-"))
        more = options | {"max_train_steps": step + 2}
        resumed = train(tiny_checkpoint, tmp_path / "run", **more, resume_from_checkpoint="auto")
        straight = train(tiny_checkpoint, tmp_path / "straight", **more)
        assert [row["loss"] for row in resumed] == [row["loss"] for row in straight]


def test_a_second_signal_ends_at_once(tmp_path):
    """After the seconds in which it could be the same one, passed on by a launcher."""
    program = (
        "import time; from run import signals; signals.SECONDS_OF_ONE_SIGNAL = 0.5\n"
        "with signals.noted() as request: print('ready', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        for wait in (0.1, 1.0):
            process.terminate()
            time.sleep(wait)
            assert process.poll() is None
        process.terminate()
        assert process.wait(timeout=10) == 143


BUSY_RANK = """
import os, signal, time
import torch.distributed as dist
from clips.order import Ranks
from run import processes, signals

def gather(items):
    told = [None, None]
    dist.all_gather_object(told, items)
    return sum(told, [])

dist.init_process_group("gloo")
with processes.endings_explained(), signals.noted() as stop:
    ranks = processes.stopping_together(Ranks(dist.get_rank(), 2, gather=gather), stop)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    for _ in processes.until_stopped(range(600), ranks, stop):
        time.sleep(0.1)
"""


def test_a_rank_with_an_hour_of_clips_left_learns_of_the_signal_of_another():
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen([sys.executable, "-c", BUSY_RANK], cwd=ROOT, env=environment | {"RANK": rank})
        for rank in ("0", "1")
    ]
    assert [rank.wait(timeout=50) for rank in ranks] == [143, 143]  # its items take a minute


@pytest.mark.parametrize("exchange", [1, 2, 3, 4])
def test_a_signal_while_machines_look_for_a_shared_disk_leaves_no_file(tmp_path, monkeypatch, exchange):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    stop, exchanges = signals.StopRequest(), []

    def gather(items):
        exchanges.append(items)
        return [(signal.SIGTERM if len(exchanges) == exchange else 0, of_rank) for _, of_rank in items]

    ranks = processes.stopping_together(Ranks(index=0, count=2, gather=gather), stop)
    with pytest.raises(signals.Stopped):
        processes.sharing(ranks, tmp_path / "cache", "--latents_cache_dir")
    assert len(exchanges) == exchange and not (tmp_path / "cache").exists()


def test_a_run_whose_launcher_is_gone_ends_as_by_sigterm(tmp_path):
    program = "import time; from run import signals\nwith signals.noted() as r:\n print('ready', flush=True)\n"
    program += " while not r.number: time.sleep(0.1)\nprint(r.number, flush=True)"
    launcher = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {program!r}])\ntime.sleep(60)"
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", launcher], cwd=ROOT, stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        process.kill()
        assert process.stdout.readline() == b"15\n"
