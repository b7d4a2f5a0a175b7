"""Lines of evidence and results as a run writes them, of which a test names what it is about."""

from collections.abc import Iterable, Mapping
from typing import Any

from fp4rl.lab.gaps import gaps
from fp4rl.spec.evidence import Evaluation, Evidence
from fp4rl.spec.records import read_evidence, read_result

_USUAL: dict[str, dict[str, Any]] = {
    "master": {"phase": "rollout", "step": 0, "unharmed": True, "digest": "abab"},
    "live_equals_fresh": {"max_difference": 0.0},
    "injection": {"phase": "rollout", "site": "q_proj", "point": "weight", "calls": 9, "elements": 640}
    | {"share_changed": 0.9, "relative_error": 0.1, "looks": 3, "missed": 0},
    "noise": {
        "step": 0,
        "sigma": 0.01,
        "weights": 1,
        "elements": 8,
        "share_changed": 1.0,
        "swallowed": 0,
        "layers": [],
    },
    "evaluation": {"step": 30, "last": True, "profile": {"name": "full", "sites_digest": None}, "strict": 0.5},
}


def line(kind: str, **values: Any) -> Evidence:
    """A line of that kind; a value that is None is left out, as older versions did."""
    content = {"kind": kind} | _USUAL.get(kind, {}) | values
    found = read_evidence({key: value for key, value in content.items() if value is not None})
    assert found is not None
    return found


def gaps_of(
    spec: Mapping[str, Any], summary: Mapping[str, Any], lines: Iterable[Mapping[str, Any]], *evaluations: Evaluation
) -> tuple[str, ...]:
    """The gaps of a run that left this summary and these lines; of its evaluations only where some are given."""
    found = read_result({"evidence": summary}).evidence
    return gaps(spec, found, [line(**content) for content in lines], evaluations or None)
