"""The tests of the statistics package on comparisons whose truth is known (slow; the table is in the docs)."""

import math

import numpy as np
import pytest

from fp4rl.lab.statistics.crossed import multi_bootstrap, two_way
from fp4rl.lab.statistics.proportions import mcnemar
from fp4rl.lab.statistics.seeds import welch
from planted.made_up import (
    World,
    coverage,
    families_with_a_false_word,
    make_world,
    share_called,
)

TRIES = 2000


def at_most(share: float, tries: int) -> float:
    """The share plus two standard errors of a simulation of so many tries."""
    return share + 2 * math.sqrt(share * (1 - share) / tries)


def by_mcnemar(treatment: np.ndarray, control: np.ndarray) -> float:
    change = treatment[0] - control[0]
    return mcnemar(int((change > 0).sum()), int((change < 0).sum())).p


def by_seeds(treatment: np.ndarray, control: np.ndarray) -> float:
    return welch(treatment.mean(1).tolist(), control.mean(1).tolist()).p


def by_both(treatment: np.ndarray, control: np.ndarray) -> float:
    return two_way(treatment, control).p


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(np.random.default_rng(0))


def test_the_simulated_runs_have_the_spread_that_was_asked_for(world: World):
    runs = world.runs(np.random.default_rng(1), 400)
    assert runs.mean(1).std(ddof=1) == pytest.approx(1.5, abs=0.15)
    assert world.expected(world.shift_for(2.5)) - world.expected(0.0) == pytest.approx(2.5)


@pytest.mark.slow
def test_a_test_over_problems_alone_calls_a_fifth_of_equal_pairs_different(world: World):
    share = share_called(world, np.random.default_rng(2), by_mcnemar, 1, TRIES)
    assert 0.15 < share < 0.27


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
@pytest.mark.parametrize("test", [by_seeds, by_both])
def test_tests_over_seeds_keep_their_level(world: World, test, seeds: int):
    assert share_called(world, np.random.default_rng(3), test, seeds, TRIES) <= at_most(0.05, TRIES)


@pytest.mark.slow
@pytest.mark.parametrize("arms", [1, 4, 8])
@pytest.mark.parametrize("seeds", [3, 5])
def test_at_most_one_family_in_twenty_holds_a_false_word(world: World, arms: int, seeds: int):
    share = families_with_a_false_word(world, np.random.default_rng(4), arms, seeds, TRIES)
    assert share <= at_most(0.05, TRIES)


@pytest.mark.slow
@pytest.mark.parametrize("arms", [1, 4])
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_reaches_is_said_falsely_in_at_most_one_family_in_twenty(world: World, arms: int, seeds: int):
    share = families_with_a_false_word(world, np.random.default_rng(5), arms, seeds, TRIES, margin=1.0)
    assert share <= at_most(0.05, TRIES)


@pytest.mark.slow
@pytest.mark.parametrize("difference", [0.0, -1.0, 3.0])
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_the_interval_holds_the_truth_as_often_as_it_says(world: World, difference: float, seeds: int):
    assert 0.93 <= coverage(world, np.random.default_rng(6), difference, seeds, TRIES) <= 0.97


@pytest.mark.slow
def test_a_family_without_correction_would_be_caught(world: World):
    """The planted defect: eight comparisons with a common control, each judged alone."""
    rng, wrong = np.random.default_rng(7), 0
    for _ in range(TRIES // 4):
        control = world.runs(rng, 5)
        wrong += any(by_seeds(world.runs(rng, 5), control) <= 0.05 for _ in range(8))
    assert wrong / (TRIES // 4) > at_most(0.05, TRIES // 4)


@pytest.mark.slow
def test_the_multi_bootstrap_is_cautious_where_problems_dominate_and_too_eager_where_few_seeds_do(world: World):
    generator = np.random.default_rng(8)
    of_seeds = make_world(generator, problems=300, spread=10.0)

    def drawn(treatment: np.ndarray, control: np.ndarray) -> float:
        return multi_bootstrap(treatment, control, generator=generator, draws=300).p

    assert share_called(world, generator, drawn, 3, 100) <= at_most(0.05, 100)
    assert share_called(of_seeds, generator, drawn, 3, 300) > at_most(0.05, 300)
    assert share_called(of_seeds, generator, by_seeds, 3, 300) <= at_most(0.05, 300)
