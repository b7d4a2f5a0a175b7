"""A power cut loses what was not synced: whatever then names a run finished, all of that run must be there.

The file layer here keeps, for each file, the content of its last fsync, and for each folder the names it held at its
last fsync. After every fsync of a run the disk is cut off: once as if names were durable at once (a file appears, empty
or as it was last synced), once as if only synced folders kept theirs.
"""

import os
import shutil
import stat
from pathlib import Path

import pytest

from fp4rl.lab import work
from fp4rl.lab.folders import RunFolder
from fp4rl.lab.matrix import single
from fp4rl.lab.runs import read_run
from fp4rl.rl import checkpoints
from fp4rl.rl.events import StepDone
from fp4rl.rl.train import Trained
from fp4rl.spec.evidence import CheckpointKept
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.records import Summary
from planted.records import line

RUN = single(Experiment(), "s")
STEPS = 2


class LossyDisk:
    """Records what fsync made durable below `root`, and makes copies of what a power cut would leave."""

    def __init__(self, root, monkeypatch):
        self.root, self.contents, self.names, self.after_sync = root, {}, {}, lambda: None
        self._real = os.fsync
        monkeypatch.setattr(os, "fsync", self._sync)

    def _sync(self, opened):
        self._real(opened)
        path, status = Path(f"/proc/self/fd/{opened}").readlink(), os.fstat(opened)
        if stat.S_ISDIR(status.st_mode):
            self.names[status.st_ino] = {entry.name: entry.inode() for entry in os.scandir(path)}
        else:
            self.contents[status.st_ino] = path.read_bytes()
        self.after_sync()

    def cut(self, to, *, names_at_once):
        """Copy to `to` what is left, by inode: names from the folders, contents from the last sync of each file."""

        def copy(folder, target):
            target.mkdir(parents=True, exist_ok=True)
            present = {entry.name: entry for entry in os.scandir(folder)}
            kept = {name: entry.inode() for name, entry in present.items()}
            if not names_at_once:
                kept = self.names.get(folder.stat().st_ino, {})
            for name, inode in kept.items():
                entry = present.get(name)
                if entry is not None and entry.is_dir() and entry.inode() == inode:
                    copy(folder / name, target / name)
                elif inode in self.contents or entry is None or not entry.is_dir():
                    (target / name).write_bytes(self.contents.get(inode, b""))

        copy(self.root, to)


def same(folder, whole):
    """Compare what a reader of a finished run sees."""
    left, right = read_run(folder), read_run(whole)
    assert left.result == right.result
    assert left.lines == right.lines
    assert left.curves == right.curves
    assert (folder.path / "final" / "weights").read_bytes() == (whole.path / "final" / "weights").read_bytes()


@pytest.fixture
def trained(monkeypatch):
    """Training that writes everything that real training writes, and takes no time."""

    def train(experiment, folder, cache, emit, past, *, stamp, **options):
        first = past.checkpoint.step if past.checkpoint is not None else 0
        for step in range(first + 1, STEPS + 1):
            emit(StepDone(step, {"loss": 1.0 / step}))
            emit(line("master"))
            kept = folder / "checkpoints" / f"checkpoint-{step}"
            kept.mkdir(parents=True, exist_ok=True)
            (kept / "weights").write_bytes(bytes([step]) * 100)
            emit(CheckpointKept(step=step))
            checkpoints.complete(kept, step, stamp, {"rollbacks": 0})
        (folder / "final").mkdir(exist_ok=True)
        (folder / "final" / "weights").write_bytes(b"final")
        return Trained(folder, folder / "final", STEPS, Summary(masters_unchanged=True))

    monkeypatch.setattr(work, "train", train)
    return train


def cut_after_every_sync(tmp_path, monkeypatch, names_at_once):
    """Run once; return its folder, and what a cut after each sync, and one at the end, leaves of all runs."""
    disk, cuts = LossyDisk(tmp_path / "runs", monkeypatch), []

    def cut():
        cuts.append(tmp_path / "cuts" / f"{len(cuts)}")
        disk.cut(cuts[-1], names_at_once=names_at_once)

    disk.after_sync = cut
    whole = work.execute_run(RUN, tmp_path / "runs")
    disk.after_sync = lambda: None
    cut()
    return whole, cuts


@pytest.mark.parametrize("names_at_once", [True, False])
def test_a_run_that_counts_as_finished_after_a_cut_is_whole(trained, tmp_path, monkeypatch, names_at_once):
    whole, cuts = cut_after_every_sync(tmp_path, monkeypatch, names_at_once)
    finished = [folder for folder in (RunFolder(at / "s" / RUN.run_id) for at in cuts) if folder.finished]
    assert len(cuts) > 20
    assert RunFolder(cuts[-1] / "s" / RUN.run_id) in finished  # once `execute_run` has returned
    for folder in finished:
        same(folder, whole)


@pytest.mark.parametrize("names_at_once", [True, False])
def test_after_any_cut_the_run_goes_on_and_ends_alike(trained, tmp_path, monkeypatch, names_at_once):
    whole, cuts = cut_after_every_sync(tmp_path, monkeypatch, names_at_once)
    began = []
    monkeypatch.undo()
    monkeypatch.setattr(work, "train", trained)
    cuts = [at for at in cuts if not RunFolder(at / "s" / RUN.run_id).finished]
    for at in cuts[::2]:
        folder = work.execute_run(RUN, at)
        began.append(folder.attempts()[-1]["after_step"])
        assert folder.metrics() == whole.metrics()
        assert folder.evidence() == whole.evidence()
    assert began == sorted(began)  # a later cut never loses more than an earlier one
    assert set(began) == {0, 1, 2}


def test_the_layer_sees_what_was_not_synced(tmp_path, monkeypatch):
    """The test has power: a result written before its evidence is synced would be found."""
    disk = LossyDisk(tmp_path / "disk", monkeypatch)
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "evidence").write_text("never synced")
    disk.cut(tmp_path / "cut", names_at_once=True)
    assert (tmp_path / "cut" / "evidence").read_bytes() == b""
    shutil.rmtree(tmp_path / "cut")
    disk.cut(tmp_path / "cut", names_at_once=False)
    assert not (tmp_path / "cut" / "evidence").exists()
