"""Questions to one linear layer that a healthy matmul answers exactly: again, a little more, turned round, and louder.

y = W x + b repeats itself, answers a small change of x with W dx, turns its sign with x except for b, and grows with x.
Every fault of the hardware breaks one of these, and which one it breaks names the fault; no healthy twin is needed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn

STEP = 0.02  # size of the change of the input, relative to its root mean square
LOUDER = 8.0  # a power of two, so that a healthy answer grows by it exactly
_TINY = 1e-30


@dataclass(frozen=True)
class Probe:
    """Answers of one linear layer on some tokens. Channels that the weights leave silent are not counted.

    instability   rms difference of two identical calls, relative to the output (healthy: 0)
    gain          response to a change of the input over what the weights make of it (healthy: 1)
    min_gain, max_gain   the same for the channel with the least and the greatest
    kurtosis      excess kurtosis of the response, every channel in units of its own spread (healthy: near 0)
    jumps         share of responses beyond six of the spreads that the weights imply (healthy: 0)
    dead          share of outputs that are exactly zero (healthy: 0)
    edge          share of outputs that pile up at one magnitude when the input is eight times louder (healthy: 0)
    stuck         share of channels that do not answer (healthy: 0)
    offset        median over channels of what is left of y(x) + y(-x) - 2b, relative to the output (healthy: 0)
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
    """Ask `layer` with inputs [tokens, in], in three calls; `generator` draws the change of the input."""
    change = torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x.device)
    shifted = (x.float() + STEP * _rms(x) * change).to(x.dtype)
    step = shifted.float() - x.float()  # what is left of the change after rounding to x's dtype
    expected = (step.square().mean(0) @ layer.weight.float().square().T).double().sqrt()  # [out], spread per channel
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
    """Share of values at exactly the largest magnitude that should have been larger still; one alone is no pile."""
    if not loud.numel():
        return 0.0
    short = (loud.abs() == loud.abs().max()) & (loud.abs() < 0.97 * expected.abs())
    return max(int(short.sum()) - 1, 0) / loud.numel()
