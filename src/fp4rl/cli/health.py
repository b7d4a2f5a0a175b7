"""`fp4rl health`: is this run well? Judges a run of ours or an imported log with the monitor that watches live runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from fp4rl.cli.terminal import console, print_json
from fp4rl.spec.mistakes import BadValue, CheckFailed

if TYPE_CHECKING:
    from fp4rl.rl.health.findings import Finding
    from fp4rl.rl.health.monitor import Monitor
    from fp4rl.spec.health import Health

_COLOURS = {"not judged": "cyan", "ok": "green", "watch": "yellow", "alarm": "bold red"}


def command(
    log: Annotated[
        Path,
        typer.Argument(help="A run folder, a verl console log, a trainer_state.json, or TensorBoard event files."),
    ],
    rule: Annotated[
        list[str] | None,
        typer.Option("--rule", "-r", help="A red flag: 'stop if METRIC < VALUE at step N'; may be repeated."),
    ] = None,
    thresholds: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="A threshold, as length_ratio=2; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Judge every step of a log: ok, watch or alarm with the evidence, or not judged. Exit code 1 after an alarm.

    Example: `fp4rl health runs/quickstart/RUN --rule 'stop if accuracy/rollout < 0.1 at step 20'`
    """
    from fp4rl.rl.health.monitor import replay

    spec = _spec(rule or [], thresholds or [])
    dialect, steps = read_steps(log)
    _require_logged(spec, steps)
    monitor, said = replay(steps.items(), spec)
    title = f"{log}: {len(steps)} steps ({dialect})"
    if as_json:
        print_json(_as_dict(title, monitor, said))
    else:
        screen = console()
        screen.print(Text(title))
        screen.print(_table(monitor))
        for finding in said:  # what the monitor would have said live
            screen.print(Text(str(finding), style=_COLOURS[finding.state]))
    if not monitor.healthy:
        count = f"{len(monitor.alarms)} alarms, the first" if len(monitor.alarms) > 1 else "an alarm"
        raise CheckFailed(f"{count} at step {monitor.alarms[0].step}: {monitor.alarms[0].check}")
    if monitor.state == "not judged":
        raise BadValue(f"{log} has nothing that a check looks at; the table names what each of them needs")


def read_steps(log: Path) -> tuple[str, dict[int, dict[str, float]]]:
    """(kind of log, step -> metrics). A run of ours gets its evaluations as `accuracy/validation`.

    Raises NotThere and BadValue for what cannot be read.
    """
    from fp4rl.lab.folders import RunFolder
    from fp4rl.lab.foreign.importer import read_log

    folder = log.parent if log.name == "metrics.jsonl" else log
    if not (folder / "metrics.jsonl").is_file():
        dialect, joined = read_log(log)
        return dialect, joined.in_order()
    run = RunFolder(folder)
    steps = run.metrics()
    for step, accuracy in _validations(run.result()["evaluations"] if run.finished else []).items():
        steps.setdefault(step, {})["accuracy/validation"] = accuracy
    return "fp4rl", dict(sorted(steps.items()))


def _validations(evaluations: list[dict[str, Any]]) -> dict[int, float]:
    """Step -> strict accuracy at the precision the policy samples in; other profiles are no validation."""
    found: dict[int, float] = {}
    for name in ("full", "deployment"):  # the second overrides the first
        found |= {int(e["step"]): float(e["strict"]) for e in evaluations if e["profile"]["name"] == name}
    return found


def _spec(rules: list[str], thresholds: list[str]) -> "Health":
    from fp4rl.spec.door import parse
    from fp4rl.spec.health import Health

    pairs = [word.partition("=") for word in thresholds]
    for word, (key, equals, _) in zip(thresholds, pairs, strict=True):
        if not key or not equals:
            raise BadValue(f"--set {word!r}: write it like length_ratio=2")
    return parse(Health, {"rules": rules, "thresholds": {key: value for key, _, value in pairs}}, "")


def _require_logged(spec: "Health", steps: dict[int, dict[str, float]]) -> None:
    """A rule about a metric that the log does not have would never be broken."""
    from fp4rl.rl.health.signals import signals_of
    from fp4rl.spec.mistakes import NotThere, nearest

    known = {name for metrics in steps.values() for name in (*metrics, *signals_of(metrics))}
    for rule in spec.rules:
        if rule.metric not in known:
            raise NotThere(f"--rule: the log has no metric {rule.metric!r}{nearest(rule.metric, known)}")


def _as_dict(title: str, monitor: "Monitor", said: list["Finding"]) -> dict[str, object]:
    return {
        "log": title,
        "healthy": monitor.healthy,
        "state": monitor.state,
        "checks": [finding.as_dict() for finding in monitor.standing()],
        "course": [finding.as_dict() for finding in said],
    }


def _table(monitor: "Monitor") -> Table:
    table = Table()
    table.add_column("check", no_wrap=True)
    table.add_column("at the end", no_wrap=True)
    table.add_column("alarms", justify="right")
    table.add_column("evidence", overflow="fold")
    for finding in monitor.standing():
        alarms = sum(alarm.check == finding.check for alarm in monitor.alarms)
        state = Text(finding.state, style=_COLOURS[finding.state])
        table.add_row(Text(finding.check), state, str(alarms or ""), Text(finding.evidence))
    return table
