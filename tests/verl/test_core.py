"""The package does everything but training where verl is installed: with an older transformers, and without TRL."""

import json
import os
import subprocess
import sys
from pathlib import Path

import fp4rl

PROGRAM = Path(__file__).with_name("core_program.py")
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join((str(Path(fp4rl.__file__).parents[1]), str(Path(__file__).parent))),
    "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu",  # verl takes vLLM for CPUs then, where it is installed
    "VERL_PLATFORM": "cpu",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
TRAINING = {"fp4rl.lab.work", "fp4rl.rl.session", "fp4rl.rl.train", "fp4rl.rl.trainer"}
ENGINES = {"vllm", "verl", "ray", "triton"}


def test_all_but_training_works_without_trl(tmp_path):
    without = f"import runpy, sys; sys.modules['trl'] = None; runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"
    command = [sys.executable, "-c", without, str(tmp_path)]
    run = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    done = json.loads((tmp_path / "done.json").read_text())
    assert {*done["missing"].pop("trl")} == TRAINING
    assert {*done["missing"]} <= ENGINES
    sites, equal = done["streamed"]
    assert (sites, equal) == (14, 14)
    assert done["verbs"].pop("run") == 2
    assert "training needs TRL, the extra `train`: pip install 'fp4rl[train]'" in run.stderr
    assert {*done["verbs"].values()} == {0}, done["verbs"]
