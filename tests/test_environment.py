""".ci/environment.sh, which quickstart.sh and run_tests.sh begin with; every Python in it is a stand-in."""

import os
import subprocess

import pytest
from conftest import ROOT

# Answers as an interpreter of a given version does, and writes down what else it was told to do.
STAND_IN = """#!/bin/sh
case "$1" in
  -c) exit {status} ;;
  --version) echo "Python {version}" ;;
  *) echo "$*" >> {log} ;;
esac
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "requirements.txt").write_text("torch==2.13.0\n")
    (tmp_path / "bin").mkdir()
    return tmp_path


def put_python(folder, path, version):
    """Writes an interpreter, and the rest of a virtual environment where the path lies in one."""
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    is_new = tuple(map(int, version.split("."))) >= (3, 11)
    file.write_text(STAND_IN.format(status=0 if is_new else 1, version=version, log=folder / "log"))
    file.chmod(0o755)
    if path.startswith(".venv"):
        (file.parent / "pip").write_text("#!/bin/sh\n")
        (file.parent / "pip").chmod(0o755)
        (file.parent / "activate").write_text(f"PATH={file.parent}:$PATH\n")


def source(folder, **environment):
    inherited = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    environment = inherited | {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "NO_INSTALL": ""} | environment
    command = f"set -euo pipefail; . {ROOT}/.ci/environment.sh requirements.txt; echo goes on"
    return subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)


def commands(folder):
    return (folder / "log").read_text().splitlines() if (folder / "log").exists() else []


@pytest.mark.parametrize(
    ("path", "environment", "parts"),
    [
        ("bin/python3", {}, ["python3 (Python 3.10.14): ", "make .venv with it"]),
        (".venv/bin/python", {}, [".venv/bin/python (Python 3.10.14): ", "remove .venv"]),
        ("bin/python", {"VIRTUAL_ENV": "/some/where"}, ["python (Python 3.10.14): ", "activate"]),
        ("bin/python", {"CONDA_PREFIX": "/some/where"}, ["python (Python 3.10.14): ", "activate"]),
        ("bin/python", {"NO_INSTALL": "1"}, ["python (Python 3.10.14): ", "activate"]),
    ],
)
def test_an_old_python_is_refused_before_anything_is_installed(folder, path, environment, parts):
    put_python(folder, path, "3.10.14")
    before = sorted(folder.iterdir())
    result = source(folder, **environment)
    assert result.returncode == 2 and "goes on" not in result.stdout
    assert all(part in result.stderr for part in [*parts, "error: ", "Python 3.11 or later is needed; "]), result.stderr
    assert commands(folder) == [] and sorted(folder.iterdir()) == before


@pytest.mark.parametrize("version", ["3.11.0", "3.12.4"])
@pytest.mark.parametrize("path", ["bin/python", ".venv/bin/python"])
def test_a_newer_python_installs_torch_by_itself_first(folder, path, version):
    put_python(folder, path, version)
    result = source(folder, **({"VIRTUAL_ENV": "/some/where"} if path.startswith("bin") else {}))
    assert result.returncode == 0 and result.stdout == "goes on\n", result.stderr
    first, second = commands(folder)
    assert first.endswith(" torch==2.13.0") and second.endswith(" -r requirements.txt")


def test_no_install_installs_nothing(folder):
    put_python(folder, "bin/python", "3.11.0")
    result = source(folder, NO_INSTALL="1")
    assert result.returncode == 0 and commands(folder) == []
