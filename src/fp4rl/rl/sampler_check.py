"""Compare the policy that samples with the one that is trained, on the same tokens, and name what sets them apart."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fp4rl.inject.attach import Attachment
from fp4rl.rl.mismatch import mismatch_metrics
from fp4rl.rl.phases import Phases
from fp4rl.spec.errors import CheckFailed
from fp4rl.spec.injection import Phase
from fp4rl.spec.points import LINEAR_POINTS

Score = Callable[[dict[str, Tensor]], Tensor]
"""Rows of a batch -> log-probabilities [rows, T] of their answers under the live model, in its present phase."""

# In the first steps, every so often and whenever the noise grows, on a few answers.
_STEPS, _EVERY, _ROWS = 3, 10, 32
_FLOAT = 1e-6  # nats that arithmetic alone may put between two scorings of the same tokens
# Nats a token (k3) that arithmetic may put between decoding and one pass. With attention written out, or in float32 on
# a CPU, it is 0 but for a value on a tie now and then (at most 2e-4 seen); fused 16-bit attention under 4-bit inputs
# made up to 0.011. Positions that are counted differently make 0.005 to 1.5.
_DECODED, _DECODED_FUSED = 2e-3, 0.02
# What of the mismatch is reported again in parts.
_IN_PARTS = {"rollout_corr/k3_kl": "k3_kl", "training/rollout_probs_diff_mean": "probs_diff"}


def is_due(phases: Phases, step: int) -> bool:
    """Tell whether sampler and trainer are compared at `step`, whose rollout is over."""
    return step < _STEPS or step % _EVERY == 0 or phases.stages.rose


@torch.no_grad()
def compare_sampler(phases: Phases, step: int, batch: dict[str, Tensor], score: Score) -> dict[str, float]:
    """Measure how far the policy that sampled `batch` is from the one that is trained, and by what.

    `decode_k3_kl` is what decoding token by token makes beside one pass with the same weights, noise and rounding:
    arithmetic alone, unless something draws at random. `phase_k3_kl` is what the formats of the two phases make, 0
    exactly where both round alike, in any dtype. `described_*` have the step's noise and errors in them too: what
    the sampler may differ by, and no more.

    Raises CheckFailed where a difference has no cause that is described: the sampler holds other weights, or reads the
    tokens differently.
    """
    rows = {name: value[:_ROWS] for name, value in batch.items()}
    mask, attachment = rows["completion_mask"], phases.attachment
    training, clean, sampling = _scored_in_turn(phases, step, rows, score)
    decoded = mismatch_metrics(sampling, rows["sampling_per_token_logps"], mask)
    if not decoded:
        return {}
    repeatable = attachment is None or _is_repeatable(attachment)
    if repeatable:
        require_decoded(phases.model, step, decoded["rollout_corr/k3_kl"])
    between, described = (mismatch_metrics(training, side, mask) for side in (clean, sampling))
    metrics = {**_part("described", described), **_part("decode", decoded)}
    if attachment is None:
        return metrics
    if repeatable:
        require_same_weights(attachment, step, between["rollout_corr/k3_kl"])
    if repeatable or _formats(attachment, "rollout") != _formats(attachment, "training"):
        metrics["rollout_corr/phase_k3_kl"] = between["rollout_corr/k3_kl"]
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


def require_same_weights(attachment: Attachment, step: int, k3: float) -> None:
    """Raise CheckFailed when a repeatable policy scores the same tokens differently in rollout and in training by `k3`
    nats, though the same acts in both."""
    table = attachment.table
    if table.digest_in("rollout") == table.digest_in("training") and k3 > _FLOAT:
        raise CheckFailed(
            f"step {step}: rollout and training round alike, but score the same tokens {k3:.3g} nats apart: "
            "the sampler holds other weights than the trainer"
        )


def require_decoded(model: nn.Module, step: int, k3: float) -> None:
    """Raise CheckFailed when a repeatable sampler and one pass under the same weights, noise and rounding are `k3` nats
    a token apart: they read the tokens differently, in positions, mask, cache or kernel."""
    if k3 > (_DECODED_FUSED if _is_fused(model) else _DECODED):
        raise CheckFailed(
            f"step {step}: decoding and one pass over the same tokens with the same weights are {k3:.3g} nats a "
            "token apart: the model reads positions, mask or cache differently in the two, or leaves something to "
            "chance; such a sampler is another policy than the one that is trained"
        )


def _is_repeatable(attachment: Attachment) -> bool:
    """Whether two forwards of the same tokens in the same phase give the same bits: nothing is left to chance."""
    injection = attachment.table.injection
    return not injection.errors and all(fmt.rounding != "stochastic" for fmt in injection.formats)


def _formats(attachment: Attachment, phase: Phase) -> dict[str, int]:
    """Sites at which each point is rounded in `phase`; hardware errors are left out."""
    acting = attachment.table.acting(phase)
    return {point: sites for point, sites in acting.items() if point in (*LINEAR_POINTS, "kv_cache")}


def _is_fused(model: nn.Module) -> bool:
    """Whether attention runs in a fused kernel whose rounding depends on how many queries there are."""
    weight = next(model.parameters())
    written_out = getattr(getattr(model, "config", None), "_attn_implementation", "eager") == "eager"
    return not written_out and (weight.is_cuda or weight.dtype != torch.float32)


def _part(name: str, mismatch: dict[str, float]) -> dict[str, float]:
    return {f"rollout_corr/{name}_{word}": mismatch[metric] for metric, word in _IN_PARTS.items() if metric in mismatch}
