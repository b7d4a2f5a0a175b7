"""GSM8K from a local JSONL or Parquet file with the columns `question` and `answer`; nothing is ever downloaded."""

import json
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest
from fp4rl.tasks import answers
from fp4rl.tasks.task import SPLITS, Problem, Score, Split, digest_of, identity, split_of

COLUMNS = ("question", "answer")


class Row(NamedTuple):
    """One row of a file: `gold` is the final number of `answer` as a plain string, `place` the file and the line."""

    question: str
    answer: str
    gold: str
    place: str


@dataclass(frozen=True)
class Gsm8k:
    """The task over one file, or over a training file and a test file.

    With one file its rows are cut 80 : 10 : 10 into train, validation and test by a hash of the normalised question.
    With `test_path` the test split is that file, and `path` is cut 90 : 10 into train and validation.
    Raises NotFoundError for a missing file or column, InvalidValueError for a row that cannot be read and for a prompt
    without `{question}`; each names the file, the row and the cure.
    """

    path: Path
    test_path: Path | None = None
    prompt: str = "Question: {question}\nAnswer:"
    name: str = "gsm8k"

    def __post_init__(self) -> None:
        if "{question}" not in self.prompt:
            raise InvalidValueError(
                f"the prompt {self.prompt!r} has no place for the question; write {{question}} into it"
            )
        for path in (self.path, self.test_path):
            if path is not None and not Path(path).is_file():
                raise NotFoundError(
                    f"GSM8K file {str(path)!r} does not exist; give the path of a local .jsonl or .parquet"
                )

    def problems(self, split: Split, count: int | None = None) -> tuple[Problem, ...]:
        """The first `count` problems of a split in the file's order; all of them without a count."""
        found = self._by_split[split]
        if count is not None and count > len(found):
            raise InvalidValueError(
                f"the {split} split of {self._source(split)} has {len(found)} problems, not {count}"
            )
        return found[:count]

    def substance(self, problem: Problem) -> str:
        """The question in small letters, without punctuation and extra blanks."""
        return normalised(problem.prompt)

    def digest(self, problems: Sequence[Problem]) -> str:
        """Twelve hexadecimal digits that stand for these problems in this order."""
        return digest_of(problems)

    def score(self, problem: Problem, completion: str) -> Score:
        """The final number against the gold one, exactly."""
        return answers.scored(problem.answer, completion)

    def _source(self, split: Split) -> Path:
        return self.test_path if split == "test" and self.test_path is not None else self.path

    @cached_property
    def _by_split(self) -> dict[Split, tuple[Problem, ...]]:
        found: dict[Split, list[Row]] = {"train": [], "validation": [], "test": []}
        for row in rows(self.path):
            found[self._split(row.question)].append(row)
        if self.test_path is not None:
            found["test"] = list(rows(self.test_path))
        for split in ("validation", "test"):
            _require_distinct(found[split])
        return {split: tuple(self._problem(row, split) for row in found[split]) for split in SPLITS}

    def _split(self, question: str) -> Split:
        split = split_of(normalised(question))
        return "train" if split == "test" and self.test_path is not None else split

    def _problem(self, row: Row, split: Split) -> Problem:
        # replace, not format: a template may hold braces of its own (LaTeX, JSON), and so may a question
        prompt = self.prompt.replace("{question}", row.question)
        return Problem(identity("gsm8k", row.question, row.answer), prompt, row.gold, row.answer, split)


def normalised(question: str) -> str:
    """Small letters and digits only, single blanks: two questions that differ in punctuation are one."""
    return " ".join(re.sub(f"[{re.escape(string.punctuation)}]", " ", question.casefold()).split())


def _require_distinct(held_out: Sequence[Row]) -> None:
    """Raise InvalidValueError for a question that is asked twice: it would count twice, as two problems would."""
    places: dict[str, str] = {}
    repeated = [
        (row, first)
        for row in held_out
        if (first := places.setdefault(normalised(row.question), row.place)) != row.place
    ]
    if repeated:
        row, first = repeated[0]
        raise InvalidValueError(
            f"{row.place}: asks what {first} asks ({row.question[:40]!r}); {len(repeated)} of {len(held_out)} held-out "
            "problems are repetitions, take them out of the file"
        )


def rows(path: Path) -> Iterator[Row]:
    """Every row, in the file's order."""
    place = None
    for row, place in _records(Path(path)):
        for column in COLUMNS:
            if column not in row:
                raise NotFoundError(f"{place}: no column {column!r}{nearest(column, map(str, row))}")
            if not isinstance(row[column], str):
                raise InvalidValueError(
                    f"{place}: {column!r} is {type(row[column]).__name__}, not text; write it as a string"
                )
            if any("\ud800" <= mark <= "\udfff" for mark in row[column]):
                raise InvalidValueError(
                    f"{place}: {column!r} holds half of a character (a lone surrogate); write it whole"
                )
        gold = answers.strict_number(row["answer"])
        if gold is None:
            raise InvalidValueError(
                f"{place}: the answer has no final number after '####'; end it with a line like '#### 42'"
            )
        yield Row(row["question"].strip(), row["answer"].strip(), answers.plain(gold), place)
    if place is None:
        raise InvalidValueError(f"{path} holds no rows; give a file with the columns {' and '.join(COLUMNS)}")


def _records(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    if path.suffix == ".parquet":
        yield from _parquet(path)
    elif path.suffix in (".jsonl", ".json"):
        yield from _jsonl(path)
    else:
        raise InvalidValueError(f"{path}: unknown kind of file {path.suffix!r}; give a .jsonl or .parquet file")


def _jsonl(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{path}, line {number}"
            text = _utf8(line, place)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as why:  # also numbers of thousands of digits, and endless nesting
                said = getattr(why, "msg", str(why).splitlines()[0])
                raise InvalidValueError(f"{place}: not JSON ({said}); write one object a line") from None
            if not isinstance(row, dict):
                raise InvalidValueError(f"{place}: not an object; write one {{'question': ..., 'answer': ...}} a line")
            yield row, place


def _utf8(line: bytes, place: str) -> str:
    """The line as text; a mark at a file's beginning (BOM) says UTF-8 once more and is left out."""
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InvalidValueError(f"{place}: UTF-16, not UTF-8; save the file again as UTF-8")
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as why:
        byte = line[why.start]
        raise InvalidValueError(
            f"{place}: byte 0x{byte:02x} is not UTF-8 (Latin-1?); save the file again as UTF-8"
        ) from None


def _parquet(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    import pyarrow as pa  # only here: a JSONL reader should not pay for it
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as why:
        raise InvalidValueError(f"{path}: not a Parquet file ({str(why).splitlines()[0]})") from None
    for number, row in enumerate(table.to_pylist(), start=1):
        yield row, f"{path}, row {number}"
