"""What a worker and its rollout engine say to each other: the sites that round, and the counts of what was rounded."""

import asyncio
from dataclasses import astuple
from types import SimpleNamespace

import pytest

from fp4rl.engines.verl.policy import Policy
from fp4rl.engines.verl.rollouts import Rollouts
from fp4rl.inject.evidence import Meter
from fp4rl.spec.errors import CheckFailed, EngineDiffers, InvalidValueError
from fp4rl.spec.experiment import Experiment

TOKENS = 30


class Engine:
    """A rollout engine that answers with TOKENS tokens, and computed some more of them: the prompts'."""

    def __init__(self, computed=TOKENS + 12, against=()):
        self.computed, self.against, self.sites, self.answered = computed, list(against), (), TOKENS

    def __getattr__(self, name):
        async def remote(*arguments):
            return getattr(self, f"_{name}")(*arguments)

        return SimpleNamespace(remote=remote)

    def _fp4rl_begin(self, *told):
        self.sites, _ = told
        return self.against

    def _fp4rl_end(self):
        counts = [
            {
                "calls": 4,
                "meters": {p: astuple(Meter(4, self.computed * row["shape"][-1])) for p in row["formats"]},
            }
            for row in self.sites
        ]
        return self.answered, counts


@pytest.fixture
def policy(model):
    return Policy(model, Experiment.model_validate({"injection": "w4a8"}), frozen=False)


def once(policy, engine):
    """One set of weights, answers, and the counts."""
    rollouts = Rollouts(policy, engine)
    asyncio.run(rollouts.begin())
    asyncio.run(rollouts.end())


@pytest.mark.parametrize("phase", ["rollout", "evaluation"])
def test_every_site_is_told_and_its_counts_are_the_policys_own(policy, phase):
    policy.stream_as(phase)
    engine = Engine()
    once(policy, engine)
    assert [row["name"] for row in engine.sites] == [plan.name for plan in policy.attachment.table.plans]
    assert all(row["formats"] == {"input": "mxfp8"} for row in engine.sites)
    wide = sum(plan.site.shape[-1] for plan in policy.attachment.table.plans)
    assert policy.report(trained=False, last=False).counts == {f"{phase}/input": engine.computed * wide}
    assert policy.attachment.phase == "training"


def test_a_layer_that_rounded_fewer_tokens_than_were_answered_is_named(policy):
    with pytest.raises(EngineDiffers, match=r"q_proj: verl's vLLM answered with 30 tokens, and rounded input of 29"):
        once(policy, Engine(computed=TOKENS - 1))


def test_an_engine_that_rounded_nothing_is_named(policy):
    with pytest.raises(EngineDiffers, match="q_proj: the server answered and its worker rounded no input there"):
        once(policy, Engine(computed=0))


def test_counts_that_were_lost_are_an_error(policy):
    engine = Engine()
    rollouts = Rollouts(policy, engine)
    asyncio.run(rollouts.begin())
    engine.sites = ()  # weights that came by another way end the rounding
    with pytest.raises(CheckFailed, match="counted at 0 of 14 sites"):
        asyncio.run(rollouts.end())


def test_an_engine_that_answered_nothing_has_nothing_to_count(policy):
    engine = Engine(computed=0)
    engine.answered = 0
    once(policy, engine)
    assert policy.report(trained=False, last=False).counts == {}


def test_what_vllm_computes_otherwise_is_refused_before_it_answers(policy, model):
    with pytest.raises(InvalidValueError, match=r"verl's vLLM: no layer for x .*keep it to training"):
        once(policy, Engine(against=["no layer for x"]))


def test_a_policy_whose_inputs_stay_as_they_are_tells_nothing(model):
    injection = {"mode": "w4a8", "apply_during": {"input": ["training"]}}
    engine = Engine()
    once(Policy(model, Experiment.model_validate({"injection": injection}), frozen=False), engine)
    assert engine.sites == ()
