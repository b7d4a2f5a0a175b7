"""Dead rollouts: loops and empty answers."""

import warnings
from random import Random

import pytest

from fp4rl.rl.generate import Generation
from fp4rl.rl.health.signals import signals_of
from fp4rl.rl.rollout import Rollout, repeated_share


def test_a_loop_repeats_nearly_all_of_its_ngrams_and_a_sentence_none():
    assert repeated_share([7] * 48) == pytest.approx(44 / 45)
    assert repeated_share([1, 2, 3] * 16) == pytest.approx(42 / 45)
    assert repeated_share(list(range(48))) == 0.0
    assert repeated_share([7, 7, 7]) == 0.0


def test_the_share_is_trls_penalty_without_its_sign():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what TRL imports warns while it is compiled for the first time
        from trl.rewards import get_repetition_penalty_reward

    random = Random(0)
    answers = [[random.randrange(3) for _ in range(random.randrange(30))] for _ in range(50)]
    theirs = get_repetition_penalty_reward(ngram_size=4)(answers)
    assert [-repeated_share(a) for a in answers] == pytest.approx(theirs)


def test_an_answer_that_is_only_its_end_is_empty():
    answers = [([9], True), ([1, 9], True), ([], False), ([1], False)]
    rollout = Rollout((), (), tuple(Generation(tokens, "", ended) for tokens, ended in answers))
    assert rollout.shape()["response_length/empty_ratio"] == 0.5


def test_the_monitor_knows_these_metrics():
    shape = Rollout((), (), (Generation([7] * 9, "", False),)).shape()
    assert set(signals_of(shape)) == {"answers", "length", "truncated", "empty", "repetition"}
