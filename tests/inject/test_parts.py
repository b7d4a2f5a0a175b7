"""Rules by part of the model: `experts: mxfp4`, `attention: mxfp8`, `router: leave`; and the deployment made of them.

The oracle is a float64 computation in which every layer is rounded as written here, and the exporter's own list.
"""

from functools import partial

import pytest
import torch
import zoo_families as families
import zoo_oracle as oracle
from transformers import Qwen2Config, Qwen2ForCausalLM

from fp4rl.inject.attach import attach
from fp4rl.inject.label import label
from fp4rl.inject.resolve import resolve
from fp4rl.sites.walk import walk
from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.injection import Injection
from fp4rl.spec.retarget import in_format, under_deployment

# Worked out by hand from the sources of transformers: what stands in one layer with experts, and outside of layers.
_ATTENTION = {f"self_attn.{name}_proj": "attention" for name in "qkvo"} | {"self_attn": "attention"}
_STACKS = {"mlp.experts.gate_up_proj": "experts", "mlp.experts.down_proj": "experts", "mlp.gate": "router"}
_LATENT = dict.fromkeys(("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"), "attention")
_MLP = ("gate_proj", "up_proj", "down_proj")
PARTS = {
    ("qwen3_moe", 1): _ATTENTION | _STACKS,
    ("mixtral", 1): _ATTENTION | _STACKS,
    ("gpt_oss", 1): _ATTENTION
    | {"mlp.experts.gate_up_proj": "experts", "mlp.experts.down_proj": "experts"}
    | {"mlp.router": "router", "self_attn.sinks": "sinks"},
    ("deepseek_v3", 0): {f"self_attn.{name}": part for name, part in _LATENT.items()}
    | {"self_attn": "attention"}
    | {f"mlp.{name}": "mlp" for name in _MLP},
    ("deepseek_v3", 1): {f"self_attn.{name}": part for name, part in _LATENT.items()}
    | {"self_attn": "attention"}
    | _STACKS
    | {f"mlp.shared_experts.{name}": "shared_experts" for name in _MLP},
    ("llama4_text", 1): _ATTENTION
    | {"feed_forward.experts.gate_up_proj": "experts", "feed_forward.experts.down_proj": "experts"}
    | {"feed_forward.router": "router"}
    | {f"feed_forward.shared_expert.{name}": "shared_experts" for name in _MLP},
    ("qwen3_next", 0): {f"linear_attn.{name}": "attention" for name in ("in_proj_qkvz", "in_proj_ba", "out_proj")}
    | {"linear_attn.A_log": "other", "linear_attn.conv1d": "other"}
    | _STACKS
    | {"mlp.shared_expert_gate": "router"}
    | {f"mlp.shared_expert.{name}": "shared_experts" for name in _MLP},
}


@pytest.mark.parametrize(("family", "layer"), PARTS)
def test_every_site_belongs_to_a_part_of_the_model(family, layer):
    sites = walk(families.tiny(family))
    start = f"model.layers.{layer}."
    found = {site.name.removeprefix(start): site.part for site in sites if site.name.startswith(start)}
    norms = {name for name, part in found.items() if part == "norm" or "norm" in name}
    assert {name: part for name, part in found.items() if name not in norms and "dt_bias" not in name} == PARTS[
        family, layer
    ]
    outside = {site.name: site.part for site in sites if site.layer is None and site.part != "norm"}
    assert outside == {"model.embed_tokens": "embedding", "lm_head": "head"}


def recipe(**changes):
    parts = {"experts": "mxfp4", "attention": "mxfp8", "shared_experts": "mxfp8", "mlp": "mxfp8", "router": "leave"}
    return Injection.model_validate(
        {"weight": "mxfp4", "input": "mxfp8", "by_pattern": parts | changes, "dtype": "float32"}
    )


