"""The manifest of a checkpoint: the size and hash of each of its files, written last."""

import json
from pathlib import Path
from typing import NamedTuple

from files import file_hash, write_json

MANIFEST_FILE = "manifest.json"


class Manifest(NamedTuple):
    files: dict[str, dict]  # "bytes" and "sha256" by path inside the folder; empty where the manifest is missing

    def problem(self, folder: Path) -> str | None:
        """Returns what differs from the manifest; None if nothing does."""
        if not self.files:
            return f"its {MANIFEST_FILE} is missing or damaged"
        for name, expected in self.files.items():
            path = folder / name
            if not path.is_file():
                return f"its {name} is missing"
            if (size := path.stat().st_size) != expected["bytes"]:
                return f"its {name} has {size:,} bytes; {expected['bytes']:,} were written"
        for name, expected in self.files.items():
            if file_hash(folder / name) != expected["sha256"]:
                return f"its {name} is damaged: its hash differs from the one in {MANIFEST_FILE}"
        return None


def write_manifest(folder: Path) -> None:
    """Records every file of a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_hash(path)} for path in paths
    }
    write_json(folder / MANIFEST_FILE, {"files": files})


def read_manifest(folder: Path) -> Manifest:
    try:
        files = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
        return Manifest({name: {"bytes": int(of["bytes"]), "sha256": str(of["sha256"])} for name, of in files.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Manifest({})
