"""How much of a given noise BF16 can hold at all, in closed form: no model is run and nothing is drawn."""

import math
from collections.abc import Mapping
from typing import Literal

_MANTISSA_BITS = 7  # of BF16, without the leading one
_SMALLEST_EXPONENT = -126


def share_bf16_can_change(
    values: Mapping[float, int], sigma: float, operation: Literal["additive", "multiplicative"]
) -> float:
    """Expected share of weights whose BF16 value differs after Gaussian noise of `sigma` (0..1).

    `values` counts the weights: BF16 value -> how many have it. A weight changes when the noise passes half the gap to
    a neighbour; the gap towards zero is half as wide at a power of two.
    """
    total = sum(values.values())
    if sigma <= 0 or not total:
        return 0.0
    changed = sum(count * _passes(value, sigma, operation) for value, count in values.items())
    return changed / total


def _passes(value: float, sigma: float, operation: str) -> float:
    spread = sigma * abs(value) if operation == "multiplicative" else sigma
    if spread == 0.0:
        return 0.0
    outward, inward = _gaps(abs(value))
    return 0.5 * sum(math.erfc(gap / (2 * math.sqrt(2) * spread)) for gap in (outward, inward))


def _gaps(magnitude: float) -> tuple[float, float]:
    """Distances to the next BF16 value away from zero and towards it."""
    mantissa, exponent = math.frexp(magnitude)
    exponent = max(exponent - 1, _SMALLEST_EXPONENT) if magnitude else _SMALLEST_EXPONENT
    gap = math.ldexp(1.0, exponent - _MANTISSA_BITS)
    at_power_of_two = mantissa == 0.5 and exponent > _SMALLEST_EXPONENT
    return gap, gap / 2 if at_power_of_two else gap
