"""The verdict in words for whoever reads only one paragraph, and the ranking of what was measured."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fp4rl.lab.report.collect import SuiteReport
from fp4rl.lab.report.scores import Mean, Score, mean_over_seeds
from fp4rl.spec.words import agreeing, counted

# the word of a verdict -> what it means to somebody who has never met it
_MEANS = {
    "better": "is better, by more than chance in training explains",
    "worse": "is worse, by more than chance in training explains",
    "reaches": "is as good as the other within the margin that was fixed before",
    "no difference shown": "shows no difference; this is not proof that there is none",
    "no verdict": "gets no verdict: too few seeds to tell chance from effect",
    "not comparable": "is not answered: the runs cannot be compared",
}
_MOST = 6  # questions told one by one


@dataclass(frozen=True)
class Ranked:
    """One row of the ranking. `within`: whether its interval reaches that of the first row, so that the order between
    the two may be chance. `cost`: this number less that of the same policies in full precision."""

    rank: int
    score: Score
    within: bool
    cost: Mean | None


def headline(report: SuiteReport) -> list[str]:
    """Return a few sentences: what was answered, what leads, what it rests on."""
    return [*_answered(report), *_leads(report), *_rests_on(report)]


def ranking(scores: Sequence[Score]) -> list[Ranked]:
    """Return every arm and profile with a mean, the most accurate first."""
    rows = sorted((s for s in scores if s.after is not None), key=lambda s: -_value(s))
    full = {s.arm: s for s in scores if s.profile == "full"}
    return [
        Ranked(rank, score, _meets(score, rows[0]), _cost(score, full.get(score.arm)))
        for rank, score in enumerate(rows, 1)
    ]


def _answered(report: SuiteReport) -> Iterator[str]:
    for answer in report.questions[:_MOST]:
        verdict, label = answer.verdict, answer.question.label.rstrip("?. ")
        treatment, control = answer.question.treatment, answer.question.control
        size = f" ({verdict.difference:+.1f} points)" if verdict is not None and answer.comparable else ""
        meaning = _MEANS.get(answer.word, answer.word)
        unequal = answer.budgets.sentence() if answer.budgets is not None and answer.comparable else None
        yield f"{label}? {treatment} against {control} {meaning}{size}{f', {unequal}' if unequal else ''}."
    if len(report.questions) > _MOST:
        words = Counter(answer.word for answer in report.questions)
        counts = ", ".join(f"{count} {word}" for word, count in words.most_common())
        yield f"Of all {len(report.questions)} questions: {counts}."
    if not report.questions:
        yield "The suite asks no question, so nothing is claimed: its arms stand side by side."


def _leads(report: SuiteReport) -> Iterator[str]:
    rows = ranking(report.scores)
    if len(rows) > 1:
        near = [row.score.name for row in rows[1:] if row.within]
        few = ", ".join(near[:3]) + (f" and {len(near) - 3} more" if len(near) > 3 else "")
        chance = f"; by their intervals {few} may be as good" if near else ""
        yield f"The highest accuracy is that of {rows[0].score.name}, {_value(rows[0].score):.1f} %{chance}."


def _rests_on(report: SuiteReport) -> Iterator[str]:
    words = Counter(run.status.word for run in report.runs)
    states = ", ".join(f"{count} {word}" for word, count in words.most_common())
    enter = sum(run.counts for run in report.runs)
    proven = f"{counted(enter, 'run')} that {agreeing(enter, 'proves its', 'prove their')} treatment"
    yield f"This rests on {proven} ({states})."


def _value(score: Score) -> float:
    return score.after.value if score.after is not None else 0.0


def _cost(score: Score, full: Score | None) -> Mean | None:
    if full is None or full is score:
        return None
    before = {own.run.planned.seed: own.after for own in full.by_seed if own.run.counts}
    after = {own.run.planned.seed: own.after for own in score.by_seed if own.run.counts}
    pairs = [(value, before.get(seed)) for seed, value in after.items()]
    return mean_over_seeds(
        [after - before for after, before in pairs if after is not None and before is not None], -100.0
    )


def _meets(score: Score, first: Score) -> bool:
    low = first.after.low if first.after is not None else None
    high = score.after.high if score.after is not None else None
    return low is not None and high is not None and high >= low
