"""What a user can get wrong. The command line prints one line for these and shows no traceback.

Each message says what is wrong and names the cure. `Mistake` leaves with exit code 2, `CheckFailed` with 1.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class Mistake(Exception):
    """Something the user gave cannot be used as it is; the message names the cure. Exit code 2."""


class BadValue(Mistake, ValueError):
    """A value that is not allowed where it stands."""


class NotThere(Mistake, LookupError):
    """A name, a file or a module that does not exist."""


class CheckFailed(Exception):
    """A check that ran and found what it looks for. Exit code 1."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'mxfp4'?"` for the closest known word, or the list of all of them when none is close."""
    words = sorted(known)
    close = get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(words)}"
