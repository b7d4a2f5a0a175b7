"""Pictures made of characters: a curve on a logarithmic axis, and a strip with one shaded cell per layer."""

import math
from collections.abc import Sequence
from itertools import pairwise

from rich.text import Text

_EIGHTHS = " ▁▂▃▄▅▆▇█"
# Light to dark for a growing value; the digit inside a cell keeps it readable without colour.
_HEAT = ("grey93", "light_goldenrod2", "orange1", "dark_orange3", "red3")


def log_curve(values: Sequence[float], width: int, height: int = 8) -> list[str]:
    """Lines from top to bottom over an axis of steps. Each column shows the largest of the values that fall on it.

    Zeros stay empty; the smallest value fills the lowest row, so that its bar cannot be taken for the axis.
    """
    columns = _binned(values, min(width, len(values)))
    widen = max(1, width // max(1, len(columns)))
    positive = [v for v in columns if v > 0]
    if not positive:
        return ["(silent at every step)"]
    top, low = math.log10(max(positive)), math.log10(min(positive))
    rows = height if top > low else 1
    span = max(top - low, 1e-9)
    levels = [0.0 if v <= 0 else 8 + (math.log10(v) - low) / span * (rows - 1) * 8 for v in columns]
    lines = []
    for row in range(rows - 1, -1, -1):
        cells = (_EIGHTHS[max(0, min(8, round(level - 8 * row)))] for level in levels)
        label = _label(row, rows, max(positive), min(positive))
        lines.append(f"{label:>9} │" + "".join(cell * widen for cell in cells).rstrip())
    long = len(columns) * widen
    return [*lines, f"{'':>9} └{'─' * long}", f"{'step':>9}  0{len(values) - 1:>{max(1, long - 1)}}"]


def heat_strip(values: Sequence[float | None], low: float, high: float) -> Text:
    """One cell a value: darker and a higher digit (0-9) for a greater share of the way from `low` to `high`."""
    strip = Text()
    for value in values:
        if value is None or math.isnan(value):
            strip.append("·")
            continue
        share = 0.0 if high <= low else min(1.0, max(0.0, (value - low) / (high - low)))
        colour = _HEAT[min(len(_HEAT) - 1, int(share * len(_HEAT)))]
        strip.append(str(min(9, int(share * 10))), style=f"black on {colour}")
    return strip


def _binned(values: Sequence[float], columns: int) -> list[float]:
    edges = [i * len(values) // columns for i in range(columns + 1)]
    return [max(values[a:b]) for a, b in pairwise(edges) if b > a]


def _label(row: int, height: int, top: float, low: float) -> str:
    if row == height - 1:
        return f"{top:.3g}"
    return f"{low:.3g}" if row == 0 else ""
