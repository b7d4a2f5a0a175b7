"""Compare two scans or two checkpoints; identical ones are flagged: that is how an adapter not loaded looks."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from fp4rl.models.packed.folder import checkpoint_tensors
from fp4rl.models.packed.weight import Stored
from fp4rl.spec.errors import CheckFailed, InvalidValueError

_ROWS = 1024
_TOGETHER = {"sqnr_db": "SQNR, dB", "relative_l1": "sum|e|/sum|w|", "deadzone_share": "became zero, share"}


@dataclass(frozen=True)
class TensorDelta:
    """|b - a| / |a| of one tensor in the L2 norm, and the share of its values that differ."""

    name: str
    relative: float
    share_changed: float


@dataclass(frozen=True)
class CheckpointDelta:
    """The difference of two checkpoints: tensors that both have, and names that only one has."""

    tensors: tuple[TensorDelta, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    @property
    def identical(self) -> bool:
        """Whether every value of every tensor is the same."""
        return not self.only_a and not self.only_b and all(delta.share_changed == 0 for delta in self.tensors)


@dataclass(frozen=True)
class MeasureChange:
    """One measure of one site and part in two scans."""

    site: str
    part: str
    measure: str
    a: float
    b: float


@dataclass(frozen=True)
class Total:
    """One figure of a whole scan, side by side with another's."""

    name: str
    a: float
    b: float


def compare_checkpoints(a: str | Path, b: str | Path) -> CheckpointDelta:
    """Compare two checkpoint folders, a few rows at a time. Raises NotFoundError for a folder without weights."""
    left, right = (
        {name: tensor for name, tensor in checkpoint_tensors(folder).items() if tensor.dtype.is_floating_point}
        for folder in (a, b)
    )
    both = [name for name in left if name in right]
    deltas = [_delta(left[name], right[name]) for name in both]
    return CheckpointDelta(tuple(deltas), tuple(sorted(set(left) - set(right))), tuple(sorted(set(right) - set(left))))


def compare_scans(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[MeasureChange, ...]:
    """Return the measures that two JSON scans share, in the order of `a`. Raises InvalidValueError without any."""
    theirs = {(part["site"], part["part"]): part["measures"] for part in b["parts"]}
    rows = [
        MeasureChange(part["site"], part["part"], measure, value, theirs[part["site"], part["part"]][measure])
        for part in a["parts"]
        for measure, value in part["measures"].items()
        if measure in theirs.get((part["site"], part["part"]), {})
    ]
    if not rows:
        raise InvalidValueError("the two scans share no site and measure; scan both models in the same mode and format")
    return tuple(rows)


def totals(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[Total, ...]:
    """Return the totals that two JSON scans share: all weights together, the KL of all sites, and of each layer."""
    ours, theirs = _totals(a), _totals(b)
    return tuple(Total(name, value, theirs[name]) for name, value in ours.items() if name in theirs)


def require_difference(identical: bool, what: str) -> None:
    """Raise CheckFailed for two identical ones (an adapter that was not loaded)."""
    if identical:
        raise CheckFailed(f"{what} are identical to the last bit: adapters not loaded, or the wrong folder?")


def _totals(scan: Mapping[str, Any]) -> dict[str, float]:
    together, sensitivity = scan.get("weights_together"), scan.get("sensitivity")
    figures = {f"weights: {word}": together[key] for key, word in _TOGETHER.items()} if together else {}
    if sensitivity:
        everything = sensitivity["everything"]
        figures |= {"KL of everything, nats": everything["kl"], "loss change": everything["loss_change"]}
        for site in sensitivity["sites"]:
            if site["layer"] is not None:
                name = f"KL of layer {site['layer']}'s sites, nats"
                measured = site.get("leave_one_in", site.get("alone"))  # schema 1 called it `alone`
                figures[name] = figures.get(name, 0.0) + (measured["kl"] if measured else site["estimate"] or 0.0)
    return figures


def _delta(a: Stored, b: Stored) -> TensorDelta:
    if a.shape != b.shape:
        raise InvalidValueError(f"{a.name} is {list(a.shape)} in one checkpoint and {list(b.shape)} in the other")
    error = power = changed = 0.0
    for ours, theirs in zip(a.rows(_ROWS), b.rows(_ROWS), strict=True):
        x, y = ours.double(), theirs.double()
        error += float((y - x).square().sum())
        power += float(x.square().sum())
        changed += float((y != x).sum())
    relative = sqrt(error / power) if power else float(error > 0)
    return TensorDelta(a.name, relative, changed / max(a.elements, 1))
