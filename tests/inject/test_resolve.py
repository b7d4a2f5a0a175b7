"""The site table: exact lists, a reason for everything left out, and errors that name the cure."""

from collections import Counter

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from fp4rl.inject.attach import attach
from fp4rl.inject.resolve import resolve
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.formats import MXFP4
from fp4rl.spec.injection import Injection
from fp4rl.spec.targets import Targets

ROLES = ("q", "k", "v", "o", "gate", "up", "down")
DENSE = {
    "self_attn.q_proj": (1536, 1536),
    "self_attn.k_proj": (256, 1536),
    "self_attn.v_proj": (256, 1536),
    "self_attn.o_proj": (1536, 1536),
    "mlp.gate_proj": (8960, 1536),
    "mlp.up_proj": (8960, 1536),
    "mlp.down_proj": (1536, 8960),
}
MOE = {
    "self_attn.q_proj": (4096, 2048),
    "self_attn.k_proj": (512, 2048),
    "self_attn.v_proj": (512, 2048),
    "self_attn.o_proj": (2048, 4096),
    "mlp.experts.gate_up_proj": (128, 1536, 2048),
    "mlp.experts.down_proj": (128, 2048, 768),
}
MOE_LEFT = {
    "self_attn": "attention: no point of an injection",
    "self_attn.q_norm": "norm: no point of an injection",
    "self_attn.k_norm": "norm: no point of an injection",
    "mlp.gate": "left by '*.gate'",
    "input_layernorm": "norm: no point of an injection",
    "post_attention_layernorm": "norm: no point of an injection",
}


def on_meta(kind, config):
    with torch.device("meta"):
        return kind(config)


@pytest.fixture(scope="module")
def dense():
    shape = {"num_hidden_layers": 28, "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12}
    return on_meta(Qwen2ForCausalLM, Qwen2Config(num_key_value_heads=2, tie_word_embeddings=True, **shape))


@pytest.fixture(scope="module")
def moe():
    shape = {"num_hidden_layers": 4, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4}
    config = Qwen3MoeConfig(num_experts=128, moe_intermediate_size=768, head_dim=128, **shape)
    return on_meta(Qwen3MoeForCausalLM, config)


def in_layers(count, places):
    return [(f"model.layers.{i}.{place}", fact) for i in range(count) for place, fact in places.items()]


def small(**targets):
    return Injection.named("w4a16", targets=Targets(**targets), fused_groups="free")


def test_w4a16_takes_the_196_linears_of_a_28_layer_qwen_and_nothing_else(dense):
    table = resolve(dense, Injection.named("w4a16"))
    assert [(plan.name, plan.site.shape) for plan in table.plans] == in_layers(28, DENSE)
    assert len(table.plans) == 196
    assert Counter(plan.site.role for plan in table.plans) == dict.fromkeys(ROLES, 28)
    assert [plan.site.layer for plan in table.plans] == [i for i in range(28) for _ in ROLES]


def test_everything_left_out_has_its_reason(dense):
    table = resolve(dense, Injection.named("w4a16"))
    reasons = {left.site.name: left.reason for left in table.left_out}
    assert len(reasons) == 28 * 3 + 3  # two norms and the attention of each layer, final norm, embedding, head
    assert reasons["lm_head"] == "left by '*lm_head*'"
    assert reasons["model.embed_tokens"].startswith("embedding")


def test_w4a16_of_a_qwen3_moe_takes_attention_and_stacked_experts_but_no_router(moe):
    table = resolve(moe, Injection.named("w4a16"))
    per_layer = Counter(plan.site.role for plan in table.plans)
    assert per_layer == dict.fromkeys(("q", "k", "v", "o", "gate_up", "down"), 4)
    assert [(plan.name, plan.site.shape) for plan in table.plans] == in_layers(4, MOE)
    left = {place.site.name: place.reason for place in table.left_out}
    outside = {"model.embed_tokens", "model.norm", "lm_head"}
    assert {name: reason for name, reason in left.items() if name not in outside} == dict(in_layers(4, MOE_LEFT))
    assert set(left) >= outside


def test_inputs_of_stacked_experts_are_reached_in_what_transformers_takes_by_itself(moe):
    assert moe.config._experts_implementation == "grouped_mm"
    assert len(resolve(moe, Injection.named("w4a4")).plans) == 4 * 6


def test_gradients_of_stacked_experts_are_rounded_as_those_of_linear_layers(moe):
    plans = resolve(moe, Injection.named("w4a4", grad_input="mxfp8")).plans
    assert {(plan.site.kind, plan.grad_input.name, plan.note) for plan in plans} == {
        ("linear", "mxfp8", ""),
        ("experts", "mxfp8", "computed by grouped_mm"),
    }


def test_layer_2_leaves_layers_20_to_27_alone(dense):
    table = resolve(dense, small(take=("*.layers.2.*",)))
    assert {plan.site.layer for plan in table.plans} == {2}
    assert len(table.plans) == 7


def test_layers_may_count_from_the_end(dense):
    table = resolve(dense, small(layers=(0, -1)))
    assert {plan.site.layer for plan in table.plans} == {0, 27}
    with pytest.raises(InvalidValueError, match="28 is not in this model"):
        resolve(dense, small(layers=(28,)))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"take": ("*.qproj",)}, r"no layer that can be rounded matches '\*\.qproj'; did you mean '\*\.q_proj'"),
        ({"take": ("*.layers.28.*",)}, r"matches '\*\.layers\.28\.\*'; did you mean '\*\.layers\.8\.\*'"),
        ({"leave": ("*.qproj", "*lm_head*")}, r"no site matches '\*\.qproj'; did you mean '\*\.q_proj'"),
        ({"take": ("*norm*",)}, "no layer that can be rounded matches"),
        ({"take": ("*lm_head*",)}, "nothing to inject in Qwen2ForCausalLM"),
    ],
)
def test_a_pattern_that_hits_nothing_names_the_nearest(dense, targets, message):
    with pytest.raises(NotFoundError, match=message):
        resolve(dense, small(**targets))


