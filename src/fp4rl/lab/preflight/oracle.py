"""Gradients through what an injection rounds, by their formulas in float64 (docs/concepts/estimators.md has them).

Rounded values and scales come from the quantizer, which has a test of its own. Of what passes gradients nothing is
used: the derivative of a smooth rounding goes over the levels of the element, a rotation is a matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from fp4rl.numerics.levels import inside, levels
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.spec.formats import Format
from fp4rl.spec.injection import Injection
from fp4rl.spec.points import GRADIENTS, can_clip, can_smooth

_ON_A_LEVEL = 2.0**-20  # one rounding of an NVFP4 scale puts its largest value that far beyond the largest level


class Through(NamedTuple):
    """A rounded tensor, and what its gradient is multiplied by in the basis of its rotation; None: by nothing."""

    value: Tensor
    factor: Tensor | None = None
    rotation: int | None = None

    def passed(self, gradient: Tensor) -> Tensor:
        """Return the gradient of what was rounded: of H Q(H x) the derivative is H diag(factor) H."""
        if self.factor is None:
            return gradient
        turn = turning(gradient.shape[-1], self.rotation)
        return ((gradient @ turn) * self.factor) @ turn


@dataclass(frozen=True)
class Oracle:
    """What an injection does to the tensors of one site at a `step` of training, None for what is deployed."""

    injection: Injection
    step: int | None = None

    def through(self, point: str, x: Tensor) -> Through:
        """Return a tensor [..., n] in float64 as a point rounds it: before(x) + lambda (after(x) - before(x))."""
        fmt: Format | None = getattr(self.injection, point)
        if fmt is None:
            return Through(x)
        schedule = self.injection.schedule.points.get(point) if self.injection.schedule is not None else None
        after = self._alone(point, x, fmt)
        if schedule is None or self.step is None:
            return after
        before = Through(x) if schedule.before is None else self._alone(point, x, schedule.before)
        share = min(1.0, max(0, self.step - schedule.from_step + 1) / (schedule.over + 1))
        first, last = (torch.ones_like(x) if each.factor is None else each.factor for each in (before, after))
        passed = None if before.factor is after.factor is None else first + share * (last - first)
        return Through(before.value + share * (after.value - before.value), passed, fmt.rotation)

    def _alone(self, point: str, x: Tensor, fmt: Format) -> Through:
        seen = x.to(getattr(torch, self.injection.dtype)).contiguous()
        return Through(rounded(seen, fmt), self.factor(point, seen, fmt), fmt.rotation)

    def factor(self, point: str, seen: Tensor, fmt: Format) -> Tensor | None:
        """Return what the gradient of each value is multiplied by; None where it passes as it comes."""
        how, smooth = self.injection.straight_through, self.injection.smooth
        if how == "clipped" and point not in GRADIENTS and can_clip(fmt):
            return reaches(seen, fmt).double()
        if how == "smooth" and point in smooth.points and can_smooth(fmt):
            return slope(in_units(seen, fmt), fmt.element.grid(), smooth.sharpness, smooth.cap)
        return None

    def product(self, x: Tensor, weight: Tensor, g: Tensor) -> dict[str, Tensor]:
        """Return y = Q(x) Q(W)^T and the gradients of x [rows, in] and W [out, in], given that of y [rows, out]."""
        q_x, q_w = self.through("input", x), self.through("weight", weight)
        y = self.through("output", linear(q_x.value, q_w.value))
        g = y.passed(g)
        grad_x = self.through("grad_input", g).value @ q_w.value
        grad_w = self.through("grad_weight", g.mT.contiguous()).value @ q_x.value
        return {"result": y.value, "grad_input": q_x.passed(grad_x), "grad_weight": q_w.passed(grad_w)}

    def attention(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> dict[str, Tensor]:
        """Return causal softmax(q Q(k)^T / sqrt(d)) Q(v) of [..., tokens, d], and the gradients of q, k and v."""
        q_k, q_v = self.through("kv_cache", k), self.through("kv_cache", v)
        tokens, scale = q.shape[-2], 1 / sqrt(q.shape[-1])
        future = torch.full((tokens, tokens), -torch.inf, dtype=q.dtype).triu(1)
        shares = (q @ q_k.value.mT * scale + future).softmax(-1)
        of_shares = g @ q_v.value.mT
        of_scores = shares * (of_shares - (of_shares * shares).sum(-1, keepdim=True)) * scale
        return {
            "result": shares @ q_v.value,
            "grad_query": of_scores @ q_k.value,
            "grad_key": q_k.passed(of_scores.mT @ q),
            "grad_value": q_v.passed(shares.mT @ g),
        }


def rounded(seen: Tensor, fmt: Format) -> Tensor:
    """Return rounded values in float64: Q(x), and Q(x) + Q(x - Q(x)) in blocks that fall back."""
    if fmt.fallback is None:
        return fake_quantize(seen, fmt).double()
    once = replace(fmt, fallback=None)
    first = fake_quantize(seen, once).double()
    return (first + fake_quantize(left(seen, first, fmt), once).double()).to(seen.dtype).double()


def reaches(seen: Tensor, fmt: Format) -> Tensor:
    """Return which values are not clipped, in the basis of the rotation: by no rounding, where there are two."""
    once = replace(fmt, fallback=None)
    magnitude, scale = magnitude_and_scale(seen, once)
    # In the scales' own float32, in which NVFP4's largest value is its level but for one rounding.
    reach = magnitude.to(scale.dtype) <= scale * fmt.element.largest
    if fmt.fallback is None:
        return reach
    again = reaches(left(seen, fake_quantize(seen, once).double(), fmt), once)
    return reach | (again & falling_back(seen, fmt))


def left(seen: Tensor, first: Tensor, fmt: Format) -> Tensor:
    """Return x - Q(x) in blocks that fall back, zero elsewhere."""
    return ((seen.double() - first) * falling_back(seen, fmt)).to(seen.dtype)


def falling_back(seen: Tensor, fmt: Format) -> Tensor:
    """Return which values lie in the blocks of their row with the largest magnitude, of equals in the first."""
    assert fmt.block is not None
    columns, width = seen.shape[-1], fmt.block[1]
    chosen = torch.zeros(seen.numel() // columns, columns, dtype=torch.bool)
    for row, own in zip(seen.reshape(-1, columns).abs(), chosen, strict=True):
        largest = [float(block.max()) for block in row.split(width)]
        for number in sorted(range(len(largest)), key=lambda at: -largest[at])[: fmt.twice(columns)]:
            own[number * width : (number + 1) * width] = True
    return chosen.view(seen.shape)


def magnitude_and_scale(seen: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Return magnitudes, in float64 and the basis of the rotation, and the quantizer's scales of their blocks."""
    turn = turning(seen.shape[-1], fmt.rotation)
    wide = seen.double() @ turn if fmt.coarse is None else inside(seen, fmt)[0].double()
    if fmt.scale == "none":
        return wide.abs(), torch.ones_like(wide)
    nearest = replace(fmt, rounding="nearest_even") if fmt.rounding == "stochastic" else fmt
    return wide.abs(), levels(seen, nearest)[1]


