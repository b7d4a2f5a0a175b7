"""A call is no rounding: what the matmuls receive is compared by value, and every way past the rounding is caught."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import linear
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from fp4rl.inject.attach import attach
from fp4rl.inject.cache import QuantCache
from fp4rl.inject.linear import LinearState
from fp4rl.inject.probe import require_rounded
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.spec.errors import CheckFailed
from fp4rl.spec.formats import MXFP4
from fp4rl.spec.injection import Injection

ROTATED = {"name": "mxfp4", "rotation": 32}
SOUND = {
    "weights": {"mode": "w4a16"},
    "inputs": {"mode": "w16a4"},
    "both, in NVFP4": {"mode": "nvfp4_w4a4"},
    "outputs": {"mode": "w4a4_out"},
    "rotated": {"weight": ROTATED, "input": ROTATED, "output": ROTATED},
    "gradients": {"mode": "w4a4", "grad_input": "mxfp8", "grad_weight": "mxfp8"},
    "errors beside": {"mode": "w4a4", "errors": [{"kind": "relative", "when": "both"}]},
    "drawn": {"weight": "mxfp4_sr", "input": "mxfp4_sr"},
    "a stored error": {"mode": "w4a16", "errors": [{"kind": "stuck", "point": "weight", "when": "both", "share": 0.1}]},
}


def policy(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 32)).to(dtype)


def generate(model, rows=3):
    """Twice, since the second forward takes the kept copy; inputs lie on no grid."""
    with torch.no_grad():
        for seed in (0, 1):
            x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed))
            model(x.to(next(model.parameters()).dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SOUND)
def test_sound_layers_pass_in_every_phase_and_the_probe_leaves_no_trace(name, dtype):
    model = policy(dtype)
    with attach(model, Injection.model_validate(SOUND[name])) as harmed:
        for phase in ("rollout", "training", "evaluation", "reference"):
            harmed.set_phase(phase)
            generate(model)
            before = harmed.evidence()
            assert require_rounded(harmed) == 2
            assert harmed.evidence() == before
            harmed.require_calls()
        assert {row.missed for row in harmed.evidence()} == {0}


def master_returned(monkeypatch, phase):
    """The mutant: one phase computes with the master, and is called as often as ever."""
    made = LinearState._make

    def make(self, weight):
        return (weight.detach().clone(), None) if self.phase == phase else made(self, weight)

    monkeypatch.setattr(LinearState, "_make", make)


@pytest.mark.parametrize("phase", ["rollout", "training", "evaluation"])
def test_a_phase_that_is_called_and_rounds_nothing_is_caught_by_its_looks_and_by_the_probe(phase, monkeypatch):
    master_returned(monkeypatch, phase)
    model = policy()
    with attach(model, Injection.named("w4a4")) as harmed:
        harmed.set_phase(phase)
        generate(model)
        with pytest.raises(CheckFailed, match=f"2 of 2 sites were called during {phase} and rounded nothing: 0, 2"):
            harmed.require_calls()
        with pytest.raises(CheckFailed, match=r"at 2 of 2 sites .* 0 \(weight\), 2 \(weight\)"):
            require_rounded(harmed)
        rows = {(row.point, row.missed > 0, row.share_changed > 0) for row in harmed.evidence()}
        assert rows == {("weight", True, False), ("input", False, True)}


def test_a_matmul_whose_inputs_pass_unrounded_is_caught(monkeypatch):
    monkeypatch.setattr(LinearState, "rounded_input", lambda self, x: x)
    with attach(policy(), Injection.named("w4a4")) as harmed, pytest.raises(CheckFailed, match=r"0 \(input\)"):
        require_rounded(harmed)


def first_copy_returned(monkeypatch):
    """The defect of the prototype: the first rounded weight that a layer ever made is the one it goes on using."""
    copy_of = LinearState.copy_of

    def stale(self, weight, *made_from):
        new = copy_of(self, weight, *made_from)
        self.first = getattr(self, "first", new.detach().clone())
        return self.first

    monkeypatch.setattr(LinearState, "copy_of", stale)
    monkeypatch.setattr(QuantCache, "get", lambda *_: None)


def hidden_way(monkeypatch):
    """The same in the short way of generated tokens alone, which no counter and no look stands in."""
    first = {}

    def stale(self, weight):
        if torch.is_grad_enabled():
            return get(self, weight)
        if self.copy is not None:
            first.setdefault(self.name, self.copy)
        return first.get(self.name)

    get = QuantCache.get
    monkeypatch.setattr(QuantCache, "get", stale)


def test_outputs_rounded_in_place_of_inputs_are_caught(monkeypatch):
    """The fault that was made: a W4A4 that rounds what a layer gives, and not what its matmul is given."""

    def in_place(self, layer, x):
        self.count()
        return fake_quantize(linear(x, self.as_used(self.rounded_weight(layer)), layer.bias), MXFP4)

    model = policy()
    with attach(model, Injection.named("w4a4")) as harmed:
        generate(model)
        assert require_rounded(harmed) == 2
        monkeypatch.setattr(LinearState, "forward", in_place)
        with pytest.raises(CheckFailed, match=r"at 2 of 2 sites .* 0 \(input\)"):
            require_rounded(harmed)


@pytest.mark.parametrize("plant", [first_copy_returned, hidden_way])
def test_a_stale_copy_is_caught_after_the_first_update_while_every_counter_is_content(plant, monkeypatch):
    plant(monkeypatch)
    model = policy()
    with attach(model, Injection.named("w4a16")) as harmed:
        harmed.set_phase("rollout")
        generate(model)
        assert require_rounded(harmed) == 2
        torch.optim.SGD(model.parameters(), 0.1).step()  # no gradient, no change: still right
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.3)
        harmed.invalidate()
        generate(model)
        harmed.require_calls()
        with pytest.raises(CheckFailed, match="rollout: at 2 of 2 sites the matmul receives other numbers"):
            require_rounded(harmed)


def merged():
    torch.manual_seed(0)
    plan = LoraConfig(r=4, lora_alpha=12, target_modules=["0", "2"])
    return get_peft_model(nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 32)), plan)


def mixture():
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "head_dim": 32}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=20, **shape, **experts)).eval()


KINDS = {
    "merged adapters": (merged, lambda: torch.randn(3, 32), {"mode": "w4a4", "lora": "merged"}, 2),
    "stacked experts": (
        mixture,
        lambda: torch.arange(8).unsqueeze(0),
        {"mode": "w4a16", "targets": {"take": "*.experts.*"}},
        2,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_sums_and_of_experts_are_held_to_their_masters_too(kind, monkeypatch):
    make, rows, spec, sites = KINDS[kind]
    model, x = make(), rows()
    with attach(model, Injection.model_validate(spec)) as harmed:
        for phase in ("training", "rollout"):
            harmed.set_phase(phase)
            with torch.no_grad():
                model(x)
            harmed.require_calls()
            assert require_rounded(harmed) == sites
        monkeypatch.setattr(QuantCache, "get", lambda self, *weights: self.copy)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name or "experts" in name:
                    parameter.add_(0.3)
        with pytest.raises(CheckFailed, match=f"at {sites} of {sites} sites"):
            require_rounded(harmed)


@pytest.mark.parametrize("values", ["zeros", "on the grid", "packed"])
def test_what_no_rounding_changes_is_no_miss(values):
    model = policy()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            kept = fake_quantize(layer.weight.bfloat16(), MXFP4).float()
            layer.weight.copy_(kept * 0 if values == "zeros" else kept)
    model.requires_grad_(False)
    spec = {"mode": "w4a16"}
    if values == "packed":
        everywhere = {"weight": ["rollout", "training", "evaluation", "reference"]}
        spec |= {"frozen_base": "packed", "apply_during": everywhere}
    with attach(model, Injection.model_validate(spec)) as harmed:
        harmed.set_phase("rollout")
        generate(model)
        harmed.require_calls()
        require_rounded(harmed)
        assert {(row.share_changed, row.missed) for row in harmed.evidence()} == {(0.0, 0)}


def test_a_change_that_the_sample_does_not_meet_is_found_in_the_whole():
    """One value in 16,384 off the grid, between the sampled ones."""
    layer = nn.Linear(128, 128)
    with torch.no_grad():
        layer.weight.copy_(fake_quantize(layer.weight.bfloat16(), MXFP4).float())
        layer.weight[0, 1] *= 1.01
    with attach(nn.Sequential(layer), Injection.named("w4a16")) as harmed:
        harmed.model(torch.randn(2, 128))
        (row,) = harmed.evidence()
    assert row.share_changed == pytest.approx(1 / 128**2)
    assert row.missed == 0


def test_the_table_says_what_acts_where():
    spec = {"mode": "w4a4", "errors": [{"kind": "relative"}], "apply_during": {"input": ["rollout"]}}
    with attach(policy(), Injection.model_validate(spec)) as harmed:
        assert harmed.table.active_sites("rollout") == {"weight": 2, "input": 2, "relative@matmul/forward": 2}
        assert harmed.table.active_sites("evaluation") == {"weight": 2}
        assert harmed.table.active_sites("reference") == {}
