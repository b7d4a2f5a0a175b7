"""From findings to advice as spec objects: what to leave out, which formats, how much noise where, and why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal, get_args

import torch
from torch import nn

from fp4rl.diagnose.calibration import Calibration
from fp4rl.diagnose.findings import STANDS_OUT, layers_of, standing_out
from fp4rl.diagnose.formats_advice import Budget, FormatAdvice, Variant, advised_formats, fused_groups, weight_variants
from fp4rl.diagnose.report import ScanReport
from fp4rl.noise.schedule import multiplier_at
from fp4rl.spec.deployment import accepted
from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest
from fp4rl.spec.injection import Injection
from fp4rl.spec.noise import Factor, Multipliers, Zones
from fp4rl.spec.scan import NoiseRule, Piece
from fp4rl.spec.words import agreeing, counted

WORTH_SAYING = 0.01  # a variant that saves less than 1 % of the error is not recommended
NOISE_RULES: tuple[str, ...] = get_args(NoiseRule)  # two of them serve as controls
MOST_KL = 0.5  # share of the layers' summed KL from which on one layer is named
LEAST, MOST = 0.25, 4.0  # bounds of a multiplier, so that one layer cannot take all the noise
Strategy = Literal["no action", "mixed precision", "mixed precision and noise", "reconsider the format"]
_PIECES: dict[Strategy, tuple[Piece, ...]] = {
    "no action": (),
    "mixed precision": ("formats",),
    "mixed precision and noise": ("formats", "noise"),
    "reconsider the format": ("formats",),
}


@dataclass(frozen=True)
class Options:
    """Settings of the advice. `bits_per_weight` is the budget for mixed formats, `compute` of it by the time of
    matmuls; `bands` are shares of sites that stand out, from which on another strategy is advised."""

    noise_rule: NoiseRule = "proportional"
    bits_per_weight: float = 4.5
    compute: float = 0.5
    limit: float = STANDS_OUT
    bands: tuple[float, float] = (0.10, 0.30)


@dataclass(frozen=True)
class Advice:
    """A strategy in one line with its reasons, and the spec objects that put it into effect.

    `leave`: the sites whose rounding costs most, in whole fused groups. `formats`: the knapsack's choice. `variants`:
    other ways to round the same weights, the best first.
    """

    strategy: Strategy
    reasons: tuple[str, ...]
    scanned: Injection
    multipliers: Multipliers | None
    leave: tuple[str, ...]
    formats: FormatAdvice | None
    variants: tuple[Variant, ...]

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The pieces that the strategy puts into a fragment; for `no action` none, only the scanned injection."""
        return _PIECES[self.strategy]

    @property
    def variant(self) -> Variant | None:
        """The best other way to round the weights that the scanned deployment has; any one's where none is named."""
        deployment = self.scanned.deployment
        fitting = (v for v in self.variants if v.change < -WORTH_SAYING and accepted(v.format, deployment))
        return next(fitting, None)

    def held(self, pieces: Sequence[Piece] | None = None) -> tuple[Piece, ...]:
        """Return those of `pieces`, by default the strategy's own, that have any content."""
        reasons = {
            "formats": self.formats is not None and bool(self.formats.exceptions(self.scanned)),
            "noise": self.multipliers is not None,
            "leave": bool(self.leave),
            "weight_format": self.variant is not None,
        }
        return tuple(piece for piece in (self.pieces if pieces is None else pieces) if reasons[piece])

    def injection(self, pieces: Sequence[Piece] = ("formats",)) -> Injection:
        """Return the scanned injection with the advice of these `pieces` applied."""
        changes: dict[str, Any] = {}
        if "formats" in pieces and self.formats is not None:
            changes["by_pattern"] = self.formats.exceptions(self.scanned) + self.scanned.by_pattern
        if "leave" in pieces and self.leave:
            changes["targets"] = self.scanned.targets.leaving(self.leave)
        if "weight_format" in pieces and self.variant is not None:
            changes["weight"] = self.variant.format
        changed = self.scanned.model_copy(update=changes)
        return Injection.model_validate(changed.model_dump(mode="json"))  # as if read: the deployment's rules on all

    def fragment(self, pieces: Sequence[Piece] | None = None) -> dict[str, Any]:
        """Return the fragment for `fp4rl run spec.yaml +fragment.yaml`, by default of the strategy's own pieces."""
        pieces = self.pieces if pieces is None else pieces
        # Always with the mode: one that the spec names must not stay where other formats were scanned.
        injection = self.injection(pieces).model_dump(mode="json", exclude_defaults=True)
        content: dict[str, Any] = {"injection": {"mode": self.scanned.mode, **injection}}
        if "noise" in pieces and self.multipliers is not None:
            # All keys, and a list where there are no layers: mappings are merged, and factors of the spec would stay.
            factors = self.multipliers.model_dump()
            content["noise"] = {"multipliers": factors | {"by_layer": factors["by_layer"] or []}}
        return content


