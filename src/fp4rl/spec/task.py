"""What a task is: a description that gives problems with known answers, in splits that share nothing, and scores them.

The tasks themselves stand in the room `tasks/`, one file each; `task_registry.py` lists them.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args, get_type_hints

from fp4rl.spec.digest import digest
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.frozen import LocalPath, Spec

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class Chat:
    """A prompt as a conversation, (role, text) by turn: for a tokenizer with a chat template, which `required` tells
    that it must have. `settings` are the template's own, such as enable_thinking."""

    messages: tuple[tuple[str, str], ...]
    required: bool = False
    settings: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Problem:
    """One question. A completion is the text that follows `prompt`; `solution` is one good completion.

    `question` is what is asked, without the words around it, where the task has it apart.
    Where a `chat` is given and the tokenizer has a template, the model sees that instead (`rl.prompts.texts`).
    `id` derives from the content: the same question has the same id in every process and on every machine.
    `answer` is what `Task.score` compares with, such as a decimal number without commas.
    """

    id: str
    prompt: str
    answer: str
    solution: str
    split: Split
    chat: Chat | None = None
    question: str = ""


@dataclass(frozen=True)
class Score:
    """What one completion is worth. `formatted` without `strict` is a wrong answer, not an unreadable one.

    Every field is a column of the stored answers and of the ledger, a share in evaluations, and a word for
    `fp4rl compare --score`.
    """

    strict: bool
    flexible: bool
    formatted: bool


SCORES: tuple[str, ...] = tuple(field.name for field in fields(Score))


class Task(Spec):
    """The base of all tasks. A subclass gives `name` a Literal type and implements the three abstract methods.

    A field of type `LocalPath` is a file that the task reads: runs refuse to start without it, record a digest of its
    contents and do not resume on other contents. All methods are pure: the same arguments give the same result.
    """

    name: str = ""

    answer_tokens: ClassVar[int | None] = None
    """The limit of an answer in `fp4rl eval`; None for the default of `evaluation.max_new_tokens`."""

    @abstractmethod
    def problems(self, split: Split, count: int | None = None) -> tuple[Problem, ...]:
        """Return the first `count` problems of a split, all different; a smaller count gives a prefix."""

    @abstractmethod
    def substance(self, problem: Problem) -> str:
        """Return what a problem asks without its wording: two problems of one substance are the same problem."""

    @abstractmethod
    def score(self, problem: Problem, completion: str) -> Score:
        """Compare a completion with the problem's answer."""

    def extracted(self, completion: str) -> str | None:  # noqa: ARG002
        """Return the answer that `score` reads out of a completion, written in one way; None where it reads none, or
        where the task does not tell."""
        return None

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end an answer, besides the end token."""
        return ()

    @property
    def scored_as(self) -> str:
        """Which scorer evaluations name; two that differ cannot be compared."""
        return self.name

    @property
    def files(self) -> dict[str, str]:
        """Key -> the file that it names, for every key of type `LocalPath` that is set."""
        return {key: path for key in self.file_keys() if (path := getattr(self, key)) is not None}

    @classmethod
    def file_keys(cls) -> tuple[str, ...]:
        """Return the keys that name files, in the order of their definition."""
        hints = get_type_hints(cls, include_extras=True)
        return tuple(key for key in cls.model_fields if LocalPath in (hints[key], *get_args(hints[key])))


def first(problems: Sequence[Problem], count: int | None, source: str) -> tuple[Problem, ...]:
    """Return the first `count` problems, or all; raises InvalidValueError where `source` holds fewer."""
    if count is not None and count > len(problems):
        raise InvalidValueError(f"{source} has {len(problems)} problems, not {count}")
    return tuple(problems[:count])


def identity(task: str, *content: str) -> str:
    """Return a problem's id, `<task>-<12 hex digits of its content>`."""
    return f"{task}-{digest(content)}"


def split_of(substance: str, held_out: int = 10) -> Split:
    """Return the split of a substance: `held_out` per cent each for validation and test, the rest for training.

    It depends on nothing but the substance, so that no seed, count or wording can move a problem across.
    """
    percentile = int.from_bytes(hashlib.sha256(substance.encode()).digest()[:8], "big") % 100
    if percentile < held_out:
        return "test"
    return "validation" if percentile < 2 * held_out else "train"
