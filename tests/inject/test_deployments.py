"""What a kernel does to inputs, on a real layer, held against the rule as its source states it.

The kind of fault: a deployment whose name is right and whose rounding is that of another one.
"""

from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from fp4rl.inject.attach import attach
from fp4rl.spec.injection import Injection

WIDTH = 64
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
E4M3 = torch.tensor(
    [m / 512 for m in range(8)]
    + [(8 + m) / 8 * 2.0**e for e in range(-6, 9) for m in range(8)][:-1],  # the last is NaN
    dtype=torch.float64,
)


def binade(value):
    """floor(log2(value)), exactly."""
    return torch.frexp(value).exponent - 1


def up(value):
    """ceil(log2(value)), exactly."""
    return torch.where(torch.frexp(value).mantissa == 0.5, binade(value), binade(value) + 1)


# The exponent of the scale of a block with this largest magnitude, as the source of each rule states it. In float64 a
# quotient of two short numbers that is no power of two never becomes one.
EXPONENTS = {
    "rceil": lambda amax, grid: up(amax / grid[-1]),
    "floor": lambda amax, grid: binade(amax) - binade(grid[-1]),
    "even": lambda amax, grid: binade(amax) + (amax / 2.0 ** binade(amax) >= 1.75).int() - binade(grid[-1]),
}


def on_grid(value, grid, ties):
    """The nearest magnitude of the grid; a tie goes to the even position in it, or away from zero."""
    middle = (grid[1:] + grid[:-1]) / 2
    low, high = torch.bucketize(value, middle), torch.bucketize(value, middle, right=True)
    away = torch.where(low % 2 == 0, low, high) if ties == "even" else high
    return grid[torch.where(low == high, low, away)]


def stated(x, grid, rule, ties):
    """Each block of 32 of a row rounded by the statement above."""
    blocks = x.double().unflatten(-1, (-1, 32))
    amax = blocks.abs().amax(-1, keepdim=True)
    exponent = EXPONENTS[rule](torch.where(amax == 0, 1.0, amax), grid)
    scale = torch.where(amax == 0, 1.0, 2.0 ** exponent.double())
    return (on_grid(blocks.abs() / scale, grid, ties) * scale).copysign(blocks).flatten(-2)


def inputs():
    """Values of many sizes in bfloat16, on the grids' ties and on the thresholds of the scales among them."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(WIDTH, generator=generator) * 10.0**size for size in (-6, -3, -1, 0, 1, 3) for _ in range(8)]
    for top in (4.0, 6.0, 6.0625, 7.0, 6.96875, 7.25, 3.5, 3.0, 1.75, 448.0, 464.0, 480.0):
        row = torch.arange(WIDTH) % 33 * top / 32
        row[::32] = top
        rows += [row, -row / 128]
    ties = torch.tensor([6.0, *(0.25 * n for n in range(24))]).repeat(3)[:WIDTH]
    ties[32] = 6.0
    rows += [ties, -ties, torch.zeros(WIDTH)]
    return torch.stack(rows).bfloat16().float()


@cache
def through(deployment, mode):
    """The inputs as the matmul of a layer reads them: its weight is the identity, which every format holds exactly."""
    layer = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    nn.init.eye_(layer[0].weight)
    with attach(layer, Injection.named(mode, deployment)) as attachment, torch.no_grad():
        attachment.phase = "evaluation"
        return layer(inputs()).double()


KERNELS = [
    ("vllm_blackwell", "w4a4", E2M1, "rceil", "even"),
    ("compressed_tensors", "w4a4", E2M1, "even", "even"),
    ("vllm_ascend", "w4a4", E2M1, "floor", "away"),
    ("ascend950", "w4a4", E2M1, "floor", "even"),
    ("vllm_blackwell", "w4a8", E4M3, "rceil", "even"),
    ("vllm_ascend", "w4a8", E4M3, "floor", "even"),
]


@pytest.mark.parametrize(("deployment", "mode", "grid", "rule", "ties"), KERNELS, ids=lambda value: str(value)[:20])
def test_inputs_are_rounded_as_the_kernels_rule_is_stated(deployment, mode, grid, rule, ties):
    assert torch.equal(through(deployment, mode), stated(inputs(), grid, rule, ties))


def test_the_rules_differ_on_these_inputs():
    found = [through(deployment, "w4a4") for deployment, mode, *_ in KERNELS if mode == "w4a4"]
    differing = [int((a != b).sum()) for i, a in enumerate(found) for b in found[:i]]
    assert min(differing) > 10, differing


def test_a_kernel_that_rounds_no_inputs_leaves_them_as_they_are():
    assert torch.equal(through("vllm_hopper", "w4a16"), inputs().double())


class Multiplied(TorchFunctionMode):
    """The weights that matmuls were given: those of `nn.functional.linear`, in order."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Note the weight, and go on."""
        if func is nn.functional.linear:
            self.weights.append(args[1].detach().clone())
        return func(*args, **(kwargs or {}))


def unpacked(packed, name):
    """The numbers that a layer's codes and scales stand for in an AscendV1 file: low nibble first, the sign on top."""
    codes, exponents = packed[f"{name}.weight"].int(), packed[f"{name}.weight_scale"].double() - 127
    codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    values = E2M1[codes & 7] * (1 - 2 * (codes >> 3)) * (2.0**exponents).repeat_interleave(32, -1)
    dual = packed.get(f"{name}.weight_dual_scale")
    return values if dual is None else values * dual.double().squeeze(-1).repeat_interleave(64, -1)


@pytest.mark.parametrize(
    ("folder", "deployment"),
    [
        ("w4a4", "vllm_ascend"),
        ("w4a8", "vllm_ascend"),
        ("w4a4_ceil_x", "vllm_ascend_ceil_x"),
        ("w4a4_fouroversix", "vllm_ascend_fouroversix"),
        ("w4a4_dualscale", "vllm_ascend_dualscale_64"),
    ],
)
def test_the_layers_of_a_model_multiply_by_what_the_exporter_stored(folder, deployment, shared_data):
    """Kind: a rule that is right for a tensor alone, and not what an attached model computes with."""
    data = shared_data / "ascend_v1"
    if not data.is_dir():
        pytest.skip("no ascend_v1 in the shared data")
    packed = load_file(next((data / folder).glob("quant_model_weights-*.safetensors")))
    model = AutoModelForCausalLM.from_pretrained(data / "model", dtype=torch.float32)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    names = {module: name for name, module in model.named_modules() if f"{name}.weight_scale" in packed}
    assert len(names) == 14
    called = []
    for module in linears:
        module.register_forward_pre_hook(lambda module, _: called.append(module))
    injection = Injection.named(folder[:4], deployment, dtype="float32")  # the folder is in float32
    with attach(model, injection), torch.no_grad(), Multiplied() as seen:
        model(torch.arange(1, 9)[None])
    assert len(called) == len(seen.weights) == len(linears)
    compared = differing = 0
    for module, weight in zip(called, seen.weights, strict=True):
        if module in names:
            stored = unpacked(packed, names[module]).float()
            compared += weight.numel()
            differing += int((weight != stored).sum())
    assert (compared, differing) == (106_496, 0)
