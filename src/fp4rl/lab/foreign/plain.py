"""Plain text and plain numbers, however a trainer and its console wrote them down."""

import codecs
import re
from collections.abc import Iterator, Mapping
from typing import Any

# CSI sequences (colours, cursor), OSC sequences (titles, links), and two-character escapes: ECMA-48.
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-Z\\-_]")
_WORKER = re.compile(r"\([A-Za-z_][\w.:]*(?: [\w.]+=[^\s,)]+,?)*\s?pid=\d+(?:, ip=[^)\s]+)?\)\s?")
_REPEATED = re.compile(r"\[repeated \d+x across cluster\].*$")

# A Python number, or as NumPy 2 and torch print one: `np.float64(0.5)`, `tensor(0.5, device='cuda:0')`.
_NUMBER = re.compile(
    r"(?:(?:np|numpy)\.\w+\(|tensor\()?"
    r"([-+]?(?:(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e[-+]?[0-9]+)?|nan|inf(?:inity)?))(?:,[^)]*)?\)?",
    re.IGNORECASE,
)
# First name found wins. `global_step/max_steps` is ms-swift's ("3/609"), `current_steps` LLaMA-Factory's,
# `_step` that of W&B.
STEP_NAMES = (
    *("step", "global_step", "train/global_step", "training/global_step", "trainer/global_step"),
    *("global_step/max_steps", "current_steps", "iteration", "_step"),
)
_STEP = re.compile(r"([0-9]{1,18})(?:\.0*)?(?:/[0-9]+)?")
_HIGHEST_STEP = 2**31 - 1  # what the ledger's column holds


def text_of(data: bytes) -> str:
    """The text of a log: UTF-8, or UTF-16 as PowerShell redirects it. Bytes that are neither become U+FFFD.

    NUL bytes are what a machine that lost power leaves in a file; they are taken out.
    """
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and b"\0" in data[:64]
    text = data.decode("utf-16" if utf16 else "utf-8", errors="replace")
    return text.removeprefix("\ufeff").replace("\0", "")


def plain_lines(data: bytes) -> Iterator[str]:
    """Every piece between newlines, carriage returns and Ray's `(Worker pid=1, ip=...)` prefixes.

    Bytes that are no UTF-8 become U+FFFD, so that one of them never loses the line it stands in.
    """
    text = _ESCAPES.sub("", text_of(data))
    for line in re.split(r"[\r\n]+", text):
        for piece in _WORKER.split(line):
            if piece.strip():
                yield _REPEATED.sub("", piece).rstrip()


def number(value: Any) -> float | None:
    """The value as a float; an integer too large for one becomes infinite, what is no number None."""
    if isinstance(value, int | float):
        try:
            return float(value)
        except OverflowError:
            return float("inf") if value > 0 else float("-inf")
    match = _NUMBER.fullmatch(value.strip()) if isinstance(value, str) else None
    return float(match[1]) if match else None


def step_name(names: Mapping[str, Any]) -> str | None:
    """Which entry of a record, or column of a table, names the step."""
    known = {name.strip().lower(): name for name in reversed(list(names))}
    return next((known[name] for name in STEP_NAMES if name in known), None)


def step_of(value: Any) -> int | None:
    """The step that a value names: 3, 3.0, "3" or "3/609"; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    match = _STEP.fullmatch(str(value).strip())
    return int(match[1]) if match and int(match[1]) <= _HIGHEST_STEP else None


def readable(name: Any) -> str:
    """A name that can be printed and stored: lone surrogates and control characters become U+FFFD."""
    text = str(name).encode("utf-8", errors="replace").decode("utf-8")
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "\ufffd", text)
