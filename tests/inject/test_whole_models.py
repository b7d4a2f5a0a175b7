"""Whole tiny models of transformers against the same model computed in float64 by hand (`expert_oracle`).

The kind of fault: a model class whose weights are stored or multiplied in another way than `F.linear` does, so that a
part of it is left as it is, rounded along the wrong axis, or not found at all. Equal to the oracle, or refused by name.
"""

import copy

import expert_oracle
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from fp4rl.inject.attach import attach
from fp4rl.inject.probe import require_rounded
from fp4rl.inject.resolve import resolve
from fp4rl.sites.walk import walk
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.injection import Injection

MODES = ("w4a16", "w4a8", "w4a4", "w4a4_out")
IDS = torch.arange(3, 27).view(2, 12)
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
COMMON = {**SHAPE, "vocab_size": 50, "intermediate_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FEW, LOCAL = {"num_experts_per_tok": 2, "num_experts": 4}, {"num_experts_per_tok": 2, "num_local_experts": 4}
NARROW = {"moe_intermediate_size": 32, "head_dim": 16}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
GROUPS = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "num_key_value_heads": 4,
}
FAMILIES = {
    "Qwen3Moe": FEW | NARROW,
    "GptOss": LOCAL | {"head_dim": 16, "layer_types": ["full_attention"] * 2},
    "Llama4": LOCAL | {"head_dim": 16, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 1},
    "JetMoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16},
    "Mixtral": LOCAL,
    "Olmoe": FEW,
    "Phimoe": LOCAL,
    "GraniteMoe": LOCAL,
    "DeepseekV3": {"num_experts_per_tok": 2, "moe_intermediate_size": 32} | LATENT | GROUPS,
    "Qwen2Moe": FEW | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    "AriaText": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
}
# What a mode is refused for, in the words of the refusal.
REFUSED = {("GptOss", "w4a4_out"): "adds a bias after its matmul"}


def tiny(family):
    torch.manual_seed(0)
    name = "Llama4Text" if family == "Llama4" else family
    config = getattr(transformers, f"{name}Config")(**COMMON | FAMILIES[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.config._experts_implementation_internal = "eager"  # the grouped kernel takes no double precision
    return model.eval().double()


def equal_to_the_oracle(model, injection):
    with attach(model, injection) as harmed, torch.no_grad():
        found = model(IDS).logits
        harmed.require_calls()
        assert all(row.elements and row.share_changed > 0 for row in harmed.evidence())
        require_rounded(harmed)
        assert "experts" not in {left.site.kind for left in harmed.table.left_out}
    with torch.no_grad():
        wanted = expert_oracle.oracle_model(model, injection)(IDS).logits
        plain = model(IDS).logits
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-6)
    assert (plain - wanted).norm() / wanted.norm() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_of_experts_computes_what_the_oracle_computes(family):
    model = tiny(family)
    for mode in MODES:
        injection = Injection.named(mode, dtype="float32")
        if reason := REFUSED.get((family, mode)):
            with pytest.raises(InvalidValueError, match=reason):
                resolve(model, injection)
            continue
        equal_to_the_oracle(model, injection)


def test_the_cure_for_outputs_of_biased_experts_is_taken():
    patterns = {"*.experts.*": {"output": "none"}}
    equal = resolve(tiny("GptOss"), Injection.model_validate({"mode": "w4a4_out", "by_pattern": patterns})).plans
    assert {(plan.site.kind, plan.output is None) for plan in equal} == {("linear", False), ("experts", True)}


def test_the_experts_of_jetmoe_are_sites_and_its_routers_are_routers():
    kinds = {site.name: (site.kind, site.shape) for site in walk(tiny("JetMoe")) if site.layer == 1}
    assert kinds["model.layers.1.mlp.input_linear"] == ("experts", (4, 192, 64))
    assert kinds["model.layers.1.mlp.output_linear"] == ("experts", (4, 64, 96))
    assert kinds["model.layers.1.self_attention.experts.input_linear"] == ("experts", (4, 32, 64))
    assert {name for name, (kind, _) in kinds.items() if kind == "router"} == {
        "model.layers.1.mlp.router.layer",
        "model.layers.1.self_attention.experts.router.layer",
    }


def test_the_experts_of_llama4_are_written_as_their_matmul_uses_them():
    sites = {site.name: site for site in walk(tiny("Llama4")) if site.kind == "experts" and site.layer == 0}
    assert {name.rpartition(".")[2]: (site.shape, site.transposed) for name, site in sites.items()} == {
        "gate_up_proj": ((4, 192, 64), True),
        "down_proj": ((4, 64, 96), True),
    }


def test_experts_in_one_matrix_are_refused_by_name_and_can_be_left():
    config = transformers.DbrxConfig(d_model=64, n_heads=4, n_layers=2, vocab_size=50, max_seq_len=64)
    config.attn_config.rope_theta = 1e4
    with torch.device("meta"):
        model = transformers.DbrxForCausalLM(config)
    reason = (
        r"ffn.experts.mlp.w1: DbrxExpertGLU holds all its experts in one matrix.*leave: \['\*\.ffn\.experts\.mlp\.\*'\]"
    )
    with pytest.raises(InvalidValueError, match=reason):
        resolve(model, Injection.named("w4a16"))
    targets = {"leave": ["*.ffn.experts.mlp.*", "*router*", "*lm_head*"]}
    table = resolve(model, Injection.model_validate({"mode": "w4a16", "targets": targets}))
    assert {plan.name.rpartition(".")[2] for plan in table.plans} == {"Wqkv", "out_proj"}


def gpt2():
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=32, vocab_size=50, n_inner=96)
    ).eval()


