"""The matmuls that a followed weight enters, whichever function computes them, met on their way.

A stacked parameter reaches its product through indexing, transposing, gathering and casting. Each of these keeps the
order of the last two axes in memory, so the strides of the operand tell which stored axis the product sums over, also
where a matrix is square.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, linear
from torch.overrides import TorchFunctionMode

_MATMULS = (torch.matmul, torch.bmm, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.mm)
_GROUPED = (grouped_mm, torch._grouped_mm)


class Stack(Protocol):
    """What a product asks of the weight's state."""

    input_on: bool
    output_on: bool

    def rounded_values(self, x: Tensor, point: str) -> Tensor:
        """`x` rounded to the format of a point along its last axis."""

    def summed_over(self, transposed: bool) -> None:
        """The product sums over the last axis but one of the stored weight, or over the last."""


class Products(TorchFunctionMode):
    """Follows weights to their products, and rounds there what goes in and comes out."""

    def __init__(self) -> None:
        super().__init__()
        self._followed: dict[int, tuple[Tensor, Stack]] = {}  # the tensors too: an id is taken again when one is gone

    def follow(self, weight: Tensor, stack: Stack) -> None:
        """Meet the products that `weight`, or what is made of it, enters."""
        self._followed[id(weight)] = (weight, stack)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if len(args) > 1 and (func is linear or func in _MATMULS or func in _GROUPED or _is_fallback(func)):
            if (stack := self._stack_of(args[1])) is not None:
                return _second(stack, func, args, kwargs)
            if (stack := self._stack_of(args[0])) is not None and args[1].ndim > 1:
                return _first(stack, func, args, kwargs)
        result = func(*args, **kwargs)
        if args and (stack := self._stack_of(args[0])) is not None:
            for tensor in _tensors(result):
                if args[0].is_contiguous() or not tensor.is_contiguous():  # else a copy may have another order
                    self.follow(tensor, stack)
        return result

    def _stack_of(self, x: object) -> Stack | None:
        followed = self._followed.get(id(x))
        return None if followed is None else followed[1]


def _second(stack: Stack, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """x times the weight: `linear` sums over the last axis of both, all others over the weight's last but one."""
    x, weight, *rest = args
    if x.numel():
        _look(stack, weight, -1 if func is linear else -2)
        x = stack.rounded_values(x, "input") if stack.input_on else x
    y = func(x, weight, *rest, **kwargs)
    return stack.rounded_values(y, "output") if stack.output_on and y.numel() else y


def _first(stack: Stack, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The weight times columns x [..., in, n]: their values run along the axis before the last."""
    weight, x, *rest = args
    if x.numel():
        _look(stack, weight, -1)
        x = stack.rounded_values(x.mT.contiguous(), "input").mT if stack.input_on else x
    y = func(weight, x, *rest, **kwargs)
    return stack.rounded_values(y.mT.contiguous(), "output").mT if stack.output_on and y.numel() else y


def _look(stack: Stack, weight: Tensor, axis: int) -> None:
    """Tell the stack which of its stored axes a product sums over: the last one has stride 1."""
    other = -1 if axis == -2 else -2
    if weight.shape[axis] > 1 and weight.shape[other] > 1:  # a stride over one value says nothing
        stack.summed_over(weight.stride(axis) != 1)


def _is_fallback(func: Callable[..., Any]) -> bool:
    """Whether this is what transformers computes a grouped product with where torch has none."""
    return "grouped_mm_fallback" in getattr(func, "__name__", "")


def _tensors(result: Any) -> Iterable[Tensor]:
    if isinstance(result, Tensor):
        return (result,)
    return [part for part in result if isinstance(part, Tensor)] if isinstance(result, tuple | list) else ()
