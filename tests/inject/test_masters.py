"""The master weights are bit-equal before and after everything that does not train them."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from fp4rl.inject import install
from fp4rl.inject.attach import attach
from fp4rl.inject.evidence import master_digest
from fp4rl.inject.linear import InjectedLinear
from fp4rl.spec.injection import Injection

SHAPE = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
INJECTIONS = {
    "w4a16": Injection.named("w4a16"),
    "w4a4": Injection.named("w4a4"),
    "everything": Injection.model_validate(
        {
            "mode": "w4a4",
            "kv_cache": "mxfp8",
            "grad_input": "mxfp8",
            "grad_weight": "mxfp8",
            "straight_through": "clipped",
            "errors": [{"kind": "relative", "when": "both"}, {"kind": "stuck", "share": 0.1, "point": "values"}],
            "apply_during": ["rollout", "training", "evaluation"],
        }
    ),
}


def tiny():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(intermediate_size=96, vocab_size=50, tie_word_embeddings=False, **SHAPE))


def tiny_experts(implementation="eager"):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, vocab_size=50, **SHAPE
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation(implementation)
    return model


IDS = torch.arange(1, 25).view(2, 12)


def generate(model):
    model.eval()
    model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)


def raise_inside(model):
    def explode(*_):
        raise RuntimeError("boom")

    hook = model.model.layers[1].register_forward_pre_hook(explode)
    with pytest.raises(RuntimeError, match="boom"):
        model(IDS)
    hook.remove()


def checkpointed_backward(model, reentrant=False):
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(IDS, labels=IDS).loss.backward()


DEEDS = {
    "a forward without gradients": lambda model: torch.no_grad()(model)(IDS),
    "a forward without backward": lambda model: model(IDS),
    "generation": generate,
    "an exception": raise_inside,
    "a checkpointed backward": checkpointed_backward,
    "a reentrant checkpointed backward": lambda model: checkpointed_backward(model, reentrant=True),
    "zeros in a deep copy": lambda model: [p.data.zero_() for p in copy.deepcopy(model).parameters()],
}


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("deed", DEEDS)
def test_the_master_is_bit_equal_after(deed, injection):
    model = tiny()
    before, version = master_digest(model), [p._version for p in model.parameters()]
    with attach(model, INJECTIONS[injection]) as harmed:
        for phase in ("rollout", "training", "evaluation", "reference"):
            harmed.set_phase(phase)
            DEEDS[deed](model)
            assert master_digest(model) == before
    assert master_digest(model) == before
    assert [p._version for p in model.parameters()] == version


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_the_masters_of_stacked_experts_are_bit_equal_too(implementation):
    model = tiny_experts(implementation)
    before = master_digest(model)
    with attach(model, Injection.named("w4a16")):
        model(IDS, labels=IDS).loss.backward()
        generate(model)
        assert master_digest(model) == before
    assert master_digest(model) == before


def test_the_digest_sees_one_flipped_bit_and_a_renamed_weight():
    model = tiny()
    before = master_digest(model)
    model.model.norm.weight.data.view(torch.int32)[3] ^= 1
    assert master_digest(model) != before
    assert master_digest(nn.Linear(2, 2, bias=False)) != master_digest(nn.Bilinear(1, 2, 2, bias=False))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("injection", INJECTIONS)
def test_checkpointing_changes_no_gradient(injection, reentrant):
    grads = []
    for checkpointed in (False, True):
        model = tiny().train()
        with attach(model, INJECTIONS[injection]):
            if checkpointed:
                checkpointed_backward(model, reentrant)
            else:
                model.enable_input_require_grads()
                model(IDS, labels=IDS).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_taken_out_the_model_computes_as_before():
    model = tiny().eval()
    plain = model(IDS).logits
    for injection in INJECTIONS.values():
        with attach(model, injection):
            assert not torch.equal(model(IDS).logits, plain)
        assert torch.equal(model(IDS).logits, plain)
        assert not any("injected" in module.__dict__ for module in model.modules())


def test_a_deep_copy_computes_alike_and_counts_for_itself():
    model = tiny().eval()
    with attach(model, INJECTIONS["w4a4"]) as harmed:
        twin = copy.deepcopy(model)
        assert torch.equal(twin(IDS).logits, model(IDS).logits)
        calls = sum(row.calls for row in harmed.evidence())
        twin(IDS)
        assert sum(row.calls for row in harmed.evidence()) == calls
    assert isinstance(twin.model.layers[0].mlp.up_proj, InjectedLinear)
    assert not torch.equal(twin(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
def test_a_copied_layer_computes_as_its_original_does_at_that_step_and_in_that_phase(twin, injection):
    layer, x = nn.ModuleDict({"q_proj": nn.Linear(64, 64)}), torch.randn(2, 64)
    injection = INJECTIONS[injection].model_copy(update={"kv_cache": None})
    injection = injection.model_copy(update={"errors": tuple(e for e in injection.errors if e.point == "matmul")})
    with attach(layer, injection) as harmed:
        for phase in ("training", "rollout", "reference", "training"):
            harmed.set_phase(phase)
            assert torch.equal(twin(layer)["q_proj"](x), layer["q_proj"](x))


def test_an_injection_that_fails_half_way_leaves_the_model_as_it_was(monkeypatch):
    model = tiny()
    before, classes = master_digest(model), [type(module) for module in model.modules()]
    swapped, swap = [], install.swap

    def fails_at_the_third(module, state):
        if len(swapped) == 2:
            raise RuntimeError("boom")
        swapped.append(module)
        swap(module, state)

    monkeypatch.setattr(install, "swap", fails_at_the_third)
    with pytest.raises(RuntimeError, match="boom"):
        attach(model, INJECTIONS["w4a16"])
    monkeypatch.undo()
    assert [type(module) for module in model.modules()] == classes
    assert master_digest(model) == before
    attach(model, INJECTIONS["w4a16"]).remove()


def test_what_is_saved_is_the_master(tmp_path):
    model = tiny()
    before = master_digest(model)
    with attach(model, INJECTIONS["w4a4"]):
        model(IDS)
        model.save_pretrained(tmp_path)
    assert master_digest(AutoModelForCausalLM.from_pretrained(tmp_path)) == before


def test_autocast_changes_neither_the_rounded_weight_nor_the_gradient_dtype():
    layer, x = nn.Linear(64, 64), torch.randn(4, 64)
    with attach(layer, INJECTIONS["w4a4"]):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.float().sum().backward()
        expected = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), expected, rtol=1e-2, atol=1e-2)
    assert layer.weight.grad.dtype == torch.float32


def test_hooks_of_others_still_fire():
    layer, seen = nn.Linear(64, 64), []
    layer.register_forward_hook(lambda *_: seen.append("after"))
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    with attach(layer, INJECTIONS["w4a16"]):
        layer(torch.zeros(1, 64))
    assert seen == ["before", "after"]


def test_checkpoint_of_a_bare_layer_that_stops_early_is_exact():
    layer, x = nn.Linear(64, 64), torch.randn(4, 64, requires_grad=True)
    with attach(layer, INJECTIONS["w4a4"]):
        layer(x).square().sum().backward()
        plain = layer.weight.grad.clone(), x.grad.clone()
        layer.weight.grad = x.grad = None
        checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(layer.weight.grad, plain[0])
    assert torch.equal(x.grad, plain[1])
