"""`fp4rl runs`: list and filter runs, finished or not; `fp4rl runs import` imports a foreign log."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fp4rl.cli.ledger import opened
from fp4rl.cli.options import Address, AsJson, RunsRoot
from fp4rl.cli.show import accuracies
from fp4rl.cli.terminal import console, print_indented, print_json, progress, ready_to_round, styled, table
from fp4rl.engines.rollout.samplers import add_samplers
from fp4rl.engines.verl.imported import is_verl_run, read_verl_run, saved_weights, take_in
from fp4rl.lab.foreign.joined import readable
from fp4rl.lab.foreign.reader import import_log
from fp4rl.lab.provenance import code_digest, missing_files
from fp4rl.lab.runs import read_run
from fp4rl.lab.status import Status, judged, unfinished
from fp4rl.models.quiet import quiet
from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest
from fp4rl.spec.load import read_yaml
from fp4rl.spec.words import counted

if TYPE_CHECKING:
    from fp4rl.lab.ledger.query import Filter

_WIDE = 100  # columns from which on accuracies stand beside each other

app = typer.Typer(invoke_without_command=True)


@app.callback()
def list_all(
    context: typer.Context,
    runs: RunsRoot = Path("runs"),
    ledger: Address = None,
    suite: Annotated[str | None, typer.Option(help="Only this suite.")] = None,
    arm: Annotated[str | None, typer.Option(help="Only this arm.")] = None,
    seed: Annotated[int | None, typer.Option(help="Only this seed.")] = None,
    profile: Annotated[str | None, typer.Option(help="Only runs with this profile, and its accuracy.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Most rows to list; 0 for all.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List the finished runs with their last accuracies, in percent, and what has become of all others.

    Example: `fp4rl runs --suite quickstart --profile deployment`
    """
    if context.invoked_subcommand:
        return
    from fp4rl.lab.ledger.query import Filter, count_runs, list_runs, profiles_of, runs_of

    wanted = Filter(suite, arm, seed, profile)
    with opened(runs, ledger) as store, store.reading() as connection:
        rows = list_runs(connection, wanted, limit or None)
        total = count_runs(connection, wanted)
        known = profiles_of(connection)
        own = runs_of(connection, [row["id"] for row in rows if not row["imported"]])
    statuses = {number: judged(run) for number, run in own.items()}
    for row in rows:
        row["preflight"] = own[row["id"]].result.preflight if row["id"] in own else None
    others = _unfinished(runs, wanted)
    if profile is not None and profile not in known and known:
        raise NotFoundError(f"no run was evaluated as {profile!r}{nearest(profile, known)}")
    if as_json:
        print_json([*map(partial(_as_json, statuses), rows), *(row | status.as_dict() for row, status in others)])
        return
    if others:
        _print_unfinished(others)
    if not total and not others:
        raise NotFoundError(
            f"no finished run in {runs} answers to this; `fp4rl run` makes some, `fp4rl runs import` takes a log"
        )
    if total:
        _print(rows, statuses, total, profile)


def _unfinished(root: Path, wanted: "Filter") -> list[tuple[dict[str, Any], Status]]:
    """Return the runs without a result that answer to the filter: what is known of each, and its status."""
    from fp4rl.lab.unfinished import Unfinished

    matching: list[tuple[dict[str, Any], Status]] = []
    if wanted.profile is not None:  # none of them has a last accuracy
        return matching
    for folder, status in unfinished(root).items():
        row = Unfinished(folder).row
        limits = {"suite": wanted.suite, "arm": wanted.arm, "seed": wanted.seed}
        if all(value in (None, row[key]) for key, value in limits.items()):
            matching.append((row | {"strict": {}, "kl": {}}, status))
    return matching


def _as_json(statuses: Mapping[int, Status], row: dict[str, Any]) -> dict[str, Any]:
    status = statuses.get(row["id"])
    return {name: value for name, value in row.items() if name != "id"} | (status.as_dict() if status else {})


def _print_unfinished(others: list[tuple[dict[str, Any], Status]]) -> None:
    rows = ((row["suite"], row["run_id"], status.word, status.since) for row, status in others)
    title = counted(len(others), "run without a result", "runs without a result")
    console().print(table("suite", "run=", "status=", "since=", rows=rows, title=title, lines=True))
    for row, status in others:
        print_indented((row["run_id"], "bold"), f" {status.word}: {status.why}")


