"""Blocks that fall back, against the definition of arXiv 2503.08040 written out in float64 over casts of ml_dtypes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fp4rl.numerics.dispatch import round_tensor
from fp4rl.numerics.errors import split
from fp4rl.numerics.levels import within_reach
from fp4rl.numerics.packing import quantize
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import MXFP4, MXFP8, NVFP4, Coarse

QUARTER = replace(MXFP4, fallback=0.25)
PER_TOKEN = replace(NVFP4, factor="per_token")
FORMATS = {
    "mxfp4": MXFP4,
    "even": replace(MXFP4, scale_rule="even"),
    "blocks of 16": replace(MXFP4, block=(1, 16)),
    "mxfp8": MXFP8,
    "macro blocks": replace(MXFP4, coarse=Coarse(128)),
    "nvfp4": PER_TOKEN,
}


def data(rows=24, columns=200, seed=0):
    """Normal values with outliers, some in the last block, which is short."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    return torch.where(torch.rand(rows, columns, generator=generator) < 0.02, 30 * x, x)


def mxfp4_block(block):
    """One block by OCP's floor rule in float64: ml_dtypes' cast, clipped to 6, under 2^(floor(log2 amax) - 2)."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    largest = np.abs(block).max()
    scale = 2.0 ** (np.frexp(largest)[1] - 1 - 2) if largest else 1.0
    units = np.clip(block / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn)
    return units.astype(np.float64) * scale


def by_hand(x, share, width=32):
    """Q(x) + Q(x - Q(x)) in the ceil(share * blocks) blocks of each row with the largest magnitude, Q(x) elsewhere."""
    made = np.zeros(x.shape)
    for row, own in zip(x.double().numpy(), made, strict=True):
        spans = [slice(at, at + width) for at in range(0, len(row), width)]
        for span in spans:
            own[span] = mxfp4_block(row[span])
        largest = sorted(spans, key=lambda span: -np.abs(row[span]).max())  # a stable sort: of equals the first
        for span in largest[: -int(-share * len(spans) // 1)]:
            own[span] += mxfp4_block(row[span] - own[span])
    return torch.from_numpy(made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 1.0])
def test_values_are_those_of_the_definition(share, dtype):
    x = data().to(dtype)
    made = fake_quantize(x, replace(MXFP4, fallback=share))
    assert torch.equal(made, by_hand(x, share).to(dtype))
    assert made.dtype == dtype
    assert not torch.equal(made, fake_quantize(x, MXFP4))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_roundings_of_torchao_are_the_fallback_of_every_block(peer):
    module, x = peer("torchao.prototype.mx_formats.mx_tensor"), data(64, 512).bfloat16()

    def theirs(values):
        mode = module.ScaleCalculationMode.FLOOR
        return module.MXTensor.to_mx(values, torch.float4_e2m1fn_x2, 32, mode).dequantize(torch.bfloat16)

    first = theirs(x)
    assert torch.equal(fake_quantize(x, replace(MXFP4, fallback=1.0)), first + theirs(x - first))


@pytest.mark.parametrize("name", FORMATS)
def test_all_blocks_are_rounded_twice_for_a_share_of_one_and_a_part_of_them_for_less(name):
    x, fmt = data(), FORMATS[name]
    first = fake_quantize(x, fmt)
    both = first + fake_quantize(x - first, fmt)
    if fmt is not PER_TOKEN and fmt.coarse is None:  # whose scales of what is left span chosen blocks alone
        some = fake_quantize(x, replace(fmt, fallback=0.25))
        assert ((some == first) | (some == both)).all()
    assert torch.equal(fake_quantize(x, replace(fmt, fallback=1.0)), both)
    errors = [(fake_quantize(x, each) - x).square().sum() for each in (fmt, replace(fmt, fallback=0.25))]
    assert errors[1] < 0.5 * errors[0]  # a quarter of the blocks has the outliers


def test_values_in_the_deadzone_of_an_outlier_come_back():
    """Under 1/24 of their block's largest, values round to zero; in the second rounding they have their own scale."""
    x = torch.full((1, 128), 0.9)
    x[0, 40] = 24.0
    once, twice = fake_quantize(x, MXFP4), fake_quantize(x, QUARTER)
    assert once[0, 32:64].count_nonzero() == 1
    assert twice[0, 40] == 24.0
    assert (twice[0, 32:64] == 0.75).sum() == 31  # as in a block without an outlier: six scales of 1/8
    assert once[0, 0] == 0.75
    assert torch.equal(twice[0, :32], once[0, :32])


def test_a_token_is_rounded_by_itself_and_of_equal_blocks_the_first_falls_back():
    x = data(8, 256)
    whole = fake_quantize(x, QUARTER)
    x[0] *= 1e4
    assert torch.equal(fake_quantize(x, QUARTER)[1:], whole[1:])
    for row, own in zip(x[1:], whole[1:], strict=True):
        assert torch.equal(fake_quantize(row, QUARTER), own)
    same = torch.linspace(-1, 1, 32).repeat(1, 4)
    changed = (fake_quantize(same, QUARTER) != fake_quantize(same, MXFP4)).view(4, 32).any(-1)
    assert changed.tolist() == [True, False, False, False]


def test_nan_and_zeros_keep_to_their_blocks(equal):
    x = data(2, 128)
    x[0, 40] = torch.nan
    x[1] = -0.0
    made = fake_quantize(x, replace(MXFP4, fallback=0.5))
    assert made[0].isnan().nonzero().flatten().tolist() == [*range(32, 64)]
    assert not made[1].any()
    assert equal(made[1, 64:], x[1, 64:])


def test_what_both_roundings_clip_is_beyond_reach_and_nothing_else():
    """Under floor 7.9 is clipped to 6; of the 1.9 that is left a scale of 1/4 holds 1.5, so it is clipped again."""
    x = torch.zeros(2, 64)
    x[0, :3] = torch.tensor([7.9, 7.2, 4.0])
    x[1, :2], x[1, 32] = torch.tensor([7.5, 1.0]), 100.0
    assert within_reach(x, MXFP4)[:, :3].tolist() == [[False, False, True], [False, True, True]]
    reach = within_reach(x, replace(MXFP4, fallback=0.5))
    assert reach[:, :3].tolist() == [[False, True, True], [False, True, True]]  # row 1: another block falls back


@pytest.mark.parametrize("name", FORMATS)
def test_the_parts_of_an_error_add_up_and_the_deadzone_shrinks(name):
    x, fmt = data(), FORMATS[name]
    dead = []
    for each in (fmt, replace(fmt, fallback=0.25)):
        made = fake_quantize(x, each)
        parts = split(x, made, each)
        assert torch.allclose(sum(parts), made.double() - x.double(), atol=1e-12)
        dead.append(parts.deadzone.square().sum())
    assert dead[1] <= 0.5 * dead[0]


def test_what_rounds_once_or_packs_refuses_a_fallback():
    with pytest.raises(InvalidValueError, match="fake_quantize"):
        round_tensor(data(), QUARTER, None)
    with pytest.raises(InvalidValueError, match="no layout stores blocks that are rounded twice"):
        quantize(data(), QUARTER)
