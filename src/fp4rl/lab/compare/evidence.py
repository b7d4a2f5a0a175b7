"""Does a run prove that its treatment happened? Every gap between what its spec asks for and what it recorded."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

_TRAINED_IN = ("rollout", "training")  # evaluations load the saved model afresh, and record their own precision
_POINTS = ("weight", "input", "output")


def gaps(spec: Record, summary: Record, lines: Sequence[Record]) -> tuple[str, ...]:
    """Empty for a run whose treatment is proven. `summary` stands in `result.json`, `lines` in `evidence.jsonl`."""
    if not summary and not lines:
        return ("it left no evidence",)
    return (
        *_injection_gaps(spec.get("injection"), summary, _in_the_run(_of_kind(lines, "injection"))),
        *_noise_gaps(spec.get("noise"), _of_kind(lines, "noise")),
        *_weight_gaps(summary, _of_kind(lines, "master")),
        *_live_gaps(_of_kind(lines, "live_equals_fresh")),
        *_judging_gaps(lines),
    )


def _of_kind(lines: Iterable[Record], kind: str) -> list[Record]:
    return [line for line in lines if line.get("kind") == kind]


def _in_the_run(lines: Iterable[Record]) -> list[Record]:
    """Without what evaluations recorded under a profile: what was rounded there says nothing about the training."""
    return [line for line in lines if "profile" not in line]


def _injection_gaps(injection: Any, summary: Record, lines: list[Record]) -> Iterator[str]:
    points = [point for point in _POINTS if isinstance(injection, Mapping) and injection.get(point)]
    if not points and not (isinstance(injection, Mapping) and injection.get("by_pattern")):
        if summary.get("sites"):
            yield f"{summary['sites']} sites were quantized, but its spec injects nothing"
        return
    if not summary.get("sites"):
        yield "no site is recorded as quantized"
        return
    calls = summary.get("calls") or {}
    during = injection.get("apply_during") or {}
    wanted = {phase for point in points for phase in during.get(point, _TRAINED_IN) if phase in _TRAINED_IN}
    for phase in sorted(wanted):
        if not calls.get(phase):
            yield f"no quantized call was counted during {phase}"
    for point in points:
        shares = [line["share_changed"] for line in lines if line.get("point") == point and "share_changed" in line]
        if shares and not any(_positive(share) for share in shares):
            yield f"rounding changed no {point}"


def _noise_gaps(noise: Any, lines: list[Record]) -> Iterator[str]:
    changed = any(_positive(line.get("share_changed")) for line in lines)
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


def _weight_gaps(summary: Record, lines: list[Record]) -> Iterator[str]:
    unharmed = [line.get("unharmed") for line in lines]
    if not all(unharmed) or summary.get("master_unharmed") is False:
        yield "its master weights were harmed"
    elif not unharmed and not summary.get("master_unharmed"):
        yield "no check of its master weights is recorded"


def _live_gaps(lines: list[Record]) -> Iterator[str]:
    if not lines:
        yield "no check of its live policy against the saved one is recorded"
    if any(_positive(line.get("max_difference")) for line in lines):
        yield "its live policy differed from the saved one"


def _judging_gaps(lines: Sequence[Record]) -> Iterator[str]:
    """Evaluations under a site table of which nothing was rounded while the answers were made."""
    rounded = {(row["profile"], row.get("step")) for row in _of_kind(lines, "injection") if _counted(row)}
    for evaluation in _of_kind(lines, "evaluation"):
        profile, step = evaluation["profile"], evaluation["step"]
        if profile["sites_digest"] is not None and (profile["name"], step) not in rounded:
            yield f"no quantized call was counted while it was judged as {profile['name']} at step {step}"


def _counted(row: Record) -> bool:
    return "profile" in row and _positive(row.get("calls"))


def _positive(value: Any) -> bool:
    """Also for a number that a file of strict JSON had to write as a word; not-a-number proves nothing good."""
    try:
        return not float(value) <= 0
    except (TypeError, ValueError):
        return False
