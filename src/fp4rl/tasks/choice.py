r"""The letter that an answer to a multiple-choice question chooses, or none.

The last marked answer counts: `#### B`, `\boxed{B}`, `Answer: B`, `answer is (B)`, `<answer>B</answer>`. Without one it
is the last letter that stands as a choice: `(B)`, `B)`, `**B**`, or `B`, `B.` and `B. Paris` at the beginning
of a line. A letter within a sentence is a word (`A dog`, `I think`), and small letters are words too.

After a mark a letter must stand alone: `Answer: B`, `B.`, `(B) Paris`, `B: Paris` are B, `Answer: A dog` is none, and
so is whatever names two: `A or B`, `(A), (B)`. The rule is the same for every letter, so that none is favoured.
"""

import re

_DRESS = r"[\s*_`\"'“‘$]*+(?:\\(?:boxed|text|textbf|mathbf|mathrm)\{[\s*_]*+)*+"
_END = r"(?=[.:](?!\w)|[)\]}*_`\"'”’$]|\s*$|\s*[\n,;<]|\\)"
_LETTER = rf"{_DRESS}(?:\((?P<round>[A-Z])\)|\[(?P<square>[A-Z])\]|(?P<bare>[A-Z]){_END})"
_MARK = r"####|\\boxed\{|<answer>|\banswer\b[*_]*(?:\s+is\b(?:\s+(?:option|choice)\b)?\s*:?|\s*:)"
_MARKED = rf"(?i:{_MARK}){_LETTER}"
_STANDING = (
    r"\((?P<round>[A-Z])\)|\[(?P<square>[A-Z])\]|(?<![\w(])(?P<bracket>[A-Z])\)|\*\*(?P<bold>[A-Z])[.)]?\*\*"
    r"|^[ \t]*(?P<line>[A-Z])(?:[.:](?=\s|$)|[ \t]*$)"
)
_SECOND = r"[\s)\]}*_.\"'$]*(?:,|/|&|\band\b|\bor\b)+\s*(?:and\b|or\b)?[\s(\[*_]*[A-Z](?![\w'])"
_GOLD = r"\s*[(\[]?([A-Za-z])(?:[)\].:]|\s*$)"


def chosen(text: str) -> str | None:
    """Return the letter that a completion chooses; None where it chooses none, or two at once."""
    matches = list(re.finditer(_MARKED, text)) or list(re.finditer(_STANDING, text, re.MULTILINE))
    if not matches or any(re.compile(_SECOND).match(text, each.end()) for each in matches[-2:]):
        return None
    return next(letter for letter in matches[-1].groupdict().values() if letter)


def letter(gold: str) -> str | None:
    """Return the letter of a gold answer, written `B`, `b`, `(B)`, `B.` or `B) Paris`; None for any other text."""
    match = re.match(_GOLD, gold)
    return match[1].upper() if match else None
