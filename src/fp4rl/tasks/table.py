"""Problems from a table of questions and answers on this disk; nothing is ever downloaded.

`TableTask` is the frame of all tasks that read one: which columns, which rows, which split, what the model sees. A row
becomes a problem in `rows.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, field_validator, model_validator

from fp4rl.spec.errors import InvalidValueError, NotFoundError, UserError
from fp4rl.spec.frozen import LocalPath, later_key
from fp4rl.spec.task import SPLITS, Chat, Problem, Score, Split, Task, first, identity, split_of
from fp4rl.spec.words import counted
from fp4rl.tasks.records import cell, records, written_at
from fp4rl.tasks.rows import Columns, Row, normalised, row_of
from fp4rl.tasks.scorers import SCORERS, ScorerName

_CALLED: dict[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


class TableTask(Task):
    """A table of questions and answers: JSONL, CSV, TSV or Parquet, also compressed (.gz).

    With one file its rows are cut 80 : 10 : 10 into train, validation and test by a hash of the normalised question.
    With `test_path` the test split is that file, and `path` is cut 90 : 10 into train and validation. With `split` a
    column says it.
    """

    path: LocalPath = Field(
        description="the training file; the held-out split is cut from it when `test_path` is not given"
    )
    test_path: LocalPath | None = Field(default=None, description="file of the held-out problems")
    prompt: str = Field(default="", description="what the model sees of a problem; by default what the scorer asks for")
    question: str = later_key("question", description="its column; in a file of verl's, `prompt` is given by itself")
    answer: str = later_key("answer", description="its column; a.b is the field b of column a")
    choices: str | tuple[str, ...] | None = later_key(
        None, description="column of a list of choices, or one column for each: they are lettered below the question"
    )
    scorer: ScorerName = later_key(
        "number", description="how answers are compared: numbers, letters, formulas (LaTeX) or texts"
    )
    split: str | None = later_key(None, description="a column that says train, validation or test")
    filter: dict[str, Any] = later_key({}, description="column: value, or a list of them; other rows are left out")
    system: str | None = later_key(None, description="a system message, or the first lines of a plain prompt")
    few_shot: NonNegativeInt = later_key(0, description="solved problems before each, the first of the train split")
    chat: bool | Literal["auto"] = later_key(
        "auto", description="auto: by the tokenizer's chat template where it has one; true refuses where it has none"
    )
    chat_template_kwargs: dict[str, Any] = later_key({}, description="for the template, such as enable_thinking: false")

    @model_validator(mode="before")
    @classmethod
    def _asks_for_its_answers(cls, value: Any) -> Any:
        """Write the default prompt out, so that the description says what the model sees."""
        if not isinstance(value, dict) or value.get("prompt"):
            return value
        scorer = value.get("scorer", cls.model_fields["scorer"].default)
        return {**value, "prompt": default_prompt(scorer)} if scorer in SCORERS else value

    @field_validator("prompt")
    @classmethod
    def _holds_the_question(cls, prompt: str) -> str:
        if prompt and "{question}" not in prompt:
            raise ValueError(f"the prompt {prompt!r} has no place for the question; write {{question}} into it")
        return prompt

    def _conflicts(self) -> Iterator[str]:
        if self.split is not None and self.test_path is not None:
            yield "split: test_path is the test split already; name one of them"
        if self.choices is not None and self.scorer != "choice":
            yield "choices: letters are compared by scorer: choice; write that"
        if self.chat is False and self.chat_template_kwargs:
            yield "chat_template_kwargs: no template is applied with chat: false"

    @property
    def stop(self) -> tuple[str, ...]:
        """The text before the question on its line: a model that writes it begins another question."""
        before = self.prompt.partition("{question}")[0].rpartition("\n")[2].strip()
        return (before,) if before else ()

    @property
    def scored_as(self) -> str:
        """The task's name, with its scorer where that is not the number of GSM8K."""
        return self.name if self.scorer == "number" else f"{self.name}, {self.scorer}"

    @property
    def columns(self) -> Columns:
        """Where a row holds what."""
        return Columns(self.question, self.answer, self.choices, self.split)

    def problems(self, split: Split, count: int | None = None) -> tuple[Problem, ...]:
        """Return the first `count` problems of a split in the file's order; all of them without a count.

        Raises NotFoundError for a missing file or column and InvalidValueError for a row that cannot be read and for a
        split with fewer problems; each names the file, the row and the cure.
        """
        problems = _by_split(type(self), self.model_dump_json(), self._written())[split]
        source = self.test_path if split == "test" and self.test_path is not None else self.path
        return first(problems, count, f"the {split} split of {source}")

    def rows(self, path: str) -> Iterator[Row | UserError]:
        """Yield every row of a file that the filter leaves, in order; what is wrong with one stands in its place."""
        some = False
        for location, read in records(Path(path)):
            some = True
            try:
                values = read()
                if self._keeps(values, location):
                    yield row_of(values, location, self.columns, self.scorer)
            except UserError as error:
                yield error
        if not some:
            yield InvalidValueError(f"{path} holds no rows; give a file with the columns {self.columns.wanted}")

    def split_of_row(self, row: Row, key: str) -> Split:
        """Return the split of a row of the file that `key` names, path or test_path.

        Raises InvalidValueError for a word of the column `split` that names none.
        """
        if key == "test_path":
            return "test"
        if self.split is not None:
            if (named := _CALLED.get(str(row.split).strip().casefold())) is None:
                raise InvalidValueError(
                    f"{row.where}: {self.split!r} is {row.split!r}; write train, validation or test"
                )
            return named
        split = split_of(normalised(row.question))
        return "train" if split == "test" and self.test_path is not None else split

    def substance(self, problem: Problem) -> str:
        """Return the question in small letters, without punctuation and extra blanks."""
        return normalised(problem.question)

    def score(self, problem: Problem, completion: str) -> Score:
        """Compare the completion's final answer with the gold one."""
        return SCORERS[self.scorer].score(problem.answer, completion)

    def extracted(self, completion: str) -> str | None:
        """Return the answer in the form that is asked for."""
        return SCORERS[self.scorer].read(completion)

    def _written(self) -> tuple[tuple[int, int], ...]:
        return tuple(written_at(path, self.name.upper()) for path in self.files.values())

    def _keeps(self, values: Mapping[str, Any], location: str) -> bool:
        for column, wanted in self.filter.items():
            given = cell(values, column, location)
            if given not in (wanted if isinstance(wanted, list | tuple) else (wanted,)):
                return False
        return True

    def _turn(self, row: Row) -> str:
        """Return what the user says. Not by `format`: a prompt may hold braces of its own, and so may a question."""
        if not row.messages:
            return self.prompt.replace("{question}", row.question)
        if self.prompt != default_prompt(self.scorer):
            raise InvalidValueError(f"{row.where}: the file holds whole messages; leave task.prompt out")
        return row.messages[-1][1]

    def problem(self, row: Row, split: Split, shots: Sequence[Row] = ()) -> Problem:
        """Make a row's problem, after those of `shots` with their answers."""
        head = [*([("system", self.system)] if self.system else []), *row.messages[:-1]]
        solved = [(self._turn(shot), shot.answer) for shot in shots]
        last = self._turn(row)
        turns = [turn for q, a in solved for turn in (("user", q), ("assistant", a))]
        plain = [*(text for _, text in head), *(f"{q} {a}" for q, a in solved), last]
        settings = tuple(self.chat_template_kwargs.items())
        chat = None if self.chat is False else Chat((*head, *turns, ("user", last)), self.chat is True, settings)
        name = identity(self.name, row.question, row.source)
        return Problem(name, "\n\n".join(plain), row.gold, row.answer, split, chat, row.question)

    def by_split(self) -> dict[Split, list[Row]]:
        """Read all rows into their splits. Raises the first error of a row with how many others there are, and
        InvalidValueError for a question that is held out twice: it would count as two problems."""
        by_split: dict[Split, list[Row]] = {split: [] for split in SPLITS}
        errors: list[UserError] = []
        for key, path in self.files.items():
            for row in self.rows(path):
                if isinstance(row, NotFoundError):  # a column, which every row lacks
                    raise row
                try:
                    if isinstance(row, UserError):
                        raise row
                    by_split[self.split_of_row(row, key)].append(row)
                except UserError as error:
                    errors.append(error)
        if others := errors[1:]:
            raise type(errors[0])(f"{errors[0]} (and {counted(len(others), 'more row')}: `fp4rl data` names each)")
        if errors:
            raise errors[0]
        for held_out in (by_split["validation"], by_split["test"]):
            _require_distinct(held_out)
        return by_split

    def shots(self, rows: Sequence[Row]) -> list[Row]:
        """Take the solved problems that stand before each out of the rows of the train split."""
        if len(rows) < self.few_shot:
            raise InvalidValueError(f"few_shot {self.few_shot}: the train split has {len(rows)} problems; take fewer")
        return list(rows[: self.few_shot])


def default_prompt(scorer: ScorerName) -> str:
    """Return a prompt that asks for an answer in the form that a scorer reads."""
    before = "\n" if scorer == "choice" else " "  # the choices stand below the question, a line each
    return f"Question: {{question}}{before}{SCORERS[scorer].asks}\nAnswer:"


@lru_cache(maxsize=4)  # a run needs its splits several times; `_written` changes when the file does
def _by_split(
    kind: type[TableTask], described: str, _written: tuple[tuple[int, int], ...]
) -> dict[Split, tuple[Problem, ...]]:
    task = kind.model_validate_json(described)
    rows = task.by_split()
    shots = task.shots(rows["train"])
    rows["train"] = rows["train"][len(shots) :]  # their answers stand in every prompt
    return {split: tuple(task.problem(row, split, shots) for row in held) for split, held in rows.items()}


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


class Table(TableTask):
    """A table of questions and answers of your own: JSONL, CSV, TSV or Parquet, also compressed (.gz)."""

    name: Literal["table"] = "table"