def in_units(seen: Tensor, fmt: Format) -> Tensor:
    """Return magnitudes in units of their block's scale, in float64 and the basis of the rotation."""
    magnitude, scale = magnitude_and_scale(seen, fmt)
    return magnitude / scale.double()


def slope(units: Tensor, grid: tuple[float, ...], k: float, cap: float) -> Tensor:
    """Return min(cap, |2t - 1|^(1/k - 1) / k) for values t of the way between two levels, 0 beyond the largest one."""
    made = torch.zeros_like(units)
    inner = units.where((units < grid[-1]) | (units > grid[-1] * (1 + _ON_A_LEVEL)), grid[-1])
    for low, high in pairwise(grid):
        t = (inner - low) / (high - low)
        between = (t >= 0) & (t <= 1)
        made = made.where(~between, ((2 * t - 1).abs() ** (1 / k - 1) / k).clamp(max=cap))
    return made


def turning(columns: int, size: int | None) -> Tensor:
    """Return the matrix [columns, columns] that turns every `size` of them: (-1)^(bits of i and j) / sqrt(size).

    Columns beyond the last whole block stay as they are.
    """
    turn = torch.eye(columns, dtype=torch.float64)
    if size is not None:
        signs = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
        block = torch.tensor(signs, dtype=torch.float64) / sqrt(size)
        for start in range(0, columns - size + 1, size):
            turn[start : start + size, start : start + size] = block
    return turn


def steps_of(injection: Injection) -> Iterator[int | None]:
    """Yield a step of each stage of a precision that changes, and None: what is deployed."""
    points = injection.schedule.points.values() if injection.schedule is not None else ()
    yield from sorted({step for own in points for step in (max(0, own.from_step - 1), own.from_step + own.over // 2)})
    yield None
