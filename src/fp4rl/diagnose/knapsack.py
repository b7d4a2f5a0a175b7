"""Choosing one format per group of sites: least harm under a budget of bits, exactly, by dynamic programming."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fp4rl.spec.errors import InvalidValueError

BUCKETS = 4096  # the budget in this many steps; costs are rounded up, so that it is never passed


@dataclass(frozen=True)
class Choice:
    """A format for one group: what it costs in bits, and the harm that remains (KL, nats per token)."""

    format: str
    bits: float
    harm: float


@dataclass(frozen=True)
class Chosen:
    """One choice per group, with their sums."""

    choices: Mapping[str, Choice]
    bits: float
    harm: float


def knapsack(groups: Mapping[str, Sequence[Choice]], budget_bits: float) -> Chosen:
    """One choice from every group so that the bits fit `budget_bits` and the harm is least (harms are taken to add).

    Raises InvalidValueError when even the cheapest choices do not fit, naming what would.
    """
    cheapest = {name: min(choices, key=lambda c: (c.bits, c.harm)) for name, choices in groups.items()}
    floor = sum(choice.bits for choice in cheapest.values())
    if floor > budget_bits * (1 + 1e-9):
        raise InvalidValueError(
            f"the cheapest formats need {floor:.6g} bits, but the budget is {budget_bits:.6g}; raise it"
        )
    spare = max(budget_bits - floor, 0.0)
    steps = {
        name: [_steps(choice.bits - cheapest[name].bits, spare) for choice in choices]
        for name, choices in groups.items()
    }
    best = np.zeros(BUCKETS + 1)
    picks: list[np.ndarray] = []
    for name, choices in groups.items():
        best, pick = _add_group(best, [c.harm for c in choices], steps[name])
        picks.append(pick)
    at, chosen = int(np.argmin(best)), dict[str, Choice]()
    for name, pick in zip(reversed(list(groups)), reversed(picks), strict=True):
        index = int(pick[at])
        chosen[name] = groups[name][index]
        at -= steps[name][index]
    ordered = {name: chosen[name] for name in groups}
    return Chosen(ordered, sum(c.bits for c in ordered.values()), sum(c.harm for c in ordered.values()))


def _steps(extra: float, spare: float) -> int:
    if extra <= 0:
        return 0
    return int(np.ceil(extra / spare * BUCKETS - 1e-9)) if spare > 0 else BUCKETS + 1


def _add_group(best: np.ndarray, harms: Sequence[float], steps: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Least harm for every amount spent up to each bucket, with one more group; and which choice gave it."""
    options = np.full((len(harms), len(best)), np.inf)
    for row, (harm, step) in enumerate(zip(harms, steps, strict=True)):
        if step < len(best):
            options[row, step:] = best[: len(best) - step] + harm
    pick = options.argmin(0)
    return options.min(0), pick
