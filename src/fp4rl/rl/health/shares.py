"""How much one logged number can be trusted: how many answers and groups it was taken over."""

from collections.abc import Sequence

# Answers to one prompt are alike, for prompts differ in difficulty: a correlation of a half is assumed.
_ALIKE = 0.5
_USUAL_GROUP = 8
_LARGEST_GRAIN = 64
_ENOUGH = 8
_DIFFERENT = 4
_ROUNDING = 1e-4


def grain(values: Sequence[float]) -> int | None:
    """The fewest cases that such shares can have been taken over: every value is a whole multiple of 1 / n.

    None where no n up to 64 fits, where values lie outside 0..1, and where too few different ones were seen to say.
    """
    if len(values) < _ENOUGH or not all(0 <= value <= 1 for value in values):
        return None
    distinct = {round(value, 6) for value in values[-200:]}
    sizes = range(1, _LARGEST_GRAIN + 1)
    cases = next((n for n in sizes if all(abs(v * n - round(v * n)) < n * _ROUNDING for v in distinct)), None)
    return cases if cases is not None and len(distinct) >= max(2, min(cases, _DIFFERENT)) else None


def independent(answers: float, groups: float | None) -> float:
    """How many independent answers are worth as much as `answers` in `groups` of one prompt each."""
    groups = groups or max(1.0, answers / _USUAL_GROUP)
    return answers / (1 + _ALIKE * max(answers / groups - 1, 0.0))


def sampling_error(share: float, cases: float) -> float:
    """Standard deviation of a share over independent cases; never quite 0, for nothing is certain after few cases."""
    share = min(max(share, 1 / (cases + 2)), 1 - 1 / (cases + 2))
    return float((share * (1 - share) / cases) ** 0.5)
