#!/usr/bin/env bash
# Run tests/verl in an environment of its own: verl wants an older transformers than this package's (2.5 GB, minutes).
set -euo pipefail
cd "$(dirname "$0")/.."
home=${FP4RL_VERL_ENV:-.venv-verl}
uv=.venv/bin/uv
if [ ! -f "$home/ready" ]; then
  echo "test-verl: installing verl 0.9.1 into $home"
  for place in ${PIP_FIND_LINKS:-}; do export UV_FIND_LINKS="$place"; done
  "$uv" venv --quiet --allow-existing --python .venv/bin/python "$home"
  if ! "$uv" pip install --quiet --python "$home/bin/python" "torch==2.13.0" --editable ".[verl]" pytest hypothesis; then
    echo "test-verl: skipped, verl 0.9.1 cannot be installed here (see above)"
    exit 0
  fi
  touch "$home/ready"
fi
PYTHONPATH="$PWD/src:$PWD/tests/verl" OMP_NUM_THREADS=1 "$home/bin/python" -m pytest -q -p no:cacheprovider -W default tests/verl "$@"
