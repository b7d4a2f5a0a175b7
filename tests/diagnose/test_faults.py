"""Planted hardware faults: the layer and the kind are found, and healthy models are left in peace."""

from dataclasses import asdict

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fp4rl.diagnose.dynamics import dynamics, ratios
from fp4rl.diagnose.probes import probe
from fp4rl.diagnose.suspects import robust_z, suspects
from fp4rl.inject.attach import attach
from fp4rl.inject.resolve import resolve
from fp4rl.spec.hardware import HardwareError
from fp4rl.spec.injection import Injection

PLANTED = {
    "non-determinism": {"kind": "jitter", "scale": 0.3},
    "dead zone": {"kind": "dead_zone", "scale": 0.3},
    "stuck channel": {"kind": "stuck", "scale": 0.3, "share": 0.1},
    "saturation": {"kind": "saturation", "scale": 2.0},
    "spikes": {"kind": "spikes", "scale": 0.3, "share": 0.01},
    "bias": {"kind": "bias", "scale": 0.3},
}


def _found(model, calibration, seed=0):
    table = resolve(model, Injection.named("w4a16"))
    return dynamics(model, table, calibration, generator=torch.Generator().manual_seed(seed))


def _with_fault(model, calibration, layer, fault):
    error = HardwareError(**fault, targets={"layers": [layer]})
    with attach(model, Injection(errors=(error,))) as injected:
        injected.set_phase("rollout")
        return suspects(_found_under(model, calibration))


def _found_under(model, calibration):
    # The table of a scan is resolved before the fault is attached: injected layers are not resolved twice.
    return dynamics(model, _TABLES[id(model)], calibration, generator=torch.Generator().manual_seed(0))


_TABLES = {}


@pytest.fixture
def table(trained):
    _TABLES[id(trained)] = resolve(trained, Injection.named("w4a16"))
    return _TABLES[id(trained)]


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("layer", [0, 3])
def test_a_planted_fault_is_found_with_its_layer_and_kind(trained, calibration, table, kind, layer):
    verdict = _with_fault(trained, calibration, layer, PLANTED[kind])
    assert (verdict.layer, verdict.kind) == (layer, kind)


def test_a_healthy_trained_model_raises_no_alarm(trained, calibration, table):
    for seed in range(5):
        found = dynamics(trained, table, calibration, generator=torch.Generator().manual_seed(seed))
        assert suspects(found).suspects == ()
        assert suspects(found).everywhere == ()


def test_a_healthy_model_in_bfloat16_raises_no_alarm(trained, calibration, table):
    from copy import deepcopy

    assert suspects(_found(deepcopy(trained).bfloat16(), calibration)).suspects == ()


def test_a_fault_that_all_layers_share_is_said_to_be_everywhere(trained, calibration, table):
    with attach(trained, Injection(errors=(HardwareError(kind="bias", scale=0.3),))) as injected:
        injected.set_phase("rollout")
        verdict = suspects(_found_under(trained, calibration))
    assert "offset" in verdict.everywhere


def test_weights_and_probes_of_the_same_seed_do_not_answer_each_other():
    """Noise from seed 0 on weights from seed 0 looked like spikes."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        layer.weight.normal_(0.0, 0.02, generator=generator)
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(9))
    same_stream = probe(layer, x, torch.Generator().manual_seed(0))
    assert same_stream.jumps > 1e-3  # the trap itself

    model = nn.Sequential(layer)
    model_of_one = nn.ModuleDict({"layers": nn.ModuleList([model])})

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model_of_one

        def forward(self, input_ids, **_):
            return self.inner["layers"][0](x[input_ids])

    from fp4rl.diagnose.calibration import from_tokens

    probed = Model()
    table = resolve(probed, Injection.named("w4a16"))
    found = dynamics(probed, table, from_tokens([list(range(64))]), generator=torch.Generator().manual_seed(0))
    assert next(iter(found.sites.values())).jumps == 0.0


def test_a_pruned_channel_is_not_a_stuck_one():
    layer = nn.Linear(32, 32)
    with torch.no_grad():
        layer.weight[5] = 0.0
    found = probe(layer, torch.randn(64, 32), torch.Generator().manual_seed(1))
    assert found.stuck == 0.0


def test_a_healthy_layer_answers_every_question_exactly():
    found = probe(nn.Linear(64, 48), torch.randn(128, 64), torch.Generator().manual_seed(1))
    assert (found.instability, found.jumps, found.dead, found.edge, found.stuck) == (0.0, 0.0, 0.0, 0.0, 0.0)
    assert found.offset < 1e-6
    assert found.gain == pytest.approx(1.0, abs=0.05)


def test_a_token_that_is_all_zeros_makes_no_layer_look_dead():
    """Fault: an embedding of zeros (a padding token that ends texts) was answered by zeros, 'dead zone'."""
    x = torch.randn(16, 64)
    x[3] = 0
    assert probe(nn.Linear(64, 48, bias=False), x, torch.Generator().manual_seed(1)).dead == 0.0
    assert probe(nn.Linear(64, 48, bias=False), 0 * x, torch.Generator().manual_seed(1)).stuck == 0.0


def test_robust_z_is_not_moved_by_the_outlier_it_scores():
    found = robust_z({"a": 0.0, "b": 0.1, "c": -0.1, "d": 50.0}, 1e-3)
    assert found["d"] > 100
    assert abs(found["a"]) < 1


def test_ratios_to_full_precision_are_one_when_nothing_is_rounded(trained, calibration, table):
    found = _found_under(trained, calibration)
    assert all(row == {"gain_ratio": 1.0, "kurtosis_ratio": 1.0} for row in ratios(found, found).values())


def test_the_model_is_the_same_after_it_was_probed(trained, calibration, table):
    before = {name: p.detach().clone() for name, p in trained.named_parameters()}
    _found_under(trained, calibration)
    assert all(torch.equal(p, before[name]) for name, p in trained.named_parameters())
    assert not any(module._forward_hooks for module in trained.modules())


def test_a_layer_that_stores_its_weight_in_out_is_probed_as_its_twin():
    """Fault: a scan of GPT-2 ended in 'mat1 and mat2 shapes cannot be multiplied'."""
    stored, twin, x = Conv1D(48, 64), nn.Linear(64, 48), torch.randn(128, 64)
    with torch.no_grad():
        nn.init.normal_(stored.weight, std=0.1)
        twin.weight.copy_(stored.weight.T)
        twin.bias.copy_(stored.bias.normal_())
    found, wanted = (asdict(probe(layer, x, torch.Generator().manual_seed(1))) for layer in (stored, twin))
    assert found == pytest.approx(wanted, abs=1e-4)
    assert found["gain"] == pytest.approx(1, abs=0.05)
