"""Formats chosen by what they cost where they are deployed: weights by bits, matmuls by published rates."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from fp4rl.diagnose import formats_advice
from fp4rl.diagnose.advice import Options, advise, worst_layer
from fp4rl.diagnose.prices import Pair, computes, pairs_of, prices_of
from fp4rl.diagnose.scan import scan
from fp4rl.diagnose.sensitivity import divergences, rank_correlation
from fp4rl.inject.resolve import resolve
from fp4rl.spec.formats import MXFP4, MXFP8
from fp4rl.spec.injection import Injection
from fp4rl.spec.load import load_spec
from fp4rl.spec.scan import Scan

W4A4, W4A8, W4A16 = Pair(MXFP4, MXFP4), Pair(MXFP4, MXFP8), Pair(MXFP4, None)
W8A8, BF16 = Pair(MXFP8, MXFP8), Pair(None, None)
ESTIMATED = Scan(parts=("sensitivity",), measured=False)


@pytest.mark.parametrize(
    ("deployment", "compute", "costs", "source"),
    [  # price of a weight: (1 - c) bits + c 4.25 times the matmul's time; HGX B200: 9, 4.5 and 2.25 dense PFLOPS
        ("vllm_blackwell", 0.5, (4.25, 6.375, 10.625, 8.375, 16.5), "NVIDIA's table of HGX B200"),
        ("vllm_blackwell", 1.0, (4.25, 8.5, 17.0, 8.5, 17.0), "NVIDIA's table of HGX B200"),
        ("vllm_ascend", 0.5, (4.25, 6.375, 10.625, 8.375, 16.5), "Ascend 950PR, September 2025; of 16 bits by their"),
        (None, 0.0, (4.25, 4.25, 4.25, 8.25, 16.0), "no peak rates are known"),
    ],
)
def test_a_price_is_bits_of_weights_and_time_of_the_matmul(trained, deployment, compute, costs, source):
    injection = Injection.named("w4a4", deployment)
    plans = resolve(trained, injection).plans
    prices = prices_of(trained, plans, injection, compute)
    assert [prices.of(pair, plans[0].name) / (64 * 64) for pair in (W4A4, W4A8, W4A16, W8A8, BF16)] == list(costs)
    assert source in prices.source
    assert sum(prices.of(prices.scanned, plan.name) for plan in plans) == pytest.approx(4.25 * prices.total)


def test_what_is_rounded_twice_is_multiplied_twice(trained):
    """A quarter of a row's blocks: of in_features 64 (2 blocks) one, of 172 (6 blocks) two."""
    injection = Injection.named("w4a4", input={"name": "mxfp4", "fallback": 0.25})
    prices = prices_of(trained, resolve(trained, injection).plans, injection, 1.0)
    q_proj, down_proj = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
    own = Pair(MXFP4, injection.input)
    assert [prices.slowdown(own, q_proj), prices.slowdown(W4A4, q_proj)] == [1.0, 1 / 1.5]
    assert prices.slowdown(W4A8, down_proj) == pytest.approx(2 / (1 + 2 / 6))
    assert own.operand_bits == 4


def test_what_a_deployment_does_not_compute_is_not_offered(trained):
    """By the table of deployments: Blackwell serves W4A16 as W4A4, Ascend's W4A8 wants in_features % 64 == 0."""
    plans = {plan.name: plan for plan in resolve(trained, Injection.named("w4a4")).plans}
    q_proj, down_proj = (plans[f"model.layers.0.{name}"] for name in ("self_attn.q_proj", "mlp.down_proj"))
    assert (q_proj.site.shape[-1], down_proj.site.shape[-1]) == (64, 172)
    assert [computes("vllm_blackwell", pair, q_proj) for pair in (W4A4, W4A8, W4A16)] == [True, True, False]
    assert [computes("vllm_ascend", W4A8, plan) for plan in (q_proj, down_proj)] == [True, False]
    assert not computes("vllm_ascend", W4A16, q_proj)  # of routed experts alone
    assert computes(None, W4A16, q_proj)
    assert pairs_of(Injection.named("w4a16")) == (W4A16, Pair(MXFP8, None), BF16)
    assert len(pairs_of(Injection.named("w4a8"))) == 4


def advised(monkeypatch, trained, calibration, injection, **options):
    """The advice, and the groups and budget that its knapsack was given."""
    given = {}

    def knapsack(groups, budget):
        given.update(groups=groups, budget=budget)
        return formats_advice_knapsack(groups, budget)

    formats_advice_knapsack = formats_advice.knapsack
    monkeypatch.setattr(formats_advice, "knapsack", knapsack)
    report = scan(trained, injection, texts=calibration, spec=ESTIMATED)
    return advise(report, trained, calibration, Options(**options)), given["groups"], given["budget"]


