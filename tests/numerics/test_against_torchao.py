"""torchao's MXTensor and NVFP4Tensor, bit for bit; where they differ, by how much and why.

Every test goes over more than ten million values (see hard_values.py). What differs is not skipped: it has to be what
docs/concepts/formats.md says it is.
"""

from dataclasses import replace

import pytest
import torch

from fp4rl.numerics.packing import pack_tensor, quantize
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.numerics.reference import reference
from fp4rl.numerics.rounding import round_magnitude
from fp4rl.numerics.scales import e8m0_codes
from fp4rl.spec.formats import FORMATS, MXFP4, NVFP4

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

MILLIONS = 10.5
MX = ("mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8", "mxfp8_e5m2")
RULES = ("floor", "ceil", "rceil", "even")
DTYPES = (torch.float32, torch.bfloat16)
RCEIL_SLACK = 2.0**-17  # float32's log2 cannot tell a quotient this little above a power of two from the power itself


@pytest.fixture(scope="module")
def to_mx(peer):
    """(x, format name, rule) -> torchao's MXTensor."""
    module = peer("torchao.prototype.mx_formats.mx_tensor")
    elements = {
        "mxfp4": torch.float4_e2m1fn_x2,
        "mxfp8": torch.float8_e4m3fn,
        "mxfp8_e5m2": torch.float8_e5m2,
        "mxfp6_e2m3": "fp6_e2m3",
        "mxfp6_e3m2": "fp6_e3m2",
    }

    def convert(x, name, rule):
        return module.MXTensor.to_mx(x, elements[name], 32, module.ScaleCalculationMode[rule.upper()])

    return convert


def with_code(x, codes, element):
    """x rounded, in float64, under the E8M0 bytes `codes` [n, 1]."""
    scale = torch.exp2(codes.double() - 127)
    return (round_magnitude(x.double().abs() / scale, element, "nearest_even") * scale).copysign(x)


def as_torchao_says(x, fmt, codes, theirs):
    """What torchao documents or does where it differs: [n, 32], NaN where it should equal the reference."""
    expected = torch.full(x.shape, torch.nan, dtype=torch.float64)
    least = (codes == 0).squeeze(-1)
    if fmt.scale_rule == "rceil":  # byte 0: values are not divided at all, so that they become zero
        quotient = x.abs().amax(-1, keepdim=True).double() / fmt.element.largest
        power = torch.exp2(codes.double() - 128)  # what the quotient is a hair above, where it is
        hair = ((quotient > power) & (quotient <= power * (1 + RCEIL_SLACK)) & (codes > 0)).squeeze(-1)
        below = hair & (theirs != reference(x, fmt)).any(-1)
        expected[below] = with_code(x[below], codes[below] - 1, fmt.element)
        zeroed = least | (below & (codes == 1).squeeze(-1))
        expected[zeroed] = torch.zeros(()).double().copysign(x[zeroed].double())
    else:  # byte 0: divided by 2^-126, the smallest normal float32, but multiplied by 2^-127
        expected[least] = with_code(x[least], codes[least] + 1, fmt.element) / 2
    return expected.to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MX)
def test_every_value_is_torchaos_or_differs_as_documented(name, rule, dtype, to_mx, hard, equal, record_property):
    fmt = replace(FORMATS[name], scale_rule=rule)
    seen = different = 0
    for kind, x in hard.mx_values(fmt.element, dtype, MILLIONS):
        theirs, mine = to_mx(x, name, rule).dequantize(dtype), reference(x, fmt)
        assert equal(fake_quantize(x, fmt), mine)
        expected = as_torchao_says(
            x, fmt, e8m0_codes(x.abs().amax(-1, keepdim=True).float(), rule, fmt.element), theirs
        )
        named = ~expected.isnan()
        assert equal(theirs, torch.where(named, expected, mine)), kind
        assert named.any() or kind in ("gaussian", "student", "any bits", "outlier")
        seen, different = seen + x.numel(), different + int((theirs != mine).sum())
    assert seen >= 10_000_000
    assert 0 < different < 0.05 * seen
    record_property("seen", f"{name} {rule} {dtype}: {seen:,} values, {different:,} differ, all as documented")


