"""The findings of a scan: which sites stand out, relative to the format's ideal and to each other.

The fixed thresholds of the verl fork that this work grew from are kept for comparison only: a threshold that ideal data
cannot meet flags every layer, so each result tells where the format's ideal already fails it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from fp4rl.diagnose.expert_sensitivity import in_words, worst_in_words
from fp4rl.diagnose.experts import unlike
from fp4rl.diagnose.report import ScanReport
from fp4rl.diagnose.sensitivity import rank_correlation
from fp4rl.diagnose.texts import ENOUGH_TEXTS
from fp4rl.spec.errors import NotFoundError, nearest
from fp4rl.spec.points import PHASES
from fp4rl.spec.shared_scales import batch_note
from fp4rl.spec.words import agreeing, counted

STANDS_OUT = 1.25  # times the ideal's relative error: 1.9 dB worse than the format on Gaussian data
COLUMNS = ("rule", "flagged", "ideal data", "by the fork's bands")
Kind = Literal["fault", "precision", "sensitivity", "note"]


@dataclass(frozen=True)
class Finding:
    """One sentence, and the sites that it is about."""

    kind: Kind
    text: str
    sites: tuple[str, ...] = ()

    def named_sites(self, most: int = 3) -> str:
        """Return the first few of its sites in words; empty for a note, and where the sentence names all of them."""
        if self.kind == "note" or all(site in self.text for site in self.sites):
            return ""
        more = f" and {len(self.sites) - most} more" if len(self.sites) > most else ""
        return f"{', '.join(self.sites[:most])}{more}"


@dataclass(frozen=True)
class Rule:
    """A threshold: a site is flagged when `measure` is `below` or `above` the limit; `meaning` explains the measure."""

    name: str
    measure: str
    side: Literal["below", "above"]
    limit: float
    unit: str = ""
    meaning: str = ""

    def flags(self, value: float) -> bool:
        """Return whether this value is on the wrong side of the limit."""
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
    """What one rule flagged, and in which layers; `ideal_fails` counts those where ideal data would be flagged too."""

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
        """The advice of the fork's bands for this share of layers."""
        return band(len(self.layers) / self.layers_judged) if self.layers_judged else "no action"

    def cells(self) -> tuple[str, str, str, str]:
        """Return the cells of a table with the headings COLUMNS."""
        rule, sign = self.rule, "<" if self.rule.side == "below" else ">"
        ideal = "" if not self.ideal_fails else "flagged too" if self.discriminates else "all: tells nothing"
        flagged = f"{len(self.flagged)} of {self.judged}"
        return f"{rule.name} {sign} {rule.limit:g} {rule.unit}".rstrip(), flagged, ideal, self.advice


def meanings(results: Sequence[RuleResult]) -> str:
    """Explain the measures of rules whose names do not; empty where there are none."""
    return "; ".join(f"{r.rule.name}: {r.rule.meaning}" for r in results if r.rule.meaning)


def rule_named(name: str, limit: float | None = None) -> Rule:
    """Return a rule by name, with another limit where one is given; NotFoundError names the nearest."""
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
    """Return the fork's advice when this share of the layers is flagged."""
    if share_of_layers == 0:
        return "no action"
    if share_of_layers < low:
        return "leave the flagged layers out"
    return "wider for the worst and noise for the moderate" if share_of_layers <= high else "reconsider_quantization"


def standing_out(report: ScanReport, limit: float = STANDS_OUT) -> tuple[str, ...]:
    """Return sites with a weight (or an expert's) or an input whose error exceeds `limit` times that of ideal data."""
    return tuple(dict.fromkeys(part.site for part in report.parts if max(part.excess, part.worst_expert) > limit))


def layers_of(report: ScanReport, sites: tuple[str, ...]) -> frozenset[int]:
    """Return the numbered layers that these sites belong to."""
    layer_of = {plan.name: plan.site.layer for plan in report.table.plans}
    return frozenset(layer for site in sites if (layer := layer_of.get(site)) is not None)


def findings(report: ScanReport, limit: float = STANDS_OUT) -> tuple[Finding, ...]:
    """Return all findings: faults, then imprecise sites, then sensitive ones, then notes about the scan itself."""
    return (*_faults(report), *_imprecise(report, limit), *_unlike(report), *_sensitive(report), *_notes(report))


def rule_results(report: ScanReport) -> tuple[RuleResult, ...]:
    """Apply the verl fork's thresholds, with the report's limits, to what was measured; others are left out."""
    results = (apply_rule(rule_named(name, report.limits.get(name)), measured(report)) for name in RULES)
    return tuple(result for result in results if result.judged)


def rules_as_dicts(report: ScanReport) -> list[dict[str, Any]]:
    """Return the results of the fork's thresholds for JSON."""
    return [
        {
            **asdict(result.rule),
            "judged": result.judged,
            "flagged": list(result.flagged),
            "layers": list(result.layers),
            "ideal_fails": result.ideal_fails,
            "discriminates": result.discriminates,
            "bands": result.advice,
        }
        for result in rule_results(report)
    ]


def measured(report: ScanReport) -> list[Measured]:
    """Return all that rules apply to: measured weights and inputs, and every layer's ratios to full precision."""
    parts = [Measured(f"{part.site} {part.part}", part.layer, part.measures, part.ideal) for part in report.parts]
    return parts + [Measured(f"layer {layer}", layer, ratios, {}) for layer, ratios in report.ratios.items()]


