#!/usr/bin/env bash
# Set up .venv with pinned dependencies. Usage: ./setup.sh [EXTRA ...]   (train report dev oracles search postgres ...)
#
# torch: a build that is already there is kept (in .venv, or a CUDA build of the Python that is used); otherwise the CPU
# build where no NVIDIA GPU is present, so that no gigabytes of CUDA packages are pulled. Installed packages are compiled
# here, as pip does: otherwise the first command takes 20 s longer.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}
extras=$(IFS=,; echo "${*:-train,report}")
stamp=".venv/.installed-${extras//,/-}"

"$python" - <<'PY' || { echo "setup: Python 3.11 or newer is needed; name one with PYTHON=python3.12 make demo" >&2; exit 2; }
import sys
sys.exit(sys.version_info < (3, 11))
PY

wanted=$(cat pyproject.toml constraints.txt setup.sh | cksum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi

torch_of() { "$1" -c 'import torch; print(torch.__version__, torch.version.cuda or "")' 2>/dev/null || true; }

if [ ! -x .venv/bin/python ]; then
  existing=$(torch_of "$python")
  case "$existing" in
    *" "?*) echo "setup: using the CUDA build of torch that $python has (${existing%% *})"
            "$python" -m venv --system-site-packages .venv ;;
    *)      "$python" -m venv .venv ;;
  esac
fi

constraints=constraints.txt
kept=$(torch_of .venv/bin/python)
if [ -n "$kept" ]; then
  constraints=.venv/constraints.txt
  { grep -v '^torch==' constraints.txt; echo "torch==${kept%% *}"; } > "$constraints"
fi

.venv/bin/python -m pip install --quiet --disable-pip-version-check uv || echo "setup: no uv, falling back to pip" >&2
local_wheels=""
for place in ${PIP_FIND_LINKS:-}; do
  if compgen -G "$place/torch-*.whl" > /dev/null; then local_wheels=$place; fi
done

if [ -x .venv/bin/uv ]; then
  if [ -n "${PIP_FIND_LINKS:-}" ]; then export UV_FIND_LINKS="$PIP_FIND_LINKS"; fi
  backend=()
  if [ -z "$kept" ] && [ -z "$local_wheels" ] && ! command -v nvidia-smi > /dev/null; then backend=(--torch-backend cpu); fi
  .venv/bin/uv pip install --quiet --compile-bytecode --python .venv/bin/python --constraint "$constraints" "${backend[@]}" --editable ".[$extras]"
else
  if [ -z "$kept" ] && [ -z "$local_wheels" ] && ! command -v nvidia-smi > /dev/null; then
    echo "setup: without uv, pip may pull the CUDA build of torch; install a CPU build into .venv first to avoid it" >&2
  fi
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint "$constraints" --editable ".[$extras]"
fi
echo "$wanted" > "$stamp"
