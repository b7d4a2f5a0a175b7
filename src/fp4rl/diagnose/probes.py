"""Probes of one linear layer: the same input again, slightly changed, negated, and eight times as large.

A correct y = W x + b repeats itself, responds to a change dx with W dx, changes sign with x except for b, and scales
with x. Every fault of the hardware breaks one of these, and which one tells the fault; no correct copy is needed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn

from fp4rl.sites.walk import is_conv1d

STEP = 0.02  # size of the change of the input, relative to its root mean square
LOUDER = 8.0  # a power of two, so that a correct response scales exactly
_TINY = 1e-30


@dataclass(frozen=True)
class Probe:
    """The responses of one linear layer on some tokens. Channels whose weights are all zero are not counted.

    instability   rms difference of two identical calls, relative to the output (healthy: 0)
    gain          response to a change of the input over the expected one, W dx (healthy: 1)
    min_gain, max_gain   the gain of the channels with the least and the greatest
    kurtosis      excess kurtosis of the response, every channel in units of its own spread (healthy: near 0)
    jumps         share of responses beyond six times the spread that the weights imply (healthy: 0)
    dead          share of outputs that are exactly zero (healthy: 0)
    edge          share of outputs at one largest magnitude when the input is eight times as large (healthy: 0)
    stuck         share of channels that do not respond (healthy: 0)
    offset        median over channels of y(x) + y(-x) - 2b, relative to the output (healthy: 0)
    """

    instability: float
    gain: float
    min_gain: float
    max_gain: float
    kurtosis: float
    jumps: float
    dead: float
    edge: float
    stuck: float
    offset: float


@torch.no_grad()
def probe(layer: nn.Linear, x: Tensor, generator: torch.Generator) -> Probe:
    """Probe `layer` with inputs [tokens, in]; `generator` draws the change of the input."""
    x = x[x.any(-1)] if x.any() else x  # a token that is all zeros is answered by the bias alone
    change = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x.device)
    shifted = (x.float() + STEP * _rms(x) * change).to(x.dtype)
    step = shifted.float() - x.float()  # the change after rounding to x's dtype
    weight = layer.weight.mT if is_conv1d(layer) else layer.weight  # [out, in]
    expected = (step.square().mean(0) @ weight.float().square().T).double().sqrt()  # [out], spread per channel
    known = expected > 0
    y, again, rest = (layer(value).double()[:, known] for value in (x, x, torch.cat([shifted, -x, x * LOUDER])))
    plain, turned, loud = rest.chunk(3)
    bias = torch.zeros_like(expected) if layer.bias is None else layer.bias.double()
    expected, bias = expected[known], bias[known]
    size = max(_rms(y), _TINY)

    response = plain - y  # [tokens, out]
    gains = response.square().mean(0).sqrt() / expected
    answers = gains > 1e-6
    live = [values[:, answers] for values in (y, response, turned, loud)]
    return Probe(
        instability=_rms(again - y) / size,
        gain=_rms(response) / max(_rms(expected), _TINY),
        min_gain=_or_zero(torch.min, gains[answers]),
        max_gain=_or_zero(torch.max, gains),
        kurtosis=_kurtosis(live[1]),
        jumps=_share(live[1].abs() > 6 * expected[answers]),
        dead=_share(live[0] == 0),
        edge=_pile_up(live[3], LOUDER * live[0] - (LOUDER - 1) * bias[answers]),
        stuck=_share(~answers),
        offset=_or_zero(torch.median, ((live[0] + live[2]) / 2 - bias[answers]).mean(0).abs()) / size,
    )


def _or_zero(reduce: Callable[[Tensor], Tensor], values: Tensor) -> float:
    return float(reduce(values)) if values.numel() else 0.0


def _rms(x: Tensor) -> float:
    return sqrt(_or_zero(torch.mean, x.double().square()))


def _share(hits: Tensor) -> float:
    return _or_zero(torch.mean, hits.double())


def _kurtosis(response: Tensor) -> float:
    if not response.numel():
        return 0.0
    spread = response.square().mean(0).sqrt().clamp_min(_TINY)
    return float((response / spread).square().square().mean()) - 3


def _pile_up(loud: Tensor, expected: Tensor) -> float:
    """Return the share of values at exactly the largest magnitude that should be larger; one alone is none."""
    if not loud.numel():
        return 0.0
    short = (loud.abs() == loud.abs().max()) & (loud.abs() < 0.97 * expected.abs())
    return max(int(short.sum()) - 1, 0) / loud.numel()
