"""Runs trained by several processes that `fp4rl run` starts itself: how they end, and that nothing of them stays."""

import json
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from fp4rl.engines.executors import together as module
from fp4rl.engines.executors.together import Ended, _judged, together
from fp4rl.lab.matrix import single
from fp4rl.lab.runner import Outcome
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.load import load_spec
from planted.small import SMALL

TWO = single(Experiment(processes=2), "two")
SUITE = {
    "suite": "together",
    "seeds": [0],
    "base": SMALL
    | {
        "training": SMALL["training"] | {"steps": 5, "save_freq": 1},
        "evaluation": {"count": 4, "max_new_tokens": 6, "profiles": ["full"]},
    },
    "arms": {"two": {"processes": 2}, "one": {"training": {"steps": 1}}},
}


def test_at_their_defaults_both_keys_leave_the_digest_of_a_run_as_it_was():
    written = Experiment().model_dump(mode="json")
    assert "processes" not in written
    assert "sharding" not in written
    assert single(Experiment(processes=2), "x").run_id != single(Experiment(), "x").run_id


def test_sharding_over_one_process_and_of_packed_weights_is_refused_with_the_cure(tmp_path):
    spec = tmp_path / "s.yaml"
    spec.write_text("sharding: fsdp2\n")
    with pytest.raises(InvalidValueError, match="set processes"):
        load_spec(str(spec))
    always = {"weight": ["rollout", "training", "evaluation", "reference"]}
    packed = {"mode": "w4a16", "frozen_base": "packed", "apply_during": always}
    spec.write_text(yaml.safe_dump({"sharding": "fsdp2", "processes": 2, "model": {"lora": {}}, "injection": packed}))
    with pytest.raises(InvalidValueError, match="cannot shard packed weights; write copy"):
        load_spec(str(spec))


def judged(tmp_path, codes, *ended):
    outcomes = [Ended(rank, at, Outcome(TWO, error)) for rank, at, error in ended]
    return _judged(TWO, tmp_path, outcomes, codes, tmp_path).error


def test_the_outcome_is_the_first_failure_and_a_killed_process_comes_before_those_that_missed_it(tmp_path):
    assert judged(tmp_path, {}, (0, 1.0, None), (1, 1.0, None)) is None
    peer = (0, 2.0, "RuntimeError: connection closed by peer")
    assert judged(tmp_path, {0: 1, 1: 1}, peer, (1, 1.0, "the disk is full")) == "process 1 of 2: the disk is full"
    assert judged(tmp_path, {0: 1, 1: -signal.SIGTERM}, (0, 1.0, "no such step")) == "no such step"
    asked = Outcome(TWO, "after step 3", interrupted=True)
    assert _judged(TWO, tmp_path, [Ended(1, 1.0, asked), Ended(0, 2.0, asked)], {1: 1}, tmp_path) == asked
    killed = judged(tmp_path, {0: 1, 1: -signal.SIGKILL}, peer)
    assert killed.startswith("process 1 of 2 died (SIGKILL, often for want of memory)")
    log = tmp_path / "logs" / "x" / "attempt_0" / "1" / "stderr.log"
    log.parent.mkdir(parents=True)
    log.write_text("loading\nout of memory\n")
    assert "; the last line of its log: out of memory; the same command starts it" in judged(
        tmp_path, {1: -signal.SIGKILL}, peer
    )


def test_a_launcher_that_cannot_start_ends_the_run_with_the_last_line_of_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_LAUNCHER", "fp4rl.no_such_module")
    ended = together(TWO, tmp_path, (), lambda event: None, lambda: False)
    assert ended.error.startswith("the launcher of its processes died; the last line of its log: ")
    assert "no_such_module" in ended.error


def started(popen, suite, root):
    command = [sys.executable, "-m", "fp4rl", "run", suite, "--runs", root, "--jobs", "1"]
    return popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(popen, suite, root):
    running = started(popen, suite, root)
    _, said = running.communicate(timeout=500)
    assert running.returncode == 0, said


def steps(root):
    (file,) = (root / "together").glob("two-s0-*/metrics.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]


def ranks(running):
    below = psutil.Process(running.pid).children(recursive=True)
    return {int(p.environ()["RANK"]): p for p in below if "fp4rl.engines.executors.rank" in p.cmdline()}


SHARDED = {
    "processes": 2,
    "sharding": "fsdp2",
    "model": {"embedded": {"warm_up_steps": 60}, "dtype": "bfloat16"},
    "injection": {"mode": "w4a16", "deployment": "compressed_tensors"},
    "noise": {"schedule": {"kind": "constant", "sigma": 0.05}},
}
ADAPTED = SHARDED | {"model": {"embedded": {"warm_up_steps": 60}, "lora": {"rank": 4}}, "noise": None}


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{"processes": 2}, SHARDED, ADAPTED], ids=["ddp", "fsdp2", "fsdp2 and lora"])
def test_a_killed_process_ends_its_run_in_one_line_and_the_same_command_resumes_to_the_same_end(tmp_path, popen, keys):
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump(SUITE | {"arms": SUITE["arms"] | {"two": keys}}))
    finished(popen, suite, tmp_path / "whole")
    running, begun = started(popen, suite, tmp_path / "killed"), time.monotonic()
    while not list((tmp_path / "killed").glob("together/two-s0-*/checkpoints/checkpoint-4/fp4rl.json")):
        assert time.monotonic() - begun < 400
        assert running.poll() is None
        time.sleep(0.05)
    everyone = psutil.Process(running.pid).children(recursive=True)
    ranks(running)[1].kill()
    _, said = running.communicate(timeout=400)
    assert running.returncode == 1
    (line,) = (line for line in " ".join(said.split()).split("failed ") if "process 1 of 2 died" in line)
    assert "died (SIGKILL, often for want of memory)" in line
    assert len(list((tmp_path / "killed" / "together").glob("one-s0-*/result.json"))) == 1, "other runs go on"
    assert psutil.wait_procs(everyone, timeout=20)[1] == []
    finished(popen, suite, tmp_path / "killed")
    (log,) = (tmp_path / "killed" / "together").glob("two-s0-*/log.txt")
    assert "resumed from the checkpoint after step" in log.read_text()
    assert steps(tmp_path / "killed") == steps(tmp_path / "whole")
