"""A run whose process dies without a word: what it left behind, and how it is told."""

import signal
import subprocess
import sys

import pytest

from fp4rl.engines.executors.processes import attempt, died
from fp4rl.lab import work
from fp4rl.lab.folders import run_folder
from fp4rl.lab.guards import FATAL
from fp4rl.lab.matrix import single
from fp4rl.spec.experiment import Experiment

CRASH = """
import os, signal, sys
from pathlib import Path
from fp4rl.lab.guards import crashes_logged
def in_the_middle():
    os.kill(os.getpid(), signal.SIGSEGV)
with crashes_logged(Path(sys.argv[1])):
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
    then = "the same command starts it from the beginning: it has no checkpoint yet"
    assert died(-signal.SIGKILL, folder) == f"its process died (SIGKILL, often for want of memory); {then}"


def test_a_run_that_goes_well_leaves_no_empty_log(folder):
    quiet = "import sys; from pathlib import Path; from fp4rl.lab.guards import crashes_logged\n"
    quiet += "with crashes_logged(Path(sys.argv[1])): pass"
    subprocess.run([sys.executable, "-c", quiet, str(folder.path / "log.txt")], check=True)
    assert not (folder.path / "log.txt").exists()


@pytest.mark.parametrize("place", ["runs", "file/runs"], ids=["no folder yet", "nothing can be written there"])
def test_a_start_that_fails_before_its_folder_exists_keeps_its_cause(tmp_path, monkeypatch, place):
    """Errors before, or without, a run's own log: the cause is told, and kept where that is possible."""

    def broken(*_):
        raise RuntimeError("the device went away")

    monkeypatch.setattr(work, "check", broken)
    (tmp_path / "file").write_text("")
    run, root = single(Experiment(), "one"), tmp_path / place
    ended = attempt(run, root, (), _Nobody())
    error = ended.error
    assert not ended.mistake
    assert error.startswith("RuntimeError: the device went away (")
    log = run_folder(root, run.suite, run.run_id).path / "log.txt"
    if place == "runs":
        assert "the device went away" in log.read_text()
        assert "traceback in its log.txt" in error
    else:
        assert "could not be kept: Not a directory" in error


class _Nobody:
    def send(self, event):
        pass
