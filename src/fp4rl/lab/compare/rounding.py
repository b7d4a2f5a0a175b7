"""Was everything rounded that should have been, in a phase or an evaluation? Rows of evidence and what was to act."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from fp4rl.spec.modes import Phase
from fp4rl.spec.points import FORMAT_POINTS, GRADIENTS, ApplyDuring
from fp4rl.spec.words import counted

Record = Mapping[str, Any]


def wanted(injection: Record, phase: Phase) -> set[str]:
    """The points and hardware errors that a spec's injection asks for in a phase."""
    tables = [injection, *(injection.get("by_pattern") or ())]
    points = {point for point in FORMAT_POINTS for table in tables if table.get(point) not in (None, "none", "keep")}
    during = ApplyDuring.model_validate(injection.get("apply_during") or {}).active(phase)
    errors = injection.get("errors") or () if "errors" in during else ()
    named = {_name(error) for error in errors if phase == "training" or error.get("when") != "backward"}
    return {point for point in points if point in during} | named


def rounding_gaps(
    points: Collection[str], acting: Sequence[Record], rows: Sequence[Record], where: str
) -> Iterator[str]:
    """What is missing. `acting` holds the run's own record of how many sites each point has, if it made one; without
    it the sites are those of the rows, whatever they are.

    A call is no rounding: each site must have been looked at, and no look may have found what rounding changes as it
    was. The backward asks only some sites (a frozen weight has no gradient), and an error that meets no value that it
    changes is one all the same, so these are asked for as a whole.
    """
    if points and not any(_positive(row.get("calls")) for row in rows):
        yield f"no quantized call was counted {where}"
        return
    sites = {str(point): count for line in acting for point, count in line["points"].items()}
    for point in sorted({*points, *sites}):
        own = [row for row in rows if str(row.get("point")).partition(":")[0] == point]
        seen = {row.get("site") for row in own if _positive(row.get("looks", row.get("calls")))}
        backward = point in GRADIENTS or point.endswith("/backward")
        needed = 1 if backward else sites.get(point, max(1, len({row.get("site") for row in own})))
        if len(seen) < needed:
            did = "was rounded" if point in FORMAT_POINTS else "acted"
            yield f"{point} {did} at {len(seen)} of {counted(needed, 'site')} {where}"
        idle = {row.get("site") for row in own if point in FORMAT_POINTS and _idle(row)}
        if idle:
            yield f"rounding changed no {point} at {len(idle)} of {counted(max(needed, len(seen)), 'site')} {where}"
        if point not in FORMAT_POINTS and own and not any(_positive(row.get("share_changed")) for row in own):
            yield f"{point} changed nothing {where}"


def _idle(row: Record) -> bool:
    """Whether rounding left what it changes; runs of older code say no more than that nothing changed."""
    if "missed" in row:
        return _positive(row["missed"])
    return "share_changed" in row and not _positive(row["share_changed"])


def _name(error: Record) -> str:
    return f"{error.get('kind', 'relative')}@{error.get('point', 'matmul')}/{error.get('when', 'forward')}"


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0
