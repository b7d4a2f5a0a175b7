"""Attention whose cache holds one latent vector for all heads (MLA): that and the rotary key are what is rounded."""

import copy
import pickle

import pytest
import torch
import zoo_families as families
import zoo_oracle as oracle
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

from fp4rl.inject.attach import attach
from fp4rl.inject.resolve import resolve
from fp4rl.inject.validate import require_eager_attention
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.injection import Injection

IDS = torch.arange(3, 27).view(2, 12)
LATENT, ROTARY, LAYERS = 32, 16, 2
CACHED = IDS.numel() * (LATENT + ROTARY) * LAYERS
CACHE = {"kv_cache": "mxfp4", "dtype": "float32"}


@pytest.fixture
def model():
    return families.tiny("deepseek_v3")


def through(x):
    return x + (oracle.mxfp4(x.detach()) - x).detach()


def logits(model):
    return model(IDS, use_cache=False).logits


def test_the_latent_and_the_rotary_key_are_rounded_and_the_gradient_passes(model, monkeypatch):
    twin = copy.deepcopy(model)
    with attach(model, Injection.model_validate(CACHE)) as attachment:
        found = logits(model)
        found.square().sum().backward()
        attachment.require_calls()
        assert sum(row.elements for row in attachment.evidence()) == CACHED
    plain = logits(twin).detach()
    for layer in twin.model.layers:
        layer.self_attn.kv_a_layernorm.register_forward_hook(lambda _module, _given, x: through(x))
    rotated = deepseek.apply_rotary_pos_emb_interleave
    monkeypatch.setattr(
        deepseek,
        "apply_rotary_pos_emb_interleave",
        lambda q, k, *rest: (lambda pair: (pair[0], through(pair[1])))(rotated(q, k, *rest)),
    )
    wanted = logits(twin)
    wanted.square().sum().backward()
    assert torch.allclose(found, wanted, rtol=0, atol=1e-9)
    assert (plain - wanted).norm() / wanted.norm() > 1e-3
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert one.grad is None or torch.allclose(one.grad, other.grad, rtol=1e-6, atol=1e-9), name


def test_token_by_token_is_the_same_as_in_one_pass(model):
    with attach(model, Injection.model_validate(CACHE)), torch.no_grad():
        whole, cache, parts = logits(model), None, []
        for token in IDS.T:
            out = model(token[:, None], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=0, atol=1e-9)


def test_errors_in_the_products_come_beside_a_rounded_cache(model):
    error = {"kind": "relative", "point": "scores", "scale": 0.01}
    with attach(model, Injection.model_validate(CACHE | {"errors": [error]})) as attachment, torch.no_grad():
        logits(model)
        attachment.require_calls()
        rows = {row.point: 0 for row in attachment.evidence()}
        for row in attachment.evidence():
            rows[row.point] += row.elements
    assert rows == {"kv_cache": CACHED, "relative@scores/forward": 2 * 4 * 12 * 12 * LAYERS}


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_rounds_alike_and_nothing_is_left_behind(model, twin_of):
    before, plain = type(model.model.layers[0].self_attn), logits(model)
    with attach(model, Injection.model_validate(CACHE)):
        assert torch.equal(logits(twin_of(model)), logits(model))
    assert type(model.model.layers[0].self_attn) is before
    assert torch.equal(logits(model), plain)


def test_a_class_that_expands_its_latents_elsewhere_is_refused_by_name_and_the_cure_works(model, monkeypatch):
    attention = model.model.layers[0].self_attn
    (site, *_) = [plan.site for plan in resolve(model, Injection.model_validate(CACHE)).plans]
    monkeypatch.delattr(type(attention), "expand_kv")
    with pytest.raises(InvalidValueError) as refusal:
        require_eager_attention(site, attention, cached=True)
    assert str(refusal.value) == (
        "model.layers.0.self_attn: DeepseekV3Attention caches one latent vector for all heads (MLA) and expands it out "
        "of reach, in no method expand_kv; leave it out: targets.leave: [model.layers.0.self_attn]"
    )
