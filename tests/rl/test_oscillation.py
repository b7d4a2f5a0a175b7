"""Codes that hop, by hand; dampening by its formula in float64; what is frozen stays."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fp4rl.inject.attach import attach
from fp4rl.inject.probe import expected
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.rl.masters import Masters
from fp4rl.rl.oscillation import OscillationWatch
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.formats import MXFP4
from fp4rl.spec.injection import Injection
from fp4rl.spec.load import parse
from fp4rl.spec.oscillation import Oscillation

DECAY = 0.8
SIZES = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 32, "head_dim": 16}
SIZES |= {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "n_positions": 64,
}


class One(nn.Module):
    """One linear layer; with a largest weight of 6, one block of 32 has the scale 1."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.layer = nn.Linear(32, 1, bias=False, dtype=dtype)
        with torch.no_grad():
            self.layer.weight.fill_(2.0)[0, 0] = 6.0


def watch(model, settings, masters=None):
    return OscillationWatch(attach(model, Injection.named("w4a16")), masters, Oscillation.model_validate(settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_between_two_codes_is_counted_and_frozen_by_hand(dtype):
    """0.7 rounds to 0.5 and 0.8 to 1.0. Turns 0, 1, 1, 1, 1 give the frequencies 0, .2, .36, .488, .5904: past .5 it is
    frozen; its mean level is then .5 * .8^5 + .2 * (1 + .8 * .5 + .64 + .512 * .5 + .4096) = .70496, nearest to 0.5."""
    model = One(dtype)
    masters = Masters.of(model)
    watched = watch(model, {"freeze": 0.5, "decay": DECAY}, masters)
    (exact,) = masters.parameters() if masters else model.parameters()

    def update(value, other=2.0):
        watched.before()
        with torch.no_grad():
            exact[0, 1], exact[0, 2] = value, other
        if masters:
            masters.write()
        return watched.after()

    with torch.no_grad():
        exact[0, 1] = 0.7
    if masters:
        masters.write()
    seen = [update(value) for value in (0.8, 0.7, 0.8, 0.7, 0.8)]
    assert [metrics["weights/code_flips"] for metrics in seen] == [1 / 32] * 5
    assert [metrics["weights/oscillating"] for metrics in seen] == [0, *[1 / 32] * 4]
    assert [metrics["weights/frozen"] for metrics in seen] == [0, 0, 0, 0, 1 / 32]
    kept = watched.kept["layer.weight"]
    assert float(kept["frequency"][0, 1]) == pytest.approx(1 - DECAY**4)
    assert exact[0, 1] == model.layer.weight[0, 1] == 0.5
    after = update(0.8, other=3.0)  # only the other weight moves
    assert after["weights/code_flips"] == 1 / 32
    assert exact[0, 1] == model.layer.weight[0, 1] == 0.5
    assert exact[0, 2] == model.layer.weight[0, 2] == 3.0
    (row,) = watched.rows()
    assert (row.weights, row.code_flips, row.frozen) == (32, pytest.approx(6 / 32 / 6), 1 / 32)


def test_dampening_adds_the_gradient_of_its_loss_and_none_beyond_the_grid():
    model, coefficient = One(torch.float64), 0.3
    with torch.no_grad():
        model.layer.weight[0] = torch.linspace(-7.5, 7.9, 32, dtype=torch.float64)
    watched = watch(model, {"dampen": coefficient})
    model.layer.weight.grad = torch.ones_like(model.layer.weight)
    watched.before()
    weight = model.layer.weight.detach().clone().requires_grad_()
    rounded = fake_quantize(weight.detach().bfloat16(), MXFP4).double()
    loss = coefficient * (rounded - weight.clamp(-6, 6)).square().sum()  # eq. 8 of the paper; the scale is 1
    loss.backward()
    assert torch.allclose(model.layer.weight.grad, 1 + weight.grad, rtol=1e-12)
    assert (weight.grad == 0).any()
    assert watched.after()["weights/dampening"] == pytest.approx(loss.item())


def usual(state, matrix):
    """The rounding without the average."""
    anchor, state.anchor = state.anchor, None
    rounded, state.anchor = expected(state, "weight", matrix.contiguous()), anchor
    return rounded


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("mode", ["w4a16", "nvfp4_w4a16"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt2", "qwen3"])
def test_levels_times_scales_are_the_rounded_weights_of_every_kind_of_site(family, mode, anchored):
    """Stacked experts, weights stored as [in, out], and layers under one factor; against the rounding of the probe."""
    more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64} if family == "qwen3_moe" else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **more))
    with attach(model, Injection.named(mode, dtype="float32")) as attachment:
        model(torch.arange(6)[None])
        watched = OscillationWatch(attachment, None, Oscillation()).watched
        assert len(watched) == len(attachment.states)
        for each in watched.values() if anchored else ():
            each.state.anchor = each.weight.detach().roll(1, -1)
        for each in watched.values():
            level, scale = each.levels()
            stored = each.state.as_used(each.weight.detach())
            matrices = stored if stored.ndim == 3 else stored[None]
            wanted = torch.stack([expected(each.state, "weight", m.contiguous(), n) for n, m in enumerate(matrices)])
            assert anchored != torch.equal(wanted, torch.stack([usual(each.state, m) for m in matrices]))
            assert torch.equal(each.state.as_used(level * scale), wanted.view(stored.shape))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({}, "no weight has codes in training"),
        ({"injection": "w16a4"}, "no weight has codes in training"),
        ({"injection": {"mode": "w4a16", "apply_during": ["evaluation"]}}, "no weight has codes in training"),
        ({"injection": {"weight": "mxfp4_sr"}}, "drawn anew"),
        ({"injection": {"weight": {"name": "mxfp4", "rotation": 32}}}, "leave dampen and freeze out"),
        ({"injection": "w4a16", "model": {"lora": {"rank": 4}}}, "adapters are trained"),
        (
            {"injection": {"mode": "w4a16", "schedule": {"weight": {"from_step": 2}}}},
            "changes the codes over the steps",
        ),
        ({"injection": "w4a16", "processes": 2, "sharding": "fsdp2"}, "write sharding: none"),
    ],
)
@pytest.mark.parametrize("training", [{"oscillation": {"dampen": 0.1}}, {"ema": {"decay": 0.9, "rounds": True}}])
def test_it_is_refused_where_no_code_could_be_followed(content, why, training):
    with pytest.raises(InvalidValueError, match=why.replace("dampen and freeze", "(dampen and freeze|it)")):
        parse(Experiment, {**content, "training": training}, "x.yaml")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"rollout": {"engine": "vllm"}}, "vllm rounds by itself"),
        ({"training": {"oscillation": {"freeze": 0.1}}}, "both decide on levels"),
    ],
)
def test_what_would_decide_otherwise_than_the_average_is_refused(content, why):
    training = {"ema": {"decay": 0.9, "rounds": True}, **content.pop("training", {})}
    with pytest.raises(InvalidValueError, match=why):
        parse(Experiment, {"injection": "w4a16", **content, "training": training}, "x.yaml")
