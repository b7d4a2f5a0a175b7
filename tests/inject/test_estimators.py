"""The estimators for the gradient of rounding against their papers' formulas, written out in float64."""

from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from fp4rl.inject.attach import attach
from fp4rl.inject.plan import SiteTable
from fp4rl.inject.probe import require_rounded
from fp4rl.inject.resolve import resolve
from fp4rl.numerics.levels import smooth_slope
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.spec.errors import CheckFailed
from fp4rl.spec.formats import MXFP4, NVFP4, Format
from fp4rl.spec.injection import Injection

LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1


def dge(x: float, scale: float, k: float, cap: float) -> float:
    """Eq. 8 of arXiv 2501.17116 for one value: f'(x) = |2x/delta - 1|^(1/k - 1) / k, x from the level below."""
    magnitude = abs(x) / scale
    magnitude = 6.0 if abs(magnitude - 6) < 1e-6 else magnitude  # a float32 scale maps the largest there and not beyond
    for low, high in pairwise(LEVELS):
        if low <= magnitude <= high:
            distance = abs(2 * (magnitude - low) / (high - low) - 1)
            return min(cap, distance ** (1 / k - 1) / k) if distance else cap
    return 0.0


def q_ema(x: float, average: float, scale: float) -> float:
    """TetraJet's Q-EMA (arXiv 2502.20853) for one value: q1 <= W/s <= q2, and the one nearer W_ema/s."""
    signed = sorted({*LEVELS, *(-level for level in LEVELS)})
    value, wanted = x / scale, average / scale
    if abs(value) >= 6 or value in signed:
        return max(-6.0, min(6.0, value)) * scale
    low, high = next((a, b) for a, b in pairwise(signed) if a < value < b)
    return (low if abs(wanted - low) < abs(wanted - high) else high) * scale


def scale_of(block: torch.Tensor, fmt: Format) -> float:
    """The scale of one block by hand: OCP's floor, or NVFP4's E4M3 under 448 * 6 / amax of a tensor of this block."""
    amax = float(block.abs().max())
    if fmt.scale == "e8m0":
        return 2.0 ** (torch.tensor(amax).frexp().exponent.item() - 1 - 2)
    factor = 448 * 6 / amax
    return float(torch.tensor(amax / 6 * factor).to(torch.float8_e4m3fn)) / factor