def _faults(report: ScanReport) -> list[Finding]:
    verdict = report.verdict
    if verdict is None:
        return []
    faults = []
    if verdict.suspects:
        worst = verdict.suspects[0]
        sites = tuple(suspect.site for suspect in verdict.suspects)
        text = (
            f"layer {verdict.layer} looks faulty ({verdict.kind}): {worst.feature} of {worst.site} is "
            f"{worst.value:.3g}, {worst.z:.0f} robust standard deviations from the other sites"
        )
        faults.append(Finding("fault", text, sites))
    if verdict.everywhere:
        words = ", ".join(verdict.everywhere)
        faults.append(Finding("fault", f"every layer is out of bounds in {words}: the device, or a precision left on"))
    return faults


def _imprecise(report: ScanReport, limit: float) -> list[Finding]:
    out = standing_out(report, limit)
    if not report.parts:
        return []
    if not out:
        worst = max(report.parts, key=lambda part: part.excess)
        text = f"no site is above {limit:g} times the format's ideal error; the worst is at {worst.excess:.2f}"
        return [Finding("precision", text, (worst.site,))]
    total, are = len({part.site for part in report.parts}), agreeing(len(out), "is", "are")
    return [
        Finding("precision", f"{len(out)} of {total} sites {are} above {limit:g} times the format's ideal error", out)
    ]


def _unlike(report: ScanReport) -> Iterator[Finding]:
    """Yield the experts whose values are of another size than their stack's: a scale hides that from the error."""
    for part in report.parts:
        for e, times in unlike(part.experts):
            of = "weight" if e.tokens is None else f"inputs ({counted(e.tokens, 'token')})"
            text = f"the {of} of expert {e.expert} of {part.site}: up to {times:.3g} times the median expert's"
            yield Finding("precision", text, (part.site,))


def _of_experts(report: ScanReport) -> Iterator[Finding]:
    """Yield how many tokens experts got, and what was not measured of them."""
    measured = {part.site: part for part in report.parts if part.part == "input" and part.experts}
    loads = [e.tokens or 0 for part in measured.values() for e in part.experts]
    if loads:
        idle = sum(part.shape[0] - len(part.experts) for part in measured.values())
        none = f"; {counted(idle, 'expert')} got none, so nothing is known of their inputs" if idle else ""
        yield Finding("note", f"an expert was given {min(loads)} to {max(loads)} tokens{none}")
    stacks = [p.name for p in report.table.plans if p.site.kind == "experts" and p.input is not None]
    left = tuple(name for name in stacks if name not in measured) if report.parts and report.calibration else ()
    if left:
        were = f"the inputs of {counted(len(left), 'stack')} of experts were not measured"
        yield Finding("note", f"{were}: no product of their own rows was met", left)
    if report.sensitivity and (text := in_words(report.table, report.sensitivity.experts)):
        yield Finding("note", text)


def _sensitive(report: ScanReport) -> list[Finding]:
    sensitivity = report.sensitivity
    if sensitivity is None or not sensitivity.sites:
        return []
    ranked = sorted(sensitivity.sites, key=lambda site: -site.kl)
    total = sum(site.kl for site in ranked) or 1.0
    top = ranked[: max(1, len(ranked) // 10)]
    share = sum(site.kl for site in top) / total
    makes = agreeing(len(top), "makes", "make")
    text = f"{len(top)} of {len(ranked)} sites {makes} {share:.0%} of the KL; the worst is {top[0].name}"
    lines = [Finding("sensitivity", text, tuple(site.name for site in top))]
    if experts := sensitivity.experts:
        lines.append(Finding("sensitivity", worst_in_words(experts[0], experts), (experts[0].site,)))
    errors = {part.site: part.measures["relative_l2"] for part in report.parts if part.part == "weight"}
    pairs = [(errors[site.name], site.kl) for site in ranked if site.name in errors]
    agreement = rank_correlation([e for e, _ in pairs], [h for _, h in pairs])
    if agreement is not None:
        text = f"rank correlation of a weight's error with the KL it causes: {agreement:.2f}; size alone does not tell"
        lines += [Finding("sensitivity", text)] if agreement < 0.7 else []
    if sensitivity.rank_correlation is not None:
        text = f"rank correlation of the one-pass estimate with the measured KL: {sensitivity.rank_correlation:.2f}"
        lines.append(Finding("sensitivity", text))
    return lines


def _of_shared_factors(report: ScanReport) -> list[Finding]:
    changed = [(p.measures["relative_l2"], p.own_factor, p.site) for p in report.parts if p.own_factor]
    if not changed:
        return []
    error, own, site = max(changed, key=lambda each: each[0] / each[1])
    text = (
        f"{counted(len(changed), 'weight')} {agreeing(len(changed), 'shares', 'share')} the FP32 factor of what a "
        f"kernel fuses (q/k/v, gate/up): the error is up to {error:.2%} under it, {own:.2%} under a factor of its own"
    )
    return [Finding("note", text, (site,))]


def _notes(report: ScanReport) -> list[Finding]:
    notes = [*_of_experts(report)]
    if report.dynamics and (skipped := report.dynamics.skipped):
        text = f"layer {', '.join(map(str, skipped))}: not probed, no axes of its stream are texts and tokens"
        notes.append(Finding("note", text))
    if batch := batch_note(report.table.injection, *PHASES):
        notes.append(Finding("note", batch))
    notes += _of_shared_factors(report)
    short = tuple(dict.fromkeys(part.site for part in report.parts if part.short_block))
    if short:
        text = f"the block does not divide the width of {counted(len(short), 'site')}; the last block there is short"
        notes.append(Finding("note", text, short))
    if report.calibration and report.calibration["few"]:
        texts = counted(report.calibration["texts"], "calibration text")
        notes.append(Finding("note", f"only {texts}; use at least {ENOUGH_TEXTS}"))
    return notes
