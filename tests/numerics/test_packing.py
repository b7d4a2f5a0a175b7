"""Packed codes give back fake quantization bit for bit, in the layout that checkpoints have."""

from dataclasses import replace

import pytest
import torch

from fp4rl.numerics import native_build
from fp4rl.numerics.packing import decode, dequantize, encode, pack, pack_tensor, quantize, unpack
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import BF16, E2M1, E2M3, E3M2, E4M3, E5M2, FORMATS, FP8, MXFP4, MXFP8, NVFP4, Coarse

RULES = ("floor", "ceil", "rceil", "even", "even_e2m1", "uos", "round", "mse", "fouroversix")
WAYS = ("half_away", "half_added", "half_toward_zero", "toward_zero", "stochastic")
FOUR_BITS = [
    *(replace(MXFP4, scale_rule=rule) for rule in RULES),
    *(fmt for fmt in FORMATS.values() if fmt.element.bits == 4),
    *(replace(fmt, rounding=way) for fmt in (MXFP4, NVFP4) for way in WAYS),
    *(replace(MXFP4, scale_rule=rule, scale_epsilon=9.6e-7, scale_math="tensor") for rule in ("even", "uos")),
    *(replace(MXFP4, scale_rule="fouroversix", scale_math=math) for math in ("tensor", "float32")),
    replace(MXFP4, scale_rule="round", scale_math="float32", rounding="half_away", scale_min_exponent=-30),
    replace(
        FORMATS["mxfp4_dual"], scale_rule="even", scale_epsilon=9.6e-7, scale_math="float32", rounding="half_added"
    ),
    replace(MXFP4, rotation=32),
    replace(MXFP4, coarse=Coarse(128, "search")),
]
# Forced: `auto` takes the C kernels only where a machine has built them already.
BY = [
    pytest.param("native", marks=pytest.mark.skipif(not native_build.compiler(), reason="no C compiler")),
    "reference",
]
WIDER = [fmt for fmt in FORMATS.values() if fmt.element.bits in (6, 8)]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def finite(edges, dtype, fmt):
    """The edge tensors that have codes; a rotation of values near the largest float leaves the range of floats."""
    for x in edges(dtype):
        if x.isfinite().all() and (not fmt.rotation or x.abs().max() < 1e30):
            yield x


@pytest.mark.parametrize("name", BY)
@pytest.mark.parametrize("fmt", FOUR_BITS, ids=lambda f: f"{f.name}-{f.scale_rule}-{f.scale_math}-{f.rounding}")
def test_pack_unpack_dequantize_is_fake_quantization(fmt, name, edges, equal, backend):
    backend(name)
    searching = fmt.coarse is not None and fmt.coarse.choice == "search"  # takes a hundred times as long
    for dtype in (torch.bfloat16,) if searching else (torch.float32, torch.bfloat16, torch.float16):
        for x in finite(edges, dtype, fmt):
            wanted = fake_quantize(x, fmt, generator=generator())
            stored = quantize(x, fmt, generator=generator())
            packed = pack_tensor(x, fmt, generator=generator())
            assert equal(dequantize(stored), wanted)
            assert equal(dequantize(unpack(pack(stored))), wanted)
            assert equal(dequantize(packed), wanted)
            assert torch.equal(packed.data, pack(stored).data)
            assert torch.equal(packed.scales.view(torch.uint8), stored.scales.view(torch.uint8))


@pytest.mark.parametrize("name", BY)
def test_values_are_written_where_they_are_wanted(name, equal, backend):
    backend(name)
    x = torch.randn(6, 45)
    packed, wide = pack_tensor(x, MXFP4), torch.full((6, 90), 7.0)
    for out in (torch.full_like(x, 7.0), wide[:, ::2]):
        assert dequantize(packed, out=out) is out
        assert equal(out.contiguous(), fake_quantize(x, MXFP4))
    assert (wide[:, 1::2] == 7).all()
    with pytest.raises(InvalidValueError, match="out is"):
        dequantize(packed, out=x[:, 1:])
    with pytest.raises(InvalidValueError, match="out is"):
        dequantize(quantize(x, MXFP4), out=x.bfloat16())


