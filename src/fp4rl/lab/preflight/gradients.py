"""Results and gradients under what the arms inject, against their formulas in float64."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fp4rl.lab.preflight.kinds import WIDTH, Kind, data, linear_of
from fp4rl.lab.preflight.oracle import Oracle, magnitude_and_scale, steps_of, turning
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
    drawn = {
        point: None
        for site in kind.sites.values()
        for point in FORMAT_POINTS
        if (fmt := getattr(site, point)) is not None and fmt.rounding == "stochastic"
    }
    for site in kind.sites.values():
        for point in drawn:
            others = dict.fromkeys(other for other in FORMAT_POINTS if other != point)
            if getattr(site, point) is not None:
                alone = {**others, "schedule": None, "errors": (), "lora": "adapter"}
                yield from _drawn(site.model_copy(update=alone), point)
    fixed = {
        name: site.model_copy(update={**drawn, "schedule": _of_others(site, [*drawn])})
        for name, site in kind.sites.items()
    }
    kind = replace(kind, sites=fixed)
    if not any(site.errors or any(getattr(site, point) for point in FORMAT_POINTS) for site in fixed.values()):
        return
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


def _of_others(site: Injection, drawn: list[str]) -> Any:
    """Return the schedule without points that draw, and without formats before that do."""
    schedule = site.schedule
    if schedule is None:
        return None
    random = [p for p, own in schedule.points.items() if own.before is not None and own.before.rounding == "stochastic"]
    return schedule.model_copy(update=dict.fromkeys({*drawn, *random}))


def _compared(kind: Kind, step: int | None, way: str, compared: Compared) -> Iterator[Check]:
    made, right, draws = compared
    words = [_words(site) for site in kind.sites.values()]
    where = f"{way}{' and '.join(dict.fromkeys(words))}" + ("" if step is None else f", step {step}")
    yield from _each(made, right, where, _IN_FLOAT32 if _single(kind) else _EXACT)
    if any(site.errors for site in kind.sites.values()):
        yield Check(f"draws of {where}", not draws.wrong, draws.wrong or "as many as in the formulas")


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
    """Check one point that draws: its values lie on the two levels about them and are right on average, and the
    gradients are those of the very draw that the result was made of."""
    oracle, fmt = Oracle(site), getattr(site, point)
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
    factor = oracle.factor(point, seen.to(getattr(torch, site.dtype)).contiguous(), fmt)
    passes = g.mT if point == "weight" else g
    if factor is not None:
        turn = turning(WIDTH, fmt.rotation)
        passes = ((passes @ turn) * factor) @ turn
    wanted = {
        "weight": {"grad_input": g @ value.mT, "grad_weight": passes},
        "input": {"grad_input": passes, "grad_weight": g.mT @ value},
        "output": {"grad_input": passes, "grad_weight": passes.mT @ x},
        "grad_input": {"grad_weight": g.mT @ x},
        "grad_weight": {"grad_input": g @ weight},
    }[point]
    yield from _each(made, wanted, where, _IN_FLOAT32 if site.straight_through == "smooth" else _EXACT)


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
