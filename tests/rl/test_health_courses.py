"""The monitor on whole runs: healthy ones stay quiet, and each way to fail is caught within ten steps of its onset.

Courses here are synthesised. Those of failures seen for real follow the numbers measured on the embedded model;
an isolated collapse of entropy, a mismatch that grows and a NaN were never provoked and are made up.
"""

from math import exp
from random import Random

import pytest

from fp4rl.rl.health.monitor import Monitor, last_healthy, replay

ONSET = 30


def healthy(seed, steps=200):
    """A run that learns: accuracy climbs with the noise of 16 prompts x 8 answers, entropy and length drift."""
    random = Random(seed)
    start, end = random.uniform(0.03, 0.6), random.uniform(0.7, 0.99)
    tau, entropy, entropy_end = random.uniform(10, 80), random.uniform(0.05, 0.6), random.uniform(0.08, 1.5)
    length, growth = random.uniform(15, 800), random.choice([0.8, 1.0, 1.2, 3.0])
    grad, mismatch = random.uniform(0.05, 1.0), random.choice([1e-9, 3e-4, 3e-3])
    rows = []
    for step in range(1, steps + 1):
        done = 1 - exp(-step / tau)
        accuracy = start + (end - start) * done
        seen = min(1.0, max(0.0, random.gauss(accuracy, (accuracy * (1 - accuracy) / 40) ** 0.5)))
        spike = 6.0 if random.random() < 0.01 else 1.0
        rows.append(
            {
                "accuracy/rollout": seen,
                "reward/mean": seen - abs(random.gauss(0.01, 0.005)),
                "entropy": entropy * (1 + (entropy_end - 1) * done) * exp(random.gauss(0, 0.06)),
                "response_length/mean": length * (1 + (growth - 1) * done) * exp(random.gauss(0, 0.04)),
                "response_length/clip_ratio": min(1.0, abs(random.gauss(0.01, 0.01))),
                "grad_norm": grad * exp(random.gauss(0, 0.4)) * spike,
                "policy_loss": random.gauss(0, 0.02),
                "sampling/dropped_share": min(1.0, max(0.0, random.gauss(0.2 + 0.6 * seen, 0.08))),
                "rollout_corr/k3_kl": mismatch * exp(random.gauss(0, 0.3)),
            }
        )
    return rows


def falls(before, after, over):
    """A value that goes from `before` to `after`, mostly within `over` steps."""
    return lambda t: after + (before - after) * exp(-2.5 * t / over)


def ill(seed, steps=ONSET + 40, **courses):
    """The healthy run of `seed`, whose metrics follow `courses` (of the steps since the onset) from ONSET on."""
    random = Random(seed)
    rows = healthy(seed, steps)
    for t, row in enumerate(rows[ONSET:]):
        for name, course in courses.items():
            row[NAMES[name]] = max(0.0, course(t) * exp(random.gauss(0, 0.05)))
    return rows


NAMES = {
    "accuracy": "accuracy/rollout",
    "reward": "reward/mean",
    "entropy": "entropy",
    "length": "response_length/mean",
    "truncated": "response_length/clip_ratio",
    "grad": "grad_norm",
    "dropped": "sampling/dropped_share",
    "mismatch": "rollout_corr/k3_kl",
}


def at_onset(seed):
    """Signals of the healthy run right before the onset."""
    row = healthy(seed, ONSET)[-1]
    return {name: row[key] for name, key in NAMES.items()}


def learning_rate_too_high(seed):
    """Seen for real: learning rate 5e-3. Accuracy .35 -> 0 in 5 to 10 steps, length 17 -> 6, entropy .09 -> .29."""
    was = at_onset(seed)
    return ill(
        seed,
        accuracy=falls(was["accuracy"], 0.0, 8),
        reward=falls(was["accuracy"], 0.0, 8),
        length=falls(was["length"], was["length"] * 6 / 17, 8),
        entropy=falls(was["entropy"], was["entropy"] * 3.2, 8),
        dropped=falls(was["dropped"], 1.0, 8),
        grad=falls(was["grad"], 0.0, 3),
    )


def length_reward(seed):
    """Seen for real: a reward of 0.1 a token. Length 20 -> 48, the cap; 99.5 % cut off; accuracy to 0; reward up."""
    was = at_onset(seed)
    return ill(
        seed,
        accuracy=falls(was["accuracy"], 0.0, 10),
        length=falls(was["length"], was["length"] * 2.4, 10),
        truncated=falls(0.0, 0.995, 10),
        reward=falls(was["reward"], was["reward"] + 3.0, 10),
    )


def noise_on_weights(seed):
    """Seen for real: noise 0.05 on linear weights. Rollout accuracy .19 -> .008, entropy .08 -> .136, at once."""
    was = at_onset(seed)
    return ill(
        seed, accuracy=lambda _: was["accuracy"] * 0.04, reward=lambda _: 0.0, entropy=lambda _: was["entropy"] * 1.7
    )


def wrong_sign(seed):
    """The advantage with its sign flipped: what was rewarded is unlearned."""
    was = at_onset(seed)
    return ill(seed, accuracy=falls(was["accuracy"], 0.0, 12), reward=falls(was["accuracy"], 0.0, 12))


def entropy_collapse_alone(seed):
    """Never provoked: entropy falls twenty-fold in a few steps while accuracy stands still."""
    was = at_onset(seed)
    return ill(seed, entropy=falls(was["entropy"], was["entropy"] / 50, 4), accuracy=lambda _: was["accuracy"])


def mismatch_that_grows(seed):
    """Never provoked: the sampler drifts away from the trainer."""
    was = at_onset(seed)
    return ill(seed, mismatch=lambda t: was["mismatch"] + 0.01 * t)


def all_cut_off(seed):
    """The end token is forgotten."""
    return ill(seed, truncated=falls(0.0, 1.0, 4))


FAILURES = {
    learning_rate_too_high: {"accuracy_collapse"},
    length_reward: {"length_explosion", "reward_hacking"},
    noise_on_weights: {"accuracy_collapse"},
    wrong_sign: {"accuracy_collapse"},
    entropy_collapse_alone: {"entropy_collapse"},
    mismatch_that_grows: {"mismatch"},
    all_cut_off: {"dead_rollouts"},
}


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


def test_healthy_runs_raise_at_most_one_false_alarm_in_a_thousand_steps():
    runs = [replay(numbered(healthy(seed)))[0] for seed in range(100)]
    steps = sum(run.steps for run in runs)
    alarms = [alarm for run in runs for alarm in run.alarms]
    assert steps == 20_000
    assert len(alarms) <= steps / 1000, [str(a) for a in alarms]


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
    from fp4rl.lab.foreign.importer import read_log

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
    assert resumed.standing() == whole.standing()


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
