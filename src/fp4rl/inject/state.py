"""What every injected module knows: its plan, what is active in the present phase, its counters and its chance."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from fp4rl.inject.evidence import Meter
from fp4rl.inject.faults import SiteRng, apply_error
from fp4rl.inject.graph import reach_as, round_as, words
from fp4rl.inject.plan import SitePlan
from fp4rl.inject.rounded import through
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.numerics.reach import within_reach
from fp4rl.spec.hardware import HardwareError
from fp4rl.spec.modes import Phase
from fp4rl.spec.points import GRADIENTS, can_clip

KEY = "injected"  # where a module holds its state


@dataclass(frozen=True)
class Settings:
    """What all sites of one injection share."""

    dtype: torch.dtype
    clipped: bool  # whether a clipped value gets no gradient
    seed: int


class SiteState:
    """The frame of a site's state. A copy (deepcopy, pickle) counts for itself and acts as its original does now.

    The `audience` hears of every optimizer step of the process. A deep copy joins it; what was pickled is told nothing.
    """

    stacked: tuple[str, ...] = ()  # parameters that read as rounded copies; see `inject.experts`

    def __init__(self, plan: SitePlan, settings: Settings) -> None:
        self.plan = plan
        self.settings = settings
        formats = {point: getattr(plan, point) for point in plan.points()}
        self._words = {point: words(fmt) for point, fmt in formats.items()}
        self._clipping = {p for p, fmt in formats.items() if settings.clipped and p not in GRADIENTS and can_clip(fmt)}
        self.chance = SiteRng(settings.seed)
        self.original: type[nn.Module] = nn.Module
        self.meters: dict[tuple[Phase, str], Meter] = {}
        self.calls = 0
        self.keep_copies = True
        self.audience: WeakSet[SiteState] | None = None
        self.removed = False
        # What counts inside torch.compile, where a number would be frozen: calls, and elements of each point.
        self.ticks = torch.zeros((), dtype=torch.int64)
        errors = [error.name for error in plan.errors if error.forward]
        self.harmed = {point: torch.zeros((), dtype=torch.int64) for point in (*formats, *errors)}
        self.phase: Phase = "training"
        self.points: frozenset[str] = frozenset()
        self.errors: tuple[HardwareError, ...] = ()

    def __reduce__(self) -> Any:
        points = self.points | ({"errors"} if self.errors else set())
        return type(self), self._ingredients(), (self.original, self.keep_copies, self.chance.step, self.phase, points)

    def __setstate__(self, state: tuple[type[nn.Module], bool, int, Phase, frozenset[str]]) -> None:
        self.original, self.keep_copies, self.chance.step, phase, points = state
        self.enter(phase, points)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SiteState":
        kind, ingredients, now = self.__reduce__()
        twin: SiteState = kind(*deepcopy(ingredients, memo))
        twin.__setstate__(now)
        if self.audience is not None:
            self.audience.add(twin)
            twin.audience = self.audience
        return twin

    def _ingredients(self) -> tuple[Any, ...]:
        return self.plan, self.settings

    def enter(self, phase: Phase, points: frozenset[str]) -> None:
        """Begin a phase in which `points` are active; what was counted so far is booked under the phase before."""
        self.book()
        self.phase = phase
        self.points = points.intersection(self._words)
        self.errors = self.plan.errors if "errors" in points else ()

    @property
    def active(self) -> tuple[str, ...]:
        """The points and errors that act in the forwards of this phase."""
        points = [point for point in self._words if point in self.points and not point.startswith("grad_")]
        return (*points, *(error.name for error in self.errors if error.forward))

    def meter(self, point: str) -> Meter:
        """The meter of a point in this phase."""
        return self.meters.setdefault((self.phase, point), Meter())

    def missed(self) -> bool:
        """Whether some look of this phase found a tensor as it was that rounding changes."""
        return any(meter.missed for (phase, _), meter in self.meters.items() if phase == self.phase)

    def book(self) -> None:
        """Move the running call counters into the meters of this phase."""
        ticks = int(self.ticks)
        calls = self.calls + ticks
        for point in self.active if calls else ():
            self.meter(point).calls += calls
        for point, elements in self.harmed.items() if ticks else ():
            if harmed := int(elements):
                self.meter(point).elements += harmed
        self.uncount()

    def uncount(self) -> None:
        """Forget what was counted and not booked."""
        self.calls = 0
        for counter in (self.ticks, *self.harmed.values()):
            counter.zero_()

    def recount(self) -> None:
        """Start counting afresh."""
        self.book()
        self.meters.clear()

    def untouched(self) -> tuple[str, ...]:
        """The points that should act in this phase, at which calls were counted and not one tensor was met."""
        met = {point: self.meters.get((self.phase, point)) for point in self.active}
        return tuple(p for p, meter in met.items() if meter and meter.calls and not (meter.elements or meter.looks))

    def note(self, point: str, before: Tensor, after: Tensor, elements: int, *, own_call: bool = False) -> None:
        """Book `elements` that were harmed, and look at a sample of them now and then.

        Calls of the forward are counted once for all points; `own_call` counts one here, for what the backward does.
        """
        if torch.compiler.is_compiling():
            if point in self.harmed:
                self.harmed[point].add_(elements)
            return
        meter = self.meter(point)
        meter.elements += elements
        meter.calls += own_call
        calls = meter.calls + (0 if own_call else self.calls)
        if meter.due(calls):
            meter.look(calls, before, after, lambda: self.would_change(point, before))

    def would_change(self, point: str, x: Tensor) -> bool:
        """Whether rounding `x` afresh to the format of a point changes any value. An error owes no change."""
        fmt = getattr(self.plan, point, None)
        if fmt is None:
            return False
        generator = torch.Generator(x.device).manual_seed(0) if fmt.rounding == "stochastic" else None
        rounded = fake_quantize(x.detach().to(self.settings.dtype), fmt, generator=generator)
        return not torch.equal(rounded.to(x.dtype), x)

    def rounded_values(self, x: Tensor, point: str) -> Tensor:
        """`x` rounded to the format of a point along its last axis, in its own dtype; the gradient passes through."""
        generator = self.chance.for_tensor(x, point) if getattr(self.plan, point).rounding == "stochastic" else None
        # The cast is part of the rounding: left to autograd, it would cast the gradient as well.
        copy, reach = self.rounded(x, point, generator)
        self.note(point, x, copy, x.numel())
        return through(x, copy, reach)

    def rounded(self, x: Tensor, point: str, generator: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
        """(Q(x cast to the injection's dtype) in x's own dtype, where a gradient may pass); no gradient."""
        if not torch.compiler.is_compiling():
            return self._rounded_now(x, point, generator)
        if generator is not None:
            return self._rounded_outside(x, point, generator)  # type: ignore[no-any-return]
        dtype, fmt = self.settings.dtype, self._words[point]
        with torch.no_grad():
            reach = reach_as(x.detach(), fmt, dtype) if point in self._clipping else None
            return round_as(x.detach(), fmt, dtype), reach

    def _rounded_now(self, x: Tensor, point: str, generator: torch.Generator | None) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            fmt, seen = getattr(self.plan, point), x.detach().to(self.settings.dtype)
            reach = within_reach(seen, fmt) if point in self._clipping else None
            return fake_quantize(seen, fmt, generator=generator).to(x.dtype), reach

    # Where something is drawn, a compiled graph breaks, or refuses if it may not.
    _rounded_outside = torch.compiler.disable(_rounded_now)  # type: ignore[no-untyped-call]

    def with_errors(self, x: Tensor, where: str, drawn_for: Tensor, *, backward: str = "") -> Tensor:
        """`x` with the errors of a point in it: those of the forward, or of the product `backward`."""
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
            return self.chance.unknown(drawn_for.device, salt)
        if error.kind == "stuck" or error.point == "weight":
            return self.chance.fixed(drawn_for.device, salt)
        return self.chance.for_tensor(drawn_for, salt)

    def gradient(self, product: str, g: Tensor) -> Tensor:
        """The gradient as an operand of `product` (grad_input, grad_weight), rounded where its format is active."""
        if product not in self.points:
            return g
        stochastic = getattr(self.plan, product).rounding == "stochastic"
        generator = self.chance.for_tensor(g, product) if stochastic else None
        rounded, _ = self.rounded(g, product, generator)
        self.note(product, g, rounded, g.numel(), own_call=True)
        return rounded

    def has_errors(self, *points: str) -> bool:
        """Whether an error at one of these points is active."""
        return any(error.point in points for error in self.errors)

    def forget(self, *, frozen: bool = True) -> None:  # noqa: ARG002
        """Weights may have changed (frozen ones too?): a new step begins for everything drawn or kept."""
        self.chance.step += 1

    def release(self) -> None:
        """Act no more: a module that was wrapped since keeps its class, and so goes on asking."""
        self.enter(self.phase, frozenset())


class Injected(nn.Module):
    """The frame of a module's stand-in class: whatever rewrites parameters makes its state forget."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.__dict__[KEY].forget()

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.__dict__[KEY].forget()
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]


def label(plan: SitePlan, point: str) -> str:
    """What stands in the evidence as the format of a point: the format's name, or the error's size."""
    fmt = getattr(plan, point, None)
    if fmt is not None:
        return str(fmt.name)
    error = next(error for error in plan.errors if point.startswith(error.name))
    return f"{error.scale:g}"
