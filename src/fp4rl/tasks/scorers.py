r"""How answers are compared with golds: as numbers, letters of choices, formulas or texts.

Each kind asks for its answer in a form of its own, `#### 42` or `\boxed{\frac{1}{2}}`. `strict` reads that form alone,
`flexible` also what a model writes instead of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from fp4rl.spec.errors import require_names
from fp4rl.spec.task import Score
from fp4rl.tasks import answers
from fp4rl.tasks.answers import MARK
from fp4rl.tasks.choice import chosen, letter
from fp4rl.tasks.formulas import boxed, has_box, in_a_box, means_something, parsed, same

ScorerName = Literal["number", "choice", "math_verify", "exact"]


@dataclass(frozen=True)
class Scorer:
    """One kind of comparison. `asks`: what the default prompt says of the form. `form`: that form, {} being the gold.

    `gold`: an answer of the data -> what `score` compares with; None where it holds none, and then `lacks` says what.
    `read`: what `strict` reads in a completion. `readable`: the check of a gold that takes too long for every start.
    """

    asks: str
    lacks: str
    gold: Callable[[str], str | None]
    score: Callable[[str, str], Score]
    read: Callable[[str], str | None]
    form: str = f"{MARK} {{}}"
    readable: Callable[[str], bool] = bool

    def solution(self, text: str, gold: str) -> str:
        """Return an answer of the data as a completion: in the form that is asked for, added where it lacks it."""
        if self.score(gold, text).strict:
            return text
        form = self.form.replace("{}", gold)
        return form if text in ("", gold) or self.gold(text) is None else f"{text}\n{form}"


def _number(text: str) -> str | None:
    """Return the number behind the mark, or the only one of a text without it: `1,080`, `$18`, `18 eggs`."""
    number = answers.strict_number(text if MARK in text else f"{MARK} {text}")
    if number is None or (MARK not in text and number != answers.flexible_number(text)):
        return None
    return answers.plain(number)


def _choice(text: str) -> str | None:
    return chosen(text) if MARK in text else letter(text)


def _strict_choice(completion: str) -> str | None:
    _, mark, rest = completion.rpartition(MARK)
    return chosen(mark + rest) if mark else None


def _score_choice(gold: str, completion: str) -> Score:
    strict = _strict_choice(completion)
    return Score(strict == gold, chosen(completion) == gold, strict is not None)


def _marked(text: str) -> str | None:
    """Return the rest of the line after the last mark."""
    return text.rpartition(MARK)[2].strip().partition("\n")[0].strip() if MARK in text else None


def _score_exact(gold: str, completion: str) -> Score:
    marked = _marked(completion)
    last = marked if marked is not None else completion.strip().rpartition("\n")[2]
    return Score(marked == gold, _plain(last) == _plain(gold), bool(marked))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'*`")


def _formula(text: str) -> str | None:
    """Return the formula in the box, behind the mark, or the whole text."""
    if has_box(text):
        return boxed(text) or None  # None: cut off inside the box
    return _marked(text) or text.strip().strip("$") or None


def _score_formula(gold: str, completion: str) -> Score:
    inside = boxed(completion)
    strict = inside is not None and (inside == gold or same(in_a_box(gold), in_a_box(inside)))
    return Score(strict, strict or same(in_a_box(gold), parsed(completion)), inside is not None)


_THINK = "Let's think step by step and output"
# One entry a value of `task.scorer`.
SCORERS: Mapping[ScorerName, Scorer] = MappingProxyType(
    {
        "number": Scorer(
            f'{_THINK} the final answer after "{MARK}".',
            f"no final number after '{MARK}', such as '{MARK} 42', and is no number itself",
            _number,
            answers.scored,
            answers.extracted,
        ),
        "choice": Scorer(
            f'{_THINK} the letter of the right choice after "{MARK}".',
            "no letter of a choice, such as B",
            _choice,
            _score_choice,
            _strict_choice,
        ),
        "math_verify": Scorer(
            rf"{_THINK} the final answer within \boxed{{}}.",
            r"no formula that can be read, such as \boxed{\frac{1}{2}}",
            _formula,
            _score_formula,
            boxed,
            r"\boxed{{}}",
            lambda gold: means_something(in_a_box(gold)),
        ),
        "exact": Scorer(
            f'{_THINK} the final answer after "{MARK}".',
            "no text",
            lambda text: (_marked(text) if MARK in text else text.strip()) or None,
            _score_exact,
            _marked,
        ),
    }
)
require_names("task.scorer", SCORERS, get_args(ScorerName))