def test_a_pattern_of_the_table_that_hits_nothing_is_refused(dense):
    with pytest.raises(NotFoundError, match=r"did you mean '\*\.down_proj'"):
        resolve(dense, Injection.model_validate({"mode": "w4a16", "by_pattern": {"*.downproj": "mxfp8"}}))


def test_a_tied_head_is_never_rounded(dense):
    with pytest.raises(InvalidValueError, match=r"lm_head shares its weight with model\.embed_tokens"):
        resolve(dense, small(opt_in=("lm_head",)))


def test_the_head_needs_to_be_asked_for(moe):
    with pytest.raises(InvalidValueError, match=r"lm_head is the output head.*opt_in: \[lm_head\]"):
        resolve(moe, small(take=("lm_head",), leave_only=("*norm*",)))
    (plan,) = resolve(moe, small(take=("lm_head",), opt_in=("lm_head",))).plans
    assert "TRL's training forward" in plan.note


def test_opting_in_to_what_is_left_out_all_the_same_is_refused(dense):
    with pytest.raises(InvalidValueError, match=r"opt_in: \[router\] would do nothing"):
        resolve(dense, small(opt_in=("router",)))


def test_a_router_needs_to_be_asked_for(moe):
    with pytest.raises(InvalidValueError, match=r"mlp\.gate is a router.*opt_in: \[router\]"):
        resolve(moe, small(leave_only=("*lm_head*",)))


@pytest.mark.parametrize("name", ["*.q_proj", "*.gate_proj"])
def test_groups_that_serving_kernels_fuse_must_agree(dense, name):
    injection = {"mode": "w4a16", "by_pattern": {name: "mxfp8"}}
    with pytest.raises(InvalidValueError, match="a serving kernel fuses these"):
        resolve(dense, Injection.model_validate(injection))
    assert resolve(dense, Injection.model_validate({**injection, "fused_groups": "free"})).plans


