"""ml_dtypes' casts are this project's elements, ties and subnormals included."""

import numpy as np
import pytest
import torch

from fp4rl.numerics.packing import encode
from fp4rl.numerics.rounding import round_magnitude
from fp4rl.numerics.scales import power_of_two
from fp4rl.spec.formats import E2M1, E2M3, E3M2, E4M3, E5M2

ml_dtypes = pytest.importorskip("ml_dtypes")

ELEMENTS = {
    E2M1: "float4_e2m1fn",
    E2M3: "float6_e2m3fn",
    E3M2: "float6_e3m2fn",
    E4M3: "float8_e4m3fn",
    E5M2: "float8_e5m2",
}


def cast(x, element):
    """Values and bytes of magnitudes within reach, cast by ml_dtypes."""
    stored = x.numpy().astype(getattr(ml_dtypes, ELEMENTS[element]))
    return torch.from_numpy(stored.astype(np.float32)), torch.from_numpy(stored.view(np.uint8))


def agree(x, element):
    x = x.clamp(max=element.largest)
    made, (values, stored) = round_magnitude(x, element, "nearest_even"), cast(x, element)
    return torch.equal(made, values) and torch.equal(encode(made, element), stored)


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
def test_every_boundary_and_its_neighbours(element, hard):
    points = hard.beside(torch.cat((hard.midpoints(element), torch.tensor(element.grid()[1:]))))
    assert agree(points, element)


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
def test_every_magnitude_of_bfloat16_and_float16(element):
    bits = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        x = bits.view(dtype).float()
        assert agree(x[x.isfinite()], element)


@pytest.mark.slow
@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
def test_ten_million_magnitudes_of_float32(element):
    generator = torch.Generator().manual_seed(3)
    low, high = np.float32([element.smallest / 8, 2 * element.largest]).view(np.int32).tolist()
    for _ in range(5):
        x = torch.randint(low, high, (2_000_000,), generator=generator, dtype=torch.int32).view(torch.float32)
        assert agree(x, element)


def test_a_scale_byte_is_the_power_that_ml_dtypes_reads():
    codes = torch.arange(255, dtype=torch.int32)
    theirs = codes.to(torch.uint8).numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert torch.equal(power_of_two(codes, torch.float32), torch.from_numpy(theirs))


def test_a_rounding_that_loses_its_ties_would_be_seen(hard):
    points = hard.midpoints(E2M1)
    assert not torch.equal(round_magnitude(points, E2M1, "half_away"), cast(points, E2M1)[0])
