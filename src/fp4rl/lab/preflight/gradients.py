"""Gradients of layers that round as the arms do, against their formulas in float64."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fp4rl.inject.attach import attach
from fp4rl.lab.preflight.oracle import Oracle, magnitude_and_scale, steps_of, turning
from fp4rl.numerics.selftest import Check
from fp4rl.spec.formats import Format
from fp4rl.spec.injection import Injection
from fp4rl.spec.points import FORMAT_POINTS, GRADIENTS, LINEAR_POINTS, ApplyDuring
from fp4rl.spec.targets import Targets

_ROWS, _WIDTH = 96, 128
_HEADS, _TOKENS, _HEAD = 2, 24, 64
_EXACT, _IN_FLOAT32 = 1e-9, 1e-4  # of the largest gradient; the derivative of a smooth rounding is a float32
_DEVIATIONS = 7  # of a mean of n draws, whose standard error is at most half a step / sqrt(n)
_BARE: dict[str, Any] = {
    "mode": None,
    "deployment": None,
    "by_pattern": (),
    "errors": (),
    "targets": Targets(),
    "apply_during": ApplyDuring(),
    "fused_groups": "free",
}


def sites_of(injection: Injection) -> Iterator[Injection]:
    """Yield what an injection does to one site, and to each kind of site that its patterns name."""
    for row in (injection, *injection.by_pattern):
        formats = {point: _at(point, row, injection) for point in FORMAT_POINTS}
        if any(formats.values()):
            yield injection.model_copy(update=_BARE | formats)


def _at(point: str, row: Any, injection: Injection) -> Format | None:
    own: Any = getattr(row, point, "keep")
    fmt: Format | None = getattr(injection, point) if own == "keep" else own
    # One layer alone shares its factor with no other.
    return replace(fmt, factor="tensor") if fmt is not None and fmt.factor == "fused" else fmt


def checks_of(site: Injection) -> Iterator[Check]:
    """Compare the results and gradients of a site, at each stage of its precision, with their formulas."""
    drawn = [p for p in FORMAT_POINTS if (fmt := getattr(site, p)) is not None and fmt.rounding == "stochastic"]
    for point in drawn:
        others = dict.fromkeys(other for other in FORMAT_POINTS if other != point)
        yield from _drawn(site.model_copy(update={**others, "schedule": None}), point)
    fixed = site.model_copy(update={**dict.fromkeys(drawn), "schedule": _of_others(site, drawn)})
    for step in steps_of(fixed):
        oracle = Oracle(fixed, step)
        if any(getattr(fixed, point) for point in (*LINEAR_POINTS, *GRADIENTS)):
            yield from _compared(oracle, _of_layer(oracle))
        if fixed.kv_cache is not None:
            yield from _compared(oracle, _of_attention(oracle))


def _of_others(site: Injection, drawn: list[str]) -> Any:
    """Return the schedule without points that draw, and without formats before that do."""
    schedule = site.schedule
    if schedule is None:
        return None
    random = [p for p, own in schedule.points.items() if own.before is not None and own.before.rounding == "stochastic"]
    return schedule.model_copy(update=dict.fromkeys({*drawn, *random}))


def _compared(oracle: Oracle, pairs: dict[str, tuple[Tensor | None, Tensor]]) -> Iterator[Check]:
    site = oracle.injection
    formats = [f"{point} {fmt.name}" for point in FORMAT_POINTS if (fmt := getattr(site, point)) is not None]
    where = f"{', '.join(formats)}, {site.straight_through}" + ("" if oracle.step is None else f", step {oracle.step}")
    allowed = _IN_FLOAT32 if site.straight_through == "smooth" else _EXACT
    for name, (made, right) in pairs.items():
        largest = float(right.abs().max()) or 1.0
        off = float("inf") if made is None else float((made.detach() - right.detach()).abs().max()) / largest
        yield Check(f"{name} of {where}", off <= allowed, f"off by {off:.2g} of the largest")


def _data(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes]


def _layer(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def _through(site: Injection, layer: nn.Linear, x: Tensor, g: Tensor, step: int | None = None) -> dict[str, Tensor]:
    """Return the result of a layer and both gradients, as the injection makes them at a step of training."""
    given = x.clone().requires_grad_()
    with attach(nn.Sequential(layer), site) as attachment:
        attachment.set_phase("training", step)
        y = layer(given)
        torch.autograd.backward(y, g)
    made = {"result": y, "grad_input": given.grad, "grad_weight": layer.weight.grad}
    return {name: tensor for name, tensor in made.items() if tensor is not None}


def _of_layer(oracle: Oracle) -> dict[str, tuple[Tensor | None, Tensor]]:
    x, weight, g = _data((_ROWS, _WIDTH), (_ROWS, _WIDTH), (_ROWS, _ROWS))
    made = _through(oracle.injection.model_copy(update={"kv_cache": None}), _layer(weight), x, g, oracle.step)
    return {name: (made.get(name), right) for name, right in oracle.product(x, weight, g).items()}


class Attention(nn.Module):
    """Heads over torch's own attention, with projections of the usual names."""

    def __init__(self) -> None:
        super().__init__()
        size = _HEADS * _HEAD
        for name, weight in zip(("q_proj", "k_proj", "v_proj"), _data(*[(size, size)] * 3), strict=True):
            self.add_module(name, _layer(weight / size**0.5))

    def heads(self, x: Tensor) -> list[Tensor]:
        """Return queries, keys and values [heads, tokens, d] of x [tokens, size]."""
        return [p(x).unflatten(-1, (_HEADS, _HEAD)).transpose(0, 1) for p in self.children()]

    def forward(self, x: Tensor) -> Tensor:
        """Compute causal attention: [tokens, size] -> [heads, tokens, d]."""
        q, k, v = self.heads(x)
        return scaled_dot_product_attention(q, k, v, is_causal=True)


