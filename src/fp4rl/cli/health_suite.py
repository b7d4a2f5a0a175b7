"""`fp4rl health SUITE`: every run of a suite by the monitor, one line each."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from fp4rl.cli.terminal import console, print_json
from fp4rl.spec.errors import CheckFailed, UserError

if TYPE_CHECKING:
    from fp4rl.spec.health import Health

COLOURS = {"not judged": "cyan", "ok": "green", "watch": "yellow", "alarm": "bold red", "unreadable": "bold red"}


@dataclass(frozen=True)
class Judged:
    """One run of a suite: where it stands at its end, and its first alarm or what keeps it from being read."""

    run: str
    steps: int
    state: str
    alarms: int
    evidence: str


def suite(folder: Path, members: list[Path], spec: "Health", as_json: bool) -> None:
    """Judge all runs. Raises CheckFailed where one had an alarm or cannot be read."""
    found = [_judged(member.relative_to(folder).as_posix(), member, spec) for member in members]
    bad = [one for one in found if one.alarms or one.state == "unreadable"]
    if as_json:
        print_json({"suite": str(folder), "healthy": not bad, "runs": [vars(one) for one in found]})
    else:
        console().print(_table(found))
    if bad:
        alarms = sum(one.alarms > 0 for one in bad)
        unreadable = len(bad) - alarms
        said = [f"{alarms} of {_runs(len(found))} had an alarm"] if alarms else []
        raise CheckFailed("; ".join(said + ([f"{_runs(unreadable)} cannot be read"] if unreadable else [])))


def _judged(name: str, run: Path, spec: "Health") -> Judged:
    from fp4rl.lab.foreign.reader import read_steps
    from fp4rl.rl.health.monitor import replay

    try:
        steps = read_steps(run)[1].in_order()
        require_logged(spec, steps)
    except (UserError, CheckFailed) as error:
        return Judged(name, 0, "unreadable", 0, str(error))
    monitor, _ = replay(steps.items(), spec)
    worst = monitor.findings()[0]
    first = str(monitor.alarms[0]) if monitor.alarms else str(worst) if worst.state == "watch" else ""
    return Judged(name, len(steps), monitor.state, len(monitor.alarms), first)


def _table(found: list[Judged]) -> Table:
    table = Table()
    table.add_column("run", no_wrap=True)
    for name in ("steps", "alarms"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("at the end", no_wrap=True)
    table.add_column("first alarm, or what is watched", overflow="fold")
    for one in found:
        state = Text(one.state, style=COLOURS[one.state])
        table.add_row(Text(one.run), str(one.steps), str(one.alarms or ""), state, Text(one.evidence))
    return table


def _runs(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"


def require_logged(spec: "Health", steps: dict[int, dict[str, float]]) -> None:
    """A rule about a metric that the log does not have would never be broken."""
    from fp4rl.rl.health.signals import signals_of
    from fp4rl.spec.errors import NotFoundError, nearest

    known = {name for metrics in steps.values() for name in (*metrics, *signals_of(metrics))}
    for rule in spec.rules:
        if rule.metric not in known:
            raise NotFoundError(f"--rule: the log has no metric {rule.metric!r}{nearest(rule.metric, known)}")
