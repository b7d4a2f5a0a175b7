"""The results of a scan, as one value with a stable JSON form (see docs/concepts/diagnosis.md)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import inf, log
from typing import Any

from fp4rl.diagnose.depth import LayerDepth
from fp4rl.diagnose.dynamics import Dynamics
from fp4rl.diagnose.expert_sensitivity import Expert, ExpertSensitivity
from fp4rl.diagnose.experts import ExpertError, unlike
from fp4rl.diagnose.precision import PartError
from fp4rl.diagnose.sensitivity import Sensitivity
from fp4rl.diagnose.suspects import Verdict
from fp4rl.inject.plan import SiteTable
from fp4rl.numerics.errors import ErrorSums, pooled

EXPERT_COLUMNS = ("experts", "expert", "tokens", "KL", "weights' error", "zeroed", "inputs' error", "zeroed")
SCHEMA = 2  # 1 called leave_one_in `alone` and leave_one_out `spared`; `compare` reads both


@dataclass(frozen=True)
class Distribution:
    """A histogram of one site's weight before and after rounding, bins in units of its root mean square."""

    site: str
    edges: tuple[float, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class ScanReport:
    """All results of a scan; what was not measured is None or empty. `limits`: other limits of fixed thresholds."""

    model: str
    table: SiteTable
    parts: tuple[PartError, ...] = ()
    tallies: Mapping[str, ErrorSums] | None = None
    calibration: Mapping[str, Any] | None = None
    sensitivity: Sensitivity | None = None
    depth: tuple[LayerDepth, ...] = ()
    dynamics: Dynamics | None = None
    verdict: Verdict | None = None
    ratios: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    distribution: Distribution | None = None
    limits: Mapping[str, float] = field(default_factory=dict)

    def expert_rows(self, most: int) -> list[tuple[str, ...]]:
        """Return the experts for a reader, under EXPERT_COLUMNS: first those unlike their stack, then by KL and error.

        A KL that is estimated has a `~` before it.
        """
        rows: dict[Expert, dict[str, ExpertError]] = {}
        effects = {(e.site, e.expert): e for e in (self.sensitivity.experts if self.sensitivity else ())}
        order = {expert: -number for number, expert in enumerate(effects)}
        rank: dict[Expert, tuple[float, float, float]] = {}
        for part in self.parts:
            strange = {e.expert: abs(log(max(times, 1e-9))) for e, times in unlike(part.experts)}
            for e in part.experts:
                key = part.site, e.expert
                rows.setdefault(key, {})[part.part] = e
                by_size, by_kl, error = rank.get(key, (0.0, order.get(key, -inf), 0.0))
                rank[key] = max(by_size, strange.get(e.expert, 0.0)), by_kl, max(error, e.relative_l2)
        named = sorted(rows, key=lambda key: rank[key], reverse=True) or list(effects)
        return [(site, str(e), *_cells(rows.get((site, e), {}), effects.get((site, e)))) for site, e in named[:most]]

    def severity(self, without: frozenset[str] = frozenset()) -> dict[int, float]:
        """Return layer -> the KL of its sites but those in `without`; without sensitivity, the mean squared excess."""
        by_layer: dict[int, list[float]] = {}
        if self.sensitivity is not None:
            for site in self.sensitivity.sites:
                if site.layer is not None:
                    by_layer.setdefault(site.layer, []).append(0.0 if site.name in without else site.kl)
            return {layer: sum(values) for layer, values in sorted(by_layer.items())}
        for part in self.parts:
            if part.layer is not None:
                by_layer.setdefault(part.layer, []).append(part.excess**2)
        return {layer: sum(values) / len(values) for layer, values in sorted(by_layer.items())}

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        injection = self.table.injection
        total = pooled(list(self.tallies.values())).measures() if self.tallies else None
        return {
            "schema": SCHEMA,
            "model": self.model,
            "injection": injection.model_dump(mode="json", exclude_defaults=True),
            "sites_digest": self.table.digest,
            "sites": len(self.table.plans),
            "calibration": self.calibration,
            "weights_together": total,
            "parts": [_part(part) for part in self.parts],
            "sensitivity": asdict(self.sensitivity) if self.sensitivity else None,
            "depth": [asdict(d) | {"predicted": d.predicted, "sqnr_db": _finite(d.sqnr_db)} for d in self.depth],
            "dynamics": self._dynamics(),
            "distribution": asdict(self.distribution) if self.distribution else None,
        }

    def _dynamics(self) -> dict[str, Any] | None:
        if self.dynamics is None or self.verdict is None:
            return None
        return {
            "tokens": self.dynamics.tokens,
            "skipped": list(self.dynamics.skipped),
            "layers": [{k: _finite(v) for k, v in asdict(layer).items()} for layer in self.dynamics.layers],
            "sites": {name: asdict(probe) for name, probe in self.dynamics.sites.items()},
            "suspects": [asdict(suspect) for suspect in self.verdict.suspects],
            "everywhere": list(self.verdict.everywhere),
            "ratios": {str(layer): dict(ratios) for layer, ratios in self.ratios.items()},
        }


def _part(part: PartError) -> dict[str, Any]:
    """Return one error for JSON; `own_factor` stands there where a factor is shared."""
    row = asdict(part) | {"excess": part.excess}
    return row if part.own_factor is not None else {key: value for key, value in row.items() if key != "own_factor"}


def _cells(errors: Mapping[str, ExpertError], effect: ExpertSensitivity | None) -> tuple[str, ...]:
    weight, inputs = errors.get("weight"), errors.get("input")
    each = [(f"{e.relative_l2:.1%}", f"{e.deadzone_share:.1%}") if e else ("-", "-") for e in (weight, inputs)]
    kl = "-" if effect is None else f"{'~' if effect.leave_one_in is None else ''}{effect.kl:.2g}"
    loaded = inputs or effect
    return (str(loaded.tokens) if loaded else "-", kl, *each[0], *each[1])


def _finite(value: float) -> float | None:
    """Return None for NaN and infinity, which JSON does not have."""
    return value if value == value and abs(value) != float("inf") else None