def test_a_rule_may_be_written_by_part():
    plans = resolve(families.tiny("deepseek_v3"), recipe()).plans
    assert {(plan.site.part, plan.weight.name, plan.input.name) for plan in plans} == {
        ("experts", "mxfp4", "mxfp4"),
        *((part, "mxfp8", "mxfp8") for part in ("attention", "shared_experts", "mlp")),
    }


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_ascends_recipe_for_experts_computes_what_is_written_out_by_hand(family):
    """MXFP4 weights and MXFP8 inputs in routed experts, MXFP8 in every other linear layer, router and head as ever."""
    model = families.tiny(family).double()
    model.config._experts_implementation_internal = "eager"
    twin = oracle.twin(model, oracle.Rounded(oracle.mxfp8, oracle.mxfp8))
    for module in twin.modules():
        if type(module).__name__.endswith("Experts"):
            module.forward = partial(oracle.expert_oracle._experts, module, oracle.Rounded(oracle.mxfp4, oracle.mxfp8))
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad(), attach(model, Injection.named("w4a8", "ascend950_moe", dtype="float32")) as harmed:
        found = model(ids).logits
        harmed.require_calls()
    with torch.no_grad():
        assert torch.allclose(found, twin(ids).logits, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(found, model(ids).logits, rtol=1e-2, atol=1e-2)
    left = {left.site.part for left in harmed.table.left_out}
    assert left >= {"router", "head", "embedding"}
    assert left.isdisjoint({"experts", "shared_experts", "mlp"})


# As msModelSlim 26.1 lists the types of a dense Qwen2 in quant_model_description.json, W4A8.
EXPORTED = {
    **{f"model.layers.0.self_attn.{name}_proj": "W4A8_MXFP" for name in "qkvo"},
    **{f"model.layers.0.mlp.{name}": "W4A8_MXFP" for name in _MLP},
    **dict.fromkeys(("model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"), "FLOAT"),
    **dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head"), "FLOAT"),
}


def test_what_is_left_is_what_the_exporter_leaves():
    shape = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, vocab_size=50, **shape))
    table = resolve(model, Injection.named("w4a8", "ascend950"))
    found = {plan.name: "W4A8_MXFP" for plan in table.plans}
    assert found | {left.site.name: "FLOAT" for left in table.left_out if left.site.kind != "attention"} == EXPORTED


def test_the_deployment_says_it_in_two_rules_behind_those_that_are_written():
    own = {"attention": "leave", "*.layers.0.*": "mxfp6_e2m3"}
    injection = Injection.model_validate({"mode": "w4a8", "deployment": "ascend950_moe", "by_pattern": own})
    assert [row.pattern for row in injection.by_pattern] == ["attention", "*.layers.0.*", "experts", "*"]
    assert Injection.model_validate(injection.model_dump(mode="json")) == injection
    assert [row.pattern for row in under_deployment(injection, "ascend950").by_pattern] == ["attention", "*.layers.0.*"]
    assert in_format(injection, "mxfp6_e2m3").by_pattern[2].weight.name == "mxfp6_e2m3"
    assert not Injection.named("none", "ascend950_moe").by_pattern


def test_the_label_names_both_formats():
    injection = Injection.named("w4a8", "ascend950_moe")
    assert label(resolve(families.tiny("qwen3_moe"), injection)) == "w4a8, 8 sites mxfp8"


def test_a_deployment_for_experts_is_refused_in_a_model_without():
    """Fault: the part was taken for a misspelt pattern: 'did you mean model.layers.1.mlp.up_proj'."""
    in_part = "no layer that can be rounded is in the part {} of this model; its parts with one: {}$"
    with pytest.raises(NotFoundError, match=in_part.format("'experts'", "attention, head, mlp")):
        resolve(families.tiny("qwen3"), Injection.named("w4a8", "ascend950_moe"))
    with pytest.raises(NotFoundError, match=in_part.format("'sinks'", "attention, experts, head, router")):
        resolve(families.tiny("gpt_oss"), Injection.model_validate({"mode": "w4a4", "by_pattern": {"sinks": "mxfp8"}}))


@pytest.mark.parametrize("part", ["router", "head"])
def test_a_rule_for_what_is_left_out_all_the_same_is_refused(part):
    """The kind: a rule that is written, matches, and does nothing."""
    with pytest.raises(InvalidValueError, match=rf"by_pattern: '{part}' would do nothing: left by '\*"):
        resolve(families.tiny("deepseek_v3"), recipe(**{part: "mxfp8"}))


def test_targets_and_errors_take_parts_too():
    model = families.tiny("qwen3_moe")
    taken = resolve(model, Injection.model_validate({"mode": "w4a16", "targets": {"take": "experts"}})).plans
    assert {plan.site.part for plan in taken} == {"experts"}
    errors = {"errors": [{"targets": {"take": ["experts", "attention"], "layers": [1]}}]}
    assert len(resolve(model, Injection.model_validate(errors)).plans) == 6


def test_a_part_that_the_model_lacks_is_refused_and_a_word_inside_a_name_is_no_part():
    with pytest.raises(NotFoundError, match="in the part 'shared_experts' of this model"):
        resolve(
            families.tiny("mixtral"),
            Injection.model_validate({"mode": "w4a16", "by_pattern": {"shared_experts": "mxfp8"}}),
        )
    with pytest.raises(NotFoundError, match=r"matches '\*attention\*'"):
        resolve(
            families.tiny("mixtral"),
            Injection.model_validate({"mode": "w4a16", "by_pattern": {"*attention*": "mxfp8"}}),
        )