@pytest.mark.parametrize("rule", RULES)
def test_every_bfloat16_maximum_and_magnitude(rule, to_mx, hard, equal):
    """All 128 x 1280 pairs at every exponent where the scale's byte is not zero: 43 million values."""
    fmt, seen = replace(MXFP4, scale_rule=rule), 0
    for first in range(-124, 128, 36):
        x = hard.every_bfloat16(range(first, min(first + 36, 128)))
        if not x.isfinite().all():
            x = torch.where(x.isfinite(), x, torch.finfo(x.dtype).max)
        assert equal(to_mx(x, "mxfp4", rule).dequantize(x.dtype), reference(x, fmt))
        seen += x.numel()
    assert seen > 40_000_000


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_packed_bytes_are_torchaos(rule, dtype, to_mx, hard):
    fmt = replace(MXFP4, scale_rule=rule)
    for kind, x in hard.mx_values(fmt.element, dtype, 1):
        if kind in ("gaussian", "student", "outlier"):
            theirs, mine = to_mx(x, "mxfp4", rule), pack_tensor(x, fmt)
            assert torch.equal(theirs.qdata.view(torch.uint8), mine.data)
            assert torch.equal(theirs.scale.view(torch.uint8), mine.scales)


def test_another_rule_would_be_seen(to_mx, hard):
    """The comparison has teeth: no rule passes for another, nor half-away for nearest-even."""
    _, x = next(hard.mx_values(MXFP4.element, torch.bfloat16, 1))
    made = {rule: to_mx(x, "mxfp4", rule).dequantize(x.dtype) for rule in RULES}
    for rule in RULES:
        agreeing = [r for r in RULES if torch.equal(made[r], reference(x, replace(MXFP4, scale_rule=rule)))]
        assert agreeing == [rule]
    assert not torch.equal(made["floor"], reference(x, replace(MXFP4, rounding="half_away")))


def test_infinity_stays_infinite_there_and_takes_its_block_here(to_mx):
    x = torch.ones(2, 32)
    x[0, 5], x[1, 5] = torch.inf, torch.nan
    theirs = to_mx(x, "mxfp4", "floor").dequantize(x.dtype)
    assert theirs[0, 5].isinf()
    assert not theirs[0, :5].any()
    assert theirs[1].isnan().all()
    assert reference(x, MXFP4).isnan().all()


@pytest.fixture(scope="module")
def to_nvfp4(peer):
    module = peer("torchao.prototype.mx_formats.nvfp4_tensor")
    return lambda x: module.NVFP4Tensor.to_nvfp4(
        x, per_tensor_scale=module.per_tensor_amax_to_scale(x.float().abs().amax())
    )


def codes_of(qdata):
    return torch.stack((qdata & 0x0F, qdata >> 4), -1).flatten(-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nvfp4_has_torchaos_codes_but_beside_boundaries_and_under_its_least_scale(
    dtype, to_nvfp4, hard, record_property
):
    """torchao stores the factor's inverse and never a block scale below 2^-6; its quotients are a few ulp elsewhere."""
    seen = different = 0
    for kind, x in hard.nvfp4_values(dtype, MILLIONS):
        theirs, mine = to_nvfp4(x), quantize(x, NVFP4)
        scale, wanted = mine.scales.float(), x.float().abs().amax(-1, keepdim=True).double() / 6 * mine.factor.double()
        held = wanted.float() >= 2.0**-6
        apart = (theirs.scale.float().view_as(scale) != scale) & held
        assert (beside_a_midpoint(wanted, hard.midpoints(FORMATS["mxfp8"].element)) | ~apart).all(), kind
        same = held & ~apart
        ratio = x.double().abs() / (scale.double() / mine.factor.double())
        unlike = (codes_of(theirs.qdata) != mine.codes) & same
        assert (beside_a_midpoint(ratio, hard.midpoints(MXFP4.element)) | ~unlike).all(), kind
        if kind in ("gaussian", "student"):  # bfloat16 has so few values that some are ties by chance
            assert unlike.sum() + apart.sum() <= (1e-5 if dtype == torch.float32 else 1e-3) * x.numel()
        below = ~held & (theirs.scale.float().view_as(scale) != 2.0**-6)
        assert not below.any()
        close = (theirs.dequantize().double() - fake_quantize(x, NVFP4).double()).abs()
        allowed = fake_quantize(x, NVFP4).double().abs() * (2.0**-21 if dtype == torch.float32 else 2.0**-7)
        tiny = torch.finfo(dtype).tiny
        assert ((close <= allowed + tiny) | ~same | unlike).all(), kind
        seen, different = seen + x.numel(), different + int(unlike.sum())
    assert seen >= 10_000_000
    record_property("seen", f"nvfp4 {dtype}: {seen:,} values, {different:,} codes differ, all beside a tie")


def beside_a_midpoint(x, midpoints):
    """Within 2^-20 of a tie, the quotient's few roundings."""
    return ((x.unsqueeze(-1) / midpoints.double() - 1).abs() <= 2.0**-20).any(-1)


def test_a_tensor_of_zeros_is_nan_there_and_zero_here(to_nvfp4):
    assert to_nvfp4(torch.zeros(2, 32)).dequantize().isnan().all()
    assert not fake_quantize(torch.zeros(2, 32), NVFP4).any()
