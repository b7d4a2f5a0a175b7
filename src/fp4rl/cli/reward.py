"""`fp4rl reward`: try the reward of a spec on its gold answers and on a few answers of the model."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from fp4rl.cli.described import own_code, require_here, run_described
from fp4rl.cli.options import AsJson, Overrides, RunsRoot, SpecFile
from fp4rl.cli.terminal import console, print_by_kind, print_indented, print_json, progress, say_once, table
from fp4rl.lab.answers import stored_answers
from fp4rl.lab.stages import at_start
from fp4rl.models.quiet import quiet
from fp4rl.rl.gold_check import Fault, compares, gold_faults, spread, suspicion, tells_apart
from fp4rl.rl.judges import Judge
from fp4rl.rl.rewards import Part, Rewarder, rewards_of
from fp4rl.spec.errors import CheckFailed
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.task import SPLITS, Problem, Task
from fp4rl.spec.words import counted

_TOLD_APART = 8  # gold answers that a reward which is no judge is tried on
_ASKED = 30  # letters of a question beside its fault
_WIDE = 300  # letters of an answer on the screen, from its end


@dataclass(frozen=True)
class Tried:
    """One answer with what it earned. `parts` and `read` have a value for each reward."""

    problem: str
    gold: str
    completion: str
    reward: float | None
    parts: dict[str, float | None]
    read: dict[str, str | None]


def command(
    spec: SpecFile,
    overrides: Overrides = None,
    arm: Annotated[str | None, typer.Option(help="Which arm of a suite; by default the first that rounds.")] = None,
    sample: Annotated[int, typer.Option(min=0, help="Answers to show; 0 checks the gold answers alone.")] = 20,
    answers: Annotated[
        Path | None,
        typer.Option(
            help="Answers instead of the model's: .jsonl, .csv or .parquet (problem_id or prompt, completion), or the "
            "folder of a finished run."
        ),
    ] = None,
    golds: Annotated[int, typer.Option(min=1, help="Gold answers to check, spread over all problems.")] = 500,
    runs: RunsRoot = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Show what the reward of a spec gives to answers and what it reads out of them, and check the gold answers.

    Each gold answer must earn its point and those of other problems none: answers that cannot be scored, gold answers
    that are cut off and a wrong column are named, and the exit code is 1.

    Example: `fp4rl reward my_suite.yaml --sample 20`
    """
    planned = run_described(str(spec), overrides or [], arm)
    require_here([planned])
    experiment = planned.experiment if answers is not None or not sample else at_start(planned, runs)
    say_once(own_code([planned]))
    parts, task = rewards_of(experiment.training), experiment.task
    problems = tuple(problem for split in SPLITS for problem in task.problems(split))
    checked = spread(problems, golds)
    faults = gold_faults(parts, task, checked)
    notes = _notes(parts, task, checked)
    tried = [] if faults and answers is None else _tried(experiment, parts, problems, sample, answers, runs)
    if as_json:
        print_json(
            {
                "reward": Rewarder(task.score, parts).name,
                "answers": [asdict(each) for each in tried],
                "gold": {"checked": len(checked), "faults": [asdict(fault) for fault in faults], "notes": notes},
            }
        )
    else:
        _print(parts, tried, _with_questions(faults, checked), notes, len(checked))
    if faults:
        raise CheckFailed(f"{counted(len(faults), 'fault')} in {counted(len(checked), 'gold answer')}")


def _with_questions(faults: Sequence[Fault], problems: Sequence[Problem]) -> list[Fault]:
    """Return the faults with the beginning of its question beside the id of a problem."""
    questions = {each.id: (each.question or each.prompt).strip() for each in problems}
    return [
        replace(each, problem=each.problem and f"{each.problem} {questions[each.problem][:_ASKED]!r}")
        for each in faults
    ]


def _notes(parts: Sequence[Part], task: Task, checked: Sequence[Problem]) -> list[str]:
    """Return what need not be wrong: of the column, and what rewards that are not judges do with gold answers."""
    notes = [*filter(None, [suspicion(task, checked)])]
    for part in parts:
        if compares(part):
            continue
        few = checked[:_TOLD_APART]
        of, more = counted(len(few), "gold answer"), tells_apart(part, task, few)
        asks = "" if more else ": it does not ask for it"
        notes.append(f"{part.name} gives {more} of {of} more than that of another problem{asks}")
    return notes


def _tried(
    experiment: Experiment,
    parts: Sequence[Part],
    problems: Sequence[Problem],
    sample: int,
    answers: Path | None,
    runs: Path,
) -> list[Tried]:
    if not sample:
        return []
    if answers is not None:
        rows = stored_answers(answers, problems)
        step = max(len(rows) // sample, 1)
        rows = rows[::step][:sample]
        chosen, texts = [row[0] for row in rows], [row[1] for row in rows]
    else:
        chosen = spread([problem for problem in problems if problem.split == "train"], sample)
        quiet()  # torch, which takes seconds to import, is imported below: the gold answers are checked without it
        from fp4rl.rl.try_reward import sampled

        with progress() as advance:
            texts = sampled(experiment, chosen, runs / "models", advance)
    task = experiment.task
    scored = Rewarder(task.score, parts).score(chosen, texts, [0.0] * len(chosen))
    given = scored.parts or {parts[0].name: scored.earned}
    return [
        Tried(
            problem.id,
            problem.answer,
            text,
            _number(scored.earned[i]),
            {name: _number(values[i]) for name, values in given.items()},
            {part.name: _read(part, task, text) for part in parts},
        )
        for i, (problem, text) in enumerate(zip(chosen, texts, strict=True))
    ]


def _read(part: Part, task: Task, text: str) -> str | None:
    if part.function is None:
        return task.extracted(text)
    return part.function.extracted(text) if isinstance(part.function, Judge) else None


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _print(parts: Sequence[Part], tried: Sequence[Tried], faults: Sequence[Fault], notes: list[str], n: int) -> None:
    screen = console()
    for each in tried:
        read = ", ".join(f"{name} {_shown(each.parts[name])}{_of(each.read[name])}" for name in each.parts)
        total = f"; in all {_shown(each.reward)}" if len(parts) > 1 else ""
        screen.print(f"{each.problem}  gold {each.gold!r}: {read}{total}", soft_wrap=True)
        text = each.completion if len(each.completion) <= _WIDE else f"...{each.completion[-_WIDE:]}"
        print_indented(repr(text))
    if tried:
        rows = [
            (
                part.name,
                f"{part.weight:g}",
                str(len(tried)),
                _mean([each.parts[part.name] for each in tried]),
                str(sum(each.parts[part.name] is None for each in tried)),
                str(sum(each.read[part.name] is not None for each in tried)) if _tells(part) else "-",
            )
            for part in parts
        ]
        screen.print(table("reward", "weight>", "answers>", "mean>", "not judged>", "read>", rows=rows))
    print_by_kind((fault.kind, fault.problem, fault.what) for fault in faults)
    for note in notes:
        screen.print(f"note: {note}")
    if not faults and any(map(compares, parts)):
        screen.print(f"{counted(n, 'gold answer')} checked: each earns its point, those of other problems earn none")


def _tells(part: Part) -> bool:
    return part.function is None or isinstance(part.function, Judge)


def _of(read: str | None) -> str:
    return "" if read is None else f" (read {read!r})"


def _shown(value: float | None) -> str:
    return "not judged" if value is None else f"{value:g}"


def _mean(values: Sequence[float | None]) -> str:
    judged = [value for value in values if value is not None]
    return f"{sum(judged) / len(judged):.3g}" if judged else "-"
