"""Real model classes: stacked experts in every implementation, the cache of a generation, hooks that pass by."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fp4rl.inject.attach import attach
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.spec.errors import CheckFailed
from fp4rl.spec.formats import MXFP4, NVFP4
from fp4rl.spec.injection import Injection
from fp4rl.spec.targets import Targets

SHAPE = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
IDS = torch.arange(1, 25).view(2, 12)
EXPERTS = Targets(take=("*.experts.*",))


def moe(implementation, dtype=torch.float32):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, vocab_size=50, **SHAPE
    )
    model = Qwen3MoeForCausalLM(config).to(dtype)
    model.set_experts_implementation(implementation)
    return model


def dense(attention="sdpa"):
    torch.manual_seed(0)
    config = Qwen2Config(intermediate_size=96, vocab_size=50, tie_word_embeddings=False, **SHAPE)
    config._attn_implementation = attention
    return Qwen2ForCausalLM(config).eval()


def each_expert(weight, fmt):
    return torch.stack([fake_quantize(expert, fmt) for expert in weight.detach()])


@pytest.mark.parametrize("fmt", [MXFP4, NVFP4], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_stacked_experts_compute_with_every_expert_rounded_as_a_tensor_of_its_own(implementation, fmt):
    model = moe(implementation)
    oracle = copy.deepcopy(model)
    for layer in oracle.model.layers:
        experts = layer.mlp.experts
        for name in ("gate_up_proj", "down_proj"):
            getattr(experts, name).data = each_expert(getattr(experts, name), fmt)
    injection = Injection(weight=fmt, targets=EXPERTS, dtype="float32")
    with attach(model, injection):
        found = model(IDS, labels=IDS)
        found.loss.backward()
    expected = oracle(IDS, labels=IDS)
    expected.loss.backward()
    assert torch.allclose(found.logits, expected.logits, atol=1e-5)
    for one, other in zip(model.parameters(), oracle.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-6)
    assert not torch.allclose(found.logits, moe(implementation)(IDS).logits, atol=1e-3)


def test_inputs_of_stacked_experts_are_rounded_at_both_matmuls():
    model, seen = moe("eager"), []
    real = torch.nn.functional.linear
    injection = Injection(input="mxfp4", targets=EXPERTS)

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is real and args[0].ndim == 2 and tuple(args[1].shape) in ((64, 64), (64, 32)) and len(args) == 2:
                seen.append(args[0].detach())
            return func(*args, **(kwargs or {}))

    with attach(model, injection) as harmed, torch.no_grad(), Spy():
        model(IDS)
        rows = {row.site.rpartition(".")[2]: row for row in harmed.evidence()}
    rounded = [x for x in seen if torch.equal(x, fake_quantize(x.bfloat16(), MXFP4).float())]
    assert len(rounded) >= 2 * 2 * 2  # two layers, two matmuls, at least two experts in use
    assert rows["gate_up_proj"].elements == 24 * 2 * 64
    assert rows["down_proj"].elements == 24 * 2 * 32


def test_between_forwards_an_experts_parameter_reads_as_the_master():
    model = moe("grouped_mm")
    experts = model.model.layers[0].mlp.experts
    master = experts.gate_up_proj
    with attach(model, Injection(weight=MXFP4, targets=EXPERTS)):
        model(IDS)
        assert experts.gate_up_proj is master
        assert "gate_up_proj" in dict(experts.named_parameters())


def test_experts_follow_the_optimizer():
    model = moe("grouped_mm")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
    injection = Injection.named("w4a16")
    with attach(model, injection) as harmed:
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        harmed.set_phase("rollout")
        fresh = moe("grouped_mm")
        fresh.load_state_dict(model.state_dict())
        with torch.no_grad(), attach(fresh, injection):
            assert torch.equal(model(IDS).logits, fresh(IDS).logits)


def test_frozen_experts_are_rounded_once_in_every_phase():
    model = moe("grouped_mm").requires_grad_(False)
    with attach(model, Injection(weight=MXFP4, targets=EXPERTS)) as harmed, torch.no_grad():
        for phase in ("training", "rollout", "training"):
            harmed.set_phase(phase)
            for _ in range(2):
                model(IDS)
        assert sum(row.elements for row in harmed.evidence()) == 3 * 2 * 4 * 3 * 64 * 32


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_rounded_cache_gives_the_same_next_token_with_and_without_reading_it_back(attention):
    model = dense(attention)
    with attach(model, Injection(kv_cache="mxfp4")) as harmed, torch.no_grad():
        whole = model(IDS).logits[:, -1]
        cache = model(IDS[:, :-1], use_cache=True).past_key_values
        stepwise = model(IDS[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
        assert {row.calls for row in harmed.evidence()} == {3}
    assert torch.allclose(whole, stepwise, atol=1e-5)
    assert not torch.allclose(whole, model(IDS).logits[:, -1], atol=1e-4)


def test_sdpa_and_eager_attention_round_the_same_cache():
    found = []
    for attention in ("sdpa", "eager"):
        model = dense(attention)
        with attach(model, Injection(kv_cache="mxfp4")), torch.no_grad():
            found.append(model(IDS).logits)
    assert torch.allclose(*found, atol=1e-5)


def test_a_generation_counts_every_token():
    model = dense()
    with attach(model, Injection.named("w4a16")) as harmed:
        harmed.set_phase("rollout")
        model.generate(IDS, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
        rows = harmed.evidence()
    assert len(rows) == 14
    assert {(row.phase, row.calls, row.looks) for row in rows} == {("rollout", 5, 1)}


def test_a_head_that_is_read_but_not_called_is_noticed():
    """What TRL's training forward does to lm_head."""
    model = dense()
    targets = Targets(opt_in=("lm_head",))
    with attach(model, Injection.named("w4a16", targets=targets)) as harmed:
        hidden = model.model(IDS).last_hidden_state
        nn.functional.linear(hidden, model.lm_head.weight)
        with pytest.raises(CheckFailed, match=r"1 of 15 sites was never called during training.*lm_head"):
            harmed.require_calls()


def test_a_width_that_32_does_not_divide_is_rounded_with_a_short_block():
    torch.manual_seed(0)
    config = LlamaConfig(intermediate_size=172, vocab_size=50, **SHAPE)
    model = LlamaForCausalLM(config)
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(3, 172)
    with attach(model, Injection.named("w4a4", dtype="float32")):
        found = layer(x)
    assert torch.allclose(found, fake_quantize(x, MXFP4) @ fake_quantize(layer.weight, MXFP4).T, atol=1e-5)


def test_q_k_and_v_share_one_rounding_of_their_input(monkeypatch):
    model, calls = dense(), []
    real = fake_quantize
    monkeypatch.setattr("fp4rl.inject.site.fake_quantize", lambda *a, **k: calls.append(a[0].shape) or real(*a, **k))
    with attach(model, Injection(input="mxfp4")) as harmed, torch.no_grad():
        model(IDS)
        rows = harmed.evidence()
    assert len(calls) == 2 * 4  # qkv, o, gate and up, down
    assert len(rows) == 14
    assert all(row.calls == 1 and row.elements > 0 and row.share_changed > 0.5 for row in rows)
