"""From findings to spec objects: the knapsack, the noise rules, the verl fork's thresholds, and the fragment."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
import yaml

from fp4rl.diagnose.advice import NOISE_RULES, Options, advise, noise_multipliers, strategy
from fp4rl.diagnose.findings import (
    Measured,
    apply_rule,
    band,
    findings,
    meanings,
    rule_named,
    rule_results,
    standing_out,
)
from fp4rl.diagnose.formats_advice import Choice, knapsack
from fp4rl.diagnose.scan import scan
from fp4rl.inject.resolve import resolve
from fp4rl.noise.schedule import multiplier_at
from fp4rl.numerics.errors import ErrorSplit, ErrorSums, Rounded
from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.injection import Injection
from fp4rl.spec.load import load_spec
from fp4rl.spec.scan import Scan

SEVERITY = {0: 9.0, 1: 1.0, 2: 1.0, 3: 4.0, 4: 1.0}


@pytest.fixture(scope="module")
def advice(w4a4, trained, calibration):
    return advise(w4a4, trained, calibration, Options(bits_per_weight=5.0))


@pytest.mark.parametrize("seed", range(8))
def test_the_knapsack_equals_trying_everything(seed):
    draw = random.Random(seed)
    groups = {
        f"g{i}": [Choice("a", 4.0 * w, h), Choice("b", 8.0 * w, h * draw.random()), Choice("c", 16.0 * w, 0.0)]
        for i in range(6)
        for w, h in [(draw.randint(1, 9), draw.random())]
    }
    floor = sum(choices[0].bits for choices in groups.values())
    budget = floor * draw.uniform(1.0, 2.5)
    best = min(
        sum(c.kl for c in pick) for pick in itertools.product(*groups.values()) if sum(c.bits for c in pick) <= budget
    )
    found = knapsack(groups, budget)
    assert found.bits <= budget
    assert found.kl == pytest.approx(best, rel=0.01)


def test_a_budget_below_the_cheapest_formats_is_refused():
    with pytest.raises(InvalidValueError, match="need 8 bits"):
        knapsack({"a": [Choice("x", 8.0, 1.0)]}, 7.0)


def test_a_budget_of_exactly_the_cheapest_keeps_them():
    assert knapsack({"a": [Choice("x", 8.0, 1.0), Choice("y", 9.0, 0.0)]}, 8.0).choices["a"].format == "x"


def test_proportional_and_inverse_multipliers_have_root_mean_square_one_and_opposite_order():
    up = dict(noise_multipliers("proportional", SEVERITY, frozenset()).by_layer)
    down = dict(noise_multipliers("inverse", SEVERITY, frozenset()).by_layer)
    assert up[0] > up[3] > up[1]
    assert down[0] < down[3] < down[1]
    for found in (up, down):
        assert sum(v * v for v in found.values()) / 5 == pytest.approx(1.0, abs=1e-3)


def test_targeted_and_its_control_are_complements():
    out = frozenset({0, 3})
    targeted = dict(noise_multipliers("targeted", SEVERITY, out).by_layer)
    control = dict(noise_multipliers("healthy_only", SEVERITY, out).by_layer)
    assert targeted == {0: 1.0, 1: 0.0, 2: 0.0, 3: 1.0, 4: 0.0}
    assert all(targeted[layer] + control[layer] == 1.0 for layer in SEVERITY)


def test_targeted_takes_the_worst_fifth_when_nothing_stands_out():
    assert dict(noise_multipliers("targeted", SEVERITY, frozenset()).by_layer)[0] == 1.0


def test_zones_give_ends_and_middle_one_value_each():
    multipliers = noise_multipliers("zones", SEVERITY, frozenset())
    values = [multiplier_at(multipliers, layer, 5) for layer in range(5)]
    assert values[0] == values[4] > values[1] == values[2]


def test_an_unknown_noise_rule_names_the_nearest():
    with pytest.raises(NotFoundError, match="did you mean 'inverse'"):
        noise_multipliers("inverted", SEVERITY, frozenset())


def test_a_threshold_that_ideal_data_breaks_is_said_to_tell_nothing(w4a4):
    found = {result.rule.name: result for result in rule_results(w4a4)}
    assert found["sqnr"].ideal_fails == found["sqnr"].judged == 70
    assert not found["sqnr"].discriminates
    assert found["sqnr"].cells() == ("sqnr < 20 dB", "70 of 70", "all: tells nothing", "reconsider_quantization")
    assert found["gain_ratio"].discriminates


def test_the_forks_relative_error_is_the_mean_of_ratios_and_stands_beside_ours():
    """By hand: |e|/|w| of (1 -> 2, 10 -> 10) is 1 and 0, mean 0.5; sum|e|/sum|w| is 1/11."""
    tally = ErrorSums()
    values, rounded = torch.tensor([[1.0, 10.0]]), torch.tensor([[2.0, 10.0]])
    parts = ErrorSplit(rounded - values, torch.zeros(1, 2), torch.zeros(1, 2))
    tally.add(Rounded(values, 10.0, rounded, torch.ones(1, 2, dtype=torch.bool), parts))
    place = Measured("a weight", 0, tally.measures(), {})
    assert place.measures["mean_relative"] == pytest.approx(0.5)
    assert place.measures["relative_l1"] == pytest.approx(1 / 11)
    assert apply_rule(rule_named("relative_error", 0.4), [place]).flagged == ("a weight",)
    assert apply_rule(rule_named("relative_error", 0.6), [place]).flagged == ()
    assert apply_rule(rule_named("relative_l1", 0.4), [place]).flagged == ()
    judged = [apply_rule(rule_named(name), [place]) for name in ("sqnr", "relative_error", "relative_l1")]
    said = "relative_error: mean |e|/|w|, as the fork defines it; relative_l1: sum|e|/sum|w|"
    assert meanings(judged) == said


def test_thresholds_are_configurable():
    place = Measured("a weight", 0, {"sqnr_db": 18.7}, {"sqnr_db": 18.86})
    assert apply_rule(rule_named("sqnr"), [place]).flagged == ("a weight",)
    assert apply_rule(rule_named("sqnr", 18.0), [place]).flagged == ()
    assert apply_rule(rule_named("sqnr", 18.0), [place]).advice == "no action"
    with pytest.raises(NotFoundError, match="did you mean 'sqnr'"):
        rule_named("snr")


def test_bands_and_strategies_by_share():
    assert [band(s) for s in (0.0, 0.05, 0.2, 0.5)] == [
        "no action",
        "leave the flagged layers out",
        "wider for the worst and noise for the moderate",
        "reconsider_quantization",
    ]
    assert [strategy(s, (0.1, 0.3)) for s in (0.0, 0.1, 0.2, 0.5)] == [
        "no action",
        "mixed precision",
        "mixed precision and noise",
        "reconsider the format",
    ]


def test_what_stands_out_is_relative_to_the_formats_ideal(w4a4):
    out = standing_out(w4a4)
    assert out
    assert all("down_proj" in site for site in out)
    assert standing_out(w4a4, 10.0) == ()


def test_findings_say_what_hurts_and_that_size_alone_does_not_tell(w4a4):
    words = " ".join(found.text for found in findings(w4a4))
    assert "size alone does not tell" in words
    assert "block does not divide the width of 5 sites" in words
    assert "faulty" not in words


def test_advised_formats_keep_fused_groups_together_and_the_budget(advice, trained, w4a4):
    assert advice.formats.bits_per_weight <= 5.0
    assert advice.formats.chosen.kl < sum(site.kl for site in w4a4.sensitivity.sites)
    table = resolve(trained, advice.injection())  # refuses a split q/k/v or gate/up
    wider = {p.name for p in table.plans if "mxfp4" not in (p.weight and p.weight.name, p.input and p.input.name)}
    inputs = {p.name for p in table.plans if p.weight and p.weight.name == "mxfp4" and p.input != p.weight}
    assert wider | inputs == {entry.pattern for entry in advice.injection().by_pattern}
    assert wider


def test_a_left_out_site_takes_its_fused_group_along(advice, trained):
    assert advice.leave
    resolve(trained, advice.injection(["leave"]))


def test_the_fragment_lies_over_a_spec_and_comes_back_as_the_same_objects(advice, tmp_path):
    spec, fragment = tmp_path / "spec.yaml", tmp_path / "advice.yaml"
    spec.write_text("injection: w4a4\nnoise: {schedule: {kind: geometric, num_stages: 4}}\ntraining: {steps: 4}\n")
    fragment.write_text(yaml.safe_dump(advice.fragment(("formats", "noise"))))
    experiment = load_spec(spec, [f"+{fragment}"])
    assert experiment.injection == advice.injection()
    assert experiment.noise.multipliers == advice.multipliers
    assert experiment.noise.schedule.num_stages == 4
    assert set(yaml.safe_load(fragment.read_text())["noise"]["multipliers"]["by_layer"]) == set(range(5))


@pytest.mark.parametrize("rule", NOISE_RULES)
def test_every_noise_rule_takes_the_place_of_the_factors_that_the_spec_had(w4a4, trained, tmp_path, rule):
    found = advise(w4a4, trained, options=Options(noise_rule=rule))
    assert found.formats is None
    spec, fragment = tmp_path / "spec.yaml", tmp_path / "advice.yaml"
    before = "{by_layer: {0: 9.0, 4: 9.0}, zones: {edge: 3.0}, others: 7.0}"
    spec.write_text(f"injection: w4a4\nnoise: {{schedule: constant, multipliers: {before}}}\n")
    fragment.write_text(yaml.safe_dump(found.fragment(("formats", "noise"))))
    assert load_spec(spec, [f"+{fragment}"]).noise.multipliers == found.multipliers
    (said,) = (reason for reason in found.reasons if reason.startswith(f"noise by the rule {rule}"))
    assert ("the same on every layer" in said) == (rule == "global")


def test_another_scale_rule_is_recommended_with_what_it_saves(advice):
    best = advice.variants[0]
    assert best.name in ("scale_rule: mse", "scale_rule: even")
    assert -0.06 < best.change < -0.015
    assert advice.variant.name == "scale_rule: even"
    assert advice.injection(["weight_format"]).weight.scale_rule == "even"
    (mse,) = (reason for reason in advice.reasons if reason.startswith("scale_rule: mse"))
    assert mse.endswith("no deployment rounds so")


@pytest.mark.parametrize(
    "deployment", [None, "compressed_tensors", "vllm_blackwell_rceil", "vllm_hopper", "vllm_ascend"]
)
def test_every_piece_of_advice_makes_a_fragment_that_its_own_deployment_accepts(
    trained, calibration, tmp_path, deployment
):
    """The kind: advice that the door refuses (`mse`, which no deployment rounds with)."""
    injection = Injection.named("w4a16", deployment)
    report = scan(trained, injection, texts=calibration, spec=Scan(parts=("precision", "sensitivity"), measured=False))
    found = advise(report, trained, calibration, Options(bits_per_weight=5.0))
    spec, fragment = tmp_path / "spec.yaml", tmp_path / "advice.yaml"
    spec.write_text(
        yaml.safe_dump({"injection": {"mode": "w4a16"} | ({"deployment": deployment} if deployment else {})})
    )
    fragment.write_text(yaml.safe_dump(found.fragment(("formats", "noise", "leave", "weight_format"))))
    loaded = load_spec(spec, [f"+{fragment}"]).injection
    assert loaded == found.injection(("formats", "leave", "weight_format"))
    assert loaded.deployment == deployment
    assert ("weight_format" in found.held(("weight_format",))) == (loaded.weight != injection.weight)


def test_between_the_bands_the_worst_are_wider_and_noise_goes_to_what_they_leave(w4a4, trained, calibration):
    """With bands that put this scan between them; worked out from the sites' own KL."""
    found = advise(w4a4, trained, calibration, Options(bits_per_weight=5.0, bands=(0.0, 1.0)))
    assert found.strategy == "mixed precision and noise"
    wider = {entry.pattern for entry in found.formats.exceptions(w4a4.table.injection)}
    left = dict.fromkeys(range(5), 0.0)
    for site in w4a4.sensitivity.sites:
        left[site.layer] += 0.0 if site.name in wider else site.kl
    assert wider
    assert found.multipliers == noise_multipliers("proportional", left, frozenset())
    everywhere = advise(w4a4, trained, calibration, Options(bits_per_weight=5.0, bands=(1.0, 1.0)))
    assert everywhere.multipliers == noise_multipliers("proportional", w4a4.severity(), frozenset())
    assert everywhere.multipliers != found.multipliers


def test_formats_cannot_be_advised_without_sensitivity(trained, calibration):
    report = scan(trained, Injection.named("w4a16"), spec=Scan(parts=("precision",)))
    found = advise(report, trained, calibration)
    assert found.formats is None
    assert found.multipliers is not None


def test_a_scan_without_texts_that_needs_them_says_so(trained):
    with pytest.raises(InvalidValueError, match="need texts"):
        scan(trained, Injection.named("w4a16"))


@pytest.mark.parametrize(
    ("said", "pieces"),
    [("no action", ()), ("mixed precision", ("formats",)), ("mixed precision and noise", ("formats", "noise"))],
)
def test_a_fragment_holds_what_the_strategy_asks_for_and_no_more(advice, said, pieces):
    found = replace(advice, strategy=said)
    assert found.fragment() == found.fragment(pieces)
    assert ("noise" in found.fragment()) == ("noise" in pieces)
    assert bool(found.fragment()["injection"].get("by_pattern")) == ("formats" in pieces)
