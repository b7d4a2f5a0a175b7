"""Six runs, of which one crashes, one hangs, one is killed and one meets a full disk: nobody else loses anything."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fp4rl.lab.folders import all_runs

MISHAPS = """
import os, signal, time
from pathlib import Path

CALLS = []

def judged(answers, completions):
    return [float(str(answer) in completion) for answer, completion in zip(answers, completions)]

def once(name):
    \"\"\"True at the sixth batch of the first process that asks.\"\"\"
    CALLS.append(name)
    marker = Path(os.environ["MISHAPS"]) / name
    if CALLS.count(name) == 6 and not marker.exists():
        marker.touch()
        return True
    return False

def steady(prompts, completions, answers):
    return judged(answers, completions)

def crash(prompts, completions, answers):
    if once("crash"):
        os.abort()
    return judged(answers, completions)

def hang(prompts, completions, answers):
    while once("hang"):
        time.sleep(3600)
    return judged(answers, completions)

def killed(prompts, completions, answers):
    if once("killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    return judged(answers, completions)

def full(prompts, completions, answers):
    if once("full"):  # from now on its log lies on a device that has no room
        metrics = next(Path(os.environ["MISHAPS"]).glob("runs/misfortunes/full-s0-*/metrics.jsonl"))
        metrics.rename(metrics.with_suffix(".before"))
        metrics.symlink_to("/dev/full")
    return judged(answers, completions)
"""
ARMS = {name: {"training": {"reward": f"mishaps.{name}"}} for name in ("steady", "crash", "hang", "killed", "full")}
SUITE = {
    "suite": "misfortunes",
    "seeds": [0],
    "base": {
        "model": {"embedded": {"warm_up_steps": 60}},
        "task": {"name": "arithmetic", "difficulty": 1, "train_count": 64},
        "training": {
            "algorithm": "grpo",
            "steps": 8,
            "save_freq": 2,
            "train_batch_size": 4,
            "mini_batch_size": 2,
            "rollout_n": 4,
            "max_response_length": 24,
        },
        "evaluation": {"count": 24, "max_new_tokens": 24, "profiles": ["full"]},
    },
    "arms": ARMS | {"last": {"training": {"reward": "mishaps.steady", "steps": 7}}},
}


def fp4rl(tmp_path, *words):
    environment = os.environ | {
        "MISHAPS": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
        "COLUMNS": "80",
    }
    program = "from fp4rl.cli.main import entry; entry()"
    command = [sys.executable, "-W", "ignore", "-c", program, *words]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1500)


def numbers(run):
    steps = run.metrics().items()
    return {step: {name: v for name, v in values.items() if not name.startswith("time/")} for step, values in steps}


@pytest.mark.slow
def test_the_others_finish_the_reasons_are_right_and_the_same_command_completes_all(tmp_path):
    (tmp_path / "mishaps.py").write_text(MISHAPS)
    (tmp_path / "misfortunes.yaml").write_text(yaml.safe_dump(SUITE))
    first = fp4rl(tmp_path, "run", "misfortunes.yaml", "--stall-timeout", "1.5")
    assert first.returncode == 1, first.stderr
    assert "Traceback" not in first.stderr
    listed = {row["arm"]: row for row in json.loads(fp4rl(tmp_path, "runs", "--json").stdout)}
    status = {arm: row["status"] for arm, row in listed.items()}
    assert status == {
        "steady": "done",
        "last": "done",
        "crash": "lost",
        "hang": "failed",
        "killed": "lost",
        "full": "failed",
    }
    assert "SIGABRT" in listed["crash"]["why"]
    assert "SIGKILL" in listed["killed"]["why"]
    assert "it stalled at step 5 of 8 of training: no progress for 1.5" in listed["hang"]["why"]
    assert "is full" in listed["full"]["why"]
    assert all(listed[arm]["at"] for arm in ("crash", "hang", "killed", "full"))
    report = json.loads(fp4rl(tmp_path, "report", "misfortunes", "--json").stdout)
    assert {run["arm"]: (run["status"], run["why"]) for run in report["runs"]} == {
        arm: (row["status"], row["why"]) for arm, row in listed.items()
    }

    (log,) = tmp_path.glob("runs/misfortunes/full-s0-*/metrics.jsonl")  # there is room again
    log.unlink()
    Path(log.with_suffix(".before")).rename(log)
    second = fp4rl(tmp_path, "run", "misfortunes.yaml")
    assert second.returncode == 0, second.stderr
    runs = {
        run.spec()["training"]["reward"].partition(".")[2]: run for run in all_runs(tmp_path / "runs") if run.finished
    }
    assert len([run for run in all_runs(tmp_path / "runs") if run.finished]) == 6
    undisturbed = next(run for run in all_runs(tmp_path / "runs") if run.run_id.startswith("steady"))
    for arm in ("crash", "hang", "killed", "full"):
        assert numbers(runs[arm]) == numbers(undisturbed), arm
        began, resumed = runs[arm].attempts()
        # It goes on after the checkpoint of step 4; what it had done beyond, one step, is all that is repeated.
        assert (began["after_step"], resumed["after_step"]) == (0, 4)
        assert resumed["repeats_steps"] <= 1
    assert sum(a["repeats_steps"] for run in runs.values() for a in run.attempts()) <= 0.5 * 8
