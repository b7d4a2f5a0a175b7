"""On a GPU every format gives the bits of the CPU, whichever backend rounds there; skipped without one."""

from dataclasses import replace

import pytest
import torch

from fp4rl.numerics.dispatch import backend_for
from fp4rl.numerics.packing import dequantize, pack_tensor
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.spec.formats import FORMATS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Sums of squares, and of a rotation, are added in another order there: a tie may fall on the other side.
SUMMED = {name for name, fmt in FORMATS.items() if fmt.scale_rule == "mse" or fmt.rotation or fmt.coarse}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_format_gives_the_bits_of_the_cpu(name, dtype, edges, equal):
    fmt = FORMATS[name]
    if fmt.rounding == "stochastic":
        pytest.skip("a generator of the GPU draws other numbers; one seed is compared in test_triton.py")
    for x in edges(dtype):
        here, there = fake_quantize(x, fmt), fake_quantize(x.cuda(), fmt).cpu()
        if name in SUMMED and not equal(here, there):
            assert ((here == there) | (here.isnan() & there.isnan())).float().mean() > 0.99, tuple(x.shape)
            continue
        assert equal(here, there), tuple(x.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", ["even", "uos", "round", "fouroversix"])
def test_the_rules_of_packers_give_the_bits_of_the_cpu(rule, dtype, edges, equal):
    fmt = replace(FORMATS["mxfp4"], scale_rule=rule, scale_math="tensor", rounding="half_added")
    for x in edges(dtype):
        assert equal(fake_quantize(x, fmt), fake_quantize(x.cuda(), fmt).cpu()), tuple(x.shape)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "mxfp4_dual"])
def test_codes_and_scales_are_those_of_the_cpu(name, equal):
    x = torch.randn(96, 512, generator=torch.Generator().manual_seed(0))
    here, there = pack_tensor(x, FORMATS[name]), pack_tensor(x.cuda(), FORMATS[name])
    assert torch.equal(here.data.view(torch.uint8), there.data.cpu().view(torch.uint8))
    assert torch.equal(here.scales.view(torch.uint8), there.scales.cpu().view(torch.uint8))
    assert equal(dequantize(here), dequantize(there).cpu())


def test_triton_rounds_the_formats_that_are_trained_with():
    x = torch.randn(64, 64, device="cuda")
    assert {backend_for(x, FORMATS[name]) for name in ("mxfp4", "nvfp4", "mxfp8", "mxfp4_sr")} == {"triton"}


def test_stochastic_rounding_on_the_gpu_is_unbiased_and_repeats():
    x = torch.full((1 << 16, 32), 0.3, device="cuda")
    x[:, 0] = 6.0  # the scale is 1, and 0.3 lies between 0 and 0.5
    seeded = [torch.Generator("cuda").manual_seed(1) for _ in range(2)]
    one, other = (fake_quantize(x, FORMATS["mxfp4_sr"], generator=generator) for generator in seeded)
    assert torch.equal(one, other)
    assert set(one[:, 1:].unique().tolist()) == {0.0, 0.5}
    up = float((one[:, 1:] > 0).float().mean())
    assert abs(up - 0.6) < 5 * (0.24 / (31 << 16)) ** 0.5  # five standard deviations of the share
