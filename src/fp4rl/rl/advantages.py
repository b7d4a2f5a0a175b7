"""From rewards to advantages: each answer against the other answers of its own prompt."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from fp4rl.spec.algorithms import ADV_ESTIMATORS
from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest, require_names

# Added to a standard deviation before dividing. TRL adds 1e-4, verl 1e-6; 0/1 rewards notice neither.
EPSILON = 1e-4


def group_advantages(
    rewards: Tensor, rollout_n: int, adv_estimator: str = "grpo", norm_adv_by_std: bool = True
) -> Tensor:
    """Advantages of answers in consecutive groups of `rollout_n`, both [groups * rollout_n]; rewards of any dtype.

    A NaN reward (an answer that could not be scored) takes no part in its group and gets advantage 0.
    Raises InvalidValueError when the answers do not divide into groups of at least two, NotFoundError for an unknown
    estimator.
    """
    if rollout_n < 2 or rewards.dim() != 1 or rewards.numel() % rollout_n:
        raise InvalidValueError(
            f"{tuple(rewards.shape)} rewards do not make groups of {rollout_n}: give rollout_n >= 2 answers a prompt"
        )
    if adv_estimator not in ESTIMATORS:
        raise NotFoundError(f"no adv_estimator {adv_estimator!r}{nearest(adv_estimator, ESTIMATORS)}")
    grouped = rewards.float().view(-1, rollout_n)  # [groups, n]
    return ESTIMATORS[adv_estimator](grouped, norm_adv_by_std).nan_to_num(nan=0.0).flatten()


def _grpo(grouped: Tensor, by_std: bool) -> Tensor:
    """Reward minus the group's mean, over the group's standard deviation (arXiv 2402.03300); not `by_std`, Dr. GRPO
    (arXiv 2503.20783)."""
    centred = grouped - grouped.nanmean(-1, keepdim=True)
    return centred / (_nan_std(grouped, -1) + EPSILON) if by_std else centred


def _rloo(grouped: Tensor, _by_std: bool) -> Tensor:
    """Reward minus the mean of the *other* answers (arXiv 2402.14740)."""
    count = grouped.isfinite().sum(-1, keepdim=True)
    return (grouped - grouped.nanmean(-1, keepdim=True)) * count / (count - 1).clamp(min=1)


def _reinforce_plus_plus_baseline(grouped: Tensor, _by_std: bool) -> Tensor:
    """Reward minus the group's mean, over the standard deviation of the whole batch (arXiv 2501.03262)."""
    centred = grouped - grouped.nanmean(-1, keepdim=True)
    return centred / (_nan_std(centred.flatten(), 0) + EPSILON)


# Rewards [groups, n] (NaN: not scored), and whether to divide by the standard deviation -> advantages [groups, n].
ESTIMATORS: Mapping[str, Callable[[Tensor, bool], Tensor]] = MappingProxyType(
    {"grpo": _grpo, "rloo": _rloo, "reinforce_plus_plus_baseline": _reinforce_plus_plus_baseline}
)
require_names("adv_estimator", ESTIMATORS, ADV_ESTIMATORS)


def _nan_std(values: Tensor, dim: int) -> Tensor:
    """Unbiased standard deviation of the finite values along `dim` (kept); 0 where fewer than two are left."""
    count = values.isfinite().sum(dim, keepdim=True)
    centred = (values - values.nanmean(dim, keepdim=True)).nan_to_num(nan=0.0)
    return torch.sqrt(centred.square().sum(dim, keepdim=True) / (count - 1).clamp(min=1))
