"""The suite's questions: judged as one family, refused where unfair."""

import pytest

from fp4rl.lab.compare.comparison import answer_all
from fp4rl.lab.folders import finished_runs
from fp4rl.lab.ledger.record import record
from fp4rl.lab.ledger.store import open_ledger
from fp4rl.lab.report.collect import collect
from fp4rl.spec.errors import InvalidValueError

QUANTIZED = {"mode": "w4a16", "deployment": "compressed_tensors"}
PROFILES = {"evaluation": {"profiles": ["full", "w4a16", "w4a4"]}}
AFTERWARDS = {
    "question": "Does training under W4A16 beat quantizing afterwards?",
    "treatment": "w4a16@deployment",
    "control": "bf16@w4a16",
    "factors": ["injection"],
}
BETWEEN_DEPLOYED = {
    "question": "Does W4A4 cost accuracy against W4A16?",
    "treatment": "w4a4@deployment",
    "control": "w4a16@deployment",
    "factors": ["injection"],
}


def ask(make_trial, comparison, arms=None, **faults):
    """The one question of a suite with two arms, or those given."""
    two = {"bf16": PROFILES, "w4a16": {"injection": QUANTIZED}}
    return collect(make_trial(arms=arms or two, comparisons=[comparison]).write(**faults)).questions[0]


def test_a_difference_that_no_factor_declares_refuses_and_is_named(make_trial):
    arms = {"bf16": PROFILES, "w4a16": {"injection": QUANTIZED, "training": {"lr": 1e-3}}}
    question = ask(make_trial, AFTERWARDS, arms)
    assert (question.word, question.verdict) == ("not comparable", None)
    assert "the specs also differ in training.lr: 0.001 against 0.0004" in question.sentence()


def test_a_comparison_without_factors_allows_no_difference_at_all(make_trial):
    question = ask(make_trial, AFTERWARDS | {"factors": []})
    assert "the specs also differ in injection" in question.sentence()


def test_the_profiles_that_an_arm_is_judged_under_are_no_factor(make_trial):
    assert ask(make_trial, AFTERWARDS).word == "better"


def test_quantized_afterwards_under_another_scale_rule_refuses(make_trial):
    changes = {("bf16", "w4a16"): {"sites_digest": "table-of-another-rule"}}
    question = ask(make_trial, AFTERWARDS, profile=changes)
    assert "table-w4a16 against table-of-another-rule" in question.sentence()


def test_two_arms_as_each_is_deployed_may_differ_in_precision(make_trial):
    arms = {
        "w4a16": {"injection": QUANTIZED},
        "w4a4": {"injection": {"mode": "w4a4", "deployment": "compressed_tensors"}},
    }
    assert ask(make_trial, BETWEEN_DEPLOYED, arms).word == "worse"


@pytest.mark.parametrize(
    "key, value",
    [("items_digest", "0123456789ab"), ("scorer", "gsm8k"), ("max_new_tokens", 64), ("sampling", "4 samples")],
)
def test_numbers_measured_differently_refuse(make_trial, key, value):
    question = ask(make_trial, AFTERWARDS, profile={("w4a16", "deployment"): {key: value}})
    assert f"the evaluation's {key} differs" in question.sentence()


def test_noise_left_on_in_one_evaluation_refuses(make_trial):
    question = ask(make_trial, AFTERWARDS, profile={("w4a16", "deployment"): {"noise": "on"}})
    assert question.word == "not comparable"


@pytest.mark.parametrize("side", ["nobody@full", "w4a16@w4a8", "w4a16"])
def test_a_side_that_the_suite_does_not_have_is_refused_when_the_suite_is_read(make_trial, side):
    with pytest.raises(InvalidValueError, match=r"comparisons.0.treatment: "):
        ask(make_trial, AFTERWARDS | {"treatment": side})


def test_an_arm_without_any_finished_run_refuses(make_trial):
    question = ask(make_trial, AFTERWARDS, missing=[("w4a16", seed) for seed in range(3)])
    assert question.sentence() == "Not comparable: no run of w4a16 is finished."


def test_a_margin_of_the_suite_is_a_share_and_the_verdict_is_in_points(make_trial):
    reaches = AFTERWARDS | {"control": "bf16@full", "test": "reaches", "margin": 0.01}
    question = ask(make_trial, reaches)
    assert question.verdict.margin == pytest.approx(1.0)
    assert question.word == "no difference shown"
    assert "does not show that they are equal" in question.sentence()


def test_all_questions_of_a_suite_are_corrected_together(complete):
    first = complete.questions[0]
    alone = answer_all([(first.question, first.treatment, first.control)], lambda run: None)[0].verdict
    assert complete.questions[0].verdict.p_family == pytest.approx(3 * alone.p_family)


def test_a_refused_question_still_counts_among_them(make_trial):
    report = collect(make_trial().write(without_evidence=[("w4a16+aqn", 0)]))
    assert report.questions[1].word == "not comparable"
    assert report.questions[0].verdict.p_family == pytest.approx(3 * report.questions[0].verdict.p)


def test_one_seed_earns_no_word(make_trial):
    report = collect(make_trial(seeds=[0]).write())
    assert [question.word for question in report.questions] == ["no verdict"] * 3
    assert report.questions[0].verdict.low is None


def test_one_seed_is_shown_with_the_band_of_repeats_in_the_ledger(make_trial, tmp_path):
    make_trial().write()
    with open_ledger(tmp_path / "ledger.db") as ledger:
        for run in finished_runs(tmp_path):
            record(ledger, run, {})
    verdict = collect(make_trial(suite="single", seeds=[0]).write()).questions[0].verdict
    assert (verdict.word, verdict.interval) == (None, "run-to-run band")
    assert verdict.low < verdict.difference < verdict.high
