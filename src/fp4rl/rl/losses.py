"""Policy losses as one composition, ratio level x clipping x aggregation x KL, of which DAPO and GRPO are values.

r      = pi(token) / pi_old(token), or the geometric mean of that over the answer   `ratio_level`
ppo    = -min(r A, clip(r, 1 - low, 1 + high) A)                                    `clipping`
cispo  = -sg[clip(r, 1 - low, 1 + high)] A log pi
loss   = aggregate(ppo or cispo) + kl_loss_coef * aggregate(KL(pi || reference))
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from fp4rl.rl.aggregation import Whole, aggregate
from fp4rl.rl.divergence import SAFE_LOG_RATIO, kl_per_token
from fp4rl.spec.algorithms import ALGORITHMS
from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest, require_names


@dataclass(frozen=True)
class LossRule:
    """One policy loss under verl's names.

    `clip_ratio_low`, `clip_ratio_high` are distances from 1. `clip_ratio_c` bounds the ratio of tokens with a negative
    advantage (dual-clip PPO, arXiv 1912.09729; TRL's `delta`); None leaves it open. `loss_scale_factor` is needed by
    aggregations over the longest answer alone: the tokens it may have.
    """

    name: str
    ratio_level: str
    clipping: str
    clip_ratio_low: float
    clip_ratio_high: float
    loss_agg_mode: str
    clip_ratio_c: float | None = None
    loss_scale_factor: int | None = None
    kl_loss_coef: float = 0.0
    kl_loss_type: str = "low_var_kl"


def loss_named(name: str) -> LossRule:
    """The loss of an algorithm with its published numbers, and without a KL. Raises NotFoundError."""
    if name not in ALGORITHMS:
        raise NotFoundError(f"no policy loss {name!r}{nearest(name, ALGORITHMS)}")
    own = ALGORITHMS[name]
    return LossRule(name, own.ratio_level, own.clipping, own.clip_ratio_low, own.clip_ratio_high, own.loss_agg_mode)


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch. B answers of up to T tokens.

    `logps` [B, T] carries the gradient. `advantages` [B] or [B, T]. `mask` [B, T], 1 where a token counts.
    `old_logps` [B, T]: the policy at the start of the updates; None means this very policy (first update, on-policy),
    so that no second forward is needed. `ref_logps` [B, T]: the reference, needed when kl_loss_coef > 0.
    `weights` [B, T] or [B, 1]: importance weights of the rollout correction. `whole`: what the optimizer step counts;
    None says that this batch is the whole step.
    """

    logps: Tensor
    advantages: Tensor
    mask: Tensor
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    weights: Tensor | None = None
    whole: Whole | None = None


@dataclass(frozen=True)
class LossOutputs:
    """`loss`: a scalar with gradient. `metrics`: detached scalars, means over the tokens of this micro-batch."""

    loss: Tensor
    metrics: Mapping[str, Tensor]


def policy_loss(inputs: LossInputs, rule: LossRule) -> LossOutputs:
    """The loss of one micro-batch; the sum over the micro-batches of a step is the loss of the step.

    Raises InvalidValueError when the rule asks for a reference that is not given, or the shapes do not fit.
    """
    _check(inputs, rule)
    advantages = inputs.advantages if inputs.advantages.dim() == 2 else inputs.advantages.unsqueeze(-1)
    old_logps = inputs.logps.detach() if inputs.old_logps is None else inputs.old_logps
    log_ratio = (inputs.logps - old_logps).masked_fill(inputs.mask == 0, 0.0)  # padding may hold anything
    log_ratio = log_ratio.clamp(-SAFE_LOG_RATIO, SAFE_LOG_RATIO)
    ratio = RATIO_LEVELS[rule.ratio_level](log_ratio, inputs.mask).exp()  # [B, T] or [B, 1]
    per_token = CLIPPINGS[rule.clipping](ratio, inputs.logps, advantages, rule)
    if inputs.weights is not None:
        per_token = per_token * inputs.weights.detach()
    whole = inputs.whole or Whole.of(inputs.mask)
    loss = aggregate(per_token, inputs.mask, rule.loss_agg_mode, whole, rule.loss_scale_factor)
    metrics = {"policy_loss": loss.detach(), **_ratio_metrics(ratio, log_ratio, advantages, inputs.mask, rule)}
    if rule.kl_loss_coef and inputs.ref_logps is not None:
        kl = kl_per_token(inputs.logps, inputs.ref_logps, rule.kl_loss_type)
        kl_loss = aggregate(kl, inputs.mask, rule.loss_agg_mode, whole, rule.loss_scale_factor)
        metrics |= {"kl_loss": kl_loss.detach(), "kl": _mean(kl.detach(), inputs.mask)}
        loss = loss + rule.kl_loss_coef * kl_loss
    return LossOutputs(loss, metrics)


def _of_token(log_ratio: Tensor, _mask: Tensor) -> Tensor:
    return log_ratio


def _of_answer(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """The mean log-ratio of each answer [B, 1] (GSPO eq. 7)."""
    return (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


def _ppo(ratio: Tensor, _logps: Tensor, advantages: Tensor, rule: LossRule) -> Tensor:
    clipped = ratio.clamp(1 - rule.clip_ratio_low, 1 + rule.clip_ratio_high)
    bounded = ratio if rule.clip_ratio_c is None else ratio.clamp(max=rule.clip_ratio_c)
    return -torch.min(bounded * advantages, clipped * advantages)


def _cispo(ratio: Tensor, logps: Tensor, advantages: Tensor, rule: LossRule) -> Tensor:
    clipped = ratio.clamp(1 - rule.clip_ratio_low, 1 + rule.clip_ratio_high)
    return -clipped.detach() * advantages * logps


# Log-ratio and mask [B, T] -> log-ratio per token [B, T] or answer [B, 1].
RATIO_LEVELS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {"token": _of_token, "sequence": _of_answer}
)
# Ratio, log-probabilities, advantages and the rule's numbers -> loss of each token [B, T] or answer [B, 1].
CLIPPINGS: Mapping[str, Callable[[Tensor, Tensor, Tensor, LossRule], Tensor]] = MappingProxyType(
    {"ppo": _ppo, "cispo": _cispo}
)
require_names("ratio_level", RATIO_LEVELS, {own.ratio_level for own in ALGORITHMS.values()})
require_names("clipping", CLIPPINGS, {own.clipping for own in ALGORITHMS.values()})


@torch.no_grad()
def _ratio_metrics(
    ratio: Tensor, log_ratio: Tensor, advantages: Tensor, mask: Tensor, rule: LossRule
) -> dict[str, Tensor]:
    """How often the clip held a token back, and how far the policy has moved. `ppo_kl` is k1 of KL(old || policy)."""
    low = (ratio < 1 - rule.clip_ratio_low) & (advantages < 0)
    high = (ratio > 1 + rule.clip_ratio_high) & (advantages > 0)
    return {
        "clip_ratio/low": _mean(low, mask),
        "clip_ratio/high": _mean(high, mask),
        "clip_ratio": _mean(low | high, mask),
        "ppo_kl": _mean(-log_ratio, mask),
        "ratio/max": ratio.expand_as(mask).masked_fill(mask == 0, 0.0).max(),
    }


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that count; 0 where none does."""
    return values.expand_as(mask).masked_fill(mask == 0, 0).float().sum() / mask.sum().clamp(min=1)


def _check(inputs: LossInputs, rule: LossRule) -> None:
    if inputs.logps.shape != inputs.mask.shape:
        raise InvalidValueError(
            f"logps {tuple(inputs.logps.shape)} and mask {tuple(inputs.mask.shape)} differ in shape"
        )
    if rule.kl_loss_coef and inputs.ref_logps is None:
        raise InvalidValueError(
            f"kl_loss_coef is {rule.kl_loss_coef} but no reference log-probs came along: set it to 0"
        )
