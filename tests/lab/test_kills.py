"""A suite that is killed again and again ends like one that never was: every run once, none twice, the same numbers."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import yaml

from fp4rl.lab.folders import all_runs, finished_runs

SUITE = {
    "suite": "killed",
    "seeds": list(range(10)),
    "base": {
        "model": {"embedded": {"warm_up_steps": 60}},
        "task": {"name": "arithmetic", "difficulty": 1, "train_count": 64},
        "training": {
            "steps": 12,
            "train_batch_size": 4,
            "mini_batch_size": 2,
            "rollout_n": 4,
            "max_response_length": 32,
            "overlong_buffer": {"len": 8},
            "filter_groups": {"metric": "reward"},  # hardly any answer is right yet
        },
        "evaluation": {
            "count": 24,
            "max_new_tokens": 32,
            "profiles": ["full", "deployment"],
            "deployment": "compressed_tensors",
        },
    },
    "arms": {
        "bf16": {},
        "w4a4": {"start": {"arm": "bf16"}, "injection": {"mode": "w4a4", "deployment": "compressed_tensors"}},
        "aqn": {
            "injection": {"mode": "w4a16", "deployment": "compressed_tensors"},
            "noise": {"schedule": {"kind": "constant", "sigma": 0.05}},
        },
    },
}
# Its answers are hardly ever right yet, which the three steps of a preflight would name.
QUICK = ("--skip-preflight",)
PROGRAM = "from fp4rl.cli.main import entry; entry()"


def start(popen, spec, root):
    with spec.with_suffix(".log").open("w") as log:
        return popen(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, "run", str(spec), "--runs", str(root), *QUICK],
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
            # A shell tells what it runs in the background to ignore Ctrl-C, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def finish(popen, spec, root):
    process = start(popen, spec, root)
    assert process.wait(timeout=900) == 0, spec.with_suffix(".log").read_text()


def numbers(root):
    """Everything that a run measured, by run id, without times, and without which of two runs evaluated their start."""
    found = {}
    for run in finished_runs(root):
        metrics = {
            step: {name: value for name, value in values.items() if not name.startswith("time/")}
            for step, values in run.metrics().items()
        }
        items = {f"{step}-{name}": run.items(step, name).to_pylist() for step, name in run.item_sets()}
        evidence = [r.as_json() for r in run.evidence() if r.kind not in ("injection", "reused")]
        found[run.run_id] = (metrics, [e.as_json() for e in run.result().evaluations], items, evidence)
    return found


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_nothing(tmp_path, popen):
    spec = tmp_path / "killed.yaml"
    spec.write_text(yaml.safe_dump(SUITE))
    finish(popen, spec, tmp_path / "whole")

    root, moments, finished_at = tmp_path / "runs", random.Random(0), {}
    for kill in range(10):
        process = start(popen, spec, root)
        # Mostly inside the work, some during the imports; kill -9 of the parent alone, or Ctrl-C to the whole group.
        time.sleep(moments.uniform(3.0, 12.0) if kill % 3 else moments.uniform(0.2, 6.0))
        assert process.poll() is None, "the suite was over before the kill: give it more runs"
        if kill % 2:
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.kill()
        process.wait(timeout=240)
        for run in finished_runs(root):
            written = (run.path / "result.json").stat().st_mtime_ns
            assert finished_at.setdefault(run.run_id, written) == written, f"{run.run_id} ran twice"
    finish(popen, spec, root)
    for run_id, written in finished_at.items():
        assert (root / "killed" / run_id / "result.json").stat().st_mtime_ns == written
    assert len(all_runs(root)) == len(finished_runs(root)) == 30
    assert json.dumps(numbers(root), sort_keys=True) == json.dumps(numbers(tmp_path / "whole"), sort_keys=True)


@pytest.mark.slow
@pytest.mark.parametrize("moment", [1.5, 3.0, 5.0, 9.0])
def test_impatient_ctrl_c_is_one_line_and_no_flood(tmp_path, popen, moment):
    """Kind: an interrupt that meets the way out, or children that are still importing."""
    spec = tmp_path / "s.yaml"
    spec.write_text(yaml.safe_dump(SUITE))
    process = start(popen, spec, tmp_path / "runs")
    time.sleep(moment)
    for _ in range(6):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.05)
    assert process.wait(timeout=240) == 130
    said = spec.with_suffix(".log").read_text()
    assert said.splitlines()[-1] == "fp4rl: stopped; the same command continues where it left off"
    assert "Traceback" not in said
    # Behind the warning that evaluation.deployment is idle: the step it was in, what Ctrl-C does (two lines), what was
    # interrupted, and the last line. Six Ctrl-Cs say none of them twice.
    lines = said.partition("injection.deployment")[2].splitlines()[1:]
    assert len(lines) == len(set(lines)) <= 5, said


@pytest.mark.slow
def test_ctrl_c_ends_after_the_step_keeps_a_checkpoint_and_the_same_command_goes_on(tmp_path, popen):
    """With the defaults, that ask for no checkpoint; the message after Ctrl-C must be true."""
    spec, root = tmp_path / "long.yaml", tmp_path / "runs"
    base = {**SUITE["base"], "training": {**SUITE["base"]["training"], "steps": 250}}
    spec.write_text(yaml.safe_dump({**SUITE, "base": base, "suite": "long", "seeds": [0], "arms": {"bf16": {}}}))
    process = start(popen, spec, root)
    while process.poll() is None and not any(max(run.metrics(), default=0) >= 3 for run in all_runs(root)):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=240) == 130, spec.with_suffix(".log").read_text()
    said = spec.with_suffix(".log").read_text()
    assert "ending: each run keeps a checkpoint after the step it is in" in said
    assert said.rstrip().endswith("fp4rl: stopped; the same command continues where it left off")
    assert "Traceback" not in said
    (run,) = all_runs(root)
    done = max(run.metrics())
    assert f"interrupted bf16, seed 0: after step {done}, with a checkpoint" in " ".join(said.split())
    process = start(popen, spec, root)
    while process.poll() is None and max(run.metrics(), default=0) <= done:
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert f"resumed from the checkpoint after step {done}" in (run.path / "log.txt").read_text()
