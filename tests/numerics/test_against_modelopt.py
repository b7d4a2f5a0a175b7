"""nvidia-modelopt's MXFP4 and NVFP4 tensors: equal to `rceil` in float32 and to NVFP4, but for what the docs list."""

from dataclasses import replace

import pytest
import torch

from fp4rl.numerics.packing import quantize
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.numerics.reference import reference
from fp4rl.numerics.scales import nvfp4_blocks, nvfp4_global
from fp4rl.spec.formats import E2M1, E4M3, MXFP4, NVFP4

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

MILLIONS = 12  # one NVFP4 tensor of eleven falls away
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RCEIL = replace(MXFP4, scale_rule="rceil")
# The logarithm in float32, which takes a quotient a hair above a power of two for the power, and ties toward zero.
THEIRS = replace(RCEIL, scale_math="float32", rounding="half_toward_zero")


@pytest.fixture(scope="module")
def to_mxfp4(peer):
    tensor = peer("modelopt.torch.quantization.qtensor").MXFP4QTensor

    def convert(x):
        stored, scale = tensor.quantize(x.clone(), 32)
        return stored.dequantize(dtype=x.dtype, scale=scale, block_sizes={-1: 32}), scale.view(-1, 1)

    return convert


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_value_and_scale_is_that_of_rceil_in_float32_with_ties_toward_zero(
    dtype, to_mxfp4, hard, record_property
):
    seen = ties = hairs = 0
    for kind, x in hard.mx_values(E2M1, dtype, MILLIONS):
        theirs, used = to_mxfp4(x)
        mine = quantize(x, THEIRS)
        assert torch.equal(mine.scales, used.view(mine.scales.shape)), kind
        assert torch.equal(fake_quantize(x, THEIRS), theirs), kind
        exact = quantize(x, replace(THEIRS, scale_math="exact")).scales
        seen, hairs = seen + x.numel(), hairs + int((exact != mine.scales).sum())
        ties += int((fake_quantize(x, replace(THEIRS, rounding="half_away")) != theirs).sum())
    assert seen >= 10_000_000
    assert ties > 0
    record_property("seen", f"mxfp4 {dtype}: {seen:,} equal, {ties:,} ties go down, {hairs:,} blocks a hair above")


def test_what_is_not_finite_becomes_zero_there_and_nan_here(to_mxfp4):
    for bad in (torch.inf, torch.nan):
        x = torch.ones(2, 32)
        x[1, 5] = bad
        theirs = to_mxfp4(x)[0]
        assert not theirs[1].any()
        assert reference(x, RCEIL)[1].isnan().all()


def test_positive_zeros_turn_negative_there(to_mxfp4):
    x = torch.tensor([0.0, 4.0]).repeat(1, 16)
    assert torch.signbit(to_mxfp4(x)[0]).any()
    assert not torch.signbit(reference(x, RCEIL)).any()


@pytest.fixture(scope="module")
def to_nvfp4(peer):
    tensor = peer("modelopt.torch.quantization.qtensor").NVFP4QTensor

    def convert(x):
        stored, scale, factor = tensor.quantize(x.clone(), 16)
        return stored.dequantize(dtype=x.dtype, scale=scale, double_scale=factor, block_sizes={-1: 16}), scale.float()

    return convert


def beside_a_midpoint(x, midpoints):
    """Within 2^-20 of a tie, the quotient's few roundings."""
    return ((x.unsqueeze(-1) / midpoints.double() - 1).abs() <= 2.0**-20).any(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nvfp4_is_modelopts_but_beside_ties_and_under_its_least_scale(dtype, to_nvfp4, hard, record_property):
    """modelopt stores the factor's inverse, keeps block scales at or above 2^-9 and divides by their product."""
    seen = different = 0
    for kind, x in hard.nvfp4_values(dtype, MILLIONS):
        theirs, used = to_nvfp4(x)
        mine, amax = reference(x, NVFP4), x.float().abs().amax(-1, keepdim=True)
        factor = nvfp4_global(amax, E2M1)
        scale, wanted = nvfp4_blocks(amax, factor, E2M1).float(), amax.double() / 6 * factor.double()
        if (factor >= torch.finfo(torch.float32).max).item():
            continue  # a tensor too small for a float32 factor
        apart = (used.view_as(scale) != scale) & (wanted >= 2.0**-9)
        assert (beside_a_midpoint(wanted, hard.midpoints(E4M3)) | ~apart).all(), kind
        same = (wanted >= 2.0**-9) & ~apart
        close = (theirs.double() - mine.double()).abs() <= mine.double().abs() * (
            2.0**-21 if dtype == torch.float32 else 2.0**-7
        ) + torch.finfo(dtype).tiny
        unlike = ~close & same
        ratio = x.double().abs() / (scale.double() / factor.double())
        assert (beside_a_midpoint(ratio, hard.midpoints(E2M1)) | ~unlike).all(), kind
        seen, different = seen + x.numel(), different + int(unlike.sum())
    assert seen >= 10_000_000
    record_property("seen", f"nvfp4 {dtype}: {seen:,} values, {different:,} beside a tie differ")


def test_exact_ties_of_nvfp4_go_to_even_there_too(to_nvfp4, hard):
    x = dict(hard.nvfp4_values(torch.float32, 1))["ties"]
    assert torch.equal(to_nvfp4(x)[0], fake_quantize(x, NVFP4))
    assert not torch.equal(to_nvfp4(x)[0], fake_quantize(x, replace(NVFP4, rounding="half_away")))


def test_a_tensor_of_zeros_is_nan_there_and_zero_here(to_nvfp4):
    assert to_nvfp4(torch.zeros(2, 32))[0].isnan().all()
    assert not reference(torch.zeros(2, 32), NVFP4).any()


def test_another_rule_would_be_seen(to_mxfp4, hard):
    _, x = next(hard.mx_values(E2M1, torch.float32, 1))
    theirs = to_mxfp4(x)[0]
    rules = ("floor", "ceil", "rceil", "even", "uos", "mse")
    assert [r for r in rules if torch.equal(theirs, reference(x, replace(MXFP4, scale_rule=r)))] == ["rceil"]
