"""`fp4rl show`: show everything about one run."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.table import Table

from fp4rl.cli.budgets_view import print_spent
from fp4rl.cli.ledger import opened
from fp4rl.cli.options import Address, AsJson, RunsRoot
from fp4rl.cli.terminal import console, print_indented, print_json, styled, table
from fp4rl.lab import questions
from fp4rl.lab.files import json_ready
from fp4rl.lab.folders import RunFolder
from fp4rl.lab.foreign.joined import readable
from fp4rl.spec.errors import CheckFailed, NotFoundError
from fp4rl.spec.evidence import Evaluation
from fp4rl.spec.words import counted

if TYPE_CHECKING:
    from fp4rl.lab.ledger.query import About
    from fp4rl.lab.unfinished import Unfinished
    from fp4rl.spec.task import Problem

_FEW = 12
_NEVER = 10**6  # characters at which YAML breaks a line
_OF_A_PROBLEM = ("id", "split", "prompt", "answer", "solution")


def command(
    run: Annotated[str, typer.Argument(help="suite/run-id, run id, or the beginning of either.")],
    runs: RunsRoot = Path("runs"),
    ledger: Address = None,
    problem: Annotated[
        str | None, typer.Option(help="Show question, gold answer and answers to this problem, by number or id.")
    ] = None,
    failures: Annotated[
        bool, typer.Option("--failures", help="List every problem that the last evaluation did not solve.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show a run: its description, its scores with their conditions, its evidence, curves and files.

    Example: `fp4rl show quickstart/w4a4-s0 --problem 3`
    """
    from fp4rl.lab.ledger.query import about
    from fp4rl.lab.unfinished import Unfinished, unfinished_named

    known: About | Unfinished
    with opened(runs, ledger) as book, book.reading() as connection:
        try:
            known = about(connection, runs, run)
            folder, spec = RunFolder(runs / known.run.suite / known.run.run_id), known.run.spec
        except NotFoundError:
            if (begun := unfinished_named(runs, run)) is None:
                raise
            known, folder, spec = begun, begun.folder, begun.spec
    row = known.run_row()
    if problem is not None:
        _show_problem(folder, spec, row, problem, as_json=as_json)
    elif failures:
        lists = questions.failures(folder)
        if as_json:
            print_json({"run": row, "failures": [each.as_dict() for each in lists]})
        else:
            _print_failures(lists, shown=None)
    elif as_json:
        print_json(json_ready(known.as_dict()))
    else:
        _print_unfinished(known) if isinstance(known, Unfinished) else _print(known)
        _print_failures(questions.failures(folder), shown=_FEW)
    if isinstance(known, Unfinished) and known.status.word == "failed":
        raise CheckFailed(f"{folder.key} failed: {known.status.why}")


def _show_problem(folder: RunFolder, spec: Mapping[str, Any], row: Any, problem: str, *, as_json: bool) -> None:
    from fp4rl.lab.ledger.query import answers

    name = questions.named(folder, problem)
    given, (stated, why) = answers(folder, name), questions.asked_of(spec, name)
    if as_json:
        own = None if stated is None else {key: getattr(stated, key) for key in _OF_A_PROBLEM}
        print_json(json_ready({"run": row, "problem": own, "answers": given}))
    else:
        _print_answers(folder.key, given, name, stated, why)


def _print_unfinished(run: "Unfinished") -> None:
    status, screen = run.status, console()
    screen.print(styled((run.folder.key, "bold"), (f"  {status.word}", "red"), f": {status.why}"))
    done, planned = run.steps
    seed = f"seed {run.row['seed']}" if run.row["seed"] is not None else "seed not known"
    since = f", since {status.since}" if status.since else ""
    screen.print(f"arm {run.row['arm']}, {seed}; steps done: {done} of {planned or '?'}{since}")
    screen.print(styled(("next", "bold"), f" {run.goes_on}"))
    if evaluations := run.folder.evaluations():
        screen.print(accuracies(evaluations))
    for line in run.warnings:
        print_indented(("warning", "yellow"), f": {line}")
    if curves := run.curves:
        screen.print(_curves(curves))
    if tail := run.log_tail:
        screen.print(styled(("log", "bold"), f" {run.log}, its last lines:"), soft_wrap=True)
        for line in tail:
            print_indented(readable(line))
    _print_description(run.spec)


