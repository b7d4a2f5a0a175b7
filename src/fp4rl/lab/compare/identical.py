"""Two names for one thing: sides whose runs end in the same weights, or gave the same answers, bit for bit (P48)."""

from collections.abc import Iterator, Mapping
from typing import Any

from fp4rl.lab.compare.sides import Side, SideRun
from fp4rl.lab.runs import Run
from fp4rl.spec.modes import PHASES
from fp4rl.spec.points import FORMAT_POINTS, ApplyDuring

_TRAINED_IN = tuple(phase for phase in PHASES if phase != "evaluation")


def identical(treatment: Side, control: Side) -> Iterator[tuple[str, str]]:
    """(what is the same, its digest). Runs made before digests were recorded say nothing.

    Weights may be the same where the descriptions differ in nothing that training sees. Answers may be where different
    sites were rounded for them, which evidence proves: that rounding cost nothing is a result.
    """
    same = _same_weights(treatment, control)
    if same and training_part(treatment.spec) != training_part(control.spec):
        seeds = ", ".join(str(run.seed) for run in same)
        yield f"the final weights are bit-identical (seed {seeds}): what differs did not act", str(_weights(same[0]))
        return
    pairs = [(a, b) for a in treatment.runs for b in control.runs if a.run.seed == b.run.seed and _answers(a, b)]
    if pairs and all(_alike(a, b) for a, b in pairs):
        digest = pairs[0][0].run.answers(pairs[0][0].measured)
        yield "every answer is the same on both sides: what differs did not act", str(digest)


def _same_weights(treatment: Side, control: Side) -> list[Run]:
    """Runs of the treatment that end in the weights of another run of the control."""
    pairs = [(a.run, b.run) for a in treatment.runs for b in control.runs if a.run.key != b.run.key]
    return [a for a, b in pairs if _weights(a) and _weights(a) == _weights(b)]


def _weights(run: Run) -> str | None:
    return run.result.evidence.final_weights


def _answers(*runs: SideRun) -> set[str] | None:
    """The digests of their answers; None where one recorded none."""
    digests = {side_run.run.answers(side_run.measured) for side_run in runs}
    return None if None in digests else {str(digest) for digest in digests}


def _alike(first: SideRun, second: SideRun) -> bool:
    same_sites = first.measured.profile.sites_digest == second.measured.profile.sites_digest
    return same_sites and len(_answers(first, second) or ()) == 1


def training_part(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What of a description can touch a weight: all but how it is judged."""
    part = {key: value for key, value in spec.items() if key not in ("evaluation", "seed")}
    injection = spec.get("injection")
    return part | {"injection": _trained_under(injection) if isinstance(injection, Mapping) else None}


def _trained_under(injection: Mapping[str, Any]) -> dict[str, Any] | None:
    """An injection without the points that act in evaluations alone; None where nothing is left of it."""
    during = ApplyDuring.model_validate(injection.get("apply_during") or {})
    active = frozenset[str]().union(*(during.active(phase) for phase in _TRAINED_IN))
    idle = {point for point in (*FORMAT_POINTS, "errors") if point not in active}

    def acting(table: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in table.items() if key not in idle}

    tables = [acting(injection), *map(acting, injection.get("by_pattern") or ())]
    points = {point for table in tables for point in FORMAT_POINTS if table.get(point) not in (None, "none", "keep")}
    points |= {"errors"} if tables[0].get("errors") else set()
    if not points:
        return None
    # The mode and the preset only name what the points hold.
    phases = {phase: sorted(during.active(phase) & points) for phase in _TRAINED_IN}
    named = {key: value for key, value in tables[0].items() if key not in ("mode", "preset", "apply_during")}
    return named | {"by_pattern": tables[1:], "phases": phases}
