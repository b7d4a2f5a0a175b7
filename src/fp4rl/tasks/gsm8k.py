"""GSM8K from a local JSONL or Parquet file with the columns `question` and `answer`; nothing is ever downloaded."""

import json
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fp4rl.spec.mistakes import BadValue, NotThere, nearest
from fp4rl.tasks import answers
from fp4rl.tasks.task import Problem, Score, Split, digest_of, identity, split_of

COLUMNS = ("question", "answer")


@dataclass(frozen=True)
class Gsm8k:
    """The task over one file, or over a training file and a test file.

    With one file its rows are cut 80 : 10 : 10 into train, validation and test by a hash of the normalised question.
    With `test_path` the test split is that file, and `path` is cut 90 : 10 into train and validation.
    Raises NotThere for a missing file or column, BadValue for a row that cannot be read and for a prompt without
    `{question}`; each names the file, the row and the cure.
    """

    path: Path
    test_path: Path | None = None
    prompt: str = "Question: {question}\nAnswer:"
    name: str = "gsm8k"

    def __post_init__(self) -> None:
        if "{question}" not in self.prompt:
            raise BadValue(f"the prompt {self.prompt!r} has no place for the question; write {{question}} into it")
        for path in (self.path, self.test_path):
            if path is not None and not Path(path).is_file():
                raise NotThere(f"GSM8K file {str(path)!r} does not exist; give the path of a local .jsonl or .parquet")

    def problems(self, split: Split, count: int | None = None) -> tuple[Problem, ...]:
        """The first `count` problems of a split in the file's order; all of them without a count."""
        found = self._by_split[split]
        if count is not None and count > len(found):
            raise BadValue(f"the {split} split of {self._source(split)} has {len(found)} problems, not {count}")
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
        found: dict[Split, list[Problem]] = {"train": [], "validation": [], "test": []}
        for question, answer, gold in rows(self.path):
            split = self._split(question)
            found[split].append(self._problem(question, answer, gold, split))
        if self.test_path is not None:
            found["test"] = [self._problem(*row, "test") for row in rows(self.test_path)]
        return {split: tuple(problems) for split, problems in found.items()}

    def _split(self, question: str) -> Split:
        split = split_of(normalised(question))
        return "train" if split == "test" and self.test_path is not None else split

    def _problem(self, question: str, answer: str, gold: str, split: Split) -> Problem:
        # replace, not format: a template may hold braces of its own (LaTeX, JSON), and so may a question
        prompt = self.prompt.replace("{question}", question)
        return Problem(identity("gsm8k", question, answer), prompt, gold, answer, split)


def normalised(question: str) -> str:
    """Small letters and digits only, single blanks: two questions that differ in punctuation are one."""
    return " ".join(re.sub(f"[{re.escape(string.punctuation)}]", " ", question.casefold()).split())


def rows(path: Path) -> Iterator[tuple[str, str, str]]:
    """(question, answer text, final number as a plain string) of every row, in the file's order."""
    place = None
    for row, place in _records(Path(path)):
        for column in COLUMNS:
            if column not in row:
                raise NotThere(f"{place}: no column {column!r}{nearest(column, map(str, row))}")
            if not isinstance(row[column], str):
                raise BadValue(f"{place}: {column!r} is {type(row[column]).__name__}, not text; write it as a string")
        gold = answers.strict_number(row["answer"])
        if gold is None:
            raise BadValue(f"{place}: the answer has no final number after '####'; end it with a line like '#### 42'")
        yield row["question"].strip(), row["answer"].strip(), answers.plain(gold)
    if place is None:
        raise BadValue(f"{path} holds no rows; give a file with the columns {' and '.join(COLUMNS)}")


def _records(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    if path.suffix == ".parquet":
        yield from _parquet(path)
    elif path.suffix in (".jsonl", ".json"):
        yield from _jsonl(path)
    else:
        raise BadValue(f"{path}: unknown kind of file {path.suffix!r}; give a .jsonl or .parquet file")


def _jsonl(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as why:
                raise BadValue(f"{place}: not JSON ({why.msg}); write one object a line") from None
            if not isinstance(row, dict):
                raise BadValue(f"{place}: not an object; write one {{'question': ..., 'answer': ...}} a line")
            yield row, place


def _parquet(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    import pyarrow as pa  # only here: a JSONL reader should not pay for it
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as why:
        raise BadValue(f"{path}: not a Parquet file ({str(why).splitlines()[0]})") from None
    for number, row in enumerate(table.to_pylist(), start=1):
        yield row, f"{path}, row {number}"
