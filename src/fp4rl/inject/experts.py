"""Live stacked experts ([experts, out, in] in one parameter) that compute with rounded numbers.

While the module's own forward runs, its parameters read as their rounded copies, whatever implementation it takes; what
goes into and comes out of the matmuls can be reached where they are `F.linear` calls (the eager implementation).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from fp4rl.inject.linear import LinearState
from fp4rl.inject.state import KEY


class StackState(LinearState):
    """One stacked parameter: every expert is rounded as a tensor of its own, in blocks along `in`."""

    transposed = False

    def _make(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        turned = weight.mT if self.transposed else weight
        made = [super(StackState, self)._make(expert.contiguous()) for expert in turned.unbind(0)]
        copy = torch.stack([copy for copy, _ in made])
        reach = torch.stack([reach for _, reach in made if reach is not None]) if made[0][1] is not None else None
        if not self.transposed:
            return copy, reach
        return copy.mT.contiguous(), None if reach is None else reach.mT.contiguous()

    def would_change(self, point: str, x: Tensor) -> bool:
        """As for one matrix, expert by expert."""
        if x.ndim < 3:
            return super().would_change(point, x)
        turned = x.mT if self.transposed else x
        return any(super(StackState, self).would_change(point, expert.contiguous()) for expert in turned.unbind(0))

    def count(self) -> None:
        """The experts were called once."""
        if torch.compiler.is_compiling():
            self.ticks.add_(1)
        else:
            self.calls += 1


class ExpertsState:
    """All stacked parameters of one module, by name, and what each reads as while the forward runs."""

    def __init__(self, stacks: dict[str, StackState]) -> None:
        self.stacks = stacks
        self.original: type[nn.Module] = nn.Module
        self.removed = False
        self._reading: dict[str, Tensor] | None = None

    def __reduce__(self) -> Any:
        return type(self), (self.stacks,), {"original": self.original, "removed": self.removed}

    @property
    def stacked(self) -> tuple[str, ...]:
        """The names of the parameters, in a fixed order."""
        return tuple(sorted(self.stacks))

    def forget(self) -> None:
        """Weights may have changed."""
        for stack in self.stacks.values():
            stack.forget()

    def forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward over rounded parameters."""
        original: Any = self.original
        for stack in self.stacks.values():
            stack.transposed = bool(getattr(module, "is_transposed", False))
            stack.count()
        self._reading = {}
        try:
            if any(stack.input_on or stack.output_on for stack in self.stacks.values()):
                with _Intercept(self):
                    return original.forward(module, *args, **kwargs)
            return original.forward(module, *args, **kwargs)
        finally:
            self._reading = None

    def read(self, name: str, weight: Tensor) -> Tensor:
        """What the parameter reads as: its copy inside the forward, itself everywhere else."""
        stack = self.stacks[name]
        if self._reading is None or not stack.weight_on or self.removed:
            return weight
        if name not in self._reading:  # once a forward; the eager implementation reads it once an expert
            self._reading[name] = stack.copy_of(weight, (weight,))
        return self._reading[name]

    def stack_of(self, weight: Tensor) -> StackState | None:
        """The stack that a matrix [out, in] belongs to; gate_up and down never have one shape."""
        return next((s for s in self.stacks.values() if s.plan.site.shape[1:] == tuple(weight.shape)), None)


def reading_rounded(name: str) -> property:
    """A property in the place of a parameter, for the stand-in class."""

    def read(module: nn.Module) -> Any:
        weight: Any = module._parameters[name]
        state: ExpertsState = module.__dict__[KEY]
        return state.read(name, weight)

    return property(read)


class _Intercept(TorchFunctionMode):
    """Catches the matmuls of the eager implementation, one expert at a time."""

    def __init__(self, state: ExpertsState) -> None:
        super().__init__()
        self.state = state

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        stack = self.state.stack_of(args[1]) if func is linear and len(args) > 1 else None
        if stack is None or not args[0].numel():
            return func(*args, **(kwargs or {}))
        x = stack.rounded_values(args[0], "input") if "input" in stack.points else args[0]
        y = linear(x, *args[1:], **(kwargs or {}))
        return stack.rounded_values(y, "output") if "output" in stack.points else y
