"""The error of formats on three kinds of data: ideal, heavy-tailed, and with channels of outliers."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fp4rl.numerics.errors import measure
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.spec.formats import Format

SHAPE = (512, 2048)
SIZE = 0.02  # standard deviation, the size of real weights
DEGREES = 4.0  # of Student's t
OUTLIER_EVERY = 128  # channels
OUTLIER_TIMES = 30.0


def gaussian(generator: torch.Generator) -> Tensor:
    """[512, 2048] normal values."""
    return SIZE * torch.randn(SHAPE, generator=generator)


def heavy_tailed(generator: torch.Generator) -> Tensor:
    """[512, 2048] of Student's t with 4 degrees of freedom: a normal value over the root of a mean of four squares."""
    squares = torch.randn((int(DEGREES), *SHAPE), generator=generator).square().mean(0)
    return gaussian(generator) / squares.sqrt()


def outlier_channels(generator: torch.Generator) -> Tensor:
    """[512, 2048] normal values of which every 128th column is 30 times as large, as in the inputs of many layers."""
    x = gaussian(generator)
    x[:, ::OUTLIER_EVERY] *= OUTLIER_TIMES
    return x


DATA: dict[str, Callable[[torch.Generator], Tensor]] = {
    "gaussian": gaussian,
    "heavy_tailed": heavy_tailed,
    "outlier_channels": outlier_channels,
}


def errors_on(fmt: Format, seed: int = 0) -> Iterator[tuple[str, dict[str, float]]]:
    """The format's measures on each kind of data, every kind from its own generator of that seed."""
    for name, draw in DATA.items():
        generator = torch.Generator().manual_seed(seed)
        x = draw(generator)
        yield name, measure(x, fake_quantize(x, fmt, generator=generator), fmt)