def advise(
    report: ScanReport, model: nn.Module, calibration: Calibration | None = None, options: Options | None = None
) -> Advice:
    """Derive advice from a report on `model`; formats need its sensitivity part and the calibration used for it."""
    options = options or Options()
    if not report.parts and report.sensitivity is None:
        raise InvalidValueError("nothing was measured, so nothing can be advised; scan with precision or sensitivity")
    out = standing_out(report, options.limit)
    share = len(out) / max(len(report.table.plans), 1)
    formats = None
    if calibration is not None and report.sensitivity is not None and report.table.injection.weight is not None:
        generator = torch.Generator().manual_seed(0)
        formats = advised_formats(
            model, report, calibration, Budget(options.bits_per_weight, options.compute), generator
        )
    variants = weight_variants(model, report.table)
    reasons = _reasons(report, out, share, formats, variants)
    plan = strategy(share, options.bands)
    wider: frozenset[str] = frozenset()  # the worst sites, which get a wider format and then need no noise
    if formats is not None and plan == "mixed precision and noise":
        wider = frozenset(entry.pattern for entry in formats.exceptions(report.table.injection))
    severity = report.severity(without=wider)
    noisy = layers_of(report, tuple(site for site in out if site not in wider))
    multipliers = noise_multipliers(options.noise_rule, severity, noisy) if severity else None
    if multipliers is not None:
        left = ", for the KL that the wider sites leave" if wider else ""
        reasons.append(_noise_in_words(options.noise_rule, multipliers, list(severity)) + left)
    return Advice(
        strategy=plan,
        reasons=tuple(reasons),
        scanned=report.table.injection,
        multipliers=multipliers,
        leave=_worst(report),
        formats=formats,
        variants=variants,
    )


def strategy(share_of_sites: float, bands: tuple[float, float]) -> Strategy:
    """Return the strategy by the share of sites that stand out relative to the format's ideal."""
    if share_of_sites == 0:
        return "no action"
    if share_of_sites <= bands[0]:
        return "mixed precision"
    return "mixed precision and noise" if share_of_sites <= bands[1] else "reconsider the format"


