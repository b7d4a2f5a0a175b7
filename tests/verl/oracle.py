"""MXFP4 by the text of the OCP specification (v1.0, section 6.3), sharing no code with fp4rl."""

import math

import torch

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def mxfp4(weight: torch.Tensor) -> torch.Tensor:
    """Round a bfloat16 matrix: blocks of 32 along rows, scale 2^(floor(log2 amax) - 2), nearest code, ties to even."""
    rows, columns = weight.shape
    out = torch.empty(rows, columns)
    for row, values in enumerate(weight.float().tolist()):
        for begin in range(0, columns, 32):
            block = values[begin : begin + 32]
            largest = max(map(abs, block))
            scale = 2.0 ** (math.frexp(largest)[1] - 1 - 2) if largest else 1.0
            out[row, begin : begin + 32] = torch.tensor([scale * _nearest(value / scale) for value in block])
    return out.to(weight.dtype)


def _nearest(value: float) -> float:
    size = min(abs(value), 6.0)
    code = min(range(8), key=lambda at: (abs(_MAGNITUDES[at] - size), at % 2))  # an even code has mantissa bit 0
    return math.copysign(_MAGNITUDES[code], value)
