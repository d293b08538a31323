"""What goes wrong around a run, on disks and with other runs: it ends in its message, or is harmless."""

import ctypes
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from faults import harness
from faults.harness import Place, World
from run.checkpoints import damage
from run.run_directory import list_checkpoints

DISK_MIB = 8
SAVE = "run.checkpoints.save_checkpoint"


class Impossible(Exception):
    """This machine does not allow the fault; the reason."""


def without_rights() -> None:
    """Gives up what lets root write everywhere (capset, version 3 of its header)."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")


def folder_of(world: World, name: str) -> Path:
    return harness.fresh(world.folder / "surroundings" / name)


def expect(ended: harness.Ended, code: int, *words: str) -> None:
    assert ended.codes == [code] and not ended.has_traceback, f"{ended.codes}: {ended.output[-2500:]}"
    assert all(word in ended.output for word in words), ended.output[-2000:]


def check_equal(world: World, folder: Path) -> None:
    difference = harness.first_difference(harness.undisturbed(world), harness.left_by(folder))
    assert difference is None, difference
    assert not harness.leftovers(folder)


# ---- folders ---------------------------------------------------------------------------------------------------------


def check_read_only_output(world: World) -> None:
    folder = folder_of(world, "read-only")
    folder.mkdir(parents=True)
    folder.chmod(0o555)
    try:
        ended = harness.run(world.course(folder), disturb=without_rights)
        expect(ended, 2, "--output_dir", "is not a writable folder; choose another one")
        assert not list(folder.iterdir())
    finally:
        folder.chmod(0o755)


def _lock_folder(folder: Path) -> None:
    folder.chmod(0o555)


def check_output_becomes_read_only(world: World) -> None:
    """In the middle of the run: it ends with the reason, and continues once the folder is writable again."""
    folder = folder_of(world, "becomes-read-only")

    ended = harness.run(world.course(folder), disturb=partial(_without_rights_from, folder))
    folder.chmod(0o755)
    expect(ended, 3, "Permission denied", "--resume_from_checkpoint auto")
    assert damage(list_checkpoints(folder)[-1]) is None
    harness.check_resumed(world, folder)


def _without_rights_from(folder: Path) -> None:
    without_rights()
    harness.at(Place(SAVE, call=2), partial(_lock_folder, folder))


def check_clip_is_deleted(world: World) -> None:
    """A clip that is deleted in mid-run is in the cache: the run does not differ."""
    folder = folder_of(world, "clip-deleted")
    clips = harness.fresh(folder.with_name("clip-deleted-clips"))
    shutil.copytree(world.clips, clips)
    video = sorted((clips / "videos").iterdir())[0]
    place = Place("train_cogvideox_lora.loss_of", call=3)
    disturb = partial(harness.at, place, partial(os.unlink, video))
    ended = harness.run(world.course(folder, instance_data_root=clips), disturb=disturb)
    expect(ended, 0)
    assert not video.exists()
    check_equal(world, folder)


# ---- handles, clock --------------------------------------------------------------------------------------------------


def check_no_handles_at_start(world: World) -> None:
    folder = folder_of(world, "no-handles")
    ended = harness.run(world.course(folder), disturb=partial(limit_handles, 8))
    expect(ended, 3, "Too many open files")
    assert not harness.leftovers(folder)


def check_no_handles_later(world: World) -> None:
    """The run ends with the reason, and continues where there are handles again."""
    folder = folder_of(world, "no-handles-later")
    disturb = partial(harness.at, Place(SAVE, call=2), use_up_handles)
    ended = harness.run(world.course(folder), disturb=disturb)
    expect(ended, 3, "Too many open files", "--resume_from_checkpoint auto")
    harness.check_resumed(world, folder)


def limit_handles(count: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))


def use_up_handles() -> None:
    lowest = os.dup(0)
    os.close(lowest)
    limit_handles(lowest)


def check_clock_is_set_back(world: World) -> None:
    folder = folder_of(world, "clock")
    expect(harness.run(world.course(folder), disturb=_with_clock_set_back), 0)
    check_equal(world, folder)


def _with_clock_set_back() -> None:
    def back(now):
        start, calls = now(), [0]

        def earlier():
            calls[0] += 1
            return start - 100_000 * calls[0]

        return earlier

    harness.replace("time.time", back)


# ---- other runs ------------------------------------------------------------------------------------------------------


def check_second_run_is_refused(world: World) -> None:
    """The second is refused, and a dry run looks only: the first does not differ."""
    folder = folder_of(world, "two-runs")
    harness.undisturbed(world)
    gate = folder.with_name("two-runs-gate")
    gate.unlink(missing_ok=True)
    held = partial(harness.at, Place("train_cogvideox_lora.loss_of", call=8), partial(harness.hold, gate))
    with harness.started(world.course(folder, resume_from_checkpoint="auto"), disturb=held) as first:
        harness.wait_until(lambda: (folder / "checkpoint-3").exists())
        (folder / ".checkpoint-6.incomplete").mkdir()  # as if it was being written
        for options in ({}, {"resume_from_checkpoint": "auto"}, {"resume_from_checkpoint": "auto", "dry_run": True}):
            with harness.started(world.course(folder, **options), log=folder.with_name("second.log")) as second:
                ended = second.wait()
            if "dry_run" in options:
                expect(ended, 0)
                assert (folder / ".checkpoint-6.incomplete").exists()
            else:
                expect(ended, 2, "is training into it; wait for its end, or choose another one")
        gate.touch()
        ended = first.wait()
    expect(ended, 0)
    check_equal(world, folder)


def check_dry_run_leaves_the_best(world: World) -> None:
    """A dry run beside a run that has no checkpoint yet."""
    folder = folder_of(world, "dry-run")
    gate = folder.with_name("dry-run-gate")
    gate.unlink(missing_ok=True)
    held = partial(harness.at, Place("train_cogvideox_lora.loss_of", call=5), partial(harness.hold, gate))
    with harness.started(world.course(folder), disturb=held) as first:
        harness.wait_until(lambda: (folder / "checkpoint-best").exists() and "update 2: loss" in first.said())
        line = world.course(folder, resume_from_checkpoint="auto", dry_run=True)
        with harness.started(line, log=folder.with_name("second.log")) as second:
            expect(second.wait(), 0)
        assert (folder / "checkpoint-best" / "best.json").exists()
        gate.touch()
        expect(first.wait(), 0)


# ---- a full disk -----------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path):
    """Mounts a disk of some MiB.

    Raises:
        Impossible: that needs root, and a system that allows it.
    """
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or not shutil.which("mount"):
        raise Impossible("mounting a small disk needs root and mount")
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise Impossible(f"this machine allows no mount: {result.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


FULL_DISKS = {
    "before the metrics begin": Place("run.run_directory.start_records"),
    "before a row": Place("run.run_directory.log_row", call=4),
    "before a checkpoint": Place(SAVE, call=2),
    "in a checkpoint": Place("torch.save", call=2),
    "before the manifest": Place("run.checkpoints.write_manifest", call=2),
    "before a best": Place("run.checkpoints.save_best"),
    "in a best": Place("run.checkpoints.publish_folder", within="run.checkpoints.save_best"),
    "before the page": Place("pages.report.publish", call=2),
    "before the result": Place("run.checkpoints.save_result"),
    "in encoding": Place("dataset.write_entry", call=3),
}


def check_full_disk(world: World, name: str) -> None:
    """The run ends with code 3 and the reason, what it has saved is whole, and it continues once there is room."""
    harness.undisturbed(world)
    with small_disk(folder_of(world, f"disk-{name.replace(' ', '-')}")) as disk:
        folder = disk / "run"
        options = {"latents_cache_dir": disk / "cache"} if name == "in encoding" else {}
        disturb = partial(harness.at, FULL_DISKS[name], partial(fill, disk))
        log = disk.with_name(f"{disk.name}.log")
        with harness.started(world.course(folder, **options), disturb=disturb, log=log) as run:
            ended = run.wait()
        if name == "in encoding":
            expect(ended, 3)
            assert "No space left" in ended.output or "cannot write the cache" in ended.output, ended.output[-2000:]
        else:
            expect(ended, 3)
            assert "No space left" in ended.output or "GiB free" in ended.output, ended.output[-2000:]
        for checkpoint in list_checkpoints(folder):
            assert damage(checkpoint) is None
        (disk / "filler").unlink()
        harness.check_resumed(world, folder, log=log, **options)


CHECKS: dict[str, Callable] = {
    "a read-only output folder": check_read_only_output,
    "the output folder becomes read-only": check_output_becomes_read_only,
    "a clip is deleted": check_clip_is_deleted,
    "no file handles at the start": check_no_handles_at_start,
    "no file handles later": check_no_handles_later,
    "the clock is set back": check_clock_is_set_back,
    "a second run": check_second_run_is_refused,
    "a dry run beside a run": check_dry_run_leaves_the_best,
    **{f"a full disk, {name}": partial(check_full_disk, name=name) for name in FULL_DISKS},
}
