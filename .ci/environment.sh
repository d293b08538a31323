# Sourced by quickstart.sh and run_tests.sh: uses the environment that is active, or makes .venv and uses that, and
# installs the pinned versions into it. An older Python than 3.11 ends the script before anything is made or installed.
# Usage: . .ci/environment.sh requirements.txt. With NO_INSTALL=1 nothing is made or installed: for machines without a
# network that have the packages.

# Usage: require_python INTERPRETER WAY_OUT
require_python() {
  local version
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && return
  version="$("$1" --version 2>&1)" || version="not found"
  echo "$0: error: $1 ($version): Python 3.11 or later is needed; $2" >&2
  exit 2
}

if [ -n "${NO_INSTALL:-}${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
  require_python python "activate an environment of Python 3.11 or later, or deactivate this one to get .venv"
else
  if [ -x .venv/bin/pip ]; then
    require_python .venv/bin/python "remove .venv (rm -r .venv) and start again"
  else
    require_python python3 "install one, make .venv with it (such as: python3.11 -m venv .venv) and start again"
    python3 -m venv .venv
  fi
  . .venv/bin/activate
fi
[ -z "${NO_INSTALL:-}" ] || return 0
# torch by itself first: its version alone decides which build is taken.
python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' requirements.txt)"
python -m pip install --quiet --disable-pip-version-check -r "$1"
