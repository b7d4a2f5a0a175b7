"""Learning curves: mean and range over seeds, thinned where runs are long."""

import math
from dataclasses import replace

import pytest

from fp4rl.lab.report.collect import collect
from fp4rl.lab.report.figures import MOST_POINTS, curve


@pytest.fixture
def runs(make_trial):
    return collect(make_trial().write(missing=[("w4a4", 0)])).runs


def with_curves(runs, values):
    """The first two finished runs of one arm, each with its own curve."""
    chosen = [run for run in runs if run.planned.arm == "bf16"][: len(values)]
    return [replace(one, run=replace(one.run, curves=curves)) for one, curves in zip(chosen, values, strict=True)]


def test_the_line_is_the_mean_and_the_band_the_range_over_seeds(runs):
    found = curve("bf16", "entropy", with_curves(runs, [{1: {"entropy": 1.0}}, {1: {"entropy": 3.0}}]), 10.0)
    assert (found.mean, found.low, found.high, found.seeds) == ((20.0,), (10.0,), (30.0,), 2)


def test_values_that_are_no_numbers_are_left_out(runs):
    found = curve("bf16", "entropy", with_curves(runs, [{1: {"entropy": math.nan}, 2: {"entropy": 2.0}}]))
    assert found.steps == (2.0,)


def test_a_metric_that_nobody_logged_has_no_curve(runs):
    assert curve("bf16", "kl", runs) is None


def test_a_run_that_does_not_count_draws_no_curve(runs):
    unproven = [replace(one, run=one.run and replace(one.run, lines=())) for one in runs]
    assert curve("bf16", "entropy", unproven) is None


def test_a_long_run_is_thinned_to_means_of_neighbours(runs):
    steps = {step: {"entropy": float(step)} for step in range(1, 1001)}
    found = curve("bf16", "entropy", with_curves(runs, [steps]))
    assert len(found.steps) <= MOST_POINTS
    assert found.steps[0] == found.mean[0] == pytest.approx(2.5)
