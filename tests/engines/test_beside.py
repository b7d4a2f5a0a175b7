"""A preflight with a process beside it sees what one process alone sees, also where the other one dies."""

import os
import signal
import sys
import time

import psutil
import pytest
import yaml

from fp4rl.cli.described import runs_described
from fp4rl.engines.executors import beside as module
from fp4rl.lab.preflight import steps
from fp4rl.lab.preflight.rows import Subject
from fp4rl.spec.experiment import Suite
from planted.small import SMALL

SUITE = {
    "suite": "mine",
    "base": SMALL | {"model": {"embedded": {"warm_up_steps": 20}}, "evaluation": {"count": 8, "max_new_tokens": 6}},
    "arms": {"a": {}, "b": {"injection": "w4a4"}, "c": {"training": {"lr": 1e-4}}},
}


@pytest.fixture
def subject(tmp_path):
    suite = Suite.model_validate(SUITE)
    return lambda: Subject(suite, runs_described(suite, "mine"), tmp_path / "runs")


def seen(subject):
    """What the fake steps of each arm recorded, without times."""
    found = {}
    for arm, own in steps.tried(subject).items():
        curves = {
            step: {name: value for name, value in values.items() if not name.startswith("time/")}
            for step, values in own.exported.items()
        }
        found[arm] = own.rates, own.error, own.waits, curves, own.run.result.evidence.final_files
    return found


def dies(*words):
    """A process that ends before it has done anything."""
    process, pipe = SPAWNED(*words)
    process.kill()
    process.join()
    return process, pipe


SPAWNED = module.spawned


@pytest.mark.slow
def test_the_fake_steps_are_those_of_one_process_also_where_the_other_dies(subject, monkeypatch):
    here, told = [], []
    own = steps.tried_of
    monkeypatch.setattr(steps, "tried_of", lambda subject, arms: here.extend(arms) or own(subject, arms))
    with module.beside(subject()) as wait:
        wait(lambda step, total: told.append((step, total)))
    assert told == [(step, 20) for step in range(1, 21)]

    def with_another():
        first = subject()
        with module.beside(first) as wait:
            wait(lambda *_: None)
            return seen(first)

    shared = with_another()
    assert here == ["a", "c"]
    assert list(shared) == ["a", "b", "c"]
    monkeypatch.setattr(module, "spawned", dies)
    alone = with_another()
    assert here == ["a", "c", "a", "c", "b"]
    assert shared == alone == seen(subject())
    assert all(final for *_, final in alone.values())


@pytest.mark.slow
@pytest.mark.parametrize("sign", ["runs/models/tiny-*.lock", "scratch/fp4rl-*/fp4rl-*/*tried-b*"])
def test_ctrl_c_leaves_no_process_and_no_scratch_folder(tmp_path, popen, sign):
    """In the warm-up, and in the fake steps of an arm that the other process has."""
    spec, scratch = tmp_path / "suite.yaml", tmp_path / "scratch"
    scratch.mkdir()
    spec.write_text(yaml.safe_dump(SUITE))
    program = "from fp4rl.cli.main import entry; entry()"
    command = [sys.executable, "-W", "ignore", "-c", program, "preflight", str(spec), "--runs", str(tmp_path / "runs")]
    with (tmp_path / "said").open("w") as said:
        process = popen(
            command,
            stdout=said,
            stderr=said,
            start_new_session=True,
            env=os.environ | {"TMPDIR": str(scratch)},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    while process.poll() is None and not list(tmp_path.glob(sign)):
        time.sleep(0.05)
    others = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130, (tmp_path / "said").read_text()
    assert (tmp_path / "said").read_text().splitlines()[-1] == "fp4rl: stopped"
    assert "Traceback" not in (tmp_path / "said").read_text()
    assert psutil.wait_procs(others, timeout=10)[1] == []
    assert list(scratch.glob("fp4rl-*")) == []
