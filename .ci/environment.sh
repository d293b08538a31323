# Sourced by quickstart.sh and run_tests.sh: uses the environment that is active, or makes .venv and uses that, and
# installs the pinned versions into it.
# Usage: . .ci/environment.sh requirements.txt. With NO_INSTALL=1 nothing is made or installed: for machines without a
# network that have the packages.
[ -z "${NO_INSTALL:-}" ] || return 0
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
  [ -x .venv/bin/pip ] || python3 -m venv .venv
  . .venv/bin/activate
fi
# torch by itself first: its version alone decides which build is taken.
python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' requirements.txt)"
python -m pip install --quiet --disable-pip-version-check -r "$1"
