"""What a whole run proves of its treatment, and mutants that only its evidence can tell from a sound run."""

import itertools
import sys
import types
from dataclasses import replace

import pytest

from fp4rl.inject.linear import InjectedLinear, LinearState
from fp4rl.noise import perturb
from fp4rl.rl import verify
from fp4rl.spec.errors import CheckFailed
from fp4rl.spec.evidence import Rounded
from planted.records import gaps_of

SHORT = {"steps": 1}


@pytest.fixture
def spread(monkeypatch):
    """A reward under which every group has spread, whatever the answers are, so that every update moves the weights."""
    module, counted = types.ModuleType("rewards_of_mine"), itertools.count()
    module.alternating = lambda **_: float(next(counted) % 2)
    monkeypatch.setitem(sys.modules, "rewards_of_mine", module)
    return {"reward": "rewards_of_mine.alternating", "lr": 1e-2}


def missing(experiment, trained, heard):
    judged = [{"kind": "evaluation", **one.summary().as_json()} for one in heard.evaluations]
    return gaps_of(experiment.model_dump(mode="json"), trained.evidence.as_json(), [*heard.records, *judged])


@pytest.mark.parametrize(
    "injection",
    [
        {"kv_cache": "mxfp8"},
        {"errors": [{"kind": "relative"}]},
        {"grad_input": "mxfp8"},
        {"mode": "w4a4", "kv_cache": "mxfp8", "grad_weight": "mxfp8", "errors": [{"kind": "relative", "when": "both"}]},
    ],
    ids=["cache", "errors", "gradients", "everything"],
)
def test_every_point_alone_and_beside_others_leaves_no_gap(injection, run, experiment, spread):
    described = experiment(injection=injection, training=SHORT | spread)
    trained, heard = run(described)
    assert missing(described, trained, heard) == ()
    digests = {one.profile.sites_digest for one in heard.evaluations if one.profile.name == "deployment"}
    assert (digests == {None}) == ("kv_cache" not in injection)


@pytest.mark.parametrize("phase", ["rollout", "training", "evaluation"])
def test_a_phase_in_bf16_under_the_label_w4a16_stops_the_run(phase, run, experiment, monkeypatch):
    made = LinearState._make

    def make(self, weight):
        return (weight.detach().clone(), None) if self.phase == phase else made(self, weight)

    monkeypatch.setattr(LinearState, "_make", make)
    with pytest.raises(CheckFailed, match=phase):
        run(experiment("w4a16", training=SHORT))


def test_a_sampler_that_keeps_the_first_rounded_weights_stops_the_run_in_its_second_rollout(
    run, experiment, monkeypatch, spread
):
    copy_of = LinearState.copy_of

    def stale(self, weight, made_from):
        new = copy_of(self, weight, made_from)
        if self.phase != "rollout":
            return new
        self.first = getattr(self, "first", new.detach().clone())
        return self.first

    monkeypatch.setattr(LinearState, "copy_of", stale)
    monkeypatch.setattr(InjectedLinear, "forward", lambda self, x: self.injected.forward(self, x))
    with pytest.raises(CheckFailed, match="rollout: at 14 of 14 sites the matmul receives other numbers"):
        run(experiment("w4a16", training=spread))


def test_rollout_and_training_that_round_alike_may_not_score_apart(run, experiment, monkeypatch):
    """The probe looks at matmuls; a sampler that differs anywhere else is seen in what it scores."""
    monkeypatch.setattr("fp4rl.rl.phases.rounded", lambda attachment, step: Rounded(phase="rollout", sites=0))
    made = LinearState._make

    def make(self, weight):
        copy, reach = made(self, weight)
        return (copy * 1.05, reach) if self.phase == "rollout" else (copy, reach)

    monkeypatch.setattr(LinearState, "_make", make)
    with pytest.raises(CheckFailed, match="step 0: rollout and training round alike, but score"):
        run(experiment("w4a16", training=SHORT))


def test_a_broken_quantizer_stops_the_run_before_anything_is_trained(run, experiment, monkeypatch):
    """The fault that was made: stochastic rounding that returned half the value."""
    whole = verify.fake_quantize

    def halved(x, fmt, generator):
        return whole(x, fmt, generator=generator) / (2 if fmt.rounding == "stochastic" else 1)

    monkeypatch.setattr(verify, "fake_quantize", halved)
    with pytest.raises(CheckFailed, match="the quantizer is broken: stochastic rounding is unbiased"):
        run(experiment("w4a16"))


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["whole", "adapter"])
def test_a_training_that_changed_no_weight_is_a_gap(lora, run, experiment, spread, monkeypatch):
    described = experiment(model={"lora": lora}, training=SHORT | spread)
    trained, heard = run(described)
    assert trained.evidence.weights_changed > 0
    assert [line["share"] for line in heard.of("moved")] == [trained.evidence.weights_changed]
    assert missing(described, trained, heard) == ()
    monkeypatch.setattr("torch.optim.AdamW.step", lambda self, closure=None: None)
    with pytest.raises(CheckFailed, match="training changed none of the weights: no update reached half a step"):
        run(described, "still")
    trained = replace(trained, evidence=trained.evidence.extended(weights_changed=0.0))
    assert missing(described, trained, heard) == ("training changed none of its weights",)


def test_masters_that_swallow_their_updates_are_said_with_the_cure(run, experiment, spread):
    half = {"dtype": "bfloat16", "master_dtype": "bfloat16"}
    coarse = experiment(model=half, training=SHORT | spread | {"lr": 1e-6})
    trained, heard = run(coarse)
    assert trained.evidence.weights_changed < 0.1
    said = [line for line in heard.lines if "half a step of bfloat16; take model.master_dtype: float32" in line]
    assert said == [trained.evidence.hardly_moved]
    assert "hardly any weight will change; take model.master_dtype: float32" in next(coarse.warnings())


def test_noise_of_another_size_stops_the_run(run, experiment, monkeypatch):
    drawn = perturb.standard_noise

    def smaller(seed, name, shape):
        return drawn(seed, name, shape) * 0.1

    monkeypatch.setattr(perturb, "standard_noise", smaller)
    with pytest.raises(CheckFailed, match=r"noise of 0\.1.* times the size that was asked for was drawn"):
        run(experiment("w4a16+aqn", training=SHORT))
