"""What a whole run proves of its treatment, and mutants that only its evidence can tell from a sound run."""

import itertools
import sys
import types

import pytest

from fp4rl.inject.linear import InjectedLinear, LinearState
from fp4rl.lab.compare.evidence import gaps
from fp4rl.spec.mistakes import CheckFailed

SHORT = {"steps": 1}


@pytest.fixture
def spread(monkeypatch):
    """A reward under which every group has spread, whatever the answers are, so that every update moves the weights."""
    module, counted = types.ModuleType("rewards_of_mine"), itertools.count()
    module.alternating = lambda **_: float(next(counted) % 2)
    monkeypatch.setitem(sys.modules, "rewards_of_mine", module)
    return {"reward": "rewards_of_mine.alternating", "lr": 1e-2}


def missing(experiment, trained, heard):
    judged = [{"kind": "evaluation", **one.summary()} for one in heard.evaluations]
    return gaps(experiment.model_dump(mode="json"), trained.evidence, [*heard.records, *judged])


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
def test_every_point_alone_and_beside_others_leaves_no_gap(injection, run, experiment):
    described = experiment(injection=injection, training=SHORT)
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
