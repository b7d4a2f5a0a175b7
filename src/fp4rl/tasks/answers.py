"""The final number of a text, read exactly.

`strict` reads the number right after the last `####` (GSM8K's own format), `flexible` the last number anywhere. Both
are needed: an early model that computes well but formats badly scores 0 on the first alone, and the difference is not
a damage of quantization (check P22). Numbers are decimals, never floats: 0.1 + 0.2 is 0.3 here.
"""

import re
from decimal import Decimal

from fp4rl.tasks.task import Score

# A sign belongs to the number only where no word, digit or bracket stands before it: "27-2" ends in 2, "= -2" in -2.
# "10,00" and "3/4" are no numbers: reading 10 or 3 from them would reward a wrong answer.
_SIGN = r"(?:(?<![\w)\]])[-−+])?"
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
_NUMBER = rf"(?P<sign>{_SIGN}\$?|\${_SIGN})(?<![0-9.,/])(?P<digits>{_DIGITS})(?![0-9]|[.,/][0-9])"
_ANYWHERE = re.compile(_NUMBER)
_AFTER_MARK = re.compile(rf"[ \t]*{_NUMBER}")
MARK = "####"


def strict_number(text: str) -> Decimal | None:
    """The number that follows the last `####` on its line; None where there is no mark, or no number right after it.

    Read are signs, thousands commas, decimals, a `$` before and a `%` or full stop after the number (`50%` is 50).
    """
    _, mark, after = text.rpartition(MARK)
    found = _AFTER_MARK.match(after) if mark else None
    return _value(found) if found else None


def flexible_number(text: str) -> Decimal | None:
    """The last number of the text, wherever it stands; None where there is none."""
    found = None
    for found in _ANYWHERE.finditer(text):  # noqa: B007 - the last one counts
        pass
    return _value(found) if found else None


def same_number(a: Decimal | None, b: Decimal | None) -> bool:
    """Whether both are numbers and exactly equal (2.50 is 2.5); a missing number equals nothing."""
    return a is not None and b is not None and a == b


def scored(answer: str, completion: str) -> Score:
    """The completion's final number against `answer`, the right one written plainly."""
    gold, strict = Decimal(answer), strict_number(completion)
    return Score(
        strict=same_number(strict, gold),
        flexible=same_number(flexible_number(completion), gold),
        formatted=strict is not None,
    )


def plain(number: Decimal) -> str:
    """The number without exponent, commas or trailing zeros: `1234567`, `-4`, `2.5`."""
    text = f"{number:f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) or "0"


def _value(found: re.Match[str]) -> Decimal:
    size = Decimal(found["digits"].replace(",", ""))
    return -size if any(sign in found["sign"] for sign in "-−") else size
