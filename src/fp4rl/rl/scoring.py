"""Log-probabilities of answers that are there already, computed as the sampler computed them."""

from typing import Any

import torch
from torch import Tensor

from fp4rl.models.positions import forward_inputs


def whole_sequences(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Put prompts and answers side by side: ids and attention mask, [rows, P + T] both."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    return ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)


def answer_logps(
    model: Any, ids: Tensor, mask: Tensor, width: int, *, rows: int, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Score the last `width` tokens of `ids` [n, P + T] in one pass per `rows` sequences.

    `model` has TRL's fused head, which divides by the temperature. Returns log-probabilities [n, width] and, if asked,
    the entropies of the distributions they come from; both 0 in the padding.
    """
    logps, entropies = [], []
    for these, real in zip(torch.split(ids, rows), torch.split(mask, rows), strict=True):
        labels = these.masked_fill(real == 0, -100)
        labels[:, :-width] = -100
        output = model(**forward_inputs(model, these, real), labels=labels, fused_lm_head=True)
        logps.append(output.log_probs[:, -width:])
        if entropy:
            entropies.append(output.entropy[:, -width:])
    return torch.cat(logps), torch.cat(entropies) if entropy else None
