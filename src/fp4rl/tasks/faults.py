"""What is wrong with a table of questions and answers, row by row, each fault with the line where it stands.

Everything is looked at before anything is raised: a run stops at the first fault, whoever mends a file wants them all.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fp4rl.spec.errors import NotFoundError, UserError
from fp4rl.spec.task import SPLITS, Split
from fp4rl.tasks.answers import MARK
from fp4rl.tasks.columns import Side, could_be, wrong_columns
from fp4rl.tasks.formulas import has_box
from fp4rl.tasks.rows import Row, UnscorableError, normalised
from fp4rl.tasks.scorers import SCORERS
from fp4rl.tasks.table import TableTask

WRONG_COLUMN = "wrong column"
MAYBE = "maybe "  # begins the kind of a remark, which is no fault
_FEW = 5  # rows below which a whole split tells nothing
_WALL = 3  # answers of exactly the greatest length that are called cut off
_COMPUTED = re.compile(r"<<[^<>=]*=(-?[0-9.]+)>>")  # GSM8K writes each computation so
_VALUE = re.compile(r"'[^']*'|\"[^\"]*\"|\d+")
_OPEN_END = re.compile(r"(?:[-+*/=^_,(\[{\\<]|\\[a-zA-Z]*frac|\b(?:the|is|of|and|to|a|an|so))$")


@dataclass(frozen=True)
class Fault:
    """One fault. `kind`: a word or two for the kind; `where`: file and line, empty for what a whole column has."""

    kind: str
    where: str
    what: str


@dataclass
class Checked:
    """The rows of a task by split, those that can be read, the faults of all, and what may be one.

    `causes`: what is wrong of most rows (that they cannot be read, their questions, their answers). What only follows
    from that is no fault of its own.
    """

    splits: dict[Split, list[Row]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    faults: list[Fault] = field(default_factory=list)
    remarks: list[Fault] = field(default_factory=list)
    causes: set[Literal["rows", Side]] = field(default_factory=set)


def checked(task: TableTask) -> Checked:
    """Read all rows of a task and look for what is wrong with each, with its columns, and between its splits.

    Raises NotFoundError for a file that does not exist and InvalidValueError for one that is none of its kind.
    """
    result = Checked()
    _read(task, result)
    for column in wrong_columns(task, result.splits):
        if column.sure:
            result.causes |= column.of
            result.faults.append(Fault(WRONG_COLUMN, task.path, column.what))
        else:
            result.remarks.append(Fault(f"{MAYBE}{WRONG_COLUMN}", task.path, column.what))
    readable = [row for split in SPLITS for row in result.splits[split]]
    if "answer" not in result.causes:
        result.faults += _cut_off(readable)
        result.remarks += _maybe_cut_off(readable)
        result.faults += _unreadable_golds(readable, task)
    if "question" not in result.causes:
        result.faults += _twice(result.splits, golds="answer" not in result.causes)
    if not result.causes & {"question", "answer"}:
        result.faults += _leaks(readable, task)
    return result


def _read(task: TableTask, result: Checked) -> None:
    """Put the rows of all files into their splits, and what is wrong with those that cannot be read into the faults."""
    for key, path in task.files.items():
        wrong, rows = list[Exception](), [*task.rows(path)]
        for row in rows:
            try:
                if isinstance(row, UserError):
                    raise row
                result.splits[task.split_of_row(row, key)].append(row)
            except UserError as error:
                wrong.append(error)
        result.faults += _of_most(task, wrong, len(rows), result.causes)
        result.faults += map(_unread, wrong)
    if not any(result.splits.values()):
        result.causes.add("rows")
        if not result.faults:
            result.faults.append(Fault("too few", task.path, f"task.filter leaves none of its rows: {task.filter}"))


def _of_most(task: TableTask, wrong: list[Exception], rows: int, causes: set[Literal["rows", Side]]) -> Iterator[Fault]:
    """Yield one fault for what is wrong with most rows of a file alike, and take those out of `wrong`."""
    alike = Counter(map(_alike, wrong)).most_common(1)
    if not alike or alike[0][1] <= max(rows / 2, 1):
        return
    ((key, count),) = alike
    first = next(error for error in wrong if _alike(error) == key)
    wrong[:] = [error for error in wrong if _alike(error) != key]
    fault, of_column = _unread(first), isinstance(first, NotFoundError | UnscorableError)
    kind = WRONG_COLUMN if of_column or fault.what.startswith("'") else fault.kind
    causes.add("rows")
    other = could_be(task) if isinstance(first, UnscorableError) else ""
    yield Fault(kind, fault.where, f"{fault.what} - so in {count} of {rows} rows{other}")


def _alike(error: Exception) -> tuple[type[Exception], str]:
    """Return what is wrong without the values of a row: equal for rows of one fault."""
    return type(error), _VALUE.sub("_", str(error).partition(": ")[2])


def _unread(error: Exception) -> Fault:
    """Return the fault of a row, or of a whole file, that cannot be read."""
    where, colon, what = str(error).partition(": ")
    kind = "unscorable" if isinstance(error, UnscorableError) else "unreadable"
    return Fault(kind, where, what) if colon else Fault(kind, "", where)


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
                    f"{MAYBE}cut off", row.where, f"the final number is {row.gold}, and what was computed last {last}"
                )


def _twice(splits: dict[Split, list[Row]], *, golds: bool) -> Iterator[Fault]:
    """Yield questions that stand in the data twice: within a split, and in another split than they are trained in.

    `golds`: whether the golds are known to be answers, which may then agree or not.
    """
    first: dict[str, tuple[Split, Row]] = {}
    train, validation, test = ({normalised(row.question) for row in splits[split]} for split in SPLITS)
    if len(test) > _FEW and test <= train | validation:
        file, _, _ = splits["test"][0].where.partition(", ")
        yield Fault("leakage", file, f"all {len(test)} test questions are in the other splits: name another file")
        splits = {**splits, "test": []}
    for split in SPLITS:
        for row in splits[split]:
            earlier, other = first.setdefault(normalised(row.question), (split, row))
            if other is row:
                continue
            differs = golds and other.gold != row.gold
            agree = f", and answers {_short(row.gold)} instead of {_short(other.gold)}" if differs else ""
            if earlier != split:
                yield Fault(
                    "leakage", row.where, f"this {split} question is in the {earlier} split, {other.where}{agree}"
                )
            else:
                kind = "contradiction" if agree else "duplicate"
                yield Fault(kind, row.where, f"asks what {other.where} asks ({_short(row.question)}){agree}")


def _leaks(rows: Sequence[Row], task: TableTask) -> Iterator[Fault]:
    """Yield questions that hold their own answer in the form that is asked for."""
    scorer = SCORERS[task.scorer]
    for row in rows:
        if task.choices is None and scorer.score(row.gold, row.question).strict:
            answer = scorer.form.replace("{}", row.gold)
            yield Fault("leakage", row.where, f"the question holds its own answer, {_short(answer)}")


def _unreadable_golds(rows: Sequence[Row], task: TableTask) -> Iterator[Fault]:
    """Yield golds that cannot be compared, and solutions without a box where most have their answer in one."""
    boxes = sum(has_box(row.source) for row in rows) if task.scorer == "math_verify" else 0
    for row in rows:
        if boxes > len(rows) / 2 and not has_box(row.source):
            what = rf"no \boxed{{...}} in the answer, which {boxes} of {len(rows)} rows have"
            yield Fault("unscorable", row.where, what)
        elif not SCORERS[task.scorer].readable(row.gold):
            yield Fault("unscorable", row.where, f"no formula can be read in the gold {_short(row.gold)}")


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
