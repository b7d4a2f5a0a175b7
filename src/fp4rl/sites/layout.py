"""Which axis of a stored weight its matmul sums over: the last one, or the one before it (stored transposed).

A square matrix does not tell by its sizes, and a class may lie; what is found here is held against the products that
the module really computes, where it is injected (`inject.experts`).
"""

import sys
from typing import Any

from torch import nn

_UP = ("gate_up_proj", "gate_proj", "up_proj")
_DOWN = ("down_proj",)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is the linear layer of GPT-2, whose weight is [in, out]."""
    own = sys.modules.get("transformers.pytorch_utils")  # never imported here: without it there is none
    return own is not None and isinstance(module, own.Conv1D)


def experts_transposed(module: nn.Module, parameter: str, hidden: int | None) -> bool | None:
    """Whether stacked experts are stored [experts, in, out] and not [experts, out, in]; None where nothing tells.

    The class says so, or its sizes do: the width of the model, `hidden`, goes into the first matmul and comes out of
    the second. Where a matrix is square, its neighbour in the module tells.
    """
    declared = getattr(module, "is_transposed", None)
    if isinstance(declared, bool):
        return declared
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
    transposed = {name: _by_sizes(module, name, shape, hidden) for name, shape in shapes.items()}
    own = transposed.get(parameter)
    known = {value for value in transposed.values() if value is not None}
    return own if own is not None else known.pop() if len(known) == 1 else None


def _by_sizes(module: Any, parameter: str, shape: tuple[int, ...], hidden: int | None) -> bool | None:
    first, second = shape[1:]
    if first == second:
        return None
    if hasattr(module, "input_size") and hasattr(module, "output_size"):
        sizes = module.output_size, module.input_size
        return False if sizes == (first, second) else True if sizes == (second, first) else None
    width = getattr(module, "hidden_size", None) or getattr(module, "hidden_dim", None) or hidden
    if width not in (first, second) or parameter not in (*_UP, *_DOWN):
        return None
    return (first == width) == (parameter in _UP)
