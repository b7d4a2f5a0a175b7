"""Faults planted among gold answers, each found by its kind and its place, and nothing found where there are none."""

import random
from importlib.util import find_spec

import pytest

from fp4rl.rl.gold_check import gold_faults, spread, tells_apart
from fp4rl.rl.rewards import Part, reward_named
from fp4rl.spec.task import Problem, Task
from fp4rl.tasks import answers


class Numbers(Task):
    """Scores the number after `####`, as GSM8K does."""

    name: str = "numbers"

    def problems(self, split, count=None):
        raise NotImplementedError

    def substance(self, problem):
        return problem.prompt

    def score(self, problem, completion):
        return answers.scored(problem.answer, completion)


def column(golds, solutions=None):
    solutions = solutions or [f"so #### {gold}" for gold in golds]
    return [
        Problem(f"p-{i}", f"What is number {i}?", gold, solution, "train")
        for i, (gold, solution) in enumerate(zip(golds, solutions, strict=True))
    ]


def found(problems, *parts):
    return [(fault.kind, fault.problem) for fault in gold_faults(parts or (Part(),), Numbers(), problems)]


def judge(name, pattern=None):
    return Part(name, reward_named(name, pattern))


GOLDS = [str(random.Random(0).randrange(10**6)) for _ in range(3)] + ["7", "-3", "2.5", "12", "8", "40"]
needs_math = pytest.mark.skipif(not find_spec("math_verify"), reason="extra math")


def test_sound_gold_answers_have_no_faults():
    assert found(column(GOLDS)) == []
    assert found(column(GOLDS), judge("exact")) == []
    assert found(column(GOLDS), judge("regex", r"#### (.*)")) == []
    assert found(column(list("BADCA")), judge("choice")) == []


@needs_math
def test_sound_formulas_have_no_faults():
    formulas = [r"\frac{1}{2}", "0.5", r"3\sqrt{2}", r"\left[0,1\right)", r"\{1,2\}", "x^2+1", r"\$18.90", "50\\%"]
    assert found(column(formulas), judge("math_verify")) == []


def test_an_answer_that_cannot_be_scored_is_named():
    assert found(column([*GOLDS, "seven"])) == [("unscorable", f"p-{len(GOLDS)}")]
    assert found(column([*GOLDS, "1/2"])) == [("unscorable", f"p-{len(GOLDS)}")]
    assert found(column([*"BADC", "Paris"]), judge("choice")) == [("unscorable", "p-4")]


@needs_math
@pytest.mark.parametrize("cut", [r"\frac{1}{", r"3\sqrt{2", "x^2+", "(1,"])
def test_a_gold_answer_that_was_cut_off_is_named(cut):
    faults = found(column([r"\frac{1}{2}", "5", cut, "9"]), judge("math_verify"))
    assert ("cut off", "p-2") in faults
    assert {place for _, place in faults} == {"p-2"}


def test_another_column_is_told_by_what_all_its_values_say():
    assert ("wrong column", "") in found(column(["train"] * 6), judge("exact"))
    asked = [f"How many apples does person {i} have?" for i in range(8)]
    questions = [Problem(f"p-{i}", f"Question: {text}", text, text, "train") for i, text in enumerate(asked)]
    assert found(questions, judge("exact")) == [("wrong column", "")]
    assert found(column([str(i) for i in (3, 1, 4, 1, 5, 9, 2, 6)])) == []


def test_a_judge_that_takes_every_answer_is_named():
    class Anything(Numbers):
        def score(self, problem, completion):  # noqa: ARG002
            return answers.scored("1", "#### 1")

    faults = gold_faults((Part(),), Anything(), column(GOLDS))
    assert [fault.kind for fault in faults] == ["all alike"] * len(GOLDS)


def test_a_reward_of_form_need_not_ask_for_the_answer():
    brief = Part("brief", lambda completion, **_: -len(completion))
    assert found(column(GOLDS), brief, judge("regex", "^so")) == []
    assert tells_apart(Part("same", lambda completion, answer, **_: completion == answer), Numbers(), column(GOLDS)) > 0
    assert tells_apart(judge("regex", "^so"), Numbers(), column(GOLDS)) == 0


def test_a_sample_is_spread_evenly_over_all():
    problems = column([str(i) for i in range(100)])
    assert [p.answer for p in spread(problems, 4)] == ["0", "25", "50", "75"]
    assert len(spread(problems, 1000)) == 100
