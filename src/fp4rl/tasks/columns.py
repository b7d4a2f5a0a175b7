"""What a whole column says of itself: that it is not the one that was meant, or may not be."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Literal

from fp4rl.spec.errors import UserError
from fp4rl.spec.task import SPLITS, Split
from fp4rl.tasks.guess import is_answer
from fp4rl.tasks.records import records
from fp4rl.tasks.rows import Row
from fp4rl.tasks.scorers import SCORERS
from fp4rl.tasks.table import TableTask

_FEW = 5  # rows below which a column tells nothing of itself
_MANY = 20  # rows below which numbers that rise tell nothing
_TRIED = 50  # rows that another column is tried on
_NUMBERS = re.compile(r"(?:.*[^a-z])?(?:id|idx|index|row|nr|no|unnamed.*)|row.?(?:nr|no|num|number)", re.IGNORECASE)

Side = Literal["question", "answer"]


@dataclass(frozen=True)
class Wrong:
    """A column that is not the one that was meant. `of`: what was read from it; `sure`: whether that is more than a
    suspicion."""

    of: frozenset[Side]
    what: str
    sure: bool = True


def wrong_columns(task: TableTask, splits: dict[Split, list[Row]]) -> Iterator[Wrong]:
    """Yield the columns of question and answer that are not what was meant."""
    rows = [row for split in SPLITS for row in splits[split]]
    if len(rows) < _FEW:
        return
    questions, answers = [row.question for row in rows], [row.source for row in rows]
    most, times = Counter(questions).most_common(1)[0]
    if times > len(rows) / 2:
        yield Wrong(frozenset({"question"}), f"{times} of {len(rows)} questions are {_short(most)}")
    elif sum(any(map(str.isalpha, text)) or " " in text.strip() for text in questions) < len(rows) / 2:
        yield Wrong(frozenset({"question"}), f"the questions are numbers, such as {_short(questions[0])}")
    same = sum(question == answer for question, answer in zip(questions, answers, strict=True))
    if same > len(rows) / 2:
        yield Wrong(frozenset({"question", "answer"}), f"{same} of {len(rows)} answers are the question itself")
    if wrong := numbers_of_rows(task, [(split, row.gold, row.answer) for split in SPLITS for row in splits[split]]):
        yield wrong


def numbers_of_rows(task: TableTask, answers: Sequence[tuple[Split, str, str]]) -> Wrong | None:
    """Return why the gold answers may be numbers of rows; None where nothing says so.

    `answers`: split, gold and solution of each row, in the file's order. Numbers that rise may well be the answers. It
    is sure where the column is called so, or where another one has the name of an answer and this one has not.
    """
    form = re.escape(SCORERS[task.scorer].form).replace(re.escape("{}"), r"\d{1,15}")
    bare = re.compile(rf"(?:\d+\n)?{form}")  # worked solutions are no numbers of rows
    if len(answers) < _MANY or not all(gold.isdecimal() and bare.fullmatch(text) for _, gold, text in answers):
        return None
    by_split = ([int(gold) for own, gold, _ in answers if own == split] for split in SPLITS)
    if any(a >= b for numbers in by_split for a, b in pairwise(numbers)):
        return None
    first = ", ".join(map(str, sorted(int(gold) for _, gold, _ in answers)[:3]))
    what, name = f"the gold answers count up ({first} ...), as numbers of rows do", task.answer
    if _NUMBERS.fullmatch(name):
        return Wrong(frozenset({"answer"}), f"{what}, in a column called {name!r}{could_be(task)}")
    if not is_answer(name) and any(map(is_answer, _scorable(task))):
        return Wrong(frozenset({"answer"}), f"{what}{could_be(task)}")
    return Wrong(frozenset({"answer"}), f"{what}; if they are the answers, all is well", sure=False)


def could_be(task: TableTask) -> str:
    """Return which other columns hold golds that the task's scorer reads, in words; empty where none does."""
    names = _scorable(task)
    named = [name for name in names if is_answer(name)] or [name for name in names if not _NUMBERS.fullmatch(name)]
    return f"; task.answer could be {' or '.join(named[:3])}" if named else ""


def _scorable(task: TableTask) -> list[str]:
    """Return the columns, but those of question and answer, whose values the task's scorer reads as golds."""
    gold, right, tried = SCORERS[task.scorer].gold, Counter[str](), 0
    for _, read in islice(records(Path(task.path)), _TRIED):
        tried += 1
        try:
            values = read()
        except UserError:
            continue
        right.update(str(name) for name, value in values.items() if isinstance(value, str | int) and gold(str(value)))
    own = (task.question, task.answer)
    return [name for name, count in right.most_common() if name not in own and count > tried / 2]


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
