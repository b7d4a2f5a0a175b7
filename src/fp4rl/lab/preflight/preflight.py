"""All checks in their order: what needs nothing, what needs the model's configuration, what needs its weights."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fp4rl.lab.files import write_whole
from fp4rl.lab.matrix import PlannedRun
from fp4rl.lab.preflight.rows import Check, Needs, Row, Subject, Verdict
from fp4rl.lab.provenance import code_digest, versions
from fp4rl.rl.inputs import pointed_at
from fp4rl.spec.digest import digest

_HERE = "fp4rl.lab.preflight"
# Imported when they are asked for: what `nothing` needs imports no torch.
GROUPS = MappingProxyType(
    {
        "nothing": ("settings", "questions", "deployment", "surroundings"),
        "model": ("numbers", "data", "model"),
        "weights": ("live", "clamps", "courses", "steps", "ends"),
    }
)
EVERY: tuple[Needs, ...] = ("nothing", "model", "weights")
# From how much on a run's own preflight takes the time for everything: half a minute and seconds an arm, which is about
# a tenth of so many steps of the embedded model.
_STEPS, _STEPS_AN_ARM, _STEPS_OF_A_MODEL = 300, 75, 20
_KEPT = "preflight.json"
_WORST: tuple[Verdict, ...] = ("fail", "warn", "waits", "pass")


def checks(needs: Needs) -> tuple[Check, ...]:
    """Return the checks that need so much, in order."""
    return tuple(check for group in GROUPS[needs] for check in import_module(f"{_HERE}.{group}").CHECKS)


def preflight(
    subject: Subject,
    levels: Iterable[Needs],
    on_check: Callable[[int, int], None] = lambda *_: None,
    before_weights: Callable[[], None] = lambda: None,
) -> Iterator[Row]:
    """Yield the rows of all checks of some levels.

    `on_check` is called with (done, all) after each, and `before_weights` before the first that looks at weights.
    """
    chosen = {needs: checks(needs) for needs in levels}
    numbers, every = count(1), sum(map(len, chosen.values()))
    for needs, own in chosen.items():
        if needs == "weights":
            before_weights()
        for check in own:
            yield from check.rows(subject)
            on_check(next(numbers), every)


def worst(rows: Iterable[Row]) -> Verdict:
    """Return the worst verdict of some rows; `pass` of none."""
    verdicts = {row.verdict for row in rows}
    return next((verdict for verdict in _WORST if verdict in verdicts), "pass")


def at_stake(runs: Sequence[PlannedRun]) -> tuple[Needs, ...]:
    """Return the levels that `fp4rl run` looks at first: all of them where enough is at stake, else the free ones."""
    steps = [run.experiment.training.steps for run in runs]
    own = any(
        run.experiment.model.path is not None and n >= _STEPS_OF_A_MODEL for run, n in zip(runs, steps, strict=True)
    )
    least = max(_STEPS, _STEPS_AN_ARM * len({run.arm for run in runs}))
    return EVERY if own or sum(steps) >= least else ("nothing",)


def passed_before(subject: Subject) -> bool:
    """Return whether all checks of these runs, or of more, passed with these files and this code already."""
    now = _depends_on(subject.runs)
    try:
        then = json.loads(_kept(subject).read_text(encoding="utf-8"))["passed"]
        files = all(then["files"].get(arm) == own for arm, own in now["files"].items())
        return bool(files and set(now["runs"]) <= set(then["runs"]) and then["code"] == now["code"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def keep_passed(subject: Subject, rows: Sequence[Row]) -> None:
    """Keep beside the runs of a suite that all checks of these runs passed, with the rows."""
    content = {"passed": _depends_on(subject.runs), "rows": [row.as_dict() for row in rows]}
    write_whole(_kept(subject), json.dumps(content, indent=2))


def _depends_on(runs: Sequence[PlannedRun]) -> dict[str, Any]:
    """Return what a preflight of these runs depends on besides the machine: descriptions, files of theirs, code."""
    files = {run.arm: pointed_at(run.experiment) for run in runs}
    return {"runs": [run.run_id for run in runs], "files": files, "code": digest([code_digest(), versions()])}


def _kept(subject: Subject) -> Path:
    return subject.root / subject.runs[0].suite / _KEPT