@pytest.mark.parametrize("shape", [(0,), (0, 40), (3, 0), (2, 0, 32), (2, 70, 0)])
@pytest.mark.parametrize("fmt", [MXFP4, NVFP4, FORMATS["mxfp4_2d"], FORMATS["mxfp4_dual"]], ids=lambda f: f.name)
@pytest.mark.parametrize("name", BY)
def test_a_tensor_without_elements_has_no_codes_and_comes_back(fmt, shape, name, backend):
    """Tensors without elements: every way into codes and out of them. Right: what `numel` 0 leaves, by hand."""
    backend(name)
    x = torch.empty(shape, dtype=torch.bfloat16)
    packed, stored = pack_tensor(x, fmt), quantize(x, fmt)
    assert packed.data.shape == (*shape[:-1], -(-shape[-1] // 2))
    height, width = fmt.block
    rows = (-(-shape[-2] // height),) if len(shape) > 1 else (1,) if height > 1 else ()
    assert packed.scales.shape == (*shape[:-2], *rows, -(-shape[-1] // width))
    for way in (packed, stored, unpack(packed)):
        assert dequantize(way).shape == x.shape
        assert dequantize(way).dtype == x.dtype
        assert dequantize(way, out=x) is x


@pytest.mark.parametrize("fmt", WIDER, ids=lambda f: f.name)
def test_codes_of_wider_elements_give_the_values_back(fmt, edges, equal):
    for dtype in (torch.float32, torch.bfloat16):
        for x in finite(edges, dtype, fmt):
            assert equal(dequantize(quantize(x, fmt)), fake_quantize(x, fmt))


def test_the_low_nibble_is_the_even_column():
    packed = pack_tensor(torch.tensor([[0.5, -6.0] + [4.0] * 30]), MXFP4)
    assert packed.data[0, 0].item() == 0b1111_0001
    assert packed.scales.tolist() == [[127]]


def test_an_e8m0_byte_is_the_exponent_plus_127_and_never_255():
    x = torch.tensor([4.0, 8.0, 2.0**-140, 3e38]).repeat_interleave(32)
    assert quantize(x, MXFP4).scales.tolist() == [127, 128, 0, 252]
    assert quantize(torch.zeros(64), MXFP4).scales.tolist() == [0, 0]


def test_minus_zero_has_a_code_of_its_own():
    assert quantize(torch.tensor([-0.0, 0.0, -0.1, 4.0]), MXFP4).codes.tolist() == [8, 0, 8, 6]


@pytest.mark.parametrize("fmt", [MXFP4, NVFP4], ids=lambda f: f.name)
@pytest.mark.parametrize("name", BY)
def test_a_block_of_nan_cannot_be_packed(fmt, name, backend):
    backend(name)
    x = torch.randn(4, 64)
    x[2, 5] = torch.inf
    for attempt in (quantize, pack_tensor):
        with pytest.raises(InvalidValueError, match=r"up_proj: holds NaN or infinity"):
            attempt(x, fmt, name="up_proj")


def test_a_short_last_block_and_an_odd_row_are_told():
    packed = pack_tensor(torch.randn(3, 45), MXFP4)
    assert packed.data.shape == (3, 23)
    assert packed.scales.shape == (3, 2)
    assert packed.columns == 45


@pytest.mark.parametrize(("fmt", "bits"), [(MXFP4, 4.25), (NVFP4, 4.5)], ids=["mxfp4", "nvfp4"])
def test_the_bits_stored_are_the_bits_promised(fmt, bits):
    packed = pack_tensor(torch.randn(256, 4096), fmt)
    parts = [part for part in (packed.data, packed.scales, packed.factor) if part is not None]
    stored = sum(8 * part.numel() * part.element_size() for part in parts)
    assert stored / (256 * 4096) == pytest.approx(bits, abs=1e-4)


def test_nvfp4_keeps_e4m3_scales_under_a_multiplier():
    x = torch.cat((torch.full((16,), 3.0), torch.full((16,), 1.5)))
    stored = quantize(x, NVFP4)
    assert stored.scales.dtype == torch.float8_e4m3fn
    assert stored.scales.float().tolist() == [448.0, 224.0]
    assert stored.factor == torch.tensor(3.0).reciprocal() * 2688


def test_tiles_have_one_scale_each():
    stored = quantize(torch.randn(2, 70, 40), FORMATS["mxfp4_2d"])
    assert stored.scales.shape == (2, 3, 2)


@pytest.mark.parametrize("element", [E2M1, E2M3, E3M2, E4M3, E5M2], ids=lambda e: e.name)
def test_every_grid_value_has_its_position_as_code(element):
    values = torch.tensor(element.grid())
    codes = torch.arange(len(values))
    assert torch.equal(encode(values, element).long(), codes)
    assert torch.equal(encode(-values, element).long(), codes + (1 << (element.bits - 1)))
    assert torch.equal(decode(codes.to(torch.uint8), element, torch.float32), values)


@pytest.mark.parametrize(
    ("element", "dtype"), [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)], ids=["E4M3", "E5M2"]
)
def test_eight_bit_codes_are_torchs_own_bytes(element, dtype):
    values = torch.tensor(element.grid())
    assert torch.equal(encode(values, element), values.to(dtype).view(torch.uint8))


def test_what_does_not_pack_says_why():
    with pytest.raises(InvalidValueError, match="only 4-bit codes pack"):
        pack(quantize(torch.randn(32), MXFP8))
    with pytest.raises(InvalidValueError, match="no codes"):
        quantize(torch.randn(32), BF16)
    with pytest.raises(InvalidValueError, match="at least one axis"):
        quantize(torch.tensor(1.0), FP8)
