"""The exact places of the models this project is about, read from shapes alone."""

from collections import Counter

import pytest
import torch
import zoo_families as families
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from fp4rl.sites.attention import is_attention
from fp4rl.sites.walk import layer_count, layer_of, plain_name, walk


@pytest.fixture(scope="module")
def dense():
    config = Qwen2Config(
        num_hidden_layers=28,
        hidden_size=1536,
        intermediate_size=8960,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return Qwen2ForCausalLM(config)


@pytest.fixture(scope="module")
def experts():
    config = Qwen3MoeConfig(
        num_hidden_layers=4,
        hidden_size=2048,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        moe_intermediate_size=768,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        return Qwen3MoeForCausalLM(config)


DENSE_SHAPES = {
    "self_attn.q_proj": (1536, 1536),
    "self_attn.k_proj": (256, 1536),
    "self_attn.v_proj": (256, 1536),
    "self_attn.o_proj": (1536, 1536),
    "mlp.gate_proj": (8960, 1536),
    "mlp.up_proj": (8960, 1536),
    "mlp.down_proj": (1536, 8960),
}


def test_the_linears_of_a_28_layer_qwen(dense):
    linears = {site.name: site.shape for site in walk(dense) if site.kind == "linear"}
    expected = {f"model.layers.{i}.{name}": shape for i in range(28) for name, shape in DENSE_SHAPES.items()}
    assert linears == expected | {"lm_head": (151936, 1536)}
    assert layer_count(walk(dense)) == 28


def test_a_tied_head_names_the_weight_it_shares(dense):
    (head,) = (site for site in walk(dense) if site.role == "lm_head")
    assert head.shares == "model.embed_tokens"


def test_the_weights_of_a_qwen3_moe_layer(experts):
    sites = {
        site.name.removeprefix("model.layers.3."): (site.kind, site.role, site.shape)
        for site in walk(experts)
        if site.layer == 3 and site.kind not in ("norm", "attention")
    }
    assert sites == {
        "self_attn.q_proj": ("linear", "q", (4096, 2048)),
        "self_attn.k_proj": ("linear", "k", (512, 2048)),
        "self_attn.v_proj": ("linear", "v", (512, 2048)),
        "self_attn.o_proj": ("linear", "o", (2048, 4096)),
        "mlp.experts.gate_up_proj": ("experts", "gate_up", (128, 1536, 2048)),
        "mlp.experts.down_proj": ("experts", "down", (128, 2048, 768)),
        "mlp.gate": ("router", "router", (128, 2048)),
    }


def test_every_attention_is_a_place_too(dense):
    assert Counter(site.kind for site in walk(dense))["attention"] == 28


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("_orig_mod.model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("module.base_model.model.model.layers.0.q_proj.base_layer", "model.layers.0.q_proj"),
        ("model.layers.0._fsdp_wrapped_module.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("base_model.model.lm_head.modules_to_save.default", "lm_head"),
        ("model.modules.0.module", "model.modules.0.module"),
    ],
)
def test_wrappers_leave_no_trace_in_a_name(path, name):
    assert plain_name(path) == name


def test_the_layer_is_the_first_whole_number():
    assert layer_of("model.layers.12.mlp.experts.3.w1") == 12
    assert layer_of("lm_head") is None


def test_a_bare_layer_is_named_by_its_class():
    (site,) = walk(nn.Linear(4, 2))
    assert (site.name, site.path, site.shape) == ("Linear", "", (2, 4))


def test_a_router_that_is_a_linear_layer_is_a_router():
    block = nn.ModuleDict({"gate": nn.Linear(8, 4), "gate_proj": nn.Linear(8, 8)})
    assert {site.name: site.kind for site in walk(block)} == {"gate": "router", "gate_proj": "linear"}


class Headed(nn.Module):
    """A model whose head has a name of its own, beside a state space that reads a weight without calling the layer."""

    def __init__(self):
        super().__init__()
        self.mixer = nn.Module()
        self.mixer.A_log = nn.Parameter(torch.zeros(4))
        self.mixer.dt_proj = nn.Linear(4, 8)
        self.dt_proj, self.fc1, self.output_projection = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 50)

    def get_output_embeddings(self):
        return self.output_projection


def test_a_role_is_told_by_its_use_and_not_by_a_name():
    roles = {site.name: site.role for site in walk(Headed()) if site.kind == "linear"}
    assert roles == {"mixer.dt_proj": "dt_proj", "dt_proj": "linear", "fc1": "linear", "output_projection": "lm_head"}


@pytest.mark.parametrize(
    ("family", "roles"),
    [
        ("phi3", {"qkv_proj": "qkv", "o_proj": "o", "gate_up_proj": "gate_up", "down_proj": "down"}),
        ("gpt_neox", {"query_key_value": "qkv", "dense": "o", "dense_h_to_4h": "linear", "dense_4h_to_h": "linear"}),
        ("dbrx", {"Wqkv": "qkv", "out_proj": "o"}),
        ("mpt", {"Wqkv": "qkv", "out_proj": "o", "up_proj": "up", "down_proj": "down"}),
        ("jetmoe", {"kv_proj": "kv"}),
        ("mamba", {"in_proj": "linear", "x_proj": "linear", "dt_proj": "dt_proj", "out_proj": "o"}),
    ],
)
def test_fused_linears_are_named_by_their_parts(family, roles):
    sites = [site for site in walk(families.tiny(family)) if site.kind == "linear" and site.role != "lm_head"]
    assert {site.name.rpartition(".")[2]: site.role for site in sites} == roles


@pytest.mark.parametrize(
    ("family", "mixing"),
    [
        ("recurrent_gemma", {"linear_x", "linear_y", "linear_out", "q_proj", "k_proj", "v_proj", "o_proj"}),
        ("lfm2_moe", {"in_proj", "out_proj", "q_proj", "k_proj", "v_proj"}),
        ("mamba2", {"in_proj", "out_proj"}),
    ],
)
def test_all_that_mixes_tokens_is_in_the_part_attention(family, mixing):
    sites = [site for site in walk(families.tiny(family)) if site.kind == "linear" and site.part == "attention"]
    assert {site.name.rpartition(".")[2] for site in sites} == mixing


@pytest.mark.parametrize(
    ("family", "name"), [("mpt", "lm_head"), ("biogpt", "output_projection"), ("rwkv", "head"), ("gpt_neox", "lm_head")]
)
def test_the_head_is_what_makes_logits_whatever_it_is_called(family, name):
    heads = [site for site in walk(families.tiny(family)) if site.part == "head"]
    assert [(site.name, site.role, site.shape) for site in heads] == [(name, "lm_head", (50, 64))]


@pytest.mark.parametrize(
    ("family", "layer", "together"),
    [
        ("rwkv", "attention", []),
        ("rwkv", "feed_forward", []),
        ("ctrl", "multi_head_attention", [["Wq", "Wk", "Wv"]]),
        ("opt", "self_attn", [["k_proj", "v_proj", "q_proj"]]),
        ("nemotron", "mlp", []),
        ("lfm2", "feed_forward", [["w1", "w3"]]),
    ],
)
def test_a_group_is_of_layers_that_read_one_tensor(family, layer, together):
    """Fault: RWKV's key and value, each of which reads a tensor of its own, were a group."""
    groups = {}
    for site in walk(families.tiny(family)):
        if site.layer == 0 and site.parent.endswith(layer) and site.fused_group:
            groups.setdefault(site.fused_group, []).append(site.name.rpartition(".")[2])
    assert [group for group in groups.values() if len(group) > 1] == together


@pytest.mark.parametrize(
    ("kind", "children", "parameters", "holds"),
    [
        ("GPT2Attention", ["c_attn", "c_proj"], [], True),
        ("Phi3Attention", ["qkv_proj", "o_proj"], [], True),
        ("BertSelfAttention", ["query", "key", "value"], [], True),
        ("Plain", ["q_proj", "k_proj", "v_proj"], [], True),
        ("RwkvFeedForward", ["key", "receptance", "value"], [], False),
        ("MiniMaxLightningAttention", ["qkv_proj", "out_proj"], [], False),
        ("OlmoHybridGatedDeltaNet", ["q_proj", "k_proj", "v_proj"], ["A_log", "dt_bias"], False),
        ("DeepseekV4HCACompressor", ["kv_proj", "gate_proj"], [], False),
        ("KimiLinearDeltaAttention", ["q_proj", "k_proj", "v_proj"], ["forget_gate.A_log"], False),
    ],
)
def test_attention_is_what_keeps_keys_and_values(kind, children, parameters, holds):
    module = type(kind, (nn.Module,), {})()
    for name in children:
        module.add_module(name, nn.Linear(4, 4))
    for name in parameters:
        holder, _, last = name.rpartition(".")
        if holder:
            module.add_module(holder, nn.Module())
        module.get_submodule(holder).register_parameter(last, nn.Parameter(torch.zeros(4)))
    assert is_attention(module) is holds


def test_a_layer_that_attends_to_the_keys_of_another_is_attention_by_its_class():
    kind = type("Gemma4TextAttention", (nn.Module,), {})
    own, sharing = kind(), kind()
    for name in ("q_proj", "k_proj", "v_proj"):
        own.add_module(name, nn.Linear(4, 4))
    sharing.add_module("q_proj", nn.Linear(4, 4))
    model = nn.ModuleDict({"a": own, "b": sharing})
    assert [site.name for site in walk(model) if site.kind == "attention"] == ["a", "b"]


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("KimiLinearForgetGate", "linear"), ("MuseSparkResidualGate", "linear"), ("HunYuanMoEV1Gate", "router")],
)
def test_a_gate_of_another_thing_than_experts_is_no_router(kind, wanted):
    gate = type(kind, (nn.Module,), {})()
    gate.f_proj = nn.Linear(4, 4)
    (site,) = walk(nn.ModuleDict({"mixer": gate}))
    assert site.kind == wanted
