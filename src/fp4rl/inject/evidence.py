"""Evidence of what injection did: calls, elements and sampled errors by phase and site, and a digest of the masters."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fp4rl.spec.evidence import Injected
from fp4rl.spec.points import Phase
from fp4rl.spec.words import counted

SAMPLE = 4096  # values compared per look
LOOK_INTERVAL = 256  # looks are at calls 1, 2, 4, 8, ..., from there on at one call in this many


@dataclass
class Meter:
    """What one point of one site did in one phase. Statistics are of a sample of values at a few calls ("looks").

    `missed` counts the looks at which a tensor came out unchanged although rounding would change it: a call alone is no
    proof of rounding. Values on the grid, above all zeros, rightly stay unchanged.
    """

    calls: int = 0
    elements: int = 0
    looks: int = 0
    missed: int = 0
    _next_look: int = 1
    _seen: int = 0
    _changed: int = 0
    _error: float = 0.0
    _power: float = 0.0

    def due(self, calls: int) -> bool:
        """Return whether there is a look at call number `calls`, counted from 1."""
        return calls >= self._next_look

    def look(self, calls: int, before: Tensor, after: Tensor, would_change: Callable[[], bool]) -> None:
        """Compare a tensor before and after rounding, of the same shape: a sample, or all if the sample is unchanged.

        `would_change` tells whether rounding `before` again changes anything; it is called where nothing changed.
        """
        self._next_look = calls + min(calls, LOOK_INTERVAL)
        old, new = _sample(before), _sample(after)
        if torch.equal(old, new):
            if torch.equal(before, after):
                self.missed += would_change()
            else:
                old, new = before.detach().reshape(-1).double(), after.detach().reshape(-1).double()
        self.looks += 1
        self._seen += old.numel()
        self._changed += int((new != old).sum())
        self._error += float((new - old).square().sum())
        self._power += float(old.square().sum())

    def add(self, other: "Meter") -> None:
        """Add what another meter counted, in another process, besides its calls."""
        for name in ("elements", "looks", "missed", "_seen", "_changed", "_error", "_power"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def share_changed(self) -> float | None:
        """Share of the sampled values that rounding changed; None before the first look."""
        return self._changed / self._seen if self._seen else None

    @property
    def relative_error(self) -> float | None:
        """|Q(x) - x| / |x| over the sampled values, in the L2 norm; None where all of them are zero."""
        return (self._error / self._power) ** 0.5 if self._power else None

    def row(self, phase: Phase, site: str, point: str, fmt: str) -> Injected:
        """Return the counters as a line of evidence."""
        return Injected(
            phase=phase,
            site=site,
            point=point,
            format=fmt,
            calls=self.calls,
            elements=self.elements,
            share_changed=self.share_changed,
            relative_error=self.relative_error,
            looks=self.looks,
            missed=self.missed,
        )


def _sample(x: Tensor) -> Tensor:
    flat = x.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE].double()


def _stored(model: nn.Module, name: str, parameter: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors that hold a parameter's values: itself, or codes and scales of a packed weight."""
    if not parameter.is_meta:
        return (parameter,)
    path, _, own = name.rpartition(".")
    state: Any = model.get_submodule(path).__dict__.get("injected")
    return () if state is None else tuple(getattr(state, "stacks", {own: state})[own].tensors)


def master_digest(model: nn.Module) -> str:
    """Return twelve hexadecimal digits over every parameter's name, dtype, shape and bits (of this process's shard)."""
    total = hashlib.blake2b(digest_size=6)
    for name, parameter in sorted(model.named_parameters(), key=lambda pair: pair[0]):
        local = getattr(parameter, "to_local", parameter.detach)().detach()
        total.update(f"{name}{local.dtype}{tuple(local.shape)}".encode())
        for tensor in _stored(model, name, local):
            total.update(tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
    return total.hexdigest()


def table_of(rows: Iterable[Injected]) -> list[str]:
    """Return a table, a line per phase and point: sites, calls, elements, and means over sites of what was measured."""
    groups: dict[tuple[str, str, str], list[Injected]] = defaultdict(list)
    for row in rows:
        groups[row.phase, row.point, str(row.format)].append(row)
    lines = [(*key, *_counts(group)) for key, group in groups.items()]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    # Words (phase, point, format) to the left, counts to the right.
    return [
        "  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]


def _counts(rows: list[Injected]) -> tuple[str, ...]:
    return (
        counted(len(rows), "site"),
        counted(sum(row.calls for row in rows), "call"),
        counted(sum(row.elements for row in rows), "value"),
        f"{_mean(row.share_changed for row in rows)} changed",
        f"{_mean(row.relative_error for row in rows)} error",
    )


def _mean(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.2%}" if known else "-"
