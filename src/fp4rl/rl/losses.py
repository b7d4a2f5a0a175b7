"""Policy losses as one composition, ratio level x clipping x aggregation x KL; DAPO, GRPO and others are values of it.

r      = pi(token) / pi_old(token), or the geometric mean of that over the answer   `ratio_level`
ppo    = -min(r A, clip(r, 1 - low, 1 + high) A)                                    `clipping`
cispo  = -sg[clip(r, 1 - low, 1 + high)] A log pi
loss   = aggregate(ppo or cispo) + kl_loss_coef * aggregate(KL(pi || reference))

Micro-batches and processes must not change the result, so each `loss_agg_mode` divides by counts of the *whole*
optimizer step (`Whole`), never of this micro-batch: the sum over micro-batches is the loss of the whole batch.

The KL is estimated per token, from x = log p_ref - log p_policy at a token drawn from the policy (J. Schulman,
"Approximating KL divergence", 2020); verl's `kl_loss_type`:

    k1 = -x            unbiased, noisy, can be negative; as a *loss* its gradient is zero on average
    k2 = x^2 / 2       biased, but its gradient is that of the KL
    k3 = e^x - x - 1   unbiased, never negative; verl and DeepSeek call it low_var_kl
    abs = |x|

A trailing `+` (`k3+`) keeps the value and takes the gradient of k2.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fp4rl.spec.algorithms import ALGORITHMS, KL_ESTIMATORS, LOSS_AGGREGATIONS
from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest, require_names


@dataclass(frozen=True)
class Whole:
    """Counts of one optimizer step over all its micro-batches, per process (the global count / number of processes).

    `tokens`: unmasked tokens. `sequences`: sequences that share the mean. verl counts those with at least one unmasked
    token (`Whole.of`), TRL all of them; the difference matters when truncated answers are masked out entirely.
    """

    tokens: Tensor | float
    sequences: Tensor | float

    @classmethod
    def of(cls, mask: Tensor) -> "Whole":
        """Return the counts of one batch that is the whole step. mask [sequences, tokens]."""
        lengths = mask.sum(-1)
        return cls(tokens=lengths.sum().clamp(min=1), sequences=(lengths > 0).sum().clamp(min=1))

    @classmethod
    def of_step(cls, masks: Sequence[Tensor], accelerator: Any) -> tuple[bool, "Whole"]:
        """Return whether the micro-batches of one optimizer step hold any answer, in any process; and their counts."""
        lengths = torch.cat([mask.sum(-1) for mask in masks])
        counts = torch.stack([lengths.sum(), (lengths > 0).sum()]).float()
        if accelerator.num_processes > 1:
            counts = accelerator.reduce(counts, reduction="mean")
        return bool(counts[1] > 0), cls(tokens=counts[0].clamp(min=1), sequences=counts[1].clamp(min=1))


def aggregate(losses: Tensor, mask: Tensor, mode: str, whole: Whole, loss_scale_factor: int | None = None) -> Tensor:
    """Aggregate `losses` [sequences, tokens or 1] under `mask` [sequences, tokens] (1 = counts) as `mode` says.

    `loss_scale_factor`: the longest answer allowed, in tokens; needed by modes that divide by it. Raises NotFoundError
    for an unknown mode, InvalidValueError when the constant is missing.
    """
    if mode not in LOSS_AGGREGATIONS:
        raise NotFoundError(f"no loss_agg_mode {mode!r}{nearest(mode, LOSS_AGGREGATIONS)}")
    rule = LOSS_AGGREGATIONS[mode]
    # masked_fill, not a product: an infinite loss at a padded position must not become NaN.
    per_sequence = losses.expand_as(mask).masked_fill(mask == 0, 0.0).sum(-1)  # [sequences]
    if rule.mean_of_answer:
        per_sequence = per_sequence / mask.sum(-1).clamp(min=1.0)
    total = per_sequence.sum() / (whole.tokens if rule.over == "tokens" else whole.sequences)
    if not rule.over_longest:
        return total
    if loss_scale_factor is None or loss_scale_factor < 1:
        raise InvalidValueError(f"{mode} divides by a constant: set loss_scale_factor to max_response_length")
    return total / loss_scale_factor


# exp(20) = 4.9e8: beyond it a ratio means nothing more, and exp(89) is infinite in float32.
SAFE_LOG_RATIO = 20.0
# verl's cap on one token's k3.
K3_CAP = 10.0


def _k3(x: Tensor) -> Tensor:
    x = x.clamp(-SAFE_LOG_RATIO, SAFE_LOG_RATIO)
    return (x.exp() - x - 1).clamp(max=K3_CAP)


_ESTIMATES: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "k1": lambda x: -x,
        "k2": lambda x: 0.5 * x.square(),
        "k3": _k3,
        "abs": lambda x: x.abs(),
        "low_var_kl": _k3,
    }
)
require_names("kl_loss_type", _ESTIMATES, KL_ESTIMATORS)


def kl_per_token(logps: Tensor, ref_logps: Tensor, kl_loss_type: str = "low_var_kl") -> Tensor:
    """Estimate KL(policy || reference) at each token, in nats; same shape as `logps`. Raises NotFoundError."""
    kind = kl_loss_type.removesuffix("+")
    if kind not in _ESTIMATES:
        raise NotFoundError(f"no kl_loss_type {kl_loss_type!r}{nearest(kind, KL_ESTIMATORS)}")
    value = _ESTIMATES[kind](ref_logps - logps)
    if kind == kl_loss_type:
        return value
    k2 = 0.5 * (logps - ref_logps).square()
    return k2 - k2.detach() + value.detach()  # the value of the estimator, the gradient of k2


@dataclass(frozen=True)
class LossRule:
    """One policy loss under verl's names.

    `clip_ratio_low`, `clip_ratio_high` are distances from 1. `clip_ratio_c` bounds the ratio of tokens with a negative
    advantage (dual-clip PPO, arXiv 1912.09729; TRL's `delta`); None: unbounded. `loss_scale_factor`: the tokens of the
    longest answer allowed, needed only by aggregations that divide by it.
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
    """Return the loss of an algorithm with its published numbers and without KL. Raises NotFoundError."""
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
    `weights` [B, T] or [B, 1]: importance weights of the rollout correction. `whole`: counts of the optimizer step;
    None: this batch is the whole step.
    """

    logps: Tensor
    advantages: Tensor
    mask: Tensor
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    weights: Tensor | None = None
    whole: Whole | None = None


class LossOutputs(NamedTuple):
    """`loss`: a scalar with gradient. `metrics`: detached scalars, means over the tokens of this micro-batch."""

    loss: Tensor
    metrics: Mapping[str, Tensor]


def policy_loss(inputs: LossInputs, rule: LossRule) -> LossOutputs:
    """Return the loss of one micro-batch; the sum over the micro-batches of a step is the loss of the step.

    Raises InvalidValueError when the rule needs a reference that is not given, or the shapes do not fit.
    """
    _check(inputs, rule)
    advantages = inputs.advantages if inputs.advantages.dim() == 2 else inputs.advantages.unsqueeze(-1)
    old_logps = inputs.logps.detach() if inputs.old_logps is None else inputs.old_logps  # on-policy: the ratio is 1
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
    """Return the mean log-ratio of each answer [B, 1] (GSPO eq. 7)."""
    return (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


def _ppo(ratio: Tensor, _logps: Tensor, advantages: Tensor, rule: LossRule) -> Tensor:
    clipped = ratio.clamp(1 - rule.clip_ratio_low, 1 + rule.clip_ratio_high)
    bounded = ratio if rule.clip_ratio_c is None else ratio.clamp(max=rule.clip_ratio_c)  # dual clip, for A < 0
    return -torch.min(bounded * advantages, clipped * advantages)  # the pessimistic one of the two surrogates


def _cispo(ratio: Tensor, logps: Tensor, advantages: Tensor, rule: LossRule) -> Tensor:
    clipped = ratio.clamp(1 - rule.clip_ratio_low, 1 + rule.clip_ratio_high)
    return -clipped.detach() * advantages * logps  # clipped tokens keep their gradient, unlike in PPO


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
    """Return how many tokens were clipped, and how far the policy has moved: `ppo_kl` is k1 of KL(old || policy)."""
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
    """Return the mean over the tokens that count; 0 without any."""
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
