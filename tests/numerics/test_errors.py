"""Error measures: each is its formula, and the three-way split adds up to the error element by element."""

from dataclasses import replace

import pytest
import torch

from fp4rl.numerics.errors import errors_on, gaussian_ideal, ideally_rounded, measure, split
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import FORMATS, FP8, MXFP4, NVFP4, Coarse
from fp4rl.spec.gaussian import MXFP4_RULES_DB, kept_ideal

RULES = ("floor", "ceil", "rceil", "even", "uos", "mse")
SPLIT = [
    *FORMATS.values(),
    *(replace(MXFP4, scale_rule=rule) for rule in RULES[1:]),
    replace(NVFP4, rounding="stochastic"),
    replace(MXFP4, coarse=Coarse(128)),
]


@pytest.mark.parametrize("fmt", SPLIT, ids=lambda f: f"{f.name}-{f.scale_rule}-{f.rounding}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_three_parts_add_up_to_the_error_exactly(fmt, dtype):
    generator = torch.Generator().manual_seed(3)
    sizes = torch.exp2(torch.randint(-30, 30, (100, 1), generator=generator).float())
    x = (torch.randn(100, 172, generator=generator) * sizes).to(dtype)
    x[0, :20] = 0
    rounded = fake_quantize(x, fmt, generator=generator)
    parts = split(x, rounded, fmt)
    error = rounded.double() - x.double()
    assert torch.equal(parts.scale_bias + parts.deadzone + parts.grid_noise, error)
    assert not ((parts.deadzone != 0) & (parts.grid_noise != 0)).any()


def test_a_scale_that_is_ideal_already_has_no_bias():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    x[:, ::32] = 6.0 * x.abs().max().log2().ceil().exp2()  # every block's ideal scale is a power of two
    parts = split(x, fake_quantize(x, MXFP4), MXFP4)
    assert not parts.scale_bias.any()
    assert parts.grid_noise.any()


def test_what_the_ideal_scale_sends_to_zero_is_the_deadzone():
    x = torch.tensor([6.0, 0.2, 1.0])
    parts = split(x, fake_quantize(x, MXFP4), MXFP4)
    assert parts.deadzone.tolist() == [0.0, pytest.approx(-0.2), 0.0]


def test_the_ideal_scale_maps_the_largest_to_the_largest():
    x = torch.tensor([5.0, -2.5, 1.25])
    assert ideally_rounded(x, MXFP4)[0].item() == pytest.approx(5.0, rel=1e-6)


def test_each_measure_is_its_formula():
    x = torch.tensor([4.0, -4.0, 7.0, 0.1, 0.0])
    found = measure(x, fake_quantize(x, MXFP4), MXFP4)  # 4 -4 6 0 0
    squares, signal = 1.0 + 0.01, 16 + 16 + 49 + 0.01
    assert found["relative_l2"] == pytest.approx((squares / signal) ** 0.5)
    assert found["sqnr_db"] == pytest.approx(-10 * torch.log10(torch.tensor(squares / signal)).item(), rel=1e-5)
    assert found["relative_l1"] == pytest.approx(1.1 / 15.1)
    assert found["mean_relative"] == pytest.approx((1 / 7 + 1) / 4)
    assert found["deadzone_share"] == pytest.approx(1 / 4)
    assert found["clipped_share"] == pytest.approx(1 / 5)
    assert found["clipped_error"] == pytest.approx(1 / 1.01)


def test_no_error_is_no_error():
    found = measure(torch.zeros(3, 32), torch.zeros(3, 32), MXFP4)
    assert found.pop("sqnr_db") == 200.0
    assert not any(found.values())


def test_what_is_not_finite_is_refused():
    with pytest.raises(InvalidValueError, match="two finite tensors"):
        measure(torch.tensor([torch.nan]), torch.tensor([torch.nan]), MXFP4)


def test_a_rotated_format_is_split_in_the_rotated_basis():
    fmt, x = replace(MXFP4, rotation=32), torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    rounded = fake_quantize(x, fmt)
    parts = split(x, rounded, fmt)
    total = (parts.scale_bias + parts.deadzone + parts.grid_noise).square().sum()
    assert total.item() == pytest.approx((rounded - x).double().square().sum().item(), rel=1e-4)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "fp8"])
def test_the_ideals_kept_for_the_screen_are_the_ones_measured(name):
    measured = gaussian_ideal(FORMATS[name])
    for key, kept in kept_ideal(FORMATS[name]).items():
        assert measured[key] == pytest.approx(kept, rel=1e-3, abs=1e-4), key


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_all_ideals_kept_for_the_screen_are_the_ones_measured(name):
    measured = gaussian_ideal(FORMATS[name])
    for key, kept in kept_ideal(FORMATS[name]).items():
        assert measured[key] == pytest.approx(kept, rel=1e-3, abs=1e-4), key
    if name == "mxfp4":
        for rule, kept in MXFP4_RULES_DB.items():
            assert gaussian_ideal(replace(MXFP4, scale_rule=rule))["sqnr_db"] == pytest.approx(kept, abs=0.01)


def test_a_rotation_helps_where_channels_are_outliers():
    plain, turned = (dict(errors_on(fmt)) for fmt in (MXFP4, replace(MXFP4, rotation=32)))
    assert turned["heavy_tailed"]["relative_l2"] < plain["heavy_tailed"]["relative_l2"]
    assert abs(turned["gaussian"]["sqnr_db"] - plain["gaussian"]["sqnr_db"]) < 0.1


def test_one_scale_for_a_tensor_has_the_same_ideal_as_before_it_is_rounded():
    assert gaussian_ideal(FP8)["scale_bias"] == 0
