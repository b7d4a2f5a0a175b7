"""`fp4rl health`: is this run well? Judges a run of ours or an imported log with the monitor that watches live runs."""

from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from fp4rl.cli.options import AsJson, RunsRoot
from fp4rl.cli.tables import table
from fp4rl.cli.terminal import console, print_json
from fp4rl.spec.errors import CheckFailed, InvalidValueError, NotFoundError, UserError, nearest
from fp4rl.spec.words import counted

if TYPE_CHECKING:
    from fp4rl.rl.health.findings import Finding
    from fp4rl.rl.health.monitor import Monitor
    from fp4rl.spec.health import Health

_METRICS = "metrics.jsonl"
COLOURS = {"not judged": "cyan", "ok": "green", "watch": "yellow", "alarm": "bold red", "unreadable": "bold red"}


def command(
    log: Annotated[
        Path,
        typer.Argument(
            help="A run or a suite (folder, or its name below --runs), or a log of another trainer: verl, TRL, "
            "ms-swift, JSON lines, CSV, TensorBoard, or the folder of one."
        ),
    ],
    rule: Annotated[
        list[str] | None,
        typer.Option("--rule", "-r", help="A red flag: 'stop if METRIC < VALUE at step N'; may be repeated."),
    ] = None,
    thresholds: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="A threshold, as length_ratio=2; may be repeated.")
    ] = None,
    runs: RunsRoot = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Judge every step of a log: ok, watch or alarm with the evidence, or not judged. Exit code 1 after an alarm.

    Example: `fp4rl health runs/quickstart/RUN --rule 'stop if accuracy/rollout < 0.1 at step 20'`
    """
    spec, folder = _spec(rule or [], thresholds or []), _place(log, runs)
    members = _runs_in(folder)
    if members:
        _suite(folder, members, spec, as_json)
    else:
        _one(folder, spec, as_json)


def _one(log: Path, spec: "Health", as_json: bool) -> None:
    """Judge one log and show every check."""
    from fp4rl.lab.foreign.plain import readable
    from fp4rl.lab.foreign.reader import read_steps
    from fp4rl.rl.health.monitor import replay

    dialect, joined = read_steps(log)
    steps = joined.in_order()
    _require_logged(spec, steps)
    monitor, findings = replay(steps.items(), spec)
    title = readable(f"{log}: {len(steps)} step{'s' * (len(steps) != 1)} ({dialect})")
    if as_json:
        print_json(_as_dict(title, monitor, findings) | {"read": joined.remarks()})
    else:
        screen = console()
        screen.print(Text(title))
        for line in joined.remarks():
            screen.print(Text(line, style="yellow"))
        screen.print(_table(monitor))
        for finding in findings:  # what the monitor would have said live
            screen.print(Text(str(finding), style=COLOURS[finding.state]))
    if not monitor.healthy:
        count = f"{len(monitor.alarms)} alarms, the first" if len(monitor.alarms) > 1 else "an alarm"
        raise CheckFailed(f"{count} at step {monitor.alarms[0].step}: {monitor.alarms[0].check}")
    if monitor.state == "not judged":
        raise InvalidValueError(f"{log} has nothing that a check looks at; the table names what each of them needs")


def _place(log: Path, runs: Path) -> Path:
    """What is named: a path, or a run or a suite below the folder of runs by its name or the beginning of it."""
    if log.exists() or log.is_absolute():
        return log
    if (runs / log).exists():
        return runs / log
    matches = sorted(runs.glob(f"{escape(str(log))}*/")) if ".." not in log.parts else []
    return matches[0] if len(matches) == 1 else log


def _runs_in(folder: Path) -> list[Path]:
    """The runs of a suite, or of all suites where `folder` holds those; none where it is a run or a log itself."""
    if not folder.is_dir() or (folder / _METRICS).is_file():
        return []
    return sorted(file.parent for file in (*folder.glob(f"*/{_METRICS}"), *folder.glob(f"*/*/{_METRICS}")))


def _spec(rules: list[str], thresholds: list[str]) -> "Health":
    from fp4rl.spec.health import Health
    from fp4rl.spec.load import parse

    pairs = [word.partition("=") for word in thresholds]
    for word, (key, equals, _) in zip(thresholds, pairs, strict=True):
        if not key or not equals:
            raise InvalidValueError(f"--set {word!r}: write it like length_ratio=2")
    return parse(Health, {"rules": rules, "thresholds": {key: value for key, _, value in pairs}}, "")


def _as_dict(title: str, monitor: "Monitor", findings: list["Finding"]) -> dict[str, object]:
    return {
        "log": title,
        "healthy": monitor.healthy,
        "state": monitor.state,
        "checks": [vars(finding) for finding in monitor.findings()],
        "course": [vars(finding) for finding in findings],
    }


def _table(monitor: "Monitor") -> Table:
    rows = []
    for finding in monitor.findings():
        alarms = sum(alarm.check == finding.check for alarm in monitor.alarms)
        rows.append((finding.check, _state(finding.state), str(alarms or ""), finding.evidence))
    return table("check=", "at the end=", "alarms>", "evidence", rows=rows, lines=True)


def _state(state: str) -> Text:
    return Text(state, style=COLOURS[state])


@dataclass(frozen=True)
class RunHealth:
    """One run of a suite: where it stands at its end, and its first alarm or what keeps it from being read."""

    run: str
    steps: int
    state: str
    alarms: int
    evidence: str


def _suite(folder: Path, members: list[Path], spec: "Health", as_json: bool) -> None:
    """Judge all runs. Raises CheckFailed where one had an alarm or cannot be read."""
    results = [_run_health(member.relative_to(folder).as_posix(), member, spec) for member in members]
    bad = [result for result in results if result.alarms or result.state == "unreadable"]
    if as_json:
        print_json({"suite": str(folder), "healthy": not bad, "runs": [vars(result) for result in results]})
    else:
        console().print(_suite_table(results))
    if bad:
        alarms = sum(result.alarms > 0 for result in bad)
        unreadable = len(bad) - alarms
        alarmed = [f"{alarms} of {counted(len(results), 'run')} had an alarm"] if alarms else []
        raise CheckFailed("; ".join(alarmed + ([f"{counted(unreadable, 'run')} cannot be read"] if unreadable else [])))


def _run_health(name: str, run: Path, spec: "Health") -> RunHealth:
    from fp4rl.lab.foreign.reader import read_steps
    from fp4rl.rl.health.monitor import replay

    try:
        steps = read_steps(run)[1].in_order()
        _require_logged(spec, steps)
    except (UserError, CheckFailed) as error:
        return RunHealth(name, 0, "unreadable", 0, str(error))
    monitor, _ = replay(steps.items(), spec)
    worst = monitor.findings()[0]
    first = str(monitor.alarms[0]) if monitor.alarms else str(worst) if worst.state == "watch" else ""
    return RunHealth(name, len(steps), monitor.state, len(monitor.alarms), first)


def _suite_table(results: list[RunHealth]) -> Table:
    rows = ((run.run, str(run.steps), str(run.alarms or ""), _state(run.state), run.evidence) for run in results)
    names = ("run=", "steps>", "alarms>", "at the end=", "first alarm, or what is watched")
    return table(*names, rows=rows, lines=True)


def _require_logged(spec: "Health", steps: dict[int, dict[str, float]]) -> None:
    """A rule about a metric that the log does not have would never be broken."""
    from fp4rl.rl.health.signals import signals_of

    known = {name for metrics in steps.values() for name in (*metrics, *signals_of(metrics))}
    for rule in spec.rules:
        if rule.metric not in known:
            raise NotFoundError(f"--rule: the log has no metric {rule.metric!r}{nearest(rule.metric, known)}")
