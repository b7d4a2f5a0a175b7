"""Accelerators dealt out to the workers of a pool, with counts that no machine here has."""

import sys

import pytest

from fp4rl.engines.executors import devices
from fp4rl.engines.executors.devices import Devices, devices_here, seen
from fp4rl.engines.executors.processes import LocalPool
from fp4rl.lab.matrix import single
from fp4rl.spec.experiment import Experiment


@pytest.mark.parametrize(
    "count, workers, dealt",
    [
        (4, 2, ["0,1", "2,3"]),
        (2, 2, ["0", "1"]),
        (8, 3, ["0,1", "2,3,4", "5,6,7"]),
        (1, 3, ["0", "0", "0"]),
        (2, 3, ["0", "1", "0"]),
        (4, 1, ["0,1,2,3"]),
    ],
)
def test_each_worker_sees_an_equal_part(count, workers, dealt, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    own = seen("cuda", count)
    parts = [own.of_worker(worker, workers) for worker in range(workers)]
    assert [part["CUDA_VISIBLE_DEVICES"] for part in parts] == dealt


def test_names_that_the_user_chose_are_kept(monkeypatch):
    """Kind: a pool that was given two of eight devices must not take the others."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6, GPU-1a2b")
    assert seen("cuda", 2).of_worker(1, 2) == {"CUDA_VISIBLE_DEVICES": "GPU-1a2b"}
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "4,5,6,7")
    assert seen("npu", 4).of_worker(1, 2) == {"ASCEND_RT_VISIBLE_DEVICES": "6,7"}
    assert seen("mps", 1) is None
    assert seen("cuda", 0) is None


def test_torch_is_asked_in_another_process_and_only_where_a_device_may_be(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "_FILES", (str(tmp_path / "nvidia*"),))
    monkeypatch.setattr(devices, "_COUNT", "print('cuda', 3)")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices_here() is None
    (tmp_path / "nvidia0").touch()
    assert devices_here() == Devices("cuda", ("0", "1", "2"))
    monkeypatch.setattr(devices, "_COUNT", "import sys; print('broken', file=sys.stderr); sys.exit(1)")
    assert devices_here() is None
    assert sys.executable


def test_workers_run_with_what_they_were_dealt(monkeypatch, tmp_path):
    """The pool's own processes report what they were told to see."""
    monkeypatch.setattr("fp4rl.engines.executors.processes.devices_here", lambda: Devices("cuda", ("5", "7")))
    monkeypatch.setattr("fp4rl.engines.executors.processes._serve", report_devices)
    experiment = Experiment()
    runs = [single(experiment, f"suite{i}") for i in range(2)]
    pool = LocalPool(2)
    said = [outcome.error for outcome in pool(runs, tmp_path, print)]
    assert sorted(said) == ["5", "7"]
    assert [outcome.error for outcome in LocalPool(1)(runs[:1], tmp_path, print)] == [""]


def test_runs_of_several_processes_get_as_many_devices(monkeypatch):
    monkeypatch.setattr(
        "fp4rl.engines.executors.processes.devices_here", lambda: Devices("npu", tuple(map(str, range(8))))
    )
    four = [single(Experiment(processes=4), "a")] * 6
    assert [part["ASCEND_RT_VISIBLE_DEVICES"] for part in LocalPool(3)._dealt(four)] == ["0,1,2,3", "4,5,6,7"]
    assert len(LocalPool(3)._dealt([single(Experiment(processes=16), "a")] * 2)) == 1
    assert len(LocalPool(3)._dealt([single(Experiment(), "a")] * 2)) == 2


def report_devices(pipe, parent, threads, environment):
    """Stand in for a worker: its outcome is what it was dealt."""
    from fp4rl.lab.runner import Outcome

    while (order := pipe.recv()) is not None:
        pipe.send(Outcome(order[0], environment.get("CUDA_VISIBLE_DEVICES", "")))
