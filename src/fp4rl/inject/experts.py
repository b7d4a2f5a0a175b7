"""Live stacked experts ([experts, out, in] in one parameter, or transposed) that compute with rounded numbers.

While the module's own forward runs, reading a parameter gives its rounded copy, and every matmul with one of them is
intercepted: inputs and outputs are rounded there, and the axis that it sums over is checked. On its way to the matmul a
parameter is indexed, transposed, gathered and cast, all of which keep the order of the last two axes in memory: so the
operand's strides tell which stored axis the product sums over, even where the matrix is square.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, linear
from torch.overrides import TorchFunctionMode

from fp4rl.inject.adapted import AdaptedSum, rounded_sum
from fp4rl.inject.linear import LinearState
from fp4rl.inject.matmul import BothWays, in_backward
from fp4rl.inject.site import KEY
from fp4rl.spec.errors import CheckFailed

_MATMULS = (torch.matmul, torch.bmm, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.mm)
_GROUPED = (grouped_mm, torch._grouped_mm)


@dataclass(frozen=True)
class ExpertProduct:
    """A product that was intercepted: `compute` makes y [..., m, out] from x [..., m, in] and a weight [..., out, in].

    Where one x holds the rows of several experts, `ends` holds the end of each expert's rows.
    """

    compute: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    weight: Tensor
    ends: Tensor | None = None

    @classmethod
    def of(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> "ExpertProduct":
        """Describe a call: `linear` sums over the weight's last axis, all others over the last but one."""
        x, weight, *rest = args
        if func is linear:
            return cls(lambda x, w: linear(x, w, *rest, **kwargs), x, weight)
        ends = next(iter(rest), kwargs.get("offs")) if func in _GROUPED or _is_fallback(func) else None
        return cls(lambda x, w: func(x, w.mT, *rest, **kwargs), x, weight.mT, ends)


