"""Word problems of additions, subtractions and, at difficulty 6, products, with the steps of their solution.

    Q: Tom has 2 3 coins . buys 4 more . loses 2 . How many ? A:
    2 3 + 4 = 2 7 . 2 7 - 2 = 2 5 . #### 2 5

Numbers are spelled digit by digit, so that a model of a hundred thousand weights can learn to carry.
What decides a problem's split is its operation sequence (`23+4-2`), not its wording.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from random import Random
from typing import ClassVar, Literal, NamedTuple

from pydantic import Field, NonNegativeInt, PositiveInt

from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.task import Problem, Score, Split, Task, identity, split_of
from fp4rl.tasks import answers

NAMES = ("Tom", "Ann", "Sam", "Mia", "Ben", "Eva")
CARELESS = NAMES[1::2]
CARE = 0.3  # at a sloppiness of 0.5 the careless names leave out 65 % of the last steps, the others 35 %
THINGS = ("coins", "apples", "books", "cards", "pens", "shells")
GAINS = ("buys", "finds", "gets", "wins")
LOSSES = ("loses", "sells", "eats", "drops")
_SIGNS = {"has": "*", **dict.fromkeys(GAINS, "+"), **dict.fromkeys(LOSSES, "-")}


class Level(NamedTuple):
    """One level of difficulty: inclusive ranges of the first number, of the operands, of their count and of factors.

    With factors one step in three of those that may is a product: of a total of two digits and one factor.
    """

    start: tuple[int, int]
    operand: tuple[int, int]
    operations: tuple[int, int]
    factor: tuple[int, int] | None = None


LEVELS: dict[int, Level] = {
    1: Level(start=(5, 20), operand=(1, 4), operations=(1, 2)),
    2: Level(start=(10, 40), operand=(1, 5), operations=(2, 3)),
    3: Level(start=(10, 60), operand=(1, 9), operations=(2, 3)),
    4: Level(start=(10, 99), operand=(1, 9), operations=(3, 4)),
    5: Level(start=(10, 99), operand=(2, 30), operations=(3, 5)),
    6: Level(start=(10, 50), operand=(1, 9), operations=(3, 4), factor=(2, 3)),
}


class Step(NamedTuple):
    """One step: `+`, `-` or `*`, and the number on its right."""

    sign: str
    size: int

    def __str__(self) -> str:
        return f"{self.sign}{self.size}"

    def of(self, total: int) -> int:
        """Return the total after the step."""
        match self.sign:
            case "+":
                return total + self.size
            case "-":
                return total - self.size
        return total * self.size


class Operations(NamedTuple):
    """An operation sequence: the first number, then steps from left to right; no total falls below zero."""

    start: int
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        text = f"{self.start}"
        for step in self.steps:
            text = f"({text}){step}" if step.sign == "*" and not text.isdigit() else f"{text}{step}"
        return text

    def totals(self) -> list[int]:
        """Return the running total after each step; [len(steps)] numbers."""
        return [*accumulate(self.steps, lambda total, step: step.of(total), initial=self.start)][1:]


class Arithmetic(Task):
    """Generated word problems of additions, subtractions and products; splits are disjoint by operation sequence."""

    name: Literal["arithmetic"] = "arithmetic"
    seed: NonNegativeInt = 0
    difficulty: int = Field(
        default=2, ge=1, le=max(LEVELS), description="1 to 5: more and longer steps; 6: products too"
    )
    train_count: PositiveInt | None = Field(default=None, description="by default 4096, or all there are")

    answer_tokens: ClassVar[int] = 48  # the longest answer at difficulties 1 to 4 has 44

    def problems(self, split: Split, count: int | None = None) -> tuple[Problem, ...]:
        """Return the first `count` problems of a split, no operation sequence twice.

        Without a count: `train_count` of the train split, else 4096 or all there are. InvalidValueError for too few.
        """
        count = self.train_count if count is None and split == "train" else count
        return _problems(self.model_copy(update={"train_count": None}), split, count)

    def demonstrations(self, count: int, sloppy: float = 0.5) -> list[tuple[str, str]]:
        """Return `count` pairs (prompt, solution) of the train split for a warm-up; sequences repeat in new wordings.

        A share `sloppy` of them leaves out the last step and so ends in a wrong number. A model that learns from them
        is mediocre by construction, however long the warm-up: reinforcement learning has room in both directions.
        Half of the names are more careless than the others: if all were alike, leaving out the last step would be as
        likely as not everywhere, and the greedy answers of two warmed-up models would differ by chance alone.
        """
        random = self._random(f"demonstrations/{sloppy}")
        pairs = []
        for _ in range(count):
            operations = self._draw(random, "train")
            prompt = _wording(operations, random)
            leaves_out = sloppy + CARE * min(sloppy, 1 - sloppy) * (1 if prompt.split()[1] in CARELESS else -1)
            shown = operations._replace(steps=operations.steps[:-1]) if random.random() < leaves_out else operations
            pairs.append((prompt, _solution(shown)))
        return pairs

    def substance(self, problem: Problem) -> str:
        """Return the operation sequence, parsed from the prompt: `23+4-2`, `(23+4)*3`."""
        return str(_read(problem.prompt))

    def score(self, problem: Problem, completion: str) -> Score:
        """Compare the final number with the answer; digits that stand alone (`2 5`) are one number in this task."""
        return answers.scored(problem.answer, joined_digits(completion))

    def extracted(self, completion: str) -> str | None:
        """Return the number after `####`, its digits joined."""
        return answers.extracted(joined_digits(completion))

    def _random(self, stream: str) -> Random:
        return Random(f"{self.name}/{self.difficulty}/{self.seed}/{stream}")

    def _draw(self, random: Random, split: Split) -> Operations:
        return next(drawn for drawn in _draws(random, LEVELS[self.difficulty]) if split_of(str(drawn)) == split)


@lru_cache(maxsize=32)  # a run asks for them several times, and a preflight for those of every arm
def _problems(task: Arithmetic, split: Split, count: int | None) -> tuple[Problem, ...]:
    wanted = 4096 if count is None else count
    drawn: dict[Operations, Problem] = {}
    random, misses = task._random(split), 0
    while len(drawn) < wanted:
        operations = task._draw(random, split)
        misses = misses + 1 if operations in drawn else 0
        if misses > 1000 + 20 * len(drawn):  # any sequence not yet drawn would have come up by now
            if count is None:
                break
            key = "task.train_count" if split == "train" else "evaluation.count"
            raise InvalidValueError(
                f"the {split} split of arithmetic has only about {len(drawn)} problems at difficulty "
                f"{task.difficulty}, not {wanted}; lower {key} or raise task.difficulty"
            )
        if operations not in drawn:
            drawn[operations] = _problem(operations, _wording(operations, random), split)
    return tuple(drawn.values())


def joined_digits(text: str) -> str:
    """Drop single blanks between digits, and nothing else: `2 3 + 4 = 2 7` becomes `23 + 4 = 27`."""
    return re.sub(r"(?<=[0-9]) (?=[0-9])", "", text)


def _draws(random: Random, level: Level) -> Iterator[Operations]:
    while True:
        start = total = random.randint(*level.start)
        steps: list[Step] = []
        for _ in range(random.randint(*level.operations)):
            steps.append(_step(random, level, total))
            total = steps[-1].of(total)
        drawn = Operations(start, tuple(steps))
        if min(drawn.totals()) >= 0:
            yield drawn


def _step(random: Random, level: Level, total: int) -> Step:
    if level.factor is not None and 10 <= total <= 99 and random.random() < 1 / 3:
        return Step("*", random.randint(*level.factor))
    return Step(random.choice("-+"), random.randint(*level.operand))


def _problem(operations: Operations, prompt: str, split: Split) -> Problem:
    answer = str(operations.totals()[-1])
    return Problem(identity("arithmetic", prompt), prompt, answer, _solution(operations), split)


def _wording(operations: Operations, random: Random) -> str:
    parts = [f"{random.choice(NAMES)} has {_spelled(operations.start)} {random.choice(THINGS)} ."]
    for sign, size in operations.steps:
        match sign:
            case "+":
                parts.append(f"{random.choice(GAINS)} {_spelled(size)} more .")
            case "-":
                parts.append(f"{random.choice(LOSSES)} {_spelled(size)} .")
            case "*":
                parts.append(f"has {_spelled(size)} * many .")
    return f"Q: {' '.join(parts)} How many ? A:"


def _solution(operations: Operations) -> str:
    totals = [operations.start, *operations.totals()]
    steps = [
        f"{_spelled(before)} {step.sign} {_spelled(step.size)} = {_spelled(after)} ."
        for before, step, after in zip(totals, operations.steps, totals[1:], strict=False)
    ]
    return " ".join([*steps, answers.MARK, _spelled(totals[-1])])


def _spelled(number: int) -> str:
    return " ".join(str(number))


def _read(prompt: str) -> Operations:
    text = joined_digits(prompt)
    first = re.search(r" has ([0-9]+) ", text)
    if first is None:
        raise InvalidValueError(f"not a problem of the arithmetic task: {prompt!r}")
    steps = re.findall(rf" ({'|'.join((*GAINS, *LOSSES, 'has'))}) ([0-9]+)", text[first.end() - 1 :])
    return Operations(int(first[1]), tuple(Step(_SIGNS[verb], int(size)) for verb, size in steps))
