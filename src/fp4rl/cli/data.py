"""`fp4rl data`: check a spec's problems: counts, lengths, duplicates, overlap of the splits, answers, columns."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

from fp4rl.cli.described import run_described
from fp4rl.cli.options import AsJson, Overrides, SpecFile
from fp4rl.cli.terminal import console, print_by_kind, print_json, table
from fp4rl.lab.provenance import missing_files
from fp4rl.models.quiet import quiet
from fp4rl.rl.gold_check import column_faults
from fp4rl.spec.errors import CheckFailed, NotFoundError, UserError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.task import SPLITS, Problem, Split
from fp4rl.spec.words import counted
from fp4rl.tasks.faults import MAYBE, WRONG_COLUMN, Checked, Fault, checked
from fp4rl.tasks.overlap import overlap
from fp4rl.tasks.table import TableTask


def command(
    spec: SpecFile,
    overrides: Overrides = None,
    arm: Annotated[str | None, typer.Option(help="Which arm of a suite; by default the first that rounds.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check the problems of a spec, and name what is wrong by file and line: exit code 1.

    Counts and lengths in tokens against the limits, questions that stand there twice or in two splits, answers that
    cannot be scored or are cut off, and columns that are not those that were meant.

    Example: `fp4rl data my_suite.yaml`
    """
    planned = run_described(str(spec), overrides or [], arm)
    experiment, task = planned.experiment, planned.experiment.task
    gone = missing_files([planned])
    if lost := [line for line in gone if line.startswith("task.")]:
        raise NotFoundError(lost[0])
    rows = checked(task) if isinstance(task, TableTask) else Checked()
    problems, failed = _problems(experiment, rows)
    faults = [*rows.faults, *failed, *_of_all(experiment, problems, rows)]
    faults.sort(key=lambda fault: fault.kind != WRONG_COLUMN)  # causes first
    note = f"lengths are not counted: {gone[0]}" if gone else None
    lengths = [] if gone else _lengths(experiment, problems)
    long = [*_too_long(experiment, lengths, rows)]
    faults += (fault for fault in long if not fault.kind.startswith(MAYBE))
    remarks = [*rows.remarks, *(fault for fault in long if fault.kind.startswith(MAYBE))]
    if as_json:
        sizes = {split: len(problems[split]) for split in SPLITS}
        shown = [{key: value for key, value in row.items() if key != "longer"} for row in lengths]
        print_json(
            {
                "problems": sizes,
                "lengths": shown,
                "faults": [*map(asdict, faults)],
                "remarks": [*map(asdict, remarks)],
            }
        )
    else:
        _print(experiment, problems, lengths, [*faults, *remarks], note)
    if faults:
        raise CheckFailed(f"{counted(len(faults), 'fault')} in the data of {spec}")


def _problems(experiment: Experiment, rows: Checked) -> tuple[dict[Split, Sequence[Problem]], list[Fault]]:
    """Return the problems of each split, of a table those of the rows that can be read."""
    task = experiment.task
    if not isinstance(task, TableTask):
        return {split: task.problems(split) for split in SPLITS}, []
    problems: dict[Split, Sequence[Problem]] = dict.fromkeys(SPLITS, ())
    try:
        shots = task.shots(rows.splits["train"])
        held = rows.splits | {"train": rows.splits["train"][len(shots) :]}
        problems |= {split: [task.problem(row, split, shots) for row in held[split]] for split in SPLITS}
    except UserError as error:
        failed = [] if "rows" in rows.causes else [Fault("unreadable", "", str(error))]
        rows.causes.add("rows")
        return problems, failed
    return problems, []


def _of_all(experiment: Experiment, problems: dict[Split, Sequence[Problem]], rows: Checked) -> Iterator[Fault]:
    """Yield what only all problems together show: too few of them, the same ones in two splits, a wrong column."""
    spec, every = experiment.evaluation, [problem for split in SPLITS for problem in problems[split]]
    if not rows.causes & {"rows", "question"}:
        yield from _too_few(experiment, problems)
    if not isinstance(experiment.task, TableTask):
        shared = overlap(experiment.task, problems["train"], problems[spec.split])
        yield from (Fault("leakage", "", f"{text!r} is trained on and held out") for text in shared)
    if "answer" not in rows.causes:
        yield from (Fault(fault.kind, "", fault.what) for fault in column_faults(every))


