"""Find the gaps between what a run's spec requires and what it recorded: without any, its treatment is proven."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args

from fp4rl.spec.evidence import ActivePoints, Evaluation, Evidence, Injected, LiveCheck, MasterCheck, RolloutNoise
from fp4rl.spec.points import FORMAT_POINTS, GRADIENTS, PHASES, ApplyDuring, Phase
from fp4rl.spec.precision import PrecisionSchedule, Stage
from fp4rl.spec.records import Summary
from fp4rl.spec.transforms import Transformed
from fp4rl.spec.words import agreeing, counted

Spec = Mapping[str, Any]
_E = TypeVar("_E")

_TRAINED_IN: tuple[Phase, ...] = ("rollout", "training")  # evaluations record their own precision, under a profile


def gaps(
    spec: Spec, summary: Summary, lines: Sequence[Evidence], evaluations: Sequence[Evaluation] | None = None
) -> tuple[str, ...]:
    """Return all gaps between a run's spec and its evidence; `evaluations` None: the result's are not checked."""
    if not summary.model_fields_set and not lines:
        return ("it left no evidence",)
    return (
        *_transform_gaps(spec, lines_of(lines, Transformed)),
        *_injection_gaps(spec, summary, lines),
        *_noise_gaps(spec.get("noise"), lines_of(lines, RolloutNoise)),
        *_policy_gaps(summary, lines_of(lines, MasterCheck), lines_of(lines, LiveCheck)),
        *_evaluation_gaps(lines),
        *(_missing_evaluations(spec, evaluations) if evaluations is not None else ()),
        *_of_another_run(evaluations or (), lines_of(lines, Evaluation)),
    )


def lines_of(lines: Sequence[Evidence], kind: type[_E]) -> list[_E]:
    """Return the lines of one kind."""
    return [line for line in lines if type(line) is kind]  # isinstance asks the classes of pydantic at length


def _transform_gaps(spec: Spec, lines: Sequence[Transformed]) -> Iterator[str]:
    wanted = [step["name"] for step in (spec.get("model") or {}).get("transforms") or ()]
    done = [str(step.get("name")) for step in lines[-1].transforms] if lines else []
    if wanted != done:
        went, names = (", ".join(words) or "nothing" for words in (done, wanted))
        yield f"its start model went through {went}, and its spec names {names}"
    elif lines and lines[-1].difference is None and not spec.get("start"):
        yield "no difference of the logits before and after its transforms is recorded"


def _injection_gaps(spec: Spec, summary: Summary, lines: Sequence[Evidence]) -> Iterator[str]:
    injection = spec.get("injection")
    injection = injection if isinstance(injection, Mapping) else {}
    wanted, schedule = _wanted(injection), PrecisionSchedule.model_validate(injection.get("schedule") or {})
    if not any(wanted.values()):
        if summary.sites:
            were = agreeing(summary.sites, "was", "were")
            yield f"{counted(summary.sites, 'site')} {were} quantized, but its spec injects nothing"
        return
    if not summary.sites:
        yield "no site is recorded as quantized"
        return
    for phase in _TRAINED_IN:
        # Without the rows of evaluations: what was rounded there proves nothing about training.
        rows = [row for row in lines_of(lines, Injected) if row.phase == phase and row.profile is None]
        active = [line for line in lines_of(lines, ActivePoints) if line.phase == phase and line.profile is None]
        if wanted[phase]:
            streamed = phase == "rollout" and spec.get("engine") == "verl"
            lasting = [_of_points(line, line.points.keys() - schedule.points) for line in active]
            points = wanted[phase] - schedule.points.keys()
            yield from _rounding_gaps(points, lasting, rows, f"during {phase}", streamed=streamed)
            for point in sorted(wanted[phase] & schedule.points.keys()):
                stages = schedule.points[point].stages((spec.get("training") or {}).get("steps") or 0)
                own, sites = [row for row in rows if row.point == point], [_of_points(line, {point}) for line in active]
                stages = stages if schedule.before(point) else {k: span for k, span in stages.items() if k != "before"}
                yield from _stage_gaps(point, stages, sites, own, phase)
        elif any(row.calls for row in rows):
            yield f"sites were rounded during {phase}, which its spec leaves out"
    trained = any(wanted[phase] for phase in PHASES if phase != "evaluation")
    if not trained and not any(line.profile.sites_digest for line in lines_of(lines, Evaluation)):
        yield "its spec injects in evaluations alone, and none was made under the injection"


def _wanted(injection: Spec) -> dict[Phase, set[str]]:
    """Return the points and hardware errors of a spec's injection that must act, phase by phase."""
    during, points = ApplyDuring.model_validate(injection.get("apply_during") or {}), points_named(injection)
    wanted = {phase: points & during.active(phase) for phase in PHASES}
    for phase, own in wanted.items():
        errors = injection.get("errors") or () if "errors" in during.active(phase) else ()
        own |= {_name(error) for error in errors if phase == "training" or error.get("when") != "backward"}
    return wanted


def points_named(injection: Spec) -> set[str]:
    """Return the points for which a described injection has a format, exceptions included."""
    tables = [injection, *(injection.get("by_pattern") or ())]
    return {point for point in FORMAT_POINTS for table in tables if table.get(point) not in (None, "none", "keep")}


def _name(error: Spec) -> str:
    return f"{error.get('kind', 'relative')}@{error.get('point', 'matmul')}/{error.get('when', 'forward')}"


def _of_points(line: ActivePoints, points: Collection[str]) -> ActivePoints:
    return line.extended(points={point: count for point, count in line.points.items() if point in points})


