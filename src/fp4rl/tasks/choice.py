r"""The letter that an answer to a multiple-choice question chooses, or none.

The last marked answer counts: `#### B`, `\boxed{B}`, `Answer: B`, `answer is (B)`, `the correct option is B`,
`<answer>B</answer>`. Without one it is the last letter that stands as a choice: `(B)`, `B)`, `**B**`, or `B`, `B.` and
`B. Paris` at the beginning of a line. A letter within a sentence is a word (`A dog`, `I think`).

Small letters are words more often. They count after a mark, in a sentence only with a bracket or a full stop behind
(`the answer is b.`), and where no capital stands as a choice: `(b)`, `b)` at the beginning of a line, or `b` alone.

After a mark a letter must stand alone: `Answer: B`, `B.`, `(B) Paris`, `B: Paris` are B, `Answer: A dog` is none, and
so is whatever names two: `A or B`, `(A), (B)`. The rule is the same for every letter, so that none is favoured.
"""

import re

_DRESS = r"[\s*_`\"'“‘$]*+(?:\\(?:boxed|text|textbf|mathbf|mathrm)\{[\s*_]*+)*+"
_CLOSED = r"[.](?!\w)|[)\]*]"
_END = r"(?=[.:](?!\w)|[)\]}*_`\"'”’$]|\s*$|\s*[\n,;<]|\\)"
_BRACKETED = r"\((?P<round>[A-Za-z])\)|\[(?P<square>[A-Za-z])\]"
_OPTION = r"(?:option|choice)\b"
_ANSWER = rf"\b(?:answer|{_OPTION})\b[*_]*"
_MARKED = (
    rf"(?i:####|\\boxed(?:\{{|\s)|<answer>|{_ANSWER}(?:\s+is\b(?:\s+{_OPTION})?)?\s*:){_DRESS}"
    rf"(?:{_BRACKETED}|(?P<bare>[A-Za-z]){_END})"
    rf"|(?i:{_ANSWER}\s+is\b(?:\s+{_OPTION})?){_DRESS}"
    rf"(?:{_BRACKETED.replace('<', '<said_')}|(?P<said>[A-Z]){_END}|(?P<small>[a-z])(?={_CLOSED}))"
)
_STANDING = (
    r"(?<!\w)\((?P<round>[A-Z])\)|\[(?P<square>[A-Z])\]|(?<![\w(])(?P<bracket>[A-Z])\)|\*\*(?P<bold>[A-Z])[.)]?\*\*"
    r"|^[ \t]*(?P<line>[A-Z])(?:[.:](?=\s|$)|[ \t]*$)"
)
_SMALL = (
    r"(?<!\w)\((?P<round>[a-z])\)|^[ \t]*(?P<bracket>[a-z])\)|\*\*(?P<bold>[a-z])[.)]?\*\*|\A\s*(?P<all>[a-z])\.?\s*\Z"
)
_SECOND = (
    r"[\s)\]}*_.\"'$]*(?:,|/|&|\band\b|\bor\b)+\s*(?:and\b|or\b)?[\s(\[*_]*"
    rf"(?:[A-Z](?![\w'])|[a-z](?={_CLOSED}|\s*[}}$<,]|\s*$))"
)
_GOLD = r"\s*[(\[]?([A-Za-z])(?:[)\].:]|\s*$)"


def chosen(text: str) -> str | None:
    """Return the letter that a completion chooses, as a capital; None where it chooses none, or two at once."""
    tiers = (list(re.finditer(pattern, text, flags)) for pattern, flags in _TIERS)
    matches = next(filter(None, tiers), [])
    if not matches or any(re.compile(_SECOND).match(text, each.end()) for each in matches[-2:]):
        return None
    return next(letter for letter in matches[-1].groupdict().values() if letter).upper()


# What counts first. Only where nothing of a kind stands in the text the next is looked for.
_TIERS = ((_MARKED, 0), (_STANDING, re.MULTILINE), (_SMALL, re.MULTILINE))


def letter(gold: str) -> str | None:
    """Return the letter of a gold answer, written `B`, `b`, `(B)`, `B.` or `B) Paris`; None for any other text."""
    match = re.match(_GOLD, gold)
    return match[1].upper() if match else None
