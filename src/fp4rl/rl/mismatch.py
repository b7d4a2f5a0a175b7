"""The difference between the policy that sampled an answer and the one that is trained: size, cause, correction.

Here rho = pi_train(token) / pi_rollout(token), both with the weights that the answer was sampled from. Quantizing only
one side, noise in the rollout, or two engines with different kernels all show in it. Metrics have verl's names
(`rollout_corr/*`, `training/rollout_probs_diff_*`), so that its dashboards and the monitor read them alike.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fp4rl.inject.attach import Attachment
from fp4rl.rl.losses import SAFE_LOG_RATIO
from fp4rl.rl.phases import Phases
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.injection import Phase
from fp4rl.spec.points import LINEAR_POINTS


class Correction(NamedTuple):
    """Factors for per-token losses, `weights`: [answers, tokens] (token level) or [answers, 1] (sequence level)."""

    weights: Tensor
    metrics: dict[str, float]


@torch.no_grad()
def correct_rollout(
    train_logps: Tensor,
    rollout_logps: Tensor,
    mask: Tensor,
    rollout_is: Literal["token", "sequence"] = "token",
    mode: Literal["truncate", "mask"] = "truncate",
    threshold: float = 2.0,
) -> Correction:
    """Compute importance weights rho, by which samples of the rollout policy count as samples of the trained one.

    `token`: each token's own ratio (small variance, biased). `sequence`: the product over the answer (unbiased, large
    variance). `truncate` (TIS): min(rho, threshold). `mask` (IcePop, MIS): 0 outside [1/threshold, threshold], so that
    tokens or answers on which the policies disagree are not trained on. Weights carry no gradient.
    All inputs [answers, tokens]; a NaN log-probability (unknown to the sampler) counts as rho = 1.

    Source: arXiv 2508.03501 and "When Speed Kills Stability" (richardli.xyz/rl-collapse); verl rollout_corr.
    Raises InvalidValueError for a threshold of 1 or less.
    """
    if threshold <= 1.0:
        raise InvalidValueError(f"rollout correction threshold {threshold} would cut ratios of 1: take 2 or more")
    log_rho = _log_ratio(train_logps, rollout_logps, mask)
    if rollout_is == "sequence":
        log_rho = log_rho.sum(-1, keepdim=True)  # the product of the tokens' ratios
    rho = log_rho.clamp(-SAFE_LOG_RATIO, SAFE_LOG_RATIO).exp()
    low, high = rho < 1 / threshold, rho > threshold
    weights = rho.clamp(max=threshold) if mode == "truncate" else rho.masked_fill(low | high, 0.0)
    counted = mask if rollout_is == "token" else mask.amax(-1, keepdim=True)
    return Correction(weights, _weight_metrics(weights, low, high, counted.bool()))


def _weight_metrics(weights: Tensor, low: Tensor, high: Tensor, counted: Tensor) -> dict[str, float]:
    """Return verl's `rollout_is_*`. The effective sample size is a share: 1 when all weights are equal."""
    if not counted.any():
        return {}
    kept = weights[counted]
    mean = kept.mean()  # the effective sample size below is (sum w)^2 / (n sum w^2)
    return {
        "rollout_corr/rollout_is_mean": mean.item(),
        "rollout_corr/rollout_is_max": kept.max().item(),
        "rollout_corr/rollout_is_min": kept.min().item(),
        "rollout_corr/rollout_is_eff_sample_size": (mean.square() / kept.square().mean().clamp(min=1e-30)).item(),
        "rollout_corr/rollout_is_ratio_fraction_high": high[counted].float().mean().item(),
        "rollout_corr/rollout_is_ratio_fraction_low": low[counted].float().mean().item(),
    }


