"""One weight with a place in several layers (Zamba) is one site, rounded and counted once."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from fp4rl.inject.attach import attach
from fp4rl.inject.probe import require_rounded
from fp4rl.inject.resolve import resolve
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.sites.walk import walk
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import MXFP4
from fp4rl.spec.injection import Injection

W4A16 = Injection.named("w4a16", dtype="float32")
X = torch.linspace(-3, 5, 7 * 64).view(7, 64)


class Twice(nn.Module):
    """x through layer 0 and, a nonlinearity later, through layer 1, which holds the same weight."""

    def __init__(self, same_module):
        super().__init__()
        torch.manual_seed(0)
        first, other = nn.Linear(64, 64), nn.Linear(64, 64)
        other.weight = first.weight
        blocks = [nn.ModuleDict({"up_proj": layer}) for layer in (first, first if same_module else other)]
        self.layers = nn.ModuleList(blocks)

    def forward(self, x):
        for layer in self.layers:
            x = layer["up_proj"](x).tanh()
        return x


@pytest.fixture(params=[False, True], ids=["two modules, one parameter", "one module under two names"])
def model(request):
    return Twice(request.param)


def test_both_places_compute_with_the_rounded_weight_which_is_one_site(model):
    rounded, x = fake_quantize(model.layers[0]["up_proj"].weight.detach(), MXFP4), X
    for layer in model.layers:
        x = linear(x, rounded, layer["up_proj"].bias).tanh()
    keys, kinds = list(model.state_dict()), [type(layer["up_proj"]) for layer in model.layers]
    with attach(model, W4A16) as attachment:
        found = model(X)
        attachment.require_calls()
        require_rounded(attachment)
        (row,) = attachment.evidence()
        assert (row.site, row.calls, row.elements) == ("layers.0.up_proj", 2, 64 * 64)
        assert list(model.state_dict()) == keys
        assert torch.equal(copy.deepcopy(model)(X), found)
    assert torch.equal(found, x)
    assert [type(layer["up_proj"]) for layer in model.layers] == kinds
    assert not any("injected" in layer["up_proj"].__dict__ for layer in model.layers)


def test_the_gradient_of_both_uses_reaches_the_master(model):
    with attach(model, W4A16):
        model(X).square().sum().backward()
    weight = model.layers[0]["up_proj"].weight
    copied = fake_quantize(weight.detach(), MXFP4).requires_grad_()
    x = X
    for layer in model.layers:
        x = linear(x, copied, layer["up_proj"].bias).tanh()
    x.square().sum().backward()
    assert torch.allclose(weight.grad, copied.grad, rtol=1e-5, atol=1e-5)


def test_the_table_says_where_else_it_stands(model):
    (plan,) = resolve(model, W4A16).plans
    assert plan.site.also == ("layers.1.up_proj",)
    assert plan.note == "one weight with layer 1"


@pytest.mark.parametrize("pattern", ["layers.0.*", "*.layers.1.*", "layers.1.up_proj"])
def test_a_pattern_for_either_place_means_the_site(model, pattern):
    stem = nn.Module()
    stem.model = model
    whole = stem if pattern.startswith("*.") else model
    injection = Injection.model_validate({"mode": "w4a16", "by_pattern": {pattern: "mxfp8"}})
    (plan,) = resolve(whole, injection).plans
    assert plan.weight.name == "mxfp8"


def test_a_layer_that_is_replaced_at_its_second_place_is_noticed(model):
    with attach(model, W4A16):
        model.layers[1]["up_proj"] = nn.Linear(64, 64)
        with pytest.raises(InvalidValueError, match=r"layers\.1\.up_proj was put into the model after the injection"):
            model(X)


def test_a_head_that_shares_its_weight_is_still_refused():
    class Headed(Twice):
        def get_output_embeddings(self):
            return self.layers[1]["up_proj"]

    injection = Injection.model_validate({"mode": "w4a16", "targets": {"opt_in": ["lm_head"]}})
    with pytest.raises(InvalidValueError, match=r"layers\.1\.up_proj shares its weight with layers\.0\.up_proj"):
        resolve(Headed(False), injection)


EVERYWHERE = {"weight": ["rollout", "training", "evaluation", "reference"]}


def test_codes_in_the_place_of_a_shared_weight_are_refused_and_the_cure_works(model):
    packed = {"mode": "w4a16", "frozen_base": "packed", "apply_during": EVERYWHERE}
    model.requires_grad_(False)
    with pytest.raises(InvalidValueError) as refusal:
        resolve(model, Injection.model_validate(packed))
    assert str(refusal.value) == (
        "layers.0.up_proj: frozen_base: packed needs a weight for each layer, and layers.1.up_proj shares this one; "
        "take frozen_base: copy"
    )
    assert len(resolve(model, Injection.model_validate(packed | {"frozen_base": "copy"})).plans) == 1


def test_walking_names_a_shared_weight_once(model):
    assert [site.name for site in walk(model) if site.kind == "linear"] == ["layers.0.up_proj"]
