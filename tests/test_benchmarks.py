"""Every benchmark still runs: at its smallest, so that a renamed function is found before somebody needs a figure."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALLEST = {
    "estimators": ["--rounds", "2"],
    "experts": ["--rounds", "2"],
    "export": ["--small", "--folder", "{folder}"],
    "health": ["--healthy", "1", "--faults", "0", "--courses", "1", "--keep", "{folder}"],
    "injection": ["--rounds", "2"],
    "ledger": ["--runs", "60", "--folder", "{folder}"],
    "numerics": ["--rounds", "2", "--dry"],
    "rl": ["--rounds", "2", "--cache", "{folder}"],
    "scan": ["sensitivity", "--folder", "{folder}"],
    "search": ["--tries", "2"],
    "report": ["--runs", "12", "--arms", "3", "--folder", "{folder}/suite"],
    "transforms": ["--cache", "{folder}"],
    "verdicts": ["--tries", "20"],
}
NEEDS_A_LARGE_CHECKPOINT = {"faults"}  # 3 GB on the disk, which `benchmarks/scan.py memory --keep` makes
NEEDS_A_GPU = {"gpu"}


def test_every_benchmark_is_named_here():
    files = {file.stem for file in (ROOT / "benchmarks").glob("*.py")}
    assert files == SMALLEST.keys() | NEEDS_A_LARGE_CHECKPOINT | NEEDS_A_GPU


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_a_benchmark_runs_and_prints_its_table(name, tmp_path):
    words = [word.format(folder=tmp_path) for word in SMALLEST[name]]
    ran = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.strip()
