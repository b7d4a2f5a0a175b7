"""Every planted fault is found by the tests that are named for it. Sources are mutated in a copy, never here."""

import os
import shutil
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_SPEC = util.spec_from_file_location("mutants", Path(__file__).with_name("mutants.py"))
mutants = util.module_from_spec(_SPEC)
sys.modules["mutants"] = mutants
_SPEC.loader.exec_module(mutants)
NAMES = [mutant.name for mutant in mutants.MUTANTS]


def failures(source: Path, tests: list[str]) -> tuple[int, list[str], str]:
    """(exit code, ids of the tests that failed, the whole output) of `tests` over the package in `source`."""
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    failed = [line.split(" ", 1)[1] for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    return done.returncode, failed, done.stdout + done.stderr


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=NAMES)
def test_the_text_of_a_mutant_stands_once_in_its_file_and_its_tests_exist(mutant):
    assert (ROOT / "src" / "fp4rl" / mutant.file).read_text(encoding="utf-8").count(mutant.text) == 1
    for test in mutant.tests:
        path, name = test.split("[")[0].split("::")
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), test


@pytest.mark.slow
def test_without_a_mutant_all_of_these_tests_pass():
    tests = sorted({test for mutant in mutants.MUTANTS for test in mutant.tests})
    code, failed, output = failures(ROOT / "src", tests)
    assert (code, failed) == (0, []), output


@pytest.mark.slow
@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=NAMES)
def test_every_mutant_is_found_by_each_of_its_tests(mutant, tmp_path):
    source = shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    file = source / "fp4rl" / mutant.file
    text = file.read_text(encoding="utf-8")
    assert text.count(mutant.text) == 1
    file.write_text(text.replace(mutant.text, mutant.replacement), encoding="utf-8")
    code, failed, output = failures(source, list(mutant.tests))
    assert code == 1, output  # 1: tests ran and failed; anything else is no verdict
    assert all(any(one.startswith(test) for one in failed) for test in mutant.tests), output
