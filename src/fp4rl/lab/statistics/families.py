"""Several comparisons at once: p-values corrected for how many are shown."""

from collections.abc import Hashable, Mapping, Sequence


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction, in the order given: reject where the result is at most the level.

    Source: S. Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    return list(holm_grouped({(index,): p for index, p in enumerate(p_values)}).values())


def holm_grouped(p_values: Mapping[tuple[Hashable, ...], float]) -> dict[tuple[Hashable, ...], float]:
    """Holm over hypotheses keyed (comparison, question), where at most one question of a comparison can be null.

    'No difference' and 'worse by the margin' cannot both be true, so each step divides by the number of *comparisons*
    that still have an open hypothesis, not by the number of hypotheses (Shaffer, JASA 81 (1986), logically related
    hypotheses). With one question each this is exactly Holm's correction.
    """
    corrected: dict[tuple[Hashable, ...], float] = {}
    open_keys = sorted(p_values, key=lambda key: p_values[key])
    floor = 0.0
    while open_keys:
        comparisons = len({key[0] for key in open_keys})
        key = open_keys.pop(0)
        floor = max(floor, min(1.0, p_values[key] * comparisons))
        corrected[key] = floor
    return {key: corrected[key] for key in p_values}
