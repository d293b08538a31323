#!/usr/bin/env bash
# Checks style and runs the tests, offline and on a CPU once the packages are installed. Arguments go to pytest:
# bash run_tests.sh -k resume
set -euo pipefail
cd "$(dirname "$0")"
. .ci/environment.sh requirements-dev.txt
ruff check .
ruff format --check .
# A process per core, with one thread each; a file's tests share what its fixtures make.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" python -m pytest --numprocesses auto --dist loadfile "$@"
