"""Gold answers against a reward: each must earn its point, and those of other problems must earn none.

What is found here would otherwise be a run that learns nothing, or the wrong thing, without a word: a gold answer that
the reward cannot read, one that was cut off, or another column than that of the answers.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fp4rl.rl.judges import Judge
from fp4rl.rl.rewards import Part
from fp4rl.spec.task import Problem, Task
from fp4rl.spec.words import counted
from fp4rl.tasks.answers import MARK
from fp4rl.tasks.columns import Wrong, numbers_of_rows
from fp4rl.tasks.table import TableTask

_OTHERS = 5  # gold answers of other problems that each is compared with: two may be equal in other words
_FEW = 5  # problems below which a column tells nothing of itself
_LONG = 20  # letters of an answer that stands in its own question
_OPEN_END = re.compile(r"(?:[-+*/=^_,(\[{\\]|\\[a-zA-Z]*frac)$")


@dataclass(frozen=True)
class Fault:
    """What is wrong with the gold answer of a problem, or of all (`problem` empty). `kind`: one word a kind."""

    kind: str
    problem: str
    what: str


def spread(items: Sequence[Problem], count: int) -> list[Problem]:
    """Return `count` of `items`, evenly spread over them, or all."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def compares(part: Part) -> bool:
    """Return whether a reward compares with the gold answer by what it is: the task's own score, or a judge."""
    return part.function is None or (isinstance(part.function, Judge) and part.function.gold("?") is not True)


def gold_faults(parts: Sequence[Part], task: Task, problems: Sequence[Problem]) -> list[Fault]:
    """Return the faults of the gold answers of `problems`, in their order. Where the whole column is
    wrong that is all: what follows from it is no fault of its own.

    Raises CheckFailed where a reward fails on a gold answer.
    """
    wrong = _numbers_of_rows(task, problems)
    columns = [*column_faults(problems), *([Fault("wrong column", "", wrong.what)] if wrong and wrong.sure else [])]
    if columns:
        return columns
    faults = [*filter(None, map(_cut_off, problems))]
    for part in filter(compares, parts):
        faults += _unscorable(part, task, problems)
    return faults


def suspicion(task: Task, problems: Sequence[Problem]) -> str:
    """Return why the gold answers may be another column, where it is not sure; else nothing."""
    wrong = _numbers_of_rows(task, problems)
    return wrong.what if wrong and not wrong.sure else ""


def _numbers_of_rows(task: Task, problems: Sequence[Problem]) -> Wrong | None:
    """Return why the gold answers, in the order of their file, may be numbers of rows."""
    if not isinstance(task, TableTask):
        return None
    return numbers_of_rows(task, [(problem.split, problem.answer, problem.solution) for problem in problems])


def tells_apart(part: Part, task: Task, problems: Sequence[Problem]) -> int:
    """Return for how many problems the own gold answer earns more than that of another problem."""
    earned = _earned(part, task)
    others = (next(iter(_others(problems, i)), None) for i in range(len(problems)))
    pairs = zip(problems, others, strict=True)
    return sum(other is not None and earned(each, each) > earned(each, other) for each, other in pairs)


def _earned(part: Part, task: Task) -> Callable[[Problem, Problem], float]:
    """Return what a problem earns by the gold answer of one: written out, alone or marked, whichever is most."""

    def earned(problem: Problem, gold: Problem) -> float:
        texts = [gold.solution, gold.answer, rf"\boxed{{{gold.answer}}}", f"{MARK} {gold.answer}"]
        if part.function is None:
            try:
                return max(float(task.score(problem, text).strict) for text in texts)
            except (ValueError, ArithmeticError):  # the gold answer is no number
                return math.nan
        values = part.given([problem] * len(texts), texts, [])
        return max((value for value in values if not math.isnan(value)), default=math.nan)

    return earned


def _others(problems: Sequence[Problem], i: int) -> list[Problem]:
    """Return problems with other gold answers, the nearest behind the one at `i` first, no answer twice."""
    distinct = {problems[i].answer: problems[i]}
    for step in range(1, len(problems)):
        other = problems[(i + step) % len(problems)]
        distinct.setdefault(other.answer, other)
        if len(distinct) > _OTHERS:
            break
    return list(distinct.values())[1:]


def _unscorable(part: Part, task: Task, problems: Sequence[Problem]) -> Iterator[Fault]:
    earned = _earned(part, task)
    for i, problem in enumerate(problems):
        own = earned(problem, problem)
        if math.isnan(own):
            yield Fault("unscorable", problem.id, f"{part.name} cannot read the gold answer {_short(problem.answer)}")
        elif own < 1:
            what = f"{part.name} gives the gold answer {_short(problem.answer)} itself {own:g}"
            yield Fault("unscorable", problem.id, what)
        elif (others := _others(problems, i)) and all(earned(problem, other) >= own for other in others):
            many = ", ".join(_short(other.answer) for other in others[:3])
            yield Fault("all alike", problem.id, f"{part.name} takes {many} for the gold {_short(problem.answer)} too")


def column_faults(problems: Sequence[Problem]) -> Iterator[Fault]:
    """Yield what a whole column of answers says of itself: that it is another column."""
    answers = [problem.answer for problem in problems]
    if len(answers) >= _FEW and len(set(answers)) == 1:
        yield Fault("wrong column", "", f"all {len(answers)} gold answers are {_short(answers[0])}")
    inside = [p for p in problems if len(p.answer) >= _LONG and p.answer in p.prompt]
    if len(inside) > len(problems) / 2:
        yield Fault("wrong column", "", f"{counted(len(inside), 'gold answer')} stand in their own questions")


def _cut_off(problem: Problem) -> Fault | None:
    """Return a fault for a gold answer that ends before it is whole."""
    text = re.sub(r"\\[{}$]", "", problem.answer).rstrip()
    half_a_formula = "\\" in text and text.count("$") % 2 == 1
    if text.count("{") <= text.count("}") and not half_a_formula and not _OPEN_END.search(text):
        return None
    return Fault("cut off", problem.id, f"the gold answer {_short(problem.answer)} is not whole")


def _short(text: str) -> str:
    return repr(text if len(text) <= 30 else f"{text[:27]}...")
