"""The signals that the monitor watches, and the names under which trainers and their older versions log them."""

import re
from collections.abc import Mapping

# Older TRL and ms-swift, OpenRLHF, slime, and TRL's PPO -> the name of TRL today.
_TODAY: Mapping[str, str] = {
    "completion_length": "completions/mean_length",
    "response_length": "completions/mean_length",
    "rollout/response_lengths": "completions/mean_length",
    "tokens/responses_len_mean": "completions/mean_length",
    "response_clip_ratio": "completions/clipped_ratio",
    "rollout/truncated": "completions/clipped_ratio",
    "objective/entropy": "entropy",
    "entropy_loss": "entropy",
    "pg_loss": "policy_loss",
    "loss/policy_avg": "policy_loss",
}
# Prefixes of phases: TensorBoard and W&B show `train/loss` for what the trainer itself calls `loss`.
_PHASES = (("train/", ""), ("eval/", "eval_"))
# TRL: rewards/<function>/mean; older versions and ms-swift: rewards/<function>.
_FUNCTION = re.compile(r"(eval_)?rewards/([^/]+)(?:/mean)?")
_STATISTICS = ("mean", "std", "min", "max")
_SAYS_SOLVED = re.compile(r"acc|correct|solved|exact", re.IGNORECASE)
_REWARD = re.compile(
    r"(?:[\w.-]+/)?(?:mean_|avg_|raw_|total_|episode_)?(?:rewards?|scores?|return)(?:[/_](?:mean|avg))?", re.IGNORECASE
)
_OTHER_PHASE = re.compile(r"(?:eval|val|valid|validation|test)(?:[-_/]|$)", re.IGNORECASE)


def known_names(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return `metrics` with today's names added for older ones; no number is replaced."""
    known = dict(metrics)
    for phase, name in _PHASES:
        known |= {name + key.removeprefix(phase): metrics[key] for key in metrics if key.startswith(phase)} | known
    known |= {new: known[old] for old, new in _TODAY.items() if old in known and new not in known}
    return _rewards(known) | known


def _rewards(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return accuracy and total reward from the reward functions, whatever their names.

    Accuracy is the function whose name says so, the total their sum. Without functions, the shortest name that means a
    reward is the total.
    """
    functions: dict[str, dict[str, float]] = {"": {}, "eval_": {}}
    for name, value in metrics.items():
        match = _FUNCTION.fullmatch(name)
        if match and match[2] not in _STATISTICS:
            functions[match[1] or ""][match[2]] = value
    rewards: dict[str, float] = {}
    for phase, means in functions.items():
        solved = [mean for name, mean in means.items() if _SAYS_SOLVED.search(name)]
        rewards |= {f"{phase}rewards/accuracy_reward/mean": mean for mean in solved[:1]}
    total = [name for name in metrics if _REWARD.fullmatch(name) and not _OTHER_PHASE.match(name)]
    if functions[""]:
        rewards["reward"] = sum(functions[""].values())
    elif total:
        rewards["reward"] = metrics[min(total, key=lambda name: (len(name), name))]
    return rewards


# First name found wins. Ours, then verl's (`actor/`, `critic/`, `training/`), then TRL's (`completions/`, `frac_`).
NAMES: Mapping[str, tuple[str, ...]] = {
    "accuracy": ("accuracy/rollout", "critic/acc/mean", "train/acc", "rewards/accuracy_reward/mean"),
    "reward": ("reward/mean", "critic/rewards/mean", "critic/score/mean", "reward"),
    "reward_accuracy": ("reward/accuracy_correlation",),
    "validation": ("accuracy/validation", "eval/accuracy", "eval_rewards/accuracy_reward/mean"),
    "entropy": ("entropy", "actor/entropy", "actor/entropy_loss"),
    "length": ("response_length/mean", "completions/mean_length"),
    "truncated": ("response_length/clip_ratio", "completions/clipped_ratio"),
    "empty": ("response_length/empty_ratio", "response/empty_ratio"),
    "repetition": ("response/repetition",),
    "grad_norm": ("grad_norm", "actor/grad_norm"),
    "loss": ("policy_loss", "actor/pg_loss", "loss"),
    "no_spread": ("reward/no_spread", "sampling/dropped_share", "frac_reward_zero_std"),
    "answers": ("rollout/answers",),
    "groups": ("rollout/groups",),
    "validated": ("accuracy/validation_answers",),
    "mismatch_kl": ("rollout_corr/k3_kl",),
    "mismatch_probability": ("training/rollout_probs_diff_mean",),
    "mismatch_phases": ("rollout_corr/phase_k3_kl",),
    "described_kl": ("rollout_corr/described_k3_kl",),
    "described_probability": ("rollout_corr/described_probs_diff",),
    "decoding_kl": ("rollout_corr/decode_k3_kl",),
    "decoding_probability": ("rollout_corr/decode_probs_diff",),
    "effective": ("rollout_corr/rollout_is_eff_sample_size",),
}

# A step in which no group had spread makes no update; the values that it logs for these mean nothing.
_OF_AN_UPDATE = ("entropy", "loss", "grad_norm")

# verl names validation after the data set: val-core/openai/gsm8k/acc/mean@1, val/test_score/openai/gsm8k.
_VALIDATION = re.compile(r"val-core/.+/(?:acc|reward|score)/mean@\d+|val/test_score/.+")


def signals_of(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the signals that one step's metrics hold; non-finite values are kept, so that they can be noticed.

    Validation on several data sets is averaged. Where accuracy is not logged, a reward that is a share of solved
    answers (verl's `critic/score`, with its smallest and largest value in 0..1) stands in for it.
    """
    metrics = known_names(metrics)
    logged = {signal: next((n for n in names if n in metrics), None) for signal, names in NAMES.items()}
    signals = {signal: metrics[name] for signal, name in logged.items() if name is not None}
    if metrics.get("sampling/trained_groups") == 0:
        for signal in _OF_AN_UPDATE:
            signals.pop(signal, None)
    if signals.get("no_spread") == 1.0 and signals.get("grad_norm") == 0.0:
        del signals["grad_norm"]  # a step with nothing to learn is the matter of `no_spread`
    if "validation" not in signals:
        values = [value for name, value in metrics.items() if _VALIDATION.fullmatch(name)]
        if values:
            signals["validation"] = sum(values) / len(values)
    if "accuracy" not in signals and "reward" in signals and _is_share(metrics):
        signals["accuracy"] = signals["reward"]
    return signals


def _is_share(metrics: Mapping[str, float]) -> bool:
    low, high = metrics.get("critic/score/min"), metrics.get("critic/score/max")
    return low is not None and high is not None and low >= 0.0 and high <= 1.0
