"""Effect words: who earns one, and who does not."""

import pytest

from fp4rl.lab.criteria import Comparison, Verdict, evaluate_family
from fp4rl.lab.statistics.seeds import Spread
from fp4rl.spec.errors import InvalidValueError


def verdict_over_seeds(treatment, control, *, comparisons=1, margin=None, spread=None) -> Verdict:
    """One comparison that stands among others of which nothing is known."""
    alone = Comparison("", treatment, control, margin)
    return evaluate_family([alone], spread=spread, others=comparisons - 1)[0]


HIGH, LOW = (80.0, 81.0, 79.5, 80.4), (70.0, 71.2, 69.0, 70.5)


def test_a_clear_gain_is_better_and_a_clear_loss_worse():
    assert verdict_over_seeds(HIGH, LOW).word == "better"
    assert verdict_over_seeds(LOW, HIGH).word == "worse"


def test_an_interval_that_holds_zero_earns_no_difference_shown():
    verdict = verdict_over_seeds((70.0, 74.0, 72.0), (71.0, 73.0, 72.5))
    assert verdict.word == "no difference shown"
    assert verdict.low is not None
    assert verdict.low < 0 < (verdict.high or 0)


def test_one_seed_an_arm_earns_no_word_however_large_the_difference():
    verdict = verdict_over_seeds((95.0,), (10.0,))
    assert verdict.word is None
    assert (verdict.low, verdict.p) == (None, None)
    assert verdict.difference == 85.0


def test_one_seed_against_many_earns_no_word_either():
    assert verdict_over_seeds((95.0,), LOW).word is None


def test_one_seed_an_arm_is_shown_with_the_run_to_run_band():
    verdict = verdict_over_seeds((67.48,), (65.88,), spread=Spread(1.5, 20, 4))
    assert verdict.interval == "run-to-run band"
    assert (verdict.low, verdict.high) == pytest.approx((1.6 - 4.425, 1.6 + 4.425), abs=0.01)
    assert "1.50 points run-to-run SD" in verdict.why


def test_copies_of_one_run_are_no_seeds():
    assert verdict_over_seeds((80.0, 80.0), (70.0, 70.0)).word is None


def test_a_word_lost_to_the_number_of_comparisons_says_so():
    treatment, control = (72.0, 73.0, 71.5, 72.2), (70.6, 71.2, 70.9, 71.8)
    assert verdict_over_seeds(treatment, control).word == "better"
    corrected = verdict_over_seeds(treatment, control, comparisons=6)
    assert corrected.word == "no difference shown"
    assert "alone becomes" in corrected.why


def test_a_family_is_corrected_by_holm():
    family = [Comparison("a", HIGH, LOW), Comparison("b", (72.0, 73.0, 71.5, 72.2), (70.6, 71.2, 70.9, 71.8))]
    first, second = evaluate_family(family)
    assert first.p_family == pytest.approx(2 * (first.p or 0))
    assert second.p_family == second.p
    assert "Holm over 2 comparisons" in first.why


def test_a_comparison_that_cannot_be_tested_is_shown_and_so_counts():
    family = [Comparison("a", HIGH, LOW), Comparison("one seed", (80.0,), LOW)]
    first, second = evaluate_family(family)
    assert first.p_family == pytest.approx(2 * (first.p or 0))
    assert second.word is None
    assert (first.comparisons, second.comparisons) == (2, 2)


def test_reaches_needs_the_lower_bound_to_clear_the_margin():
    control = (70.0, 70.4, 69.8, 70.2, 70.1)
    assert verdict_over_seeds((69.9, 70.2, 69.7, 70.3, 69.9), control, margin=1.0).word == "reaches"
    assert verdict_over_seeds((69.0, 71.0, 68.0, 71.5, 69.9), control, margin=1.0).word == "no difference shown"


def test_reaches_is_never_said_without_a_margin():
    control = (70.0, 70.4, 69.8, 70.2, 70.1)
    assert verdict_over_seeds((69.9, 70.2, 69.7, 70.3, 69.9), control).word == "no difference shown"


def test_a_loss_beyond_the_margin_is_worse_and_one_within_it_reaches():
    control = (70.0, 70.2, 69.9, 70.1)
    assert verdict_over_seeds((68.0, 68.3, 67.9, 68.2), control, margin=1.0).word == "worse"
    within = verdict_over_seeds((69.5, 69.7, 69.4, 69.6), control, margin=1.0)
    assert within.word == "reaches"
    assert "though below 0" in within.why


def test_reaches_is_corrected_for_the_number_of_comparisons_too():
    control = (70.0, 70.9, 69.8, 70.2, 70.4)
    alone = verdict_over_seeds((69.9, 70.4, 69.3, 70.5, 69.9), control, margin=1.0)
    among = verdict_over_seeds((69.9, 70.4, 69.3, 70.5, 69.9), control, margin=1.0, comparisons=8)
    assert alone.word == "reaches"
    assert among.word == "no difference shown"
    assert "only before correction" in among.why


def test_every_word_comes_with_its_interval_and_seeds():
    sentence = verdict_over_seeds(HIGH, LOW[:3]).sentence()
    assert sentence.startswith("+10.")
    assert "[" in sentence
    assert "4 vs 3 seeds" in sentence
    assert sentence.endswith("better")


def test_an_empty_arm_is_refused():
    with pytest.raises(InvalidValueError, match="without any seed"):
        evaluate_family([Comparison("a against b", (), LOW)])


def test_repeats_that_do_not_vary_measure_no_chance():
    verdict = verdict_over_seeds((50.0,), (48.0,), spread=Spread(0.0, 4, 2))
    assert (verdict.low, verdict.word) == (None, None)