@torch.no_grad()
def mismatch_metrics(train_logps: Tensor, rollout_logps: Tensor, mask: Tensor) -> dict[str, float]:
    """Return how far the trained policy is from the one that sampled. All inputs [answers, tokens]; nats.

    - `rollout_corr/kl`: E[log pi_rollout - log pi_train], k1 of KL(rollout || train); may be negative by chance.
    - `rollout_corr/k3_kl`: E[rho - 1 - log rho], the same divergence, never negative: the one to watch.
    - `rollout_corr/logp_diff_mean`, `logp_diff_max`: of |log rho|; `logp_diff_over_0.01`: share of tokens above 0.01.
    - `rollout_corr/chi2_token`, `chi2_seq`: E[rho^2] - 1 over tokens, and over whole answers (product of rho).
    - `rollout_corr/ppl_ratio`: mean over answers of perplexity under pi_train over that under pi_rollout.
    - `training/rollout_probs_diff_{mean,max,std}`: of |pi_train(token) - pi_rollout(token)|.

    Empty when no token counts. Answers without a counted token are left out (verl counts them as log-prob 0).
    """
    answers = mask.sum(-1) > 0
    if not answers.any():
        return {}
    mask = mask[answers].bool()
    log_rho = _log_ratio(train_logps[answers], rollout_logps[answers], mask)
    rollout_logps = rollout_logps[answers].float().masked_fill(~mask, 0.0)
    train_logps = train_logps[answers].float().masked_fill(~mask, 0.0)
    tokens = mask.sum(-1)
    drift = (-log_rho).sum(-1) / tokens  # [answers]: mean of log pi_rollout - log pi_train
    return {
        **_divergences(log_rho, mask),
        "rollout_corr/training_ppl": (-train_logps.sum(-1) / tokens).exp().mean().item(),
        "rollout_corr/rollout_ppl": (-rollout_logps.nan_to_num(nan=0.0).sum(-1) / tokens).exp().mean().item(),
        "rollout_corr/log_ppl_diff": drift.mean().item(),
        "rollout_corr/log_ppl_abs_diff": drift.abs().mean().item(),
        "rollout_corr/ppl_ratio": drift.exp().mean().item(),
        **_probability_differences(train_logps[mask], rollout_logps[mask]),
    }


def _divergences(log_rho: Tensor, mask: Tensor) -> dict[str, float]:
    safe = log_rho.clamp(-SAFE_LOG_RATIO, SAFE_LOG_RATIO)
    rho = safe[mask].exp()
    apart = log_rho[mask].abs()
    whole = log_rho.sum(-1).clamp(-SAFE_LOG_RATIO, SAFE_LOG_RATIO)  # [answers]
    return {
        "rollout_corr/kl": -log_rho[mask].mean().item(),
        "rollout_corr/k3_kl": (rho - 1 - safe[mask]).mean().item(),
        "rollout_corr/logp_diff_mean": apart.mean().item(),
        "rollout_corr/logp_diff_max": apart.max().item(),
        "rollout_corr/logp_diff_over_0.01": (apart > 0.01).float().mean().item(),
        "rollout_corr/chi2_token": (rho.square().mean() - 1).item(),
        "rollout_corr/chi2_seq": ((2 * whole).exp().mean() - 1).item(),
    }


def _probability_differences(train_logps: Tensor, rollout_logps: Tensor) -> dict[str, float]:
    """Return statistics over tokens [n], without those that the sampler could not score (NaN)."""
    differences = (train_logps.exp() - rollout_logps.exp()).abs()
    differences = differences[differences.isfinite()]
    if differences.numel() == 0:
        return {}
    return {
        "training/rollout_probs_diff_mean": differences.mean().item(),
        "training/rollout_probs_diff_max": differences.max().item(),
        "training/rollout_probs_diff_std": differences.std(correction=min(1, differences.numel() - 1)).item(),
    }


def _log_ratio(train_logps: Tensor, rollout_logps: Tensor, mask: Tensor) -> Tensor:
    """Return log rho in float32 [answers, tokens]; 0 in the padding and where the sampler's value is unknown."""
    if not train_logps.shape == rollout_logps.shape == mask.shape:
        raise InvalidValueError(
            f"log-probs of the trained policy {tuple(train_logps.shape)}, of the sampler {tuple(rollout_logps.shape)} "
            f"and the mask {tuple(mask.shape)} must have one shape"
        )
    log_rho = (train_logps.float() - rollout_logps.float()).masked_fill(mask == 0, 0.0)
    return log_rho.nan_to_num(nan=0.0, posinf=SAFE_LOG_RATIO, neginf=-SAFE_LOG_RATIO)


Score = Callable[[dict[str, Tensor]], Tensor]
"""From rows of a batch to log-probabilities [rows, T] of their answers under the live model in its present phase."""

# The comparison is made in the first 3 steps, then in every 10th and whenever the noise grows, on 32 answers.
_STEPS, _EVERY, _ROWS = 3, 10, 32
_FLOAT = 1e-6  # nats by which two scorings of the same tokens may differ through arithmetic alone
# Nats a token (k3) by which decoding and one pass may differ through arithmetic. With eager attention, or in float32 on
# a CPU, it is 0 but for a few values on ties (at most 2e-4 seen); fused 16-bit attention under 4-bit inputs gave up to
# 0.011. Positions that are counted wrongly give 0.005 to 1.5.
DECODED, DECODED_FUSED = 2e-3, 0.02
# Metrics of the mismatch that are also reported by cause.
_IN_PARTS = {"rollout_corr/k3_kl": "k3_kl", "training/rollout_probs_diff_mean": "probs_diff"}


