"""Precision that changes over the steps: the format before, the blend and the format itself, by value."""

import copy
import json
import pickle

import pytest
import torch
from expert_kinds import arguments, experts_of, rooted
from torch import nn

from fp4rl.cli.main import main
from fp4rl.inject.attach import attach
from fp4rl.inject.probe import require_rounded
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.spec.errors import CheckFailed
from fp4rl.spec.formats import MXFP4, MXFP8
from fp4rl.spec.injection import Injection
from fp4rl.spec.retarget import under_deployment

TO_W4A4 = {"mode": "w4a4", "schedule": {"input": {"before": "mxfp8", "from_step": 2, "over": 3}}}


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.ModuleDict({"q_proj": nn.Linear(64, 32, bias=False), "o_proj": nn.Linear(32, 64, bias=False)}).to(dtype)


def run(described, step, dtype=torch.float32, phase="training"):
    layers, x = model(dtype), torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    with attach(layers, Injection.model_validate(described)) as attachment:
        attachment.set_phase(phase, step)
        return layers["o_proj"](layers["q_proj"](x)), attachment.evidence()


def formula(x, share, before):
    """before(x) + lambda (after(x) - before(x)), in float64 from the values of both formats."""
    seen = x.to(torch.bfloat16)
    first = x.double() if before is None else fake_quantize(seen, before).double()
    return first + share * (fake_quantize(seen, MXFP4).double() - first)


@pytest.mark.parametrize(("step", "as_if"), [(0, "w4a8"), (1, "w4a8"), (5, "w4a4"), (99, "w4a4"), (None, "w4a4")])
def test_outside_the_blend_the_bits_are_those_of_the_one_mode_or_the_other(step, as_if):
    assert torch.equal(run(TO_W4A4, step)[0], run(as_if, None)[0])
    assert torch.equal(run(TO_W4A4, step, phase="evaluation")[0], run("w4a4", None)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("before", [MXFP8, None])
@pytest.mark.parametrize("step", [2, 3, 4])
def test_the_blend_is_its_formula_in_float64_for_weights_and_inputs(dtype, before, step):
    """lambda is 1/4, 1/2, 3/4 at the three steps between; a unit matrix shows the operands themselves."""
    own = {"before": before.name if before else "none", "from_step": 2, "over": 3}
    described = Injection.model_validate({"mode": "w4a4", "schedule": {"input": own, "weight": own}})
    layer = nn.ModuleDict({"q_proj": nn.Linear(64, 64, bias=False)}).to(dtype)
    x = torch.randn(64, 64).to(dtype)
    seen = []
    with attach(layer, described) as attachment:
        attachment.set_phase("training", step)
        require_rounded(attachment)
        state = attachment.states["q_proj"]
        seen = [(x, state.rounded_input(x)), (layer["q_proj"].weight, state.rounded_weight(layer["q_proj"]))]
    for master, operand in seen:
        expected = formula(master.detach(), (step - 1) / 4, before)
        close = 2**-8 if dtype == torch.bfloat16 else 2**-22
        assert operand.dtype == dtype
        assert (operand.detach().double() - expected).abs().max() <= close * expected.abs().max()
        assert not torch.equal(operand, fake_quantize(master.detach().to(torch.bfloat16), MXFP4).to(dtype))


def test_the_evidence_tells_the_stages_apart():
    layers = model()
    with attach(layers, Injection.model_validate(TO_W4A4)) as attachment:
        for step in range(6):
            attachment.set_phase("rollout", step)
            layers["q_proj"](torch.randn(4, 64))
        rows = [row for row in attachment.evidence() if (row.site, row.point) == ("q_proj", "input")]
    told = {(row.stage, row.format): (row.calls, row.elements) for row in rows}
    blend = "mxfp8 to mxfp4"
    assert told == {("before", "mxfp8"): (2, 512), ("blend", blend): (3, 768), (None, "mxfp4"): (1, 256)}


def test_a_point_that_is_not_rounded_yet_counts_nothing_and_has_its_own_numbers():
    described = {"mode": "w4a4", "schedule": {"input": {"from_step": 3}}}
    output, rows = run(described, 2)
    assert torch.equal(output, run("w4a16", None)[0])
    assert {row.point for row in rows} == {"weight"}
    assert {row.point for row in run(described, 3)[1]} == {"weight", "input"}


def test_a_copy_of_the_model_acts_at_the_step_of_the_original():
    layers = model()
    with attach(layers, Injection.model_validate(TO_W4A4)) as attachment:
        attachment.set_phase("training", 3)
        x = torch.randn(4, 64)
        for again in (copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))):
            assert torch.equal(again["q_proj"](x), layers["q_proj"](x))


