"""From rewards to advantages: each answer against the other answers of its own prompt."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest

# Added to a standard deviation before dividing. TRL adds 1e-4, verl 1e-6; 0/1 rewards notice neither.
EPSILON = 1e-4

ADV_ESTIMATORS = ("grpo", "rloo", "reinforce_plus_plus_baseline")


@dataclass(frozen=True)
class Advantages:
    """`values` [answers]; `group_mean`, `group_std` [groups], std unbiased (n - 1)."""

    values: Tensor
    group_mean: Tensor
    group_std: Tensor

    def share_without_spread(self, tolerance: float = 1e-6) -> float:
        """Share of groups whose answers all earned the same: they teach nothing."""
        return (self.group_std <= tolerance).float().mean().item()


def group_advantages(
    rewards: Tensor, rollout_n: int, adv_estimator: str = "grpo", norm_adv_by_std: bool = True
) -> Advantages:
    """Advantages of answers in consecutive groups of `rollout_n`. rewards [groups * rollout_n], any float dtype.

    - `grpo`: reward minus the group's mean, over the group's standard deviation if `norm_adv_by_std`
      (arXiv 2402.03300; without it Dr. GRPO, arXiv 2503.20783).
    - `rloo`: minus the mean of the *other* answers (arXiv 2402.14740); `norm_adv_by_std` does not apply.
    - `reinforce_plus_plus_baseline`: minus the group's mean, over the standard deviation of the whole batch
      (arXiv 2501.03262).

    A NaN reward (an answer that could not be scored) takes no part in its group and gets advantage 0.
    Raises InvalidValueError when the answers do not divide into groups of at least two, NotFoundError for an unknown
    estimator.
    """
    if rollout_n < 2 or rewards.dim() != 1 or rewards.numel() % rollout_n:
        raise InvalidValueError(
            f"{tuple(rewards.shape)} rewards do not make groups of {rollout_n}: give rollout_n >= 2 answers a prompt"
        )
    grouped = rewards.float().view(-1, rollout_n)  # [groups, n]
    mean = grouped.nanmean(-1, keepdim=True)
    std = _nan_std(grouped, -1)
    values = (_centred(grouped, mean, std, adv_estimator, norm_adv_by_std)).nan_to_num(nan=0.0)
    return Advantages(values.flatten(), mean.squeeze(-1), std.squeeze(-1))


def _centred(grouped: Tensor, mean: Tensor, std: Tensor, estimator: str, by_std: bool) -> Tensor:
    match estimator:
        case "grpo":
            return (grouped - mean) / (std + EPSILON) if by_std else grouped - mean
        case "rloo":
            count = grouped.isfinite().sum(-1, keepdim=True)
            return (grouped - mean) * count / (count - 1).clamp(min=1)
        case "reinforce_plus_plus_baseline":
            centred = grouped - mean
            return centred / (_nan_std(centred.flatten(), 0) + EPSILON)
        case _:
            raise NotFoundError(f"no adv_estimator {estimator!r}{nearest(estimator, ADV_ESTIMATORS)}")


def _nan_std(values: Tensor, dim: int) -> Tensor:
    """Unbiased standard deviation of the finite values along `dim` (kept); 0 where fewer than two are left."""
    count = values.isfinite().sum(dim, keepdim=True)
    centred = (values - values.nanmean(dim, keepdim=True)).nan_to_num(nan=0.0)
    return torch.sqrt(centred.square().sum(dim, keepdim=True) / (count - 1).clamp(min=1))
