"""KL of a rounded policy to itself unrounded, against torch.distributions on a copy that plain transformers runs."""

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from fp4rl.inject.resolve import resolve
from fp4rl.models.load import load
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.rl.evaluate import evaluate, evaluation_runner
from fp4rl.spec.injection import Injection

W4A4 = {"mode": "w4a4", "deployment": "compressed_tensors"}
LAYER_0 = W4A4 | {"by_pattern": {"*.layers.0.*": {"weight": "mxfp8", "input": "none"}}}


def _rounded(x, fmt):
    return fake_quantize(x.bfloat16(), fmt).float()  # a deployment gets BF16


def _rounded_copy(folder, injection):
    """The model with rounded weights, and inputs rounded before plain linear layers: no injected class in it."""
    model, _ = load(folder, "float32")
    modules = dict(model.named_modules())
    for plan in resolve(model, Injection.model_validate(injection)).plans:
        layer = modules[plan.name]
        if plan.weight is not None:
            layer.weight.data = _rounded(layer.weight.data, plan.weight)
        if plan.input is not None:
            layer.register_forward_pre_hook(lambda _, inputs, fmt=plan.input: (_rounded(inputs[0], fmt),))
    return model


@torch.no_grad()
def _by_hand(folder, injection, problems, limit):
    """(KL, share of equal argmax, tokens) in float64, a problem at a time, without padding."""
    (plain, tokenizer), rounded = load(folder, "float32"), _rounded_copy(folder, injection)
    kls, same = [], []
    for problem in problems:
        prompt = tokenizer(problem.prompt, return_tensors="pt")["input_ids"]
        ids = rounded.generate(prompt, max_new_tokens=limit, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        span = slice(prompt.shape[1] - 1, ids.shape[1] - 1)
        p, q = (model(ids).logits[0, span].double() for model in (plain, rounded))
        kls.append(kl_divergence(Categorical(logits=p), Categorical(logits=q)))
        same.append(p.argmax(-1) == q.argmax(-1))
    values = torch.cat(kls)
    return float(values.mean()), float(torch.cat(same).double().mean()), len(values)


@pytest.mark.parametrize("injection", [W4A4, LAYER_0], ids=["w4a4", "w4a4 but for layer 0"])
def test_the_kl_of_a_profile_is_that_of_torchs_distributions_on_a_rounded_copy(experiment, start_folder, injection):
    described = experiment(
        injection=injection,
        evaluation={"kl": True, "batch_size": 7, "max_new_tokens": 6, "profiles": ["full", "deployment"]},
    )
    full, rounded = (evaluation.summary() for evaluation in evaluate(start_folder, described))
    kl, same, tokens = _by_hand(start_folder, injection, evaluation_runner(described).problems, 6)
    assert kl > 1e-3
    assert (rounded.kl, rounded.same_top) == (pytest.approx(kl, rel=1e-5), same)
    assert (rounded.kl_tokens, rounded.mean_length) == (tokens, pytest.approx(tokens / rounded.n))
    assert (full.kl, full.same_top) == (0.0, 1.0)


def test_measuring_the_kl_changes_no_answer_and_no_evidence(experiment, start_folder):
    """Kind: what was measured under a description that does not name the new key stays as it was."""
    injection, lines = {**W4A4, "input": {"name": "mxfp4", "rounding": "stochastic"}}, {}
    for kl in (False, True):
        runner, heard = evaluation_runner(experiment(injection=injection, evaluation={"kl": kl})), []
        torch.manual_seed(0)
        found = [each.summary() for each in runner.run(start_folder, "float32", 0, True, record=heard.append)]
        lines[kl] = [each.answers_digest for each in found], heard, torch.rand(1)
        assert [each.kl is not None for each in found] == [kl, kl]
    assert lines[True] == lines[False]
    assert "kl" not in experiment().evaluation.model_dump()
