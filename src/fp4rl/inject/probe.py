"""A check of what the matmuls of injected layers really receive against what their master weights round to now.

Counters tell that a layer was called, looks what its rounding gave. Neither notices a copy that became stale later, or
a forward that bypasses the rounding. So now and then every layer is run on a few rows of input, outside the model, and
the operands that reach its product are compared by value with a rounding that is computed here, by numerics alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from fp4rl.inject.adapted import AdaptedSum, ForwardingState, MergedState
from fp4rl.inject.attach import Attachment
from fp4rl.inject.experts import ExpertsState, StackState
from fp4rl.inject.linear import LinearState
from fp4rl.inject.packed import CodesState
from fp4rl.inject.present import computed
from fp4rl.inject.site import KEY, SiteState
from fp4rl.numerics.levels import levels
from fp4rl.spec.errors import CheckFailed

ROWS = 4


def require_rounded(attachment: Attachment) -> int:
    """Raise CheckFailed when a site's operands are not what its master and its formats give now; count the sites.

    Not checked is what cannot be computed here: random operands (stochastic rounding, hardware errors), attention,
    packed weights (they have no master) and sharded ones (no copy of them is kept). Routers that are left out must
    multiply by their own weights.
    """
    held, wrong = 0, []
    for module in attachment.modules:
        state = module.__dict__[KEY]
        for site, points in _checked_sites(module, state, attachment.modules):
            held += 1
            wrong += [f"{site.plan.name} ({point})" for point, right in points.items() if not right]
    if rounded := _rounded_routers(attachment):
        raise CheckFailed(
            f"{attachment.phase}: {rounded[0]} is to be left, and multiplies by other numbers than its own"
        )
    if wrong:
        raise CheckFailed(
            f"{attachment.phase}: at {len(wrong)} of {held} sites the matmul receives other numbers than the master "
            f"rounds to now: {', '.join(wrong[:4])}{' ...' if len(wrong) > 4 else ''}; a copy went stale, or nothing "
            "was rounded"
        )
    return held


def _checked_sites(
    module: nn.Module, state: Any, injected: list[nn.Module]
) -> Iterator[tuple[SiteState, dict[str, bool]]]:
    """Yield each site of a module with what could be compared there: point -> whether it is right."""
    stacks = [(name, s) for name, s in state.stacks.items()] if isinstance(state, ExpertsState) else []
    for name, stack in stacks:
        if stack.plan.packed:
            continue
        if stack.keep_copies and stack.transposed is not None and _repeatable(stack, "weight"):
            with _uncounted(stack):
                adapter = next((layer for layer in injected if _adapts(layer, module, name)), None)
                yield stack, {"weight": _stack_is_right(stack, module._parameters[name], adapter)}  # type: ignore[arg-type]
    if isinstance(state, LinearState) and not isinstance(state, CodesState) and state.keep_copies:
        if isinstance(state, MergedState) and not state.weight_on:
            return  # the layer's own forward runs, and its products with the adapters would be met too
        with _uncounted(state):
            yield state, _operands_are_right(module, state)


@torch.no_grad()
def _rounded_routers(attachment: Attachment) -> list[str]:
    """Return the routers that are left out and multiply by another weight than their own."""
    wrong, sharded = [], not all(state.keep_copies for state in attachment.states.values())
    for site in (left.site for left in attachment.table.left_out if left.site.kind == "router"):
        router: Any = attachment.model.get_submodule(site.path)
        if site.parameter != "weight" or len(signature(router.forward).parameters) != 1 or sharded:
            continue  # it takes more than tokens
        weight = router.weight
        with _Listener(weight.shape) as listener:
            router.forward(_rows(weight))
        seen = weight if listener.operands is None else listener.operands[1]
        if not _same(seen, weight.to(seen.dtype)):
            wrong.append(site.name)
    return wrong


def _rows(master: Tensor) -> Tensor:
    rows = torch.randn(ROWS, master.shape[1], generator=torch.Generator().manual_seed(0))
    return rows.to(master.device, master.dtype)


def _repeatable(state: SiteState, point: str) -> bool:
    """Return whether an operand's rounding is deterministic."""
    return not state.has_errors(point) and not (point in state.present and state.present[point].draws)


