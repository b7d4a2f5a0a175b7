"""One run as the report sees it: what was planned, what was measured under which profile, and whether it counts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, TypeAdapter

from fp4rl.lab.compare.evidence import gaps
from fp4rl.lab.compare.sides import inputs_of
from fp4rl.lab.damage import Damaged, damage_named
from fp4rl.lab.folders import RunFolder
from fp4rl.lab.matrix import PlannedRun
from fp4rl.lab.report.evidence import Evidence, read_evidence

Curves = Mapping[int, Mapping[str, float]]


@dataclass(frozen=True)
class Profile:
    """What a score depends on besides the weights, as the run recorded it; None where it did not."""

    name: str
    precision: str | None = None
    sites_digest: str | None = None
    noise: str | None = None
    scorer: str | None = None
    max_new_tokens: int | None = None
    sampling: str | None = None
    items_digest: str | None = None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Profile":
        known = {key: record[key] for key in cls.__dataclass_fields__ if record.get(key) is not None}
        return cls(**{"name": "unnamed", **known})


@dataclass(frozen=True)
class Measurement:
    """One evaluation of one run; accuracies, format rate and truncation are in points (percent).

    `answers` is the digest of them. With several to a problem `strict` is their mean, and `of_samples` holds `pass@k`
    and `mean@k`.
    """

    step: int
    last: bool
    profile: Profile
    problems: int
    strict: float
    flexible: float | None
    formatted: float | None
    truncated: float | None
    mean_length: float | None
    answers: str | None = None
    of_samples: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One planned run. `state`: `missing` (no folder), `unfinished` (no result yet), `damaged` or `finished`.

    `gaps` says why a finished run is not comparable: evidence that its spec asks for and that is not there. `stopped`
    is the monitor's reason to end it early.
    """

    planned: PlannedRun
    state: str
    code_digest: str | None = None
    stale: bool = False
    measurements: tuple[Measurement, ...] = ()
    evidence: Evidence | None = None
    gaps: tuple[str, ...] = ()
    curves: Curves = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    steps_done: int | None = None
    wall_s: float | None = None
    stopped: str | None = None
    damage: Damaged | None = None

    @property
    def counts(self) -> bool:
        """Whether its numbers may enter a mean or a comparison."""
        return self.state == "finished" and not self.gaps

    @property
    def profiles(self) -> tuple[str, ...]:
        """Every profile that its last step is to be judged under."""
        asked = self.planned.experiment.evaluation
        return (*asked.profiles, *asked.sweep)

    def at_start(self, profile: str) -> Measurement | None:
        """The evaluation before the first step."""
        return next((m for m in self.measurements if m.profile.name == profile and m.step == 0 and not m.last), None)

    def at_end(self, profile: str) -> Measurement | None:
        """The evaluation at the last step; an earlier one never stands in for it."""
        return next((m for m in self.measurements if m.profile.name == profile and m.last), None)


def read_run(planned: PlannedRun, folder: RunFolder, code_now: str) -> Run:
    """What the folder of a planned run holds; `damaged` for a finished run whose files cannot be read."""
    if not folder.finished:
        return Run(planned, "unfinished" if folder.path.is_dir() else "missing")
    try:
        with damage_named(folder.path):
            return _finished(planned, folder, code_now)
    except Damaged as error:
        return Run(planned, "damaged", damage=error)


def _finished(planned: PlannedRun, folder: RunFolder, code_now: str) -> Run:
    result, lines = folder.result(), folder.evidence()
    said = _Said.model_validate(result)
    summary = result.get("evidence") or {}
    evidence = read_evidence(lines, folder.sites(), summary)
    measurements = tuple(_measurement(record) for record in result.get("evaluations", ()))
    spec = planned.experiment.model_dump(mode="json")
    judged = [{"step": m.step, "profile": m.profile.name, "last": m.last} for m in measurements]
    code = said.code_digest
    return Run(
        planned=planned,
        state="finished",
        code_digest=code,
        stale=code != code_now,
        measurements=measurements,
        evidence=evidence,
        gaps=gaps(spec, summary, lines, judged),
        curves=folder.metrics(),
        versions=said.versions or {},
        inputs=inputs_of(summary),
        weights=summary.get("final_weights"),
        steps_done=said.steps_done,
        wall_s=said.wall_s,
        stopped=said.stopped,
    )


def _measurement(record: Mapping[str, Any]) -> Measurement:
    made = Measurement(
        step=int(record.get("step", 0)),
        last=bool(record.get("last", False)),
        profile=Profile.of(record.get("profile") or {}),
        problems=int(record.get("problems", record.get("n", 0))),
        strict=100 * float(record["strict"]),
        flexible=_points(record.get("flexible")),
        formatted=_points(record.get("formatted")),
        truncated=_points(record.get("truncated")),
        mean_length=record.get("mean_length"),
        answers=record.get("answers_digest"),
        of_samples={key: 100 * float(value) for key, value in record.items() if key.startswith(("pass@", "mean@"))},
    )
    return _MEASUREMENT.validate_python(vars(made) | {"profile": vars(made.profile)})


def _points(share: float | None) -> float | None:
    return None if share is None else 100 * share


class _Said(BaseModel):
    """What the report takes from a result as it stands, each of its own sort: pydantic refuses any other."""

    code_digest: str | None = None
    versions: dict[str, str] | None = None
    steps_done: int | None = None
    wall_s: float | None = None
    stopped: str | None = None


_MEASUREMENT = TypeAdapter(Measurement)
