"""The loss of one micro-batch: policy gradient, rollout correction, KL, distillation and entropy bonus together."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fp4rl.rl.losses import LossInputs, LossRule, Whole, aggregate, loss_named, policy_loss
from fp4rl.rl.mismatch import correct_rollout, mismatch_metrics
from fp4rl.spec.training import Training


@dataclass(frozen=True, kw_only=True)
class MicroBatch(LossInputs):
    """The results of a micro-batch's forwards beyond the inputs of the policy loss; all [answers, tokens].

    `entropies` carry the gradient. `sampler_logps` are those of the sampler, `teacher_kl` the divergence from a
    teacher. `first`: no update was made since the answers were sampled. `old_is_sampler`: ratios are to the (noisy)
    sampler itself.
    """

    entropies: Tensor
    sampler_logps: Tensor
    teacher_kl: Tensor | None = None
    first: bool = True
    old_is_sampler: bool = False


def loss_rule(recipe: Training) -> LossRule:
    """Return the policy loss that a recipe describes: the algorithm's shape with the recipe's numbers."""
    rule = loss_named(recipe.algorithm)
    return replace(
        rule,
        clip_ratio_low=rule.clip_ratio_low if recipe.clip_ratio_low is None else recipe.clip_ratio_low,
        clip_ratio_high=rule.clip_ratio_high if recipe.clip_ratio_high is None else recipe.clip_ratio_high,
        clip_ratio_c=recipe.clip_ratio_c,
        loss_agg_mode=recipe.loss_agg_mode or rule.loss_agg_mode,
        loss_scale_factor=recipe.max_response_length,
        kl_loss_coef=recipe.kl,
        kl_loss_type=recipe.kl_loss_type,
    )


def objective(batch: MicroBatch, recipe: Training, whole: Whole) -> tuple[Tensor, dict[str, float]]:
    """Compute (loss, metrics); `whole` are the counts of the optimizer step that the micro-batch belongs to."""
    rule = loss_rule(recipe)
    metrics = {"entropy": _mean(batch.entropies, batch.mask)}
    weights, correction_metrics = _correction(batch, recipe)
    metrics |= correction_metrics
    loss = batch.logps.new_zeros(())
    if recipe.distillation is None or not recipe.distillation.alone:
        outputs = policy_loss(replace(batch, weights=weights, whole=whole), rule)
        loss = outputs.loss
        metrics |= {name: value.item() for name, value in outputs.metrics.items()}
    if recipe.distillation is not None and batch.teacher_kl is not None:
        kl = aggregate(batch.teacher_kl, batch.mask, rule.loss_agg_mode, whole, rule.loss_scale_factor)
        metrics["distill/kl"] = _mean(batch.teacher_kl, batch.mask)
        loss = loss + recipe.distillation.coef * kl
    if recipe.entropy_coeff:
        bonus = aggregate(batch.entropies, batch.mask, rule.loss_agg_mode, whole, rule.loss_scale_factor)
        loss = loss - recipe.entropy_coeff * bonus
    return loss, metrics


def _correction(batch: MicroBatch, recipe: Training) -> tuple[Tensor | None, dict[str, float]]:
    """Return the importance weights of the rollout correction, None without one, and the mismatch metrics.

    Both use the weights that the answers were sampled from: the old log-probabilities, or the policy's own before the
    first update, so that no forward is needed for them.
    """
    if batch.old_is_sampler:  # the ratio already corrects for the sampler
        clean = mismatch_metrics(batch.logps.detach(), batch.sampler_logps, batch.mask) if batch.first else {}
        return None, clean
    trained = batch.logps.detach() if batch.old_logps is None else batch.old_logps
    metrics = mismatch_metrics(trained, batch.sampler_logps, batch.mask)
    settings = recipe.rollout_correction
    if settings.rollout_is == "none":
        return None, metrics
    correction = correct_rollout(
        trained, batch.sampler_logps, batch.mask, settings.rollout_is, settings.mode, settings.threshold
    )
    return correction.weights, metrics | correction.metrics


@torch.no_grad()
def _mean(values: Tensor, mask: Tensor) -> float:
    return (values.detach() * mask).sum().item() / max(mask.sum().item(), 1)
