"""compressed-tensors, bit for bit: MXFP4 and MXFP6 under `even`, MXFP8 under `even_e2m1`, NVFP4.

The sign of a zero is lost there and kept here, so values are compared, not bits. Where else they differ, both sides are
pinned; docs/concepts/formats.md lists it.
"""

from dataclasses import replace

import pytest
import torch

from fp4rl.numerics.packing import pack_tensor
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.numerics.reference import reference
from fp4rl.spec.formats import FORMATS, MXFP4, NVFP4

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

MILLIONS = 12  # a tenth of float16's falls away
MX = {"mxfp4": ("MXFP4A16", "even"), "mxfp6_e2m3": ("MXFP6A16", "even"), "mxfp8": ("MXFP8A16", "even_e2m1")}
UP_FROM = {"mxfp4": 1.75, "mxfp6_e2m3": 1.9375, "mxfp8": 1.75}  # the mantissa at which the rule raises the scale
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def compressed(peer):
    """(x, name of a scheme, maxima in float32) -> what compressed-tensors makes of x as a weight."""
    schemes = peer("compressed_tensors.quantization.quant_scheme")
    helpers = peer("compressed_tensors.quantization.utils.helpers")
    forward = peer("compressed_tensors.quantization.lifecycle.forward")

    def convert(x, scheme, wide=False):
        options, factor = getattr(schemes, scheme)["weights"], None
        if scheme.startswith("NVFP4"):
            factor = helpers.generate_gparam(x.float().amin(), x.float().amax())
        scale, zero = helpers.compute_dynamic_scales_and_zp(x.float() if wide else x, options, None, factor)
        return forward.fake_quantize(x, scale, zero, options, global_scale=factor)

    return convert


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MX)
def test_mx_values_are_compressed_tensors(name, dtype, compressed, hard, record_property):
    scheme, rule = MX[name]
    fmt = replace(FORMATS[name], scale_rule=rule)
    seen = different = 0
    for kind, x in hard.mx_values(fmt.element, dtype, MILLIONS):
        amax = x.abs().amax(-1, keepdim=True).float()
        if dtype == torch.float16:  # below, their scale has too few bits of its own in float16
            x = x[(amax >= 2.0**-14).squeeze(-1)]
            amax = x.abs().amax(-1, keepdim=True).float()
        theirs, mine = compressed(x, scheme), reference(x, fmt)
        overflows = amax >= UP_FROM[name] * 2.0 ** hard.HIGHEST[dtype]  # the power of two above leaves the dtype
        assert torch.equal(theirs.isnan(), overflows.expand_as(x)), kind
        assert ((theirs == mine) | overflows).all(), kind
        seen, different = seen + x.numel(), different + int(overflows.sum()) * 32
    assert seen >= 10_000_000
    assert 0 < different < 0.04 * seen
    record_property("seen", f"{name} {rule} {dtype}: {seen:,} values, {different:,} in blocks that are NaN there")


def test_every_bfloat16_maximum_and_magnitude(compressed, hard):
    """All 128 x 1280 pairs at every exponent but the last: 43 million values."""
    fmt, seen = replace(MXFP4, scale_rule="even"), 0
    for first in range(-126, 127, 36):
        x = hard.every_bfloat16(range(first, min(first + 36, 127)))
        assert torch.equal(compressed(x, "MXFP4A16"), reference(x, fmt))
        seen += x.numel()
    assert seen > 40_000_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nvfp4_values_are_compressed_tensors(dtype, compressed, hard, record_property):
    """In bfloat16 with block maxima taken in float32; theirs are divided by 6 in bfloat16 (see the test below)."""
    seen = 0
    for kind, x in hard.nvfp4_values(dtype, MILLIONS):
        assert torch.equal(compressed(x, "NVFP4A16", wide=True), reference(x, NVFP4)), kind
        assert torch.equal(fake_quantize(x, NVFP4), reference(x, NVFP4)), kind
        seen += x.numel()
    assert seen >= 10_000_000
    record_property("seen", f"nvfp4 {dtype}: {seen:,} values, all equal")


def test_nvfp4_block_scales_made_in_bfloat16_differ(compressed, hard):
    _, x = next(hard.nvfp4_values(torch.bfloat16, 1))
    share = (compressed(x, "NVFP4A16") != reference(x, NVFP4)).double().mean().item()
    assert 0.001 < share < 0.1


def test_nvfp4_tensors_too_small_for_a_float32_factor_lose_it_there(compressed):
    x = 1e-36 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    assert not compressed(x, "NVFP4A16").any()
    assert reference(x, NVFP4).any()


def test_zeros_are_zeros_on_both_sides_and_keep_their_sign_here(compressed):
    x = torch.tensor([-0.1, -0.0, 0.0, 4.0]).repeat(1, 16)
    for scheme, fmt in (("MXFP4A16", replace(MXFP4, scale_rule="even")), ("NVFP4A16", NVFP4)):
        mine, theirs = reference(x, fmt), compressed(x, scheme)
        assert torch.equal(mine, theirs)
        assert torch.signbit(mine).sum() > torch.signbit(theirs).sum()
        assert not compressed(torch.zeros(2, 32), scheme).any()


def test_infinity_makes_the_block_nan_there_too(compressed):
    x = torch.ones(2, 64)
    x[1, 40] = torch.inf
    assert torch.equal(compressed(x, "MXFP4A16").isnan(), reference(x, replace(MXFP4, scale_rule="even")).isnan())


def test_float16_below_its_normal_numbers_differs(compressed):
    x = torch.full((1, 32), 12 * 2.0**-24, dtype=torch.float16)
    x[0, 0] = 151 * 2.0**-24
    assert not torch.equal(compressed(x, "MXFP4A16"), reference(x, replace(MXFP4, scale_rule="even")))


def test_packed_weights_are_the_bytes_of_their_checkpoints(peer, hard):
    nibbles = peer("compressed_tensors.compressors.nvfp4.helpers").pack_fp4_to_uint8
    for _, x in hard.mx_values(MXFP4.element, torch.float32, 0.1):
        packed = pack_tensor(x, replace(MXFP4, scale_rule="even"))
        scale = torch.exp2(packed.scales.double() - 127)
        values = (fake_quantize(x, packed.levels.fmt).double() / scale).float()
        keep = values.isfinite().all(-1)  # the last power of two leaves float32
        assert torch.equal(nibbles(values[keep]), packed.data[keep])


def test_another_rule_would_be_seen(compressed, hard):
    _, x = next(hard.mx_values(MXFP4.element, torch.bfloat16, 1))
    theirs = compressed(x, "MXFP4A16")
    rules = ("floor", "ceil", "rceil", "even", "uos", "mse")
    assert [r for r in rules if torch.equal(theirs, reference(x, replace(MXFP4, scale_rule=r)))] == ["even"]
    _, y = next(hard.nvfp4_values(torch.float32, 1))
    wrong = replace(NVFP4, rounding="half_away")
    ties = dict(hard.nvfp4_values(torch.float32, 1))["ties"]
    assert torch.equal(compressed(ties, "NVFP4A16"), reference(ties, NVFP4))
    assert not torch.equal(compressed(ties, "NVFP4A16"), reference(ties, wrong))
    assert not torch.equal(compressed(y, "NVFP4A16"), reference(y * 1.0001, NVFP4))
