"""`make gpu-check`: without a GPU it says so; with one, a step that fails or hangs leaves the others and is written."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fp4rl.spec.experiment import Suite
from fp4rl.spec.load import load_spec

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "tools" / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_cuda_it_says_so_and_ends_well():
    ran = subprocess.run([sys.executable, ROOT / "tools" / "gpu_check.py"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "gpu-check: torch sees no CUDA device here, so nothing was run\n")


def test_its_steps_name_files_and_a_suite_that_exist(tool, tmp_path):
    planned = tool.steps(tmp_path)
    assert [step.name for step in planned] == ["doctor", "tests", "rounding", "injection", "rl", "vllm"]
    for word in (word for step in planned for word in step.command if word.startswith(("tests/", "benchmarks/"))):
        assert (ROOT / word).is_file(), word
    suite = load_spec(tmp_path / "suite.yaml")
    assert isinstance(suite, Suite)


def test_a_failing_and_a_hanging_step_are_written_beside_the_others(tool):
    python = sys.executable
    made = [
        tool.run_step(tool.Step(name, "x", (python, "-c", code), needs), minutes=0.05)
        for name, code, needs in (
            ("good", "print('all is well')", None),
            ("bad", "print('no'); raise SystemExit(3)", None),
            ("slow", "import time; print('begun', flush=True); time.sleep(60)", None),
            ("absent", "", "no_such_package"),
        )
    ]
    assert [o.said for o in made] == [
        "passed",
        "failed with exit code 3",
        "ended after 0.05 minutes",
        "skipped, no_such_package is not installed",
    ]
    text = tool.page("NVIDIA Test", made)
    assert "| bad | x | failed with exit code 3 |" in text
    assert "all is well" in text
    assert "begun" in text
