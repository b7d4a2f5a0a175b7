"""What can be seen of runs from their folders alone, while others train them; nothing here writes into a folder."""

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

from fp4rl.lab import heartbeat
from fp4rl.lab.files import Damaged, read_lines
from fp4rl.lab.folders import RunFolder, is_run
from fp4rl.lab.heartbeat import Beat
from fp4rl.lab.matrix import PlannedRun, planned, single
from fp4rl.lab.runs import Run, read_run
from fp4rl.lab.status import WORDS, Status, status_of
from fp4rl.rl.health.findings import Finding
from fp4rl.rl.health.monitor import Monitor
from fp4rl.rl.health.signals import signals_of
from fp4rl.spec.errors import UserError, nearest
from fp4rl.spec.experiment import Suite
from fp4rl.spec.health import Health, State
from fp4rl.spec.load import load_spec, parse

CURVES = ("reward", "accuracy", "entropy", "length", "grad_norm")
_PACE = 10  # steps whose mean time is the pace


@dataclass(frozen=True)
class Seen:
    """A run as it stands. `pace_s`: seconds a step; `left_s`: until the last step, without the evaluation after it.

    `curves`: signal -> its values in order of the steps. `findings`: what the health monitor watches or alarms on.
    """

    name: str
    run_id: str
    status: Status
    where: str
    step: int
    steps: int
    pace_s: float | None
    left_s: float | None
    curves: Mapping[str, tuple[float, ...]]
    health: State
    findings: tuple[Finding, ...]
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        own = ("name", "run_id", "where", "step", "steps", "pace_s", "left_s", "health")
        findings, curves = [vars(finding) for finding in self.findings], {n: list(c) for n, c in self.curves.items()}
        lists = {"findings": findings, "curves": curves, "warnings": list(self.warnings)}
        return self.status.as_dict() | {name: getattr(self, name) for name in own} | lists


@dataclass(frozen=True)
class View:
    """All watched runs at one moment. `missing`: why there is nothing to see yet; empty where there is."""

    title: str
    runs: tuple[Seen, ...] = ()
    missing: str = ""
    at: float = field(default_factory=time.time)

    @cached_property
    def counts(self) -> dict[str, int]:
        """Status -> number of runs, in the order in which they are told."""
        counted = Counter(run.status.word for run in self.runs)
        return {word: counted[word] for word in WORDS if counted[word]}

    @cached_property
    def left_s(self) -> float | None:
        """Seconds until all have taken their steps, as many at a time as now; None while nothing is known of them."""
        paces = [run.pace_s for run in self.runs if run.pace_s is not None]
        running = [run for run in self.runs if run.status.word == "running"]
        if not running or not paces:
            return None
        waiting = sum(run.steps * mean(paces) for run in self.runs if run.status.word == "planned")
        under_way = [(run.steps - run.step) * mean(paces) if run.left_s is None else run.left_s for run in running]
        return max(max(under_way), (sum(under_way) + waiting) / len(running))

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        told = {"watched": self.title, "missing": self.missing or None, "counts": self.counts, "left_s": self.left_s}
        return told | {"runs": [run.as_dict() for run in self.runs]}


class Follower:
    """Follows one run: reads its folder again where a file has changed, and goes on judging where it has grown."""

    def __init__(self, folder: RunFolder, name: str, steps: int | None, health: Health | None) -> None:
        self._folder, self._name, self._steps, self._health = folder, name, steps, health
        self._stamps: dict[str, tuple[int, int, int]] = {}
        self._status = Status("planned")
        self._metrics: dict[int, dict[str, float]] = {}
        self._warnings: tuple[str, ...] = ()
        self._restart()

    def _restart(self) -> None:
        self._monitor, self._judged = Monitor(self._health or Health()), 0
        self._curves: dict[str, list[float]] = {name: [] for name in CURVES}

    def look(self, now: float) -> Seen:
        """Return the run as it stands. What cannot be read, since it is being written or gone, stays as it was."""
        with suppress(OSError, UserError):
            self._read()
        step = max(self._metrics, default=0)
        steps = self._steps or step
        beat = heartbeat.read(self._folder.path) if self._status.word == "running" else None
        if beat is not None and beat.stage == "training":  # its record is a few seconds older than the metrics
            beat = replace(beat, done=max(step, beat.done))
        pace = self._pace()
        findings = self._monitor.findings()
        return Seen(
            name=self._name,
            run_id=self._folder.run_id,
            status=self._status,
            where="" if beat is None else beat.where,
            step=step,
            steps=steps,
            pace_s=pace,
            left_s=_left(steps - step, pace, beat, now),
            curves={name: tuple(values) for name, values in self._curves.items() if values},
            health=findings[0].state,
            findings=tuple(finding for finding in findings if finding.state in ("watch", "alarm")),
            warnings=self._warnings,
        )

    def _read(self) -> None:
        changed = self._changed(("metrics.jsonl", "evidence.jsonl", "heartbeat.json", "result.json"))
        if changed or self._status.word == "running":
            self._status = status_of(self._folder, _result(self._folder))
        if changed & {"evidence.jsonl"}:
            lines = read_lines(self._folder.path / "evidence.jsonl", _warning)
            self._warnings = tuple(dict.fromkeys(line for line in lines if line))
        if changed & {"metrics.jsonl"}:
            self._observe(self._folder.metrics())

    def _changed(self, names: Iterable[str]) -> set[str]:
        """Return the files that have changed since the last look, by their number, size and time."""
        now = {}
        for name in names:
            with suppress(OSError):
                stat = (self._folder.path / name).stat()
                now[name] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        before, self._stamps = self._stamps, now
        if not now and not before:  # nobody has begun it, or only its folder is there
            return {"result.json"}
        return {name for name in (*now, *before) if now.get(name) != before.get(name)}

    def _observe(self, metrics: dict[int, dict[str, float]]) -> None:
        known = dict(islice(metrics.items(), len(self._metrics)))
        if known != self._metrics:  # it goes on from an earlier checkpoint, or the last line was written in parts
            self._restart()
        self._metrics = metrics
        for step, values in islice(metrics.items(), self._judged, None):
            self._monitor.observe(step, values)
            signals = signals_of(values)
            for name, curve in self._curves.items():
                if name in signals:
                    curve.append(signals[name])
        self._judged = len(metrics)

    def _pace(self) -> float | None:
        """Return the mean seconds of the last steps, the first one left out where there are others."""
        times = [m["time/step_s"] + m.get("time/between_s", 0.0) for m in self._metrics.values() if "time/step_s" in m]
        return mean((times[1:] or times)[-_PACE:]) if times else None


