"""What a point of a site is rounded to at present: its own format, the one before it, or a blend of both."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fp4rl.inject.plan import SitePlan
from fp4rl.inject.rounding import Estimator, format_text
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.spec.formats import Format
from fp4rl.spec.injection import Injection
from fp4rl.spec.precision import PointSchedule, Stage


class Rounding(NamedTuple):
    """A format as a site applies it: `text` for compiled operators, `estimator` for gradients, if not as they come."""

    fmt: Format
    text: str
    estimator: Estimator | None


@dataclass(frozen=True)
class Present:
    """Q(x) = before(x) + share (own(x) - before(x)); with share 1 `own` alone. `before` None: x itself.

    `own` is the format before where that acts alone; `stage` tells.
    """

    own: Rounding
    share: float = 1.0
    before: Rounding | None = None
    stage: Stage = "after"

    @property
    def formats(self) -> tuple[Format, ...]:
        """The formats that act."""
        return (self.own.fmt,) if self.before is None else (self.own.fmt, self.before.fmt)

    @property
    def draws(self) -> bool:
        """Whether rounding is random."""
        return any(fmt.rounding == "stochastic" for fmt in self.formats)


def label_at(plan: SitePlan, injection: Injection, point: str, stage: Stage) -> str:
    """Return how the evidence names what a point was rounded to in a stage, or the size of an error."""
    own = plan.label(point)
    if stage == "after" or injection.schedule is None:
        return own
    before = ", ".join(fmt.name for fmt in injection.schedule.before(point)) or "none"
    return before if stage == "before" else f"{before} to {own}"


def presents(plan: SitePlan, injection: Injection, step: int | None) -> dict[str, Present]:
    """Return what each point of a site is rounded to at a step of training; None stands for everything else.

    A point that is not rounded has no entry.
    """
    schedules = injection.schedule.points if injection.schedule is not None else {}
    made = {point: _present(point, plan, injection, schedules.get(point), step) for point in plan.points()}
    return {point: present for point, present in made.items() if present is not None}


def _present(
    point: str, plan: SitePlan, injection: Injection, schedule: PointSchedule | None, step: int | None
) -> Present | None:
    def rounding(fmt: Format) -> Rounding:
        return Rounding(fmt, format_text(fmt), Estimator.of(injection, point, fmt))

    own = rounding(getattr(plan, point))
    if schedule is None or schedule.stage(step) == "after":
        return Present(own)
    before = None if schedule.before is None else rounding(schedule.before)
    if schedule.stage(step) == "blend":
        return Present(own, schedule.share(step), before, "blend")
    return None if before is None else Present(before, stage="before")


def computed(x: Tensor, present: Present, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """Return Q(x), x cast to `dtype` where it is rounded, in x's own dtype; by numerics alone, without gradient."""
    seen = x.detach().to(dtype)
    own = fake_quantize(seen, present.own.fmt, generator=generator).to(x.dtype)
    if present.share == 1:
        return own
    before = present.before
    return blended(
        x if before is None else fake_quantize(seen, before.fmt, generator=generator).to(x.dtype), own, present.share
    )


def blended(before: Tensor, after: Tensor, share: float) -> Tensor:
    """Return before + share (after - before), worked out in float32 or above, in the dtype of both."""
    wide = torch.promote_types(before.dtype, torch.float32)
    start = before.detach().to(wide)
    return (start + share * (after.to(wide) - start)).to(before.dtype)


def passing(before: Tensor | None, after: Tensor | None, like: Tensor, share: float) -> Tensor | None:
    """Return the share of its gradient that each value keeps, from the factors of both (None: all of it)."""
    if before is None and after is None:
        return None
    ones = torch.ones_like(like)
    first, last = (ones if mask is None else mask.to(like.dtype) for mask in (before, after))
    return first + share * (last - first)
