"""What has become of a run is derived from what is there: locks, the last sign of life, and results."""

import errno
import json
import os
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from fp4rl.lab import heartbeat, work
from fp4rl.lab.folders import RunFolder
from fp4rl.lab.guards import locked
from fp4rl.lab.heartbeat import Heartbeat, beating
from fp4rl.lab.matrix import single
from fp4rl.lab.status import status_of
from fp4rl.lab.suites import read_suite
from fp4rl.rl.events import Interrupted, Progress, StepDone
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.experiment import Experiment
from planted.records import line

RUN = single(Experiment(), "s")

HELD = """
import sys, time
from pathlib import Path
from fp4rl.lab.folders import RunFolder
from fp4rl.lab.guards import locked
from fp4rl.lab.heartbeat import beating
from fp4rl.rl.events import StepDone
folder = RunFolder(Path(sys.argv[1]))
with locked(folder), beating(folder.path, 30) as heart:
    heart.note(StepDone(12, {}))
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path):
    made = RunFolder(tmp_path / "s" / "a-s0")
    made.path.mkdir(parents=True)
    return made


def word(folder):
    return status_of(folder, None).word


def elsewhere(folder, ended=None, age_s=0.0):
    """A record as a process of another machine leaves it."""
    beat = heartbeat.Beat("another-machine", 1, 0.0, 0.0, 0.0, "training", 3, 9, ended)
    heartbeat._write(folder.path / "heartbeat.json", beat)
    then = time.time() - age_s
    os.utime(folder.path / "heartbeat.json", (then, then))


def test_a_run_that_nobody_began_is_planned(tmp_path):
    assert word(RunFolder(tmp_path / "s" / "b-s0")) == "planned"


def test_a_process_that_lives_is_running_and_one_that_was_killed_is_lost(folder, monkeypatch):
    process = subprocess.Popen([sys.executable, "-c", HELD, str(folder.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        heart = heartbeat.read(folder.path)
        assert (heart.pid, heart.host, heart.ended) == (process.pid, socket.gethostname(), None)
        # the record may be from before the step: what counts here is the lock
        assert word(folder) == "running"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    status = status_of(folder, None)
    assert status.word == "lost"
    assert socket.gethostname() in status.why
    assert abs(status.at - time.time()) < 60


def test_the_record_tells_the_last_step_and_how_it_ended(folder):
    with pytest.raises(CheckFailed), beating(folder.path, 30) as heart:  # noqa: PT012
        heart.note(Progress("warm-up", 3, 60))
        heart.note(StepDone(12, {"loss": 1.0}))
        raise CheckFailed("the loss is not finite")
    beat = heartbeat.read(folder.path)
    assert (beat.where, beat.ended, beat.why) == ("step 12 of 30 of training", "failed", "the loss is not finite")
    assert status_of(folder, None).as_dict()["status"] == "failed"
    with pytest.raises(Interrupted), beating(folder.path, 30):
        raise Interrupted("after step 3")
    assert (word(folder), status_of(folder, None).why) == ("interrupted", "after step 3")


def test_a_thread_writes_signs_while_nothing_else_happens(folder):
    heart = Heartbeat(folder.path, 3, every_s=0.02)
    first = heartbeat.read(folder.path).at
    for _ in range(200):
        time.sleep(0.02)
        if heartbeat.read(folder.path).at > first:
            break
    assert heartbeat.read(folder.path).at > first
    heart.end("done", "")


def test_a_run_of_another_machine_runs_while_it_shows_signs_and_is_not_begun_here(folder):
    elsewhere(folder)
    assert word(folder) == "running"
    with pytest.raises(InvalidValueError, match="another machine: another-machine is at step 3 of 9"), locked(folder):
        pass
    elsewhere(folder, age_s=heartbeat.GRACE_S + 5)
    assert word(folder) == "lost"
    with locked(folder):
        pass
    elsewhere(folder, ended="interrupted")
    assert word(folder) == "interrupted"
    with locked(folder):
        pass


def test_a_process_whose_run_was_taken_over_stops(folder):
    heart = Heartbeat(folder.path, 3, every_s=0.01)
    elsewhere(folder)
    heart._thread.join(timeout=20)
    with pytest.raises(CheckFailed, match=r"another-machine, process 1\) has taken this run over"):
        heart.note(StepDone(1, {}))
    heart.end("failed", "")
    assert heartbeat.read(folder.path).host == "another-machine"


def test_a_damaged_record_is_no_sign_of_life(folder):
    (folder.path / "heartbeat.json").write_text("{")
    assert (word(folder), status_of(folder, None).why) == ("lost", "it left no sign of life")


def test_the_record_keeps_its_size_whatever_the_reason(folder):
    for reason in ("", "x" * 10_000, "\N{SNOWMAN}" * 10_000):
        heart = Heartbeat(folder.path, 3)
        heart.end("failed", reason)
        assert (folder.path / "heartbeat.json").stat().st_size == 4096
        assert heartbeat.read(folder.path).why == reason[: len(heartbeat.read(folder.path).why)]


def test_a_full_disk_still_takes_how_a_run_ended(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs more rights")
    try:
        (disk / "run").mkdir()
        with pytest.raises(OSError, match="No space left") as raised, beating(disk / "run", 9) as heart:  # noqa: PT012
            heart.note(StepDone(4, {}))
            (disk / "full").write_bytes(b"x" * 2**20)
        assert raised.value.errno == errno.ENOSPC
        status = status_of(RunFolder(disk / "run"), None)
        assert (status.word, "No space left" in status.why) == ("failed", True)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def trained(monkeypatch):
    """Training that takes no time and does what the test asks."""
    does = SimpleNamespace(what=lambda emit, folder: None)

    def train(experiment, folder, cache, emit, past, **options):
        from fp4rl.rl.train import Trained
        from fp4rl.spec.records import Summary

        emit(StepDone(1, {"loss": 0.5, "time/forward_s": 2.0, "time/cpu_s": 1.5, "tokens/rollout": 70.0}))
        emit(line("master"))
        does.what(emit, folder)
        return Trained(folder, folder / "final", 1, Summary(masters_unchanged=True))

    monkeypatch.setattr(work, "train", train)
    return does


def planned_in(tmp_path):
    (tmp_path / "s" / "suite.yaml").write_text(json.dumps(Experiment().model_dump(mode="json")))
    return read_suite(tmp_path / "s").runs[0]


def test_each_attempt_is_kept_with_what_it_repeats(trained, tmp_path):
    def fails(emit, folder):
        raise RuntimeError("once")

    trained.what = fails
    with pytest.raises(RuntimeError):
        work.execute_run(RUN, tmp_path)
    assert planned_in(tmp_path).status.word == "failed"
    assert planned_in(tmp_path).status.why == "once"
    trained.what = lambda emit, folder: None
    folder = work.execute_run(RUN, tmp_path)
    names = ("after_step", "repeats_steps", "repeats_s", "repeats_cpu_s", "repeats_tokens")
    assert [tuple(attempt[name] for name in names) for attempt in folder.attempts()] == [(0,) * 5, (0, 1, 2.0, 1.5, 70)]
    assert planned_in(tmp_path).status.word == "invalid"  # nothing was evaluated here


def test_a_finished_run_without_its_evidence_is_invalid(trained, tmp_path):
    run = single(Experiment.model_validate({"injection": {"mode": "w4a16", "deployment": "ocp"}}), "s")
    work.execute_run(run, tmp_path)
    (tmp_path / "s" / "suite.yaml").write_text(json.dumps(run.experiment.model_dump(mode="json")))
    status = read_suite(tmp_path / "s").runs[0].status
    assert status.word == "invalid"
    assert "no site is recorded as quantized" in status.why
