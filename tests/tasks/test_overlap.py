"""No problem is trained on and judged by, in substance (check P37)."""

import dataclasses
import json

import pytest

from fp4rl.spec.errors import CheckFailed
from fp4rl.spec.task import split_of
from fp4rl.tasks.arithmetic import LEVELS, Arithmetic
from fp4rl.tasks.gsm8k import Gsm8k
from fp4rl.tasks.overlap import check_disjoint, overlap


@pytest.mark.parametrize("difficulty", LEVELS)
def test_splits_of_the_arithmetic_task_share_no_operation_sequence_even_across_seeds(difficulty):
    train = Arithmetic(difficulty=difficulty).problems("train", 400)
    for split in ("validation", "test"):
        held_out = Arithmetic(seed=5, difficulty=difficulty).problems(split, 60)
        check_disjoint(Arithmetic(difficulty=difficulty), train, held_out)


def test_a_trained_problem_in_other_words_is_found_among_the_held_out_ones():
    task = Arithmetic()
    train, held_out = task.problems("train", 300), task.problems("test", 100)
    problem = train[17]
    reworded = problem.prompt.replace(problem.prompt.split()[1], "Eva").replace("Eva has", "Mia has")
    planted = dataclasses.replace(problem, id="arithmetic-planted", prompt=reworded, split="test")
    assert reworded != problem.prompt
    assert overlap(task, train, (*held_out, planted)) == (task.substance(problem),)
    with pytest.raises(CheckFailed, match="1 of 101 held-out problems of arithmetic are also trained on"):
        check_disjoint(task, train, (*held_out, planted))


def test_the_same_numbers_in_another_order_are_another_sequence():
    task = Arithmetic()
    problem = task.problems("train", 1)[0]
    one = dataclasses.replace(problem, prompt="Q: Tom has 2 3 coins . buys 4 more . loses 2 . How many ? A:")
    other = dataclasses.replace(problem, prompt="Q: Tom has 2 3 coins . loses 2 . buys 4 more . How many ? A:")
    assert (task.substance(one), task.substance(other)) == ("23+4-2", "23-2+4")
    assert overlap(task, [one], [other]) == ()


def test_a_gsm8k_question_with_other_punctuation_is_found(tmp_path):
    rows = [
        {"question": "How many eggs? Two!", "answer": "#### 2"},
        {"question": "how many  eggs two", "answer": "#### 2"},
    ]
    for name, row in zip("ab", rows, strict=True):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    one, two = (Gsm8k(path=tmp_path / "a.jsonl", test_path=tmp_path / f"{name}.jsonl") for name in "ab")
    assert overlap(one, one.problems("test"), two.problems("test")) == ("how many eggs two",)


def test_ten_per_cent_each_are_held_out():
    splits = [split_of(str(number)) for number in range(20_000)]
    assert abs(splits.count("test") / 20_000 - 0.1) < 0.01
    assert abs(splits.count("validation") / 20_000 - 0.1) < 0.01