def _print(about: "About") -> None:
    run, result, screen = about.run, about.run.result, console()
    seed = f"seed {run.seed}" if run.seed is not None else "seed not known"
    screen.print(styled((run.key, "bold"), f"  arm {run.arm}, {seed}"))
    wall = f", {result.wall_s:.0f} s" if result.wall_s is not None else ""
    steps = f"{result.steps_done} of {result.steps_asked or '?'} steps"
    screen.print(f"{steps}{wall}, code {result.code_digest}")
    if result.preflight is not None:
        screen.print(f"preflight {result.preflight}: nobody looked for known traps before it began")
    if (source := result.imported) is not None:
        origin = [f"from {source.source} ({source.dialect})", source.status, source.note]
        screen.print("; ".join(filter(None, origin)), soft_wrap=True)
    if result.evaluations:
        screen.print(accuracies(result.evaluations))
    print_spent(about.spent)
    _print_evidence(about)
    if about.curves:
        screen.print(_curves(about.curves))
    size = sum(file["bytes"] for file in about.files) / 2**20
    names = [file["path"] for file in about.files[:_FEW]]
    more = f" and {len(about.files) - _FEW} more" if len(about.files) > _FEW else ""
    screen.print(styled(("files", "bold"), f" {len(about.files)}, {size:.1f} MiB: {', '.join(names)}{more}"))
    _print_description(run.described or (source.config if source is not None else None))


def _print_description(described: Any) -> None:
    """Print a description as YAML that is broken at its keys alone."""
    if isinstance(described, Mapping) and described:
        console().print(styled(("described as", "bold")))
        for text in _lines(_given(described), console().width - 2, ""):
            console().print(f"  {text}", soft_wrap=True)


def _lines(described: Mapping[str, Any], width: int, indent: str) -> Iterator[str]:
    """Yield YAML whose lines end where values do: a mapping or list that does not fit has a line for each of them."""
    for key, value in described.items():
        line = f"{indent}{key}: {_in_a_line(value)}"
        if len(line) <= width or not value or not isinstance(value, dict | list):
            yield line
            continue
        yield f"{indent}{key}:"
        if isinstance(value, dict):
            yield from _lines(value, width, f"{indent}  ")
        else:
            yield from (f"{indent}- {_in_a_line(each)}" for each in value)


def _in_a_line(value: Any) -> str:
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value, ensure_ascii=False)
    # In a list, since a scalar alone would end in "..."
    return yaml.safe_dump([value], sort_keys=False, default_flow_style=True, width=_NEVER).strip()[1:-1]


def _print_evidence(about: "About") -> None:
    screen = console()
    screen.print(styled(("evidence", "bold")))
    for gap in about.run.gaps:
        screen.print(styled("  ", ("missing", "red"), f": {gap}"))
    for kind, count in about.lines.items():
        screen.print(f"  {kind}: {counted(count, 'line')}")
    for name, value in about.run.result.evidence.as_json().items():
        screen.print(f"  {name}: {_plain(value)}")
    for line in dict.fromkeys(about.run.warnings):
        print_indented(("warning", "yellow"), f": {line}")


