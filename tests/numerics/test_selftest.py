"""The self-test passes on the real quantizer and catches every fault that was once made."""

from dataclasses import replace

import pytest
import torch

from fp4rl.numerics.quantize import fake_quantize
from fp4rl.numerics.selftest import require_sound, self_test
from fp4rl.spec.errors import CheckFailed
from fp4rl.spec.formats import FP8, MXFP4, MXFP4_2D, MXFP4_SR, NVFP4


def nvfp4_without_its_fp32_scale(x, fmt, generator):
    if fmt.scale != "e4m3":
        return fake_quantize(x, fmt, generator=generator)
    blocks = torch.nn.functional.pad(x, (0, -x.shape[-1] % 16)).unflatten(-1, (-1, 16))
    scale = (blocks.abs().amax(-1, keepdim=True) / 6).to(torch.float8_e4m3fn).float().clamp(min=2.0**-9)
    grid = torch.tensor(fmt.element.grid())
    near = (blocks.abs() / scale).clamp(max=6).unsqueeze(-1).sub(grid).abs().argmin(-1)
    return (grid[near] * scale).copysign(blocks).flatten(-2)[..., : x.shape[-1]]


def fp8_without_a_scale(x, fmt, generator):
    return x.to(torch.float8_e4m3fn).float() if fmt == FP8 else fake_quantize(x, fmt, generator=generator)


def half_of_the_noise(x, fmt, generator):
    made = fake_quantize(x, fmt, generator=generator)
    return made / 2 if fmt.rounding == "stochastic" else made


def noise_over_a_scale_that_clips(x, fmt, generator):
    return fake_quantize(x, replace(fmt, scale_rule="floor") if fmt == MXFP4_SR else fmt, generator=generator)


def tiles_of_consecutive_elements(x, fmt, generator):
    if fmt != MXFP4_2D:
        return fake_quantize(x, fmt, generator=generator)
    return fake_quantize(x.reshape(-1), replace(MXFP4, block=(1, 1024))).view(x.shape)


def blocks_along_the_first_axis(x, fmt, generator):
    return (
        fake_quantize(x.t(), fmt, generator=generator).t()
        if x.ndim == 2
        else fake_quantize(x, fmt, generator=generator)
    )


def ties_away_from_zero(x, fmt, generator):
    return fake_quantize(x, replace(fmt, rounding="half_away") if fmt == MXFP4 else fmt, generator=generator)


def a_threshold_that_is_absolute(x, fmt, generator):
    return fake_quantize(torch.where(x.abs() < 1e-3, 0.0, x), fmt, generator=generator)


def no_noise_at_all(x, fmt, generator):
    return x if fmt.rounding == "stochastic" else fake_quantize(x, fmt, generator=generator)


def halfway_to_the_grid(x, fmt, generator):
    return (x + fake_quantize(x, fmt, generator=generator)) / 2


def test_the_quantizer_is_sound():
    assert all(check.passed for check in self_test())
    require_sound()


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        (nvfp4_without_its_fp32_scale, "same error at every size, nvfp4"),
        (fp8_without_a_scale, "same error at every size, fp8"),
        (half_of_the_noise, "stochastic rounding is unbiased, mxfp4_sr"),
        (noise_over_a_scale_that_clips, "stochastic rounding is unbiased, mxfp4_sr"),
        (tiles_of_consecutive_elements, "blocks lie where they should, mxfp4_2d"),
        (blocks_along_the_first_axis, "blocks lie where they should, mxfp4"),
        (ties_away_from_zero, "known vectors, mxfp4"),
        (a_threshold_that_is_absolute, "same error at every size, mxfp4"),
        (no_noise_at_all, "stochastic rounding is unbiased, mxfp4_sr"),
        (halfway_to_the_grid, "rounding twice is rounding once, mxfp4"),
    ],
)
def test_a_planted_fault_is_found_and_named(broken, found):
    assert found in {check.name for check in self_test(broken) if not check.passed}
    with pytest.raises(CheckFailed, match=found):
        require_sound(broken)


def test_a_fault_says_what_was_seen():
    seen = next(c.seen for c in self_test(ties_away_from_zero) if c.name == "known vectors, mxfp4")
    assert seen == "0.25 became 0.5, not 0"


def test_nvfp4_has_a_check_of_its_own():
    assert sum(NVFP4.name in check.name for check in self_test()) >= 4
