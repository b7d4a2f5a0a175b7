"""On a full disk, a real one: what is done stays readable, the other runs are tried, and the words are right."""

import os
import subprocess
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from fp4rl.cli.main import main
from fp4rl.lab import work
from fp4rl.lab.folders import RunFolder, all_runs
from fp4rl.lab.matrix import planned
from fp4rl.lab.runner import Outcome
from fp4rl.lab.status import status_of
from fp4rl.rl.events import StepDone
from fp4rl.spec.errors import CheckFailed
from fp4rl.spec.experiment import Suite

SUITE = {
    "suite": "s",
    "seeds": [0],
    "base": {"training": {"steps": 40}},
    "arms": {"bf16": {}, "other": {"training": {"lr": 1e-5}}},
}


@pytest.fixture
def disk(tmp_path):
    """A disk of 512 KiB."""
    where = tmp_path / "disk"
    where.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(where)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs more rights")
    yield where
    subprocess.run(["umount", str(where)], check=True)


def fill(disk: Path) -> None:
    with (disk / "full").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 512)
    assert not os.statvfs(disk).f_bavail


def steps(folder: RunFolder, count: int) -> None:
    for step in range(1, count + 1):
        folder.add_metrics(step, {"loss": 0.5})


@pytest.fixture
def suite(disk, tmp_path, monkeypatch):
    """A suite of two arms, whose first fills the disk at step 3, as both find it."""
    monkeypatch.chdir(tmp_path)

    def train(experiment, folder, cache, emit, past, **options):
        emit(StepDone(1, {"loss": 0.5}))
        fill(disk)
        for step in range(2, 2000):
            emit(StepDone(step, {"loss": 0.5}))

    def carried(self, runs, root, on_event):
        for run in runs:
            try:
                work.execute_run(run, root)
            except CheckFailed as error:
                yield Outcome(run, str(error))

    sinks = SimpleNamespace(log=lambda *_: None, failures={})
    monkeypatch.setattr(work, "Sinks", lambda *_: nullcontext(sinks))
    monkeypatch.setattr(work, "train", train)
    monkeypatch.setattr("fp4rl.engines.executors.processes.LocalPool.__call__", carried)
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump(SUITE))
    return file


def test_every_arm_is_tried_and_the_command_ends_as_for_any_failed_run(suite, disk, capsys):
    assert main(["run", str(suite), "--runs", str(disk)]) == 1
    said = capsys.readouterr().err
    assert "fp4rl: 2 of the runs failed; the same command tries them again" in said
    assert said.count("is full; make room") == 2
    assert "from the last checkpoint" not in said
    assert "starts it from the beginning" in said
    assert "Errno" not in said


@pytest.mark.parametrize("verb", [["runs"], ["report", "s", "--json"], ["watch", "s", "--once", "--json"]])
def test_what_failed_is_told_in_words_by_every_verb(suite, disk, capsys, verb):
    main(["run", str(suite), "--runs", str(disk)])
    capsys.readouterr()
    main([*verb, "--runs", str(disk)])
    said = " ".join(capsys.readouterr().out.split())
    assert "is full; make room" in said
    assert "Errno" not in said


@pytest.mark.parametrize("recorded", [True, False])
def test_finished_runs_are_listed_from_a_full_disk(make_run, disk, capsys, recorded):
    runs = Path(make_run("bf16", 0, 0.75).path).parent.parent
    if recorded:
        subprocess.run(["cp", "-r", *map(str, runs.iterdir()), str(disk)], check=True)
        assert main(["runs", "--runs", str(disk)]) == 0
        (disk / "trial" / "late").mkdir()
    make_run("w4a4", 0, 0.5)
    subprocess.run(["cp", "-r", *map(str, runs.iterdir()), str(disk)], check=True)
    fill(disk)
    capsys.readouterr()
    assert main(["runs", "--runs", str(disk)]) == 0
    assert "2 finished runs" in capsys.readouterr().out


def test_a_disk_that_may_only_be_read_lists_its_runs(make_run, disk, capsys):
    runs = Path(make_run("bf16", 0, 0.75).path).parent.parent
    subprocess.run(["cp", "-r", *map(str, runs.iterdir()), str(disk)], check=True)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert main(["runs", "--runs", str(disk)]) == 0
    assert "1 finished run" in capsys.readouterr().out


def test_a_killed_run_tells_its_last_step_and_the_checkpoint_that_there_is(tmp_path, monkeypatch):
    run = planned(Suite.model_validate(SUITE))[0]

    def train(experiment, folder, cache, emit, past, **options):
        for step in range(1, 22):
            emit(StepDone(step, {"loss": 0.5}))
        os._exit(9)

    monkeypatch.setattr(work, "train", train)
    if (child := os.fork()) == 0:
        work.execute_run(run, tmp_path)
    os.waitpid(child, 0)
    (folder,) = all_runs(tmp_path)
    status = status_of(folder, None)
    assert status.word == "lost"
    assert "died at step 21 of 40 of training; the same command starts it from the beginning" in status.why
    kept = folder.path / "checkpoints" / "checkpoint-20"
    kept.mkdir(parents=True)
    from fp4rl.lab.provenance import code_digest
    from fp4rl.rl.checkpoints import complete

    complete(kept, 20, code_digest(), {})
    assert "the same command goes on from its last checkpoint, after step 20" in status_of(folder, None).why
    complete(kept, 20, "other code", {})
    assert "starts it from the beginning" in status_of(folder, None).why
