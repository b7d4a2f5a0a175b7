"""Attach, switch, prove, take out: the harm acts where and when the spec says, and the master never changes."""

import copy

import pytest
import torch
from torch import nn

from fp4rl.inject.attach import attach
from fp4rl.inject.evidence import master_digest
from fp4rl.inject.linear import InjectedLinear
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.formats import MXFP4
from fp4rl.spec.hardware import HardwareError
from fp4rl.spec.injection import Injection

W4A16, W4A4 = Injection.named("w4a16"), Injection.named("w4a4")


def rounded(x):
    return fake_quantize(x.detach().bfloat16(), MXFP4).to(x.dtype)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(64, 96)


@pytest.fixture
def x():
    return torch.randn(8, 64, generator=torch.Generator().manual_seed(1))


def test_a_forward_computes_with_the_rounded_weight(layer, x):
    with attach(layer, W4A16):
        assert torch.equal(layer(x), nn.functional.linear(x, rounded(layer.weight), layer.bias))


def test_w4a4_rounds_the_input_as_well(layer, x):
    with attach(layer, W4A4):
        assert torch.equal(layer(x), nn.functional.linear(rounded(x), rounded(layer.weight), layer.bias))


def test_gradients_meet_the_rounded_weight_and_reach_the_master(layer, x):
    x.requires_grad_()
    with attach(layer, W4A16):
        layer(x).square().sum().backward()
    gradient = 2 * nn.functional.linear(x, rounded(layer.weight), layer.bias).detach()
    assert torch.allclose(x.grad, gradient @ rounded(layer.weight), rtol=1e-5, atol=1e-4)
    assert torch.allclose(layer.weight.grad, gradient.T @ x.detach(), rtol=1e-5, atol=1e-4)
    assert not torch.allclose(x.grad, gradient @ layer.weight, rtol=1e-2, atol=1e-2)


def test_a_forward_without_backward_leaves_the_master_weight_alone(layer, x):
    before = master_digest(layer)
    with attach(layer, W4A16), torch.no_grad():
        layer(x)
    assert master_digest(layer) == before


def test_after_an_exception_the_layer_is_itself_again(layer, x):
    plain = layer(x)
    with pytest.raises(RuntimeError, match="shape"), attach(layer, W4A16):
        layer(x[:, :3])
    assert type(layer) is nn.Linear
    assert torch.equal(layer(x), plain)


def test_outside_its_phases_an_injection_is_silent(layer, x):
    plain = layer(x)
    with attach(layer, Injection.named("w4a16", apply_during=("rollout",))) as harmed:
        assert torch.equal(layer(x), plain)
        harmed.set_phase("rollout")
        assert not torch.equal(layer(x), plain)
        harmed.set_phase("reference")
        assert torch.equal(layer(x), plain)


def test_evidence_counts_by_phase_and_measures_the_error(layer, x):
    with attach(layer, W4A4) as harmed:
        harmed.set_phase("rollout")
        for _ in range(3):
            with torch.no_grad():
                layer(x)
        harmed.set_phase("training")
        layer(x)
        rows = {(row.phase, row.point): row for row in harmed.evidence()}
    assert rows["rollout", "weight"].calls == 3
    assert rows["rollout", "weight"].elements == 64 * 96
    assert rows["rollout", "input"].elements == 3 * 8 * 64
    assert rows["training", "input"].calls == 1
    for row in rows.values():
        assert 0.8 < row.share_changed <= 1
        assert 0.08 < row.relative_error < 0.15


def test_the_sampled_error_is_the_real_one(layer, x):
    with attach(layer, W4A16) as harmed:
        layer(x)
        (row,) = harmed.evidence()
    seen = layer.weight.detach().bfloat16().double()
    real = (rounded(layer.weight).double() - seen).norm() / seen.norm()
    assert row.relative_error == pytest.approx(float(real), rel=0.05)


def test_a_site_that_is_never_called_stops_the_run():
    model = nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.Linear(32, 32)})
    with attach(model, W4A16) as harmed:
        model["a"](torch.zeros(1, 32))
        with pytest.raises(CheckFailed, match=r"1 of 2 sites was never called during training.*b"):
            harmed.require_calls()
        model["b"](torch.zeros(1, 32))
        harmed.require_calls()


def test_evidence_can_start_afresh(layer, x):
    with attach(layer, W4A16) as harmed:
        layer(x)
        harmed.reset_evidence()
        assert harmed.evidence() == []


def test_the_report_is_a_table_of_phases_points_and_errors(layer, x):
    injection = Injection(weight="mxfp4", errors=(HardwareError(when="both"),))
    with attach(layer, injection) as harmed:
        assert harmed.report() == f"1 site, table {harmed.table.digest}, phase training"
        layer(x).sum().backward()
        first, *others = harmed.report().splitlines()[1:]
    assert first.split()[:6] == ["training", "weight", "mxfp4", "1", "site", "1"]
    assert [line.split()[1] for line in others] == [
        "relative@matmul/both" + backward for backward in ("", ":grad_weight")
    ]
    assert len({len(line) for line in (first, *others)}) == 1


def test_two_injections_on_one_model_are_refused(layer):
    with attach(layer, W4A16), pytest.raises(InvalidValueError, match="already carries"):
        attach(layer, W4A4)


def test_an_unknown_phase_is_refused(layer):
    with attach(layer, W4A16) as harmed, pytest.raises(InvalidValueError, match="no phase is called 'eval'"):
        harmed.set_phase("eval")


def test_the_state_dict_has_the_same_keys_and_loads(layer, x):
    other = copy.deepcopy(layer.state_dict())
    other["weight"] = other["weight"] * 2
    with attach(layer, W4A16), torch.no_grad():
        assert list(layer.state_dict()) == ["weight", "bias"]
        layer(x)
        layer.load_state_dict(other)
        assert torch.equal(layer(x), nn.functional.linear(x, rounded(layer.weight), layer.bias))


def test_the_swap_keeps_the_layer_a_linear(layer):
    weight = layer.weight
    with attach(layer, W4A16):
        assert isinstance(layer, nn.Linear)
        assert type(layer) is InjectedLinear
        assert layer.weight is weight
    assert layer.weight is weight
