"""Effect words by rule: a difference earns a word only from several seeds, corrected for all comparisons shown.

`better`, `worse`: the two-sided Welch test over seeds. `reaches`: non-inferiority within a margin that was fixed
beforehand. `no difference shown`: neither. No word at all where an arm has one seed: only the difference, with the band
in which repeats of the same run fall. Accuracies, margins and differences are in points (percent).
"""

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Literal

from fp4rl.lab.statistics.families import holm_grouped
from fp4rl.lab.statistics.seeds import Difference, NotWorse, Spread, not_worse, welch
from fp4rl.spec.errors import InvalidValueError

Word = Literal["better", "worse", "reaches", "no difference shown"]
ALPHA = 0.05


@dataclass(frozen=True)
class Comparison:
    """One question put to the data: `treatment` and `control` hold one accuracy (in points) per seed.

    With a `margin` (in points, fixed beforehand) the question is whether the treatment reaches the control.
    """

    label: str
    treatment: tuple[float, ...]
    control: tuple[float, ...]
    margin: float | None = None


@dataclass(frozen=True)
class Verdict:
    """What may be said of one comparison. `word` is None where no word is earned; `why` says which rule spoke.

    `low`, `high`: the two-sided interval at `level`, by `interval` ("Welch over seeds", or "run-to-run band" around a
    difference of single runs), None where neither is known. `p_family` is `p` after Holm over `comparisons`.
    `lower_bound` and `p_margin` belong to the margin; `p_margin_family` is corrected too.
    """

    label: str
    difference: float
    seeds: tuple[int, int]
    means: tuple[float, float]
    level: float
    comparisons: int
    why: str
    word: Word | None = None
    low: float | None = None
    high: float | None = None
    interval: str | None = None
    p: float | None = None
    p_family: float | None = None
    margin: float | None = None
    lower_bound: float | None = None
    p_margin_family: float | None = None

    def sentence(self) -> str:
        """One line: the difference, its interval, the seeds, the word."""
        interval = f" [{self.low:+.1f}, {self.high:+.1f}]" if self.low is not None else ""
        chance = f", p = {self.p:.2g}" if self.p is not None else ""
        if self.p_family is not None and self.comparisons > 1:
            chance += f" ({self.p_family:.2g} after Holm over {self.comparisons})"
        word = self.word or "no verdict"
        return f"{self.difference:+.1f} points{interval}, {self.seeds[0]} vs {self.seeds[1]} seeds{chance}: {word}"

    def in_words(self, treatment: str, control: str) -> str:
        """What may be said of the two sides in plain words, and no more."""
        sides = f"{treatment} ({self.means[0]:.1f} %)", f"{control} ({self.means[1]:.1f} %)"
        size = f"{abs(self.difference):.1f} points"
        match self.word:
            case "better" | "worse":
                way = "above" if self.word == "better" else "below"
                return f"{sides[0]} lies {size} {way} {sides[1]}: {self.why}."
            case "reaches":
                return f"{sides[0]} reaches {sides[1]} within {self.margin:g} points: {self.why}."
            case "no difference shown":
                span = f"anything from {self.low:+.1f} to {self.high:+.1f} points fits these seeds"
                return f"{sides[0]} and {sides[1]}: {self.why}; {span}. This does not show that they are equal."
        return f"{sides[0]} and {sides[1]} differ by {size}: {self.why}."

    def as_dict(self) -> dict[str, object]:
        """Plain values for a program."""
        return asdict(self)


@dataclass(frozen=True)
class _Tests:
    """The tests of one comparison; `margin` where one was fixed."""

    difference: Difference
    margin: NotWorse | None


def evaluate_family(
    family: Sequence[Comparison], *, spread: Spread | None = None, others: int = 0, alpha: float = ALPHA
) -> tuple[Verdict, ...]:
    """Test all comparisons that are shown together; their verdicts in order, corrected for their number (Holm).

    `spread`: run-to-run spread of repeats of the same task and model, for comparisons with one seed an arm.
    `others`: comparisons shown elsewhere whose p-values are not at hand; each counts in full.
    """
    tested = [_test(comparison, alpha) for comparison in family]
    p_values: dict[tuple[Hashable, ...], float] = {(f"elsewhere {i}", "difference"): 1.0 for i in range(others)}
    for index, tests in enumerate(tested):
        if isinstance(tests, str):
            p_values[index, "difference"] = 1.0  # shown, so it counts, though nothing can be tested
        else:
            p_values[index, "difference"] = tests.difference.p
            if tests.margin:
                p_values[index, "margin"] = tests.margin.p
    corrected = holm_grouped(p_values)
    count = len({key[0] for key in p_values})
    return tuple(
        _verdict(comparison, tests, corrected[index, "difference"], corrected.get((index, "margin")), alpha, count)
        if isinstance(tests, _Tests)
        else _without_word(comparison, tests, spread, 1 - alpha, count)
        for index, (comparison, tests) in enumerate(zip(family, tested, strict=True))
    )