def _print(rows: list[dict[str, Any]], statuses: Mapping[int, Status], total: int, profile: str | None) -> None:
    now, lines, wide = code_digest(), [], console().width >= _WIDE
    for row in rows:
        planned = row["steps_asked"]
        steps = f"{row['steps_done']}" + (f"/{planned}" if planned not in (None, row["steps_done"]) else "")
        own = "current" if row["code_digest"] == now else "stale"
        status = statuses[row["id"]].word if row["id"] in statuses else row["status"]
        parts = "foreign" if row["imported"] else own, status if status != "done" else None, _unchecked(row)
        state = ", ".join(filter(None, parts))
        scores = {name: share for name, share in row["strict"].items() if profile in (None, name)}
        shown = ("  " if wide else "\n").join(
            f"{name} {100 * share:.1f}{_kl(row['kl'].get(name))}" for name, share in scores.items() if share is not None
        )
        lines.append((row["suite"], row["run_id"], steps, shown or "-", state))
    names = ("suite", "run=", "steps>", "accuracy %" if wide else "accuracy %=", "code and status")
    console().print(table(*names, rows=lines, title=counted(total, "finished run"), lines=True))
    for row in rows:
        if row["id"] in statuses and statuses[row["id"]].why:
            print_indented((row["run_id"], "bold"), f" {statuses[row['id']].word}: {statuses[row['id']].why}")
    if total > len(rows):
        console().print(f"{total - len(rows)} more; --limit 0 shows all, --suite and --arm choose")


def _unchecked(row: Mapping[str, Any]) -> str | None:
    return f"preflight {row['preflight']}" if row["preflight"] else None


def _kl(kl: float | None) -> str:
    return "" if kl is None else f" (KL {kl:.4g})"


@app.command("import")
def import_file(
    file: Annotated[
        Path,
        typer.Argument(
            help="The folder of a finished verl run under the plug-in; or a log of verl, TRL or ms-swift (console, "
            "JSON lines), CSV, TensorBoard events, or a folder with one."
        ),
    ],
    runs: RunsRoot = Path("runs"),
    ledger: Address = None,
    arm: Annotated[str | None, typer.Option(help="Name of the arm; by default the file's name.")] = None,
    seed: Annotated[int | None, typer.Option(help="Training seed of the run, if it is known.")] = None,
    config: Annotated[Path | None, typer.Option(help="The trainer's configuration, YAML or JSON.")] = None,
    status: Annotated[
        str | None, typer.Option(help="How the run ended: finished, stopped, failed, or still running.")
    ] = None,
    note: Annotated[str | None, typer.Option(help="A remark to be shown with the run.")] = None,
    suite: Annotated[
        str | None, typer.Option(help="Of a verl run: the suite that it belongs to; by default its folder's name.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Of a verl run: the folder of its final weights, if it is not in the run's own.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Take in a run of verl with its evidence, or import a log of another trainer as a run of the suite `imported`.

    Examples: `fp4rl runs import checkpoints/w4a16 --suite mine --arm w4a16_verl`,
    `fp4rl runs import train.log --arm gpg --seed 1 --config config.yaml --status failed --note "OOM"`
    """
    of_logs = {"--seed": seed, "--config": config, "--status": status, "--note": note}
    if is_verl_run(file):
        _require_none(of_logs, f"{file} is a run that records its own")
        _take_in(file, runs, ledger, (suite, arm), model, as_json)
        return
    _require_none({"--suite": suite, "--model": model}, f"{file} is no run of verl under the plug-in")
    settings = read_yaml(config) if config is not None else None
    imported = import_log(file, runs, arm=arm, seed=seed, config=settings, status=status, note=note)
    log = imported.log
    with opened(runs, ledger):
        pass
    if as_json:
        print_json(
            {"run": imported.run.key, "dialect": imported.dialect, "steps": len(log.steps), "keys": log.names}
            | {name: getattr(log, name) for name in ("went_back", "met_twice", "left_behind", "skipped")}
            | {"already_there": imported.already_there}
        )
        return
    verb = "is here already as" if imported.already_there else f"({imported.dialect}) is now"
    console().print(f"{readable(file.name)} {verb} {imported.run.key}", soft_wrap=True)
    steps = f"{counted(len(log.steps), 'step')} ({min(log.steps)} to {max(log.steps)})"
    console().print(f"{steps}, {counted(len(log.names), 'key')}")
    for line in log.remarks():
        console().print(line, soft_wrap=True)


def _require_none(options: Mapping[str, object], why: str) -> None:
    if given := [name for name, value in options.items() if value is not None]:
        raise InvalidValueError(f"{' and '.join(given)}: {why}")


def _take_in(
    file: Path, runs: Path, ledger: str | None, of: tuple[str | None, str | None], model: Path | None, as_json: bool
) -> None:
    """Take a verl run in, evaluating its final weights, and show its accuracies."""
    run = read_verl_run(file)
    planned = run.planned(*of)
    if gone := [line for line in missing_files([planned]) if not line.startswith("model.path")]:
        raise NotFoundError(gone[0])
    weights = model or saved_weights(run)
    quiet()
    ready_to_round()
    add_samplers()
    with progress() as advance:
        folder, already_there = take_in(run, planned, runs, weights, advance)
    with opened(runs, ledger):
        pass
    evaluations = [each for each in folder.result().evaluations if each.last or each.step == 0]
    if as_json:
        print_json({"run": folder.key, "steps": run.record.steps_done, "already_there": already_there})
        return
    console().print(accuracies(evaluations))
    for gap in read_run(folder, curves=False).gaps:
        console().print(styled(("missing", "red"), f": {gap}"))
    verb = "is here already as" if already_there else "is now"
    console().print(f"{run.folder} {verb} {folder.key}: `fp4rl show {folder.key}` shows all of it", soft_wrap=True)
