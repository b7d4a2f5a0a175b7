"""Failures provoked on the embedded model: the monitor ends each run in time, and leaves a healthy one alone."""

import sys
from types import ModuleType

import pytest

from fp4rl.spec.experiment import Experiment

BASE = {
    "task": {"name": "arithmetic", "difficulty": 2},
    "training": {"steps": 24},
    "evaluation": {"count": 50, "profiles": ["full"]},
    "health": {"policy": "stop"},
}


@pytest.fixture(autouse=True)
def rewards(monkeypatch):
    """Rewards as a user would bring them: functions in a module of one's own."""
    module = ModuleType("brought_along")
    module.a_point_a_word = lambda completion, **_: 0.1 * len(completion.split())
    module.wrong_is_right = lambda completion, answer, **_: (
        -float(completion.split("####")[-1].replace(" ", "") == answer)
    )
    monkeypatch.setitem(sys.modules, "brought_along", module)


@pytest.fixture
def go(run):
    def started(**changes):
        content = {**BASE, **{k: {**BASE.get(k, {}), **v} for k, v in changes.items()}}
        return run(Experiment.model_validate(content))

    return started


def stopped_by(trained):
    return {alarm.check for alarm in trained.evidence.health.alarms}


@pytest.mark.slow
def test_a_learning_rate_of_5e_3_is_stopped(go):
    trained, heard = go(training={"steps": 24, "lr": 5e-3})
    assert trained.steps_done <= 10
    assert stopped_by(trained) & {"accuracy_collapse", "no_spread", "dead_rollouts"}
    assert heard.steps[0][1]["accuracy/rollout"] > 0.3 > 10 * heard.steps[-1][1]["accuracy/rollout"]


@pytest.mark.slow
def test_noise_of_0_05_on_linear_weights_is_stopped(go):
    noise = {"schedule": {"kind": "constant", "sigma": 0.05}, "targets": {"kinds": ["linear"]}}
    trained, heard = go(noise=noise)
    assert trained.steps_done <= 10
    assert "mismatch" in stopped_by(trained)
    assert heard.steps[-1][1]["accuracy/rollout"] < 0.1


@pytest.mark.slow
def test_a_reward_for_length_without_a_penalty_is_stopped(go):
    trained, heard = go(
        training={
            "steps": 24,
            "lr": 1e-3,
            "reward": "brought_along.a_point_a_word",
            "overlong_buffer": {"enable": False},
            "filter_groups": {"enable": False},
        }
    )
    assert trained.steps_done <= 12
    assert stopped_by(trained) & {"accuracy_collapse", "length_explosion", "reward_hacking"}
    assert heard.steps[-1][1]["response_length/mean"] > 1.4 * heard.steps[0][1]["response_length/mean"]


@pytest.mark.slow
def test_a_reward_of_the_wrong_sign_is_stopped_before_anything_is_lost(go):
    trained, heard = go(training={"steps": 24, "reward": "brought_along.wrong_is_right"})
    assert trained.steps_done <= 4
    assert stopped_by(trained) == {"reward_hacking"}
    assert all(metrics["reward/accuracy_correlation"] < -0.9 for _, metrics in heard.steps)


@pytest.mark.slow
@pytest.mark.parametrize("injection", [None, {"mode": "w4a16", "deployment": "compressed_tensors"}])
def test_a_healthy_run_goes_to_its_end_without_an_alarm(injection, go):
    changes = {"injection": injection} if injection else {}
    trained, heard = go(**changes)
    assert trained.steps_done == 24
    assert stopped_by(trained) == set()
    assert heard.steps[-1][1]["accuracy/rollout"] > heard.steps[0][1]["accuracy/rollout"]
