"""What could fool a reader of these runs, and how many of them are proof against it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fp4rl.lab.compare.comparison import Answer
from fp4rl.lab.report.evidence import live_difference, masters_unchanged, noise_steps
from fp4rl.lab.runs import Run
from fp4rl.lab.suites import SuiteRun
from fp4rl.spec.evidence import Rounded

_FEW = 3
_CUT, FORMATTED = 0.05, 0.9  # shares of answers: more cut off, or fewer in the asked format, may measure that instead


@dataclass(frozen=True)
class Check:
    """One trap. `passed` of `total` finished runs (or questions: `of`) are proof against it; `others` names those that
    are not."""

    trap: str
    how: str
    passed: int
    total: int
    others: str
    of: str = "runs"


# trap, how it is ruled out, verdict on one run: None where it is not asked of it
_CHECKS: tuple[tuple[str, str, Callable[[SuiteRun, Run], bool | None]], ...] = (
    (
        "The treatment was described and never acted",
        "calls, elements and values changed are counted at every site in every phase",
        lambda _, run: not run.gaps,
    ),
    (
        "What acted is another format than the one described",
        "operands of the running model equal the rounding of their masters",
        lambda _, run: bool(run.of(Rounded)) if run.sites.plans else None,
    ),
    (
        "Rounding or noise stays in the weights",
        "digests of the master weights after each phase",
        lambda _, run: masters_unchanged(run),
    ),
    (
        "The policy that is judged is not the one that was trained",
        "its outputs equal those of a fresh copy of it",
        lambda _, run: (difference := live_difference(run)) is not None and difference == 0,
    ),
    (
        "Training changed nothing",
        "the share of weights that training changed",
        lambda _, run: (share := run.result.evidence.weights_changed) is not None and share > 0,
    ),
    (
        "Noise is too small for the dtype and is swallowed",
        "the share of weights that each draw changed",
        lambda own, run: _noisy(run) if own.planned.experiment.noise else None,
    ),
    (
        "Training collapsed, and the last step shows its wreck",
        "the health monitor's alarms",
        lambda _, run: None if (health := run.result.evidence.health) is None else health.state == "ok",
    ),
    (
        "Answers were cut off, so length was measured",
        f"at most {_CUT:.0%} of the answers at the last step reach the limit",
        lambda _, run: _all(run, "truncated", lambda share: share <= _CUT),
    ),
    (
        "Answers miss the asked format, so format was measured",
        f"at least {FORMATTED:.0%} of the answers at the last step have it",
        lambda _, run: _all(run, "formatted", lambda share: share >= FORMATTED),
    ),
    ("Runs of different code are compared", "a digest of the code", lambda own, _: not own.stale),
)


def checks(runs: Sequence[SuiteRun], questions: Sequence[Answer]) -> list[Check]:
    """Return every check that some finished run, or some answered question, is asked for."""
    finished = [(own, own.run) for own in runs if own.run is not None]
    rows = []
    for trap, how, verdict_on in _CHECKS:
        judged = [(own, verdict) for own, run in finished if (verdict := verdict_on(own, run)) is not None]
        failed = [f"{own.planned.arm} seed {own.planned.seed}" for own, verdict in judged if not verdict]
        if judged:
            rows.append(Check(trap, how, len(judged) - len(failed), len(judged), few(failed)))
    return [*rows, *_budgets(questions)]


def _budgets(questions: Sequence[Answer]) -> Iterator[Check]:
    """Yield the check of unequal training. A question passes where another asks for the same treatment at equal one."""
    answered = [(a, a.budgets) for a in questions if a.budgets is not None]
    controlled = {a.treatment.name for a, took in answered if not took.confounded}
    failed = [
        f"{a.treatment.name} against {a.control.name}"
        for a, took in answered
        if took.confounded and a.treatment.name not in controlled
    ]
    if answered:
        how = "steps, updates, answers and schedule of both sides, with all stages, or a control of equal budget beside"
        passed = len(answered) - len(failed)
        yield Check(
            "Longer or other training explains the difference", how, passed, len(answered), few(failed), "questions"
        )


def few(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    return ", ".join(names[:_FEW]) + (f" and {len(names) - _FEW} more" if len(names) > _FEW else "")


def _noisy(run: Run) -> bool:
    steps = [step for step in noise_steps(run) if step.scheduled > 0]
    return bool(steps) and all(step.share_changed > 0 for step in steps)


def _all(run: Run, score: str, holds: Callable[[float], bool]) -> bool | None:
    shares = [share for e in run.evaluations().values() if (share := e.score(score)) is not None]
    return all(map(holds, shares)) if shares else None
