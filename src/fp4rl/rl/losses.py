"""Policy losses as one composition, ratio level x clipping x aggregation x KL, of which DAPO and GRPO are values.

r      = pi(token) / pi_old(token), or the geometric mean of that over the answer   `ratio_level`
ppo    = -min(r A, clip(r, 1 - low, 1 + high) A)                                    `clipping`
cispo  = -sg[clip(r, 1 - low, 1 + high)] A log pi
loss   = aggregate(ppo or cispo) + kl_loss_coef * aggregate(KL(pi || reference))
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from fp4rl.rl.aggregation import Whole, aggregate
from fp4rl.rl.divergence import SAFE_LOG_RATIO, kl_per_token
from fp4rl.spec.algorithms import PUBLISHED
from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest


@dataclass(frozen=True)
class LossRule:
    """One policy loss under verl's names.

    `clip_ratio_low`, `clip_ratio_high` are distances from 1. `clip_ratio_c` bounds the ratio of tokens with a negative
    advantage (dual-clip PPO, arXiv 1912.09729; TRL's `delta`); None leaves it open. `loss_scale_factor` is needed by
    `seq-mean-token-sum-norm` alone: the longest answer allowed, in tokens.
    """

    name: str
    ratio_level: Literal["token", "sequence"] = "token"
    clipping: Literal["ppo", "cispo"] = "ppo"
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    clip_ratio_c: float | None = None
    loss_agg_mode: str = "token-mean"
    loss_scale_factor: int | None = None
    kl_loss_coef: float = 0.0
    kl_loss_type: str = "low_var_kl"


def _of_paper(rule: LossRule) -> LossRule:
    own = PUBLISHED[rule.name]
    return replace(
        rule,
        clip_ratio_low=own.clip_ratio_low,
        clip_ratio_high=own.clip_ratio_high,
        loss_agg_mode=own.loss_agg_mode,
    )


DAPO = _of_paper(LossRule("dapo"))
GRPO = _of_paper(LossRule("grpo"))
DR_GRPO = _of_paper(LossRule("dr_grpo"))
GSPO = _of_paper(LossRule("gspo", ratio_level="sequence"))
CISPO = _of_paper(LossRule("cispo", clipping="cispo"))

LOSSES: Mapping[str, LossRule] = MappingProxyType({rule.name: rule for rule in (DAPO, GRPO, DR_GRPO, GSPO, CISPO)})


def loss_named(name: str) -> LossRule:
    """The rule of an algorithm with its published defaults. Raises NotFoundError."""
    if name not in LOSSES:
        raise NotFoundError(f"no policy loss {name!r}{nearest(name, LOSSES)}")
    return LOSSES[name]


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
    ratio = _at_level(log_ratio, inputs.mask, rule).exp()  # [B, T] or [B, 1]
    per_token = _surrogate(ratio, inputs.logps, advantages, rule)
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


def _at_level(log_ratio: Tensor, mask: Tensor, rule: LossRule) -> Tensor:
    """The log-ratio per token [B, T], or its mean over each answer [B, 1] (GSPO eq. 7)."""
    if rule.ratio_level == "token":
        return log_ratio
    return (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


def _surrogate(ratio: Tensor, logps: Tensor, advantages: Tensor, rule: LossRule) -> Tensor:
    clipped = ratio.clamp(1 - rule.clip_ratio_low, 1 + rule.clip_ratio_high)
    if rule.clipping == "cispo":
        return -clipped.detach() * advantages * logps
    bounded = ratio if rule.clip_ratio_c is None else ratio.clamp(max=rule.clip_ratio_c)
    return -torch.min(bounded * advantages, clipped * advantages)


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
