"""Statistical power: the chance to detect a difference of a given size, and the seeds that it takes."""

import math

from scipy import special

from fp4rl.spec.errors import InvalidValueError

_MOST_SEEDS = 10_000


def power(seeds: int, difference: float, spread: float, *, alpha: float = 0.05, margin: float | None = None) -> float:
    """Compute the chance that a test with so many `seeds` in each arm detects a true `difference`.

    `difference`, `spread` (run-to-run standard deviation) and `margin` are in the same unit, points for accuracies.
    Without a margin: the two-sided t test. With one: the one-sided non-inferiority test of a treatment whose true
    difference is `difference` (0: it is as good). Noncentral t with 2 * (seeds - 1) degrees of freedom.
    Raises `InvalidValueError` for fewer than two seeds or a spread that is not positive.
    """
    if not spread > 0:
        raise InvalidValueError(f"the run-to-run spread is a positive number of points; got {spread:g}")
    if seeds < 2:
        raise InvalidValueError(f"power needs two seeds an arm; got {seeds}")
    freedom = 2.0 * (seeds - 1)
    shift = abs(difference) if margin is None else difference + margin
    noncentral = shift / (spread * math.sqrt(2 / seeds))
    tail = alpha / 2 if margin is None else alpha
    quantile = float(special.stdtrit(freedom, 1 - tail))
    seen = 1 - _below(quantile, freedom, noncentral)
    return seen + _below(-quantile, freedom, noncentral) if margin is None else seen


def _below(t: float, freedom: float, noncentral: float) -> float:
    """Return the probability that noncentral t is below `t`; 0 or 1 in the far tails, where scipy returns NaN."""
    chance = float(special.nctdtr(freedom, noncentral, t))
    return chance if math.isfinite(chance) else float(t > noncentral)


def difference_seen(seeds: int, spread: float, *, chance: float = 0.8, alpha: float = 0.05) -> float:
    """Return the smallest true difference, in the unit of `spread`, that so many seeds an arm detect with `chance`.

    Raises what `power` raises.
    """
    low, high = 0.0, spread
    while power(seeds, high, spread, alpha=alpha) < chance:
        high *= 2
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if power(seeds, middle, spread, alpha=alpha) >= chance else (middle, high)
    return high


def seeds_needed(
    difference: float, spread: float, *, chance: float = 0.8, alpha: float = 0.05, margin: float | None = None
) -> int:
    """Return the fewest seeds an arm that detect `difference` with probability `chance`; InvalidValueError if none."""
    if (abs(difference) if margin is None else difference + margin) <= 0:
        why = "a difference of 0 is never seen, and one at the margin never clears it"
        raise InvalidValueError(f"{why}; ask for a larger one")
    for seeds in range(2, _MOST_SEEDS):
        if power(seeds, difference, spread, alpha=alpha, margin=margin) >= chance:
            return seeds
    what = f"a difference of {difference} at a spread of {spread}"
    raise InvalidValueError(f"{_MOST_SEEDS} seeds an arm do not see {what}")
