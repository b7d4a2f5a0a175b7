r"""The final number of a text, read exactly, or not at all.

`strict` reads the number right after the first `####` (GSM8K's own format), `flexible` the last number anywhere. Both
are needed: an early model that computes well but formats badly scores 0 on the first, and that difference is not an
effect of quantization. Numbers are decimals, never floats: 0.1 + 0.2 is 0.3 here.

A part of a number is not the number: digits are taken with everything that belongs to them (`2 2/3`, `10^3`, `3:20`),
and the whole is either one number as it is written (`1 080`, `3.0e2`, `-$5`), or none. Nothing is computed.
"""

import re
from collections import deque
from decimal import Decimal

from fp4rl.spec.task import Score

MARK = "####"

_BLANK = r"[ \t\u00a0\u2009\u202f]"
_SIGN = r"[-−–+]"
_CURRENCY = r"[$€£¥]"
_OF_ONE = "[½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞]"
_RAISED = "[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]"

# One run of digits with its commas, points and signs of a fraction; possessive, so that no part of it is taken alone.
_RUN = rf"{_CURRENCY}?(?:\.?[0-9]++(?:[.,][0-9]++)*+(?:{_BLANK}?{_OF_ONE})?|{_OF_ONE}){_RAISED}*+%?"
# What joins two runs to one expression. An operator has blanks on both sides or on none: `**18** 5` is no power.
_OPERATOR = r"(?:[-−–—+*×·÷/^±:xX]|\*\*)"
_TIE = (
    rf"(?:[)\]}}]?(?:{_OPERATOR}|{_BLANK}++{_OPERATOR}{_BLANK}++)[(\[{{]?|{_BLANK}++(?:or|to){_BLANK}++"
    rf"|{_BLANK}|[eE_'’]|\}}\{{|{_BLANK}?\\[dt]?frac\{{?)"
)
_HEAD = r"(?:√|\\sqrt(?:\[[0-9]+\])?\{?|\\[dt]?frac\{?|(?<=\w)[/^]\{?)"
# What changes the value of the number before it.
_SCALE = (
    rf"(?:{_BLANK}?(?:(?:hundred|thousand|million|billion|trillion)s?\b|[万亿千百])"
    r"|(?:[kKMBxyn]|\\pi|π)(?![A-Za-z]))"
)
_EXPRESSION = rf"(?P<head>{_HEAD})?+(?P<body>{_RUN}(?:{_TIE}{_SIGN}?{_RUN})*+)(?P<scale>{_SCALE})?"

# Compiled when a text is first read (re keeps them): whoever only describes a task need not wait for it.
# A sign after a number is an operator: "27 -2" holds no -2, but "x=-2" and "= - 2" do.
_ANYWHERE = (
    rf"(?P<sign>(?<==){_BLANK}?{_SIGN}{_BLANK}?{_CURRENCY}?|(?<![\w)\]]){_SIGN}{_CURRENCY}?|{_CURRENCY}{_SIGN})?"
    rf"{_EXPRESSION}"
)
# Right after the mark a sign is a sign; there Markdown and LaTeX around it are skipped too: `**$18**`, `\boxed{-5}`.
_DRESS = rf"(?:{_BLANK}|[*_`\"'“‘(\[{{]|{_CURRENCY}|\\(?:boxed|fbox|text|textbf|mathbf|mathrm)\{{|\\[(\[])*+"
_AFTER_MARK = rf"(?<!#)#{{4,}}+{_DRESS}(?P<sign>{_SIGN})?{_DRESS}{_EXPRESSION}(?P<heading>[.):]{_BLANK}+[^\W\d])?"

_NUMBER = (
    rf"{_CURRENCY}?(?P<digits>(?:[0-9]{{1,3}}(?:,[0-9]{{3}})+|[0-9]{{1,3}}(?:{_BLANK}[0-9]{{3}})+|[0-9]+)(?:\.[0-9]+)?"
    r"|\.[0-9]+)(?P<exponent>[eE][-−+]?[0-9]{1,2})?%?"
)
_LATEX = {r"\$": "$", r"\%": "%", "{,}": ",", r"\!": "", r"\,": "\u2009", r"\ ": " "}
_LATEX |= {r"\times": "×", r"\cdot": "·", r"\div": "÷", r"\pm": "±"}


def strict_number(text: str) -> Decimal | None:
    """Return the number right after the first `####`; None where there is no mark, or no number right after it.

    A mark before words is a heading and skipped; so is a numbered one (`#### 1. Add`) where another mark follows.
    Signs, thousands commas or blanks, decimals, powers of ten (`3.0e2`), a currency before, and a `%`, a unit or a full
    stop behind (`50%` is 50) are read, also in bold type, LaTeX and `\\boxed{}`. Fractions, sums, times, ranges and
    `5 million` are not: they would have to be computed, and a part of them is another number.
    """
    mark = _marked(_plain_latex(text))
    return _value(mark) if mark else None


def flexible_number(text: str) -> Decimal | None:
    """Return the strict number where there is one; else the last number, up to the line's end where there is a mark.

    None where there is no number, and where the last digits belong to an expression that is not a number.
    """
    text = _plain_latex(text)
    marked = _marked(text)
    if marked and (strict := _value(marked)) is not None:
        return strict
    end = text.find("\n", marked.end()) if marked else -1
    last = deque(re.compile(_ANYWHERE).finditer(text, 0, end if end >= 0 else len(text)), maxlen=1)
    return _value(last[0]) if last else None


def same_number(a: Decimal | None, b: Decimal | None) -> bool:
    """Return whether both are numbers and exactly equal (2.50 is 2.5); a missing number equals nothing."""
    return a is not None and b is not None and a == b


def scored(answer: str, completion: str) -> Score:
    """Score the completion's final number against `answer`, the right one written plainly."""
    gold, strict = Decimal(answer), strict_number(completion)
    return Score(
        strict=same_number(strict, gold),
        flexible=same_number(flexible_number(completion), gold),
        formatted=strict is not None,
    )


def extracted(completion: str) -> str | None:
    """Return the strict number of a completion, written plainly; None where there is none."""
    number = strict_number(completion)
    return None if number is None else plain(number)


def plain(number: Decimal) -> str:
    """Write the number without exponent, commas or trailing zeros: `1234567`, `-4`, `2.5`."""
    text = f"{number:f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) or "0"


def _marked(text: str) -> re.Match[str] | None:
    """Return the first mark with digits right after it; a numbered heading only where no other follows."""
    marks = list(re.finditer(_AFTER_MARK, text))
    return next((mark for mark in marks if mark["heading"] is None), marks[0] if marks else None)


def _value(match: re.Match[str]) -> Decimal | None:
    number = None if match["head"] or match["scale"] else re.fullmatch(_NUMBER, match["body"])
    if number is None:
        return None
    digits = re.sub(rf"{_BLANK}|,", "", number["digits"])
    size = Decimal(digits + (number["exponent"] or "").replace("−", "-"))
    return -size if any(sign in (match["sign"] or "") for sign in "-−–") else size


def _plain_latex(text: str) -> str:
    if "\\" in text or "{,}" in text:
        for written, mark in _LATEX.items():
            text = text.replace(written, mark)
    return text