def _too_few(experiment: Experiment, problems: dict[Split, Sequence[Problem]]) -> Iterator[Fault]:
    spec = experiment.evaluation
    size = len(problems[spec.split])
    if size < spec.count:
        cure = f"set evaluation.count={size}" if size else "name task.test_path, or more rows"
        yield Fault(
            "too few",
            "",
            f"evaluation.count {spec.count}: the {spec.split} split has {counted(size, 'problem')}; {cure}",
        )
    if not problems["train"]:
        yield Fault("too few", "", "the training split is empty: there is nothing to train on")


def _lengths(experiment: Experiment, problems: dict[Split, Sequence[Problem]]) -> list[dict[str, Any]]:
    """Return, for prompts of each split and for solutions, the lengths in tokens and the limit; `longer`: the places of
    those above it."""
    quiet()
    from fp4rl.rl.problems import tokenizer_for
    from fp4rl.rl.prompts import token_ids

    recipe, tokenizer = experiment.training, tokenizer_for(experiment)
    rows = []
    for split in SPLITS:
        if problems[split]:
            ids = token_ids(tokenizer, problems[split])
            rows.append(_length(f"{split} prompts", ids, problems[split], recipe.max_prompt_length))
    solutions = [problem for split in SPLITS for problem in problems[split]]
    if solutions:
        ids = tokenizer([problem.solution for problem in solutions], verbose=False)["input_ids"]
        rows.append(_length("solutions", ids, solutions, recipe.max_response_length))
    return rows


def _length(what: str, ids: Sequence[Sequence[int]], problems: Sequence[Problem], limit: int) -> dict[str, Any]:
    sizes = sorted(map(len, ids))
    longer = [(len(row), problem) for row, problem in zip(ids, problems, strict=True) if len(row) > limit]
    median, most = (sizes[int(share * (len(sizes) - 1))] for share in (0.5, 0.99))
    summary = {"count": len(sizes), "median": median, "p99": most, "longest": sizes[-1], "limit": limit}
    return {"what": what, **summary, "over": len(longer), "longer": longer}


def _too_long(experiment: Experiment, lengths: Sequence[dict[str, Any]], rows: Checked) -> Iterator[Fault]:
    """Yield prompts over the limit, unless they are dropped; as remarks solutions, which need not be a model's."""
    places = {row.question: row.where for split in SPLITS for row in rows.splits[split]}
    for what, key in (("prompt", "max_prompt_length"), ("solution", "max_response_length")):
        if what == "prompt" and experiment.training.filter_overlong_prompts:
            continue
        kind, limit = "too long" if what == "prompt" else f"{MAYBE}too long", getattr(experiment.training, key)
        for tokens, problem in (pair for row in lengths if row["what"].endswith(f"{what}s") for pair in row["longer"]):
            where = places.get(problem.question, problem.id)
            yield Fault(kind, where, f"the {what} has {counted(tokens, 'token')}, training.{key} is {limit}")


def _print(
    experiment: Experiment,
    problems: dict[Split, Sequence[Problem]],
    lengths: Sequence[dict[str, Any]],
    faults: Sequence[Fault],
    note: str | None,
) -> None:
    screen = console()
    sizes = ", ".join(f"{split} {len(problems[split])}" for split in SPLITS)
    screen.print(f"{experiment.task.name}, problems: {sizes}; the {experiment.evaluation.split} split is judged on")
    if lengths:
        names = ("count", "median", "p99", "longest", "limit", "over")
        cells = ([row["what"], *(str(row[name]) for name in names)] for row in lengths)
        screen.print(table("tokens", *(f"{name}>" for name in names), rows=cells))
    dropped = sum(row["over"] for row in lengths if row["what"] != "solutions")
    if experiment.training.filter_overlong_prompts and dropped:
        screen.print(f"{counted(dropped, 'prompt')} over the limit will be dropped (filter_overlong_prompts)")
    if note:
        screen.print(note)
    print_by_kind((fault.kind, fault.where, fault.what) for fault in faults)
    if all(fault.kind.startswith(MAYBE) for fault in faults):
        screen.print("nothing is wrong for sure" if faults else "nothing is wrong")
