"""The label of a score: what acted while it was measured, according to the site table, and what did not."""

from collections import Counter
from collections.abc import Collection

from fp4rl.inject.plan import SitePlan, SiteTable
from fp4rl.spec.injection import Injection
from fp4rl.spec.points import LINEAR_POINTS, MODES, Mode, Phase
from fp4rl.spec.targets import LEFT_BY_DEFAULT

FULL, CLEAN = "full", "clean"

_LEFT_BY_DEFAULT = {f"left by {pattern!r}" for pattern in LEFT_BY_DEFAULT}  # not mentioned: no engine rounds these
_Formats = tuple[str | None, ...]  # of weight, input and output


def label(table: SiteTable | None, phase: Phase = "evaluation") -> str:
    """Return a label such as `w4a4, 3 sites mxfp8`: formats of most sites, then exceptions, the cache and errors.

    What is described but did not act follows a colon (`clean: no errors in evaluation`); `full`: nothing is described.
    """
    if table is None:
        return FULL
    active = table.injection.apply_during.active(phase)
    errors = [f"{error.kind} {error.scale:g}@{error.point}" for error in table.injection.errors if error.forward]
    caches = sorted({plan.kv_cache.name for plan in table.plans if plan.kv_cache is not None})
    described = [point for point in LINEAR_POINTS if any(getattr(plan, point) is not None for plan in table.plans)]
    described += ["kv_cache"] * bool(caches) + ["errors"] * bool(errors)
    idle = [point for point in described if point not in active]
    acted = _linear(table, active)
    acted += [f"kv_cache:{name}" for name in caches if "kv_cache" in active]
    acted += errors if "errors" in active else []
    head = ", ".join(acted) or (CLEAN if idle else FULL)
    return f"{head}: no {' and '.join(idle)} in {phase}" if idle else head


def _linear(table: SiteTable, active: frozenset[str]) -> list[str]:
    """Return the formats of most rounded sites as one word, then counts of sites that differ or are not rounded."""
    counts = Counter(_formats(plan, active) for plan in table.plans if plan.site.kind != "attention")
    untouched = counts.pop((None,) * len(LINEAR_POINTS), 0)
    if not counts:
        return []
    described = _formats(table.injection, active)
    usual = described if described in counts else counts.most_common(1)[0][0]
    others = [(formats, count) for formats, count in counts.most_common() if formats != usual]
    left_by_user = [left for left in table.left_out if left.reason not in _LEFT_BY_DEFAULT]
    untouched += sum(left.site.kind in ("linear", "experts") for left in left_by_user)
    words = [_word(usual), *(f"{_sites(count)} {_exception(formats, usual)}" for formats, count in others)]
    return words + ([f"{_sites(untouched)} not rounded"] if untouched else [])


def _formats(described: SitePlan | Injection | Mode, active: Collection[str] = LINEAR_POINTS) -> _Formats:
    formats = [getattr(described, point) if point in active else None for point in LINEAR_POINTS]
    return tuple(fmt.name if fmt is not None else None for fmt in formats)


def _exception(formats: _Formats, usual: _Formats) -> str:
    """Return one format alone, where all points that are usually rounded have it."""
    names = {name for name in formats if name is not None}
    same_points = [name is None for name in formats] == [name is None for name in usual]
    return names.pop() if same_points and len(names) == 1 else _word(formats)


def _word(formats: _Formats) -> str:
    """Return the name of the mode with these formats; else the points one by one."""
    for mode in MODES.values():
        if formats == _formats(mode):
            return mode.name
    return "+".join(f"{point}:{name}" for point, name in zip(LINEAR_POINTS, formats, strict=True) if name is not None)


def _sites(count: int) -> str:
    return f"{count} site{'s' * (count != 1)}"
