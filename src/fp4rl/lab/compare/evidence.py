"""Does a run prove that its treatment happened? Every gap between what its spec asks for and what it recorded."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fp4rl.lab.compare.rounding import rounding_gaps, wanted
from fp4rl.spec.modes import PHASES, Phase
from fp4rl.spec.words import agreeing, counted

Record = Mapping[str, Any]

_TRAINED_IN: tuple[Phase, ...] = ("rollout", "training")  # evaluations record their own precision, under a profile


def gaps(
    spec: Record, summary: Record, lines: Sequence[Record], judged: Sequence[Record] | None = None
) -> tuple[str, ...]:
    """Empty for a run whose treatment is proven. `summary` stands in `result.json`, `lines` in `evidence.jsonl`.

    `judged`: the evaluations of the result, each with its `step`, `profile` and whether it is the `last` one; None
    where they are not looked at.
    """
    if not summary and not lines:
        return ("it left no evidence",)
    return (
        *_injection_gaps(spec.get("injection"), summary, lines),
        *_noise_gaps(spec.get("noise"), _of_kind(lines, "noise")),
        *_weight_gaps(summary, _of_kind(lines, "master")),
        *_live_gaps(_of_kind(lines, "live_equals_fresh")),
        *_judging_gaps(lines),
        *(_missing_evaluations(spec, judged) if judged is not None else ()),
    )


def _of_kind(lines: Iterable[Record], kind: str) -> list[Record]:
    return [line for line in lines if line.get("kind") == kind]


def _injection_gaps(injection: Any, summary: Record, lines: Sequence[Record]) -> Iterator[str]:
    asked = {phase: wanted(injection, phase) if isinstance(injection, Mapping) else set[str]() for phase in PHASES}
    if not any(asked.values()):
        if summary.get("sites"):
            were = agreeing(summary["sites"], "was", "were")
            yield f"{counted(summary['sites'], 'site')} {were} quantized, but its spec injects nothing"
        return
    if not summary.get("sites"):
        yield "no site is recorded as quantized"
        return
    # Without what evaluations recorded: what was rounded there says nothing about the training.
    own = [line for line in lines if "profile" not in line]
    for phase in _TRAINED_IN:
        rows = [row for row in _of_kind(own, "injection") if row.get("phase") == phase]
        acting = [line for line in _of_kind(own, "acting") if line.get("phase") == phase]
        if asked[phase]:
            yield from rounding_gaps(asked[phase], acting, rows, f"during {phase}")
        elif any(_positive(row.get("calls")) for row in rows):
            yield f"sites were rounded during {phase}, which its spec leaves out"
    if not any(asked[phase] for phase in PHASES if phase != "evaluation") and not _judged_under_a_table(lines):
        yield "its spec injects in evaluations alone, and none was made under the injection"


def _judged_under_a_table(lines: Sequence[Record]) -> bool:
    return any((line.get("profile") or {}).get("sites_digest") for line in _of_kind(lines, "evaluation"))


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
    if "weights_changed" in summary and not _positive(summary["weights_changed"]):
        yield "training changed none of its weights"


def _live_gaps(lines: list[Record]) -> Iterator[str]:
    if not lines:
        yield "no check of its live policy against the saved one is recorded"
    if any(_positive(line.get("max_difference")) for line in lines):
        yield "its live policy differed from the saved one"


def _judging_gaps(lines: Sequence[Record]) -> Iterator[str]:
    """Evaluations under a site table of which not everything acted while the answers were made."""
    for evaluation in _of_kind(lines, "evaluation"):
        profile, step = evaluation["profile"], evaluation["step"]
        if profile["sites_digest"] is None:
            continue
        own = [line for line in lines if line.get("profile") == profile["name"] and line.get("step") == step]
        rows, acting = _of_kind(own, "injection"), _of_kind(own, "acting")
        # What a profile rounds stands in no spec of the run: without a record of it, whatever it did round.
        points = {str(row.get("point")) for row in rows} or {"weight"}
        yield from rounding_gaps(points, acting, rows, f"while it was judged as {profile['name']} at step {step}")


def _missing_evaluations(spec: Record, judged: Sequence[Record]) -> Iterator[str]:
    """Profiles that the spec names and that were not judged at the last step: it is not known what else is missing."""
    asked = (spec.get("training") or {}).get("steps")
    for profile in (spec.get("evaluation") or {}).get("profiles") or ():
        last = next((one for one in judged if one["profile"] == profile and one["last"]), None)
        if last is None:
            yield f"no evaluation of {profile} at the last step"
        elif asked is not None and last["step"] != asked:
            yield f"its last evaluation of {profile} is of step {last['step']}, not {asked}"


def _positive(value: Any) -> bool:
    """Also for a number that a file of strict JSON had to write as a word; not-a-number proves nothing good."""
    try:
        return not float(value) <= 0
    except (TypeError, ValueError):
        return False
