"""The order of candidates: the estimator by its closed form, and what KL and further seeds may and may not do."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from fp4rl.lab.search.page import page
from fp4rl.lab.search.ranking import Contender, _noise, _pulled, contested, gap, ranked
from fp4rl.lab.search.records import Book, Measured
from fp4rl.lab.search.result import Result
from fp4rl.lab.search.runs import _bits
from fp4rl.spec.records import PlannedSite, SiteLeftOut, Sites
from planted.searched import MadeUp, search, space_of

_FILE = Path(__file__).parents[3] / "tools" / "chromium.py"
_SPEC = importlib.util.spec_from_file_location("chromium", _FILE)
chromium = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(chromium)


def contender(number, shares, kl=None, problems=200, seed=0):
    """A candidate with so many problems solved in each of its seeds."""
    runs = {}
    for own, share in enumerate(shares):
        rng = np.random.default_rng([seed, number, own])
        solved = np.zeros(problems, dtype=int)
        solved[rng.permutation(problems)[: round(share * problems)]] = 1
        runs[own] = Measured(candidate=number, steps=20, seed=own, run="r", solved=tuple(solved.tolist()), kl=kl)
    return Contender(number, runs)


def test_the_pull_is_that_of_the_closed_form_where_all_are_measured_alike():
    """With equal noise D and no predictor the moment equation is solved by A = s^2 - D: theta = m + A / (A + D) (y - m)
    (Efron and Morris 1975), written out here in float64."""
    shares = [0.70, 0.74, 0.81, 0.86, 0.90]
    those = [contender(number, [share]) for number, share in enumerate(shares)]
    (noise,) = {float(own) for own in np.round(_noise(those), 15)}
    spread = np.var(shares, ddof=1) - noise
    by_hand = np.mean(shares) + spread / (spread + noise) * (np.array(shares) - np.mean(shares))
    assert _pulled(those) == pytest.approx(by_hand.tolist(), abs=1e-6)


def test_kl_that_tells_nothing_leaves_the_order_to_accuracy():
    kls = [0.02, 0.03, 0.02, 0.03, 0.02, 0.03]
    shares = [0.80, 0.80, 0.85, 0.85, 0.90, 0.90]
    those = [contender(number, [share], kl) for number, (share, kl) in enumerate(zip(shares, kls, strict=True))]
    assert [own.candidate // 2 for own in ranked(those)] == [2, 2, 1, 1, 0, 0]


def test_kl_that_tells_decides_between_accuracies_within_their_noise():
    """The line through the others says what the KL of the first two is worth: the one with less of it goes first."""
    shares, kls = [0.880, 0.885, 0.70, 0.75, 0.80, 0.93], [0.010, 0.040, 0.090, 0.060, 0.040, 0.006]
    those = [contender(number, [share], kl) for number, (share, kl) in enumerate(zip(shares, kls, strict=True))]
    order = [own.candidate for own in ranked(those)]
    assert order.index(0) < order.index(1)


def test_one_lucky_seed_does_not_beat_the_mean_of_five():
    others = [contender(number, [0.78 + 0.01 * number] * 2) for number in range(6)]
    lucky, steady = contender(10, [0.905]), contender(11, [0.90, 0.88, 0.91, 0.90, 0.90])
    order = [own.candidate for own in ranked([lucky, steady, *others])]
    assert order[:2] == [11, 10]


def test_who_is_contested_stands_on_both_sides_of_the_cut_nearest_first():
    those = [contender(number, [share]) for number, share in enumerate([0.95, 0.82, 0.81, 0.80, 0.40])]
    order = ranked(those)
    assert [own.candidate for own in contested(order, 2)] == [1, 2, 3]
    assert not gap(order[0], order[2]).open


@pytest.mark.parametrize(("first", "open_"), [(0.0, True), (1.0, False)])
def test_candidates_that_do_not_vary_are_told_apart_by_their_problems_alone(first, open_):
    against = gap(contender(0, [first, first]), contender(1, [0.0, 0.0]))
    assert (against.value, against.open) == (first, open_)


@pytest.fixture(scope="module")
def ended():
    space, book = space_of((4, 4, 2)), Book()
    search(MadeUp(space, lambda point: 4.0 if point["training.lr"] == "0.2" else 0.0), book).run()
    return Result(space, book)


def test_the_page_is_made_of_records_alone_and_names_every_candidate(ended):
    made = page(ended, None)
    assert made == page(Result(ended.space, Book(lines=ended.book.lines)), None)
    assert all(f">{row.name}" in made for row in ended.tried)
    assert ended.paragraph.startswith("Of 32 combinations, 32 candidates were tried")
    assert {row.name for row in ended.front(ended.last_round)} <= {row.name for row in ended.tried}


@pytest.mark.skipif(chromium.BINARY is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_fits_into_a_phone_and_a_desk(ended, tmp_path, width):
    (tmp_path / "report.html").write_text(page(ended, {"suite": "made-up-recipe"}))
    seen = chromium.seen(tmp_path / "report.html", width, ask="document.querySelectorAll('.main-svg').length")
    assert (seen.faults, seen.requests, seen.spill) == ([], [], 0)
    assert seen.value >= 2  # both figures are drawn


def test_bits_are_those_of_every_rounding_weighted_by_weights():
    """A quarter of two blocks is one of them: inputs of 64 columns are rounded 1.5 times on average."""
    twice = {"name": "mxfp4", "fallback": 0.25}
    sites = Sites(
        plans=(PlannedSite(site="q", kind="linear", shape=(96, 64), weight="mxfp4", input=twice),),
        left_out=(SiteLeftOut(site="head", kind="linear", shape=(32, 64)),),
    )
    assert _bits(sites) == (pytest.approx(0.75 * 4.25 + 4, abs=1e-3), pytest.approx(0.75 * 6.375 + 4, abs=1e-3))
