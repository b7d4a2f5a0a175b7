"""The quantizer sees the dtype that the spec names, whatever dtype the weights, the inputs or autocast have."""

import pytest
import torch
from torch import nn

from fp4rl.inject.attach import attach
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.spec.formats import MXFP4
from fp4rl.spec.injection import Injection

EYE = torch.eye(256)


def layer():
    torch.manual_seed(0)
    made = nn.Linear(256, 512, bias=False)
    nn.init.normal_(made.weight, 0, 0.02)
    return made


def rounded_weight(module, injection):
    """What the layer multiplies with, read off the identity matrix."""
    with attach(module, injection), torch.no_grad():
        return module(EYE.to(module.weight.dtype)).T.float()


def test_rounding_bfloat16_and_rounding_float32_differ_on_a_few_elements_in_a_thousand():
    one, other = (rounded_weight(layer(), Injection.named("w4a16", dtype=dtype)) for dtype in ("bfloat16", "float32"))
    assert 0.004 < float((one != other).float().mean()) < 0.009


def test_a_float32_master_and_its_bfloat16_copy_round_alike_under_bfloat16():
    """So FSDP mixed precision, which hands the layer a bfloat16 weight, changes nothing."""
    injection = Injection.named("w4a16")
    assert torch.equal(rounded_weight(layer(), injection), rounded_weight(layer().bfloat16(), injection))


def test_under_float32_they_would_not():
    injection = Injection.named("w4a16", dtype="float32")
    assert not torch.equal(rounded_weight(layer(), injection), rounded_weight(layer().bfloat16(), injection))


@pytest.mark.parametrize("mode", ["w4a16", "w4a4"])
def test_autocast_rounds_the_same_numbers(mode):
    module, x = layer(), torch.randn(8, 256)
    with attach(module, Injection.named(mode)), torch.no_grad():
        outside = module(x)
        with torch.autocast("cpu", torch.bfloat16):
            inside = module(x)
    inputs = fake_quantize(x.bfloat16(), MXFP4) if mode == "w4a4" else x.bfloat16()
    exact = inputs.float() @ fake_quantize(module.weight.bfloat16(), MXFP4).float().T
    assert torch.allclose(inside.float(), exact, rtol=2**-7, atol=1e-3)
    assert torch.allclose(outside, exact, rtol=2**-7, atol=1e-2)


def test_inputs_are_cast_before_they_are_rounded():
    module, x = layer(), torch.randn(4, 256)
    with attach(module, Injection(input="mxfp4")), torch.no_grad():
        assert torch.equal(module(x), fake_quantize(x.bfloat16(), MXFP4).float() @ module.weight.T)
    with attach(module, Injection(input="mxfp4", dtype="float32")), torch.no_grad():
        assert torch.equal(module(x), fake_quantize(x, MXFP4) @ module.weight.T)
