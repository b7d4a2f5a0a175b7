"""`fp4rl health`: judge a run, or the log of another trainer, with the monitor that watches live runs."""

from glob import escape
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from fp4rl.cli.options import AsJson, RunsRoot
from fp4rl.cli.terminal import console, print_json, table
from fp4rl.lab.foreign.joined import Joined, readable
from fp4rl.lab.foreign.reader import read_steps
from fp4rl.rl.health.findings import Finding
from fp4rl.rl.health.monitor import Monitor, replay
from fp4rl.rl.health.signals import signals_of
from fp4rl.spec.errors import CheckFailed, InvalidValueError, NotFoundError, UserError, nearest
from fp4rl.spec.health import Health
from fp4rl.spec.load import parse
from fp4rl.spec.words import counted

_METRICS = "metrics.jsonl"
COLOURS = {"not judged": "cyan", "ok": "green", "watch": "yellow", "alarm": "bold red", "unreadable": "bold red"}


def command(
    log: Annotated[
        Path,
        typer.Argument(
            help="A run or a suite (a folder, or its name below --runs), or a log of another trainer: verl, TRL, "
            "ms-swift, JSON lines, CSV, TensorBoard, or the folder of such a log."
        ),
    ],
    rule: Annotated[
        list[str] | None,
        typer.Option("--rule", "-r", help="A rule of your own: 'stop if METRIC < VALUE at step N'; may be repeated."),
    ] = None,
    thresholds: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="A threshold, such as length_ratio=2; may be repeated.")
    ] = None,
    runs: RunsRoot = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Judge every step of a log: ok, watch, alarm or not judged, with the evidence. Exit code 1 after an alarm.

    Example: `fp4rl health runs/quickstart/RUN --rule 'stop if accuracy/rollout < 0.1 at step 20'`
    """
    spec, folder = _spec(rule or [], thresholds or []), _located(log, runs)
    if members := _runs_in(folder):
        _show_suite(folder, members, spec, as_json)
    else:
        _show_log(folder, spec, as_json)


def _spec(rules: list[str], thresholds: list[str]) -> Health:
    pairs = [word.partition("=") for word in thresholds]
    for word, (key, equals, _) in zip(thresholds, pairs, strict=True):
        if not key or not equals:
            raise InvalidValueError(f"--set {word!r}: write it like length_ratio=2")
    return parse(Health, {"rules": rules, "thresholds": {key: value for key, _, value in pairs}}, "")


def _located(log: Path, runs: Path) -> Path:
    """Return the path that is named: as it is, or of a run or suite below `runs` by its name or its beginning."""
    if log.exists() or log.is_absolute():
        return log
    if (runs / log).exists():
        return runs / log
    matches = sorted(runs.glob(f"{escape(str(log))}*/")) if ".." not in log.parts else []
    return matches[0] if len(matches) == 1 else log


def _runs_in(folder: Path) -> list[Path]:
    """Return the runs of a suite, or of all suites in `folder`; none where it is a run or a log itself."""
    if not folder.is_dir() or (folder / _METRICS).is_file():
        return []
    return sorted(file.parent for file in (*folder.glob(f"*/{_METRICS}"), *folder.glob(f"*/*/{_METRICS}")))


def _judged(log: Path, spec: Health) -> tuple[str, Joined, Monitor, list[Finding]]:
    """Return a log's form, numbers, verdict and findings. Raises NotFoundError for a rule about a metric it lacks."""
    dialect, joined = read_steps(log)
    steps = joined.in_order()
    known = {name for metrics in steps.values() for name in (*metrics, *signals_of(metrics))}
    for rule in spec.rules:
        if rule.metric not in known:
            raise NotFoundError(f"--rule: the log has no metric {rule.metric!r}{nearest(rule.metric, known)}")
    return dialect, joined, *replay(steps.items(), spec)


def _show_log(log: Path, spec: Health, as_json: bool) -> None:
    """Judge one log and show every check. Raises CheckFailed after an alarm."""
    dialect, joined, monitor, findings = _judged(log, spec)
    title = readable(f"{log}: {counted(len(joined.steps), 'step')} ({dialect})")
    if as_json:
        checks, changes = ([vars(finding) for finding in some] for some in (monitor.findings(), findings))
        states = {"log": title, "healthy": monitor.healthy, "state": monitor.state}
        print_json(states | {"checks": checks, "course": changes, "read": joined.remarks()})
    else:
        screen = console()
        screen.print(title)
        for line in joined.remarks():
            screen.print(line, style="yellow")
        alarms = [alarm.check for alarm in monitor.alarms]
        rows = (
            (finding.check, _state(finding.state), str(alarms.count(finding.check) or ""), finding.evidence)
            for finding in monitor.findings()
        )
        screen.print(table("check=", "at the end=", "alarms>", "evidence", rows=rows, lines=True))
        for finding in findings:  # what the monitor would have reported live
            screen.print(str(finding), style=COLOURS[finding.state])
    if not monitor.healthy:
        count = f"{len(monitor.alarms)} alarms, the first" if len(monitor.alarms) > 1 else "an alarm"
        raise CheckFailed(f"{count} at step {monitor.alarms[0].step}: {monitor.alarms[0].check}")
    if monitor.state == "not judged":
        raise InvalidValueError(f"{log} has nothing that a check looks at; the table names what each of them needs")


def _state(state: str) -> Text:
    return Text(state, style=COLOURS[state])


def _show_suite(folder: Path, members: list[Path], spec: Health, as_json: bool) -> None:
    """Judge all runs. Raises CheckFailed where one had an alarm or cannot be read."""
    results = [{"run": member.relative_to(folder).as_posix()} | _summary(member, spec) for member in members]
    alarmed = sum(result["alarms"] > 0 for result in results)
    unreadable = sum(result["state"] == "unreadable" for result in results)
    if as_json:
        print_json({"suite": str(folder), "healthy": not alarmed + unreadable, "runs": results})
    else:
        rows = ((r["run"], str(r["steps"]), str(r["alarms"] or ""), _state(r["state"]), r["evidence"]) for r in results)
        names = ("run=", "steps>", "alarms>", "at the end=", "first alarm, or what is watched")
        console().print(table(*names, rows=rows, lines=True))
    wrong = [f"{alarmed} of {counted(len(results), 'run')} had an alarm"] if alarmed else []
    wrong += [f"{counted(unreadable, 'run')} cannot be read"] if unreadable else []
    if wrong:
        raise CheckFailed("; ".join(wrong))


def _summary(run: Path, spec: Health) -> dict[str, Any]:
    """Return the final state of one run of a suite, and its first alarm, or why it cannot be read."""
    try:
        _, joined, monitor, _ = _judged(run, spec)
    except (UserError, CheckFailed) as error:
        return {"steps": 0, "state": "unreadable", "alarms": 0, "evidence": str(error)}
    worst = monitor.findings()[0]
    first = str(monitor.alarms[0]) if monitor.alarms else str(worst) if worst.state == "watch" else ""
    return {"steps": len(joined.steps), "state": monitor.state, "alarms": len(monitor.alarms), "evidence": first}
