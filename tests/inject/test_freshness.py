"""A rounded copy is never older than its weight: for every optimizer and every way of writing, live equals fresh."""

import copy
import gc
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from fp4rl.inject.attach import attach
from fp4rl.inject.cache import ACCELERATOR_INTERVAL, QuantCache
from fp4rl.inject.linear import LinearState
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.formats import MXFP4
from fp4rl.spec.injection import Injection

W4A16 = Injection.named("w4a16")
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, foreach=False, fused=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
    "sgd-fused": lambda p: torch.optim.SGD(p, 1e-2, fused=True),
}


def rounded(x):
    return fake_quantize(x.detach().bfloat16(), MXFP4).to(x.dtype)


def policy():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 32))


def fresh_logits(model, x):
    """What a copy that was just loaded computes under the same injection."""
    loaded = policy()
    loaded.load_state_dict(copy.deepcopy(model.state_dict()))
    with attach(loaded, W4A16) as harmed, torch.no_grad():
        harmed.set_phase("evaluation")
        return loaded(x)


def live_logits(model, harmed, x):
    harmed.set_phase("rollout")
    with torch.no_grad():
        first, again = model(x), model(x)
    assert torch.equal(first, again)
    harmed.set_phase("training")
    return first


@pytest.mark.parametrize("accumulate", [1, 8])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_live_logits_equal_a_fresh_copys_after_every_optimizer_step(name, accumulate):
    model, x = policy(), torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    optimizer = OPTIMIZERS[name](model.parameters())
    with attach(model, W4A16) as harmed:
        for _ in range(4):
            before = live_logits(model, harmed, x)
            for micro in x.chunk(accumulate):
                (model(micro) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            after = live_logits(model, harmed, x)
            assert torch.equal(after, fresh_logits(model, x))
            assert not torch.equal(after, before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_sample_alone_catches_an_optimizer_that_nobody_announced(name, monkeypatch):
    """The same without the hook on optimizers and without a change of phase."""
    model, x = policy(), torch.randn(16, 32)
    optimizer = OPTIMIZERS[name](model.parameters())
    with attach(model, W4A16):
        monkeypatch.setattr(LinearState, "stepped", lambda self: None)
        for _ in range(3):
            (model(x) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                assert torch.equal(model(x), fresh_logits(model, x))


def test_a_cache_keyed_on_the_version_alone_would_go_stale():
    """The reason for the sample: neither a fused step nor a write through .data changes `_version`."""
    weight = nn.Parameter(torch.randn(8, 8))
    weight.grad = torch.ones(8, 8)
    before, version = weight.detach().clone(), weight._version
    torch.optim.AdamW([weight], 1e-2, fused=True).step()
    weight.data.add_(1.0)
    assert weight._version == version
    assert not torch.equal(weight, before)


WRITES = {
    "through .data": lambda layer: layer.weight.data.mul_(2),
    "in place": lambda layer: layer.weight.detach().mul_(2),
    "a new tensor under .data": lambda layer: setattr(layer.weight, "data", layer.weight.data * 2),
    "a new parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach() * 2)),
    "load_state_dict": lambda layer: layer.load_state_dict({k: v * 2 for k, v in layer.state_dict().items()}),
    "load with assign": lambda layer: layer.load_state_dict(
        {k: v * 2 for k, v in layer.state_dict().items()}, assign=True
    ),
    "a cast": lambda layer: layer.double(),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("write", WRITES)
def test_every_way_of_writing_a_weight_is_noticed(write, frozen):
    layer, x = nn.Linear(64, 64), torch.randn(4, 64)
    layer.requires_grad_(not frozen)
    with attach(layer, W4A16) as harmed, torch.no_grad():
        harmed.set_phase("rollout")
        layer(x)
        layer(x)
        WRITES[write](layer)
        x = x.to(layer.weight.dtype)
        assert torch.equal(layer(x), linear(x, rounded(layer.weight), layer.bias))


def test_a_trainable_weight_is_rounded_once_between_two_optimizer_steps():
    model, x = policy(), torch.randn(16, 32)
    with attach(model, W4A16) as harmed:
        for micro in x.chunk(8):
            model(micro).sum().backward()
        rows = harmed.evidence()
    assert [row.calls for row in rows] == [8, 8]
    assert [row.elements for row in rows] == [32 * 64, 32 * 64]


def test_a_frozen_weight_is_rounded_once_for_all_optimizer_steps_of_a_phase():
    model, x = policy(), torch.randn(16, 32)
    model[0].requires_grad_(False)
    with attach(model, W4A16) as harmed:
        for _ in range(3):
            model(x).sum().backward()
            torch.optim.SGD(model[2].parameters(), 1e-2).step()
        assert [row.elements for row in harmed.evidence()] == [32 * 64, 3 * 32 * 64]


def test_a_weight_that_is_no_longer_frozen_is_rounded_again_after_a_step():
    layer, x = nn.Linear(64, 64).requires_grad_(False), torch.randn(4, 64)
    with attach(layer, W4A16), torch.no_grad():
        layer(x)
        layer.requires_grad_(True)
        layer.weight.grad = torch.zeros_like(layer.weight)
        layer.weight.grad[0, 1] = -100.0  # the sample reads every 64th value
        torch.optim.SGD([layer.weight], 1.0, fused=True).step()
        assert torch.equal(layer(x), linear(x, rounded(layer.weight), layer.bias))


@pytest.mark.parametrize("told", ["invalidate", "set_phase"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_write_outside_the_sample_is_rounded_once_it_is_told(frozen, told):
    layer, x = nn.Linear(64, 64).requires_grad_(not frozen), torch.randn(4, 64)
    with attach(layer, W4A16) as harmed, torch.no_grad():
        layer(x)
        layer.weight.data[5, 7] += 1  # one value, outside the sample
        harmed.invalidate() if told == "invalidate" else harmed.set_phase("training")
        assert torch.equal(layer(x), linear(x, rounded(layer.weight), layer.bias))


def test_frozen_weights_meet_the_points_of_the_new_phase():
    layer, x = nn.Linear(64, 64).requires_grad_(False), torch.randn(4, 64)
    plain = layer(x)
    with attach(layer, Injection.named("w4a16", apply_during=["rollout"])) as harmed, torch.no_grad():
        harmed.set_phase("rollout")
        assert not torch.equal(layer(x), plain)
        harmed.set_phase("evaluation")
        assert torch.equal(layer(x), plain)
        harmed.set_phase("rollout")
        assert not torch.equal(layer(x), plain)


def test_a_write_in_place_outside_the_sample_shows_in_the_version():
    layer, x = nn.Linear(64, 64), torch.randn(4, 64)
    with attach(layer, W4A16), torch.no_grad():
        layer(x)
        layer.weight[5, 7] += 1
        assert torch.equal(layer(x), linear(x, rounded(layer.weight), layer.bias))


def test_a_tensor_that_differs_outside_the_sample_shows_in_its_storage():
    layer, x = nn.Linear(64, 64), torch.randn(4, 64)
    with attach(layer, W4A16), torch.no_grad():
        layer(x)
        before = layer.weight.data  # held: memory that is free again may read as anything
        other = before.clone()
        other[5, 7] += 1
        layer.weight.data = other
        assert torch.equal(layer(x), linear(x, rounded(layer.weight), layer.bias))
        assert layer.weight.data_ptr() != before.data_ptr()


UNWATCHED = {
    "a strided weight": lambda: nn.Parameter(torch.randn(64, 64).T),
    "a weight of inference mode": torch.inference_mode()(
        lambda: nn.Parameter(torch.randn(64, 64), requires_grad=False)
    ),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", UNWATCHED)
def test_what_cannot_be_watched_is_rounded_at_every_call(kind, frozen):
    layer, x = nn.Linear(64, 64, bias=False), torch.randn(4, 64)
    layer.weight = UNWATCHED[kind]()
    with torch.inference_mode(), attach(layer.requires_grad_(not frozen), W4A16) as harmed:
        for _ in range(2):
            layer.weight.data.mul_(2)
            assert torch.equal(layer(x), linear(x, rounded(layer.weight)))
        assert harmed.evidence()[0].elements == 2 * 64 * 64


def test_a_copy_made_in_inference_mode_can_be_trained_with():
    layer, x = nn.Linear(64, 64), torch.randn(4, 64)
    with attach(layer, W4A16):
        with torch.inference_mode():
            layer(x)
        layer(x).sum().backward()
    assert torch.allclose(layer.weight.grad, x.sum(0).expand(64, 64), atol=1e-5)  # d sum(Wx) / dW, straight through


class Accelerated(nn.Parameter):
    """A parameter that says it lives on an accelerator."""

    is_cpu = False


def test_on_an_accelerator_the_sample_is_read_now_and_then_and_a_contradiction_stops_the_run():
    weight, kept = Accelerated(torch.randn(8, 8)), QuantCache("q_proj")
    kept.put(weight.detach() * 2, None, weight)
    weight.data.add_(1)
    for _ in range(ACCELERATOR_INTERVAL - 1):
        assert kept.get(weight) is not None
    with pytest.raises(CheckFailed, match="q_proj was written without notice"):
        kept.get(weight)


def test_a_graph_cannot_record_a_rounded_copy(monkeypatch):
    weight, kept = Accelerated(torch.randn(8, 8)), QuantCache("q_proj")
    kept.put(weight.detach() * 2, None, weight)
    module = SimpleNamespace(is_current_stream_capturing=lambda: True)  # as torch.cuda and torch.npu have it
    monkeypatch.setattr(torch, "get_device_module", lambda device: {"cpu": module}[device.type])
    with pytest.raises(InvalidValueError, match="q_proj: a CPU graph would replay today's rounding"):
        kept.get(weight)


def test_a_model_that_is_dropped_without_removal_is_freed():
    layer = nn.Linear(64, 64)
    attach(layer, W4A16)
    gone = weakref.ref(layer.__dict__["injected"])
    del layer
    gc.collect()
    assert gone() is None


def test_evidence_outlives_the_injection():
    layer = nn.Linear(64, 64)
    with attach(layer, W4A16) as harmed:
        layer(torch.randn(2, 64))
    assert [row.calls for row in harmed.evidence()] == [1]


def test_watching_a_weight_leaves_its_storage_free_to_be_resized():
    layer = policy()[0]
    with attach(layer, W4A16), torch.no_grad():
        layer(torch.randn(2, 32))
        before = layer(torch.ones(2, 32))
        kept, size = layer.weight.detach().clone(), layer.weight.untyped_storage().nbytes()
        layer.weight.untyped_storage().resize_(0)  # as an engine does that lends the memory out
        layer.weight.untyped_storage().resize_(size)
        layer.weight.copy_(kept)
        assert torch.equal(layer(torch.ones(2, 32)), before)


TWINS = {"itself": lambda model: model, "its copy": copy.deepcopy, "a pickle": lambda m: pickle.loads(pickle.dumps(m))}


@pytest.mark.parametrize("which", [*TWINS, "its copy after removal"])
def test_a_step_that_neither_version_nor_sample_shows_is_heard_of_by_a_model_and_its_copies(which):
    model, x = policy(), torch.randn(2, 32)
    with attach(model, W4A16) as harmed, torch.no_grad():
        one = TWINS[which.removesuffix(" after removal")](model)
        if "removal" in which:
            harmed.remove()
        weight, before = one[0].weight, one(x)
        weight.grad = torch.zeros_like(weight)
        weight.grad[0, 1] = -100.0  # the sample reads every 32nd value
        version = weight._version
        torch.optim.SGD([weight], 1.0, fused=True).step()
        assert weight._version == version
        assert not torch.equal(one(x), before)
        assert torch.equal(one(x), fresh_logits(one, x))
