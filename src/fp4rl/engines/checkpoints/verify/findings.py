"""What a verification found: for each check what was compared, and everything that differs."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """`what` differs, a tensor, a file or a problem, and how. `first` is the position of its first wrong value."""

    what: str
    how: str
    first: tuple[int, ...] | None = None
    here: float | None = None
    expected: float | None = None

    @property
    def line(self) -> str:
        """The difference as one line."""
        if self.first is None:
            return f"{self.what}: {self.how}"
        return f"{self.what}: {self.how}; first {list(self.first)}: {self.here:.9g}, in the policy {self.expected:.9g}"


@dataclass
class Check:
    """One kind of comparison: how many of what were compared, how many differ, each difference, what was left out."""

    name: str
    compared: Counter[str] = field(default_factory=Counter)
    differing: Counter[str] = field(default_factory=Counter)
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def count(self, **compared: int) -> None:
        """Add to what was compared."""
        self.compared.update(compared)

    def differs(self, what: str, how: str, /, **differing: int) -> None:
        """Add a difference that is no matter of values."""
        self.differing.update(differing)
        self.differences.append(Difference(what, how))

    def compare(self, name: str, here: Tensor, expected: Tensor) -> Tensor | None:
        """Compare a tensor bit by bit; return where it differs, None where it is equal. `explain` adds the difference.

        Values are compared in FP32, which holds those of all narrower types exactly.
        """
        self.count(tensors=1, values=expected.numel())
        if here.shape != expected.shape:
            how = f"its shape is {list(here.shape)}, in the policy {list(expected.shape)}"
            self.differs(name, how, tensors=1, values=expected.numel())
            return None
        wrong = _bits(here) != _bits(expected)
        return wrong if bool(wrong.any()) else None

    def explain(self, name: str, here: Tensor, expected: Tensor, wrong: Tensor, why: str) -> None:
        """Add the difference that `compare` found; `why` says what may have caused it, or nothing."""
        count = int(wrong.sum())
        self.differing.update(tensors=1, values=count)
        first = tuple(int(i) for i in wrong.nonzero()[0])
        how = f"{count:,} of {wrong.numel():,} values differ" + (f" ({why})" if why else "")
        self.differences.append(Difference(name, how, first, float(here[first]), float(expected[first])))

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    def as_json(self) -> dict[str, Any]:
        """Return the check as plain values."""
        differences = [
            {key: value for key, value in vars(each).items() if value is not None} for each in self.differences
        ]
        return {
            "check": self.name,
            "compared": dict(self.compared),
            "differing": {unit: self.differing[unit] for unit in self.compared},
            "differences": differences,
            "notes": self.notes,
        }


@dataclass(frozen=True)
class Verified:
    """All checks of a folder. `against` is what it was compared with, None where that is not known or not here."""

    folder: str
    layout: str
    against: str | None
    injection: Mapping[str, Any] | None
    checks: tuple[Check, ...]

    @property
    def differences(self) -> list[Difference]:
        """The differences of all checks."""
        return [difference for check in self.checks for difference in check.differences]

    @property
    def nothing_compared(self) -> bool:
        """Whether no value was held against anything, so that nothing is known of them."""
        return self.against is None and not self.differences

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values; `equal` is None where nothing was compared."""
        return {
            "folder": self.folder,
            "layout": self.layout,
            "against": self.against,
            "injection": self.injection,
            "equal": None if self.nothing_compared else not self.differences,
            "checks": [check.as_json() for check in self.checks],
        }


def _bits(values: Tensor) -> Tensor:
    if not values.is_floating_point():
        return values
    return values.double().view(torch.int64) if values.dtype == torch.float64 else values.float().view(torch.int32)
