"""Descriptions in words: where arms differ, the conditions of a number, the versions that computed it."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fp4rl.lab.report.scores import Score
from fp4rl.lab.suites import SuiteRun
from fp4rl.rl.profiles import precision_named
from fp4rl.spec.evidence import Profile
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.formats import describe
from fp4rl.spec.injection import Injection
from fp4rl.spec.noise import Noise
from fp4rl.spec.points import FORMAT_POINTS

Row = tuple[str, list[str]]
NOT_RECORDED = "not recorded"
_READ_NOW = ", as this code reads it"  # of a run of other code


def arm_differences(arms: Mapping[str, Experiment]) -> list[Row]:
    """Return key -> its value in every arm, for the keys in which arms differ.

    An arm without injection (or noise) has none of its keys; of other arms only values are shown that are no default.
    """
    described = [dict(_leaves(arm.model_dump(mode="json", exclude={"seed"}), "")) for arm in arms.values()]
    keys = dict.fromkeys(key for leaves in described for key in leaves)
    rows = []
    for key in keys:
        present = [leaves[key] for leaves in described if key in leaves]
        same = all(value == present[0] for value in present)
        above = any(other.startswith(f"{key}.") for other in keys)
        usual = len(present) == len(described) or (key in _DEFAULTS and present[0] == _DEFAULTS[key])
        if not above and not (same and usual):
            rows.append((key, [in_words(leaves[key]) if key in leaves else "-" for leaves in described]))
    return rows


def measured_under(profile: Profile, score: Score, experiment: Experiment) -> list[tuple[str, str]]:
    """Return everything that a number depends on besides the weights; missing entries are called not recorded.

    The formats are those of the description, as the present code reads it; the digest of the site table is of what
    really acted.
    """
    injection = precision_named(profile.name, experiment.evaluation, experiment.injection).injection
    nothing_acted = profile.precision is not None and profile.precision.partition(":")[0] in ("full", "clean")
    stale = any(own.run.stale for own in score.by_seed if own.end is not None and own.end.profile == profile)
    facts = {
        "precision": profile.precision,
        "formats": _formats(injection, experiment.model.dtype) + (_READ_NOW if stale else ""),
        "deployment": profile.deployment or (injection.deployment if injection else None) or "none",
        "site table": profile.sites_digest or ("none" if nothing_acted else None),
        "noise": profile.noise,
        "scorer": profile.scorer,
        "answers": profile.sampling,
        "token limit": profile.max_new_tokens,
        "problems": score.problems,
        "item set": profile.items_digest,
    }
    return [(name, NOT_RECORDED if value is None else str(value)) for name, value in facts.items()]


def versions(runs: Iterable[SuiteRun]) -> list[Row]:
    """Return library -> the versions that the finished runs recorded."""
    tables = [run.run.result.versions for run in runs if run.run is not None]
    names = dict.fromkeys(name for table in tables for name in table)
    return [(name, sorted({table[name] for table in tables if name in table})) for name in names]


def _formats(injection: Injection | None, dtype: str) -> str:
    if injection is None or injection.is_nothing:
        return dtype
    active = injection.acts_in("evaluation")
    by_point = [(point, getattr(injection, point)) for point in FORMAT_POINTS if point in active]
    formats = [f"{point} {in_words(describe(fmt))}" for point, fmt in by_point if fmt is not None]
    errors = injection.errors if "errors" in active else ()
    words = [*formats, *(f"{error.name} {error.scale:g}" for error in errors)]
    return "; ".join(words) or dtype


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for everything below; a format is one value."""
    if isinstance(value, dict) and "name" not in value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value


def in_words(value: Any) -> str:
    """Return a value in words; a format as its name, with its differences in brackets."""
    match value:
        case None:
            return "none"
        case dict():
            rest = ", ".join(f"{key} {inner}" for key, inner in value.items() if key != "name")
            return f"{value.get('name')} ({rest})"
        case list():
            return ", ".join(map(in_words, value)) or "none"
    return str(value)


_DEFAULTS = dict(
    _leaves({"injection": Injection().model_dump(mode="json"), "noise": Noise().model_dump(mode="json")}, "")
)