def test_clipped_gradients_are_blended_like_the_values():
    """One value far above the others is clipped by MXFP4 (floor) and by nothing in full precision."""
    own = {"from_step": 1, "over": 3}
    described = {"mode": "w4a4", "straight_through": "clipped", "schedule": {"input": own}}
    layer = nn.ModuleDict({"q_proj": nn.Linear(32, 1, bias=False)})
    nn.init.ones_(layer["q_proj"].weight)
    with attach(layer, Injection.model_validate(described)) as attachment:
        passed = []
        for step in (0, 1, 2, 3, 4):
            x = torch.full((1, 32), 0.5)
            x[0, 0] = 7.9
            x.requires_grad_()
            attachment.set_phase("training", step)
            layer["q_proj"](x).sum().backward()
            passed.append((x.grad[0, 0].item(), x.grad[0, 1].item()))
    assert passed == [(1.0, 1.0), (0.75, 1.0), (0.5, 1.0), (0.25, 1.0), (0.0, 1.0)]


def test_the_probe_notices_a_copy_of_another_step():
    layers = model()
    with attach(
        layers, Injection.model_validate({"mode": "w4a16", "schedule": {"weight": {"before": "mxfp8", "from_step": 1}}})
    ) as attachment:
        attachment.set_phase("rollout", 0)
        layers["o_proj"](layers["q_proj"](torch.randn(4, 64)))
        stale = {name: state.cache._held for name, state in attachment.states.items()}
        attachment.set_phase("rollout", 1)
        for name, state in attachment.states.items():
            state.cache._held = stale[name]
        with pytest.raises(CheckFailed, match="other numbers than the master"):
            require_rounded(attachment)


@pytest.mark.parametrize("mode", ["w4a4", "nvfp4_w4a4"])
def test_stacked_experts_follow_it_too(mode):
    """Each expert is rounded for itself in every stage; the probe compares with numerics alone."""
    schedule = {point: {"before": "mxfp8", "from_step": 1, "over": 1} for point in ("weight", "input")}
    experts = rooted(experts_of("mixtral", "MixtralExperts", (64, 96)).float(), 64)
    given = [x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments("MixtralExperts", 64)]
    outputs = []
    with attach(experts, Injection.named(mode, schedule=schedule)) as harmed:
        for step in (0, 1, 2):
            harmed.set_phase("rollout", step)
            outputs.append(next(experts.children())(*given))
            harmed.require_calls()
            assert require_rounded(harmed) == 2
    with attach(experts, Injection.named(mode)):
        assert torch.equal(outputs[2], next(experts.children())(*given))
    with attach(experts, Injection.named("w8a8")):
        assert torch.equal(outputs[0], next(experts.children())(*given))
    assert not torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ({"mode": "w4a16", "schedule": {"input": {"from_step": 1}}}, "the injection has no input to change to"),
        (
            {"mode": "w4a4", "schedule": {"input": {"before": "mxfp4", "from_step": 1}}},
            "is the format of input already",
        ),
        (
            {"mode": "w4a4", "apply_during": ["evaluation"], "schedule": {"input": {"from_step": 1}}},
            "names neither rollout nor training",
        ),
        (
            {"mode": "nvfp4_w4a16", "schedule": {"weight": {"before": "nvfp4", "from_step": 1}}},
            "no common factor",
        ),
        (
            {
                "mode": "w4a16",
                "frozen_base": "packed",
                "apply_during": ["rollout", "training", "evaluation", "reference"],
                "schedule": {"weight": {"from_step": 1}},
            },
            "packed weights have codes of one format",
        ),
        ({"mode": "w4a16", "lora": "merged", "schedule": {"weight": {"from_step": 1}}}, "or write lora: adapter"),
    ],
)
def test_what_cannot_change_is_refused_with_the_cure(described, said):
    with pytest.raises(ValueError, match=said):
        Injection.model_validate(described)


def test_a_first_format_follows_the_rules_of_the_deployment():
    described = {
        "mode": "w4a4",
        "deployment": "ascend950",
        "schedule": {"input": {"before": "mxfp8", "from_step": 1}},
    }
    (first,) = Injection.model_validate(described).formats_before("input")
    assert first == Injection.named("w4a8", "ascend950").input


def test_another_deployment_has_its_own_rules_for_the_first_format_too():
    described = {"mode": "w4a4", "deployment": "ascend950", "schedule": {"input": {"before": "mxfp8", "from_step": 1}}}
    there = under_deployment(Injection.model_validate(described), "vllm_blackwell")
    assert there == Injection.model_validate(described | {"deployment": "vllm_blackwell"})


def test_a_plan_prints_which_steps_compute_in_which_format(tmp_path, capsys):
    schedule = {"input": {"before": "mxfp8", "from_step": 20, "over": 5}, "weight": {"from_step": 1}}
    spec = tmp_path / "trial.json"
    spec.write_text(json.dumps({"training": {"steps": 30}, "injection": {"mode": "w4a4", "schedule": schedule}}))
    assert main(["plan", str(spec), "--runs", str(tmp_path), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert [(each["point"], each["steps"], each["computed_in"]) for each in row["precision"]] == [
        ("weight", "0", "none"),
        ("weight", "1 to 29", "mxfp4"),
        ("input", "0 to 19", "mxfp8"),
        ("input", "20 to 24", "a blend of mxfp8 and mxfp4"),
        ("input", "25 to 29", "mxfp4"),
    ]
    assert main(["plan", str(spec), "--runs", str(tmp_path)]) == 0
    assert "a blend of mxfp8 and mxfp4" in capsys.readouterr().out
