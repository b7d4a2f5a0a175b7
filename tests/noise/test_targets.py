"""Which weights take noise: norms by their looks, never a router, an adapter or the output head."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from fp4rl.noise.schedule import multiplier_at
from fp4rl.noise.targets import noisy_weights
from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.noise import Multipliers, Noise


class OurRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.q_norm, self.k_norm = nn.Linear(8, 8), OurRMSNorm(), OurRMSNorm()


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(8, 4), nn.ModuleList([nn.Linear(8, 8)])


class Block(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = OurRMSNorm(), OurRMSNorm()
        self.self_attn, self.mlp = Attention(), mlp


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([Block(nn.Sequential(nn.Linear(8, 8))), Block(Experts())])
        self.norm, self.lm_head = OurRMSNorm(), nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.embed_tokens.weight


def _names(**targets):
    return [w.name for w in noisy_weights(Model(), Noise(targets=targets))]


def test_by_default_every_norm_but_those_of_queries_and_keys_and_in_expert_layers_only_the_one_before_the_experts():
    assert _names() == [
        "layers.0.input_layernorm.weight",
        "layers.0.post_attention_layernorm.weight",
        "layers.1.post_attention_layernorm.weight",
        "norm.weight",
    ]


def test_final_norm_and_qk_norms_are_choices():
    assert "norm.weight" not in _names(final_norm=False)
    assert "layers.0.self_attn.q_norm.weight" in _names(qk_norms=True)


def test_the_moe_rule_can_be_widened():
    assert "layers.1.input_layernorm.weight" in _names(moe="all")


def test_linear_targets_spare_the_router_and_the_tied_head():
    assert _names(kinds=["linear"]) == [
        "layers.0.self_attn.q_proj.weight",
        "layers.0.mlp.0.weight",
        "layers.1.self_attn.q_proj.weight",
        "layers.1.mlp.experts.0.weight",
    ]


def test_patterns_leave_weights_out_and_must_match():
    assert not any("layers.0" in name for name in _names(leave=["layers.0.*"]))
    with pytest.raises(NotFoundError, match="layernrom"):
        _names(leave=["*.input_layernrom.weight"])


def test_a_model_without_norms_is_an_error_and_not_a_silent_run():
    with pytest.raises(NotFoundError, match="no weight of Sequential takes noise"):
        noisy_weights(nn.Sequential(nn.Linear(4, 4)), Noise())


def test_a_weight_that_two_modules_share_takes_noise_once():
    model = Model()
    model.layers[1].input_layernorm.weight = model.layers[0].input_layernorm.weight
    assert len(noisy_weights(model, Noise(targets={"moe": "all"}))) == 4


def test_multipliers_for_layers_that_do_not_exist_are_refused():
    with pytest.raises(InvalidValueError, match="last layer is 1"):
        noisy_weights(Model(), Noise(multipliers={"by_layer": {2: 1.5}}))


def test_zones_split_ends_from_the_middle_and_change_at_a_share_of_the_run():
    zones = {"edge_share": 0.2, "edge": {"value": 2.0, "later": 0.5, "changes_at": 0.5}, "middle": 1.25}
    multipliers = Multipliers(zones=zones, by_layer={4: 9.0}, others=0.1)

    def at(share):
        return [multiplier_at(multipliers, layer, 10, share) for layer in range(10)]

    assert at(0.0) == [2.0, 2.0, 1.25, 1.25, 9.0, 1.25, 1.25, 1.25, 2.0, 2.0]
    assert at(0.5) == [0.5, 0.5, 1.25, 1.25, 9.0, 1.25, 1.25, 1.25, 0.5, 0.5]
    assert multiplier_at(multipliers, None, 10, 0.0) == 0.1


def test_a_zone_that_changes_cannot_be_used_without_saying_how_far_the_run_is():
    noise = Noise(multipliers={"zones": {"edge": {"value": 2.0, "later": 1.0, "changes_at": 0.5}}})
    with pytest.raises(InvalidValueError, match="pass `share`"):
        noisy_weights(Model(), noise)
    assert noisy_weights(Model(), noise, share=0.9)[0].multiplier == 1.0


def test_a_factor_that_changes_without_saying_when_is_refused():
    with pytest.raises(ValidationError, match="needs both"):
        Multipliers(zones={"edge": {"value": 2.0, "later": 1.0}})


def test_a_noise_spec_survives_being_written_and_read():
    noise = Noise(schedule="cosine", multipliers={"by_layer": {3: 2.0}, "zones": {"edge": 1.5}})
    assert Noise.model_validate(noise.model_dump(mode="json")) == noise
    assert hash(noise) == hash(Noise.model_validate(noise.model_dump(mode="json")))


def test_a_key_that_nobody_reads_is_refused():
    with pytest.raises(ValidationError, match="num_stages"):
        Noise(schedule={"kind": "constant", "sigma": 0.1, "num_stages": 10})


def test_float32_noise_on_linear_weights_is_refused():
    with pytest.raises(ValidationError, match="for norms only"):
        Noise(precision="float32", targets={"kinds": ["linear"]})


def test_the_bf16_control_is_the_same_noise_on_an_unquantized_model():
    arm = Experiment.model_validate({"injection": "w4a16", "noise": {"control": "bf16"}})
    assert arm.injection is None
    assert arm.noise.schedule == Noise().schedule
    assert Experiment.model_validate({"injection": "w4a16", "noise": {"control": "sigma_zero"}}).injection is not None
    assert Experiment.model_validate(arm.model_dump(mode="json")) == arm
