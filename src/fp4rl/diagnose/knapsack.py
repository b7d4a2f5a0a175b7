"""Choose one format per group of sites: the least KL under a budget of bits, by dynamic programming.

Not by `scipy.optimize.milp`: its solver prints a line of its own on standard output now and then, amid a JSON document.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fp4rl.spec.errors import InvalidValueError

BUCKETS = 1 << 16  # steps of the budget; costs are rounded up to whole steps, so that the budget is never passed


@dataclass(frozen=True)
class Choice:
    """A format for one group: what it costs in bits, and the KL that remains, in nats per token."""

    format: str
    bits: float
    kl: float


@dataclass(frozen=True)
class Chosen:
    """One choice per group, with their sums."""

    choices: Mapping[str, Choice]
    bits: float
    kl: float


def knapsack(groups: Mapping[str, Sequence[Choice]], budget_bits: float) -> Chosen:
    """Take one choice from every group so that the bits fit `budget_bits` and the sum of the KLs is least.

    Raises InvalidValueError when even the cheapest choices do not fit, naming what would.
    """
    floors = [min(choice.bits for choice in choices) for choices in groups.values()]
    spare = budget_bits - sum(floors)
    if spare < -1e-9 * budget_bits:
        raise InvalidValueError(
            f"the cheapest formats need {sum(floors):.6g} bits, but the budget is {budget_bits:.6g}; raise it"
        )
    step = max(spare, 1e-9 * budget_bits) / BUCKETS
    best = np.zeros(BUCKETS + 1)  # least KL of the groups so far, by the steps that they may take
    picks = []
    for choices, floor in zip(groups.values(), floors, strict=True):
        options = np.full((len(choices), BUCKETS + 1), np.inf)
        costs = [int(np.ceil((choice.bits - floor) / step - 1e-9)) for choice in choices]
        for row, choice, cost in zip(options, choices, costs, strict=True):
            row[cost:] = best[: max(BUCKETS + 1 - cost, 0)] + choice.kl
        best = options.min(0)
        picks.append((options.argmin(0).astype(np.int8), costs))
    at, chosen = int(best.argmin()), dict[str, Choice]()
    for name, (pick, costs) in zip(reversed(list(groups)), reversed(picks), strict=True):
        chosen[name] = groups[name][pick[at]]
        at -= costs[pick[at]]
    ordered = {name: chosen[name] for name in groups}
    return Chosen(ordered, sum(c.bits for c in ordered.values()), sum(c.kl for c in ordered.values()))