@pytest.mark.parametrize("bits", [4.3, 4.6, 5.5, 8.0])
def test_the_choice_is_the_best_of_all_assignments(monkeypatch, trained, calibration, bits):
    injection = Injection.model_validate({"mode": "w4a4", "targets": {"layers": [0]}})
    found, groups, budget = advised(monkeypatch, trained, calibration, injection, bits_per_weight=bits)
    assert [len(choices) for choices in groups.values()] == [5] * 4
    possible = [pick for pick in itertools.product(*groups.values()) if sum(c.bits for c in pick) <= budget]
    assert found.formats.chosen.kl == pytest.approx(min(sum(c.kl for c in pick) for pick in possible), rel=1e-3)
    assert found.formats.chosen.bits <= budget


@pytest.mark.parametrize("bits", [4.4, 5.0, 7.0])
def test_the_choice_for_a_whole_model_is_that_of_scipys_solver(monkeypatch, trained, calibration, bits):
    injection = Injection.named("w4a4", "vllm_blackwell")
    found, groups, budget = advised(monkeypatch, trained, calibration, injection, bits_per_weight=bits)
    choices = [choice for group in groups.values() for choice in group]
    owner = np.repeat(np.arange(len(groups)), [len(group) for group in groups.values()])
    single = (owner == np.arange(len(groups))[:, None]).astype(float)
    limits = [
        LinearConstraint([[c.bits for c in choices]], ub=budget),
        LinearConstraint(single, lb=1, ub=1),
    ]
    kls = np.array([c.kl for c in choices])
    best = milp(kls, constraints=limits, integrality=np.ones(len(kls)), bounds=Bounds(0, 1))
    assert found.formats.chosen.kl == pytest.approx(best.fun, rel=1e-2)
    assert not any(c.pair == W4A16 for c in choices)


def test_wider_inputs_win_where_reading_weights_takes_the_time(trained, calibration, w4a4, tmp_path):
    """With `compute` 0 inputs cost nothing, so none stays in 4 bits; the fragment says so, and a suite takes it."""
    found = advise(w4a4, trained, calibration, Options(bits_per_weight=4.25, compute=0.0))
    assert {c.pair for c in found.formats.chosen.choices.values()} == {W4A16}
    assert (found.formats.bits_per_weight, found.formats.slowdown) == (4.25, pytest.approx(4.0))
    (tmp_path / "suite.yaml").write_text("suite: s\narms: {a: {injection: w4a4}, b: {injection: none}}\n")
    (tmp_path / "advice.yaml").write_text(json.dumps(found.fragment(("formats",))))
    suite = load_spec(tmp_path / "suite.yaml", [f"arms.a=+{tmp_path / 'advice.yaml'}"])
    taken = Injection.model_validate(suite.arms["a"]["injection"])
    assert taken == found.injection(("formats",))
    assert all(plan.input is None and plan.weight == MXFP4 for plan in resolve(trained, taken).plans)


def test_the_predicted_kl_of_wider_inputs_is_near_the_measured(monkeypatch, trained, calibration, w4a4):
    """Outside: a forward pass with each group alone in W4A8. The sum of the predicted ones is right within a third."""
    _, groups, _ = advised(monkeypatch, trained, calibration, Injection.named("w4a4"))
    predicted = {name: next(c.kl for c in choices if c.pair == W4A8) for name, choices in groups.items()}
    together = formats_advice.fused_groups(w4a4.table.plans)
    tables = [
        replace(w4a4.table, plans=tuple(replace(p, input=MXFP8) for p in w4a4.table.plans if p.name in together[name]))
        for name in predicted
    ]
    measured = [each.kl for each in divergences(trained, tables, calibration)]
    assert sum(predicted.values()) == pytest.approx(sum(measured), rel=1 / 3)
    assert rank_correlation([*predicted.values()], measured) > 0.8


def test_a_layer_that_makes_worst_layer_is_named(w4a4):
    severity = w4a4.severity()
    shares = {layer: value / sum(severity.values()) for layer, value in severity.items()}
    worst = max(shares, key=shares.get)
    said = worst_layer(w4a4)
    assert bool(said) == (shares[worst] > 0.5)
    planted = {layer: float(layer == 3) + 0.01 for layer in severity}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(w4a4), "severity", lambda _: planted)
        assert worst_layer(w4a4) == ["layer 3 makes 96% of the harm: of the sum of the sites' KL"]
