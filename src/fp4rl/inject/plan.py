"""The result of resolving: a plan for each site, why every other site is left out, and a digest of it all."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from fp4rl.sites.walk import Site
from fp4rl.spec.formats import Format, describe
from fp4rl.spec.hardware import HardwareError
from fp4rl.spec.injection import Injection
from fp4rl.spec.points import FORMAT_POINTS, GRADIENTS, PHASES, Phase


@dataclass(frozen=True)
class SitePlan:
    """The formats of one site's points, None for a point that is not rounded, and its hardware errors.

    `merged` rounds the sum of base and adapters, `packed` keeps a frozen weight as codes, `note` is for a reader.
    """

    site: Site
    weight: Format | None = None
    input: Format | None = None
    output: Format | None = None
    kv_cache: Format | None = None
    grad_input: Format | None = None
    grad_weight: Format | None = None
    errors: tuple[HardwareError, ...] = ()
    merged: bool = False
    packed: bool = False
    note: str = ""

    @property
    def name(self) -> str:
        """The site's name."""
        return self.site.name

    def label(self, point: str) -> str:
        """Return how the evidence names the format of a point: the format's name, or the error's size."""
        if (fmt := getattr(self, point, None)) is not None:
            return str(fmt.name)
        error = next(error for error in self.errors if point.startswith(error.name))
        return f"{error.scale:g}"

    def points(self) -> tuple[str, ...]:
        """Return the points that have a format."""
        return tuple(point for point in FORMAT_POINTS if getattr(self, point) is not None)

    @property
    def acts(self) -> bool:
        """Whether anything is done here."""
        return bool(self.points() or self.errors)

    def row(self) -> dict[str, Any]:
        """Return the plan as plain values for JSON."""
        site = self.site
        row: dict[str, Any] = {"site": site.name, "kind": site.kind, "role": site.role, "layer": site.layer}
        row |= {"part": site.part, "shape": list(site.shape)} | {
            point: describe(getattr(self, point)) for point in self.points()
        }
        if self.errors:
            row["errors"] = [e.model_dump(mode="json", exclude={"targets"}, exclude_none=True) for e in self.errors]
        flags = {"merged": self.merged, "packed": self.packed, "note": self.note}
        return row | {key: value for key, value in flags.items() if value}


@dataclass(frozen=True)
class LeftOut:
    """A site that nothing is done to, and why."""

    site: Site
    reason: str

    def row(self) -> dict[str, Any]:
        """Return the site and the reason as plain values for JSON."""
        site = self.site
        row = {"site": site.name, "kind": site.kind, "part": site.part, "shape": list(site.shape)}
        return row | {"reason": self.reason}


@dataclass(frozen=True)
class SiteTable:
    """Everything that `attach` does to a model, as facts that can be printed and compared."""

    injection: Injection
    plans: tuple[SitePlan, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits that stand for the whole table: sites, formats, phases, what a gradient does."""
        injection = self.injection
        facts: dict[str, Any] = injection.model_dump(
            mode="json", include={"dtype", "straight_through", "seed", "schedule"}
        )
        if injection.straight_through == "smooth":
            facts["smooth"] = injection.smooth.model_dump(mode="json")
        return _digest({phase: self._active_rows(phase) for phase in PHASES} | facts)

    def digest_in(self, phase: Phase) -> str:
        """Return twelve hexadecimal digits of what acts in the forward of one phase: equal where results are equal."""
        return _digest({"plans": self._active_rows(phase, forward_only=True), "dtype": self.injection.dtype})

    def active_sites(self, phase: Phase) -> dict[str, int]:
        """Return what acts in a phase and at how many sites: points with a format, and hardware errors by name."""
        points = self.injection.apply_during.active(phase)
        counts: Counter[str] = Counter()
        for plan in self.plans:
            counts.update(point for point in plan.points() if point in points)
            counts.update(sorted({error.name for error in plan.errors} if "errors" in points else ()))
        return dict(counts)

    def rows(self) -> list[dict[str, Any]]:
        """Return the plans as plain values for JSON, in the order of the model."""
        return [plan.row() for plan in self.plans]

    def as_dict(self) -> dict[str, Any]:
        """Return the whole table as plain values: `digest`, `plans`, `left_out`."""
        return {
            "digest": self.digest,
            "plans": self.rows(),
            "left_out": [left.row() for left in self.left_out],
        }

    def _active_rows(self, phase: Phase, forward_only: bool = False) -> list[dict[str, Any]]:
        """Return the rows reduced to what acts in a phase, without the sites where nothing does."""
        points = self.injection.apply_during.active(phase) - (set(GRADIENTS) if forward_only else set())
        rows = []
        for plan in self.plans:
            row = plan.row()
            active = {key: row[key] for key in (*FORMAT_POINTS, "errors") if key in row and key in points}
            if active:
                rows.append({"site": plan.name, "shape": row["shape"], "merged": plan.merged} | active)
        return rows


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
