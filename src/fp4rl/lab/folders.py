"""A run on disk: one folder of whole or appended files, finished once `result.json` is there.

runs/<suite>/<run-id>/
  spec.yaml        the whole experiment
  sites.json       {"digest", "plans", "left_out"}: the resolved site table
  evidence.jsonl   one object a line: what acted
  metrics.jsonl    one object a line, each with its "step"
  rollouts.jsonl   one object a line: the problem, answer and reward of a few answers of each step, for people
  items/<step>-<profile>.parquet   one row per problem and sample
  result.json      written last, whole: its presence means finished
  log.txt
  attempts.jsonl   one object for each time that it was begun: where, from which step, and what was repeated
  heartbeat.json   the last sign of life
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp4rl.lab.files import (
    append_line,
    damage_named,
    dumps,
    finished_lines,
    json_ready,
    loads,
    read_lines,
    whole,
    write_lines,
    write_whole,
)
from fp4rl.lab.repeats import sites_of, spec_values
from fp4rl.rl.durable import sync, sync_all
from fp4rl.spec.errors import CheckFailed, InvalidValueError, NotFoundError, nearest, shown
from fp4rl.spec.evidence import Evaluation, Evidence, Failed
from fp4rl.spec.records import RunResult, Sites, read_all_evidence, read_result
from fp4rl.spec.task import SCORES

if TYPE_CHECKING:
    import pyarrow

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+=-]*")
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_ITEMS_FILE = re.compile(r"(\d+)-(.+)\.parquet")


@dataclass(frozen=True, order=True)
class RunFolder:
    """The files of one run, and the only code that reads or writes them. Making the value does not access the disk."""

    path: Path

    @property
    def suite(self) -> str:
        """The suite's name."""
        return self.path.parent.name

    @property
    def run_id(self) -> str:
        """The run's id within its suite."""
        return self.path.name

    @property
    def key(self) -> str:
        """`suite/run-id`, the name of a run among all runs."""
        return f"{self.suite}/{self.run_id}"

    @property
    def finished(self) -> bool:
        """Whether the run has a result."""
        return (self.path / "result.json").is_file()

    @property
    def failure(self) -> str | None:
        """Why the run failed; None for one that has a result, is under way, or never said."""
        failed = () if self.finished else (line.why for line in self.evidence() if isinstance(line, Failed))
        return next(iter(failed), None)

    # -- written by the runner

    def write_spec(self, text: str) -> None:
        """Write the experiment, given as YAML text."""
        write_whole(self.path / "spec.yaml", text)

    def write_sites(self, sites: Sites) -> None:
        """Write the resolved site table."""
        write_whole(self.path / "sites.json", dumps(sites.as_json()) + "\n")

    def add_evidence(self, line: Evidence) -> None:
        """Append one line of evidence."""
        append_line(self.path / "evidence.jsonl", {"kind": line.kind} | line.as_json())

    def add_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line of numbers measured at `step`; NaN and infinities are read back as such."""
        if "step" in values:
            raise InvalidValueError("a metric cannot be called 'step': that key names the step it belongs to")
        append_line(self.path / "metrics.jsonl", {"step": step, **values})

    def add_rollouts(self, step: int, answers: Iterable[Mapping[str, Any]]) -> None:
        """Append a few answers of the rollout of `step`."""
        for answer in answers:
            append_line(self.path / "rollouts.jsonl", {"step": step, **answer})

    def drop_metrics_after(self, step: int) -> None:
        """Drop metrics and rollouts after `step`: a run that resumes from that checkpoint repeats those steps."""
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            with damage_named(self.path / name) as file:
                kept = [record for record in read_lines(file) if record["step"] <= step]
            if file.is_file():
                write_lines(file, kept)

    def drop_evidence_after(self, step: int) -> bool:
        """Drop every line after the checkpoint of `step`; return False, and drop nothing, if it is not recorded."""
        with damage_named(self.path / "evidence.jsonl") as file:
            lines = [_mapping(line) for line in read_lines(file)]
        wanted = ("checkpoint", step)
        checkpoints = [n for n, line in enumerate(lines, 1) if (line.get("kind"), line.get("step")) == wanted]
        if checkpoints:
            write_lines(file, lines[: checkpoints[-1]])
        return bool(checkpoints)

    def write_items(self, step: int, profile: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write one row per problem and sample, with exactly the columns of `items_schema`."""
        import pyarrow
        from pyarrow import parquet

        table = pyarrow.Table.from_pylist([dict(row) for row in rows], schema=items_schema())
        with whole(self._items_file(step, profile)) as partial:
            parquet.write_table(table, partial, compression="zstd")

    def write_result(self, result: RunResult) -> None:
        """Write the result, once everything beside it is durable. Raises `InvalidValueError` for a finished run: a
        result is never overwritten."""
        if self.finished:
            raise InvalidValueError(f"{self.key} is finished already; give the new run another seed or another suite")
        self.path.mkdir(parents=True, exist_ok=True)
        self.make_durable()
        text = json.dumps(json_ready(result.as_json()), indent=1, allow_nan=False)
        write_whole(self.path / "result.json", text + "\n")

    def add_attempt(self, **values: Any) -> None:
        """Append what one attempt began with."""
        append_line(self.path / "attempts.jsonl", values)

    def make_durable(self) -> None:
        """Make everything that was written so far outlast a power cut, and the run's place in its suite."""
        sync_all(self.path)
        for folder in (self.path.parent, self.path.parent.parent):
            sync(folder)

    # -- read by everyone

    def attempts(self) -> list[dict[str, Any]]:
        """Return what each attempt began with, in order."""
        with damage_named(self.path / "attempts.jsonl") as file:
            return [_mapping(line) for line in read_lines(file)]

    def spec(self) -> dict[str, Any]:
        """Return the described experiment as plain values; empty for a run that came from a foreign log."""
        file = self.path / "spec.yaml"
        if not file.is_file():
            return {}
        with damage_named(file):
            return _mapping(spec_values(file.read_text(encoding="utf-8")) or {})

    def sites(self) -> Sites:
        """Return the resolved site table; one without plans where none was written."""
        with damage_named(self.path / "sites.json") as file:
            try:
                return sites_of(file.read_bytes())
            except FileNotFoundError:
                return Sites()

    def evidence(self) -> tuple[Evidence, ...]:
        """Return every line of a kind that this version knows, in order."""
        with damage_named(self.path / "evidence.jsonl") as file:
            return read_all_evidence(finished_lines(file))

    def evaluations(self) -> tuple[Evaluation, ...]:
        """Return the evaluations in order; of several at one step (after a rollback, or an early end) the newest."""
        by_key: dict[tuple[int, str], Evaluation] = {}
        for line in self.evidence():
            if isinstance(line, Evaluation):
                key = line.step, line.profile.name
                by_key.pop(key, None)
                by_key[key] = line
        return tuple(by_key.values())

    def metrics(self) -> dict[int, dict[str, float]]:
        """Return step -> name -> value. Lines of one step are joined; the first value of a key counts."""
        steps: dict[int, dict[str, float]] = {}
        with damage_named(self.path / "metrics.jsonl") as file:
            for record in read_lines(file):
                step = int(_mapping(record).pop("step"))
                if step not in steps and set(map(type, record.values())) <= {float}:
                    steps[step] = record
                    continue
                values = steps.setdefault(step, {})
                for name, value in record.items():
                    if isinstance(value, str):
                        value = _NOT_FINITE.get(value)
                    if isinstance(value, int | float):
                        values.setdefault(name, float(value))
            return dict(sorted(steps.items()))

    def rollouts(self) -> dict[int, list[dict[str, Any]]]:
        """Return step -> the answers kept of its rollout."""
        steps: dict[int, list[dict[str, Any]]] = {}
        with damage_named(self.path / "rollouts.jsonl") as file:
            for record in read_lines(file):
                steps.setdefault(int(_mapping(record).pop("step")), []).append(record)
        return dict(sorted(steps.items()))

    def result(self) -> RunResult:
        """Return what `result.json` says. Raises `NotFoundError` for an unfinished run."""
        if not self.finished:
            raise NotFoundError(f"{self.key} has no result.json: the run is not finished")
        with damage_named(self.path / "result.json") as file:
            return read_result(loads(file.read_bytes()))

    def item_sets(self) -> list[tuple[int, str]]:
        """Return (step, profile) of every stored evaluation, in order of step."""
        matches = (_ITEMS_FILE.fullmatch(file.name) for file in (self.path / "items").glob("*.parquet"))
        return sorted((int(match[1]), match[2]) for match in matches if match)

    def items(self, step: int, profile: str, columns: list[str] | None = None) -> "pyarrow.Table":
        """Return the rows of one evaluation, all columns or those named. Raises `NotFoundError` naming those stored."""
        from pyarrow import parquet

        file = self._items_file(step, profile)
        if not file.is_file():
            stems = [f"{step}-{profile}" for step, profile in self.item_sets()]
            raise NotFoundError(f"{self.key} holds no items {file.stem}" + nearest(file.stem, stems))
        # read_table would import pandas where it is installed; a file this small is read at once, by this thread
        with damage_named(file), parquet.ParquetFile(file, pre_buffer=False) as opened:
            return opened.read(columns=columns, use_threads=False)

    def _items_file(self, step: int, profile: str) -> Path:
        if not _NAME.fullmatch(profile):
            raise InvalidValueError(f"a profile's name is letters, digits and ._+=-; got {profile!r}")
        return self.path / "items" / f"{step}-{profile}.parquet"


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"keys and values expected, found {shown(value)}")
    return value


