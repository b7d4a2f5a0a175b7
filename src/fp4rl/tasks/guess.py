"""Guess what a table holds: its columns of question, answer and choices, and how the answers are compared."""

import string
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from fp4rl.spec.errors import InvalidValueError
from fp4rl.tasks.records import cell, records
from fp4rl.tasks.rows import Columns
from fp4rl.tasks.scorers import SCORERS, ScorerName

_QUESTIONS = ("question", "problem", "query", "instruction", "prompt", "input", "text", "q")
_ANSWERS = (
    *("answer", "final_answer", "gold", "ground_truth", "target", "solution", "output", "response", "label"),
    *("answerkey", "a"),
)
_CHOICES = ("choices", "options")
_ENOUGH = 0.9  # share of the rows that a guess must fit


def guessed(path: Path, question: str | None = None, answer: str | None = None) -> dict[str, Any]:
    """Return the keys of a `table` task for a file; columns that are named are taken as they are.

    Raises InvalidValueError where no column looks like a question or an answer.
    """
    rows = [read() for _, read in islice(records(path), 200)]
    if not rows:
        raise InvalidValueError(f"{path} holds no rows; give a file with questions and answers")
    verl = Columns("question", "answer").of(rows[0])
    if verl.question == "prompt" and question is None and answer is None:
        texts = [str(row["reward_model"].get("ground_truth", "")) for row in rows]
        return {"scorer": _scorer(texts)}
    names = {str(name): [row.get(name) for row in rows] for name in rows[0]}
    choices = _choices(names)
    taken = [choices] if isinstance(choices, str) else list(choices or ())
    question = question or _named(names, _QUESTIONS, taken) or _longest(names, taken)
    answer = answer or _named(names, _ANSWERS, [*taken, question])
    if answer is None:
        rest = [name for name in names if name not in (*taken, question)]
        if len(rest) != 1:
            raise InvalidValueError(f"{path}: which column is the answer? of {', '.join(names)}; say it with --answer")
        (answer,) = rest
    keys: dict[str, Any] = {"question": question, "answer": answer}
    if choices is not None:
        return keys | {"choices": choices, "scorer": "choice"}
    for column in (question, answer):
        cell(rows[0], column, str(path))  # one that is named by the user may not be there
    texts = [str(cell(row, answer, str(path))) for row in rows if row.get(answer, "") is not None]
    return keys | {"scorer": _scorer(texts)}


def is_answer(name: str) -> bool:
    """Return whether a column, or the last part of `a.b`, has a name that answers have."""
    last = _plain(name.rpartition(".")[2])
    return last in _ANSWERS and len(last) > 1  # `a` is an operand as often


def _plain(name: str) -> str:
    return name.casefold().strip().replace(" ", "_")


def _named(names: Mapping[str, Sequence[Any]], known: Sequence[str], taken: Sequence[str]) -> str | None:
    small = {_plain(name): name for name in names if name not in taken}
    return next((small[name] for name in known if name in small), None)


def _longest(names: Mapping[str, Sequence[Any]], taken: Sequence[str]) -> str:
    """Return the column of the longest texts."""
    return max((name for name in names if name not in taken), key=lambda name: sum(len(str(v)) for v in names[name]))


def _choices(names: Mapping[str, Sequence[Any]]) -> str | list[str] | None:
    named = _named(names, _CHOICES, ())
    if named is not None:
        return named
    letters = [name for name in string.ascii_uppercase if name in names]
    return letters if len(letters) > 1 else None


def _scorer(answers: Sequence[str]) -> ScorerName:
    """Return the first scorer that reads almost all answers: boxed formulas, numbers, letters, formulas, else texts."""

    def share(name: ScorerName) -> float:
        return sum(SCORERS[name].gold(text) is not None for text in answers) / max(len(answers), 1)

    boxed = sum("\\boxed" in text for text in answers) / max(len(answers), 1)
    if boxed > _ENOUGH:
        return "math_verify"
    if share("number") > _ENOUGH:
        return "number"
    if all(len(text.strip("() .")) == 1 for text in answers) and share("choice") > _ENOUGH:
        return "choice"
    return "math_verify" if any("\\" in text or "$" in text or "^" in text for text in answers) else "exact"
