"""The FP32 number of NVFP4 and FP8: one for the tensor, one for each row of the last axis, or one seen before."""

from dataclasses import replace

import pytest
import torch

from fp4rl.numerics.errors import measure
from fp4rl.numerics.levels import within_reach
from fp4rl.numerics.packing import dequantize, pack_tensor, quantize
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import FP8, MXFP4, NVFP4, Format, describe, format_of

SHAPES = ((1, 64), (7, 48), (2, 5, 40), (33,), (2, 3, 4, 17))


def per_token(fmt: Format) -> Format:
    return replace(fmt, factor="per_token")


def static(fmt: Format, seen: float) -> Format:
    return replace(fmt, factor="static", calibrated=seen)


def tokens(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows whose sizes lie five orders of magnitude apart."""
    generator = torch.Generator().manual_seed(sum(shape))
    size = torch.exp2(torch.randint(-9, 9, (*shape[:-1], 1), generator=generator).float())
    return (torch.randn(shape, generator=generator) * size).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("fmt", [NVFP4, FP8], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_token_is_rounded_as_if_it_were_alone(shape, fmt, dtype):
    """The definition: a row under per_token is what the one factor of a tensor makes of that row by itself."""
    x = tokens(shape, dtype)
    wanted = torch.stack([fake_quantize(row, fmt) for row in x.view(-1, shape[-1])]).view(shape)
    assert torch.equal(fake_quantize(x, per_token(fmt)), wanted)
    if x.numel() > shape[-1]:
        assert not torch.equal(fake_quantize(x, fmt), wanted)


def test_compressed_tensors_gives_these_values_row_by_row(peer):
    """Their static per-tensor quantizer, asked for each token alone: factor, block scales and values are theirs."""
    helpers = peer("compressed_tensors.quantization.utils.helpers")
    forward = peer("compressed_tensors.quantization.lifecycle.forward")
    args = peer("compressed_tensors.quantization.quant_scheme").preset_name_to_scheme("NVFP4", ["Linear"])
    inputs = args.input_activations
    x = tokens((40, 256))
    for row, mine in zip(x, fake_quantize(x, per_token(NVFP4)), strict=True):
        factor = helpers.generate_gparam(row.min(), row.max())
        blocks = row.view(-1, 16)
        scale, zero = helpers.calculate_qparams(
            blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True), inputs, global_scale=factor
        )
        theirs = forward.fake_quantize(row[None], scale.view(1, -1), zero.view(1, -1), inputs, global_scale=factor)
        assert torch.equal(theirs[0], mine)


@pytest.mark.parametrize("fmt", [NVFP4, FP8], ids=lambda fmt: fmt.name)
def test_a_seen_magnitude_takes_the_place_of_the_tensors_own(fmt):
    x = tokens((6, 64))
    assert torch.equal(fake_quantize(x, static(fmt, x.abs().max().item())), fake_quantize(x, fmt))


def test_what_is_larger_than_a_seen_magnitude_is_clipped_in_fp8_and_counted():
    x = torch.tensor([[0.5, -3.0, 2.0, 1.0], [4.0, -8.0, 0.25, 0.0]])
    fmt = static(FP8, 2.0)
    wanted = torch.tensor([[0.5, -2.0, 2.0, 1.0], [2.0, -2.0, 0.25, 0.0]])
    assert torch.equal(fake_quantize(x, fmt), wanted)
    assert torch.equal(within_reach(x, fmt), x.abs() <= 2.0)
    assert measure(x, fake_quantize(x, fmt), fmt)["clipped_share"] == pytest.approx(3 / 8)


def test_a_block_beyond_a_seen_magnitude_saturates_at_448_times_six():
    """By hand: seen 2688 makes the factor one, block scales end at 448, so values at 2688."""
    x = torch.cat((torch.full((16,), 10000.0), torch.full((16,), 6.0), torch.full((16,), 2.5))).view(1, 48)
    wanted = torch.cat((torch.full((16,), 2688.0), torch.full((16,), 6.0), torch.full((16,), 2.5)))
    made = fake_quantize(x, static(NVFP4, 2688.0))[0]
    assert torch.equal(made[:32], wanted[:32])
    assert torch.allclose(made[32:], wanted[32:], rtol=2**-4)


@pytest.mark.parametrize("fmt", [per_token(NVFP4), per_token(FP8), static(NVFP4, 3.0), static(FP8, 3.0)], ids=str)
def test_a_broken_token_leaves_the_others_alone(fmt):
    x = tokens((4, 64))
    whole = fake_quantize(x, fmt)
    x[1, 3] = torch.nan
    broken = fake_quantize(x, fmt)
    assert broken[1].isnan().any()
    assert torch.equal(broken[[0, 2, 3]], whole[[0, 2, 3]])


def test_a_static_factor_is_stored_and_one_for_each_token_cannot_be():
    x = tokens((8, 64))
    fmt = static(NVFP4, 5.0)
    for packed in (quantize(x, fmt), pack_tensor(x, fmt)):
        assert packed.factor is not None
        assert packed.factor.item() == pytest.approx(2688 / 5)
        assert torch.equal(dequantize(packed), fake_quantize(x, fmt))
    with pytest.raises(InvalidValueError, match="no layout stores a factor for each token"):
        quantize(x, per_token(NVFP4))


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ({"name": "mxfp4", "factor": "per_token"}, "scales in e4m3 or fp32"),
        ({"name": "nvfp4", "factor": "per_token", "block": [16, 16]}, "span no two rows"),
        ({"name": "fp8", "factor": "fused"}, "scales in e4m3 that"),
        ({"name": "nvfp4", "factor": "row"}, "factor 'row' is unknown"),
        ({"name": "nvfp4", "factor": "static"}, "fp4rl scan MODEL --calibrate FILE"),
        ({"name": "nvfp4", "calibrated": 2.0}, "goes with"),
        ({"name": "nvfp4", "factor": "static", "calibrated": 0}, "above 0"),
    ],
)
def test_a_factor_that_means_nothing_is_refused(described, said):
    with pytest.raises(InvalidValueError, match=said):
        format_of(described)


@pytest.mark.parametrize("fmt", [NVFP4, per_token(NVFP4), static(FP8, 0.1), static(NVFP4, 1e-7)], ids=str)
def test_a_description_reads_back_and_an_older_one_means_one_factor_for_the_tensor(fmt):
    assert format_of(describe(fmt)) == fmt
    assert format_of("nvfp4").factor == format_of("fp8").factor == "tensor"
    assert describe(MXFP4) == "mxfp4"
