"""Outputs and every gradient of every point, variant and dtype against explicit formulas in float64.

Each comparison is made a second time with the unrounded number in the backward, and must then fail.
"""

from itertools import product

import pytest
import torch
from scipy.linalg import hadamard
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.pytorch_utils import Conv1D

from fp4rl.inject.attach import attach
from fp4rl.numerics.levels import within_reach
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.spec.injection import Injection

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
POINTS = {
    "weight": {"weight": "mxfp4"},
    "input": {"input": "mxfp4"},
    "output": {"output": "mxfp4"},
    "weight+input": {"weight": "mxfp4", "input": "mxfp8"},
    "all": {"weight": "nvfp4", "input": "mxfp4_b16", "output": "mxfp6_e2m3"},
    "rotated": {"weight": {"name": "mxfp4", "rotation": 32}, "input": {"name": "mxfp4", "rotation": 32}},
}


def draw(*shape, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * 3).to(dtype)


def seen_as(x, fmt, dtype, clipped):
    """The oracle's own rounding: (Q(x), where the gradient passes), both in float64."""
    if fmt is None:
        return x.detach().double(), torch.ones(x.shape, dtype=torch.float64)
    cast = x.detach().to(DTYPES[dtype])
    reach = within_reach(cast, fmt) if clipped else torch.ones(x.shape)
    return fake_quantize(cast, fmt).double(), reach.double()


