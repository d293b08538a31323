"""Checkpoints that a disk has damaged: passed over by `latest` and `auto`, named, and without effect on the result."""

import json
import os
import random
import shutil
from functools import partial
from pathlib import Path

from faults import harness, kills
from faults.harness import World
from run.checkpoints import damage
from run.manifest import MANIFEST_FILE
from run.run_directory import STATE_FILE

NEWEST, EARLIER = "checkpoint-6", "checkpoint-3"


def template(world: World, kind: str) -> Path:
    """Returns the run directory of a run that was killed after its second checkpoint, made once."""
    folder = world.folder / "damage" / f"template-{kind}"
    if not folder.exists():
        ended = harness.run(
            world.course(folder, kind), disturb=partial(kills.prepare, kills.PLACES["after a checkpoint"])
        )
        assert ended.codes == [-9], ended.output
    return folder


def files_of(world: World, kind: str) -> list[str]:
    checkpoint = template(world, kind) / NEWEST
    return [path.relative_to(checkpoint).as_posix() for path in sorted(checkpoint.rglob("*")) if path.is_file()]


# ---- ways to damage --------------------------------------------------------------------------------------------------


def truncate(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(1, path.stat().st_size))


def empty(path: Path, draw: random.Random) -> None:
    os.truncate(path, 0)


def delete(path: Path, draw: random.Random) -> None:
    path.unlink()


def flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def zero(path: Path, draw: random.Random) -> None:
    """As a file whose blocks never reached the disk."""
    path.write_bytes(bytes(path.stat().st_size))


WAYS = {"truncated": truncate, "emptied": empty, "deleted": delete, "one bit flipped": flip, "zeros": zero}


def is_harmless(before: bytes, path: Path) -> bool:
    """Whether a bit of a manifest was flipped that does not count: it says the same."""
    try:
        return path.name == MANIFEST_FILE and json.loads(before) == json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False


# ---- trials ----------------------------------------------------------------------------------------------------------


def copied(world: World, kind: str, name: str) -> Path:
    return Path(shutil.copytree(template(world, kind), harness.fresh(world.folder / "damage" / name)))


def check_found(world: World, kind: str, file: str, way: str, seed: int) -> bool:
    """Damages a file of a checkpoint, without a run; returns whether the damage was one that counts.

    Raises:
        AssertionError: it is not found, or its description does not name the file.
    """
    folder = copied(world, kind, f"look-{kind}-{file.replace('/', '-')}-{way.replace(' ', '-')}-{seed}")
    path = folder / NEWEST / file
    before = path.read_bytes()
    WAYS[way](path, random.Random(f"{file} {way} {seed}"))
    problem = damage(folder / NEWEST)
    if is_harmless(before, path):
        shutil.rmtree(folder)
        return False
    assert problem, f"{file}, {way}, seed {seed}: not found"
    assert Path(file).name in problem or file == MANIFEST_FILE, f"{file}, {way}, seed {seed}: {problem}"
    shutil.rmtree(folder)
    return True


def spoil_file(file: str, way: str, checkpoint: Path) -> None:
    WAYS[way](checkpoint / file, random.Random(f"{file} {way}"))


def empty_folder(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def later_format(checkpoint: Path) -> None:
    path = checkpoint / STATE_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))


def check_passed_over(world: World, kind: str, spoil, name: str, both: bool = False, resume_from: str = "auto") -> None:
    """Resumes from a run directory whose newest checkpoint, or both, are spoilt.

    Raises:
        AssertionError: it is not passed over and named, or the resumed run differs from the undisturbed one.
    """
    folder = copied(world, kind, f"run-{kind}-{name}-{'both' if both else 'newest'}")
    spoilt = [NEWEST, EARLIER] if both else [NEWEST]
    for checkpoint in spoilt:
        spoil(folder / checkpoint)
    line = world.course(folder, kind, resume_from_checkpoint=resume_from)
    ended = harness.run(line)
    if both and resume_from == "latest":
        assert ended.codes == [2] and "holds no complete checkpoint" in ended.output, ended.output[-2000:]
        return
    assert ended.codes == [0] and not ended.has_traceback, ended.output[-2000:]
    for checkpoint in spoilt:
        assert f"{checkpoint}: passed over and renamed to damaged-{checkpoint}: " in ended.output, ended.output[-2000:]
        shutil.rmtree(folder / f"damaged-{checkpoint}")
    difference = harness.first_difference(harness.undisturbed(world, kind), harness.left_by(folder))
    assert difference is None, difference
    assert not harness.leftovers(folder)