def _of_attention(oracle: Oracle) -> dict[str, tuple[Tensor | None, Tensor]]:
    x, g = _data((_TOKENS, _HEADS * _HEAD), (_HEADS, _TOKENS, _HEAD))
    module, alone = Attention(), dict.fromkeys((*LINEAR_POINTS, *GRADIENTS))
    with torch.no_grad():
        q, k, v = module.heads(x)
        right = oracle.attention(q, k, v, g)
    with attach(module, oracle.injection.model_copy(update=alone)) as attachment:
        attachment.set_phase("training", oracle.step)
        y = module(x)
        torch.autograd.backward(y, g)
    pairs: dict[str, tuple[Tensor | None, Tensor]] = {"result": (y, right.pop("result"))}
    for (name, gradient), projection in zip(right.items(), module.children(), strict=True):
        assert isinstance(projection, nn.Linear)
        pairs[name] = projection.weight.grad, gradient.transpose(0, 1).flatten(-2).mT @ x
    return pairs


def _drawn(site: Injection, point: str) -> Iterator[Check]:
    """Check one point that draws: its values lie on the two levels about them and are right on average, and the
    gradients are those of the very draw that the result was made of."""
    oracle, fmt = Oracle(site), getattr(site, point)
    diagonal = torch.eye(_WIDTH, dtype=torch.float64)
    x, weight, g = _data((_WIDTH, _WIDTH), (_WIDTH, _WIDTH), (_WIDTH, _WIDTH))
    where = f"{point} {fmt.name}, {site.straight_through}"
    if point == "kv_cache":
        yield from _on_levels(_cached(site), fmt, site, where)
        return
    # Beside a matrix of ones on its diagonal the product is the rounded operand itself.
    x, weight = (diagonal, weight) if point in ("weight", "grad_weight") else (x, diagonal)
    made = _through(site, _layer(weight), x, g)
    kept = {"weight": (weight, "result"), "grad_input": (g, "grad_input"), "grad_weight": (g.mT, "grad_weight")}
    seen, name = kept.get(point, (x, "result"))
    value = made[name].detach()
    yield from _on_levels((seen.contiguous(), value.mT if point == "weight" else value), fmt, site, where)
    factor = oracle.factor(point, seen.to(getattr(torch, site.dtype)).contiguous(), fmt)
    passes = g.mT if point == "weight" else g
    if factor is not None:
        turn = turning(_WIDTH, fmt.rotation)
        passes = ((passes @ turn) * factor) @ turn
    wanted = {
        "weight": {"grad_input": g @ value.mT, "grad_weight": passes},
        "input": {"grad_input": passes, "grad_weight": g.mT @ value},
        "output": {"grad_input": passes, "grad_weight": passes.mT @ x},
        "grad_input": {"grad_weight": g.mT @ x},
        "grad_weight": {"grad_input": g @ weight},
    }[point]
    yield from _compared(oracle, {name: (made.get(name), right) for name, right in wanted.items()})


def _cached(site: Injection) -> tuple[Tensor, Tensor]:
    """Return values of many sequences of one token, and what a cache gives back: all attention is on that token."""
    module = Attention()
    (rows,) = _data((_ROWS, 1, _HEADS * _HEAD))
    with attach(module, site) as attachment, torch.no_grad():
        attachment.set_phase("training")
        pairs = [(module.heads(x)[2], module(x)) for x in rows]
    seen, value = (torch.cat([pair[i] for pair in pairs]).flatten(0, 1) for i in (0, 1))
    return seen, value


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
