"""Verdicts by rule: a difference gets an effect word only over several seeds, corrected for all comparisons shown.

`better`, `worse`: the two-sided Welch test over seeds. `reaches`: non-inferiority within a margin that was fixed
before. `no difference shown`: neither. No word at all where an arm has one seed: only the difference, with the band of
differences between repeats of one run. Accuracies, margins and differences are in points (percent).
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from fp4rl.lab.statistics.seeds import LEVEL, Difference, NotWorse, Spread, holm_grouped, not_worse, welch
from fp4rl.spec.errors import InvalidValueError

Word = Literal["better", "worse", "reaches", "no difference shown"]
ALPHA = 0.05  # 1 - LEVEL
_Tests = tuple[Difference, NotWorse | None]  # the second where a margin was fixed


@dataclass(frozen=True)
class Comparison:
    """One question: `treatment` and `control` hold one accuracy (in points) per seed.

    With a `margin` (in points, fixed beforehand) the question is whether the treatment reaches the control.
    """

    label: str
    treatment: tuple[float, ...]
    control: tuple[float, ...]
    margin: float | None = None


@dataclass(frozen=True)
class Verdict:
    """The result of one comparison. `word` is None without an effect word; `why` names the rule that decided.

    `low`, `high`: the two-sided interval at `level`, by `interval` ("Welch over seeds", or "run-to-run band" around a
    difference of single runs), None where neither is known. `p_family` is `p` corrected over `comparisons` (Holm).
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
        """Return one line: the difference, its interval, the seeds, the word."""
        interval = f" [{self.low:+.1f}, {self.high:+.1f}]" if self.low is not None else ""
        chance = f", p = {self.p:.2g}" if self.p is not None else ""
        if self.p_family is not None and self.comparisons > 1:
            chance += f" ({self.p_family:.2g} after Holm over {self.comparisons})"
        word = self.word or "no verdict"
        return f"{self.difference:+.1f} points{interval}, {self.seeds[0]} vs {self.seeds[1]} seeds{chance}: {word}"

    def in_words(self, treatment: str, control: str) -> str:
        """Return the result about the two sides in words."""
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


def evaluate_family(
    family: Sequence[Comparison], *, spread: Spread | None = None, others: int = 0
) -> tuple[Verdict, ...]:
    """Test all comparisons that are shown together; return their verdicts in order, corrected for their number (Holm).

    `spread`: run-to-run spread of repeats of the same task and model, for comparisons with one seed an arm.
    `others`: the number of comparisons shown elsewhere, whose p-values are unknown; each counts in full.
    """
    tested = [_test(comparison) for comparison in family]
    p_values: dict[tuple[Hashable, ...], float] = {(f"elsewhere {i}", "difference"): 1.0 for i in range(others)}
    for index, tests in enumerate(tested):
        # A comparison that cannot be tested is shown too, so it counts.
        p_values[index, "difference"] = 1.0 if isinstance(tests, str) else tests[0].p
        if not isinstance(tests, str) and tests[1] is not None:
            p_values[index, "margin"] = tests[1].p
    corrected = holm_grouped(p_values)
    verdicts = []
    for index, (comparison, tests) in enumerate(zip(family, tested, strict=True)):
        means = fmean(comparison.treatment), fmean(comparison.control)
        seeds = len(comparison.treatment), len(comparison.control)
        count = len(family) + others
        plain = Verdict(comparison.label, means[0] - means[1], seeds, means, LEVEL, count, "", margin=comparison.margin)
        if isinstance(tests, str):
            verdicts.append(_without_word(plain, tests, spread))
        else:
            p, p_margin = corrected[index, "difference"], corrected.get((index, "margin"))
            verdicts.append(_with_word(plain, tests, p, p_margin))
    return tuple(verdicts)


def _test(comparison: Comparison) -> _Tests | str:
    """Return the tests of one comparison, or the reason why there is none."""
    treatment, control, margin = comparison.treatment, comparison.control, comparison.margin
    if not (treatment and control):
        raise InvalidValueError(f"{comparison.label or 'the comparison'} has an arm without any seed")
    if min(len(treatment), len(control)) < 2:
        return "one seed an arm shows a difference, never an effect: the seed is the replicate"
    if len({*treatment}) == 1 and len({*control}) == 1:
        return "no seed differs from another within its arm, so chance cannot be measured"
    return welch(treatment, control), None if margin is None else not_worse(treatment, control, margin)


def _with_word(plain: Verdict, tests: _Tests, p: float, p_margin: float | None) -> Verdict:
    difference, below = tests
    word, why = _word(difference, below, p, p_margin)
    return replace(
        plain,
        word=word,
        why=why + (f" (Holm over {plain.comparisons} comparisons)" if plain.comparisons > 1 else ""),
        low=difference.low,
        high=difference.high,
        interval="Welch over seeds",
        p=difference.p,
        p_family=p,
        lower_bound=below.lower_bound if below else None,
        p_margin_family=p_margin,
    )


def _word(difference: Difference, below: NotWorse | None, p: float, p_margin: float | None) -> tuple[Word, str]:
    """Return the word, and the rule that gave it."""
    bound = f"the one-sided lower bound {below.lower_bound:+.2f}" if below else ""
    if p <= ALPHA and difference.value > 0:
        return "better", f"the difference is above 0, p = {p:.2g}"
    if below and p_margin is not None and p_margin <= ALPHA:
        return "reaches", f"{bound} clears the margin -{below.margin:g}{', though below 0' if p <= ALPHA else ''}"
    if p <= ALPHA:
        return "worse", f"the difference is below 0, p = {p:.2g}"
    if difference.p <= ALPHA:
        return "no difference shown", f"p = {difference.p:.2g} alone becomes {p:.2g} after correction"
    if below and below.clears:
        return "no difference shown", f"{bound} clears the margin only before correction"
    if below:
        return "no difference shown", f"{bound} does not clear the margin -{below.margin:g}"
    return "no difference shown", f"the interval holds 0, p = {p:.2g}"


def _without_word(plain: Verdict, why: str, spread: Spread | None) -> Verdict:
    """Return the difference without a word, with the band of repeats where it is known."""
    if spread is None or spread.sd == 0:  # from repeats that do not vary no chance can be estimated
        return replace(plain, why=f"{why}; no repeats of this task and model tell how far equal runs lie apart")
    half = spread.band(plain.seeds)
    band = f"{LEVEL:.0%} of equal runs lie within {half:.1f} points of each other"
    why = f"{why}; {band} ({spread.sd:.2f} points run-to-run SD)"
    low, high = plain.difference - half, plain.difference + half
    return replace(plain, why=why, low=low, high=high, interval="run-to-run band")
