"""The fixed thresholds of the verl fork that this work grew from, and whether each of them can tell anything apart.

They are kept to be compared with, not to be trusted: a threshold that ideal data cannot meet flags every layer, so the
result says where the format's own ideal already fails it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fp4rl.spec.errors import NotFoundError, nearest


@dataclass(frozen=True)
class Rule:
    """A site is flagged when `measure` is `below` or `above` the limit; `meaning` is what an unclear name means."""

    name: str
    measure: str
    side: Literal["below", "above"]
    limit: float
    unit: str = ""
    meaning: str = ""

    def flags(self, value: float) -> bool:
        """Whether this value is on the wrong side."""
        return value < self.limit if self.side == "below" else value > self.limit


RULES: Mapping[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("sqnr", "sqnr_db", "below", 20.0, "dB"),
        Rule("deadzone", "deadzone_share", "above", 0.05),
        Rule("saturation", "clipped_share", "above", 0.01),
        Rule("relative_error", "mean_relative", "above", 0.10, meaning="mean |e|/|w|, as the fork defines it"),
        Rule("relative_l1", "relative_l1", "above", 0.10, meaning="sum|e|/sum|w|"),
        Rule("gain_ratio", "gain_ratio", "below", 0.9),
        Rule("kurtosis_ratio", "kurtosis_ratio", "below", 0.9),
    )
}


@dataclass(frozen=True)
class Measured:
    """One weight, input or layer that rules are applied to, with the measures of ideal data in the same format."""

    name: str
    layer: int | None
    measures: Mapping[str, float]
    ideal: Mapping[str, float]


@dataclass(frozen=True)
class RuleResult:
    """What one rule flagged, and in which layers; `ideal_fails` counts those whose format's ideal already fails it."""

    rule: Rule
    judged: int
    flagged: tuple[str, ...]
    layers: tuple[int, ...]
    layers_judged: int
    ideal_fails: int

    @property
    def discriminates(self) -> bool:
        """False when ideal data would be flagged everywhere too."""
        return self.judged > 0 and self.ideal_fails < self.judged

    @property
    def advice(self) -> str:
        """What the fork's bands make of it."""
        return band(len(self.layers) / self.layers_judged) if self.layers_judged else "no action"

    def cells(self) -> tuple[str, str, str, str]:
        """For a reader, under COLUMNS."""
        rule, sign = self.rule, "<" if self.rule.side == "below" else ">"
        ideal = "" if not self.ideal_fails else "flagged too" if self.discriminates else "all: tells nothing"
        flagged = f"{len(self.flagged)} of {self.judged}"
        return f"{rule.name} {sign} {rule.limit:g} {rule.unit}".rstrip(), flagged, ideal, self.advice


def meanings(results: Sequence[RuleResult]) -> str:
    """What is measured by the rules whose name does not say it; empty where there is none."""
    return "; ".join(f"{r.rule.name}: {r.rule.meaning}" for r in results if r.rule.meaning)


COLUMNS = ("rule", "flagged", "ideal data", "by the fork's bands")


def rule_named(name: str, limit: float | None = None) -> Rule:
    """A rule by name, with another limit where one is given; NotFoundError names the nearest."""
    if name not in RULES:
        raise NotFoundError(f"no rule is called {name!r}{nearest(name, RULES)}")
    rule = RULES[name]
    return rule if limit is None else replace(rule, limit=limit)


def apply_rule(rule: Rule, measured: Sequence[Measured]) -> RuleResult:
    """Apply one rule to everything that has its measure."""
    having = [item for item in measured if rule.measure in item.measures]
    flagged = [item for item in having if rule.flags(item.measures[rule.measure])]
    ideal_fails = sum(rule.measure in item.ideal and rule.flags(item.ideal[rule.measure]) for item in having)
    layers = sorted({item.layer for item in flagged if item.layer is not None})
    layers_judged = len({item.layer for item in having if item.layer is not None})
    names = tuple(item.name for item in flagged)
    return RuleResult(rule, len(having), names, tuple(layers), layers_judged, ideal_fails)


def band(share_of_layers: float, low: float = 0.10, high: float = 0.30) -> str:
    """The fork's bands: what to do when this share of the layers is flagged."""
    if share_of_layers == 0:
        return "no action"
    if share_of_layers < low:
        return "leave the flagged layers out"
    return "wider for the worst and noise for the moderate" if share_of_layers <= high else "reconsider_quantization"
