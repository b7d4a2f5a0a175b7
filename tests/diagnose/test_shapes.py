"""Probes take the stream of a layer in any shape or name the layer, and a KL of 0 must have been reached."""

import pytest
import torch
from torch import nn

from fp4rl.diagnose.calibration import Batch, Calibration
from fp4rl.diagnose.depth import depth
from fp4rl.diagnose.dynamics import dynamics
from fp4rl.diagnose.estimate import estimated_kl
from fp4rl.diagnose.findings import findings
from fp4rl.diagnose.passes import logits_of
from fp4rl.diagnose.precision import input_errors
from fp4rl.diagnose.report import ScanReport
from fp4rl.diagnose.sensitivity import divergences
from fp4rl.diagnose.suspects import Verdict
from fp4rl.inject.resolve import resolve
from fp4rl.spec.errors import CheckFailed
from fp4rl.spec.injection import Injection

WIDTH = 32
INTO = {
    "plain": lambda h: h,
    "streams first": lambda h: torch.stack([h, 2 * h, -h, h]),
    "streams behind": lambda h: torch.stack([h, 2 * h, -h], 2),
    "flat": lambda h: h.flatten(0, 1),
}
BACK = {
    "plain": lambda h: h,
    "streams first": lambda h: h.mean(0),
    "streams behind": lambda h: h.mean(2),
    "flat": lambda h: h.unflatten(0, (3, -1)),
}


class Layer(nn.Module):
    def __init__(self, tuples):
        super().__init__()
        self.up_proj, self.tuples = nn.Linear(WIDTH, WIDTH, bias=False), tuples

    def forward(self, h):
        h = h + self.up_proj(h).tanh()
        return (h, None) if self.tuples else h


class Model(nn.Module):
    """Two layers over a stream of some shape; the second linear of `unused` is never called."""

    def __init__(self, shape, tuples=False):
        super().__init__()
        torch.manual_seed(0)
        self.shape, self.embed = shape, nn.Embedding(20, WIDTH)
        self.layers = nn.ModuleList(Layer(tuples) for _ in range(2))
        self.lm_head = nn.Linear(WIDTH, 20, bias=False)

    def forward(self, input_ids, attention_mask):  # noqa: ARG002
        h = INTO[self.shape](self.embed(input_ids))
        for layer in self.layers:
            h = layer(h)
            h = h[0] if isinstance(h, tuple) else h
        return self.lm_head(BACK[self.shape](h))


@pytest.fixture
def calibration():
    ids = torch.randint(0, 20, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return Calibration((Batch(ids, mask, mask),), 3, int(mask.sum()), "made here")


def measured(model, calibration):
    table = resolve(model, Injection.named("w4a4"))
    found = dynamics(model, table, calibration, generator=torch.Generator().manual_seed(0))
    return table, found, depth(model, table, calibration)


@pytest.mark.parametrize("tuples", [False, True])
@pytest.mark.parametrize("shape", ["streams first", "streams behind"])
def test_streams_of_any_shape_are_probed_and_followed_without_their_padding(shape, tuples, calibration):
    model = Model(shape, tuples)
    _, found, grown = measured(model, calibration)
    assert [layer.layer for layer in found.layers] == [0, 1]
    assert found.skipped == ()
    batch = calibration.batches[0]
    with torch.no_grad():
        streams = INTO[shape](model.embed(batch.ids))
        for own, layer in zip(grown, model.layers, strict=True):
            streams = streams + layer.up_proj(streams).tanh()
            where = batch.mask.bool() if shape == "streams behind" else (slice(None), batch.mask.bool())
            assert own.rms == pytest.approx(float(streams[where].double().square().mean().sqrt()), rel=1e-5)
            assert own.both > 0
    assert 0.5 < found.layers[0].gain < 2


def test_a_layer_whose_stream_has_no_such_axes_is_named(calibration):
    table, found, _ = measured(Model("flat"), calibration)
    assert found.layers == ()
    assert found.skipped == (0, 1)
    report = ScanReport("m", table, dynamics=found, verdict=Verdict((), ()))
    assert any(finding.text.startswith("layer 0, 1: not probed") for finding in findings(report))


def test_a_kl_of_0_where_nothing_was_rounded_is_a_failure(calibration):
    model = Model("plain")
    model.layers[1].mlp = nn.Linear(WIDTH, WIDTH)  # there, and never called
    table = resolve(model, Injection.named("w4a4"))
    with pytest.raises(CheckFailed, match=r"a KL of 0 that is none: 1 of 1 site was never called.*layers\.1\.mlp"):
        divergences(model, one_by_one(table), calibration)


def test_a_kl_of_0_by_value_is_a_kl(calibration):
    """Weights of +-1 are exact in MXFP4: every element was rounded, and none had to change."""
    model = Model("plain")
    with torch.no_grad():
        model.layers[0].up_proj.weight.sign_()
    table = resolve(model, Injection.named("w4a16"))
    kl = [divergence.kl for divergence in divergences(model, one_by_one(table), calibration)]
    assert kl[0] == 0
    assert kl[1] > 0
    assert logits_of(model, calibration.batches[0]).isfinite().all()


def test_a_weight_with_a_place_in_two_layers_is_measured_at_both(calibration):
    model = Model("plain")
    with torch.no_grad():
        model.layers[0].up_proj.weight.mul_(2)
        model.lm_head.weight.mul_(4)
    model.layers[1].up_proj.weight = model.layers[0].up_proj.weight
    model.layers[0].mlp = model.layers[1].mlp = nn.Linear(WIDTH, WIDTH)
    other = nn.Linear(WIDTH, WIDTH)
    other.weight = model.layers[0].mlp.weight
    model.layers[1].mlp = other  # and only there it is called
    model.layers[1].register_forward_pre_hook(lambda layer, given: (layer.mlp(given[0]),))
    table = resolve(model, Injection(weight="mxfp8", input="mxfp8"))
    assert [plan.name for plan in table.plans] == ["layers.0.up_proj", "layers.0.mlp"]
    assert [part.site for part in input_errors(model, table, calibration)] == ["layers.0.up_proj", "layers.0.mlp"]
    assert set(measured(model, calibration)[1].sites) == {"layers.0.up_proj", "layers.0.mlp"}
    alone = [divergence.kl for divergence in divergences(model, one_by_one(table), calibration)]
    generator = torch.Generator().manual_seed(0)
    estimates = list(estimated_kl(model, table, calibration, generator=generator, draws=300).values())
    assert estimates == pytest.approx(alone, rel=0.25)


def one_by_one(table):
    from dataclasses import replace

    return [replace(table, plans=(plan,)) for plan in table.plans]