class Watcher:
    """Watches a suite, or the runs of one whose id begins with `run`, below a folder of runs."""

    def __init__(self, folder: Path, run: str = "") -> None:
        self.folder, self._run = folder, run
        self._followers: list[Follower] = []
        self._stamp: object = None
        self._why = ""

    @property
    def title(self) -> str:
        """The suite's name, with the run's where one is watched."""
        return f"{self.folder.name}/{self._run}" if self._run else self.folder.name

    def look(self, now: float | None = None) -> View:
        """Return all runs as they stand."""
        now = time.time() if now is None else now
        if missing := self._follow():
            return View(self.title, missing=missing, at=now)
        return View(self.title, tuple(follower.look(now) for follower in self._followers), at=now)

    def _follow(self) -> str:
        """Follow every run that is planned or there; return why there is none."""
        stamp = (_written(self.folder / "suite.yaml"), others := _run_ids(self.folder))
        if stamp != self._stamp:
            self._stamp = stamp
            plan, self._why = _plan(self.folder)
            self._followers = list(self._chosen(plan, others))
            if not self._followers and (plan or others):
                known = _short(list(dict.fromkeys([*(run.run_id for run in plan), *others])))
                self._why = f"no run in {self.folder} begins with {self._run!r}{nearest(self._run, known)}"
        return "" if self._followers else self._why or f"{self.folder} is not there yet"

    def _chosen(self, plan: Sequence[PlannedRun], others: Sequence[str]) -> Iterable[Follower]:
        planned_runs = {run.run_id: run for run in plan}
        ids = [i for i in dict.fromkeys([*planned_runs, *others]) if i.startswith(self._run)]
        for run_id, name in zip(ids, _short(ids), strict=True):
            run, folder = planned_runs.get(run_id), RunFolder(self.folder / run_id)
            if run is not None:
                yield Follower(folder, name, run.experiment.training.steps, run.experiment.health)
            else:
                yield Follower(folder, name, *_described(folder))


def _written(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


def _run_ids(folder: Path) -> tuple[str, ...]:
    """Return the names of the run folders of a suite."""
    with suppress(OSError):
        return tuple(sorted(run.name for run in folder.iterdir() if is_run(run)))
    return ()


def _plan(folder: Path) -> tuple[tuple[PlannedRun, ...], str]:
    """Return the runs that suite.yaml plans, none where it is not there or cannot be read, and then why."""
    file = folder / "suite.yaml"
    try:
        if not file.is_file():
            return (), ""
        described = load_spec(file)
    except (OSError, UserError) as error:
        return (), str(error)
    return (planned(described) if isinstance(described, Suite) else (single(described, folder.name),)), ""


def _described(folder: RunFolder) -> tuple[int | None, Health | None]:
    """Return the steps and the health settings of a run that no suite.yaml plans."""
    with suppress(UserError, KeyError, TypeError):
        spec = folder.spec()
        return int(spec["training"]["steps"]), parse(Health, spec.get("health") or {}, "")
    return None, None


def _short(ids: Sequence[str]) -> list[str]:
    """Return ids without their digests where they still differ, as `fp4rl show` takes them."""
    short = [run_id.rpartition("-")[0] or run_id for run_id in ids]
    return short if len(set(short)) == len(short) else list(ids)


def _result(folder: RunFolder) -> Run | Damaged | None:
    try:
        return read_run(folder, curves=False) if folder.finished else None
    except Damaged as error:
        return error


def _warning(line: bytes) -> str:
    """Return the warning in a line of evidence; empty for any other line, which is not parsed."""
    if b'"warning"' not in line:
        return ""
    record = json.loads(line)
    return str(record["line"]) if record["kind"] == "warning" else ""


def _left(steps: int, pace: float | None, beat: Beat | None, now: float) -> float | None:
    """Return the seconds that a running run's steps will take, less what the present one has taken."""
    if beat is None or pace is None:
        return None
    return max(0.0, steps * pace - min(pace, max(0.0, now - beat.progress_at)))
