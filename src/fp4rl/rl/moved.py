"""How many of the trainable weights a run changed, start against end: training that changed nothing is none (P24)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

_FEW = 0.5


@torch.no_grad()
def moved(start: PreTrainedModel, trained: PreTrainedModel, record: Callable[[dict[str, Any]], None]) -> float:
    """The share of the trainable weights of `trained` that `start` holds in other bits; `record` hears it."""
    before = dict(start.named_parameters())
    changed = total = 0
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad:
            old, new = _whole(before[name]), _whole(parameter)
            changed += int((new != old.to(new.device, new.dtype)).sum())
            total += new.numel()
    share = changed / total
    record({"kind": "moved", "trainable": total, "changed": changed, "share": share})
    return share


def _whole(parameter: Tensor) -> Tensor:
    """A sharded parameter gathered, any other as it is."""
    return getattr(parameter, "full_tensor", parameter.detach)()


def few_moved(share: float, dtype: str) -> str | None:
    """One line for the reader when masters of low precision swallowed most updates; None when there is none to say."""
    if dtype == "float32" or share >= _FEW:
        return None
    return (
        f"training changed {share:.2%} of the weights: most updates were smaller than half a step of {dtype}; "
        "take model.dtype: float32, or a larger training.lr"
    )
