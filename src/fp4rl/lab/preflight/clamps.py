"""The clamp of learned clipping, on the weights of a run's start, against its formula in float64."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fp4rl.lab.preflight.live import attached, of_weights
from fp4rl.lab.preflight.rows import Check, Row
from fp4rl.numerics.blocks import Grouping
from fp4rl.rl.clamp import Clamp
from fp4rl.rl.clipping import masters_of
from fp4rl.rl.oscillation import watched_weights
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.formats import Format
from fp4rl.spec.words import counted

_ALLOWED = 1e-4  # of the largest: the clamp is float32, and a gradient of a strength is a sum over a block
_BLOCKS = 128  # of each kind of weight: a formula is written out block by block


def clamps(experiment: Experiment, model: Any) -> Iterator[Row]:
    """Compare W' and the gradients of W and of the strengths, for one weight of each format and layout, with their
    formula in float64, at strengths that are all different."""
    expected = "W' and both gradients as their formula in float64 gives them"
    off: dict[str, float] = {}
    blocks = 0
    with attached(model, experiment) as attachment:
        masters = masters_of(model, attachment, experiment)
        assert masters is not None
        watched, copies = watched_weights(attachment, None), masters.copies()
        kinds: dict[Any, tuple[str, Format | None]] = {}
        for name, each in watched.items():
            fmt = each.state.plan.weight
            kinds.setdefault((fmt, each.state.plan.site.transposed, each.weight.ndim), (name, fmt))
        for name, fmt in kinds.values():
            assert fmt is not None
            apart, looked = _compared(masters.clamps[name], copies[name].detach(), watched[name].state.as_used, fmt)
            blocks += looked
            off |= {what: _worst([own, off.get(what, 0.0)]) for what, own in apart.items()}
    worst = next((what for what, own in off.items() if not own <= _ALLOWED), max(off, key=lambda what: off[what]))
    measured = f"{counted(len(kinds), 'kind')} of weight, {counted(blocks, 'block')}: {worst} off by {off[worst]:.2g}"
    cure = "" if off[worst] <= _ALLOWED else "report it: a fault of fp4rl"
    yield Row("fail" if cure else "pass", f"{measured} of the largest", expected, cure)


def _compared(clamp: Clamp, weight: Tensor, as_used: Any, fmt: Format) -> tuple[dict[str, float], int]:
    """Return how far W' and the gradients are off, each of the largest, over the first blocks of a weight."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        drawn = torch.rand(clamp.strength.shape, generator=generator).to(weight.device)
        clamp.strength.copy_(4 * drawn - 2)
    master = weight.clone().requires_grad_()
    given = torch.randn(weight.shape, generator=generator).to(weight.device)
    made = [clamp(master), *clamp.gradients(master, given)]

    used = as_used(weight)
    own = Grouping.of(used.shape, fmt)
    rows, columns = used.shape[-2:]
    down, across = own.block or (rows, columns)

    def matrix(stored: Tensor) -> Tensor:
        """Return a weight, or the first of a stack, [out, in] in float64."""
        first: Tensor = as_used(stored).detach().double().reshape(-1, rows, columns)[0]
        return first

    whole, kept, of_whole, g = map(matrix, (weight, made[0], made[1], given))
    strengths, of_strengths = (
        own.scales_outside(each.detach().double()).reshape(-1, -(-rows // down), -(-columns // across))[0]
        for each in (clamp.strength, made[2])
    )
    off = {"W'": 0.0, "the gradient of W": 0.0, "the gradient of a strength": 0.0}
    largest = dict.fromkeys(off, 0.0)
    places = list(product(range(strengths.shape[0]), range(strengths.shape[1])))[:_BLOCKS]
    for i, j in places:
        part = slice(i * down, (i + 1) * down), slice(j * across, (j + 1) * across)
        wanted = _by_formula(whole[part], strengths[i, j], g[part])
        seen = kept[part], of_whole[part], of_strengths[i, j]
        for what, right, live in zip(off, wanted, seen, strict=True):
            off[what] = _worst([off[what], float((right - live).abs().max())])
            largest[what] = max(largest[what], float(right.abs().max()))
    return {what: own / (largest[what] or 1.0) for what, own in off.items()}, len(places)


def _worst(values: list[float]) -> float:
    """Return the largest, or NaN where one is, which `max` would pass over."""
    return float(torch.tensor(values, dtype=torch.float64).max())


def _by_formula(block: Tensor, strength: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return W', the gradient of W and that of the strength, of one block in float64, given the gradient of W'.

    A weight within the bound has its own gradient; those beyond it move the bound, which is a share of the largest (of
    several that are equally large each has its part).
    """
    largest, share = block.abs().max(), 1 / (1 + (-strength).exp())
    beyond = block.abs() > share * largest
    of_bound = (g * block.sign())[beyond].sum()
    tops = block.abs() == largest
    of_block = g * ~beyond + of_bound * share * block.sign() * tops / tops.sum()
    return (
        torch.where(beyond, block.sign() * share * largest, block),
        of_block,
        of_bound * largest * share * (1 - share),
    )


CHECKS = (Check("clamps", ("P08",), of_weights(clamps, lambda own: own.training.learned_clipping is not None)),)
