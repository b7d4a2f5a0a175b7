"""The hash behind stochastic rounding: uniform, different everywhere, and drawn from the generator alone."""

import pytest
import torch

from fp4rl.numerics.quantize import fake_quantize
from fp4rl.numerics.rounding import draw_seed, uniform_matrix
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import MXFP4_SR

CPU = torch.device("cpu")


def test_the_numbers_are_uniform():
    u = uniform_matrix(1000, 1000, (1, 2), CPU).double()
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u, bins=100, min=0, max=1)
    chi_square = ((counts - 1e4).square() / 1e4).sum().item()
    assert 50 < chi_square < 160  # 99 degrees of freedom


@pytest.mark.parametrize("apart", [1, 2, 32, 1000])
def test_neighbours_do_not_know_of_each_other(apart):
    u = uniform_matrix(1, 1_000_000, (7, 8), CPU)[0].double() - 0.5
    correlation = (u[apart:] * u[:-apart]).mean() * 12
    assert abs(correlation.item()) < 5e-3


def test_two_draws_of_a_generator_share_nothing():
    generator = torch.Generator().manual_seed(0)
    one, other, third = (uniform_matrix(1, 1_000_000, draw_seed(generator), CPU)[0].double() - 0.5 for _ in range(3))
    for a, b in ((one, other), (other, third), (one, third)):
        assert abs((a * b).mean().item() * 12) < 5e-3
        assert (a == b).double().mean() < 1e-4


def test_a_part_of_a_matrix_draws_what_the_whole_draws_there():
    whole = uniform_matrix(50, 70, (3, 4), CPU)
    assert torch.equal(uniform_matrix(20, 70, (3, 4), CPU, first_row=30), whole[30:])


def test_counters_wrap_instead_of_failing_beyond_two_to_the_32():
    beyond = uniform_matrix(2, 64, (3, 4), CPU, first_row=2**27)
    assert beyond.shape == (2, 64)
    assert torch.equal(beyond, uniform_matrix(2, 64, (3, 4), CPU, first_row=2**26 + 2**26))


def test_the_generator_decides_and_moves_on():
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(5)
    first, second = (fake_quantize(x, MXFP4_SR, generator=generator) for _ in range(2))
    again = fake_quantize(x, MXFP4_SR, generator=torch.Generator().manual_seed(5))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_a_missing_generator_is_named():
    with pytest.raises(
        InvalidValueError, match=r"lm_head: mxfp4_sr rounds stochastically and needs a torch\.Generator"
    ):
        fake_quantize(torch.ones(32), MXFP4_SR, name="lm_head")


def test_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    draw_seed(torch.Generator().manual_seed(1))
    fake_quantize(torch.ones(32), MXFP4_SR, generator=torch.Generator().manual_seed(1))
    assert torch.equal(before, torch.random.get_rng_state())
