"""Answers to problems that are on this disk: a table of them, or the items of a finished run."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fp4rl.lab.folders import RunFolder
from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.task import Problem
from fp4rl.tasks.records import records

_PROBLEM = ("problem_id", "prompt", "question")


def stored_answers(source: Path, problems: Iterable[Problem]) -> list[tuple[Problem, str]]:
    """Return (problem, completion) for each row of a file, or of a run's last evaluation, whose problem is one of
    `problems`: by `problem_id`, or by `prompt` or `question`.

    Raises NotFoundError for a source that is not there, InvalidValueError for one without such rows.
    """
    known = {
        key: problem
        for problem in problems
        for key in (problem.id, problem.prompt, problem.prompt.strip(), problem.question)
    }
    rows = list(_rows(source))
    matching = [(known[key], str(row["completion"])) for row in rows for key in _keys(row) if key in known]
    if not matching:
        raise InvalidValueError(
            f"{source}: none of its {len(rows)} rows answers a problem of this spec; a row needs `completion`, and "
            "`problem_id`, `prompt` or `question`"
        )
    return matching


def _keys(row: Mapping[str, Any]) -> Sequence[str]:
    """Return the key of a row's problem; none of a row without an answer."""
    return [str(row[name]) for name in _PROBLEM if row.get(name) is not None][:1] if row.get("completion") else []


def _rows(source: Path) -> Iterator[Mapping[str, Any]]:
    if source.is_dir():
        folder = RunFolder(source)
        if not folder.item_sets():
            raise NotFoundError(f"{source}: holds no answers of an evaluation; name a finished run, or a file")
        last = folder.item_sets()[-1][0]
        profiles = [profile for step, profile in folder.item_sets() if step == last]
        yield from folder.items(last, "deployment" if "deployment" in profiles else profiles[0]).to_pylist()
    elif not source.is_file():
        raise NotFoundError(f"{source}: no such file; name a .jsonl, .csv or .parquet file, or the folder of a run")
    else:
        yield from (read() for _, read in records(source))
