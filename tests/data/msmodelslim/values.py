"""Weights on which packers differ: on and beside every threshold of a scale, on ties, of sizes 1e-6 to 1e3, zeros."""

import torch

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
SIZES = [10.0**k for k in range(-6, 4)]
# Mantissas of a block's largest magnitude at which a rule raises the scale; 1.06 and 1.41 where it takes the nearest.
TOPS = (1.0, 1.5, 1.75, 1.8125, 1.5 * 0.5**0.5, 2**0.5)
TIES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0)


def weights(dtype, rows, columns, seed=0):
    """(kind, weight [rows, columns] without a -0) of every size, and of thresholds at every exponent of these sizes."""
    generator = torch.Generator().manual_seed(seed)
    for size in SIZES:
        x = torch.randn(rows, columns, generator=generator) * size
        x *= torch.exp2(-3 * torch.rand(rows, columns // 32, generator=generator)).repeat_interleave(32, 1)
        x = x.view(rows, -1, 32) * (torch.rand(rows, columns // 32, 1, generator=generator) > 0.02)
        yield f"size {size:g}", x.view(rows, columns).to(dtype) + 0.0
    yield "thresholds", _thresholds(generator, rows, columns, dtype)


def _thresholds(generator, rows, columns, dtype):
    """Ties and grid values, up to two ulps beside them, under a maximum up to two ulps beside a threshold."""
    blocks = rows * columns // 32
    x, tops = (
        _drawn(torch.tensor(kind), shape, generator, dtype)
        for kind, shape in ((TIES, (blocks, 32)), (TOPS, (blocks, 1)))
    )
    top = tops.double() * 4
    x = torch.where(x.double() < top, x.double(), top)
    x[:, :1] = top
    x *= torch.exp2(torch.randint(-24, 9, (blocks, 1), generator=generator).double())
    sign = torch.rand(blocks, 32, generator=generator) < 0.5
    return torch.where(sign, -x, x).to(dtype).view(rows, columns)


def _drawn(values, shape, generator, dtype):
    picked = values.to(dtype)[torch.randint(len(values), shape, generator=generator)]
    beside = torch.randint(-2, 3, shape, generator=generator)
    return (picked.view(BITS[dtype]) + beside).to(BITS[dtype]).view(dtype)


if __name__ == "__main__":  # python values.py WEIGHTS: the few weights of the fast tests
    import sys

    from safetensors.torch import save_file

    few = {str(dtype): torch.cat([x for _, x in weights(dtype, 4, 64, seed=96)]) for dtype in BITS}
    save_file(few, sys.argv[1])