def _worst(report: ScanReport) -> tuple[str, ...]:
    """Return the tenth of the sites with the largest KL, and those fused with them; none without sensitivity."""
    if report.sensitivity is None or not report.sensitivity.sites:
        return ()
    ranked = sorted(report.sensitivity.sites, key=lambda site: -site.kl)
    worst = {site.name for site in ranked[: max(1, len(ranked) // 10)]}
    groups = fused_groups(report.table.plans).values()
    return tuple(site for group in groups if worst & set(group) for site in group)


def _reasons(
    report: ScanReport, out: tuple[str, ...], share: float, formats: FormatAdvice | None, variants: tuple[Variant, ...]
) -> list[str]:
    are = agreeing(len(out), "is", "are")
    reasons = [f"{len(out)} of {len(report.table.plans)} sites ({share:.0%}) {are} well above the format's ideal error"]
    if report.sensitivity is not None:
        reasons.append(f"rounding all of it costs {report.sensitivity.everything.kl:.4g} nats of KL per token")
        reasons += worst_layer(report)
    if formats is not None:
        now = sum(site.kl for site in report.sensitivity.sites) if report.sensitivity else 0.0
        wider = formats.wider(report.table.injection)
        sites = f"{counted(len(wider), 'site')} wider, {formats.bits_per_weight:.2f} bits a weight"
        if report.table.injection.input is not None:
            sites += f", matmuls {formats.slowdown:.2f} times as long ({formats.rates})"
        reasons.append(f"{sites}: the sum of the sites' KL falls from {now:.4g} to {formats.chosen.kl:.4g}")
        for pair in dict.fromkeys(wider.values()):
            own = [site for site, other in wider.items() if other == pair]
            reasons.append(f"{pair.name}: {', '.join(own[:6])}{f' and {len(own) - 6} more' if len(own) > 6 else ''}")
    deployment = report.table.injection.deployment
    hindrance = f"; deployment {deployment} does not round so" if deployment else "; no deployment rounds so"
    for variant in (variant for variant in variants if variant.change < -WORTH_SAYING):
        but = "" if accepted(variant.format, deployment) else hindrance
        reasons.append(f"{variant.name} would change the weights' error by {variant.change:+.1%}{but}")
    return reasons


def worst_layer(report: ScanReport) -> list[str]:
    """Return a line where one layer of several makes more than half of the sites' summed KL; else none."""
    severity = report.severity() if report.sensitivity is not None else {}
    total = sum(severity.values())
    if len(severity) < 2 or not total:
        return []
    worst = max(severity, key=lambda layer: severity[layer])
    share = severity[worst] / total
    return [f"layer {worst} makes {share:.0%} of the harm: of the sum of the sites' KL"] if share > MOST_KL else []


def _noise_in_words(rule: str, multipliers: Multipliers, layers: Sequence[int]) -> str:
    factors = {layer: multiplier_at(multipliers, layer, max(layers) + 1) for layer in layers}
    most, least = max(layers, key=lambda layer: factors[layer]), min(layers, key=lambda layer: factors[layer])
    if factors[most] == factors[least]:
        return f"noise by the rule {rule}: the same on every layer"
    return (
        f"noise by the rule {rule}: from {factors[least]:.2g} times sigma in layer {least} "
        f"to {factors[most]:.2g} times in layer {most}"
    )


def noise_multipliers(rule: NoiseRule, severity: Mapping[int, float], standing_out: frozenset[int]) -> Multipliers:
    """Return the multipliers of every layer from `severity`, layer -> KL or error, and those `standing_out`.

    global        1 everywhere, the final norm included
    targeted      1 on the layers that stand out (the worst fifth when none does), 0 elsewhere
    healthy_only  the control: exactly the other layers
    proportional  grows with the square root of the severity; root mean square 1
    inverse       falls with it; root mean square 1
    zones         one value for the layers at both ends and one for the middle, by their mean severity
    """
    if rule not in NOISE_RULES:
        raise NotFoundError(f"no noise rule is called {rule!r}{nearest(rule, NOISE_RULES)}")
    if rule == "global":
        return Multipliers()
    if not severity:
        raise InvalidValueError("no layer was measured, so no multiplier can be advised; scan precision or sensitivity")
    if rule in ("targeted", "healthy_only"):
        ranked = sorted(severity, key=lambda layer: -severity[layer])
        chosen = standing_out & set(severity) or set(ranked[: max(1, len(ranked) // 5)])
        wanted = chosen if rule == "targeted" else set(severity) - chosen
        return Multipliers(by_layer=tuple((layer, float(layer in wanted)) for layer in sorted(severity)), others=0.0)
    if rule == "zones":
        return Multipliers(zones=_zones(severity))
    power = 0.5 if rule == "proportional" else -0.5
    return Multipliers(by_layer=tuple(sorted(_scaled(severity, power).items())))


def _scaled(severity: Mapping[int, float], power: float) -> dict[int, float]:
    """Return severity ** power, scaled to root mean square 1 and then clamped to LEAST..MOST."""
    floor = max(max(severity.values()) * 1e-6, 1e-300)
    raw = {layer: max(value, floor) ** power for layer, value in severity.items()}
    scale = sqrt(sum(value * value for value in raw.values()) / len(raw))
    return {layer: round(min(MOST, max(LEAST, value / scale)), 4) for layer, value in raw.items()}


def _zones(severity: Mapping[int, float]) -> Zones:
    share = Zones().edge_share
    layers = sorted(severity)
    width = max(1, int(share * len(layers)))
    edge = [severity[layer] for layer in layers[:width] + layers[-width:]]
    middle = [severity[layer] for layer in layers[width:-width]] or edge
    means = {0: sum(edge) / len(edge), 1: sum(middle) / len(middle)}
    factors = _scaled(means, 0.5) if max(means.values()) > 0 else {0: 1.0, 1: 1.0}
    return Zones(edge_share=share, edge=Factor(value=factors[0]), middle=Factor(value=factors[1]))
