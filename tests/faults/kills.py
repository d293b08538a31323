"""SIGKILL at named places and at random times: the resumed run equals the undisturbed one."""

import random
import signal
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from faults import harness
from faults.harness import Place, World

SAVE, BEST, RESULT = (f"run.checkpoints.save_{what}" for what in ("checkpoint", "best", "result"))
PUBLISH = "run.checkpoints.publish_folder"


class Kill(NamedTuple):
    """A place at which one rank kills itself."""

    place: Place
    kind: str = "lora"
    ranks: int = 1
    rank: int = 0
    prepare: str = ""  # a further function of this module to call in each process
    own_cache: bool = False  # encode the clips again


PLACES = {
    "while a clip is encoded": Kill(Place("dataset._write_latents", call=3), own_cache=True),
    "while a cached clip is published": Kill(
        Place("os.replace", within="dataset.write_entry", of_within=4), own_cache=True
    ),
    "after the lock is taken": Kill(Place("run.checkpoints.starting_point")),
    "before args.json is written": Kill(Place("run.run_directory.write_json")),
    "before the metrics are published": Kill(Place("run.run_directory.publish")),
    "in the first update": Kill(Place("train_cogvideox_lora.loss_of")),
    "between an update and its row": Kill(Place("run.run_directory.log_row", call=4)),
    "in the middle of a row": Kill(Place("run.run_directory.append_metrics", call=5), prepare="tear_rows"),
    "in torch.save": Kill(Place("torch.save", call=2), prepare="tear_saves"),
    "before the manifest": Kill(Place("run.checkpoints.write_manifest", call=2)),
    "before the manifest is synced": Kill(Place("os.fsync", within="run.checkpoints.write_manifest", of_within=2)),
    "after the manifest is synced": Kill(Place("os.fsync", "after", within="run.checkpoints.write_manifest")),
    "before the manifest is renamed": Kill(Place("os.replace", within="run.checkpoints.write_manifest", of_within=2)),
    "before a checkpoint is synced": Kill(Place("os.fsync", within=PUBLISH, of_within=2)),
    "after a checkpoint is synced": Kill(Place("os.fsync", "after", call=5, within=PUBLISH, of_within=2)),
    "before a checkpoint is renamed": Kill(Place("os.rename", within=SAVE, of_within=3)),
    "after a checkpoint is renamed": Kill(Place("os.rename", "after", within=SAVE, of_within=2)),
    "while an old checkpoint is deleted": Kill(Place("shutil.rmtree", call=2), prepare="tear_deletions"),
    "after a checkpoint": Kill(Place(SAVE, "after", call=2)),
    "after the last checkpoint": Kill(Place(SAVE, "after", call=3)),
    "before the first best": Kill(Place(BEST)),
    "before a best is renamed": Kill(Place("os.rename", within=BEST)),
    "after the first best, before a checkpoint": Kill(Place(BEST, "after")),
    "before a best is replaced": Kill(Place("files._exchange", within=BEST, of_within=2)),
    "after a best is replaced": Kill(Place("files._exchange", "after", within=BEST, of_within=2)),
    "between the renames of a best": Kill(Place("os.rename", "after", call=2), prepare="without_exchange"),
    "between a best and its row": Kill(Place(BEST, "after", call=2)),
    "before the result": Kill(Place(RESULT)),
    "before the result is synced": Kill(Place("os.fsync", within=RESULT)),
    "before the result is renamed": Kill(Place("os.replace", within=RESULT)),
    "after the result": Kill(Place(RESULT, "after")),
    "before the page is published": Kill(Place("pages.report.publish", call=2)),
    # A whole transformer: every rank writes its part, and the result is a folder.
    "sft: before its parts": Kill(Place("run.shards.dcp.save", call=2), kind="sft"),
    "sft: after its parts": Kill(Place("run.shards.dcp.save", "after", call=2), kind="sft"),
    "sft: before the manifest": Kill(Place("run.checkpoints.write_manifest", call=2), kind="sft"),
    "sft: after a checkpoint": Kill(Place(SAVE, "after", call=2), kind="sft"),
    "sft: before a best is replaced": Kill(Place("files._exchange", within=BEST, of_within=2), kind="sft"),
    "sft: before the result is renamed": Kill(Place("os.rename", within=RESULT), kind="sft"),
    "sft: after the result": Kill(Place(RESULT, "after"), kind="sft"),
    # Two ranks: one dies, the other must not wait for ever.
    "two ranks: the first while a clip is encoded": Kill(Place("dataset._write_latents"), ranks=2, own_cache=True),
    "two ranks: the second in an update": Kill(Place("train_cogvideox_lora.loss_of", call=9), ranks=2, rank=1),
    "two ranks: the first before the manifest": Kill(Place("run.checkpoints.write_manifest", call=2), ranks=2),
    "two ranks: the first after a checkpoint": Kill(Place(SAVE, "after", call=2), ranks=2),
    "two ranks: the second in a validation": Kill(Place("run.validation.training_loss", call=6), ranks=2, rank=1),
    "two ranks, sft: the second before its part": Kill(
        Place("run.shards.dcp.save", call=2), kind="sft", ranks=2, rank=1
    ),
    "two ranks, sft: the first before the manifest": Kill(
        Place("run.checkpoints.write_manifest", call=2), kind="sft", ranks=2
    ),
}  # fmt: skip