def accuracies(evaluations: Sequence[Evaluation]) -> Table:
    """Return a table with a line for each evaluation: what acted, and the shares with their intervals."""
    from fp4rl.lab.statistics.proportions import wilson

    rows, measured = [], any(row.kl is not None for row in evaluations)
    for row in evaluations:
        shown = _percent(row.strict)
        if row.n:
            low, high = wilson(round(row.strict * row.n), row.n)
            shown += f" [{100 * low:.1f}, {100 * high:.1f}]"
        step = f"{row.step}{' last' if row.last else ''}"
        length = f"{row.mean_length:.1f}" if row.mean_length is not None else "-"
        imitated = f" as {row.profile.deployment}" if row.profile.deployment else ""
        precision = f"{row.profile.precision or '?'}{imitated}"
        what = precision if precision == row.profile.name else f"{row.profile.name}: {precision}"
        cells = (step, what, str(row.n or "?"), shown, _percent(row.flexible), _percent(row.formatted), length)
        rows.append((*cells, *((in_nats(row.kl),) if measured else ())))
    columns = ("step>", "profile: precision", "n>", "strict>", "flexible>", "format>", "tokens>")
    caption = KL if measured else None
    title = "accuracy % (95 % interval over problems)"
    return table(*columns, *(("KL>",) if measured else ()), rows=rows, title=title, caption=caption)


KL = "KL: of the policy's next tokens, KL(unrounded || rounded), nats a token, over the answers given"


def in_nats(kl: float | None) -> str:
    """Return a KL as a table shows it; `-` where it was not measured."""
    return "-" if kl is None else f"{kl:.3g}"


def _curves(curves: dict[str, dict[str, Any]]) -> Table:
    shown = {name: curve for name, curve in curves.items() if not name.startswith("time/")}
    hidden = f", and {len(curves) - len(shown)} of time (--json)" if len(shown) < len(curves) else ""
    rows = []
    for name, curve in shown.items():
        numbers = (curve[key] for key in ("first", "last", "lowest", "highest"))
        rows.append((name, str(curve["count"]), *("nan" if number is None else f"{number:.4g}" for number in numbers)))
    columns = ("curve", "steps>", "first>", "last>", "lowest>", "highest>")
    return table(*columns, rows=rows, title=f"{len(shown)} curves{hidden}")


def _print_failures(lists: "Sequence[questions.Failures]", shown: int | None) -> None:
    """Print which problems were not solved, all or the first few `shown` of each profile."""
    for each in lists:
        text = f"{len(each.unsolved)} of {counted(each.problems, 'problem')} not solved"
        console().print(styled((f"{each.profile}, step {each.step}", "bold"), f": {text}"))
        listed = list(each.unsolved.items())[:shown]
        more = f" and {len(each.unsolved) - len(listed)} more (--failures)" if len(listed) < len(each.unsolved) else ""
        if listed:
            print_indented(f"numbers {', '.join(str(number) for number, _ in listed)}{more}")
    if shown is not None and any(each.unsolved for each in lists):
        console().print("  --problem NUMBER shows question, gold answer and answers")


def _print_answers(run: str, answers: list[dict[str, Any]], problem: str, stated: "Problem | None", why: str) -> None:
    screen = console()
    screen.print(styled((run, "bold"), f" on {problem}"))
    if stated is None:
        screen.print(f"{why}; its answers are below")
    else:
        for what, text in (("asked", stated.prompt), ("gold", stated.answer), ("solution", stated.solution)):
            screen.print(styled((what, "bold")), end="")
            screen.print(f"  {text!r}", soft_wrap=True)
    for answer in answers:
        verdict = "solved" if answer["strict"] else "not solved"
        where = f"step {answer['step']}, {answer['profile']}, sample {answer['sample']}"
        screen.print(f"{where}: {verdict}, {counted(answer['length'], 'token')}")
        if answer["completion"] is not None:
            screen.print(f"  {answer['completion']!r}", soft_wrap=True)


def _given(spec: Any) -> Any:
    """Return the description without keys that are none."""
    if not isinstance(spec, dict):
        return spec
    return {key: _given(value) for key, value in spec.items() if value is not None}


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(part)}" for name, part in value.items()) or "none"
    if isinstance(value, list | tuple):
        return "; ".join(map(_plain, value)) or "none"
    if value is None:
        return "not recorded"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
