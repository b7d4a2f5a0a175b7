"""How a table of per-token losses becomes one number: verl's `loss_agg_mode`.

Micro-batches and processes must not change the result, so each mode divides by counts of the *whole* optimizer step
(`Whole`), never by what happens to be in this micro-batch: the sum over micro-batches is the loss of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp4rl.spec.algorithms import LOSS_AGGREGATIONS
from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest


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

    @classmethod
    def of_step(cls, masks: Sequence[Tensor], accelerator: Any) -> tuple[bool, Whole]:
        """Whether the micro-batches of one optimizer step hold any answer, in any process; and their counts."""
        lengths = [mask.sum(-1) for mask in masks]
        tokens = torch.stack([length.sum() for length in lengths]).sum()
        answers = torch.stack([(length > 0).sum() for length in lengths]).sum()
        counts = torch.stack([tokens, answers]).float()
        if accelerator.num_processes > 1:
            counts = accelerator.reduce(counts, reduction="mean")
        return bool(counts[1] > 0), cls(tokens=counts[0].clamp(min=1), sequences=counts[1].clamp(min=1))


def aggregate(losses: Tensor, mask: Tensor, mode: str, whole: Whole, loss_scale_factor: int | None = None) -> Tensor:
    """Sum up `losses` [sequences, tokens or 1] under `mask` [sequences, tokens] (1 = counts) as `mode` says.

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
    return total / _constant(mode, loss_scale_factor) if rule.over_longest else total


def _constant(mode: str, loss_scale_factor: int | None) -> int:
    if loss_scale_factor is None or loss_scale_factor < 1:
        raise InvalidValueError(f"{mode} divides by a constant: set loss_scale_factor to max_response_length")
    return loss_scale_factor
