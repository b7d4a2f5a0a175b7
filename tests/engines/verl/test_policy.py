"""A model under an experiment in one process: the stream, the counters and the noise, without verl."""

import math

import pytest
import torch

from fp4rl.engines.verl.policy import Policy
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.experiment import Experiment

NOISE = {"schedule": {"kind": "linear", "sigma_start": 0.05, "sigma_end": 0.01}}


def described(**parts):
    return Experiment.model_validate({"injection": "w4a16"} | parts)


def held(policy, step=0, total=5):
    return {name: value.clone() for name, value in policy.stream(step, total)}


def forward(model):
    model(input_ids=torch.arange(12)[None]).logits.float().logsumexp(-1).mean().backward()


def test_the_stream_has_rounded_matrices_and_all_else_as_it_is(model):
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    policy = Policy(model, described(), frozen=False)
    sent = held(policy)
    assert sent.keys() == before.keys()
    sites = {f"{plan.name}.weight" for plan in policy.attachment.table.plans}
    assert {name for name in sent if not torch.equal(sent[name], before[name])} == sites
    assert all(len(set((sent[n] / sent[n].abs().max()).abs().unique().tolist())) < 200 for n in sites)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    streamed = policy.streamed
    assert (streamed.sites, streamed.compared, streamed.tensors) == (len(sites), len(sites), len(before))
    assert streamed.elements == sum(before[name].numel() for name in sites)
    kinds = [line.kind for line in policy.report(trained=False, last=False).evidence]
    assert kinds == ["master", "rounded"]


def test_noise_of_a_step_is_on_the_stream_alone_and_none_in_an_evaluation(model):
    policy = Policy(model, described(injection=None, noise=NOISE), frozen=False)
    clean = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for step, sigma in enumerate((0.05, 0.04, 0.03)):
        sent = held(policy, step)
        change = torch.cat([(sent[n] - clean[n]).flatten() for n in sent if not torch.equal(sent[n], clean[n])])
        assert change.std().item() == pytest.approx(sigma, rel=7 / math.sqrt(2 * len(change)))
    policy.stream_as("evaluation")
    assert all(torch.equal(value, clean[name]) for name, value in held(policy, 3).items())
    policy.stream_as("rollout")
    assert any(not torch.equal(value, clean[name]) for name, value in held(policy, 3).items())


def test_noise_is_measured_on_what_the_model_computes_in(model):
    """Of FP32 masters all values change, of their bfloat16 copies only those that noise takes past half a step."""
    policy = Policy(
        model, described(injection=None, noise={"schedule": {"kind": "constant", "sigma": 1e-3}}), frozen=False
    )
    held(policy)
    assert policy.streamed.share_changed == 1.0
    policy.dtype = torch.bfloat16
    held(policy)
    assert 0 < policy.streamed.share_changed < 0.5


def test_a_stream_that_is_broken_off_leaves_clean_masters(model):
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    policy = Policy(model, described(noise=NOISE), frozen=False)
    stream = policy.stream(0, 5)
    next(stream)
    assert any(not torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    stream.close()
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert policy.attachment.phase == "training"


def test_a_site_that_is_sent_as_it_is_ends_the_stream(model, monkeypatch):
    policy = Policy(model, described(), frozen=False)
    first = policy.attachment.table.plans[0].name
    monkeypatch.setattr(policy.attachment.states[first], "rounded_weight", lambda layer: layer.weight.detach())
    with pytest.raises(CheckFailed, match=rf"weight stream: {first}\.weight is not its master rounded"):
        held(policy)
    policy._streams["rollout"] = 11  # a stream whose values are not compared
    with pytest.raises(CheckFailed, match=rf"weight stream \(rollout\): 1 of .* sites were sent as they are: {first}"):
        held(policy)


def test_counters_are_of_the_time_since_the_last_report_and_a_silent_site_is_named(model):
    policy = Policy(model, described(), frozen=False)
    with pytest.raises(CheckFailed, match="never called during training"):
        policy.report(trained=True, last=False)
    forward(model)
    counts = policy.report(trained=True, last=False).counts
    assert counts == {"training/weight": sum(p.site.shape[0] * p.site.shape[1] for p in policy.attachment.table.plans)}
    assert policy.report(trained=True, last=False).counts == {}
    assert {row.phase for row in policy.report(trained=True, last=True).rows} == {"training"}


def test_a_reference_rounds_nothing_unless_it_is_named(model):
    policy = Policy(model, described(), frozen=True)
    forward(model)
    assert policy.report(trained=False, last=False).counts == {}


def test_another_dtype_than_the_experiments_is_refused(model):
    policy = Policy(model, described(), frozen=False)
    with pytest.raises(InvalidValueError, match=r"verl computes in bfloat16, and model.dtype is float32"):
        policy.shard(torch.bfloat16)
