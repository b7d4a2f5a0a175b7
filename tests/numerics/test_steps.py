"""Scale rules with an epsilon and in a tool's arithmetic, against statements of them in fractions and plain floats."""

from bisect import bisect_left, bisect_right
from dataclasses import replace
from fractions import Fraction
from math import ceil, floor, fsum, log2
from struct import pack, unpack

import pytest
import torch

from fp4rl.numerics.packing import dequantize, quantize
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.numerics.scales import e8m0_codes
from fp4rl.numerics.steps import stepped_codes
from fp4rl.spec.deployment import deployment_named
from fp4rl.spec.formats import E2M1, MXFP4, MXFP8

EPSILON = 9.6e-7
GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
EDGES = (1.0, 1.5, 1.75, 1.8125, 1.5 * 0.5**0.5, 2**0.5)


def float32(x):
    return unpack("<f", pack("<f", x))[0]


def bfloat16(x):
    bits = unpack("<I", pack("<f", x))[0]
    return unpack("<f", pack("<I", (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000))[0]


ROUNDERS = {"float32": float32, "bfloat16": bfloat16}


def floor_log2(value):
    guess = value.numerator.bit_length() - value.denominator.bit_length()
    return guess if Fraction(2) ** guess <= value else guess - 1


def ceil_log2(value):
    low = floor_log2(value)
    return low if Fraction(2) ** low == value else low + 1


# What a rule divides amax by, how it makes the logarithm whole, and what it takes off.
RULES = {
    "floor": (1, floor, floor_log2, 2),
    "ceil": (1, ceil, ceil_log2, 2),
    "rceil": (6, ceil, ceil_log2, 0),
    "even": (0.875, floor, floor_log2, 2),
    "uos": (7.25, ceil, ceil_log2, 0),
    "round": (6, round, lambda y: floor_log2(2 * y * y) // 2, 0),  # floor(log2 y + 1/2)
}


def maxima(dtype):
    """Values beside every edge, at the exponents of weights and at both ends, and any others."""
    near = torch.tensor(EDGES).to(dtype)
    bits = near.view(torch.int32 if dtype == torch.float32 else torch.int16)
    beside = torch.cat([(bits + step).view(dtype) for step in range(-3, 4)])
    exponents = torch.tensor([*range(-30, 12), -100, -60, 40, 90]).double()
    spread = (1 + torch.rand(300, generator=torch.Generator().manual_seed(0))).double()
    spread *= torch.exp2(torch.linspace(-30, 12, 300).round().double())
    return torch.cat(((beside.double() * torch.exp2(exponents)[:, None]).flatten(), spread)).to(dtype)


@pytest.mark.parametrize("epsilon", [0.0, EPSILON, 0.25])
@pytest.mark.parametrize("rule", RULES)
def test_each_rule_with_an_epsilon_is_its_formula_in_exact_arithmetic(rule, epsilon):
    by, _, whole, less = RULES[rule]
    fmt, amax = replace(MXFP4, scale_rule=rule, scale_epsilon=epsilon), maxima(torch.float32)
    amax = amax[(amax > 2.0**-32) & (amax < 2.0**20)]  # float64 holds the sum with the epsilon
    wanted = [whole(Fraction(a) / Fraction(by) + Fraction(epsilon)) - less + 127 for a in amax.tolist()]
    assert stepped_codes(amax, fmt, torch.float32).tolist() == [min(254, max(0, code)) for code in wanted]
    assert stepped_codes(amax.double(), fmt, torch.float64).tolist() == [min(254, max(0, code)) for code in wanted]


@pytest.mark.parametrize("epsilon", [0.0, EPSILON])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_each_rule_in_a_dtype_rounds_every_step_to_it(rule, dtype, epsilon):
    by, whole, _, less = RULES[rule]
    rounded = ROUNDERS[str(dtype).removeprefix("torch.")]
    fmt, amax = replace(MXFP4, scale_rule=rule, scale_epsilon=epsilon, scale_math="tensor"), maxima(dtype)
    logs = [rounded(log2(rounded(rounded(a / by) + rounded(epsilon)))) for a in amax.tolist()]
    wanted = [min(254, max(0, whole(log) - less + 127)) for log in logs]
    assert stepped_codes(amax.float(), fmt, dtype).tolist() == wanted
    exact = replace(fmt, scale_math="exact")
    assert stepped_codes(amax.float(), exact, dtype).tolist() != wanted


@pytest.mark.parametrize("rule", [*RULES, "six", "four"])
def test_no_half_binade_of_bfloat16_has_two_steps(rule):
    """Every bfloat16, since its coarse logarithms step most unevenly; two steps in one half would not fit the table."""
    amax = torch.arange(0x0080, 0x7F00, dtype=torch.int16).view(torch.bfloat16)
    largest = {"six": 6.0, "four": 4.0}.get(rule)
    fmt = replace(MXFP4, scale_rule="fouroversix" if largest else rule, scale_math="tensor")
    if largest:
        logs = [bfloat16(log2(bfloat16(a / largest))) for a in amax.tolist()]
        wanted = [min(254, max(0, nearest(log, bfloat16) + 127)) for log in logs]
    else:
        by, whole, _, less = RULES[rule]
        wanted = [min(254, max(0, whole(bfloat16(log2(bfloat16(a / by)))) - less + 127)) for a in amax.tolist()]
    assert stepped_codes(amax.float(), fmt, torch.bfloat16, largest).tolist() == wanted


def test_a_block_of_zeros_takes_the_scale_of_the_epsilon():
    fmt = replace(MXFP4, scale_rule="even", scale_epsilon=EPSILON)
    stored = quantize(torch.zeros(1, 32), fmt)  # floor(log2 9.6e-7) - 2 = -22
    assert stored.scales.tolist() == [[105]]
    assert not stored.codes.any()
    assert quantize(torch.zeros(1, 32), replace(MXFP4, scale_rule="fouroversix")).scales.tolist() == [[127]]


@pytest.mark.parametrize("rule", RULES)
def test_no_scale_is_below_the_least_exponent_that_is_set_and_the_others_stay(rule):
    plain = replace(MXFP4, scale_rule=rule, scale_math="float32")
    amax = maxima(torch.float32)
    for dtype in (torch.float32, torch.float64):
        for least in (-127, -30, 0):
            wanted = stepped_codes(amax.to(dtype), plain, dtype).clamp(min=least + 127)
            fmt = replace(plain, scale_min_exponent=least)
            assert torch.equal(stepped_codes(amax.to(dtype), fmt, dtype), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_amct_rounds_as_its_source_states(dtype):
    """2^round(log2(max(amax / 6, 2^-30))) in float32, halves away from zero: small blocks and blocks of zeros too."""
    sizes = torch.exp2(torch.arange(-45.0, 10.0).repeat_interleave(20))
    x = torch.randn(len(sizes), 32, generator=torch.Generator().manual_seed(0)) * sizes[:, None]
    x[::20], x[1::20, 0] = 0.0, -(2.0**-28)
    x = x.to(dtype)
    stored = quantize(x, deployment_named("amct").at("weight", MXFP4))
    for block, code, made in zip(
        x.tolist(), stored.scales.flatten().tolist(), dequantize(stored).tolist(), strict=True
    ):
        exponent = round(float32(log2(max(float32(max(map(abs, block)) / 6), 2.0**-30))))
        assert code == exponent + 127
        away = (GRID[bisect_right(TIES, abs(value) / 2.0**exponent)] * 2.0**exponent for value in block)
        assert [abs(value) for value in made] == list(away)
    assert (stored.scales == 97).sum() > 200
    plain = replace(MXFP4, scale_rule="round", scale_math="float32", rounding="half_away")
    assert (fake_quantize(x, plain) != dequantize(stored)).sum() > 1000


def test_the_dtype_of_the_tensor_is_that_of_its_arithmetic():
    fmt = replace(MXFP4, scale_rule="even", scale_math="tensor")
    amax = torch.tensor([[2.0**-9 * 0.875 * 255 / 256]])  # its log2 rounds to -9 in bfloat16
    assert quantize(amax.bfloat16(), fmt).scales.item() == quantize(amax, fmt).scales.item() + 1
    assert (
        quantize(amax.bfloat16(), replace(fmt, scale_math="float32")).scales.item() == quantize(amax, fmt).scales.item()
    )


def nearest(log, rounded):
    """msModelSlim's nearest power: within a millionth of a half the odd one."""
    whole = floor(log)
    fraction = rounded(log - whole)
    tie = abs(fraction - rounded(0.5)) <= rounded(1e-6)
    return whole + (fraction > rounded(0.5 + 1e-6) or (tie and whole % 2 == 0))


def on_grid(step):
    """The nearest of GRID, ties to the even code."""
    at = bisect_left(GRID, step)
    if at in (0, len(GRID)):
        return GRID[min(at, len(GRID) - 1)]
    below, above = GRID[at - 1], GRID[at]
    middle = (below + above) / 2
    return above if step > middle or (step == middle and at % 2 == 0) else below


def four_over_six(block, rounded):
    """(scale's exponent, values) by msModelSlim's statement, every step rounded."""
    least = None
    for largest in (6.0, 4.0):
        exponent = nearest(rounded(log2(rounded(max(map(abs, block)) / largest))), rounded)
        made = [on_grid(abs(x) * 2.0**-exponent) * 2.0**exponent for x in block]
        squares = [rounded(rounded(abs(x) - y) ** 2) for x, y in zip(block, made, strict=True)]
        error = rounded(fsum(squares))
        if least is None or error < least[0]:
            least = error, exponent, [y if x > 0 else -y for x, y in zip(block, made, strict=True)]
    return least[1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_four_over_six_takes_the_scale_of_less_error_as_stated(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 32, generator=generator) * torch.exp2(
        torch.randint(-20, 4, (400, 1), generator=generator).float()
    )
    x[:, 0] = x.abs().amax(-1) * torch.exp2(torch.rand(400, generator=generator))
    edges = maxima(dtype)[: 7 * 6 * 40].view(-1, 1)[::7]
    x = torch.cat((x, torch.rand(len(edges), 32, generator=generator) * edges)).to(dtype)
    x[400:, 0] = edges[:, 0].to(dtype)
    rounded, fmt = (
        ROUNDERS[str(dtype).removeprefix("torch.")],
        replace(MXFP4, scale_rule="fouroversix", scale_math="tensor"),
    )
    wanted = [four_over_six(block, rounded) for block in x.tolist()]
    assert quantize(x, fmt).scales.flatten().tolist() == [exponent + 127 for exponent, _ in wanted]
    assert torch.equal(fake_quantize(x, fmt), torch.tensor([values for _, values in wanted]).to(dtype))
    chosen = {
        exponent - nearest(rounded(log2(rounded(max(map(abs, block)) / 6))), rounded)
        for (exponent, _), block in zip(wanted, x.tolist(), strict=True)
    }
    assert chosen == {0, 1}


def test_exact_four_over_six_never_has_more_error_than_either_scale():
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    made = fake_quantize(x, replace(MXFP4, scale_rule="fouroversix"))
    least = None
    for largest in (6, 4):
        scale = torch.exp2((x.abs().amax(-1, keepdim=True).double() / largest).log2().round())
        grid = torch.tensor(GRID).double()
        near = grid[((x.double().abs() / scale)[..., None] - grid).abs().argmin(-1)] * scale
        error = (near - x.abs()).square().sum(-1)
        least = error if least is None else torch.minimum(least, error)
    assert torch.allclose((made.double() - x).square().sum(-1), least, rtol=1e-9)


@pytest.mark.parametrize(
    ("rounding", "towards"),
    [("half_away", bisect_right), ("half_added", bisect_right), ("half_toward_zero", bisect_left)],
)
def test_ties_go_where_the_rounding_says_and_all_else_to_the_nearest(rounding, towards):
    near = torch.tensor(TIES)
    steps = torch.cat((near, near - 2.0**-20, near + 2.0**-20, torch.rand(1000) * 7.9))
    x = torch.stack((steps, torch.full_like(steps, 4.0)), -1)  # the 4 makes the scale one
    keep = steps < 4
    made = fake_quantize(x, replace(MXFP4, rounding=rounding, scale_rule="floor"))[:, 0]
    wanted = torch.tensor([GRID[towards(TIES, step)] for step in steps.tolist()])
    assert torch.equal(made[keep], wanted[keep])


def test_half_added_carries_the_number_just_below_a_half_and_no_other():
    below = torch.nextafter(torch.tensor([0.25, 0.75, 1.25, 2.5]), torch.tensor(0.0))
    x = torch.cat((below, torch.tensor([4.0]))).view(1, -1)
    assert fake_quantize(x, replace(MXFP4, rounding="half_added")).tolist() == [[0.5, 0.5, 1.0, 2.0, 4.0]]
    assert fake_quantize(x, replace(MXFP4, rounding="half_away")).tolist() == [[0.0, 0.5, 1.0, 2.0, 4.0]]


def test_a_wider_element_has_rules_in_a_dtype_too():
    """msModelSlim's MXFP8: floor(log2 amax) - 8 in the tensor's dtype."""
    amax = maxima(torch.bfloat16)
    wanted = [min(254, max(0, floor(bfloat16(log2(a))) - 8 + 127)) for a in amax.tolist()]
    assert stepped_codes(amax.float(), replace(MXFP8, scale_math="tensor"), torch.bfloat16).tolist() == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", ["floor", "ceil", "rceil", "even", "uos"])
def test_a_table_of_an_exact_rule_says_what_its_carry_says(rule, dtype):
    amax = torch.cat((maxima(torch.float32), torch.rand(10_000) * 100)).to(dtype)
    assert torch.equal(stepped_codes(amax, replace(MXFP4, scale_rule=rule), dtype), e8m0_codes(amax, rule, E2M1))


@pytest.mark.filterwarnings("ignore")  # Dynamo warns about its own internals
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_graph_with_two_rules_of_tools_gives_the_same_bits(backend):
    torch._dynamo.reset()
    minmax = replace(MXFP4, scale_rule="even", scale_epsilon=EPSILON, scale_math="tensor", rounding="half_added")
    chosen = replace(MXFP4, scale_rule="fouroversix", scale_math="tensor", rounding="half_toward_zero")

    def both(x):
        return fake_quantize(x, minmax), fake_quantize(x, chosen), fake_quantize(x.flip(0), minmax)

    for dtype in (torch.float32, torch.bfloat16):
        x = (torch.randn(8, 96, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
        made = torch.compile(both, backend=backend, fullgraph=True)(x)
        assert all(torch.equal(a, b) for a, b in zip(made, both(x), strict=True))
    torch._dynamo.reset()
