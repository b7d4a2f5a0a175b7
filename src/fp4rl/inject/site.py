"""The state of every injected module: its plan, what is active in the present phase, its counters and randomness."""

from collections.abc import Iterator, Mapping
from dataclasses import astuple
from threading import get_ident
from types import MethodType
from typing import Any
from weakref import WeakSet
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fp4rl.inject.cache import SharedInput
from fp4rl.inject.evidence import Meter
from fp4rl.inject.faults import SiteRng, apply_error
from fp4rl.inject.fused import KEY as KEY
from fp4rl.inject.plan import SitePlan
from fp4rl.inject.present import Rounding, blended, computed, label_at, passing, presents
from fp4rl.inject.rounding import round_as, through
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.spec.evidence import Injected
from fp4rl.spec.hardware import HardwareError
from fp4rl.spec.injection import Injection
from fp4rl.spec.points import Phase
from fp4rl.spec.precision import Stage

# Every site of the process, copied and unpickled ones too, is told of every optimizer step, since a fused optimizer
# writes weights without a trace. Weak references, so that a model can be freed without `remove`.
_SITES: WeakSet["SiteState"] = WeakSet()


def _announce_step(*_: Any) -> None:
    for site in tuple(_SITES):
        site.stepped()


register_optimizer_step_post_hook(_announce_step)


