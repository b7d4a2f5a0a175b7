"""Values and gradients under an injection, by their formulas in float64 (docs/concepts/estimators.md has them).

Rounded values and scales come from the quantizer, which has a test of its own. Of what passes gradients nothing is
used: the derivative of a smooth rounding goes over the levels of the element, a rotation is a matrix. Products of
weights are in `products`, errors in `draws`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from fp4rl.lab.preflight.draws import Draws, erring
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


class Latents(NamedTuple):
    """What attention over latents (MLA) computes from: queries [heads, tokens, d], a latent vector [tokens, l] and a
    rotary key [tokens, r] a token, and the matrix [heads (d - r + v), l] that expands latents to keys and values."""

    query: Tensor
    latent: Tensor
    rotary: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True)
class Oracle:
    """What an injection does to the tensors of one site at a `step` of training, None for what is deployed."""

    injection: Injection
    step: int | None = None
    draws: Draws = field(default_factory=Draws)

    def through(self, point: str, x: Tensor) -> Through:
        """Return a tensor [..., n] in float64 as a point rounds it: before(x) + lambda (after(x) - before(x))."""
        fmt: Format | None = getattr(self.injection, point)
        if fmt is None:
            return Through(x)
        schedule = self.injection.schedule.points.get(point) if self.injection.schedule is not None else None
        share = 1.0
        if schedule is not None and self.step is not None:
            share = min(1.0, max(0, self.step - schedule.from_step + 1) / (schedule.over + 1))
        if schedule is None or share == 1:
            return self._alone(point, x, fmt)
        if share == 0:  # and nothing is drawn for the format to come
            return Through(x) if schedule.before is None else self._alone(point, x, schedule.before)
        after = self._alone(point, x, fmt)
        before = Through(x) if schedule.before is None else self._alone(point, x, schedule.before)
        first, last = (torch.ones_like(x) if each.factor is None else each.factor for each in (before, after))
        passed = None if before.factor is after.factor is None else first + share * (last - first)
        return Through(before.value + share * (after.value - before.value), passed, fmt.rotation)

    def _alone(self, point: str, x: Tensor, fmt: Format) -> Through:
        seen = x.to(getattr(torch, self.injection.dtype)).contiguous()
        return Through(self._rounded(seen, fmt), self.factor(point, seen, fmt), fmt.rotation)

    def _rounded(self, seen: Tensor, fmt: Format) -> Tensor:
        """Return rounded values in float64: Q(x), and Q(x) + Q(x - Q(x)) in blocks that fall back."""
        if fmt.fallback is None:
            return self.draws.rounded(seen, fmt).double()
        once = replace(fmt, fallback=None)
        first = fake_quantize(seen, once).double()
        return (first + fake_quantize(left(seen, first, fmt), once).double()).to(seen.dtype).double()

    def factor(self, point: str, seen: Tensor, fmt: Format) -> Tensor | None:
        """Return what the gradient of each value is multiplied by; None where it passes as it comes."""
        how, smooth = self.injection.straight_through, self.injection.smooth
        if how == "clipped" and point not in GRADIENTS and can_clip(fmt):
            return reaches(seen, fmt).double()
        if how == "smooth" and point in smooth.points and can_smooth(fmt):
            return slope(in_units(seen, fmt), fmt.element.grid(), smooth.sharpness, smooth.cap)
        return None

    def wrong(self, point: str, y: Tensor, *, backward: bool = False) -> Tensor:
        """Return y with the errors at a point, one after the other: of the forward, or of a gradient's product."""
        for error in self.injection.errors:
            if error.point == point and (error.backward if backward else error.forward):
                y = erring(y, error, self.draws)
        return y

    def attention(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> dict[str, Tensor]:
        """Return causal softmax(q Q(k)^T / sqrt(d)) Q(v) of [..., tokens, d], and the gradients of q, k and v."""
        q_k, q_v = self.through("kv_cache", k), self.through("kv_cache", v)
        result, grad_q, grad_k, grad_v = self._attended(q, q_k.value, q_v.value, g, 1 / sqrt(q.shape[-1]))
        passed = {"grad_key": q_k.passed(grad_k), "grad_value": q_v.passed(grad_v)}
        return {"result": result, "grad_query": grad_q} | passed

    def latent(self, made: Latents, g: Tensor) -> dict[str, Tensor]:
        """Return causal attention over keys [U_k Q(c), Q(r)] and values U_v Q(c) of each head, and all gradients."""
        q_c, q_r = self.through("kv_cache", made.latent), self.through("kv_cache", made.rotary)
        heads, wide = len(made.query), made.query.shape[-1] - made.rotary.shape[-1]
        u_k, u_v = made.up.reshape(heads, -1, made.up.shape[1]).tensor_split([wide], 1)
        k = torch.cat([q_c.value @ u_k.mT, q_r.value.expand(heads, -1, -1)], -1)
        result, grad_q, grad_k, grad_v = self._attended(made.query, k, q_c.value @ u_v.mT, g, made.scale)
        grad_c, grad_r = grad_k[..., :wide], grad_k[..., wide:].sum(0)
        grad_up = torch.cat([grad_c.mT @ q_c.value, grad_v.mT @ q_c.value], 1).flatten(0, 1)
        grads = {"grad_query": grad_q, "grad_rotary": q_r.passed(grad_r), "grad_up": grad_up}
        return {"result": result, "grad_latent": q_c.passed((grad_c @ u_k + grad_v @ u_v).sum(0))} | grads

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float) -> tuple[Tensor, ...]:
        """Return causal attention [..., tokens, d] and the gradients of q, k and v, with errors in all six products."""
        future = torch.full((q.shape[-2],) * 2, -torch.inf, dtype=q.dtype).triu(1)
        shares = (self.wrong("scores", q @ k.mT) * scale + future).softmax(-1)
        result = self.wrong("values", shares @ v)
        of_shares = self.wrong("values", g @ v.mT, backward=True)
        grad_v = self.wrong("values", g.mT @ shares, backward=True).mT
        of_scores = shares * (of_shares - (of_shares * shares).sum(-1, keepdim=True)) * scale
        grad_q = self.wrong("scores", of_scores @ k, backward=True)
        return result, grad_q, self.wrong("scores", of_scores.mT @ q, backward=True), grad_v


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