def items_schema() -> "pyarrow.Schema":
    """Return the columns of an items file; `length` counts generated tokens, `truncated`: cut off at the limit."""
    import pyarrow as pa

    flags = [(name, pa.bool_()) for name in SCORES]
    text = [("completion", pa.string()), ("length", pa.int32()), ("truncated", pa.bool_())]
    return pa.schema([("problem_id", pa.string()), ("sample", pa.int32()), *flags, *text])


def run_folder(root: Path, suite: str, run_id: str) -> RunFolder:
    """Return the folder of one run below `root`. Raises `InvalidValueError` for a name that is no plain file name."""
    for name in (suite, run_id):
        if not _NAME.fullmatch(name):
            raise InvalidValueError(f"the name of a suite or run is letters, digits and ._+=-; got {name!r}")
    return RunFolder(root / suite / run_id)


def all_runs(root: Path) -> list[RunFolder]:
    """Return every run folder below `root` (finished or not), in order of suite and id."""
    if not root.is_dir():
        return []
    folders = (folder for suite in root.iterdir() if suite.is_dir() for folder in suite.iterdir() if is_run(folder))
    return sorted(map(RunFolder, folders))


def is_run(folder: Path) -> bool:
    """Return whether a folder holds a run, begun or finished."""
    return any((folder / mark).is_file() for mark in ("spec.yaml", "metrics.jsonl", "result.json"))


def require_not_failed(root: Path, name: str) -> None:
    """Raise CheckFailed, with the reason, where `suite/run-id`, or a beginning of it, is that of a run that failed."""
    for folder in all_runs(root):
        if any(own.startswith(name) for own in (folder.key, folder.run_id)) and (why := folder.failure):
            raise CheckFailed(f"{folder.key} failed: {why}")


def finished_runs(root: Path) -> list[RunFolder]:
    """Return the runs below `root` that have a result."""
    return [run for run in all_runs(root) if run.finished]
