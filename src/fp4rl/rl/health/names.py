"""Names that other trainers and older versions log under, told as the names that the monitor knows."""

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
# A trainer's name of the phase: TensorBoard and W&B show `train/loss` for what the trainer itself calls `loss`.
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
    """`metrics`, and beside them what stands there under another name; no number of theirs is replaced."""
    known = dict(metrics)
    for phase, name in _PHASES:
        known |= {name + key.removeprefix(phase): metrics[key] for key in metrics if key.startswith(phase)} | known
    known |= {new: known[old] for old, new in _TODAY.items() if old in known and new not in known}
    return _rewards(known) | known


def _rewards(metrics: Mapping[str, float]) -> dict[str, float]:
    """What the reward functions are, whatever their names: the one that says it is accuracy, and their sum.

    Where no total and no function is logged, the shortest name that means a reward is the total.
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