def _stage_gaps(
    point: str, stages: Mapping[Stage, range], active: Sequence[ActivePoints], rows: Sequence[Injected], phase: Phase
) -> Iterator[str]:
    """Yield what is missing of a point whose precision changes: each stage that it reaches must have acted, alone."""
    for stage in get_args(Stage):
        own = [row for row in rows if (row.stage or "after") == stage]
        if stage in stages:
            steps = f"steps {stages[stage][0]} to {stages[stage][-1]}"
            yield from _rounding_gaps({point}, active, own, f"for {point} during {phase}, {steps}")
        elif any(row.calls for row in own):
            yield f"{point} was rounded during {phase} in the stage `{stage}`, which its schedule does not have"


def _rounding_gaps(
    points: Collection[str],
    active: Sequence[ActivePoints],
    rows: Sequence[Injected],
    where: str,
    *,
    streamed: bool = False,
) -> Iterator[str]:
    """Yield what is missing. `active` is the run's own record of how many sites each point has; without one the sites
    are those of the rows.

    A call alone proves no rounding: each site must have had a look, and none may have found a tensor unchanged that
    rounding would change. In the backward not all sites act (a frozen weight has no gradient), and an error need not
    change every value, so for these one site is enough.
    """
    # Weights that are `streamed`, rounded, to servers of verl are looked at there, and its calls are not counted.
    if points and not any(row.calls > 0 or (streamed and row.point == "weight" and row.looks) for row in rows):
        yield f"no quantized call was counted {where}"
        return
    sites = {point: count for line in active for point, count in line.points.items()}
    for point in sorted({*points, *sites}):
        own = [row for row in rows if row.point.partition(":")[0] == point]
        seen = {row.site for row in own if (row.calls if row.looks is None else row.looks) > 0}
        backward = point in GRADIENTS or point.endswith("/backward")
        needed = 1 if backward else sites.get(point, max(1, len({row.site for row in own})))
        if len(seen) < needed:
            did = "was rounded" if point in FORMAT_POINTS else "acted"
            yield f"{point} {did} at {len(seen)} of {counted(needed, 'site')} {where}"
        idle = {row.site for row in own if point in FORMAT_POINTS and _idle(row)}
        if idle:
            yield f"rounding changed no {point} at {len(idle)} of {counted(max(needed, len(seen)), 'site')} {where}"
        if point not in FORMAT_POINTS and own and not any(_positive(row.share_changed) for row in own):
            yield f"{point} changed nothing {where}"


def _idle(row: Injected) -> bool:
    """Return whether rounding left a tensor unchanged that it should change; older runs only record no change."""
    return not _positive(row.share_changed) if row.missed is None else row.missed > 0


def _noise_gaps(noise: Any, lines: Sequence[RolloutNoise]) -> Iterator[str]:
    changed = any(_positive(line.share_changed) for line in lines)
    if not isinstance(noise, Mapping):
        if changed:
            yield "noise was put on weights, but its spec asks for none"
    elif not lines:
        yield "its spec asks for noise, and none is recorded"
    elif noise.get("control") == "sigma_zero":
        if changed:
            yield "the control without noise changed weights"
    elif not changed:
        yield "its noise was never effective: no weight changed in any rollout"


def _policy_gaps(summary: Summary, masters: Sequence[MasterCheck], lives: Sequence[LiveCheck]) -> Iterator[str]:
    if not all(line.unchanged for line in masters) or summary.masters_unchanged is False:
        yield "its master weights were changed"
    elif not masters and not summary.masters_unchanged:
        yield "no check of its master weights is recorded"
    if summary.weights_changed is not None and not _positive(summary.weights_changed):
        yield "training changed none of its weights"
    if not lives:
        yield "no check of its live policy against the saved one is recorded"
    if any(_positive(line.max_difference) for line in lives):
        yield "its live policy differed from the saved one"


def _evaluation_gaps(lines: Sequence[Evidence]) -> Iterator[str]:
    """Yield the evaluations in which not everything in their site table acted."""
    for evaluation in lines_of(lines, Evaluation):
        profile, step = evaluation.profile, evaluation.step
        if profile.sites_digest is None:
            continue
        rows = [row for row in lines_of(lines, Injected) if (row.profile, row.step) == (profile.name, step)]
        active = [line for line in lines_of(lines, ActivePoints) if (line.profile, line.step) == (profile.name, step)]
        # No spec of the run tells what a profile rounds: without a record, the points that did act are required.
        points = {row.point for row in rows} or {"weight"}
        yield from _rounding_gaps(points, active, rows, f"while it was judged as {profile.name} at step {step}")


def _missing_evaluations(spec: Spec, evaluations: Sequence[Evaluation]) -> Iterator[str]:
    """Yield the profiles of the spec that were not measured at the last step."""
    steps = (spec.get("training") or {}).get("steps")
    at_end = {evaluation.profile.name: evaluation for evaluation in evaluations if evaluation.last}
    for profile in (spec.get("evaluation") or {}).get("profiles") or ():
        last = at_end.get(profile)
        if last is None:
            yield f"no evaluation of {profile} at the last step"
        elif steps is not None and last.step != steps:
            yield f"its last evaluation of {profile} is of step {last.step}, not {steps}"


def _of_another_run(evaluations: Sequence[Evaluation], logged: Sequence[Evaluation]) -> Iterator[str]:
    """Yield the numbers of a result that its own evidence has otherwise: typed, or copied from another run."""
    for told in evaluations:
        key = told.profile.name, told.step
        own = [line for line in logged if (line.profile.name, line.step) == key]
        if own and not any(line.strict == told.strict for line in own):
            was = f"{told.strict:.2%} at step {told.step}, and its evidence has {own[-1].strict:.2%}"
            yield f"its result says that {told.profile.name} scored {was}"


def _positive(value: float | None) -> bool:
    """Return whether a value is positive or NaN, which must not pass as 0."""
    return value is not None and not value <= 0
