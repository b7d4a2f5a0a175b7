"""The contents of a log, as names and numbers joined by step; a step can take several lines, and can come again."""

import codecs
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
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
    """Return the text of a log: UTF-8, or UTF-16 as PowerShell redirects it. Bytes that are neither become U+FFFD.

    NUL bytes, which a loss of power leaves in a file, are removed.
    """
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and b"\0" in data[:64]
    text = data.decode("utf-16" if utf16 else "utf-8", errors="replace")
    return text.removeprefix("\ufeff").replace("\0", "")


def plain_lines(data: bytes) -> Iterator[str]:
    """Yield the lines, split at newlines, carriage returns and Ray's `(Worker pid=1, ip=...)` prefixes.

    Invalid UTF-8 becomes U+FFFD, so that a bad byte does not lose its whole line.
    """
    text = _ESCAPES.sub("", text_of(data))
    for line in re.split(r"[\r\n]+", text):
        for piece in _WORKER.split(line):
            if piece.strip():
                yield _REPEATED.sub("", piece).rstrip()


def number(value: Any) -> float | None:
    """Return the value as a float; an integer too large for one becomes infinite; None if it is no number."""
    if isinstance(value, int | float):
        try:
            return float(value)
        except OverflowError:
            return float("inf") if value > 0 else float("-inf")
    match = _NUMBER.fullmatch(value.strip()) if isinstance(value, str) else None
    return float(match[1]) if match else None


def step_name(names: Mapping[str, Any]) -> str | None:
    """Return the entry of a record, or the column of a table, that holds the step."""
    known = {name.strip().lower(): name for name in reversed(list(names))}
    return next((known[name] for name in STEP_NAMES if name in known), None)


def step_of(value: Any) -> int | None:
    """Return the step in a value: 3, 3.0, "3" or "3/609"; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    match = _STEP.fullmatch(str(value).strip())
    return int(match[1]) if match and int(match[1]) <= _HIGHEST_STEP else None


def readable(name: Any) -> str:
    """Return a name that can be printed and stored: lone surrogates and control characters become U+FFFD."""
    text = str(name).encode("utf-8", errors="replace").decode("utf-8")
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "\ufffd", text)


@dataclass
class Joined:
    """Step -> name -> value, and a record of all that could not be imported (nothing is dropped silently).

    A trainer that restarts from a checkpoint goes back to an earlier step. The later attempt counts: what the earlier
    one logged from there on belongs to a policy that no longer exists.
    """

    steps: dict[int, dict[str, float]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)  # entries that are not numbers
    went_back: list[tuple[int, int]] = field(default_factory=list)  # (step reached, step restarted at)
    met_twice: int = 0  # numbers that came again; the later one counts
    counted: bool = False  # the log has no steps: its lines are numbered
    _top: int = -1  # the highest step
    _last: int = -1  # the step of the previous line
    _turn: int = -1  # the step that lines last went back to; repeated equal numbers do not show a new attempt yet
    _gone: dict[int, set[str]] = field(default_factory=dict)  # names of earlier attempts that did not come again

    def row(self, step: int, values: Mapping[str, Any]) -> None:
        """Add one line about `step`; values that are not numbers are listed in `skipped`."""
        new = self._numbers(step, values)
        if not new:
            return
        known = self.steps.setdefault(step, {})
        common = known.keys() & new.keys()
        differ = {name for name in common if not _same(known[name], new[name])}
        back = step < self._top
        self._turn = step if step < self._last else self._turn
        self._last = step
        # Most values of a line can be constant (a ratio of 0, the learning rate). But a line whose names its step does
        # not have yet is a second pass over the same attempt: a table in long form, or another writer.
        if back and differ and (2 * len(differ) >= len(new) or 10 * len(common) >= 9 * len(new)):
            self._forget(step + 1, back_to=self._turn)
            if 2 * len(common) >= len(known):  # else it is the validation before the new attempt's first step
                self._drop(step, known.keys() - new.keys())
        self.met_twice += len(common if back else differ) + len(self._gone.get(step, set()) & new.keys())
        if step in self._gone:
            self._gone[step] -= new.keys()
        known |= new
        self._top = max(self._top, step)

    def restarted(self, step: int) -> None:
        """Drop everything from `step` on, where the writer itself reports that it restarts there."""
        if step <= self._top:
            self._forget(step, back_to=step)

    @property
    def left_behind(self) -> int:
        """The count of numbers of an earlier attempt that the later one did not reach."""
        return sum(len(names) for names in self._gone.values())

    @property
    def names(self) -> list[str]:
        """All names that occur in any step."""
        return sorted({name for values in self.steps.values() for name in values})

    def in_order(self) -> dict[int, dict[str, float]]:
        """Return step -> name -> value, sorted by step."""
        return dict(sorted(self.steps.items()))

    def remarks(self) -> list[str]:
        """Return sentences on how the numbers were joined."""
        lines = ["the log names no steps: its lines are numbered"] if self.counted else []
        if self.went_back:
            times = "once," if len(self.went_back) == 1 else f"{len(self.went_back)} times, first"
            top, back = self.went_back[0]
            lines.append(f"the steps go back {times} from {top} to {back}: the later attempt counts")
        if self.met_twice:
            lines.append(f"{_count(self.met_twice)} met twice: the later one counts")
        if self.left_behind:
            lines.append(f"{_count(self.left_behind)} of an earlier attempt left out: the later one has none there")
        if self.skipped:
            lines.append(f"{len(self.skipped)} no number: {'; '.join(self.skipped[:3])}")
        return lines

    def _numbers(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        numbers: dict[str, float] = {}
        for name, value in values.items():
            as_number = number(value)
            if as_number is None or name == "step":  # `step` is the name of the step itself in metrics.jsonl
                self.skipped.append(readable(f"step {step}: {name}: {value}"[:80]))
            else:
                numbers[readable(name)] = as_number
        return numbers

    def _forget(self, first: int, back_to: int) -> None:
        self.went_back.append((self._top, back_to))
        for step in [step for step in self.steps if step >= first]:
            self._drop(step, self.steps[step].keys())
            del self.steps[step]
        self._top = max(self.steps, default=-1)

    def _drop(self, step: int, names: Iterable[str]) -> None:
        gone = set(names)
        self._gone.setdefault(step, set()).update(gone)
        for name in gone:
            self.steps[step].pop(name, None)


def _same(first: float, other: float) -> bool:
    return first == other or (math.isnan(first) and math.isnan(other))


def _count(numbers: int) -> str:
    return f"{numbers} number{'s were' if numbers != 1 else ' was'}"
