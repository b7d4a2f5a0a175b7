"""Learned clipping: the formula of the paper in float64, block by block, and a run that saves what it clamps."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from fp4rl.inject.attach import attach
from fp4rl.rl import session as session_room
from fp4rl.rl.clipping import clipping_figures, masters_of, unclamped
from fp4rl.rl.masters import Masters
from fp4rl.rl.trainer import Trainer
from fp4rl.rl.verify import share_changed
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.load import parse

ALONE = type("Alone", (), {"num_processes": 1, "sync_gradients": True})
INIT = 0.5


class One(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer


def clipped(layer, **injection):
    """A layer under an injection, and its masters, whose strengths are all different."""
    model, named = One(layer), {"dtype": "float32", **injection}
    described = Experiment.model_validate(
        {"injection": named, "training": {"learned_clipping": {"init": INIT, "lr": 0.03}}}
    )
    attachment = attach(model, described.injection)
    masters = masters_of(model, attachment, described)
    (strength,) = [clamp.strength for clamp in masters.clamps.values()]
    with torch.no_grad():
        strength.add_(torch.linspace(-2, 2, strength.numel()).view(strength.shape))
    masters.write()
    attachment.invalidate()
    return model, masters, strength


def by_hand(weight, strength, rows, columns):
    """W' of W [out, in]: a loop over the blocks, with the largest weight of each picked by its index."""
    strips = []
    for i in range(0, weight.shape[0], rows):
        strip = []
        for j in range(0, weight.shape[1], columns):
            block = weight[i : i + rows, j : j + columns]
            bound = block.flatten()[block.abs().argmax()].abs() / (1 + (-strength[i // rows, j // columns]).exp())
            strip.append(torch.where(block.abs() > bound, block.sign() * bound, block))
        strips.append(torch.cat(strip, 1))
    return torch.cat(strips)


@pytest.mark.parametrize("stored", ["out_in", "in_out"])
@pytest.mark.parametrize(
    ("weight", "block", "estimator"),
    [
        ("mxfp4", (1, 32), "identity"),
        ("mxfp4", (1, 32), "clipped"),
        ("mxfp4_2d", (32, 32), "clipped"),
        ("nvfp4", (1, 16), "identity"),
        ("fp8", (40, 80), "identity"),
    ],
)
def test_the_gradient_is_that_of_the_formula_in_float64(weight, block, estimator, stored):
    """Rounding passes the gradient of W' on, times the mask of `clipped`; the formula takes it to W and strengths."""
    torch.manual_seed(0)
    layer = nn.Linear(80, 40, bias=False) if stored == "out_in" else Conv1D(40, 80)
    model, masters, strength = clipped(layer, weight=weight, straight_through=estimator)
    x, g = torch.randn(7, 80), torch.randn(7, 40)
    (model.layer(x) * g).sum().backward()
    masters.take_gradients(ALONE)
    (master,) = unclamped(masters).values()

    as_used = master.detach().double() if stored == "out_in" else master.detach().double().T
    whole = as_used.requires_grad_()
    learned = strength.detach().double().reshape(-(-40 // block[0]), -1).requires_grad_()
    held = by_hand(whole, learned, *block)
    gradient = g.double().T @ x.double()
    if estimator == "clipped":  # floor: a block's largest lies in [4, 8) of its scale, and 6 is the largest level
        beyond = torch.zeros_like(held, dtype=torch.bool)
        for i, j in product(range(0, 40, block[0]), range(0, 80, block[1])):
            part = (slice(i, i + block[0]), slice(j, j + block[1]))
            magnitude = held.detach()[part].abs()
            beyond[part] = magnitude > 6 * 2 ** (magnitude.max().log2().floor() - 2)
        assert beyond.any()
        gradient = gradient.masked_fill(beyond, 0)
    wanted = torch.autograd.grad(held, (whole, learned), gradient)
    stored_as = [model.layer.weight, master.grad] if stored == "out_in" else [model.layer.weight.T, master.grad.T]
    pairs = [*zip(stored_as, (held, wanted[0]), strict=True), (strength.grad.reshape(learned.shape), wanted[1])]
    for ours, theirs in pairs:
        assert torch.allclose(ours.double(), theirs, rtol=1e-4, atol=1e-6)
    assert (wanted[1] != 0).sum() > learned.numel() / 4
    outside = held != whole
    # Those that are clamped get nothing of their own; the largest of a block has what comes through its maximum.
    assert (wanted[0][outside] == 0).any()
    assert clipping_figures(masters)["weights/clipped"] == float(outside.double().mean())


def mixture(**sizes):
    settings = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 32, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 3, "num_experts_per_tok": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **settings, **heads, **sizes))


def test_stacked_experts_are_clamped_one_by_one_unless_nothing_tells_how_they_are_stored():
    described = Experiment.model_validate({"injection": "w4a16", "training": {"learned_clipping": {"init": INIT}}})
    model = mixture(moe_intermediate_size=32)
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    masters = masters_of(model, attach(model, described.injection), described)
    masters.write()
    stacks = [name for name in masters.clamps if "experts" in name]
    assert len(stacks) == 2
    for name in stacks:
        strength = masters.clamps[name].strength
        for number, matrix in enumerate(start[name]):
            wanted = by_hand(matrix, strength[number], 1, 32)
            assert torch.allclose(model.get_parameter(name)[number], wanted, rtol=1e-6)
    attachment = attach(mixture(moe_intermediate_size=32), described.injection)
    state = next(state for name, state in attachment.states.items() if "down_proj" in name)
    state.plan = replace(state.plan, site=replace(state.plan.site, transposed=None))
    with pytest.raises(InvalidValueError, match=r"experts\.down_proj .*targets.leave"):
        masters_of(attachment.model, attachment, described)


def test_a_model_without_a_weight_to_clamp_is_refused():
    described = Experiment.model_validate({"injection": "w4a16", "training": {"learned_clipping": {}}})
    model = One(nn.Linear(64, 8)).requires_grad_(False)
    with pytest.raises(InvalidValueError, match="both trained and rounded"):
        masters_of(model, attach(model, described.injection), described)


def test_strengths_have_a_rate_of_their_own_and_the_model_holds_what_is_clamped():
    """One step of plain AdamW goes lr against the sign of each gradient."""
    torch.manual_seed(0)
    model, masters, strength = clipped(nn.Linear(64, 8, bias=False), weight="mxfp4")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    masters.put_into(optimizer)
    (model.layer(torch.randn(5, 64)) * torch.randn(5, 8)).sum().backward()
    masters.take_gradients(ALONE)
    before, way = strength.detach().clone(), strength.grad.sign()
    assert not (way == 0).any()
    optimizer.step()
    masters.write()
    assert torch.allclose(strength, before - 0.03 * way, atol=1e-5)
    (master,) = unclamped(masters).values()
    assert torch.allclose(model.layer.weight, by_hand(master, strength, 1, 32), rtol=1e-6)
    assert not torch.equal(model.layer.weight, master)
    assert strength.grad is master.grad is None


def test_a_clamp_alone_is_no_training():
    torch.manual_seed(0)
    start, layer = One(nn.Linear(64, 8)), nn.Linear(64, 8)
    layer.load_state_dict(start.layer.state_dict())
    model, masters, _ = clipped(layer, weight="mxfp4")
    assert share_changed(start, model, lambda _: None) > 0.1
    assert share_changed(start, model, lambda _: None, unclamped(masters)) == 0


TRAINED = {"steps": 2, "lr": 2e-3, "learned_clipping": {"init": 1.0, "lr": 0.1}}


def test_a_run_samples_from_saves_and_serves_the_clamped_weights(run, experiment, start_folder, monkeypatch):
    """What stands in the folder is the formula of W and strengths; transformers loads it to the logits of the live
    policy without rounding. The first rollout samples from the start, clamped."""
    held, sample, save = {}, Trainer._sample, session_room.TrainingSession.save

    def sampled(self, problems):
        held.setdefault("first", {name: weight.detach().clone() for name, weight in self.model.named_parameters()})
        return sample(self, problems)

    def saved(self, folder):
        if folder.name == "final":
            held["masters"] = self.trainer.masters
            with torch.no_grad(), self.phases.unobserved():
                held["logits"] = self.model.eval()(torch.arange(1, 30)[None]).logits
        return save(self, folder)

    monkeypatch.setattr(Trainer, "_sample", sampled)
    monkeypatch.setattr(session_room.TrainingSession, "save", saved)
    trained, heard = run(experiment("w4a4", training=TRAINED))
    folder = AutoModelForCausalLM.from_pretrained(trained.final)
    with torch.no_grad():
        assert torch.equal(folder(torch.arange(1, 30)[None]).logits, held["logits"])
    start = dict(AutoModelForCausalLM.from_pretrained(start_folder).named_parameters())
    masters = held["masters"]
    assert len(masters.clamps) == 14  # seven linear layers in each of two blocks
    for name, clamp in masters.clamps.items():
        master, stored = unclamped(masters)[name], folder.get_parameter(name)
        assert torch.allclose(stored, by_hand(master, clamp.strength, 1, 32), rtol=1e-6)
        assert not torch.equal(stored, master)
        first = by_hand(start[name], torch.ones_like(clamp.strength), 1, 32)
        assert torch.allclose(held["first"][name], first, rtol=1e-6)
    layers = heard.of("clipping")
    assert [line["layer"] for line in layers] == [0, 1]
    assert all(line["learned"] > 0.5 and line["least"] < line["mean"] < line["largest"] for line in layers)
    clipped_share = sum(line["clipped"] * line["weights"] for line in layers) / sum(line["weights"] for line in layers)
    assert heard.steps[-1][1]["weights/clip_bound"] != heard.steps[0][1]["weights/clip_bound"]
    assert 1 / 32 < clipped_share < 0.5
    assert [line["max_difference"] for line in heard.of("live_equals_fresh")] == [0.0]


def test_strengths_that_no_optimizer_updates_end_the_run(run, experiment, monkeypatch):
    def left_out(self, optimizer):
        self.clamps, clamps = {}, self.clamps
        put(self, optimizer)
        self.clamps = clamps

    put = Masters.put_into
    monkeypatch.setattr(Masters, "put_into", left_out)
    with pytest.raises(CheckFailed, match=r"no strength of \d+ blocks moved"):
        run(experiment("w4a4", training=TRAINED))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"injection": None}, "no weight has blocks in training; name a format"),
        ({"injection": {"input": "mxfp4"}}, "no weight has blocks in training; name a format"),
        ({"injection": {"mode": "w4a16", "apply_during": ["evaluation"]}}, "no weight has blocks in training"),
        ({"injection": {"weight": {"name": "mxfp4", "rotation": 32}}}, "with a rotation: .* leave one of both out"),
        (
            {"injection": {"mode": "w4a16", "schedule": {"weight": {"from_step": 2}}}},
            "schedule.weight rounds otherwise",
        ),
        ({"model": {"lora": {"rank": 4}}}, "adapters are trained"),
        ({"model": {"dtype": "bfloat16", "master_dtype": "bfloat16"}}, "write model.master_dtype: float32"),
        ({"processes": 2, "sharding": "fsdp2"}, "write sharding: none"),
        ({"training": {"oscillation": {"freeze": 0.1}}}, "dampen and freeze write the weights"),
    ],
)
def test_what_cannot_be_clamped_is_refused_by_name(content, why):
    training = {"learned_clipping": {}} | content.pop("training", {})
    with pytest.raises(InvalidValueError, match=f"training.learned_clipping: .*{why}"):
        parse(Experiment, {"injection": "w4a16", **content, "training": training}, "x.yaml")
