"""All checks in their order: what needs nothing, what needs the model's configuration, what needs its weights."""

from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from types import MappingProxyType

from fp4rl.lab.preflight.rows import Check, Needs, Row, Subject, Verdict

_HERE = "fp4rl.lab.preflight"
# Imported when they are asked for: what `nothing` needs imports no torch.
GROUPS = MappingProxyType(
    {
        "nothing": ("settings", "questions", "deployment", "surroundings"),
        "model": ("numbers", "model"),
        "weights": ("live", "steps"),
    }
)
_WORST: tuple[Verdict, ...] = ("fail", "warn", "waits", "pass")


def checks(needs: Needs) -> tuple[Check, ...]:
    """Return the checks that need so much, in order."""
    return tuple(check for group in GROUPS[needs] for check in import_module(f"{_HERE}.{group}").CHECKS)


def preflight(
    subject: Subject, levels: Iterable[Needs], on_check: Callable[[int, int], None] = lambda *_: None
) -> Iterator[Row]:
    """Yield the rows of all checks of some levels. `on_check` is called with (done, all) after each."""
    chosen = [check for needs in levels for check in checks(needs)]
    for number, check in enumerate(chosen, 1):
        yield from check.rows(subject)
        on_check(number, len(chosen))


def worst(rows: Iterable[Row]) -> Verdict:
    """Return the worst verdict of some rows; `pass` of none."""
    verdicts = {row.verdict for row in rows}
    return next((verdict for verdict in _WORST if verdict in verdicts), "pass")