def expected(state: SiteState, point: str, x: Tensor, expert: int = 0) -> Tensor:
    """Return `x` as it must arrive at the product: rounded by numerics alone where the point is active.

    It is cast to what the injection declares, whatever the site casts to; `expert` is the number of a stack's matrix.
    """
    if point not in state.points:
        return x
    whole = x
    if point == "weight" and isinstance(state, LinearState) and state.group is not None:  # under one factor
        for other, module in state.group.others(state):
            row = torch.zeros_like(x[:1])
            row[0, 0] = other.master(module).abs().max()
            whole = torch.cat([whole, row])
    dtype = getattr(torch, state.injection.dtype)
    if point == "weight" and isinstance(state, LinearState) and state.anchor is not None and state.anchored:
        anchor = torch.zeros_like(whole, dtype=dtype)
        anchor[: len(x)] = state.as_used(state.anchor).reshape(-1, *x.shape)[expert]
        level, scale = levels(whole.to(dtype), state.present[point].own.fmt, anchor)
        return (level * scale).to(x.dtype)[: len(x)]
    return computed(whole, state.present[point], dtype)[: len(x)]


def _adapts(layer: Any, experts: nn.Module, name: str) -> bool:
    """Return whether it is peft's layer above one parameter of these experts."""
    return (
        isinstance(layer.__dict__[KEY], ForwardingState)
        and layer.get_base_layer() is experts
        and layer.parameter_name == name
    )


@torch.no_grad()
def _stack_is_right(stack: StackState, weight: Tensor, adapter: Any) -> bool:
    seen, _ = stack.reads_as(weight, adapter)
    master = AdaptedSum(adapter).weight if adapter is not None and stack.plan.merged else weight
    experts = zip(stack.as_used(seen).unbind(0), stack.as_used(master).unbind(0), strict=True)
    return all(_same(copy, expected(stack, "weight", own.contiguous(), n)) for n, (copy, own) in enumerate(experts))


def _operands_are_right(module: nn.Module, state: LinearState) -> dict[str, bool]:
    layer: Any = module
    with torch.no_grad():
        master = state.master(layer).detach()
    rows = _rows(master)
    # With gradients a layer takes another path than without: probe the one that this phase takes.
    with torch.set_grad_enabled(state.phase == "training"), _Listener(master.shape) as listener:
        y = layer.forward(rows)
    if listener.operands is None:
        return {"weight": False}  # no product of this shape was computed
    x, weight, product = listener.operands
    arrived = {"weight": (master, weight), "input": (rows, x)}
    if state.output_on and not state.products_on:
        arrived["output"] = (product.detach(), y)
    return {
        point: _same(seen.reshape(given.shape), expected(state, point, given))
        for point, (given, seen) in arrived.items()
        if _repeatable(state, point)
    }


def _same(first: Tensor, other: Tensor) -> bool:
    """Return whether all values are equal; NaN equals NaN here, since a diverged run is no sign of a stale copy."""
    return torch.equal(first, other) or torch.equal(first.nan_to_num(), other.nan_to_num())


class _Listener(TorchFunctionMode):
    """Records the last product [rows, in] x [out, in]^T that is computed: its operands and its result."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape
        self.operands: tuple[Tensor, Tensor, Tensor] | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        y = func(*args, **(kwargs or {}))
        if func is linear and args[1].shape == self.shape:
            self.operands = args[0], args[1], y
        elif func in (torch.matmul, Tensor.matmul, Tensor.__matmul__) and args[1].mT.shape == self.shape:
            self.operands = args[0], args[1].mT, y
        return y


@contextmanager
def _uncounted(state: LinearState) -> Iterator[None]:
    """Keep what the probe does out of the evidence of what the model did."""
    state.book()
    meters = {key: replace(meter) for key, meter in state.meters.items()}
    yield
    state.uncount()
    state.meters = meters
    state.shared.forget()
