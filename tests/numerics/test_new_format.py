"""A format that nobody foresaw, integers of 4 bits, is rounded and packed by every backend without a line of code."""

from dataclasses import replace

import pytest
import torch

from fp4rl.numerics import native_build
from fp4rl.numerics.packing import dequantize, pack_tensor
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.spec.formats import E2M1, Element, Format

INT4 = Format("int4", Element("INT4", 1, 2, 3.5))  # -7 to 7 in units of one half
FP16 = Format("fp16", Element("FP16", 5, 10, 65504.0), block=None, scale="none", scale_rule="amax")
BACKENDS = [
    pytest.param("native", marks=pytest.mark.skipif(not native_build.compiler(), reason="no C compiler")),
    "chunked",
    "reference",
]


def by_integers(x):
    """INT4 by another way: whole numbers under the scale 2^(floor(log2 amax) - 1), counted in halves."""
    blocks = x.double().view(-1, 32)
    unit = 2.0 ** (blocks.abs().amax(-1, keepdim=True).log2().floor() - 2)
    return ((blocks / unit).round().clamp(-7, 7) * unit).view_as(x).float()


@pytest.mark.parametrize("name", BACKENDS)
def test_integers_of_four_bits_are_rounded_and_packed_by_every_backend(name, backend):
    backend(name)
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    wanted = by_integers(x)
    assert torch.equal(fake_quantize(x, INT4), wanted)
    packed = pack_tensor(x, INT4)
    assert torch.equal(dequantize(packed), wanted)
    assert 8 * (packed.data.numel() + packed.scales.numel()) == 4.25 * x.numel()
    assert not torch.equal(fake_quantize(x, replace(INT4, element=E2M1)), wanted)


def test_an_element_without_a_scale_is_rounded_as_its_own_cast():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 100
    assert torch.equal(fake_quantize(x, FP16), x.half().float())
