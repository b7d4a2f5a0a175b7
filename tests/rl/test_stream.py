"""The stream of problems: seeded, endless, and resumable from two numbers."""

import pytest

from fp4rl.rl.fill import PromptStream
from fp4rl.spec.errors import InvalidValueError
from fp4rl.tasks.arithmetic import Arithmetic

PROBLEMS = Arithmetic().problems("train", 7)


def test_every_epoch_holds_each_problem_once_and_in_another_order():
    stream = PromptStream(PROBLEMS, seed=0)
    first, second = stream.take(7), stream.take(7)
    assert sorted(p.id for p in first) == sorted(p.id for p in second) == sorted(p.id for p in PROBLEMS)
    assert first != second


def test_a_stream_goes_on_from_its_position_as_if_never_interrupted():
    whole = PromptStream(PROBLEMS, seed=3).take(20)
    assert PromptStream(PROBLEMS, seed=3, position=9).take(11) == whole[9:]


def test_the_order_follows_the_seed():
    assert PromptStream(PROBLEMS, seed=0).take(7) != PromptStream(PROBLEMS, seed=1).take(7)


def test_an_empty_split_is_refused():
    with pytest.raises(InvalidValueError, match="empty"):
        PromptStream((), seed=0)
