"""What step 0 tells: a number that is another run's, and whether a low one is the format of answers or rounding."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from fp4rl.lab.report.checks import FORMATTED, few
from fp4rl.lab.statistics.proportions import newcombe
from fp4rl.lab.suites import SuiteRun
from fp4rl.spec.digest import digest
from fp4rl.spec.evidence import Evaluation

_CONDITIONS = ("scorer", "max_new_tokens", "sampling", "items_digest")


def copied_starts(runs: Sequence[SuiteRun]) -> Iterator[str]:
    """Yield a sentence on each start that scored differently under the same conditions: greedily it cannot."""
    groups: dict[Any, dict[float, list[str]]] = defaultdict(lambda: defaultdict(list))
    for run, start in _starts(runs):
        profile = start.profile
        if (profile.sampling or "").startswith("greedy") and profile.noise == "off" and not _drawn(run, profile.name):
            rounded = profile.precision, profile.sites_digest
            groups[_start(run), _machine(run), rounded, _conditions(start)][start.strict].append(_name(run))
    for (*_, (precision, _), _), numbers in groups.items():
        if len(numbers) > 1:
            told = ", ".join(f"{100 * value:.1f} % in {few(names)}" for value, names in numbers.items())
            yield (
                f"Step 0 of one start, judged as {precision}, is {told}: a number is another run's, or this machine "
                "does not repeat its own."
            )


def low_starts(runs: Sequence[SuiteRun]) -> Iterator[str]:
    """Yield, where answers at step 0 miss their format, what of a rounded accuracy that is and what rounding costs."""
    unrounded = {
        (_start(run), _conditions(start)): start for run, start in _starts(runs) if start.profile.precision == "full"
    }
    told: dict[str, None] = {}
    for run, start in _starts(runs):
        full = unrounded.get((_start(run), _conditions(start)))
        shares = [each.formatted for each in (start, full) if each is not None and each.formatted is not None]
        if (
            full is not None
            and full.profile.precision != start.profile.precision
            and min(shares, default=1) < FORMATTED
        ):
            told[_cause(start, full)] = None
    yield from told


def _cause(rounded: Evaluation, full: Evaluation) -> str:
    solved = [(round(each.strict * (each.n or 1)), each.n or 1) for each in (full, rounded)]
    lost = newcombe(*solved)
    head = f"Step 0 as {rounded.profile.precision} is {100 * rounded.strict:.1f} %, unrounded {100 * full.strict:.1f} %"
    formats = f"of the asked format are {_percent(rounded.formatted)} and {_percent(full.formatted)} of the answers"
    if lost.low > 0:
        between = f"{100 * lost.value:.1f} points (95 %: {100 * lost.low:.1f} to {100 * lost.high:.1f})"
        return f"{head}: rounding costs {between}; {formats}."
    right = f", and {_percent(full.flexible)} unrounded are right in any format" if full.flexible is not None else ""
    return f"{head}: no damage by rounding shows; {formats}{right}."


def _starts(runs: Sequence[SuiteRun]) -> Iterator[tuple[SuiteRun, Evaluation]]:
    """Yield the evaluations before the first step, of runs that count."""
    for run in runs:
        if run.counts and run.run is not None:
            at_start = (each for each in run.run.result.evaluations if each.step == 0 and not each.last)
            yield from ((run, each) for each in at_start)


def _start(run: SuiteRun) -> str:
    """Return what a run started from, by value where that was recorded."""
    assert run.run is not None
    spec = run.run.spec
    return digest([spec.get("model"), spec.get("task"), spec.get("start"), sorted(run.run.inputs.items())])


def _machine(run: SuiteRun) -> str:
    assert run.run is not None
    own = run.run.result
    return digest([own.code_digest, sorted(own.versions.items()), own.device, run.run.spec.get("engine")])


def _conditions(start: Evaluation) -> tuple[Any, ...]:
    return start.n, *(getattr(start.profile, name) for name in _CONDITIONS)


def _drawn(run: SuiteRun, profile: str) -> bool:
    """Return whether rounding under a profile draws numbers, so that it differs from seed to seed."""
    own = run.planned.experiment
    injection = own.injection if profile == "deployment" else own.evaluation.injections.get(profile)
    return injection is not None and any(fmt.rounding == "stochastic" for fmt in injection.formats)


def _name(run: SuiteRun) -> str:
    return f"{run.planned.arm} seed {run.planned.seed}"


def _percent(share: float | None) -> str:
    return "not recorded" if share is None else f"{share:.0%}"