def prepare(kill: Kill) -> None:
    if kill.prepare:
        globals()[kill.prepare](kill)
    else:
        harness.kill_at(kill.place, kill.rank)


def tear_saves(kill: Kill) -> None:
    """Has `torch.save` write only half, and kills."""

    def torn(save):
        calls = [0]

        def half(tensors, file):
            calls[0] += 1
            start = file.tell()
            save(tensors, file)
            if calls[0] == kill.place.call:
                file.flush()
                file.truncate(start + (file.tell() - start) // 2)
                harness.die()

        return half

    harness.replace("torch.save", torn)


def tear_rows(kill: Kill) -> None:
    """Writes half a row of metrics, and kills."""

    def torn(append):
        calls = [0]

        def half(output_dir, row):
            calls[0] += 1
            if calls[0] == kill.place.call:
                with open(output_dir / "metrics.jsonl", "a") as file:
                    file.write('{"step": 5, "epo')
                harness.die()
            append(output_dir, row)

        return half

    harness.replace("run.run_directory.append_metrics", torn)


def tear_deletions(kill: Kill) -> None:
    """Deletes some files of the oldest checkpoint, and kills."""

    def torn(rmtree):
        def half(path, *args, **options):
            if "checkpoint-" in Path(path).name and (Path(path).parent / "checkpoint-7").exists():
                for file in sorted(path for path in Path(path).rglob("*") if path.is_file())[: kill.place.call]:
                    file.unlink()
                harness.die()
            rmtree(path, *args, **options)

        return half

    harness.replace("shutil.rmtree", torn)


def without_exchange(kill: Kill) -> None:
    """As on a file system that cannot exchange two names: kills when the earlier folder has its other name."""
    harness.replace("files._exchange", lambda _: lambda *__: False)

    def torn(rename):
        def first(source, target):
            rename(source, target)
            if str(target).endswith(".previous"):
                harness.die()

        return first

    harness.replace("os.rename", torn)


def check(world: World, name: str) -> None:
    """Kills a run at a place, resumes it, and compares.

    Raises:
        AssertionError: it was not killed, the other rank hangs, or the resumed run differs.
    """
    kill = PLACES[name]
    folder = harness.fresh(world.folder / "kills" / name.replace(" ", "-"))
    options = {"latents_cache_dir": harness.fresh(folder.with_name(f"{folder.name}-cache"))} if kill.own_cache else {}
    line = world.course(folder, kill.kind, **options)
    with harness.started(line, ranks=kill.ranks, disturb=partial(prepare, kill)) as run:
        ended = run.wait()
    assert ended.codes[kill.rank] == -signal.SIGKILL, f"not killed: {ended.codes} {ended.output[-1000:]}"
    others = [code for rank, code in enumerate(ended.codes) if rank != kill.rank]
    assert all(code == 3 for code in others) and not ended.has_traceback, f"{ended.codes}: {ended.output[-2000:]}"
    harness.check_resumed(world, folder, kill.kind, kill.ranks, **options)


def check_random(world: World, number: int, *, kind: str, ranks: int, longest: float) -> None:
    """Kills a run, and the runs that resume it, each after a random time; then lets one end, and compares."""
    moments = random.Random(number)
    folder = harness.fresh(world.folder / "kills" / f"random-{kind}-{ranks}-{number}")
    harness.undisturbed(world, kind, ranks)
    for _ in range(moments.randint(1, 3)):
        line = world.course(folder, kind, resume_from_checkpoint="auto")
        with harness.started(line, ranks=ranks) as run:
            time.sleep(moments.uniform(0.1, longest))
            victim = moments.randrange(ranks)
            if run.ranks[victim].is_alive():
                run.send(signal.SIGKILL, victim)
            if not run.said():  # not connected yet: a launcher would end the others, which wait for --ddp_timeout
                for process in run.ranks:
                    process.kill()
            ended = run.wait()
            assert not ended.has_traceback, ended.output[-2000:]
            assert set(ended.codes) <= {0, 3, -signal.SIGKILL}, f"{ended.codes}: {ended.output[-2000:]}"
    harness.check_resumed(world, folder, kind, ranks)
