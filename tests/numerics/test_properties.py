"""What every format keeps, whatever the data: hypothesis looks for a counter-example."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4rl.numerics import native_build
from fp4rl.numerics.packing import dequantize, pack_tensor
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.spec.formats import FORMATS, FP8, MXFP4, MXFP4_2D, MXFP8, NVFP4, Format

RULES = ("floor", "ceil", "rceil", "even", "uos", "round", "mse", "fouroversix")
NEAREST = [fmt for fmt in FORMATS.values() if fmt.rounding == "nearest_even"]
SINGLE = [fmt for fmt in NEAREST if fmt.coarse is None]
POWERS = [*(replace(MXFP4, scale_rule=rule) for rule in RULES), MXFP4_2D, MXFP8]
STOCHASTIC = [*(replace(fmt, rounding="stochastic") for fmt in (NVFP4, MXFP8, FP8)), FORMATS["mxfp4_sr"]]
SIZES = (1.0, 0.02, 0.005)

formats = st.sampled_from
shapes = st.tuples(st.integers(1, 40), st.integers(1, 80))


@st.composite
def tensors(draw: st.DrawFn, low: int = -100, high: int = 100) -> torch.Tensor:
    """A matrix of any small shape whose values span many binades, with zeros among them."""
    rows, columns = draw(shapes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = draw(st.integers(0, 12))
    exponent = torch.randint(-spread, spread + 1, (rows, columns), generator=generator).float()
    x = torch.randn((rows, columns), generator=generator) * torch.exp2(exponent + draw(st.integers(low, high)))
    return torch.where(torch.rand((rows, columns), generator=generator) < draw(st.sampled_from((0.0, 0.2))), 0.0, x)


@settings(max_examples=60)
@given(x=tensors(-60, 60), fmt=formats([f for f in SINGLE if f.scale != "e4m3"] + POWERS))
def test_rounding_twice_is_rounding_once(x: torch.Tensor, fmt: Format):
    once = fake_quantize(x, fmt)
    if fmt.scale_rule in ("floor", "rceil", "mse") or fmt.scale != "e8m0":
        assert torch.equal(fake_quantize(once, fmt), once)
    else:  # a maximum that rounds up may name a larger scale the second time; the third changes nothing more
        twice = fake_quantize(once, fmt)
        assert torch.equal(fake_quantize(twice, fmt), twice)


@settings(max_examples=40)
@given(x=tensors(), fmt=formats(NEAREST + POWERS))
def test_rounding_is_odd(x: torch.Tensor, fmt: Format):
    assert torch.equal(fake_quantize(-x, fmt), -fake_quantize(x, fmt))


@settings(max_examples=40)
@given(x=tensors(-40, 40), fmt=formats([*POWERS, NVFP4, FP8]), shift=st.integers(-30, 30))
def test_rounding_follows_powers_of_two(x: torch.Tensor, fmt: Format, shift: int):
    scaled = fake_quantize(x * 2.0**shift, fmt)
    assert torch.equal(scaled, fake_quantize(x, fmt) * 2.0**shift)


@settings(max_examples=40)
@given(x=tensors(-60, 60), fmt=formats([f for f in POWERS if f.block[0] == 1]))
def test_every_value_lies_on_the_grid_of_its_block(x: torch.Tensor, fmt: Format):
    made = torch.nn.functional.pad(fake_quantize(x, fmt), (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32)).double()
    largest = made.abs().amax(-1, keepdim=True)
    grid = torch.tensor(fmt.element.grid(), dtype=torch.float64)
    fits = torch.zeros_like(largest, dtype=torch.bool)
    for exponent in range(-4, 16):  # some power of two puts the whole block on the grid
        scale = torch.exp2(torch.floor(torch.log2(largest.clamp(min=1e-300))) - exponent)
        fits |= torch.isin((made / scale).abs(), grid).all(-1, keepdim=True)
    assert (fits | (largest == 0)).all()


@settings(max_examples=40)
@given(x=tensors(-60, 60), fmt=formats(POWERS[:6]), rows=st.permutations(range(4)))
def test_blocks_do_not_know_of_each_other(x: torch.Tensor, fmt: Format, rows: list[int]):
    order = torch.tensor([r % len(x) for r in rows])
    assert torch.equal(fake_quantize(x[order], fmt), fake_quantize(x, fmt)[order])


@settings(max_examples=6)
@given(seed=st.integers(0, 2**31), fmt=formats([MXFP4, NVFP4, FP8]))
def test_the_error_does_not_know_the_size_of_the_data(seed: int, fmt: Format):
    x = torch.randn(384, 384, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()
    decibels = []
    for size in SIZES:
        made = fake_quantize(x * size, fmt).double() - (x * size).double()
        decibels.append(10 * torch.log10((x * size).double().square().sum() / made.square().sum()).item())
    assert max(decibels) - min(decibels) < 0.15


@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**31),
    fmt=formats([replace(f, rounding="stochastic") for f in (NVFP4, MXFP8, FP8)] + [FORMATS["mxfp4_sr"]]),
)
def test_stochastic_rounding_is_unbiased(seed: int, fmt: Format):
    draws, generator = 4000, torch.Generator().manual_seed(seed)
    x = 5.9 * (2 * torch.rand(32, generator=generator) - 1)
    x[::16] = 6.0  # what every format's scale holds exactly: a value beyond it would be clipped, not rounded
    fresh_seeds = torch.stack([fake_quantize(x, fmt, generator=generator) for _ in range(200)]).double()
    fresh_counters = fake_quantize(x.repeat(draws, 1), fmt, generator=generator).double()
    for sample in (fresh_seeds, fresh_counters):
        total = sample.sum(-1)
        assert (total.mean() - x.double().sum()).abs() <= 4 * total.std() / len(sample) ** 0.5 + 1e-5
    each = 6 * fresh_counters.std(0) / draws**0.5  # one of 32 values lies beyond 4 by luck now and then
    rare = 2 * 8 / draws  # a value this near the grid may never have moved
    assert ((fresh_counters.mean(0) - x.double()).abs() <= each + rare).all()


LARGEST = [
    pytest.param(torch.float32, 3.5 * 2.0**126, id="float32"),  # between 3 and 4 scales of 2^126; 4 of them are 2^128
    pytest.param(torch.bfloat16, 3.5 * 2.0**126, id="bfloat16"),
    pytest.param(torch.float16, 57344.0, id="float16"),  # 3.5 scales of 2^14; 4 of them are 65536
]


@pytest.mark.parametrize(("dtype", "value"), LARGEST)
@pytest.mark.parametrize("name", ["reference", "chunked", "native"])
def test_stochastic_rounding_is_right_on_average_at_the_largest_values_too(name, dtype, value, backend):
    """A finite value that stochastic rounding carries beyond its dtype: infinity has no average. By hand: half of the
    draws give 3 scales, half the largest finite number, which stands for 4."""
    if name == "native" and native_build.compiler() is None:
        pytest.skip("no C compiler here")
    backend(name)
    fmt = FORMATS["mxfp4_sr"]
    x = torch.full((200, 64), value, dtype=dtype)
    x[:, ::2] = -value
    made = fake_quantize(x, fmt, generator=torch.Generator().manual_seed(0))
    assert set(made.abs().double().unique().tolist()) == {value / 3.5 * 3, torch.finfo(dtype).max}
    assert (made / x).double().mean().item() == pytest.approx(1.0, abs=0.01)
    packed = pack_tensor(x, fmt, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dequantize(packed), made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("fmt", STOCHASTIC, ids=lambda fmt: fmt.name)
def test_no_stochastic_format_makes_an_infinity_of_a_finite_number(fmt, dtype):
    """As above, for every format that draws, at the very largest number; what is infinite becomes NaN as ever."""
    x = torch.full((4, 64), torch.finfo(dtype).max, dtype=dtype)
    assert fake_quantize(x, fmt, generator=torch.Generator().manual_seed(0)).isfinite().all()
    x[3, 40] = torch.inf
    assert fake_quantize(x, fmt, generator=torch.Generator().manual_seed(0))[3, 40].isnan()


def test_stochastic_rounding_over_the_floor_scale_is_biased_as_the_docs_say():
    fmt = replace(MXFP4, rounding="stochastic")
    x = torch.rand(4096, 32, generator=torch.Generator().manual_seed(0)) * 7.99
    x[:, 0] = 7.9  # clipped to 6 under the floor rule
    made = fake_quantize(x, fmt, generator=torch.Generator().manual_seed(1))
    assert (made.sum() / x.sum()).item() < 0.97