class StackState(LinearState):
    """The state of one stacked parameter: each expert is rounded as a tensor of its own, in blocks along `in`."""

    seen = False  # whether a product has confirmed the assumed layout

    def rounded(self, x: Tensor, point: str, generator: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
        """Round as for one matrix; a weight expert by expert, in one call where no scale or draw depends on others."""
        alone = all(fmt.scale in ("e8m0", "none") for fmt in self.present[point].formats) and generator is None
        if point != "weight" or alone:
            return super().rounded(x, point, generator)
        made = [super(StackState, self).rounded(expert.contiguous(), point, generator) for expert in x.unbind(0)]
        reach = [reach for _, reach in made if reach is not None]
        return torch.stack([copy for copy, _ in made]), torch.stack(reach) if reach else None

    def computed(self, product: ExpertProduct) -> Tensor:
        """Compute a product with everything that acts at this site."""
        self.numbers[_thread()] = self.product_number + 1
        x, weight = product.x, product.weight
        x = self.rounded_input(x.contiguous()) if self.input_on else x
        y = self._with_wrong_products(product, x) if self.products_on else product.compute(x, weight)
        return self.rounded_values(y.contiguous(), "output") if self.output_on else y

    def _with_wrong_products(self, product: ExpertProduct, x: Tensor) -> Tensor:
        """Compute a product with errors in its result and both gradients, each rounded for a product of its own."""
        compute, weight = product.compute, product.weight
        if not torch.is_grad_enabled():
            return self.with_errors(compute(x, weight), "matmul", x)
        by_input = compute(in_backward(x.view_as(x), partial(self._wrong, "grad_input", None)), weight.detach())
        wrong = partial(self._wrong, "grad_weight", product.ends)
        by_weight = compute(x.detach(), in_backward(weight.view_as(weight), wrong))
        in_backward(by_input, partial(self.gradient, "grad_input"))
        in_backward(by_weight, partial(self._rounded_by_rows, product))
        y = self.with_errors(by_input.detach(), "matmul", x)
        return BothWays.apply(by_input, by_weight, y)  # type: ignore[no-any-return, no-untyped-call]

    def _wrong(self, product: str, ends: Tensor | None, g: Tensor) -> Tensor:
        """Return the gradient with errors; experts without rows have no product, and so no error."""
        if ends is None:
            return self.with_errors(g, "matmul", g, backward=product)
        computed = ends.diff(prepend=ends.new_zeros(1)) > 0
        return g.index_put((computed,), self.with_errors(g[computed], "matmul", g, backward=product))

    def _rounded_by_rows(self, product: ExpertProduct, g: Tensor) -> Tensor:
        """Return the gradient as operand of grad_weight, rounded in blocks along the rows of one expert."""
        if product.ends is not None:
            *parts, rest = g.tensor_split(product.ends.tolist())  # behind the last expert's: rows of other processes
            rounded = [self.gradient("grad_weight", part.mT).mT for part in parts if len(part)]
            return torch.cat([*rounded, rest])
        rows = g.flatten(0, -2) if product.weight.ndim == 2 else g
        return self.gradient("grad_weight", rows.mT).mT.reshape(g.shape)

    def reads_as(self, weight: Tensor, adapter: Any) -> tuple[Tensor, Tensor | None]:
        """Return what the parameter reads as, and what an adapter that is not merged adds in a product of its own."""
        adapted = None if adapter is None else AdaptedSum(adapter)
        if adapted is not None and self.plan.merged:
            return (rounded_sum(self, adapted) if self.weight_on else adapted.weight), None
        value = self.copy_of(weight, weight) if self.weight_on else weight
        return value, None if adapted is None else adapted.delta

    def would_change(self, point: str, x: Tensor) -> bool:
        """Return whether rounding changes the values of any expert."""
        if point != "weight":
            return super().would_change(point, x)
        return any(super(StackState, self).would_change(point, expert) for expert in x.unbind(0))

    def summed_over(self, transposed: bool) -> None:
        """Record the layout that a product shows (`transposed`: [experts, in, out]); CheckFailed if not the assumed."""
        if self.transposed is None:
            self.transposed = transposed
        if self.transposed != transposed:
            words = {True: "[experts, in, out]", False: "[experts, out, in]"}
            raise CheckFailed(
                f"{self.plan.name} was taken to be stored as {words[not transposed]}, but its matmul sums over the "
                f"other axis: its blocks would run along the outputs; leave it out: targets.leave: [{self.plan.name}]"
            )
        self.seen = True


class Followed(NamedTuple):
    """A parameter, or a tensor made from it, on its way to a product, with what its adapter adds there."""

    weight: Tensor  # held, since the id of a freed tensor is used again
    stack: StackState
    beside: Tensor | None


class Products(TorchFunctionMode):
    """Follows weights to their products, and rounds the inputs and outputs of these; with `look` only checks axes."""

    def __init__(self, look: bool = False) -> None:
        super().__init__()
        self._look = look
        self._followed: dict[int, Followed] = {}

    def follow(self, weight: Tensor, stack: StackState, beside: Tensor | None = None) -> None:
        """Intercept the products of `weight` and of all tensors that are made from it."""
        self._followed[id(weight)] = Followed(weight, stack, beside)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if len(args) > 1 and (func is linear or func in _MATMULS or func in _GROUPED or _is_fallback(func)):
            if (second := self._followed.get(id(args[1]))) is not None:
                y = self._met(second.stack, ExpertProduct.of(func, args, kwargs))
                rest, more = (args[2:], kwargs) if func is not linear else ((), {})  # no bias a second time
                return y if second.beside is None else y + func(args[0], second.beside, *rest, **more)
            if (first := self._followed.get(id(args[0]))) is not None and args[1].ndim > 1:
                columns = ExpertProduct(lambda x, w: func(w, x.mT, **kwargs).mT, args[1].mT, args[0])
                y = self._met(first.stack, columns).mT
                return y if first.beside is None else y + func(first.beside, *args[1:], **kwargs)
        result = func(*args, **kwargs)
        if args and (known := self._followed.get(id(args[0]))) is not None and (tensors := _tensors(result)):
            beside = None if known.beside is None else func(known.beside, *args[1:], **kwargs)
            twins: Sequence[Tensor | None] = _tensors(beside) or [None] * len(tensors)
            for tensor, twin in zip(tensors, twins, strict=True):
                if args[0].is_contiguous() or not tensor.is_contiguous():  # else a copy may have another order
                    self.follow(tensor, known.stack, twin)
        return result

    def _met(self, stack: StackState, product: ExpertProduct) -> Tensor:
        x, weight = product.x, product.weight
        if x.numel() and min(weight.shape[-2:]) > 1:  # a stride over one value says nothing
            stack.summed_over(weight.stride(-1) != 1)
        return stack.computed(product) if x.numel() and not self._look else product.compute(x, weight)


def _is_fallback(func: Callable[..., Any]) -> bool:
    """Return whether this is transformers' own grouped product, used where torch has none."""
    return "grouped_mm_fallback" in getattr(func, "__name__", "")


def _tensors(result: Any) -> Sequence[Tensor]:
    if isinstance(result, Tensor):
        return (result,)
    return [part for part in result if isinstance(part, Tensor)] if isinstance(result, tuple | list) else ()


class ExpertsState:
    """The stacked parameters of one module by name, and the copy that each reads as while the forward runs."""

    def __init__(self, stacks: dict[str, StackState]) -> None:
        self.stacks = stacks
        self.original: type[nn.Module] = nn.Module
        self.removed = False
        # By thread, since two may run one model at a time: peft's layers above that are called, by parameter; copies.
        self.adapters: dict[int, dict[str, Any]] = {}
        self._reading: dict[int, dict[str, tuple[Tensor, Tensor | None]]] = {}
        self._products: dict[int, Products] = {}

    def __reduce__(self) -> Any:
        return type(self), (self.stacks,), {"original": self.original, "removed": self.removed}

    @property
    def stacked(self) -> tuple[str, ...]:
        """The names of the parameters, in a fixed order."""
        return tuple(sorted(self.stacks))

    def forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward over rounded parameters."""
        stacks = self.stacks.values()
        for stack in stacks:
            stack.count()
            stack.numbers[_thread()] = 0
        if any(stack.transposed is None for stack in stacks):
            self._rehearse(module, *args, **kwargs)
        meet = any(s.input_on or s.output_on or s.products_on or s.plan.packed for s in stacks)
        meet = meet or any(not self.stacks[name].plan.merged for name in self.adapters.get(_thread(), {}))
        unseen = any(stack.weight_on and not stack.seen for stack in stacks) and not torch.compiler.is_compiling()
        if meet or unseen:
            return self._followed(self._rounded, module, *args, **kwargs)
        return self._rounded(module, *args, **kwargs)

    def _rounded(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self._reading[_thread()] = {}
        try:
            return self._plainly(module, *args, **kwargs)
        finally:
            self._reading.pop(_thread(), None)

    def _plainly(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        original: Any = self.original
        return original.forward(module, *args, **kwargs)

    # Dynamo would have to trace the following of tensors by their identity: a compiled graph breaks here.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _followed(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        look = run == self._plainly  # a rehearsal reads the masters
        with Products(look=look) as self._products[_thread()]:
            try:
                return run(*args, **kwargs)
            finally:
                del self._products[_thread()]

    def _rehearse(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Run once with unrounded weights, to see which axis of a square matrix is summed over."""
        with torch.no_grad():
            self._followed(self._plainly, module, *args, **kwargs)
        for stack in self.stacks.values():
            if stack.transposed is None:
                raise CheckFailed(
                    f"{stack.plan.name}: no matmul of this square matrix was met, so nothing tells along which axis "
                    f"its blocks run; leave it out: targets.leave: [{stack.plan.name}]"
                )

    @contextmanager
    def adapted_by(self, adapter: Any) -> Iterator[None]:
        """Compute with peft's adapter of one parameter."""
        adapters = self.adapters.setdefault(_thread(), {})
        adapters[adapter.parameter_name] = adapter
        try:
            yield
        finally:
            del adapters[adapter.parameter_name]

    def read(self, name: str, weight: Tensor) -> Tensor:
        """Return the parameter's copy inside the forward, the parameter itself everywhere else."""
        value, beside, thread = weight, None, _thread()
        reading, products = self._reading.get(thread), self._products.get(thread)
        if reading is not None and not self.removed:
            if name not in reading:  # once a forward, though the eager code reads it once for each expert
                reading[name] = self.stacks[name].reads_as(weight, self.adapters.get(thread, {}).get(name))
            value, beside = reading[name]
        if products is not None:
            products.follow(value, self.stacks[name], beside)
        return value


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _thread() -> int:
    return get_ident()


def reading_rounded(name: str) -> property:
    """Return a property that stands in for a parameter in the injected class."""

    def read(module: nn.Module) -> Any:
        state: ExpertsState = module.__dict__[KEY]
        weight: Any = module._parameters.get(name)
        if weight is None:  # peft has put a sum in its place
            raise CheckFailed(
                f"{state.stacks[name].plan.name} got an adapter after the injection; put adapters on first"
            )
        return state.read(name, weight)

    return property(read)
