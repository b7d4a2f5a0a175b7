"""The definition, held against published vectors and against the words of the specification in exact arithmetic."""

import json
from dataclasses import replace
from fractions import Fraction
from math import floor

import pytest
import torch

from fp4rl.numerics.quantize import fake_quantize
from fp4rl.numerics.reference import reference
from fp4rl.numerics.scales import e8m0_codes
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import BF16, E2M1, E4M3, FORMATS, FP8, MXFP4, MXFP4_2D, MXFP8, NVFP4

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLAIN = [fmt for fmt in FORMATS.values() if fmt.rounding == "nearest_even"]


def floor_log2(value: Fraction) -> int:
    """floor(log2(value)), exactly."""
    guess = value.numerator.bit_length() - value.denominator.bit_length()
    return guess if Fraction(2) ** guess <= value else guess - 1


def ceil_log2(value: Fraction) -> int:
    low = floor_log2(value)
    return low if Fraction(2) ** low == value else low + 1


RULES = {
    "floor": lambda amax: floor_log2(amax) - 2,
    "ceil": lambda amax: ceil_log2(amax) - 2,
    "rceil": lambda amax: ceil_log2(amax / 6),
    "even": lambda amax: floor_log2(amax / 7) + 1,
    "uos": lambda amax: ceil_log2(amax / Fraction(29, 4)),
}


@pytest.mark.parametrize("rule", RULES)
def test_each_scale_rule_is_its_formula_in_exact_arithmetic(rule):
    near = torch.tensor([1.0, 1.5, 1.75, 1.8125, 3.999]).repeat(5, 1)
    for i, step in enumerate((None, 0.0, torch.inf)):
        if step is not None:
            near[i] = torch.nextafter(near[0], torch.tensor(step))
    generator = torch.Generator().manual_seed(1)
    near[3:] = 1 + torch.rand((2, 5), generator=generator)
    amax = (near.flatten()[:, None] * torch.exp2(torch.arange(-126, 126, 7).float())).flatten()
    codes = e8m0_codes(amax, rule, E2M1).tolist()
    wanted = [min(254, max(0, RULES[rule](Fraction(a)) + 127)) for a in amax.tolist()]
    assert codes == wanted


def test_the_float_just_below_eight_takes_the_scale_below():
    below = torch.nextafter(torch.tensor([8.0]), torch.tensor(0.0))
    assert floor(torch.log2(below).item()) == 3  # what a logarithm in float32 says
    assert e8m0_codes(below, "floor", E2M1).item() - 127 == 0


def test_values_of_public_suites_come_out_as_printed_there(shared_data):
    vectors = json.loads((shared_data / "public_vectors.json").read_text())
    for name in ("e2m1_compressed_tensors", "e2m1_torchao"):
        given, wanted = torch.tensor(vectors[name]["in"]), torch.tensor(vectors[name]["out"])
        blocks = torch.cat((given[:, None], torch.full((len(given), 1), 4.0)), 1)  # the 4 fixes the scale at one
        made = reference(blocks, MXFP4)[:, 0]
        assert torch.equal(made, wanted)
        assert torch.equal(torch.signbit(made), torch.signbit(wanted)) or name == "e2m1_torchao"


def test_the_even_rule_rounds_powers_as_printed_in_a_public_suite(shared_data):
    vectors = json.loads((shared_data / "public_vectors.json").read_text())["round_to_power_2_compressed_tensors"]
    amax = torch.tensor(vectors["in"]).bfloat16().float().abs()
    made = torch.exp2((e8m0_codes(amax, "even", E2M1) - 127 + 2).float())
    assert torch.equal(made, torch.tensor(vectors["out"]).abs())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", PLAIN, ids=lambda f: f.name)
def test_the_result_has_the_shape_and_the_dtype_of_the_input(fmt, dtype):
    x = torch.randn(4, 40).to(dtype)
    made = fake_quantize(x, fmt)
    assert made.shape == x.shape
    assert made.dtype == dtype
    assert made.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", PLAIN, ids=lambda f: f.name)
def test_zeros_stay_zeros_and_keep_their_sign(fmt, dtype):
    x = torch.tensor([0.0, -0.0]).repeat(2, 40).to(dtype)
    made = fake_quantize(x, fmt)
    assert torch.equal(made, x)
    assert torch.equal(torch.signbit(made), torch.signbit(x))


@pytest.mark.parametrize("fmt", PLAIN, ids=lambda f: f.name)
def test_an_empty_tensor_stays_empty(fmt):
    assert fake_quantize(torch.empty(0, 32), fmt).shape == (0, 32)


@pytest.mark.parametrize("fmt", PLAIN, ids=lambda f: f.name)
def test_a_transposed_tensor_rounds_as_its_copy(fmt, equal):
    x = torch.randn(64, 48).t()
    assert equal(fake_quantize(x, fmt), fake_quantize(x.contiguous(), fmt))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("fmt", [MXFP4, MXFP8, NVFP4], ids=lambda f: f.name)
def test_one_broken_value_breaks_its_block_and_no_other(fmt, bad, equal):
    x = torch.randn(4, 96)
    whole = fake_quantize(x, fmt)
    x[1, 40] = bad
    made = fake_quantize(x, fmt)
    width = fmt.block[1]
    first = 40 // width * width
    assert made[1, first : first + width].isnan().all()
    rest = torch.ones_like(x, dtype=torch.bool)
    rest[1, first : first + width] = False
    assert made[rest].isfinite().all()
    if fmt.scale == "e8m0":
        assert torch.equal(made[rest], whole[rest])