def passed(gradient, reach, fmt):
    """The gradient through the rounding: x -> H Q(H x) has the derivative H diag(reach) H; the matrix is scipy's."""
    if fmt is None or fmt.rotation is None:
        return gradient * reach
    matrix = torch.tensor(hadamard(fmt.rotation), dtype=torch.float64) / fmt.rotation**0.5
    turn = torch.block_diag(*[matrix] * (gradient.shape[-1] // fmt.rotation))
    return ((gradient @ turn) * reach) @ turn


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm().detach())


def model_and_data(dtype):
    layer = nn.Linear(64, 96, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(draw(96, 64, seed=1, dtype=dtype))
    x = draw(2, 7, 64, seed=2, dtype=dtype).requires_grad_()
    return layer, x, draw(2, 7, 96, seed=3, dtype=dtype)


def expected(layer, x, g, injection):
    """y, grad_x, grad_weight, grad_bias by the formulas, in float64."""
    clipped = injection.straight_through == "clipped"
    wq, w_reach = seen_as(layer.weight, injection.weight, injection.dtype, clipped)
    xq, x_reach = seen_as(x, injection.input, injection.dtype, clipped)
    y = xq @ wq.T + layer.bias.detach().double()
    g = g.double()
    if injection.output is not None:
        # The point sees y in the model's dtype; the oracle starts from the same number.
        y_seen = nn.functional.linear(xq.to(x.dtype), wq.to(x.dtype), layer.bias)
        y, y_reach = seen_as(y_seen, injection.output, injection.dtype, clipped)
        g = passed(g, y_reach, injection.output)
    grad_weight = passed(g.flatten(0, 1).T @ xq.flatten(0, 1), w_reach, injection.weight)
    with_master = passed(g @ layer.weight.detach().double(), x_reach, injection.input)
    return y, passed(g @ wq, x_reach, injection.input), grad_weight, g.sum((0, 1)), with_master


@pytest.mark.parametrize("variant", ["identity", "clipped"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_dtype", TOLERANCE)
@pytest.mark.parametrize("point", POINTS)
def test_linear_points_against_the_oracle(point, model_dtype, dtype, variant):
    injection = Injection.model_validate({**POINTS[point], "dtype": dtype, "straight_through": variant})
    layer, x, g = model_and_data(model_dtype)
    with attach(layer, injection):
        y = layer(x)
        y.backward(g)
    found = (y.detach(), x.grad, layer.weight.grad, layer.bias.grad)
    *right, with_master = expected(layer, x, g, injection)
    for got, oracle in zip(found, right, strict=True):
        assert relative(got, oracle) < TOLERANCE[model_dtype]
    if injection.weight is not None:
        assert relative(x.grad, with_master) > 2 * TOLERANCE[model_dtype]


@pytest.mark.parametrize("point", ["rotated", "weight+input"])
def test_a_weight_that_is_stored_transposed_gets_the_same_gradient(point):
    injection = Injection.model_validate({**POINTS[point], "straight_through": "clipped"})
    layer, x, g = model_and_data(torch.float64)
    other = Conv1D(96, 64).double()
    with torch.no_grad():
        other.weight.copy_(layer.weight.T)
    for module in (layer, other):
        with attach(nn.ModuleDict({"c_proj": module}), injection):
            module(x).backward(g)
    assert torch.allclose(other.weight.grad, layer.weight.grad.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("point", ["weight", "input", "output"])
def test_the_clipped_variant_stops_some_gradients_and_identity_none(point):
    grads = {}
    for variant in ("identity", "clipped"):
        layer, x, g = model_and_data(torch.float64)
        with attach(layer, Injection.model_validate({point: "mxfp4", "straight_through": variant})):
            layer(x).backward(g)
        grads[variant] = layer.weight.grad if point == "weight" else x.grad
    assert not torch.equal(grads["identity"], grads["clipped"])
    if point != "output":
        assert 0 < (grads["clipped"] == 0).double().mean() < 0.2
        assert (grads["identity"] == 0).sum() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("fmt", "product_"), list(product(["mxfp4", "mxfp8"], ["grad_input", "grad_weight"])))
def test_gradient_formats_round_one_operand_of_one_backward_product(fmt, product_, dtype):
    injection = Injection.model_validate({"weight": "mxfp4", product_: fmt, "dtype": dtype})
    cast = DTYPES[dtype]
    layer, x, g = model_and_data(torch.float64)
    with attach(layer, injection):
        layer(x).backward(g)
    rows = g.flatten(0, 1)
    wq = fake_quantize(layer.weight.detach().to(cast), injection.weight).double()
    quantize = {"grad_input": lambda t: t, "grad_weight": lambda t: t}
    quantize[product_] = lambda t: fake_quantize(t.to(cast).contiguous(), getattr(injection, product_)).double()
    grad_x = (quantize["grad_input"](rows) @ wq).view_as(x)
    grad_weight = quantize["grad_weight"](rows.T) @ x.detach().flatten(0, 1)
    assert relative(x.grad, grad_x) < 1e-12
    assert relative(layer.weight.grad, grad_weight) < 1e-12
    unrounded = (rows @ wq).view_as(x) if product_ == "grad_input" else rows.T @ x.detach().flatten(0, 1)
    assert relative(x.grad if product_ == "grad_input" else layer.weight.grad, unrounded) > 1e-3
    assert torch.equal(layer.bias.grad, g.sum((0, 1)))


def test_a_stochastic_gradient_format_is_right_on_average():
    layer, x, g = model_and_data(torch.float64)
    total = torch.zeros_like(x)
    with attach(layer, Injection(grad_input="mxfp4_sr", dtype="float32")) as harmed:
        for _ in range(200):
            x.grad = None
            layer(x).backward(g)
            total += x.grad / 200
            harmed.invalidate()
    assert relative(x.grad, g @ layer.weight.detach()) > 0.05
    assert relative(total, g @ layer.weight.detach()) < 0.015


class Attention(nn.Module):
    """Two heads of 32 over sdpa or the eager formula; projections that are named as everywhere."""

    def __init__(self, eager=False, dtype=torch.float64):
        super().__init__()
        self.eager = eager
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self, name, nn.Linear(64, 64, bias=False, dtype=dtype))
            getattr(self, name).weight.data.copy_(draw(64, 64, seed=len(name) + ord(name[0]), dtype=dtype) / 24)

    def forward(self, x):
        q, k, v = (getattr(self, n)(x).unflatten(-1, (2, 32)).transpose(1, 2) for n in ("q_proj", "k_proj", "v_proj"))
        if not self.eager:
            return scaled_dot_product_attention(q, k, v, is_causal=True)
        scores = torch.matmul(q, k.transpose(2, 3)) * 32**-0.5
        scores = scores + torch.full((x.shape[1],) * 2, -torch.inf, dtype=x.dtype).triu(1)
        return torch.matmul(scores.softmax(-1), v)


def through(x, q, reach):
    """Straight-through by a sum: q in the forward, x * reach in the backward."""
    return q + x * reach - (x * reach).detach()


@pytest.mark.parametrize("variant", ["identity", "clipped"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eager", [False, True])
def test_the_kv_cache_point_against_the_oracle(eager, dtype, variant):
    injection = Injection.model_validate({"kv_cache": "mxfp4", "dtype": dtype, "straight_through": variant})
    module, x = Attention(eager), draw(2, 9, 64, seed=5, dtype=torch.float64).requires_grad_()
    g = draw(2, 2, 9, 32, seed=6, dtype=torch.float64)
    with attach(module, injection):
        y = module(x)
        y.backward(g)
    found = [y.detach(), x.grad, *(p.grad for p in module.parameters())]

    for p in (x, *module.parameters()):
        p.grad = None
    q, k, v = (p(x).unflatten(-1, (2, 32)).transpose(1, 2) for p in module.children())
    k, v = (through(t, *seen_as(t, injection.kv_cache, dtype, variant == "clipped")) for t in (k, v))
    y = ((q @ k.mT * 32**-0.5) + torch.full((9, 9), -torch.inf).triu(1)).softmax(-1) @ v
    y.backward(g)
    for got, oracle in zip(found, [y.detach(), x.grad, *(p.grad for p in module.parameters())], strict=True):
        assert relative(got, oracle) < 1e-6  # the eager path takes its softmax in the model's dtype
    with torch.no_grad():
        assert relative(found[0], module(x)) > 1e-2
