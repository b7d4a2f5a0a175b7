"""Reads the texts of a file that a scan is calibrated on, before anything heavy is loaded."""

import math
from pathlib import Path

from fp4rl.spec.errors import InvalidValueError, NotFoundError

ENOUGH_TEXTS = 32


def texts_of(file: Path) -> list[str]:
    """Return the lines of a text file, or 32 pieces if it has fewer; NotFoundError, or InvalidValueError if empty."""
    if not file.is_file():
        raise NotFoundError(f"{file}: no such file; give a text file to calibrate on")
    text = file.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise InvalidValueError(f"{file}: empty; a calibration text needs some lines")
    if len(lines) >= ENOUGH_TEXTS:
        return lines
    words = text.split()
    size = math.ceil(len(words) / ENOUGH_TEXTS)
    return [" ".join(words[i : i + size]) for i in range(0, len(words), size)]
