"""`fp4rl health`: is this run well? Judges a run of ours or an imported log with the monitor that watches live runs."""

from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from fp4rl.cli.health_suite import COLOURS, require_logged, suite
from fp4rl.cli.options import AsJson, RunsRoot
from fp4rl.cli.terminal import console, print_json
from fp4rl.spec.errors import CheckFailed, InvalidValueError

if TYPE_CHECKING:
    from fp4rl.rl.health.findings import Finding
    from fp4rl.rl.health.monitor import Monitor
    from fp4rl.spec.health import Health

_METRICS = "metrics.jsonl"


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
    spec, place = _spec(rule or [], thresholds or []), _place(log, runs)
    members = _runs_in(place)
    if members:
        suite(place, members, spec, as_json)
    else:
        _one(place, spec, as_json)


def _one(log: Path, spec: "Health", as_json: bool) -> None:
    """Judge one log and show every check."""
    from fp4rl.lab.foreign.plain import readable
    from fp4rl.lab.foreign.reader import read_steps
    from fp4rl.rl.health.monitor import replay

    dialect, joined = read_steps(log)
    steps = joined.in_order()
    require_logged(spec, steps)
    monitor, said = replay(steps.items(), spec)
    title = readable(f"{log}: {len(steps)} step{'s' * (len(steps) != 1)} ({dialect})")
    if as_json:
        print_json(_as_dict(title, monitor, said) | {"read": joined.remarks()})
    else:
        screen = console()
        screen.print(Text(title))
        for line in joined.remarks():
            screen.print(Text(line, style="yellow"))
        screen.print(_table(monitor))
        for finding in said:  # what the monitor would have said live
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
    found = sorted(runs.glob(f"{escape(str(log))}*/")) if ".." not in log.parts else []
    return found[0] if len(found) == 1 else log


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


def _as_dict(title: str, monitor: "Monitor", said: list["Finding"]) -> dict[str, object]:
    return {
        "log": title,
        "healthy": monitor.healthy,
        "state": monitor.state,
        "checks": [finding.as_dict() for finding in monitor.findings()],
        "course": [finding.as_dict() for finding in said],
    }


def _table(monitor: "Monitor") -> Table:
    table = Table()
    table.add_column("check", no_wrap=True)
    table.add_column("at the end", no_wrap=True)
    table.add_column("alarms", justify="right")
    table.add_column("evidence", overflow="fold")
    for finding in monitor.findings():
        alarms = sum(alarm.check == finding.check for alarm in monitor.alarms)
        state = Text(finding.state, style=COLOURS[finding.state])
        table.add_row(Text(finding.check), state, str(alarms or ""), Text(finding.evidence))
    return table
