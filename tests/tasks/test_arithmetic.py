"""Generated problems are right, repeatable, and different in substance from split to split."""

import dataclasses
import re
import subprocess
import sys

import pytest

from fp4rl.spec.digest import digest
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.task import SPLITS
from fp4rl.tasks.arithmetic import LEVELS, Arithmetic, joined_digits

TASK = Arithmetic()


def computed(solution: str) -> list[tuple[int, int]]:
    """(the sum as Python computes it, the sum as the solution claims) of each of its steps."""
    steps = joined_digits(solution).split("####")[0].split(" . ")
    sums = [step.replace(" .", "").split(" = ") for step in steps if "=" in step]
    return [(int(eval(left)), int(right)) for left, right in sums]


@pytest.mark.parametrize("difficulty", LEVELS)
def test_every_step_of_every_solution_is_right_and_ends_in_the_answer(difficulty):
    for problem in Arithmetic(difficulty=difficulty).problems("train", 200):
        sums = computed(problem.solution)
        assert all(true == claimed for true, claimed in sums)
        assert problem.solution.endswith(f"#### {' '.join(problem.answer)}")
        assert str(sums[-1][1]) == problem.answer


@pytest.mark.parametrize("difficulty", LEVELS)
def test_the_prompt_asks_what_the_solution_solves(difficulty):
    task = Arithmetic(difficulty=difficulty)
    for problem in task.problems("validation", 60):
        assert str(eval(task.substance(problem))) == problem.answer


@pytest.mark.parametrize("difficulty", LEVELS)
def test_the_dial_keeps_its_ranges_and_no_total_is_negative(difficulty):
    task, level = Arithmetic(difficulty=difficulty), LEVELS[difficulty]
    for problem in task.problems("train", 200):
        start, *steps = re.findall(r"[-+*]?[0-9]+", re.sub("[()]", "", task.substance(problem)))
        assert level.start[0] <= int(start) <= level.start[1]
        assert level.operations[0] <= len(steps) <= level.operations[1]
        for sign, *digits in steps:
            low, high = level.factor if sign == "*" else level.operand
            assert low <= int("".join(digits)) <= high
        assert all(claimed >= 0 for _, claimed in computed(problem.solution))


def test_the_dial_makes_answers_longer_step_by_step():
    def length(difficulty: int) -> float:
        return sum(len(p.solution.split()) for p in Arithmetic(difficulty=difficulty).problems("train", 300)) / 300

    assert length(1) < length(2) < length(4) < length(5)


def test_products_are_of_two_digits_and_one_and_brackets_stand_where_sums_come_first():
    """Counted by hand from the texts: without factors no level has any."""
    assert not any(
        "*" in p.prompt for level in (1, 2, 3, 4, 5) for p in Arithmetic(difficulty=level).problems("test", 90)
    )
    problems = Arithmetic(difficulty=6).problems("test", 400)
    factors = [step.split(" = ")[0].split(" * ") for p in problems for step in joined_digits(p.solution).split(" . ")]
    products = [pair for pair in factors if len(pair) == 2]
    assert 380 < len(products) < 440
    assert {(len(left), len(right)) for left, right in products} == {(2, 1)}
    assert {right for _, right in products} == set("23")
    prompt = "Q: Tom has 2 3 coins . buys 4 more . has 3 * many . loses 2 . How many ? A:"
    assert substance_of(prompt) == "(23+4)*3-2"
    assert max(len(p.solution.split()) + p.solution.count("*") for p in problems) < 48


def test_a_solution_of_the_default_difficulty_fits_into_48_tokens_with_room_for_the_end():
    assert max(len(problem.solution.split()) for problem in TASK.problems("train", 4096)) < 36


def test_problems_are_a_function_of_seed_split_and_count():
    assert TASK.problems("test", 50) == Arithmetic().problems("test", 50)
    assert TASK.problems("test", 50) == TASK.problems("test", 80)[:50]
    assert TASK.problems("test", 50) != Arithmetic(seed=1).problems("test", 50)


def test_problems_are_the_same_in_another_process():
    program = "from fp4rl.tasks.arithmetic import Arithmetic as A; print([p.id for p in A().problems('test', 50)])"
    other = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert other.stdout.strip() == str([p.id for p in TASK.problems("test", 50)])


