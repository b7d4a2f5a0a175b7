"""The suite's questions and their verdicts: words only by the rules of `lab.criteria`, refused where unfair."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fp4rl.lab import criteria
from fp4rl.lab.criteria import Verdict, evaluate_family
from fp4rl.lab.report.fairness import unfair
from fp4rl.lab.report.runs import Run
from fp4rl.lab.statistics.seeds import Spread, pooled
from fp4rl.spec.experiment import Comparison


@dataclass(frozen=True)
class Question:
    """One comparison of the suite. Either `verdict` is there, or `refused` holds the reasons why it is not."""

    asked: Comparison
    verdict: Verdict | None
    refused: tuple[str, ...]

    @property
    def word(self) -> str:
        """What a table shows: the verdict's word, `not comparable`, or that no word is earned."""
        if self.verdict is None:
            return "not comparable"
        return self.verdict.word or "no verdict"

    def sentence(self) -> str:
        """What may be said in plain words, and no more."""
        if self.verdict is None:
            return f"Not comparable: {'; '.join(self.refused)}."
        return _sentence(self.asked, self.verdict)


def questions(
    comparisons: Sequence[Comparison], runs: Iterable[Run], spread: Spread | None = None
) -> tuple[Question, ...]:
    """Every comparison of a suite, judged as one family; one that is refused still counts among them.

    `spread` stands beside differences of single runs; without it, the suite's own repeats tell it, if there are any.
    """
    by_arm = _by_arm(runs)
    refused = {comparison: _refused(comparison, by_arm) for comparison in comparisons}
    fair = [comparison for comparison in comparisons if not refused[comparison]]
    family = [_values(comparison, by_arm) for comparison in fair]
    judged = (
        evaluate_family(family, spread=spread or _spread(fair, by_arm), others=len(comparisons) - len(fair))
        if family
        else ()
    )
    verdicts = dict(zip(fair, judged, strict=True))
    return tuple(Question(c, verdicts.get(c), refused[c]) for c in comparisons)


def has_single_runs(runs: Iterable[Run]) -> bool:
    """Whether some arm has one finished run alone, so that nothing of its own tells chance from effect."""
    finished = _by_arm(run for run in runs if run.state == "finished")
    return any(len(group) == 1 for group in finished.values())


def _by_arm(runs: Iterable[Run]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.planned.arm, []).append(run)
    return found


def _refused(comparison: Comparison, by_arm: dict[str, list[Run]]) -> tuple[str, ...]:
    sides = []
    for side in (comparison.treatment, comparison.control):
        arm, _, profile = side.partition("@")
        if arm not in by_arm:
            return (f"the suite has no arm {arm!r}",)
        if profile not in by_arm[arm][0].profiles:
            return (f"arm {arm} is not judged under {profile or 'any profile'!r}; add it to its evaluation.profiles",)
        finished = [run for run in by_arm[arm] if run.state == "finished"]
        if not finished:
            return (f"no run of {arm} is finished",)
        sides.append(finished)
    return unfair(comparison, sides[0], sides[1])


def _values(comparison: Comparison, by_arm: dict[str, list[Run]]) -> criteria.Comparison:
    margin = None if comparison.margin is None else 100 * comparison.margin
    sides = (_side(comparison.treatment, by_arm), _side(comparison.control, by_arm))
    return criteria.Comparison(comparison.question, sides[0], sides[1], margin)


def _side(side: str, by_arm: dict[str, list[Run]]) -> tuple[float, ...]:
    arm, _, profile = side.partition("@")
    ends = [run.at_end(profile) for run in by_arm[arm] if run.counts]
    return tuple(end.strict for end in ends if end is not None)


def _spread(comparisons: Iterable[Comparison], by_arm: dict[str, list[Run]]) -> Spread | None:
    """Run-to-run spread of the arms that have repeats, for the comparisons of those that have none."""
    named = dict.fromkeys(side for c in comparisons for side in (c.treatment, c.control))
    return pooled(_side(side, by_arm) for side in named)


def _sentence(asked: Comparison, verdict: Verdict) -> str:
    sides = f"{asked.treatment} ({verdict.means[0]:.1f} %)", f"{asked.control} ({verdict.means[1]:.1f} %)"
    size = f"{abs(verdict.difference):.1f} points"
    match verdict.word:
        case "better" | "worse":
            way = "above" if verdict.word == "better" else "below"
            return f"{sides[0]} lies {size} {way} {sides[1]}: {verdict.why}."
        case "reaches":
            return f"{sides[0]} reaches {sides[1]} within {verdict.margin:g} points: {verdict.why}."
        case "no difference shown":
            span = f"anything from {verdict.low:+.1f} to {verdict.high:+.1f} points fits these seeds"
            return f"{sides[0]} and {sides[1]}: {verdict.why}; {span}. This does not show that they are equal."
    return f"{sides[0]} and {sides[1]} differ by {size}: {verdict.why}."