@pytest.mark.parametrize("fmt", [MXFP4, NVFP4], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize(("k", "cap"), [(5.0, 3.0), (2.0, 1.5)])
def test_smooth_gradients_are_those_of_the_paper_value_by_value(fmt, k, cap):
    layer = nn.Linear(fmt.block[1], 3, bias=False, dtype=torch.float64)
    row = torch.linspace(-7.3, 7.9, fmt.block[1], dtype=torch.float64)  # beyond 6 too, where floor clips
    with torch.no_grad():
        layer.weight.copy_(torch.stack([row, row.flip(0), row.roll(5)]))
    x = torch.randn(4, fmt.block[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    g = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    injection = Injection(weight=fmt, dtype="float32", straight_through="smooth", smooth={"sharpness": k, "cap": cap})
    with attach(layer, injection):
        layer(x).backward(g)
    weight = layer.weight.detach().float()
    slopes = [[dge(value, scale_of(block, fmt), k, cap) for value in block.tolist()] for block in weight]
    wanted = (g.T @ x.detach()) * torch.tensor(slopes, dtype=torch.float64)
    assert torch.allclose(layer.weight.grad, wanted, rtol=2e-5, atol=0)
    assert torch.allclose(x.grad, g @ fake_quantize(weight, fmt).double(), rtol=1e-12)  # of the input: as it comes
    if fmt is MXFP4:
        assert (torch.tensor(slopes) == 0).any()
        assert (torch.tensor(slopes) == cap).any()


def test_the_slope_has_the_values_that_ms_amp_tests():
    """tests/operators/test_fp4_quantize.py of Azure/MS-AMP, the paper's own code, which computes in bfloat16."""
    x = torch.linspace(-6.0, 6.0, 20).bfloat16()
    half = [0.2002, 0.4375, 0.6055, 0.2168, 1.8359, 0.2695, 0.3027, 0.2695, 0.2402, 0.5781]
    slope = smooth_slope(torch.cat([x, torch.zeros(12)]), MXFP4, 5.0, 3.0)[:20]  # one block, of scale 1
    assert torch.allclose(slope, torch.tensor(half + half[::-1]), rtol=0.02)


def test_smooth_acts_on_inputs_where_they_are_named():
    layer, x = nn.Linear(32, 8, dtype=torch.float64), torch.linspace(-7, 7, 64, dtype=torch.float64).view(2, 32)
    x.requires_grad_()
    settings = {"mode": "w4a4", "dtype": "float32", "straight_through": "smooth", "smooth": {"points": ["input"]}}
    with attach(layer, Injection.model_validate(settings)):
        layer(x).sum().backward()
    slope = torch.tensor([[dge(value, 1.0, 5.0, 3.0) for value in row] for row in x.tolist()], dtype=torch.float64)
    passed = fake_quantize(layer.weight.detach().float(), MXFP4).double().sum(0)
    assert torch.allclose(x.grad, passed * slope, rtol=2e-5, atol=0)
    assert torch.equal(layer.weight.grad[0], layer.weight.grad[1])  # the weight's own passes as it comes


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"weight": "bf16"}, "no format there rounds to nearest levels"),
        ({"weight": "mxfp4", "smooth": {"points": ["weight", "input"]}}, "would do nothing at input"),
        ({"weight": "mxfp4_sr", "by_pattern": {"*.q_proj": "mxfp4"}}, "mxfp4_sr: it rounds stochastic"),
        ({"weight": {"name": "mxfp4", "rotation": 32}, "by_pattern": {"*.q_proj": "mxfp4"}}, "rotated value"),
        (
            {
                "input": {"name": "mxfp4", "fallback": 0.25},
                "smooth": {"points": ["input"]},
                "by_pattern": {"*.down_proj": {"input": "mxfp4"}},
            },
            "twice rounded value",
        ),
        ({"weight": "mxfp4", "apply_during": ["rollout"]}, "no point is active in training"),
    ],
)
def test_smooth_is_refused_where_it_cannot_act(settings, reason):
    with pytest.raises(ValidationError, match=reason):
        Injection.model_validate({**settings, "straight_through": "smooth"})


def test_its_numbers_are_part_of_the_digest_of_sites():
    def digest(**smooth: float) -> str:
        table: SiteTable = resolve(
            nn.Sequential(nn.Linear(32, 8)), Injection(weight="mxfp4", straight_through="smooth", smooth=smooth)
        )
        return table.digest

    assert len({digest(), digest(cap=2.0), digest(sharpness=3.0)}) == 3


@pytest.mark.parametrize("fmt", [MXFP4, NVFP4], ids=lambda fmt: fmt.name)
def test_the_average_decides_between_the_two_levels_of_a_weight_while_it_learns(fmt):
    """Weights, on and off levels and clipped, whose averages lie on either side, in between, and beyond zero."""
    layer = nn.Linear(fmt.block[1], 40, bias=False)
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        largest = 7.0 if fmt is MXFP4 else 6.0
        layer.weight.copy_((torch.randn(40, fmt.block[1], generator=random) * 2.5).clamp(-largest, largest))
        layer.weight[:, 0] = largest
        layer.weight[:, 1] = 1.5
    average = layer.weight.detach() + torch.randn(layer.weight.shape, generator=random) * 0.6
    model, x = nn.Sequential(layer), torch.eye(fmt.block[1])
    usual = fake_quantize(layer.weight.detach(), fmt)
    scale = scale_of(layer.weight.detach(), fmt)
    wanted = [
        [q_ema(*pair, scale) for pair in zip(*rows, strict=True)]
        for rows in zip(layer.weight.tolist(), average.tolist(), strict=True)
    ]
    with attach(model, Injection(weight=fmt, dtype="float32")) as attachment:
        attachment.states["0"].anchor = average
        for phase in ("training", "rollout", "evaluation"):
            attachment.set_phase(phase)
            expected = usual if phase == "evaluation" else torch.tensor(wanted)
            assert torch.allclose(model(x).T, expected, rtol=1e-6, atol=0)
            assert require_rounded(attachment) == 1
        attachment.set_phase("training")
        model(x)
        average.mul_(-1)  # a copy that the average has left behind is noticed
        with pytest.raises(CheckFailed, match="the matmul receives other numbers"):
            require_rounded(attachment)
    assert 0.05 < (torch.tensor(wanted) != usual).double().mean() < 0.5
