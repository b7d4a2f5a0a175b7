"""Results and gradients under what the arms inject, against their formulas in float64."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fp4rl.lab.preflight.kinds import WIDTH, Kind, data, linear_of
from fp4rl.lab.preflight.oracle import magnitude_and_scale, steps_of, turning
from fp4rl.lab.preflight.trials import (
    Compared,
    Made,
    cached,
    of_adapter,
    of_attention,
    of_experts,
    of_latents,
    of_layer,
    through,
)
from fp4rl.numerics.selftest import Check
from fp4rl.spec.formats import Format
from fp4rl.spec.injection import Injection
from fp4rl.spec.points import FORMAT_POINTS

_EXACT, _IN_FLOAT32 = 1e-9, 1e-4  # of the largest; smooth derivatives and the shares of erring attention are float32
_DEVIATIONS = 7  # of a mean of n draws, whose standard error is at most half a step / sqrt(n)


def checks_of(kind: Kind) -> Iterator[Check]:
    """Compare results and gradients of a kind of site, at each stage of its precision, with their formulas."""
    for site in kind.sites.values():
        for point in FORMAT_POINTS:
            if (fmt := getattr(site, point)) is not None and fmt.rounding == "stochastic":
                alone = {**dict.fromkeys(other for other in FORMAT_POINTS if other != point), "schedule": None}
                yield from _drawn(site.model_copy(update={**alone, "errors": (), "lora": "adapter"}), point)
    for step in steps_of(kind.site):
        for way, compare in _ways(kind):
            yield from _compared(kind, step, way, compare(kind, step))


def _ways(kind: Kind) -> Iterator[tuple[str, Callable[[Kind, int | None], Compared]]]:
    """Yield the ways in which a kind of site is computed, each with what compares it."""
    named = type(kind.like).__name__
    if kind.stacks:
        yield f"{named}, " if kind.how == named else f"{named} by {kind.how}, ", of_experts
    elif kind.attends and kind.like is not None:
        yield f"{named}, ", of_latents
    elif kind.attends:
        yield "", lambda kind, step: of_attention(kind, step, written=False)
        yield "attention written out, ", lambda kind, step: of_attention(kind, step, written=True)
    elif hasattr(kind.like, "lora_A"):
        yield f"lora {'merged' if kind.site.lora == 'merged' else 'beside'}, ", of_adapter
    else:
        yield "" if kind.like is None else f"{named}, ", of_layer


def _compared(kind: Kind, step: int | None, way: str, compared: Compared) -> Iterator[Check]:
    made, right, draws = compared
    words = [_words(site) for site in kind.sites.values()]
    where = f"{way}{' and '.join(dict.fromkeys(words))}" + ("" if step is None else f", step {step}")
    yield from _each(made, right, where, _IN_FLOAT32 if _single(kind) else _EXACT)
    if any(site.errors or _random(site) for site in kind.sites.values()):
        yield Check(f"draws of {where}", not draws.wrong, draws.wrong or "as many as in the formulas")


def _random(site: Injection) -> bool:
    own = [getattr(site, point) for point in FORMAT_POINTS]
    before = site.schedule.points.values() if site.schedule is not None else ()
    return any(fmt is not None and fmt.rounding == "stochastic" for fmt in (*own, *(each.before for each in before)))


def _words(site: Injection) -> str:
    formats = [f"{point} {fmt.name}" for point in FORMAT_POINTS if (fmt := getattr(site, point)) is not None]
    return ", ".join([*formats, *(error.name for error in site.errors), site.straight_through])


def _single(kind: Kind) -> bool:
    return any(site.straight_through == "smooth" or (kind.attends and site.errors) for site in kind.sites.values())


def _each(made: Made, right: dict[str, Tensor], where: str, allowed: float) -> Iterator[Check]:
    for name, wanted in right.items():
        largest, own = float(wanted.abs().max()) or 1.0, made.get(name)
        off = float("inf") if own is None else float((own.detach() - wanted.detach()).abs().max()) / largest
        yield Check(f"{name} of {where}", off <= allowed, f"off by {off:.2g} of the largest")


def _drawn(site: Injection, point: str) -> Iterator[Check]:
    """Check what one point that draws makes: values on the two levels about them, right on average."""
    fmt = getattr(site, point)
    diagonal = torch.eye(WIDTH, dtype=torch.float64)
    x, weight, g = data((WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH))
    where = f"{point} {fmt.name}, {site.straight_through}"
    if point == "kv_cache":
        yield from _on_levels(cached(site), fmt, site, where)
        return
    # Beside a matrix of ones on its diagonal the product is the rounded operand itself.
    x, weight = (diagonal, weight) if point in ("weight", "grad_weight") else (x, diagonal)
    made, _ = through(site, linear_of(weight), x, g)
    kept = {"weight": (weight, "result"), "grad_input": (g, "grad_input"), "grad_weight": (g.mT, "grad_weight")}
    seen, name = kept.get(point, (x, "result"))
    value = made[name]
    assert value is not None
    value = value.detach()
    yield from _on_levels((seen.contiguous(), value.mT if point == "weight" else value), fmt, site, where)


def _on_levels(pair: tuple[Tensor, Tensor], fmt: Format, site: Injection, where: str) -> Iterator[Check]:
    seen, value = pair[0].to(getattr(torch, site.dtype)), pair[1]
    turn, grid = turning(seen.shape[-1], fmt.rotation), torch.tensor(fmt.element.grid(), dtype=torch.float64)
    magnitude, scale = magnitude_and_scale(seen, fmt)
    units = magnitude / scale.double()
    drawn = (value @ turn) * (seen.double() @ turn).sign() / scale.double()
    low = grid[(torch.searchsorted(grid, units, right=True) - 1).clamp(min=0)]
    high = grid[torch.searchsorted(grid, units).clamp(max=len(grid) - 1)]
    off = float(torch.minimum((drawn - low).abs(), (drawn - high).abs()).max())
    yield Check(f"levels of {where}", off <= _IN_FLOAT32, f"{off:.2g} off the two levels about a value")
    between = (high > low) & (units < fmt.element.largest)
    bias = float(((drawn - units) / (high - low))[between].mean())
    allowed = _DEVIATIONS * 0.5 / int(between.sum()) ** 0.5
    yield Check(f"mean of {where}", abs(bias) <= allowed, f"{bias:.2g} of a step on average")