class SiteState:
    """The base of all states. A copy (deepcopy, pickle) has its own counters and acts as the original does now."""

    stacked: tuple[str, ...] = ()  # parameters that read as rounded copies; see `inject.experts`

    def __init__(self, plan: SitePlan, injection: Injection, shared: SharedInput) -> None:
        self.plan, self.injection, self.shared = plan, injection, shared
        self.dtype: torch.dtype = getattr(torch, injection.dtype)
        self.present = presents(plan, injection, None)
        self.rng = SiteRng(crc32(f"{injection.seed}/{plan.name}".encode()))
        self.original: type[nn.Module] = nn.Module
        self.meters: dict[tuple[Phase, str, Stage], Meter] = {}
        self.calls = 0
        self.numbers: dict[int, int] = {}  # of the product that is computed, by thread
        self.keep_copies = True
        self.removed = False
        # Counters for torch.compile, where a Python number would become a constant: calls, and elements of each point.
        self.compiled_calls = torch.zeros((), dtype=torch.int64)
        errors = [error.name for error in plan.errors if error.forward]
        self.compiled_elements = {point: torch.zeros((), dtype=torch.int64) for point in (*self.present, *errors)}
        self.phase: Phase = "training"
        self.step: int | None = None
        self.points: frozenset[str] = frozenset()
        self.errors: tuple[HardwareError, ...] = ()
        _SITES.add(self)

    def __reduce__(self) -> Any:
        points = self.points | ({"errors"} if self.errors else set())
        active = self.original, self.keep_copies, self.rng.step, self.phase, points, self.step
        return type(self), (self.plan, self.injection, self.shared), active

    def __setstate__(self, state: tuple[type[nn.Module], bool, int, Phase, frozenset[str], int | None]) -> None:
        self.original, self.keep_copies, self.rng.step, *active = state
        self.enter(*active)  # type: ignore[arg-type]

    def enter(self, phase: Phase, points: frozenset[str], step: int | None = None) -> None:
        """Begin a phase in which `points` are active; what was counted so far is booked under the previous phase.

        `step`: of training, for precision that changes; evaluations have none.
        """
        self.book()
        self.phase, self.step = phase, step
        if self.injection.schedule is not None:
            self.present = presents(self.plan, self.injection, None if phase == "evaluation" else step)
        self.points = points.intersection(self.present)
        self.errors = self.plan.errors if "errors" in points else ()

    @property
    def active(self) -> tuple[str, ...]:
        """The points and errors that act in the forwards of this phase."""
        points = [point for point in self.present if point in self.points and not point.startswith("grad_")]
        return (*points, *(error.name for error in self.errors if error.forward))

    @property
    def product_number(self) -> int:
        """Which product of its forward this thread computes, from 1, where a site has one an expert; 0 elsewhere."""
        return self.numbers.get(get_ident(), 0)

    def count(self) -> None:
        """Count a call of the forward."""
        if torch.compiler.is_compiling():
            self.compiled_calls.add_(1)
        else:
            self.calls += 1

    def meter(self, point: str) -> Meter:
        """Return the meter of a point in this phase."""
        return self.meters.setdefault(self._key(point), Meter())

    def _key(self, point: str) -> tuple[Phase, str, Stage]:
        return self.phase, point, self.present[point].stage if point in self.present else "after"

    def missed(self) -> bool:
        """Return whether some look of this phase found a tensor unchanged that rounding would change."""
        return any(meter.missed for (phase, *_), meter in self.meters.items() if phase == self.phase)

    def book(self) -> None:
        """Move the running call counters into the meters of this phase."""
        compiled_calls = int(self.compiled_calls)
        calls = self.calls + compiled_calls
        for point in self.active if calls else ():
            self.meter(point).calls += calls
        for point, elements in self.compiled_elements.items() if compiled_calls else ():
            if counted := int(elements):
                self.meter(point).elements += counted
        self.uncount()

    def uncount(self) -> None:
        """Drop what was counted and not yet booked."""
        self.calls = 0
        for counter in (self.compiled_calls, *self.compiled_elements.values()):
            counter.zero_()

    def recount(self) -> None:
        """Set the counters to zero."""
        self.book()
        self.meters.clear()

    def silent(self) -> bool:
        """Return whether the site should act in this phase but none of its points has seen a tensor."""
        return bool(self.active) and not any(self._key(point) in self.meters for point in self.active)

    def untouched(self) -> tuple[str, ...]:
        """Return the active points that have seen no tensor although calls of the forward were counted."""
        met = {point: self.meters.get(self._key(point)) for point in self.active}
        return tuple(p for p, meter in met.items() if meter and meter.calls and not (meter.elements or meter.looks))

    def note(self, point: str, before: Tensor, after: Tensor, elements: int, *, own_call: bool = False) -> None:
        """Count `elements` that were rounded or given an error, and compare a sample of them now and then.

        Calls of the forward are counted once for all points; `own_call` counts one here, for points of the backward.
        """
        if torch.compiler.is_compiling():
            if point in self.compiled_elements:
                self.compiled_elements[point].add_(elements)
            return
        meter = self.meter(point)
        meter.elements += elements
        meter.calls += own_call
        calls = max(1, meter.calls + (0 if own_call else self.calls))  # a compiled graph counts for itself
        if meter.due(calls):
            meter.look(calls, before, after, lambda: self.would_change(point, before))

    def would_change(self, point: str, x: Tensor) -> bool:
        """Return whether rounding `x` to the format of a point changes any value; False for an error: it need not."""
        present = self.present.get(point)
        if present is None:
            return False
        generator = torch.Generator(x.device).manual_seed(0) if present.draws else None
        return not torch.equal(computed(x, present, self.dtype, generator), x)

    def rounded_values(self, x: Tensor, point: str) -> Tensor:
        """Round `x` to the format of a point along its last axis, in its own dtype; the gradient passes through."""
        generator = self._drawn_for(x, point) if self.present[point].draws else None
        # The cast is part of the rounding: if autograd saw it, it would cast the gradient as well.
        copy, reach = self.rounded(x, point, generator)
        self.note(point, x, copy, x.numel())
        return through(x, copy, reach, getattr(self.plan, point).rotation)

    def rounded(self, x: Tensor, point: str, generator: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
        """Return Q(x in the injection's dtype) in x's own dtype, without gradient, and the share of it that passes."""
        present = self.present[point]
        copy, reach = self._rounded_to(x, present.own, generator)
        if present.share == 1:
            return copy, reach
        with torch.no_grad():
            first = present.before
            before, passes = (x.detach(), None) if first is None else self._rounded_to(x, first, generator)
            return blended(before, copy, present.share), passing(passes, reach, copy, present.share)

    def _rounded_to(self, x: Tensor, to: Rounding, generator: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
        if not torch.compiler.is_compiling():
            return self._rounded_now(x, to, generator)
        if generator is not None:
            return self._rounded_outside(x, to, generator)  # type: ignore[no-any-return]
        with torch.no_grad():
            estimator = to.estimator
            reach = None if estimator is None else estimator.in_graph(x.detach(), to.text, self.dtype)
            return round_as(x.detach(), to.text, self.dtype), reach

    def _rounded_now(self, x: Tensor, to: Rounding, generator: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            seen, estimator = x.detach().to(self.dtype), to.estimator
            reach = None if estimator is None else estimator.factor(seen, to.fmt, x.dtype)
            return fake_quantize(seen, to.fmt, generator=generator).to(x.dtype), reach

    # Random rounding breaks a compiled graph, or raises where breaks are not allowed (fullgraph).
    _rounded_outside = torch.compiler.disable(_rounded_now)  # type: ignore[no-untyped-call]

    def with_errors(self, x: Tensor, where: str, drawn_for: Tensor, *, backward: str = "") -> Tensor:
        """Return `x` with the errors of a point: those of the forward, or of the product named in `backward`."""
        for error in self.errors:
            if error.point == where and (error.backward if backward else error.forward):
                wrong = apply_error(x, error, self._generator(error, drawn_for, backward))
                point = f"{error.name}:{backward}" if backward else error.name
                self.note(point, x, wrong, x.numel(), own_call=bool(backward))
                x = wrong
        return x

    def _generator(self, error: HardwareError, drawn_for: Tensor, backward: str) -> torch.Generator:
        salt = f"{error.name}/{self.errors.index(error)}/{backward}"
        if error.kind == "jitter":
            return self.rng.unknown(drawn_for.device, salt)
        if error.kind == "stuck" or error.point == "weight":
            return self.rng.fixed(drawn_for.device, salt)
        return self.rng.for_tensor(drawn_for, salt) if backward else self._drawn_for(drawn_for, salt)

    def _drawn_for(self, x: Tensor, salt: str) -> torch.Generator:
        return self.rng.for_tensor(x, f"{salt}/{self.product_number}" if self.product_number else salt)

    def gradient(self, product: str, g: Tensor) -> Tensor:
        """Return the gradient as operand of `product` (grad_input, grad_weight), rounded where its format is active."""
        if product not in self.points:
            return g
        generator = self.rng.for_tensor(g, product) if self.present[product].draws else None
        rounded, _ = self.rounded(g, product, generator)
        self.note(product, g, rounded, g.numel(), own_call=True)
        return rounded

    def has_errors(self, *points: str) -> bool:
        """Return whether an error at one of these points is active."""
        return any(error.point in points for error in self.errors)

    def stepped(self) -> None:
        """Count an optimizer step: random numbers from here on belong to the next one."""
        self.rng.step += 1
        self.shared.forget()

    def forget(self) -> None:
        """Drop everything that was made from weights, since these may have been written."""
        self.rng.step += 1
        self.shared.forget()

    def rows(self) -> Iterator[Injected]:
        """Yield the evidence, a row per phase and point, and per stage of a precision that changes."""
        self.book()
        for (phase, point, stage), meter in self.meters.items():
            label = label_at(self.plan, self.injection, point, stage)
            row = meter.row(phase, self.plan.name, point, label)
            yield row if stage == "after" else row.extended(stage=stage)

    def state_dict(self) -> dict[str, Any]:
        """Return the step that random errors depend on, and the meters; for JSON."""
        self.book()
        return {"step": self.rng.step, "meters": [[*key, *astuple(meter)] for key, meter in self.meters.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.uncount()
        self.rng.step = state["step"]
        self.meters = {(phase, point, stage): Meter(*values) for phase, point, stage, *values in state["meters"]}


def runs_its_class(module: nn.Module) -> bool:
    """Return whether a call of the module runs its class's forward, at the latest below the hooks of accelerate."""
    own = module.__dict__.get("_old_forward", module.__dict__.get("forward"))
    return own is None or _is_of_class(module, own)


def change_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Give a module another class, also where accelerate keeps the forward of the one before beside its hooks."""
    bound = [name for name in ("_old_forward", "forward") if _is_of_class(module, module.__dict__.get(name))]
    module.__class__ = kind
    module.__dict__.update({name: MethodType(kind.forward, module) for name in bound})


def _is_of_class(module: nn.Module, forward: Any) -> bool:
    return getattr(forward, "__func__", None) is type(module).forward
