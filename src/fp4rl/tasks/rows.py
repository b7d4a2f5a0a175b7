"""From a row of a table to its question, its answer and the gold that answers are compared with."""

import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, NamedTuple

from fp4rl.spec.errors import InvalidValueError
from fp4rl.tasks.answers import MARK, plain
from fp4rl.tasks.records import cell
from fp4rl.tasks.scorers import SCORERS, ScorerName

_LETTERS = string.ascii_uppercase
_VERL = ("prompt", "reward_model.ground_truth")  # verl's columns of a question and its answer


class UnscorableError(InvalidValueError):
    """An answer that holds nothing which a completion could be compared with."""


class Columns(NamedTuple):
    """Where a row holds what."""

    question: str
    answer: str
    choices: str | tuple[str, ...] | None = None
    split: str | None = None

    @property
    def wanted(self) -> str:
        """The columns that a file must have, in words."""
        return f"{self.question} and {self.answer}"

    def of(self, values: Mapping[str, Any]) -> "Columns":
        """Return those of verl's own files where a row is one and has no columns of the default names."""
        is_verl = "prompt" in values and isinstance(values.get("reward_model"), Mapping)
        if not is_verl or "question" in values or "answer" in values:
            return self
        question = _VERL[0] if self.question == "question" else self.question
        answer = _VERL[1] if self.answer == "answer" else self.answer
        return self._replace(question=question, answer=answer)


@dataclass(frozen=True)
class Row:
    """One row. `question` is its text with the choices below it; `messages` (role, text) are set where the file gives a
    conversation. `source` is the answer as it stands there, `answer` one good completion, `where` file and line."""

    question: str
    messages: tuple[tuple[str, str], ...]
    source: str
    answer: str
    gold: str
    where: str
    split: Any = None


def row_of(values: Mapping[str, Any], location: str, columns: Columns, scorer: ScorerName) -> Row:
    """Read one row. Raises NotFoundError for a missing column and InvalidValueError for what cannot be used."""
    columns = columns.of(values)
    messages = _messages(cell(values, columns.question, location), f"{location}: {columns.question!r}")
    question = messages[-1][1] if messages else _text(values, columns.question, location)
    source = _answer(values, columns.answer, location)
    split = cell(values, columns.split, location) if columns.split is not None else None
    gold: str | None
    if columns.choices is not None:
        labels, texts = _choices(values, columns.choices, location)
        gold = _letter(source, labels, texts, f"{location}: {columns.answer!r}")
        question += "".join(f"\n{letter}. {text}" for letter, text in zip(_LETTERS, texts, strict=False))
        return Row(question, (), source, f"{MARK} {gold}", gold, location, split)
    how = SCORERS[scorer]
    if (gold := how.gold(source)) is None:
        raise UnscorableError(f"{location}: the answer has {how.lacks}; add it")
    return Row(question, messages, source, how.solution(source, gold), gold, location, split)


def normalised(question: str) -> str:
    """Reduce a question to small letters, digits and single blanks: two that differ in punctuation are one."""
    return " ".join(re.sub(f"[{re.escape(string.punctuation)}]", " ", question.casefold()).split())


def _text(values: Mapping[str, Any], column: str, location: str) -> str:
    text, what = cell(values, column, location), f"{location}: {column!r}"
    if not isinstance(text, str):
        raise InvalidValueError(f"{what} is {type(text).__name__}, not text; write it as a string")
    return _whole(text, what)


def _whole(text: str, what: str) -> str:
    if any("\ud800" <= mark <= "\udfff" for mark in text):
        raise InvalidValueError(f"{what} holds half of a character (a lone surrogate); write it whole")
    if not text.strip():
        raise InvalidValueError(f"{what} is empty; fill it in, or take the row out")
    return text.strip()


def _answer(values: Mapping[str, Any], column: str, location: str) -> str:
    """Return the answer as text; a bare number is one."""
    value = cell(values, column, location)
    if isinstance(value, list) and len(value) == 1:  # datasets that allow several right answers write one as a list
        value = value[0]
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return plain(Decimal(str(value)))
    if not isinstance(value, str):
        kind = type(value).__name__
        raise InvalidValueError(f"{location}: {column!r} is {kind}, not text or a number; write it as one")
    return _whole(value, f"{location}: {column!r}")


def _messages(value: Any, what: str) -> tuple[tuple[str, str], ...]:
    """Return a conversation as (role, text) pairs; nothing for a question that is text."""
    if isinstance(value, str) or not isinstance(value, list):
        return ()
    turns = tuple((str(turn.get("role")), _content(turn.get("content"))) for turn in value if isinstance(turn, Mapping))
    if len(turns) != len(value) or not turns or any(not text.strip() for _, text in turns) or turns[-1][0] != "user":
        raise InvalidValueError(
            f"{what} is a list, but no conversation that ends with the user: write {{role, content}} for each message"
        )
    return tuple((role, _whole(text, what) if role == "user" else text) for role, text in turns)


def _content(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""


def _choices(
    values: Mapping[str, Any], columns: str | tuple[str, ...], location: str
) -> tuple[Sequence[str], Sequence[str]]:
    """Return the labels of the choices, empty where they have none, and their texts."""
    if not isinstance(columns, str):
        return columns, [str(cell(values, column, location)).strip() for column in columns]
    given, labels = cell(values, columns, location), []
    if isinstance(given, str) and given.lstrip().startswith(("[", "{")):
        try:
            given = json.loads(given)
        except ValueError:
            given = None
    if isinstance(given, Mapping) and "text" in given:  # as ARC writes them
        given, labels = given["text"], [str(label) for label in given.get("label", ())]
    elif isinstance(given, Mapping):
        given, labels = list(given.values()), [str(label) for label in given]
    if not isinstance(given, list) or not 2 <= len(given) <= len(_LETTERS):
        raise InvalidValueError(f"{location}: {columns!r} is no list of 2 to 26 choices; write a list, or name columns")
    return labels, [str(text).strip() for text in given]


def _letter(source: str, labels: Sequence[str], texts: Sequence[str], what: str) -> str:
    """Return the letter of the right choice, which is given by its label, its letter, its text or its number from 0."""
    letters = _LETTERS[: len(texts)]
    places = [list(labels).index(source)] if source in labels else [n for n, text in enumerate(texts) if text == source]
    if source.upper() in letters and source not in labels and len(source) == 1:
        places = [letters.index(source.upper())]
    elif not places and source.isascii() and source.isdigit() and int(source) < len(texts):
        places = [int(source)]
    if len(places) != 1:
        which = f"fits {len(places)} of the {len(texts)} choices" if places else f"is none of the {len(texts)} choices"
        raise UnscorableError(f"{what} {source[:40]!r} {which}; write its letter, its number from 0 or its text")
    return letters[places[0]]
