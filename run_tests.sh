#!/usr/bin/env bash
# Style and tests, offline and on a CPU once the packages are installed. Further words go to pytest: run_tests.sh -k resume
set -euo pipefail
cd "$(dirname "$0")"
. .ci/environment.sh requirements-dev.txt
ruff check .
ruff format --check .
python -m pytest "$@"
