r"""Formulas in LaTeX: taken out of their box, read by math-verify, and compared by what they mean."""

import re
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

from fp4rl.spec.errors import NotFoundError

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BARE = re.compile(r"[^$\n]*?(?=\s*(?:\\[)\]]|[$\n]|\Z))")  # what `\boxed 5` holds: up to the end of its formula
_FULL_STOP = re.compile(
    r"(?<!\.)\.(?=\s*\}|\$)"
)  # of the sentence, within a box or a formula: math-verify reads no `12.`
_WORDS = re.compile(r"\\(?:text|textbf|textit|textrm|mbox|mathrm)\s*\{([^{}]*)\}")
_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![a-z])|\\[,;!: ]|[\s$]")
_NAMED = re.compile(r"[A-Za-z](?:=|\\in(?![a-z]))")
_OPEN, _CLOSE = "([{⟨", ")]}⟩"


def boxed(text: str) -> str | None:
    r"""Return what the last `\boxed{...}` holds, its braces counted, or the last `\boxed 5`, up to its formula's end.

    None without one, or where it never closes or holds nothing.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    begin = end = boxes[-1].end()
    if not text.startswith("{", begin):
        bare = _BARE.match(text, begin)
        return (bare[0].strip().rstrip(".") or None) if bare else None
    begin = end = begin + 1
    depth = 1
    while end < len(text) and depth:
        escaped = text[end - 1] == "\\"
        depth += (text[end] == "{" and not escaped) - (text[end] == "}" and not escaped)
        end += 1
    return text[begin : end - 1].strip() if not depth else None


def has_box(text: str) -> bool:
    r"""Return whether a text has a `\boxed`, be it cut off."""
    return _BOX.search(text) is not None


def parsed(text: str) -> tuple[Any, ...]:
    """Return what math-verify reads in a text, of several boxed formulas the last: expressions, then their writing.

    Empty where it reads nothing. Raises NotFoundError without math-verify.
    """
    return tuple(math_verify().parse(_FULL_STOP.sub("", text)))


@lru_cache(maxsize=20_000)  # a gold is read once for all the answers that are compared with it
def in_a_box(formula: str) -> tuple[Any, ...]:
    """Return what math-verify reads in a formula alone."""
    return parsed(rf"\boxed{{{formula}}}")


def means_something(parts: Sequence[Any]) -> bool:
    """Return whether math-verify read more in a text than its letters."""
    return any(not isinstance(part, str) for part in parts)


def same(gold: Sequence[Any], read: Sequence[Any]) -> bool:
    r"""Return whether two parsed formulas are equal: mathematically (`0.5` and `\frac{1}{2}`), or in the same words.

    A set in braces is no pair and no interval, though math-verify takes `(1,2)` for `\{1,2\}`. A list without brackets
    may be either.
    """
    if not gold or not read:
        return False
    written = [part if isinstance(part, str) else "" for part in (gold[-1], read[-1])]
    if written[0] and _in_words(written[0]) == _in_words(written[1]):
        return True
    kinds = [_brackets(text) for text in written]
    if all(kinds) and (kinds[0] == "⟨") != (kinds[1] == "⟨"):
        return False
    return bool(math_verify().verify(list(gold), list(read)))


def math_verify() -> Any:
    """Return the module math_verify. Raises NotFoundError where it is not installed."""
    try:
        return import_module("math_verify")
    except ImportError:
        raise NotFoundError(
            "comparing formulas (math_verify) needs the extra `math`: pip install 'fp4rl[math]'"
        ) from None


def _in_words(text: str) -> str:
    return " ".join(_WORDS.sub(r"\1", text).split()).rstrip(".")


def _brackets(text: str) -> str:
    r"""Return the bracket around a list of two or more, ⟨ for that of a set; empty for what is no such list."""
    text = _SIZES.sub(
        "", text.replace(r"\{", "⟨").replace(r"\}", "⟩").replace(r"\lbrace", "⟨").replace(r"\rbrace", "⟩")
    )
    if named := _NAMED.match(text):
        text = text[named.end() :]
    depth, commas = 0, 0
    for at, mark in enumerate(text):
        depth += (mark in _OPEN) - (mark in _CLOSE)
        commas += mark == "," and depth == 1
        if depth == 0 and at < len(text) - 1:
            return ""
    return text[0] if commas and depth == 0 else ""
