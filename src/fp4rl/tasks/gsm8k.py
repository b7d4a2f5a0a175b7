"""GSM8K from a local JSONL or Parquet file with the columns `question` and `answer`; nothing is ever downloaded."""

import json
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator

from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest
from fp4rl.spec.frozen import LocalPath
from fp4rl.spec.task import SPLITS, Problem, Score, Split, Task, first, identity, split_of
from fp4rl.tasks import answers

COLUMNS = ("question", "answer")


class Row(NamedTuple):
    """One row of a file: `gold` is the final number of `answer` as a plain string, `where` its file and line."""

    question: str
    answer: str
    gold: str
    where: str


class Gsm8k(Task):
    """GSM8K from a local JSONL or Parquet file with the columns `question` and `answer`.

    With one file its rows are cut 80 : 10 : 10 into train, validation and test by a hash of the normalised question.
    With `test_path` the test split is that file, and `path` is cut 90 : 10 into train and validation.
    """

    name: Literal["gsm8k"] = "gsm8k"
    path: LocalPath = Field(
        description="the training file; the held-out split is cut from it when `test_path` is not given"
    )
    test_path: LocalPath | None = Field(default=None, description="file of the held-out problems")
    prompt: str = Field(default="Question: {question}\nAnswer:", description="what the model sees of a problem")

    @field_validator("prompt")
    @classmethod
    def _holds_the_question(cls, prompt: str) -> str:
        if "{question}" not in prompt:
            raise ValueError(f"the prompt {prompt!r} has no place for the question; write {{question}} into it")
        return prompt

    @property
    def stop(self) -> tuple[str, ...]:
        """The text before the question on its line: a model that writes it begins another question."""
        before = self.prompt.partition("{question}")[0].rpartition("\n")[2].strip()
        return (before,) if before else ()

    def problems(self, split: Split, count: int | None = None) -> tuple[Problem, ...]:
        """Return the first `count` problems of a split in the file's order; all of them without a count.

        Raises NotFoundError for a missing file or column and InvalidValueError for a row that cannot be read and for a
        split with fewer problems; each names the file, the row and the cure.
        """
        problems = _by_split(self, tuple(_written_at(path) for path in self.files.values()))[split]
        source = self.test_path if split == "test" and self.test_path is not None else self.path
        return first(problems, count, f"the {split} split of {source}")

    def substance(self, problem: Problem) -> str:
        """Return the question in small letters, without punctuation and extra blanks."""
        return normalised(problem.prompt)

    def score(self, problem: Problem, completion: str) -> Score:
        """Compare the final number with the gold one, exactly."""
        return answers.scored(problem.answer, completion)

    def extracted(self, completion: str) -> str | None:
        """Return the number after `####`."""
        return answers.extracted(completion)


@lru_cache(maxsize=2)  # a run needs its splits several times; `_written` changes when the file does
def _by_split(task: Gsm8k, _written: tuple[tuple[int, int], ...]) -> dict[Split, tuple[Problem, ...]]:
    by_split: dict[Split, list[Row]] = {split: [] for split in SPLITS}
    for row in rows(Path(task.path)):
        split = split_of(normalised(row.question))
        by_split["train" if split == "test" and task.test_path is not None else split].append(row)
    if task.test_path is not None:
        by_split["test"] = list(rows(Path(task.test_path)))
    for held_out in (by_split["validation"], by_split["test"]):
        _require_distinct(held_out)
    return {split: tuple(_problem(row, task.prompt, split) for row in held) for split, held in by_split.items()}


def _written_at(path: str) -> tuple[int, int]:
    """Return size and modification time of a file. Raises NotFoundError where there is none."""
    file = Path(path)
    if not file.is_file():
        raise NotFoundError(f"GSM8K file {path!r} does not exist; give the path of a local .jsonl or .parquet")
    return file.stat().st_size, file.stat().st_mtime_ns


def _problem(row: Row, template: str, split: Split) -> Problem:
    # replace, not format: a template may hold braces of its own (LaTeX, JSON), and so may a question
    prompt = template.replace("{question}", row.question)
    return Problem(identity("gsm8k", row.question, row.answer), prompt, row.gold, row.answer, split)


def normalised(question: str) -> str:
    """Reduce a question to small letters, digits and single blanks: two that differ in punctuation are one."""
    return " ".join(re.sub(f"[{re.escape(string.punctuation)}]", " ", question.casefold()).split())


def _require_distinct(held_out: Sequence[Row]) -> None:
    """Raise InvalidValueError for a question that occurs twice: it would count as two problems."""
    first_place: dict[str, str] = {}
    distinct = [(row, first_place.setdefault(normalised(row.question), row.where)) for row in held_out]
    repeated = [(row, where) for row, where in distinct if where != row.where]
    if repeated:
        row, where = repeated[0]
        raise InvalidValueError(
            f"{row.where}: asks what {where} asks ({row.question[:40]!r}); {len(repeated)} of {len(held_out)} held-out "
            "problems are repetitions, take them out of the file"
        )


def rows(path: Path) -> Iterator[Row]:
    """Read every row, in the file's order."""
    location = None
    for row, location in _records(Path(path)):
        question, answer = (_text(row, column, location) for column in COLUMNS)
        gold = answers.strict_number(answer)
        if gold is None:
            raise InvalidValueError(
                f"{location}: the answer has no final number after '####', such as '#### 42'; add it"
            )
        yield Row(question, answer, answers.plain(gold), location)
    if location is None:
        raise InvalidValueError(f"{path} holds no rows; give a file with the columns {' and '.join(COLUMNS)}")


def _text(row: Mapping[str, Any], column: str, location: str) -> str:
    if column not in row:
        raise NotFoundError(f"{location}: no column {column!r}{nearest(column, map(str, row))}")
    text, what = row[column], f"{location}: {column!r}"
    if not isinstance(text, str):
        raise InvalidValueError(f"{what} is {type(text).__name__}, not text; write it as a string")
    if any("\ud800" <= mark <= "\udfff" for mark in text):
        raise InvalidValueError(f"{what} holds half of a character (a lone surrogate); write it whole")
    return text.strip()


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
            location = f"{path}, line {number}"
            text = _utf8(line, location)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as why:  # also numbers of thousands of digits, and too deep nesting
                reason = getattr(why, "msg", str(why).splitlines()[0])
                raise InvalidValueError(f"{location}: not JSON ({reason}); write one object a line") from None
            if not isinstance(row, dict):
                raise InvalidValueError(f"{location}: no object; write one {{'question': ..., 'answer': ...}} a line")
            yield row, location


def _utf8(line: bytes, location: str) -> str:
    """Return the line as text, without the byte order mark that a file may begin with."""
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InvalidValueError(f"{location}: UTF-16, not UTF-8; save the file again as UTF-8")
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as why:
        byte = f"0x{line[why.start]:02x}"
        raise InvalidValueError(f"{location}: byte {byte} is not UTF-8 (Latin-1?); save the file as UTF-8") from None


def _parquet(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    import pyarrow as pa  # only here: a JSONL reader should not pay for it
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as why:
        raise InvalidValueError(f"{path}: not a Parquet file ({str(why).splitlines()[0]})") from None
    for number, row in enumerate(table.to_pylist(), start=1):
        yield row, f"{path}, row {number}"