@pytest.mark.parametrize("mode", MODES)
def test_gpt2_rounds_its_transposed_weights_along_the_inputs(mode):
    """Fault: 'the model has no linear layers'. Right: the float64 oracle, which rounds W.T of [in, out] in rows."""
    equal_to_the_oracle(gpt2().double(), Injection.named(mode, dtype="float32"))


def test_gpt2_trains_through_its_rounding_as_the_oracle_does():
    model, injection = gpt2().double(), Injection.named("w4a4", dtype="float32")
    twin = expert_oracle.oracle_model(model, injection)
    twin(IDS, labels=IDS).loss.backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with attach(model, injection):
        model(IDS, labels=IDS).loss.backward()
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, before[name])
        assert torch.allclose(one.grad, other.grad, rtol=1e-7, atol=1e-10), name


def test_gpt2_follows_its_optimizer_generates_and_is_itself_again():
    model, injection = gpt2(), Injection.named("w4a4")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
    plain = model(IDS).logits
    with attach(model, injection) as harmed:
        shapes = {plan.name: plan.site.shape for plan in harmed.table.plans if plan.site.layer == 1}
        assert list(shapes.values()) == [(192, 64), (64, 64), (96, 64), (64, 96)]
        harmed.set_phase("reference")
        assert torch.equal(model(IDS).logits, plain)
        harmed.set_phase("training")
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        harmed.set_phase("rollout")
        model.generate(IDS[:, :3], max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert require_rounded(harmed) == 8
        fresh = gpt2()
        fresh.load_state_dict(model.state_dict())
        with torch.no_grad(), attach(fresh, injection):
            assert torch.equal(model(IDS).logits, fresh(IDS).logits)


def test_adapters_of_gpt2_ride_on_the_rounded_base_and_what_cannot_be_is_refused():
    plan = LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False)
    model = get_peft_model(gpt2(), plan)
    with attach(model, Injection.named("w4a16")) as harmed:
        model(IDS, labels=IDS).loss.backward()
        harmed.require_calls()
        assert len(harmed.table.plans) == 8
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    everywhere = {"weight": ["rollout", "training", "evaluation", "reference"]}
    packed = {"mode": "w4a16", "frozen_base": "packed", "apply_during": everywhere}
    with pytest.raises(InvalidValueError, match=r"stored \[in, out\] \(Conv1D\); take frozen_base: copy"):
        resolve(model, Injection.model_validate(packed))


def test_adapters_of_gpt2_are_merged_before_rounding_though_its_weights_are_stored_in_out():
    plan = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    model, injection = get_peft_model(gpt2().double(), plan), Injection.named("w4a16", lora="merged", dtype="float32")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    merged = copy.deepcopy(model).merge_and_unload()
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    twin = expert_oracle.oracle_model(merged, injection)
    wanted = twin(IDS, labels=IDS)
    wanted.loss.backward()
    with attach(model, injection) as harmed:
        found = model(IDS, labels=IDS)
        found.loss.backward()
        harmed.require_calls()
        require_rounded(harmed)
    assert torch.allclose(found.logits, wanted.logits, rtol=0, atol=1e-9)
    for name, layer in model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # the sum is W + 2 (B A)^T
        grad = twin.get_submodule(name.removeprefix("base_model.model.")).weight.grad
        assert torch.allclose(a.grad, 2 * b.T @ grad.T, rtol=1e-6, atol=1e-10)
        assert torch.allclose(b.grad, 2 * grad.T @ a.T, rtol=1e-6, atol=1e-10)
        assert a.grad.norm() > 0


@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match")  # peft's own, of its table for experts
@pytest.mark.parametrize("lora", ["adapter", "merged"])
def test_all_linear_adapts_stacked_experts_which_are_rounded_as_written_out(lora):
    """Fault: KeyError 'down_proj' at the first forward of LoRA on a mixture of experts."""
    model = get_peft_model(tiny("Qwen3Moe"), LoraConfig(r=2, target_modules="all-linear")).double()
    assert any("experts" in name and "lora_" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    whole = copy.deepcopy(model).merge_and_unload()
    with attach(model, Injection.named("w4a16", dtype="float32", lora=lora)) as injected:
        found = model(IDS, labels=IDS)
        found.loss.backward()
        injected.require_calls()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    wanted = expert_oracle.oracle_model(whole, Injection.named("w4a16", dtype="float32"))(IDS).logits
    assert torch.allclose(found.logits, wanted, rtol=1e-6, atol=1e-6) == (lora == "merged")


@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match")  # peft's own, of its table for experts
def test_an_adapter_on_attention_alone_leaves_the_experts_rounded():
    attention = get_peft_model(tiny("Qwen3Moe").float(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with attach(attention, Injection.named("w4a4")) as injected:
        attention(IDS, labels=IDS).loss.backward()
        injected.require_calls()
        assert {plan.site.kind for plan in injected.table.plans} == {"linear", "experts"}
    assert any(p.grad.abs().sum() > 0 for p in attention.parameters() if p.requires_grad)
