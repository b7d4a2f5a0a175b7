"""Errors of the user. The command line prints one line for these, without a traceback.

Each message says what is wrong and names the cure. `UserError` ends with exit code 2, `CheckFailed` with 1.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import SequenceMatcher, get_close_matches
from math import isfinite


class UserError(Exception):
    """Something that the user gave cannot be used; the message names the cure. Exit code 2."""


class InvalidValueError(UserError, ValueError):
    """A value that is not allowed where it stands."""


class NotFoundError(UserError, LookupError):
    """A name, a file or a module that does not exist."""


class EngineLost(NotFoundError):
    """An engine in another process does not answer; what was trained so far is kept."""


class CheckFailed(Exception):
    """A check that ran and found what it looks for. Exit code 1."""


class EngineDiffers(CheckFailed):
    """An engine holds or serves another policy than the trainer.

    `check` is the comparison that shows it, `tensors` are the names of those that differ, where it compares tensors.
    """

    def __init__(self, message: str, check: str, tensors: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.check, self.tensors = check, tensors


class NotFinite(CheckFailed):
    """NaN or infinity stands where a number belongs; nothing that follows from it is a result."""


@contextmanager
def located(where: str) -> Iterator[None]:
    """Add to a NotFinite that is raised inside where it came up."""
    try:
        yield
    except NotFinite as error:
        raise NotFinite(f"{where}: {error}") from None


def require_finite(where: str, content: object, name: str = "") -> None:
    """Raise NotFinite, naming the signal, for the first NaN or infinity in numbers, mappings and lists of them."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            require_finite(where, value, f"{name}.{key}".lstrip("."))
    elif isinstance(content, list | tuple):
        for number, value in enumerate(content):
            require_finite(where, value, f"{name}.{number}")
    elif isinstance(content, float) and not isfinite(content):
        raise NotFinite(f"{where}: {name} is {content}")


def shown(value: object, longest: int = 80) -> str:
    """Return a value for a message: on one line, as Python writes it, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= longest else f"{text[: longest - 4]}...{text[-1]}"


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'mxfp4'?"` for the closest known word, or those equally close; all where none is."""
    words = sorted(set(known))
    close = get_close_matches(word, words, n=3, cutoff=0.5)
    if not close:
        return f"; known: {', '.join(words)}"
    ratios = [SequenceMatcher(None, candidate, word).ratio() for candidate in close]  # as get_close_matches asks it
    *others, last = sorted(
        repr(candidate) for candidate, ratio in zip(close, ratios, strict=True) if ratio == ratios[0]
    )
    return f"; did you mean {', '.join(others)}{' or ' if others else ''}{last}?"


def require_names(what: str, entries: Iterable[str], names: Iterable[str]) -> None:
    """Raise InvalidValueError where a table of functions and the names that a description may use are not the same."""
    functions, described = set(entries), set(names)
    if missing := described - functions:
        raise InvalidValueError(f"{what}: {', '.join(sorted(missing))} can be described but has no function")
    if extra := functions - described:
        raise InvalidValueError(f"{what}: {', '.join(sorted(extra))} has a function but cannot be described")
