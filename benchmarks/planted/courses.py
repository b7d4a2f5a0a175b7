"""Synthesised courses of metrics: healthy runs, and failures that begin at a known step of one.

Those of failures seen for real follow the numbers measured on the embedded model; `NEVER_PROVOKED` are made up.
"""

from math import exp, nan
from random import Random

ONSET = 30
"""Healthy steps before a failure begins."""


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


def _of_few(random, chance, prompts, answers):
    """(share of right answers, share of groups that are all right or all wrong); prompts differ in difficulty."""
    chance = min(max(chance, 1e-6), 1 - 1e-6)
    difficulty = [random.betavariate(chance, 1 - chance) for _ in range(prompts)]
    right = [sum(random.random() < p for _ in range(answers)) for p in difficulty]
    return sum(right) / (prompts * answers), sum(r in (0, answers) for r in right) / prompts


def of_few_answers(seed, steps=200):
    """A run on one small GPU: 4 or 8 answers a step, of which the log lets on only the shares; reward or accuracy."""
    random = Random(seed)
    prompts, answers = random.choice([(1, 4), (1, 8), (2, 4), (4, 2)])
    start, gain = random.uniform(0.15, 0.6), random.choice([0.0, 0.1, 0.3])
    shift, size = random.choice([(0.0, 1.0), (-1.0, 2.0), (-0.5, 1.0)])
    rows = []
    for step in range(1, steps + 1):
        share, unspread = _of_few(random, start + gain * step / steps, prompts, answers)
        cut, _ = _of_few(random, 0.05, prompts, answers)
        rows.append(
            {
                "reward": shift + size * share,
                "frac_reward_zero_std": unspread,
                "entropy": 0.4 * exp(-step / steps) * exp(random.gauss(0, 0.4)),
                "completions/mean_length": 150 * exp(random.gauss(0, 0.35)),
                "completions/clipped_ratio": cut,
                "grad_norm": 0.0 if unspread == 1.0 else 0.3 * exp(random.gauss(0, 0.8)),
                "loss": random.gauss(0, 0.02),
            }
        )
    return rows


def long(seed):
    """A healthy run of 1,120 steps whose entropy falls to a twentieth, with single spikes of the gradient.

    Validated every 20 steps on 200 problems.
    """
    random = Random(seed)
    rows = healthy(seed, 1120)
    for step, row in enumerate(rows, start=1):
        row["entropy"] = 0.4 * 0.05 ** (step / 1120) * exp(random.gauss(0, 0.08))
        row["grad_norm"] *= random.choice([8.0, 40.0]) if random.random() < 0.004 else 1.0
        if step % 20 == 0:
            level = min(0.95, row["accuracy/rollout"])
            row["accuracy/validation"] = sum(random.random() < level for _ in range(200)) / 200
    return rows


HEALTHY = {
    healthy: ", 128 answers a step",
    of_few_answers: ", 4 or 8 answers a step, half of them with rewards that cross zero",
    long: ", 1,120 steps long",
}
"""Course -> what is special about it."""


def falls(before, after, over):
    """A value that goes from `before` to `after`, mostly within `over` steps."""
    return lambda t: after + (before - after) * exp(-2.5 * t / over)


def ill(seed, steps=ONSET + 40, **courses):
    """The healthy run of `seed`, whose metrics follow `courses` (of the steps since the onset) from ONSET on."""
    random = Random(seed)
    rows = healthy(seed, steps)
    for t, row in enumerate(rows[ONSET:]):
        for name, course in courses.items():
            value = course(t) * exp(random.gauss(0, 0.05))
            row[NAMES[name]] = value if value != value else max(0.0, value)
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
    "loss": "policy_loss",
    "empty": "response_length/empty_ratio",
    "repetition": "response/repetition",
}


def at_onset(seed):
    """Signals of the healthy run right before the onset."""
    row = healthy(seed, ONSET)[-1]
    return {name: row.get(key, 0.0) for name, key in NAMES.items()}


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


def answers_empty(seed):
    """Never provoked: the policy ends its answers at once."""
    was = at_onset(seed)
    return ill(
        seed,
        empty=falls(0.0, 1.0, 6),
        length=falls(was["length"], 1.0, 6),
        accuracy=falls(was["accuracy"], 0.0, 6),
    )


def answers_in_circles(seed):
    """Never provoked: the same few tokens again and again, although answers still end."""
    return ill(seed, repetition=falls(0.02, 0.9, 6))


def entropy_explodes(seed):
    """Never provoked alone: entropy rises eight-fold while accuracy stands still."""
    was = at_onset(seed)
    return ill(seed, entropy=falls(was["entropy"], was["entropy"] * 8, 8), accuracy=lambda _: was["accuracy"])


def gradient_bursts(seed):
    """Never provoked: the gradient is 200 times its usual size and stays there."""
    was = at_onset(seed)
    return ill(seed, grad=lambda _: 200 * was["grad"])


def loss_is_nan(seed):
    """The loss is NaN from the onset on."""
    return ill(seed, loss=lambda _: nan)


def length_creeps(seed):
    """Seen in a log: answers grow 2.6 times and the share cut off from 0.4 to 49 %, while reward stays where it was.

    There it took 50 steps; here a third is passed 6 steps after the onset.
    """
    was = at_onset(seed)
    return ill(
        seed,
        length=falls(was["length"], 2.6 * was["length"], 12),
        truncated=falls(0.004, 0.49, 12),
        reward=lambda _: was["reward"],
        accuracy=lambda _: was["accuracy"],
    )


def constant_reward(seed):
    """Seen for real: every answer earns the same, while the filter looks at accuracy and keeps its groups."""
    rows = ill(seed, accuracy=lambda _: 0.6)  # beyond 0.9 the task would be solved
    for step, row in enumerate(rows):
        row |= {"rollout/groups": 16.0, "reward/no_spread": 1.0 if step >= ONSET else row["sampling/dropped_share"]}
    return rows


SEEN = {
    learning_rate_too_high: {"accuracy_collapse"},
    length_reward: {"length_explosion", "reward_hacking"},
    noise_on_weights: {"accuracy_collapse"},
    wrong_sign: {"accuracy_collapse"},
    all_cut_off: {"dead_rollouts"},
    length_creeps: {"length_explosion", "dead_rollouts"},
    constant_reward: {"no_spread"},
    loss_is_nan: {"not_a_number"},
}
"""Course -> the checks that must raise the alarm."""
NEVER_PROVOKED = {
    entropy_collapse_alone: {"entropy_collapse"},
    entropy_explodes: {"entropy_explosion"},
    mismatch_that_grows: {"mismatch"},
    answers_empty: {"dead_rollouts"},
    answers_in_circles: {"dead_rollouts"},
    gradient_bursts: {"gradient"},
}
FAILURES = {**SEEN, **NEVER_PROVOKED}