def _test(comparison: Comparison, alpha: float) -> _Tests | str:
    """The tests of one comparison, or the reason why there is none."""
    treatment, control, margin = comparison.treatment, comparison.control, comparison.margin
    if not (treatment and control):
        raise InvalidValueError(f"{comparison.label or 'the comparison'} has an arm without any seed")
    if min(len(treatment), len(control)) < 2:
        return "one seed an arm shows a difference, never an effect: the seed is the replicate"
    if len({*treatment}) == 1 and len({*control}) == 1:
        return "no seed differs from another within its arm, so chance cannot be measured"
    below = not_worse(treatment, control, margin, 1 - alpha) if margin is not None else None
    return _Tests(welch(treatment, control, 1 - alpha), below)


def _verdict(
    comparison: Comparison, tests: _Tests, p: float, p_margin: float | None, alpha: float, count: int
) -> Verdict:
    difference, below = tests.difference, tests.margin
    word, why = _word(difference, below, p, p_margin, alpha)
    why += f" (Holm over {count} comparisons)" if count > 1 else ""
    return replace(
        _shown(comparison, why, difference.level, count),
        word=word,
        low=difference.low,
        high=difference.high,
        interval="Welch over seeds",
        p=difference.p,
        p_family=p,
        lower_bound=below.lower_bound if below else None,
        p_margin_family=p_margin,
    )


def _word(
    difference: Difference, below: NotWorse | None, p: float, p_margin: float | None, alpha: float
) -> tuple[Word, str]:
    """The word, and the rule that gave it."""
    if p <= alpha and difference.value > 0:
        return "better", f"the difference is above 0, p = {p:.2g}"
    if below and p_margin is not None and p_margin <= alpha:
        lower = ", though below 0" if p <= alpha else ""
        return (
            "reaches",
            f"the one-sided lower bound {below.lower_bound:+.2f} clears the margin -{below.margin:g}{lower}",
        )
    if p <= alpha:
        return "worse", f"the difference is below 0, p = {p:.2g}"
    if difference.p <= alpha:
        return "no difference shown", f"p = {difference.p:.2g} alone becomes {p:.2g} after correction"
    if below:
        reason = f"the one-sided lower bound {below.lower_bound:+.2f} does not clear the margin -{below.margin:g}"
        if below.clears:
            reason = f"the one-sided lower bound {below.lower_bound:+.2f} clears the margin only before correction"
        return "no difference shown", reason
    return "no difference shown", f"the interval holds 0, p = {p:.2g}"


def _without_word(comparison: Comparison, why: str, spread: Spread | None, level: float, count: int) -> Verdict:
    if spread is None or spread.sd == 0:  # repeats that do not vary at all measure no chance
        unknown = "no repeats of this task and model tell how far equal runs lie apart"
        return _shown(comparison, f"{why}; {unknown}", level, count)
    half = spread.band((len(comparison.treatment), len(comparison.control)), level)
    band = f"{level:.0%} of equal runs lie within {half:.1f} points of each other"
    why = f"{why}; {band} ({spread.sd:.2f} points run-to-run SD)"
    shown = _shown(comparison, why, level, count)
    low, high = shown.difference - half, shown.difference + half
    return replace(shown, low=low, high=high, interval="run-to-run band")


def _shown(comparison: Comparison, why: str, level: float, count: int) -> Verdict:
    """The difference alone, before any rule has given it a word."""
    means = fmean(comparison.treatment), fmean(comparison.control)
    seeds = len(comparison.treatment), len(comparison.control)
    return Verdict(comparison.label, means[0] - means[1], seeds, means, level, count, why, margin=comparison.margin)
