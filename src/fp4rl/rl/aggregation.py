"""How a table of per-token losses becomes one number: verl's `loss_agg_mode`.

Micro-batches and processes must not change the result, so each mode divides by counts of the *whole* optimizer step
(`Whole`), never by what happens to be in this micro-batch: the sum over micro-batches is the loss of the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest

LOSS_AGG_MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


@dataclass(frozen=True)
class Whole:
    """What one optimizer step counts, over all micro-batches, per process (the global count / number of processes).

    `tokens`: unmasked tokens. `sequences`: sequences that share the mean. verl counts those with at least one unmasked
    token (`Whole.of`), TRL all of them; the difference matters when truncated answers are masked out entirely.
    """

    tokens: Tensor | float
    sequences: Tensor | float

    @classmethod
    def of(cls, mask: Tensor) -> Whole:
        """The counts of one batch that is the whole step. mask [sequences, tokens]."""
        lengths = mask.sum(-1)
        return cls(tokens=lengths.sum().clamp(min=1), sequences=(lengths > 0).sum().clamp(min=1))


def aggregate(losses: Tensor, mask: Tensor, mode: str, whole: Whole, loss_scale_factor: int | None = None) -> Tensor:
    """One number out of `losses` [sequences, tokens or 1] under `mask` [sequences, tokens] (1 = counts).

    - `token-mean` (DAPO): every token of the step weighs the same.
    - `seq-mean-token-mean` (GRPO): every answer weighs the same, so tokens of long answers weigh less.
    - `seq-mean-token-sum`: answers weigh by their length.
    - `seq-mean-token-sum-norm` (Dr. GRPO, arXiv 2503.20783): the same over a constant, `loss_scale_factor`
      (the longest answer allowed), so that the gradient's scale does not follow the lengths of a batch.

    Raises NotFoundError for an unknown mode, InvalidValueError when the norm's constant is missing.
    """
    # masked_fill, not a product: an infinite loss at a padded position must not become NaN.
    per_sequence = losses.expand_as(mask).masked_fill(mask == 0, 0.0).sum(-1)  # [sequences]
    match mode:
        case "token-mean":
            return per_sequence.sum() / whole.tokens
        case "seq-mean-token-mean":
            return (per_sequence / mask.sum(-1).clamp(min=1.0)).sum() / whole.sequences
        case "seq-mean-token-sum":
            return per_sequence.sum() / whole.sequences
        case "seq-mean-token-sum-norm":
            return per_sequence.sum() / whole.sequences / _constant(loss_scale_factor)
        case _:
            raise NotFoundError(f"no loss_agg_mode {mode!r}{nearest(mode, LOSS_AGG_MODES)}")


def _constant(loss_scale_factor: int | None) -> int:
    if loss_scale_factor is None or loss_scale_factor < 1:
        raise InvalidValueError(
            "seq-mean-token-sum-norm divides by a constant: set loss_scale_factor to max_response_length"
        )
    return loss_scale_factor
