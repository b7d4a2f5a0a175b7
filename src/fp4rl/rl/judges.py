"""Rewards that compare an answer with the gold one: each says what it reads out of a completion, and whether it fits.

None instead of a number means that a gold answer cannot be compared with anything: such answers teach nothing.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from fp4rl.tasks import formulas
from fp4rl.tasks.choice import chosen, letter


@dataclass(frozen=True)
class Judge:
    """Gives 1 for a completion in which the gold answer is read, 0 for any other, None where there is no gold one.

    `gold` reads the gold answer and `read` a completion; `written` shows what they read.
    """

    gold: Callable[[str], Any]
    read: Callable[[str], Any]
    same: Callable[[Any, Any], bool] = lambda gold, read: bool(gold == read)
    written: Callable[[Any], str] = str

    def __call__(self, *, completion: str, answer: str, **_: Any) -> float | None:
        """Return 1, 0, or None where the gold answer cannot be read."""
        gold = self.gold(answer)
        if gold is None:
            return None
        read = self.read(completion)
        return float(read is not None and self.same(gold, read))

    def extracted(self, completion: str) -> str | None:
        """Return what is read out of a completion, in writing; None where nothing is."""
        read = self.read(completion)
        return None if read is None else self.written(read)


def _math_verify(_: str | None) -> Judge:
    """Compare mathematically: LaTeX, fractions, intervals, sets, matrices. A gold answer is read as a whole."""
    formulas.math_verify()  # before the first answer, or not at all

    def read(text: str) -> Any:
        parts = formulas.parsed(text)
        return parts if formulas.means_something(parts) else None

    @lru_cache(maxsize=4096)
    def gold(answer: str) -> Any:
        # Without a sign of LaTeX around it, the last number alone would be read: 3 of `3\sqrt{2}`.
        plain = answer.strip().replace(r"\$", "")
        return read(answer if "$" in plain or r"\boxed" in plain or r"\(" in plain else f"${plain}$")

    return Judge(gold, read, formulas.same, lambda parts: str(parts[-1]))


def _exact(_: str | None) -> Judge:
    """Compare the whole text, blanks reduced to single ones; capitals count."""
    return Judge(_in_single_blanks, _in_single_blanks)


def _in_single_blanks(text: str) -> str | None:
    return " ".join(text.split()) or None


def _regex(pattern: str | None) -> Judge:
    """Compare the first group of the pattern's last match; without a group, only ask whether it matches at all."""
    compiled = re.compile(pattern or "", re.MULTILINE)
    if not compiled.groups:
        return Judge(lambda _: True, lambda text: compiled.search(text), lambda *_: True, lambda match: str(match[0]))

    def last(text: str) -> str | None:
        groups = [match[1] for match in compiled.finditer(text) if match[1] is not None]
        return _in_single_blanks(groups[-1]) if groups else None

    return Judge(_in_single_blanks, last)


def _choice(_: str | None) -> Judge:
    """Compare the letter that is chosen."""
    return Judge(letter, chosen)


# One entry a judge, made from the pattern of `regex`; the others need none.
JUDGES: Mapping[str, Callable[[str | None], Judge]] = MappingProxyType(
    {"math_verify": _math_verify, "exact": _exact, "regex": _regex, "choice": _choice}
)