def test_a_table_of_formats_gives_each_layer_its_own(dense):
    table = {"*.layers.27.*": {"weight": "none"}, "*.down_proj": "mxfp8"}
    plans = resolve(dense, Injection.model_validate({"mode": "w4a16", "by_pattern": table})).plans
    assert Counter((plan.site.role, plan.weight.name) for plan in plans)["down", "mxfp8"] == 27
    assert len(plans) == 27 * 7


def test_a_linear_with_a_forward_of_its_own_is_refused():
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    with pytest.raises(InvalidValueError, match=r"a is a Odd with a forward of its own.*leave: \['a'\]"):
        resolve(nn.ModuleDict({"a": Odd(32, 32)}), Injection.named("w4a16"))


@pytest.mark.parametrize("bias", [True, False])
def test_a_forward_of_its_own_that_computes_the_same_is_taken_and_nothing_is_drawn_to_find_out(bias):
    class Apart(nn.Linear):
        def forward(self, x):
            y = x @ self.weight.T
            return y if self.bias is None else y + self.bias

    model, x = nn.ModuleDict({"a": Apart(64, 32, bias=bias)}), torch.randn(3, 64)
    wanted = torch.nn.functional.linear(x, fake_quantize(model["a"].weight.detach(), MXFP4), model["a"].bias)
    before = torch.get_rng_state()
    with attach(model, Injection.named("w4a16", dtype="float32")):
        assert torch.equal(model["a"](x), wanted)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_forward_set_on_the_instance_is_refused():
    layer = nn.Linear(32, 32)
    layer.forward = lambda x: x
    with pytest.raises(InvalidValueError, match="forward set on the instance"):
        resolve(layer, Injection.named("w4a16"))


def test_a_parametrized_weight_is_refused():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
    with pytest.raises(InvalidValueError, match="a has no weight of its own"):
        resolve(nn.ModuleDict({"a": layer}), Injection.named("w4a16"))


def test_a_format_that_changes_nothing_is_refused():
    layer = nn.Linear(32, 32, dtype=torch.bfloat16)
    with pytest.raises(InvalidValueError, match="weight: bf16 changes nothing in a bfloat16 model"):
        resolve(layer, Injection(weight="bf16"))
    assert resolve(nn.Linear(32, 32), Injection(weight="bf16")).plans


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(NotFoundError, match="no layer that can be rounded"):
        resolve(nn.Embedding(4, 32), Injection.named("w4a16"))


def test_none_needs_no_target(dense):
    assert resolve(dense, Injection.named("none")).plans == ()


def test_the_digest_is_of_what_acts(dense):
    digest = resolve(dense, Injection.named("w4a16")).digest
    assert resolve(dense, Injection(weight="mxfp4")).digest == digest
    assert resolve(dense, Injection.named("w4a16", deployment="compressed_tensors")).digest != digest
    assert resolve(dense, Injection.named("w4a16", dtype="float32")).digest != digest
    assert resolve(dense, Injection.named("w4a16", apply_during=["rollout"])).digest != digest


def test_two_injections_that_act_alike_in_a_phase_have_one_digest_there(dense):
    one = resolve(dense, Injection.named("w4a16", straight_through="clipped"))
    other = resolve(dense, Injection.named("w4a16", apply_during=["evaluation"]))
    assert one.digest_in("evaluation") == other.digest_in("evaluation")
    assert one.digest_in("rollout") != other.digest_in("rollout")


def test_rows_are_plain_values(dense):
    row = resolve(dense, Injection.named("w4a16", deployment="compressed_tensors")).rows()[0]
    assert row == {
        "site": "model.layers.0.self_attn.q_proj",
        "kind": "linear",
        "role": "q",
        "part": "attention",
        "layer": 0,
        "shape": [1536, 1536],
        "weight": {"name": "mxfp4", "scale_rule": "even"},
    }
