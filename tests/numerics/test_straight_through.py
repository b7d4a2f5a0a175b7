"""The forward is rounded, the backward is not."""

import pytest
import torch

from fp4rl.numerics.quantize import fake_quantize
from fp4rl.numerics.straight_through import straight_through
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import MXFP4, MXFP4_SR


def test_the_forward_is_fake_quantization():
    x = torch.randn(8, 64, requires_grad=True)
    assert torch.equal(straight_through(x, MXFP4), fake_quantize(x.detach(), MXFP4))


def test_the_gradient_that_arrives_is_handed_back_unchanged():
    x, weights = torch.randn(8, 64, requires_grad=True), torch.randn(8, 64)
    (straight_through(x, MXFP4) * weights).sum().backward()
    assert torch.equal(x.grad, weights)


def test_clipped_values_get_no_gradient_in_the_clipped_variant():
    x = torch.tensor([7.9, 1.0, -7.5, 6.0], requires_grad=True)
    straight_through(x, MXFP4, variant="clipped").backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert x.grad.tolist() == [0.0, 2.0, 0.0, 4.0]


def test_stochastic_rounding_takes_the_generator_through():
    x = torch.randn(8, 64, requires_grad=True)
    one, other = (straight_through(x, MXFP4_SR, generator=torch.Generator().manual_seed(s)) for s in (1, 1))
    assert torch.equal(one, other)
    assert one.requires_grad


def test_an_unknown_variant_names_the_nearest():
    with pytest.raises(InvalidValueError, match="did you mean 'clipped'"):
        straight_through(torch.ones(32), MXFP4, variant="cliped")
