"""The real msModelSlim, in a virtual environment of its own: what it packs is what tests compare with."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

NEEDS = (
    *("msmodelslim==26.1.0", "accelerate", "einops", "easydict", "wcmatch", "pygtrie", "scipy", "requests"),
    *("safetensors", "transformers<5.24", "torch==2.13.*"),
)
# What its adapter of Qwen3-MoE asks for: transformers 5 stacks the experts, and they are then left in BF16.
FOR_EXPERTS = ("transformers==4.57.6", "tokenizers>=0.22,<=0.23.0", "huggingface_hub<1.0")
QWEN2, QWEN3, QWEN3_MOE = "Qwen2.5-7B-Instruct", "Qwen3-8B", "Qwen3-30B"


def clean():
    """The environment without what is said of this Python."""
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


def _step(command):
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=600, env=clean(), check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("msModelSlim cannot be installed in ten minutes here")
    if run.returncode:
        pytest.skip(f"msModelSlim cannot be installed: {(run.stderr.strip() or 'no reason given')[-300:]}")


def programs():
    """The folder of programs of the environment; made once a machine, in minutes."""
    home = Path.home() / ".cache" / "fp4rl" / "oracles" / NEEDS[0].replace("==", "-")
    home.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{home}.lock"):
        if not (home / "ready").exists():
            shutil.rmtree(home, ignore_errors=True)
            _step([sys.executable, "-m", "venv", home])
            _step([home / "bin" / "pip", "install", "-q", *NEEDS])
            (home / "ready").touch()
    return home / "bin"


def _for_experts(bin_):
    """The folder of the transformers that stand before those of the environment; made once a machine."""
    more = bin_.parent / FOR_EXPERTS[0].replace("==", "-")
    with FileLock(f"{more}.lock"):
        if not (more / "transformers").is_dir():
            shutil.rmtree(more, ignore_errors=True)
            _step([bin_ / "pip", "install", "-q", "--no-deps", "--target", more, *FOR_EXPERTS])
    return more


def layers(weight, given, include=("*",), exclude=(), scope="per_block", method="minmax", **ext):
    """One step of a recipe: some layers, rounded to one format."""
    point = "{scope: %s, dtype: %s, symmetric: True, method: %s, ext: {axes: -1%s}}"
    more = "".join(f", {key}: {value}" for key, value in ext.items())
    act, own = (point % (scope, dtype, method, more) for dtype in (given, weight))
    chosen = f"      include: {list(include)}\n" + (f"      exclude: {list(exclude)}\n" if exclude else "")
    return f"    - type: linear_quant\n      qconfig:\n        act: {act}\n        weight: {own}\n{chosen}"


def packed_by_it(bin_, kind, model, out, *steps, with_experts=False, part_bytes=None):
    """Pack a model folder by the tool's own command; `part_bytes` in place of the gigabytes of a file."""
    recipe = out.with_suffix(".yaml")
    recipe.write_text(
        "apiversion: modelslim_v1\n"
        "metadata: {config_id: test, score: 1, label: {w_bit: 4, a_bit: 4, is_sparse: False, kv_cache: False}}\n"
        f"spec:\n  process:\n{''.join(steps)}  save:\n    - {{type: ascendv1_saver, part_file_size: 1}}\n"
    )
    patch = (
        "from msmodelslim.core.quant_service.modelslim_v1.save.utils import safetensors as s; "
        f"s.ONE_GB_FILE_BYTES = {part_bytes or 1 << 32}; "
        "from msmodelslim.cli.__main__ import main; main()"
    )
    command = [bin_ / "python", "-c", patch, "quant", "--model_type", kind, "--device", "cpu"]
    command += ["--model_path", model, "--save_path", out, "--config_path", recipe, "--trust_remote_code", "False"]
    env = clean() | ({"PYTHONPATH": str(_for_experts(bin_))} if with_experts else {})
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return out
