"""What is wrong with a table of questions and answers, row by row, each fault with the line where it stands.

Everything is looked at before anything is raised: a run stops at the first fault, whoever mends a file wants them all.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fp4rl.spec.errors import NotFoundError, UserError
from fp4rl.spec.task import SPLITS, Split
from fp4rl.tasks.answers import MARK
from fp4rl.tasks.records import records
from fp4rl.tasks.rows import Row, UnscorableError, normalised
from fp4rl.tasks.scorers import SCORERS
from fp4rl.tasks.table import TableTask

_FEW = 5  # rows below which a column tells nothing of itself
_WALL = 3  # answers of exactly the greatest length that are called cut off
_TRIED = 50  # rows that another column is tried on
_COMPUTED = re.compile(r"<<[^<>=]*=(-?[0-9.]+)>>")  # GSM8K writes each computation so
_OPEN_END = re.compile(r"(?:[-+*/=^_,(\[{\\<]|\\[a-zA-Z]*frac|\b(?:the|is|of|and|to|a|an|so))$")


@dataclass(frozen=True)
class Fault:
    """One fault. `kind`: a word or two for the kind; `where`: file and line, empty for what a whole column has."""

    kind: str
    where: str
    what: str


@dataclass
class Checked:
    """The rows of a task by split, those that can be read, the faults of all, and what may be one."""

    splits: dict[Split, list[Row]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    faults: list[Fault] = field(default_factory=list)
    remarks: list[Fault] = field(default_factory=list)
    rows: int = 0


def checked(task: TableTask) -> Checked:
    """Read all rows of a task and look for what is wrong with each, with its columns, and between its splits.

    Raises NotFoundError for a file that does not exist and InvalidValueError for one that is none of its kind.
    """
    result, wrong = Checked(), list[Exception]()
    for key, path in task.files.items():
        for row in task.rows(path):
            result.rows += 1
            try:
                if isinstance(row, UserError):
                    raise row
                result.splits[task.split_of_row(row, key)].append(row)
            except UserError as error:
                wrong.append(error)
    readable = [row for split in SPLITS for row in result.splits[split]]
    result.faults += [*_unread(task, wrong, result.rows), *_columns(readable), *_cut_off(readable)]
    result.remarks += _maybe_cut_off(readable)
    result.faults += [*_twice(result.splits), *_leaks(readable, task)]
    return result


def _unread(task: TableTask, wrong: Sequence[Exception], rows: int) -> Iterator[Fault]:
    """Yield a fault for each row that cannot be read; one for all where a column is missing or holds no answers."""
    missing = [error for error in wrong if isinstance(error, NotFoundError)]
    unscorable = [error for error in wrong if isinstance(error, UnscorableError)]
    for kind, errors in (("wrong column", missing), ("wrong column", unscorable)):
        if len(errors) > max(rows / 2, 1):
            where, _, what = str(errors[0]).partition(": ")
            other = _scorable_columns(task) if errors is unscorable else ""
            yield Fault(kind, where, f"{what} - so in {len(errors)} of {rows} rows{other}")
            wrong = [error for error in wrong if error not in errors]
    for error in wrong:
        where, _, what = str(error).partition(": ")
        kind = "unscorable" if isinstance(error, UnscorableError) else "unreadable"
        yield Fault(kind, where, what)


def _scorable_columns(task: TableTask) -> str:
    """Return which other columns hold golds that the task's scorer reads, in words."""
    gold, right = SCORERS[task.scorer].gold, Counter[str]()
    for (_, read), _ in zip(records(Path(task.path)), range(_TRIED), strict=False):
        try:
            values = read()
        except UserError:
            continue
        right.update(str(name) for name, value in values.items() if isinstance(value, str | int) and gold(str(value)))
    names = [name for name, count in right.most_common() if name != task.answer and count > _TRIED / 4]
    return f"; task.answer could be {' or '.join(names[:3])}" if names else ""


def _columns(rows: Sequence[Row]) -> Iterator[Fault]:
    """Yield what a whole column says of itself: that it is not the one that was meant."""
    if len(rows) < _FEW:
        return
    questions, answers = [row.question for row in rows], [row.source for row in rows]
    most, times = Counter(questions).most_common(1)[0]
    if times > len(rows) / 2:
        yield Fault("wrong column", rows[0].where, f"{times} of {len(rows)} questions are {_short(most)}")
    elif sum(any(map(str.isalpha, text)) or " " in text.strip() for text in questions) < len(rows) / 2:
        yield Fault("wrong column", rows[0].where, f"the questions are numbers, such as {_short(questions[0])}")
    same = sum(question == answer for question, answer in zip(questions, answers, strict=True))
    if same > len(rows) / 2:
        yield Fault("wrong column", rows[0].where, f"{same} of {len(rows)} answers are the question itself")


def _cut_off(rows: Sequence[Row]) -> Iterator[Fault]:
    """Yield answers that end before they are whole: by their last words, their computation, or a wall of one length."""
    longest = max((len(row.source) for row in rows), default=0)
    wall = [row for row in rows if len(row.source) == longest]
    is_wall = len(wall) >= _WALL and longest >= 2 * _FEW * _FEW
    for row in rows:
        text = row.source.rstrip()
        if is_wall and len(row.source) == longest:
            yield Fault(
                "cut off", row.where, f"one of {len(wall)} answers of exactly {longest} letters, the most of all"
            )
        elif _OPEN_END.search(text) or (unclosed := text.count("{") - text.count("}")) > 0:
            how = "is not whole" if _OPEN_END.search(text) else f"has {unclosed} braces that never close"
            yield Fault("cut off", row.where, f"the answer ends in {_short(text[-30:])} and {how}")


def _maybe_cut_off(rows: Sequence[Row]) -> Iterator[Fault]:
    """Yield numbers that begin the last one computed: sound data has some, where thousands are asked for."""
    for row in rows:
        if MARK in row.source and (computed := _COMPUTED.findall(row.source)):
            last = computed[-1].removesuffix(".")
            if last.startswith(row.gold) and last[len(row.gold) :].isdigit():
                yield Fault(
                    "maybe cut off", row.where, f"the final number is {row.gold}, and what was computed last {last}"
                )


def _twice(splits: dict[Split, list[Row]]) -> Iterator[Fault]:
    """Yield questions that stand in the data twice: within a split, and in another split than they are trained in."""
    first: dict[str, tuple[Split, Row]] = {}
    for split in SPLITS:
        for row in splits[split]:
            earlier, other = first.setdefault(normalised(row.question), (split, row))
            if other is row:
                continue
            agree = (
                "" if other.gold == row.gold else f", and answers {_short(row.gold)} instead of {_short(other.gold)}"
            )
            if earlier != split:
                yield Fault(
                    "leakage", row.where, f"this {split} question is in the {earlier} split, {other.where}{agree}"
                )
            else:
                kind = "contradiction" if agree else "duplicate"
                yield Fault(kind, row.where, f"asks what {other.where} asks ({_short(row.question)}){agree}")


def _leaks(rows: Sequence[Row], task: TableTask) -> Iterator[Fault]:
    """Yield questions that hold their own answer in the form that is asked for, and golds that cannot be compared."""
    scorer = SCORERS[task.scorer]
    for row in rows:
        if task.choices is None and scorer.score(row.gold, row.question).strict:
            yield Fault(
                "leakage", row.where, f"the question holds its own answer, {_short(scorer.form)} with {row.gold}"
            )
        if not scorer.readable(row.gold):
            yield Fault("unscorable", row.where, f"no formula can be read in the gold {_short(row.gold)}")


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
