"""The rounding backend that the environment asks for: read here, at the doors, and nowhere below."""

import os
from collections.abc import Callable

from fp4rl.spec.errors import InvalidValueError

VARIABLE = "FP4RL_BACKEND"


def choose_backend(announce: Callable[[str], None]) -> None:
    """Force the backend that FP4RL_BACKEND names, `auto` without it; `announce` hears of compilations and their time.

    Raises InvalidValueError for a word that is no backend and for one that cannot work here.
    """
    from fp4rl.numerics.dispatch import use

    try:
        use(os.environ.get(VARIABLE) or "auto", announce)
    except InvalidValueError as error:
        raise InvalidValueError(f"{VARIABLE}: {error}") from None
