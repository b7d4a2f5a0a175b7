"""Which problems flipped: solved more often on one side of a question, with an answer of each side."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fp4rl.lab.compare.comparison import Answer
from fp4rl.lab.compare.sides import Side, SideRun
from fp4rl.lab.files import Damaged
from fp4rl.lab.report.rollouts import cut
from fp4rl.spec.errors import UserError
from fp4rl.spec.experiment import Experiment

MOST_SEEDS, MOST_SHOWN, MOST_QUESTIONS = 4, 12, 12
_Solved = Mapping[str, bool]
_Read = Sequence[tuple[SideRun, _Solved]]
_Asked = Mapping[str, tuple[str, str]]


@dataclass(frozen=True)
class Flip:
    """One problem. `solved`: how many of the runs read solved it, treatment and control; `answers`: what the first run
    of each side answered, and whether that was right."""

    problem_id: str
    question: str
    gold: str
    solved: tuple[int, int]
    answers: tuple[tuple[str, bool], tuple[str, bool]]


@dataclass(frozen=True)
class Flips:
    """The flips of one question. `runs`: how many of each side were read; `gained`, `lost`: the problems that a larger
    or smaller share of the treatment's runs solved; `shown`: the largest of both; `why`: why there is nothing."""

    treatment: str
    control: str
    runs: tuple[int, int] = (0, 0)
    problems: int = 0
    gained: int = 0
    lost: int = 0
    shown: tuple[Flip, ...] = ()
    why: str | None = None


def flips_of(answers: Sequence[Answer], arms: Mapping[str, Experiment]) -> list[Flips]:
    """Return the flips of the first MOST_QUESTIONS questions, from the first MOST_SEEDS runs of each side."""

    known: dict[tuple[object, ...], _Asked] = {}

    def problems_of(arm: str) -> _Asked:
        """Return the problems of an arm; arms of one task share them."""
        own = arms.get(arm)
        if own is None:
            return {}
        key = own.task.model_dump_json(), own.evaluation.split, own.evaluation.count
        if key not in known:
            known[key] = _problems(own)
        return known[key]

    return [_flips(answer, problems_of) for answer in answers[:MOST_QUESTIONS]]


def _flips(answer: Answer, problems_of: Callable[[str], _Asked]) -> Flips:
    names = answer.question.treatment, answer.question.control
    try:
        sides = [_read(side) for side in (answer.treatment, answer.control)]
        if not all(sides):
            return Flips(*names, why="a side has no stored answers here")
        shares = [_shares([solved for _, solved in side]) for side in sides]
        change = {problem: share - shares[1][problem] for problem, share in shares[0].items() if problem in shares[1]}
        order = sorted(change, key=lambda problem: -abs(change[problem]))
        gained, lost = [p for p in order if change[p] > 0], [p for p in order if change[p] < 0]
        chosen = [*gained[: MOST_SHOWN // 2], *lost[: MOST_SHOWN // 2]]
        texts = [_completions(side[0][0]) if chosen else {} for side in sides]
    except Damaged as error:
        return Flips(*names, why=str(error))
    known = problems_of(sides[0][0][0].run.arm) if chosen else {}
    shown = [
        Flip(
            problem,
            *known.get(problem, ("", "")),
            solved=(_count(sides[0], problem), _count(sides[1], problem)),
            answers=(
                (texts[0].get(problem, ""), sides[0][0][1][problem]),
                (texts[1].get(problem, ""), sides[1][0][1][problem]),
            ),
        )
        for problem in chosen
    ]
    return Flips(*names, (len(sides[0]), len(sides[1])), len(change), len(gained), len(lost), tuple(shown))


def _count(side: _Read, problem: str) -> int:
    return sum(solved[problem] for _, solved in side)


def _read(side: Side) -> _Read:
    """Return the side's first runs whose answers are here: problem -> whether the first sample was right."""
    read: list[tuple[SideRun, _Solved]] = []
    for run in side.runs[:MOST_SEEDS]:
        rows = _rows(run, side.score)
        if rows:
            read.append((run, {problem: flag is True for problem, flag in rows.items()}))
    return read


def _shares(runs: Sequence[_Solved]) -> dict[str, float]:
    """Return problem -> the share of the runs that solved it, of the problems that all of them answered."""
    counts = Counter(problem for run in runs for problem in run if run[problem])
    return {problem: counts[problem] / len(runs) for problem in runs[0] if all(problem in run for run in runs)}


def _completions(run: SideRun) -> dict[str, str]:
    return {problem: cut(str(text or "")) for problem, text in _rows(run, "completion").items()}


def _rows(run: SideRun, column: str) -> dict[str, object]:
    """Return problem -> a column of its first sample; nothing where the run's answers are not here."""
    step, profile, folder = run.measured.step, run.measured.profile.name, run.run.folder
    if folder is None or (step, profile) not in folder.item_sets():
        return {}
    items = folder.items(step, profile, ["problem_id", "sample", column])
    columns = (items.column(name).to_pylist() for name in ("problem_id", "sample", column))
    return {problem: value for problem, sample, value in zip(*columns, strict=True) if not sample}


def _problems(experiment: Experiment) -> _Asked:
    """Return problem -> (question, gold); nothing where the task's files are not here any more."""
    evaluation = experiment.evaluation
    try:
        problems = experiment.task.problems(evaluation.split, evaluation.count)
    except (UserError, OSError):
        return {}
    return {problem.id: (cut(problem.question or problem.prompt), cut(problem.answer)) for problem in problems}
