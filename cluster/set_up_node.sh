#!/usr/bin/env bash
# Makes a machine a node of the cluster: palf_dist under the lock file in a virtual environment, and cluster/environment.sh
# in every shell. Runs again without harm; takes minutes the first time, so bake it into a machine image for quick starts.
set -euo pipefail
cd "$(dirname "$0")/.."
chmod 600 ~/.ray/auth_token

python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: Python 3.11 or newer is needed, but this machine's image has $(python3 --version); take another image" >&2
  exit 1
}
python3 -c 'import ensurepip' 2> /dev/null || {
  lock="DPkg::Lock::Timeout=300" # a new machine may be at its own updates
  sudo apt-get -o $lock update -qq && sudo apt-get -o $lock install -y -qq python3-venv
}
test -x .venv/bin/pip || python3 -m venv --clear .venv

# torch goes first and by its pin, so that no other package's requirement picks another build of it.
export PIP_CONSTRAINT="$PWD/constraints.txt" PIP_DISABLE_PIP_VERSION_CHECK=1
.venv/bin/pip install -qq pip setuptools
.venv/bin/pip install -qq torch
.venv/bin/pip install -qq --no-build-isolation .

line=". $PWD/cluster/environment.sh"
grep -qxF "$line" ~/.bashrc 2> /dev/null || echo "$line" >> ~/.bashrc
