"""Rotation and the coarse scale: what stands around the blocks, and is undone."""

from dataclasses import replace

import pytest
import torch

from fp4rl.numerics.levels import coarse_scale, rotate, within_reach
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import MXFP4, NVFP4, Coarse

SIZES = (16, 32, 64, 128)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", SIZES)
def test_a_rotation_is_a_hadamard_matrix_over_the_root_of_its_size(size):
    matrix = rotate(torch.eye(size), size)
    assert torch.equal(matrix.abs(), torch.full((size, size), float(size**-0.5)))
    assert torch.equal(matrix, matrix.t())
    assert torch.allclose(matrix @ matrix, torch.eye(size), atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("columns", [128, 256, 172, 7])
def test_a_rotation_is_undone_up_to_float_rounding(size, columns):
    x = normal(5, columns)
    assert torch.allclose(rotate(rotate(x, size), size), x, atol=1e-6)


def test_a_tail_too_short_for_a_block_stays():
    x = normal(3, 40)
    assert torch.equal(rotate(x, 32)[:, 32:], x[:, 32:])


def test_a_product_does_not_change_when_weight_and_input_turn():
    weight, entry = normal(24, 172).double(), normal(172, 5).double()
    product = rotate(weight, 32) @ rotate(entry.t(), 32).t()
    assert torch.allclose(product, weight @ entry, atol=1e-12)


def test_a_rotation_spreads_an_outlier():
    x = torch.zeros(1, 64)
    x[0, 3] = 100.0
    x += 0.1 * normal(1, 64)
    error = [(fake_quantize(x, fmt) - x)[0, 32:].norm() for fmt in (MXFP4, replace(MXFP4, rotation=64))]
    assert error[1] > error[0]  # the second block now shares the outlier's scale
    assert (rotate(x, 64).abs() > 10).all()


def test_an_unknown_size_is_refused():
    with pytest.raises(InvalidValueError, match="rotation 24"):
        rotate(normal(2, 48), 24)


def test_the_coarse_scale_by_maximum_divides_by_the_largest_of_the_element():
    x = normal(4, 1100)
    scale = coarse_scale(x, MXFP4, Coarse(512))
    assert scale.shape == (4, 3, 1)
    assert torch.equal(scale[:, 0, 0], x[:, :512].abs().amax(-1) / 6)
    assert torch.equal(scale[:, 2, 0], x[:, 1024:].abs().amax(-1) / 6)


def test_the_dual_level_is_the_published_formula():
    """CANN aclnnDynamicDualLevelMxQuant: amax / 6, the quotient in the input's dtype, then the OCP rule, in
    bfloat16."""
    x = normal(2, 512).bfloat16()
    level0 = x.float().abs().amax(-1, keepdim=True) / 6
    inner = (x.float() / level0).to(torch.bfloat16)
    wanted = (fake_quantize(inner, MXFP4).float() * level0).to(torch.bfloat16)
    assert torch.equal(fake_quantize(x, replace(MXFP4, coarse=Coarse(512))), wanted)


@pytest.mark.parametrize("columns", [128, 512])
def test_searching_the_coarse_scale_never_does_worse_than_the_maximum(columns):
    x = normal(64, 1024)
    kinds = [replace(MXFP4, coarse=Coarse(columns, choice)) for choice in ("max", "search")]
    errors = [(fake_quantize(x, fmt) - x).square().sum() for fmt in kinds]
    plain = (fake_quantize(x, MXFP4) - x).square().sum()
    assert errors[1] < errors[0]
    assert errors[1] < plain


def test_a_coarse_scale_takes_nan_from_one_block_only():
    x = normal(1, 512)
    x[0, 40] = torch.nan
    made = fake_quantize(x, replace(MXFP4, coarse=Coarse(512)))
    assert made[0, 32:64].isnan().all()
    assert made.isnan().sum() == 32


@pytest.mark.parametrize("coarse", [Coarse(512), Coarse(128, "search")])
def test_zeros_stay_zeros_under_a_coarse_scale(coarse):
    assert torch.equal(fake_quantize(torch.zeros(2, 600), replace(MXFP4, coarse=coarse)), torch.zeros(2, 600))


def test_within_reach_is_false_exactly_where_a_value_was_clipped():
    x = torch.tensor([7.9, -7.0, 6.0, 0.1])
    assert within_reach(x, MXFP4).tolist() == [False, False, True, True]
    assert within_reach(x, replace(MXFP4, scale_rule="rceil")).all()
    assert within_reach(normal(8, 64), NVFP4).float().mean() > 0.9
    assert within_reach(x, replace(MXFP4, coarse=Coarse(512))).tolist() == [True] * 4
