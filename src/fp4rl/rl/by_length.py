"""Micro-batches of answers of like length: what is padding in none of their rows is all that is computed.

The answers of an update are what they were, in another order; so is its loss, which counts the whole update.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Batch = dict[str, Tensor]


def by_length(batches: Sequence[Batch], span: int) -> list[Batch]:
    """The micro-batches of whole updates, `span` each: sorted by tokens within an update, and cut to their own width.

    Tensors are [rows], [rows, prompt] (`prompt_*`, padded on the left) or [rows, answer] (padded on the right).
    """
    found: list[Batch] = []
    for first in range(0, len(batches), span):
        parts = batches[first : first + span]
        found += [_cut(part) for part in (_sorted(parts) if len(parts) > 1 else parts)]
    return found


def _sorted(parts: Sequence[Batch]) -> list[Batch]:
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = (whole["prompt_mask"].sum(-1) + whole["completion_mask"].sum(-1)).argsort(stable=True)
    places = torch.split(order, [len(part["completion_mask"]) for part in parts])
    return [{name: value[rows] for name, value in whole.items()} for rows in places]


def _cut(batch: Batch) -> Batch:
    prompt, answer = (max(int(batch[f"{name}_mask"].sum(-1).max()), 1) for name in ("prompt", "completion"))
    return {name: _columns(name, value, prompt, answer) for name, value in batch.items()}


def _columns(name: str, value: Tensor, prompt: int, answer: int) -> Tensor:
    if value.dim() < 2:
        return value
    return value[:, -prompt:] if name.startswith("prompt_") else value[:, :answer]