def test_this_is_still_the_task_that_results_were_measured_on():
    assert TASK.problems("test", 1)[0].prompt == GOLDEN_PROMPT
    assert digest([dataclasses.astuple(p)[:5] for p in TASK.problems("test", 500)]) == GOLDEN_DIGEST


GOLDEN_PROMPT = "Q: Ben has 2 3 cards . wins 5 more . eats 3 . gets 3 more . How many ? A:"
GOLDEN_DIGEST = "412c2c96a3a1"


def test_no_problem_of_a_split_occurs_twice_in_substance():
    problems = TASK.problems("test", 1000)
    assert len({TASK.substance(problem) for problem in problems}) == len({p.id for p in problems}) == 1000


def test_an_id_is_the_content_and_not_the_place():
    problem = Arithmetic(seed=3).problems("train", 5)[4]
    again = [p for p in Arithmetic(seed=3).problems("train", 9) if p.id == problem.id]
    assert again == [problem]


def test_a_digit_spaced_answer_is_one_number():
    problem = next(p for p in TASK.problems("test", 20) if len(p.answer) == 2)
    tens, ones = problem.answer
    score = TASK.score(problem, f" 1 + 1 = 2 . #### {tens} {ones}")
    assert score.strict
    assert score.flexible
    assert score.formatted
    assert not TASK.score(problem, f"#### {tens} . {ones}").strict


def test_a_score_tells_a_wrong_answer_from_a_missing_format():
    problem = TASK.problems("test", 1)[0]
    wrong, unmarked = TASK.score(problem, "#### 999"), TASK.score(problem, f"it is {problem.answer}")
    assert (wrong.strict, wrong.flexible, wrong.formatted) == (False, False, True)
    assert (unmarked.strict, unmarked.flexible, unmarked.formatted) == (False, True, False)
    assert TASK.score(problem, "") == dataclasses.replace(wrong, formatted=False)


def test_every_good_solution_scores_in_full_in_every_split():
    for split in SPLITS:
        assert all(TASK.score(p, f" {p.solution}").strict for p in TASK.problems(split, 100))


def test_half_of_the_demonstrations_leave_out_the_last_step():
    pairs = TASK.demonstrations(4000)
    wrong = sum(joined_digits(solution).split()[-1] != answer_to(prompt) for prompt, solution in pairs)
    assert 0.47 < wrong / len(pairs) < 0.53


@pytest.mark.parametrize(("sloppy", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_sloppiness_goes_all_the_way(sloppy, share):
    pairs = TASK.demonstrations(300, sloppy=sloppy)
    assert sum(joined_digits(s).split()[-1] != answer_to(prompt) for prompt, s in pairs) == share * len(pairs)


def test_demonstrations_are_seeded_and_never_come_from_a_held_out_split():
    assert TASK.demonstrations(50) == Arithmetic().demonstrations(50)
    held_out = {TASK.substance(p) for split in ("validation", "test") for p in TASK.problems(split, 500)}
    assert held_out.isdisjoint(substance_of(prompt) for prompt, _ in TASK.demonstrations(3000))


def test_more_problems_than_there_are_is_a_clear_mistake():
    with pytest.raises(
        InvalidValueError, match=r"test split of arithmetic has only about \d+ problems at difficulty 1, not 5000"
    ):
        Arithmetic(difficulty=1).problems("test", 5000)


def test_without_a_count_a_small_split_gives_all_it_has():
    problems = Arithmetic(difficulty=1).problems("test")
    assert 50 < len(problems) < 200
    assert Arithmetic(difficulty=1).problems("test", len(problems)) == problems


def test_a_difficulty_off_the_dial_is_a_clear_mistake():
    with pytest.raises(ValueError, match=r"difficulty\n.*less than or equal to 6"):
        Arithmetic(difficulty=9)


def substance_of(prompt: str) -> str:
    return TASK.substance(dataclasses.replace(TASK.problems("test", 1)[0], prompt=prompt))


def answer_to(prompt: str) -> str:
    return str(eval(substance_of(prompt)))