def is_due(phases: Phases, step: int) -> bool:
    """Return whether sampler and trainer are compared at `step`, after its rollout."""
    return step < _STEPS or step % _EVERY == 0 or phases.stages.rose


@torch.no_grad()
def compare_sampler(phases: Phases, step: int, batch: dict[str, Tensor], score: Score) -> dict[str, float]:
    """Measure how far the policy that sampled `batch` is from the one that is trained, by cause.

    `decode_k3_kl`: decoding token by token against one pass with the same weights, noise and rounding, a difference of
    arithmetic alone unless something is random. `phase_k3_kl`: the formats of the two phases against each other,
    exactly 0 where both round alike. `described_*`: with the step's noise and errors too, all that the sampler may
    differ by.

    Raises CheckFailed for a difference that nothing described explains: the sampler has other weights, or reads the
    tokens differently.
    """
    rows = {name: value[:_ROWS] for name, value in batch.items()}
    mask, attachment = rows["completion_mask"], phases.attachment
    training, clean, sampling = _scored_in_turn(phases, step, rows, score)
    decoded = mismatch_metrics(sampling, rows["sampling_per_token_logps"], mask)
    if not decoded:
        return {}
    repeatable = attachment is None or is_repeatable(attachment)
    if repeatable:
        require_decoded(phases.model, step, decoded["rollout_corr/k3_kl"])
    between, described = (mismatch_metrics(training, side, mask) for side in (clean, sampling))
    metrics = {**_part("described", described), **_part("decode", decoded)}
    if attachment is None:
        return metrics
    table, k3 = attachment.table, between["rollout_corr/k3_kl"]
    if repeatable and table.digest_in("rollout") == table.digest_in("training") and k3 > _FLOAT:
        raise CheckFailed(
            f"step {step}: rollout and training round alike, but score the same tokens {k3:.3g} nats apart: "
            "the sampler holds other weights than the trainer"
        )
    if repeatable or _formats(attachment, "rollout") != _formats(attachment, "training"):
        metrics["rollout_corr/phase_k3_kl"] = k3
    return metrics


def _scored_in_turn(phases: Phases, step: int, rows: dict[str, Tensor], score: Score) -> tuple[Tensor, Tensor, Tensor]:
    """Score `rows` as training does, as rollouts do without noise, and as this step's rollout did."""
    training = score(rows)
    if phases.attachment is None and not phases.sigma:
        return training, training, training
    with phases.reference("rollout"):
        clean = score(rows)
    if not phases.sigma:
        return training, clean, clean
    with phases.as_sampled(step):
        return training, clean, score(rows)


def require_decoded(model: nn.Module, step: int, k3: float) -> None:
    """Raise CheckFailed when `k3`, in nats a token, between a repeatable sampler and one pass with the same weights,
    noise and rounding is too large: they differ in positions, mask, cache or kernel."""
    if k3 > (DECODED_FUSED if _is_fused(model) else DECODED):
        raise CheckFailed(
            f"step {step}: decoding and one pass over the same tokens with the same weights are {k3:.3g} nats a "
            "token apart: the model reads positions, mask or cache differently in the two, or leaves something to "
            "chance; such a sampler is another policy than the one that is trained"
        )


def is_repeatable(attachment: Attachment) -> bool:
    """Return whether two forwards of the same tokens in the same phase give the same bits: nothing is random."""
    injection = attachment.table.injection
    return not injection.errors and all(fmt.rounding != "stochastic" for fmt in injection.formats)


def _formats(attachment: Attachment, phase: Phase) -> dict[str, int]:
    """Return the number of sites at which each point is rounded in `phase`, without hardware errors."""
    sites_of = attachment.table.active_sites(phase)
    return {point: sites for point, sites in sites_of.items() if point in (*LINEAR_POINTS, "kv_cache")}


def _is_fused(model: nn.Module) -> bool:
    """Return whether attention runs in a fused kernel, whose rounding depends on the number of queries."""
    weight = next(model.parameters())
    written_out = getattr(getattr(model, "config", None), "_attn_implementation", "eager") == "eager"
    return not written_out and (weight.device.type != "cpu" or weight.dtype != torch.float32)


def _part(name: str, mismatch: dict[str, float]) -> dict[str, float]:
    return {f"rollout_corr/{name}_{word}": mismatch[metric] for metric, word in _IN_PARTS.items() if metric in mismatch}
