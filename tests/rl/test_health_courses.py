"""The monitor on whole runs: healthy ones stay quiet, and each way to fail is caught within ten steps of its onset.

The courses are synthesised in `benchmarks/planted/courses.py`; `benchmarks/health.py` measures real runs too.
"""

import json
from pathlib import Path

import pytest

from fp4rl.rl.health.monitor import Monitor, last_healthy, replay
from planted.courses import FAILURES, ONSET, all_cut_off, healthy, length_reward, long, of_few_answers


def numbered(rows):
    return enumerate(rows, start=1)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("failure", FAILURES, ids=lambda f: f.__name__)
def test_a_failure_is_an_alarm_within_ten_steps_of_its_onset(failure, seed):
    monitor, _ = replay(numbered(failure(seed)))
    alarms = {a.check: a for a in reversed(monitor.alarms)}
    expected = FAILURES[failure] & set(alarms)
    assert expected, f"only {sorted(alarms)}"
    first = min(alarms[check].step for check in expected)
    assert ONSET < first <= ONSET + 10
    assert all(a.step > ONSET for a in monitor.alarms)


@pytest.mark.parametrize(("course", "runs"), [(healthy, 25), (of_few_answers, 30), (long, 4)])
def test_healthy_runs_raise_at_most_one_false_alarm_in_a_thousand_steps(course, runs):
    """Kind: a healthy set that leaves out a class hides its alarms: few answers, rewards below zero, long runs."""
    monitors = [replay(numbered(course(seed)))[0] for seed in range(runs)]
    steps = sum(run.steps for run in monitors)
    alarms = [alarm for run in monitors for alarm in run.alarms]
    assert steps > 4000
    assert len(alarms) <= steps / 1000, [str(a) for a in alarms]


WRONG_SIGN = Path(__file__).parents[1] / "data" / "health" / "reward_of_the_wrong_sign.jsonl"


@pytest.mark.parametrize(
    "logged, check, latest", [(True, "reward_hacking", 4), (False, "accuracy_collapse", 9)], ids=["ours", "older logs"]
)
def test_a_reward_of_the_wrong_sign_from_the_first_step_on_is_seen_in_time(logged, check, latest):
    """Kind: a failure that leaves no healthy step to fall from. The real course of a run with 64 answers a step: .36
    in the first, .11 in the third. The monitor took 12 steps; what reward and accuracy have in common says it in two.
    """
    rows = [json.loads(line) for line in WRONG_SIGN.read_text(encoding="utf-8").splitlines()]
    if not logged:
        rows = [{name: value for name, value in row.items() if name != "reward/accuracy_correlation"} for row in rows]
    monitor, _ = replay(numbered(rows))
    assert (monitor.alarms[0].check, monitor.alarms[0].step) == (check, latest)


def test_long_reasoning_that_pays_off_is_no_alarm():
    rows = healthy(0)
    for step, row in numbered(rows):
        row["response_length/mean"] = 300 * (1 + step / 20)
        row["response_length/clip_ratio"] = 0.05
    assert replay(numbered(rows))[0].healthy


def test_entropy_that_fades_as_in_public_healthy_runs_is_no_alarm():
    """.336 -> .06 over 100 steps in a public run, .05 -> .025 on the embedded model; five of six fall below 0.1."""
    for first, last in ((0.336, 0.02), (0.05, 0.0025)):
        rows = healthy(1, 300)
        for step, row in numbered(rows):
            row["entropy"] = first * (last / first) ** (step / 300)
        assert replay(numbered(rows))[0].healthy


def test_a_solved_task_is_a_watch_and_no_alarm():
    rows = healthy(2)
    for row in rows[100:]:
        row |= {"accuracy/rollout": 1.0, "reward/mean": 1.0, "sampling/dropped_share": 1.0, "grad_norm": 0.0}
    monitor, _ = replay(numbered(rows))
    assert monitor.healthy
    assert monitor.state == "watch"


def test_the_public_healthy_log_is_judged_healthy(shared_data):
    from fp4rl.lab.foreign.reader import read_log

    dialect, log = read_log(shared_data / "logs" / "grpo_like_healthy_verl.log")
    monitor, said = replay(log.in_order().items())
    assert dialect == "verl"
    assert monitor.steps == 106
    assert monitor.healthy
    assert said == []


def test_a_resumed_run_that_replays_its_metrics_judges_as_the_uninterrupted_one():
    rows = length_reward(3)
    whole, _ = replay(numbered(rows))
    resumed, _ = replay(list(numbered(rows))[: ONSET + 4])
    for step, row in list(numbered(rows))[ONSET + 4 :]:
        resumed.observe(step, row)
    assert resumed.alarms == whole.alarms
    assert resumed.findings() == whole.findings()


def test_the_checkpoint_to_go_back_to_lies_before_the_onset():
    monitor, _ = replay(numbered(all_cut_off(0)))
    assert last_healthy([10, 20, 30, 40], monitor.alarms) == 30
    assert last_healthy([40, 50], monitor.alarms) is None
    assert last_healthy([10, 20], []) == 20


def test_an_alarm_says_since_when_and_ends_after_as_many_good_steps():
    rows = healthy(4, 60)
    for row in rows[29:40]:
        row["response_length/clip_ratio"] = 1.0
    monitor = Monitor()
    said = [f for step, row in numbered(rows) for f in monitor.observe(step, row) if f.check == "dead_rollouts"]
    assert [(f.state, f.step, f.since) for f in said] == [("watch", 30, 30), ("alarm", 32, 30), ("ok", 43, 43)]
