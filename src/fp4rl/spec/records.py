"""What a run leaves on disk, as types (result.json, sites.json, lines of evidence), and the functions that read it.

All of it also takes what older versions wrote: a key that was not written then is None, a number that strict JSON has
no word for ("nan") is a float again, and a key of a newer version is left out.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Literal, TypeVar

from pydantic import ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

from fp4rl.spec.errors import InvalidValueError, shown
from fp4rl.spec.evidence import KINDS, Evaluation, Evidence, HealthFinding, Share
from fp4rl.spec.frozen import Record
from fp4rl.spec.health import State

VERSION = 1  # the format of run folders; results that name none were written before there was one and count as 0


class PlannedSite(Record):
    """A site that something is done to: its formats by point as a spec file names them, and its hardware errors."""

    site: str
    kind: str | None = None
    role: str | None = None
    layer: int | None = None
    part: str | None = None
    shape: tuple[int, ...] = ()
    weight: JsonValue = None
    input: JsonValue = None
    output: JsonValue = None
    kv_cache: JsonValue = None
    grad_input: JsonValue = None
    grad_weight: JsonValue = None
    errors: tuple[Mapping[str, JsonValue], ...] = ()
    merged: bool = False
    packed: bool = False
    note: str = ""


class SiteLeftOut(Record):
    """A site that nothing is done to, and why."""

    site: str
    kind: str | None = None
    part: str | None = None
    shape: tuple[int, ...] = ()
    reason: str = ""


class Sites(Record):
    """The resolved site table. `plans` is None where a run recorded no table."""

    digest: str | None = None
    plans: tuple[PlannedSite, ...] | None = None
    left_out: tuple[SiteLeftOut, ...] = ()


class NoiseSummary(Record):
    """The noise of a whole run: rollouts, those in which weights changed, and how large it was."""

    rollouts: int = 0
    noisy_rollouts: int = 0
    largest_sigma: float = 0.0
    largest_realised: float = 0.0
    mean_share_changed: float = 0.0


class HealthSummary(Record):
    """The worst state of a whole run, its alarms in the order they came, and how often it was rolled back."""

    state: State
    alarms: tuple[HealthFinding, ...] = ()
    rollbacks: int = 0


class DeployedWeights(Record):
    """Which weights are in `final` where they are not the live ones after the last step: those after `step`, averaged
    with `ema_decay`, chosen by its `score` among the steps that were judged on the validation `problems` (a digest).

    `codes_unlike`: the share of codes that training had otherwise, since the average decided on them (`ema.rounds`)."""

    step: int
    ema_decay: float | None = None
    score: float | None = None
    profile: str | None = None
    problems: str | None = None
    codes_unlike: Share | None = None


class Summary(Record):
    """The evidence of a whole run in short; the lines of evidence hold the details."""

    sites: int | None = None
    calls: Mapping[str, int] = Field(default_factory=dict)
    calls_by_process: tuple[Mapping[str, int], ...] | None = None
    live_equals_fresh: bool | None = None
    masters_unchanged: bool | None = Field(None, alias="master_unharmed")
    weights_changed: float | None = None
    hardly_moved: str | None = None
    steps_without_update: int | None = None
    recipe: Mapping[str, JsonValue] = Field(default_factory=dict)
    inputs: Mapping[str, str] = Field(default_factory=dict)
    final_weights: str | None = None
    final_files: str | None = None
    noise: NoiseSummary | None = None
    health: HealthSummary | None = None
    processes: int | None = None
    deployed: DeployedWeights | None = None


class Imported(Record):
    """Where a foreign log came from, its configuration, and counts of what could not be used.

    `went_back`: times that the steps began again at an earlier one. `met_twice`: numbers that came again, of which the
    later one counts. `left_behind`: numbers of steps that were taken again. `skipped`: entries that are no number.
    """

    dialect: str
    source: str | None = None
    sha256: str | None = None
    config: JsonValue = None
    status: str | None = None
    note: str | None = None
    went_back: int | None = None
    met_twice: int | None = None
    left_behind: int | None = None
    skipped: int | None = None


class RunResult(Record):
    """The result of a run. `stopped` is the monitor's reason to end it early; `imported` is set for a foreign log.

    `wall_s`, `cpu_s`: seconds by the clock and of the first process's CPUs, of the attempt that finished; `device`:
    what it computed on. `versions` are those it was trained with. `evaluated_with` are those its final weights were
    evaluated with, where another engine trained them. `preflight` says that nobody looked for known traps before.
    """

    version: int = 0
    run_id: str | None = None
    suite: str | None = None
    arm: str | None = None
    seed: int | None = None
    spec_digest: str | None = None
    code_digest: str | None = None
    versions: Mapping[str, str] = Field(default_factory=dict)
    evaluated_with: Mapping[str, str] | None = None
    evaluations: tuple[Evaluation, ...] = ()
    evidence: Summary = Summary()
    imported: Imported | None = None
    steps_asked: int | None = None
    steps_done: int | None = None
    stopped: str | None = None
    wall_s: float | None = None
    cpu_s: float | None = None
    device: str | None = None
    preflight: Literal["skipped"] | None = None


ENGINE_RUN, ENGINE_METRICS = "fp4rl_run.json", "fp4rl_metrics.jsonl"


class EngineRun(Record):
    """A run that another engine trained, as it leaves it in `fp4rl_run.json` when its last step is done.

    The numbers of its steps stand beside it in `fp4rl_metrics.jsonl`, one object a line, each with its `step`. `spec`
    is the experiment with its seed, `code_digest` and `versions` name the code that trained. `evidence` holds lines as
    in evidence.jsonl, each with its `kind`. `summary.final_weights` is the digest of the weights that were trained last
    (`rl.verify.weights_digest`, in the dtype of the experiment's model); the weights that are imported must have it.
    """

    version: int = VERSION
    engine: str
    spec: Mapping[str, JsonValue]
    seed: int
    suite: str | None = None
    arm: str | None = None
    code_digest: str
    versions: Mapping[str, str]
    steps_asked: int
    steps_done: int
    sites: Sites = Sites()
    evidence: tuple[Mapping[str, JsonValue], ...] = ()
    summary: Summary = Summary()
    wall_s: float | None = None

    @property
    def lines(self) -> tuple[Evidence, ...]:
        """The lines of evidence of a kind that this version knows. Raises `InvalidValueError` for a damaged one."""
        return tuple(line for line in map(read_evidence, self.evidence) if line is not None)


_ByKind = Annotated[Evidence, Field(discriminator="kind")]
_LATER = ConfigDict(defer_build=True)
_LINE: TypeAdapter[Evidence] = TypeAdapter(_ByKind, config=_LATER)
_LINES: TypeAdapter[tuple[Evidence, ...]] = TypeAdapter(tuple[_ByKind, ...], config=_LATER)
_R = TypeVar("_R", bound=Record)
_V = TypeVar("_V", RunResult, EngineRun)


def read_evidence(line: object) -> Evidence | None:
    """Return one line of evidence; None for a kind that this version does not know. Raises `InvalidValueError`."""
    if isinstance(line, bytes):
        with suppress(ValidationError):  # one pass; what is wrong is said below
            return _LINE.validate_json(line, strict=False, extra="ignore")
        line = json.loads(line.decode())
    kind = line.get("kind") if isinstance(line, Mapping) else None
    if not isinstance(kind, str):
        raise InvalidValueError(f"a line of evidence needs a 'kind', found {shown(line)}")
    if kind not in KINDS:
        return None
    return _read(_LINE.validate_python, line, kind)


def read_all_evidence(lines: Sequence[bytes]) -> tuple[Evidence, ...]:
    """Return the lines of a kind that this version knows. Raises `InvalidValueError` for a damaged one."""
    with suppress(ValidationError):  # all in one pass; what is wrong, or new, is looked at line by line
        read = _LINES.validate_json(b"[%b]" % b",".join(lines), strict=False, extra="ignore")
        if len(read) == len(lines):
            return read
    return tuple(line for line in map(read_evidence, lines) if line is not None)


def read_result(content: object) -> RunResult:
    """Return a run's result. Raises `InvalidValueError`, also for one whose format only a newer version knows."""
    return _of_known_version(_read(RunResult.model_validate, content, "result"))


def read_engine_run(content: object) -> EngineRun:
    """Return the record of a run that another engine trained. Raises `InvalidValueError`."""
    return _of_known_version(_read(EngineRun.model_validate, content, "record"))


def read_sites(content: object) -> Sites:
    """Return the table in sites.json. Raises `InvalidValueError`."""
    return _read(Sites.model_validate, content, "sites")


def _of_known_version(record: _V) -> _V:
    if record.version > VERSION:
        raise InvalidValueError(f"format {record.version} of a newer fp4rl, this one reads {VERSION}; update fp4rl")
    return record


def _read(validate: Callable[..., _R], content: object, what: str) -> _R:
    try:
        return validate(content, strict=False, extra="ignore")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join([what, *map(str, first["loc"])])
        raise InvalidValueError(f"{where}: {first['msg']}, found {shown(first['input'])}") from None
