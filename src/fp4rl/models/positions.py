"""Feed a causal model left-padded tokens with the positions that `generate` gives them."""

import inspect
from typing import Any

from torch import Tensor, nn


def forward_inputs(model: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return the arguments of a forward of `ids` under the attention `mask`, both [rows, T].

    `generate` counts positions from a row's first token; a forward without `position_ids` counts the padding too.
    Learned positions then give other results, and so do rotary ones where something is rounded: shifting all positions
    cancels in exact arithmetic, but not in rounded keys. Models without `position_ids` count by the mask themselves.
    """
    inputs = {"input_ids": ids, "attention_mask": mask}
    if takes_positions(model):
        inputs["position_ids"] = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
    return inputs


def takes_positions(model: nn.Module) -> bool:
    """Return whether the model, below adapters and DDP or FSDP wrappers, takes `position_ids`."""
    inner: Any = model
    while isinstance(getattr(inner, "module", None), nn.Module):  # DistributedDataParallel, FullyShardedDataParallel
        inner = inner.module
    if hasattr(inner, "get_base_model"):  # peft's forward passes on arguments that it does not name
        inner = inner.get_base_model()
    return "position_ids" in inspect.signature(inner.forward).parameters