def test_a_broken_value_breaks_its_tile():
    x = torch.randn(64, 64)
    x[40, 3] = torch.inf
    broken = fake_quantize(x, MXFP4_2D).isnan()
    assert broken[32:, :32].all()
    assert broken.sum() == 32 * 32


def test_a_broken_value_breaks_a_tensor_that_has_one_scale():
    assert fake_quantize(torch.tensor([1.0, torch.nan]), FP8).isnan().all()


def test_check_finite_names_the_tensor():
    with pytest.raises(InvalidValueError, match=r"layers\.3\.q_proj: holds NaN or infinity"):
        fake_quantize(torch.tensor([1.0, torch.inf]), MXFP4, check_finite=True, name="layers.3.q_proj")


def test_a_short_last_block_takes_its_scale_from_its_own_values():
    x = torch.cat((torch.full((32,), 100.0), torch.tensor([1.0, 0.25])))
    assert fake_quantize(x, MXFP4)[32:].tolist() == [1.0, 0.25]


def test_a_tile_spans_rows_and_columns():
    x = torch.ones(64, 64)
    x[0, 0] = 1e4
    changed = fake_quantize(x, MXFP4_2D) != 1
    assert changed[:32, :32].all()
    assert not changed[32:].any()
    assert not changed[:, 32:].any()


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1.0, 1e30])
def test_nvfp4_scales_any_tensor_into_its_range(size):
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).double()
    made = fake_quantize((x * size).float(), NVFP4).double() / size
    assert ((made - x).square().sum() / x.square().sum()).sqrt() < 0.11


def test_a_block_far_below_the_largest_becomes_zero_in_nvfp4():
    x = torch.cat((torch.full((16,), 1.0), torch.full((16,), 2e-6)))
    assert fake_quantize(x, NVFP4)[16:].tolist() == [0.0] * 16


def test_half_away_differs_from_nearest_even_on_ties_alone():
    x = torch.tensor([0.25, -0.25, 1.25, 2.5, 5.0, 0.49999997, 4.0])
    assert fake_quantize(x, replace(MXFP4, rounding="half_away")).tolist() == [0.5, -0.5, 1.5, 3.0, 6.0, 0.5, 4.0]
    assert fake_quantize(x, MXFP4).tolist() == [0.0, -0.0, 1.0, 2.0, 4.0, 0.5, 4.0]


def test_half_away_does_not_carry_the_number_just_below_a_half():
    just_below = torch.nextafter(torch.tensor(0.25), torch.tensor(0.0))  # 0.5 - 1 ulp in steps of the grid
    assert fake_quantize(torch.stack((just_below, torch.tensor(4.0))), replace(MXFP4, rounding="half_away"))[0] == 0


def test_toward_zero_never_grows_a_magnitude():
    x = torch.randn(32, 64)
    assert (fake_quantize(x, replace(MXFP4, rounding="toward_zero")).abs() <= x.abs()).all()


def test_mse_never_has_more_error_than_floor_and_at_times_less():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    errors = {
        r: (fake_quantize(x, replace(MXFP4, scale_rule=r)) - x).unflatten(-1, (-1, 32)).square().sum(-1)
        for r in ("mse", "floor", "ceil")
    }
    assert (errors["mse"] <= torch.minimum(errors["floor"], errors["ceil"]) * (1 + 1e-6)).all()
    assert (errors["mse"] < errors["floor"]).any()


def test_bfloat16_rounds_float64_once():
    between = torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=torch.float64)  # float32 would make a tie of it
    assert fake_quantize(between, BF16).item() == 1 + 2.0**-7


def test_bfloat16_overflows_as_a_cast_does():
    x = torch.tensor([3.4e38, -3.4e38, 3.3895e38, torch.inf, torch.nan], dtype=torch.float64)
    wanted = x.float().bfloat16().double()
    made = fake_quantize(x, BF16)
    assert torch.equal(made.nan_to_num(7.0), wanted.nan_to_num(7.0))


def test_the_grid_is_all_that_comes_out():
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(3))
    made = fake_quantize(x, MXFP8).unflatten(-1, (-1, 32))
    scale = torch.exp2(torch.floor(torch.log2(x.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True))) - 8)
    assert torch.isin((made / scale).abs(), torch.tensor(E4M3.grid())).all()


@pytest.mark.parametrize("wrong", [torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.complex64)])
def test_what_is_no_float_is_refused(wrong):
    with pytest.raises(InvalidValueError, match="rounds float32"):
        fake_quantize(wrong, MXFP4)


def test_out_is_written_and_may_be_the_input_itself(equal):
    x = torch.randn(50, 70)
    wanted, out = fake_quantize(x, MXFP4), torch.empty_like(x)
    assert fake_quantize(x, MXFP4, out=out) is out
    assert equal(out, wanted)
    assert fake_quantize(x, MXFP4, out=x) is x
    assert equal(x, wanted)


def test_an_out_that_overlaps_the_input_elsewhere_is_safe(equal):
    memory = torch.randn(33 * 64)
    x, out = memory[: 32 * 64].view(32, 64), memory[64:].view(32, 64)
    wanted = fake_quantize(x.clone(), MXFP4)
    assert equal(fake_quantize(x, MXFP4, out=out), wanted)


def test_an_out_of_another_shape_is_refused():
    with pytest.raises(InvalidValueError, match="out is"):
        fake_quantize(torch.zeros(4, 32), MXFP4, out=torch.zeros(4, 31))
