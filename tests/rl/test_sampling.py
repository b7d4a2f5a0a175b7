"""Dynamic sampling: groups without spread never reach the loss, and a cap ends the search without a crash."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp4rl.rl.fill import Refill, answers_of, choose, groups_with_spread
from fp4rl.spec.errors import InvalidValueError


def test_only_groups_whose_answers_differ_are_kept():
    acc = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    assert groups_with_spread(acc, 2).tolist() == [False, True, False]


def test_rounding_is_no_spread():
    reward = torch.tensor([0.1 + 0.2, 0.3, 1.0, 0.0])
    assert groups_with_spread(reward, 2).tolist() == [False, True]


def test_the_accuracy_filter_drops_a_group_that_differs_only_in_its_length_penalty():
    acc, reward = torch.zeros(4), torch.tensor([0.0, -0.08, 0.0, 0.0])
    assert not groups_with_spread(acc, 4).any()
    assert groups_with_spread(reward, 4).all()


def test_an_answer_without_a_score_makes_no_spread():
    nan = float("nan")
    assert groups_with_spread(torch.tensor([1.0, nan, nan, nan, 0.0, 1.0]), 2).tolist() == [False, False, True]


def test_a_batch_is_refilled_until_it_is_full():
    refill = Refill(wanted=8, max_num_gen_batches=3).after(kept=5, generated=8)
    assert not refill.done
    refill = refill.after(kept=4, generated=8)
    assert refill.full
    assert refill.trained == 8
    assert refill.report("acc") is None
    assert refill.metrics()["sampling/dropped_share"] == pytest.approx(1 - 9 / 16)


def test_a_refill_asks_for_what_is_missing_over_the_share_kept():
    fresh = Refill(wanted=16, max_num_gen_batches=4)
    assert fresh.ask(16) == 16
    assert fresh.after(15, 16).ask(16) == 2
    assert fresh.after(8, 16).ask(16) == 16
    assert fresh.after(0, 16).ask(16) == 16
    assert fresh.after(16, 16).ask(16) == 0


def test_the_cap_trains_on_what_there_is_and_says_so():
    refill = Refill(wanted=8, max_num_gen_batches=2).after(3, 8).after(2, 8)
    assert refill.gave_up
    assert refill.trained == 5
    assert "5 of 8 groups" in refill.report("acc")
    assert "training on 5" in refill.report("acc")


def test_a_run_in_which_all_rewards_are_equal_ends_without_an_update():
    refill = Refill(wanted=8, max_num_gen_batches=2).after(0, 8).after(0, 8)
    assert refill.done
    assert refill.trained == 0
    assert "no update" in refill.report("acc")
    assert refill.metrics()["sampling/dropped_share"] == 1.0


def test_chosen_groups_are_the_first_with_spread_and_their_answers_stay_together():
    chosen = choose(torch.tensor([False, True, True, False, True]), missing=2)
    assert chosen.tolist() == [1, 2]
    assert answers_of(chosen, 3).tolist() == [3, 4, 5, 6, 7, 8]


@given(
    wanted=st.integers(1, 12),
    cap=st.integers(1, 5),
    keeps=st.lists(st.integers(0, 12), min_size=5, max_size=5),
)
def test_the_search_ends_within_its_cap_and_never_trains_on_more_than_it_kept(wanted, cap, keeps):
    refill = Refill(wanted, cap)
    for keep in keeps:
        asked = refill.ask(12)
        if asked == 0:
            break
        assert 1 <= asked <= 12
        refill = refill.after(min(keep, asked), asked)
    assert refill.done
    assert refill.batches <= cap
    assert refill.trained == min(refill.kept, wanted)
    assert (refill.report("acc") is None) == (refill.trained == wanted)


@pytest.mark.parametrize("call", [lambda: Refill(0, 1), lambda: Refill(1, 0), lambda: Refill(1, 1).after(3, 2)])
def test_impossible_counts_are_refused(call):
    with pytest.raises(InvalidValueError):
        call()


def test_metrics_that_do_not_make_groups_are_refused():
    with pytest.raises(InvalidValueError, match="do not make groups"):
        groups_with_spread(torch.zeros(5), 2)
