"""A run whose process dies without a word: what it left behind, and how it is told."""

import signal
import subprocess
import sys

import pytest

from fp4rl.engines.processes import died
from fp4rl.lab.faults import FATAL
from fp4rl.lab.folders import run_folder

CRASH = """
import os, signal, sys
from pathlib import Path
from fp4rl.lab.faults import faults_kept
def in_the_middle():
    os.kill(os.getpid(), signal.SIGSEGV)
with faults_kept(Path(sys.argv[1])):
    in_the_middle()
"""


@pytest.fixture
def folder(tmp_path):
    found = run_folder(tmp_path, "s", "a-s0-1")
    found.path.mkdir(parents=True)
    return found


def test_a_segmentation_fault_leaves_its_stacks_in_the_runs_log_and_the_error_names_it(folder):
    log = folder.path / "log.txt"
    log.write_text("said before\n")
    code = subprocess.run([sys.executable, "-c", CRASH, str(log)], check=False).returncode
    assert code == -signal.SIGSEGV
    text = log.read_text()
    assert text.startswith("said before\n")
    assert FATAL in text
    assert "in_the_middle" in text
    told = died(code, folder)
    assert "SIGSEGV" in told
    assert str(log) in told


def test_a_process_that_was_killed_is_told_by_its_signal_and_points_at_no_log(folder):
    (folder.path / "log.txt").write_text(f"{FATAL}: of an earlier death\nresumed\n")
    assert died(-signal.SIGKILL, folder) == (
        "its process died (SIGKILL, often for want of memory); run again to repeat it"
    )


def test_a_run_that_goes_well_leaves_no_empty_log(folder):
    quiet = "import sys; from pathlib import Path; from fp4rl.lab.faults import faults_kept\n"
    quiet += "with faults_kept(Path(sys.argv[1])): pass"
    subprocess.run([sys.executable, "-c", quiet, str(folder.path / "log.txt")], check=True)
    assert not (folder.path / "log.txt").exists()
