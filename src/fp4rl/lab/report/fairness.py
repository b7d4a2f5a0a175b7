"""The suite's comparisons put before the rules of `lab.compare`: the same objections as `fp4rl compare` raises."""

from collections.abc import Sequence
from dataclasses import asdict

from fp4rl.lab.compare.declared import factors_of
from fp4rl.lab.compare.fairness import objections
from fp4rl.lab.compare.sides import Measured, Side, SideRun
from fp4rl.lab.report.runs import Measurement, Profile, Run
from fp4rl.spec.experiment import Comparison


def unfair(comparison: Comparison, treatment: Sequence[Run], control: Sequence[Run]) -> tuple[str, ...]:
    """Reasons to refuse, each one line; empty for a fair comparison. The runs are finished, at least one a side."""
    sides = _side(comparison.treatment, treatment), _side(comparison.control, control)
    empty = [side.name for side in sides if not side.runs]
    if empty:
        return tuple(f"no run of {name} was evaluated at its last step" for name in empty)
    found = objections(*sides, factors_of(comparison))
    differ = dict.fromkeys(objection.sentence() for objection in found if objection.kind != "evidence")
    unproven = {run.key: run.gaps for side in sides for run in side.runs if run.gaps}
    return (*differ, *(f"{key} lacks evidence: {'; '.join(gaps)}" for key, gaps in unproven.items()))


def _side(name: str, runs: Sequence[Run]) -> Side:
    profile = name.partition("@")[2]
    measured = [(run, end) for run in runs if (end := run.at_end(profile)) is not None]
    return Side(
        name=name,
        suite=runs[0].planned.suite,
        runs=tuple(_side_run(run, end) for run, end in measured),
        spec=runs[0].planned.experiment.model_dump(mode="json"),
        unmeasured=tuple(run.planned.run_id for run in runs if run.at_end(profile) is None),
    )


def _side_run(run: Run, end: Measurement) -> SideRun:
    asked = run.planned.experiment.training.steps
    return SideRun(
        id=0,
        key=run.planned.run_id,
        seed=run.planned.seed,
        experiment=None,
        code_digest=run.code_digest,
        steps=(asked, run.steps_done),
        measured=Measured(
            end.step, end.last, end.profile.name, end.problems, end.strict / 100, _conditions(end.profile)
        ),
        gaps=run.gaps,
        versions=run.versions,
        inputs=run.inputs,
        weights=run.weights,
        answers=end.answers,
    )


def _conditions(profile: Profile) -> dict[str, object]:
    return {key: value for key, value in asdict(profile).items() if key != "name"}
