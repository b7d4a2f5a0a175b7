"""What a task is: problems with known answers, in splits that share nothing, and a way to score a completion."""

import hashlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Literal, Protocol

from fp4rl.spec.digest import digest

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Problem:
    """One question. A completion is the text that follows `prompt`; `solution` is one good completion.

    `id` derives from the content: the same question has the same id in every process and on every machine.
    `answer` is the number as a decimal string without commas.
    """

    id: str
    prompt: str
    answer: str
    solution: str
    split: Split


@dataclass(frozen=True)
class Score:
    """What one completion is worth. `formatted` without `strict` is a wrong answer, not a missing one (check P22)."""

    strict: bool
    flexible: bool
    formatted: bool


class Task(Protocol):
    """Where problems come from. All methods are pure: the same arguments give the same result."""

    @property
    def name(self) -> str:
        """The word that a spec names the task by."""
        ...

    def problems(self, split: Split, count: int | None = None) -> tuple[Problem, ...]:
        """The first `count` problems of a split, all different; a smaller count gives a prefix."""
        ...

    def substance(self, problem: Problem) -> str:
        """What the problem asks once its wording is set aside; two problems of one substance are the same problem."""
        ...

    def digest(self, problems: Sequence[Problem]) -> str:
        """Twelve hexadecimal digits that stand for these problems in this order."""
        ...

    def score(self, problem: Problem, completion: str) -> Score:
        """The completion's final number against the problem's answer."""
        ...


def digest_of(problems: Sequence[Problem]) -> str:
    """Twelve hexadecimal digits over the whole content of these problems, in this order."""
    return digest([astuple(problem) for problem in problems])


def identity(task: str, *content: str) -> str:
    """`<task>-<12 hex>`: a problem's id, from its content."""
    return f"{task}-{digest(content)}"


def split_of(substance: str, held_out: int = 10) -> Split:
    """The split that a substance belongs to: `held_out` per cent each for validation and test, the rest for training.

    It depends on nothing but the substance, so that no seed, count or wording can move a problem across.
    """
    place = int.from_bytes(hashlib.sha256(substance.encode()).digest()[:8], "big") % 100
    if place < held_out:
        return "test"
    return "validation" if place < 2 * held_out else "train"
