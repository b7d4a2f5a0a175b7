"""Name run files that cannot be read, in one line each; such runs are left out, never repaired or changed."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fp4rl.spec.errors import InvalidValueError

# What reading a truncated, mixed-up or unreadable file ends in, in any of the libraries that read them.
_SYMPTOMS = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, MemoryError)


class Damaged(InvalidValueError):
    """A file of a run, or the whole of its folder, is not what it should be. The message names it and the cure."""


OnDamaged = Callable[[Damaged], None]


@contextmanager
def damage_named(path: Path) -> Iterator[Path]:
    """Yield `path`; raise Damaged, in one line that names it, for whatever goes wrong while it is read."""
    try:
        yield path
    except Damaged:
        raise
    except (*_SYMPTOMS, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [""])[0]
        why = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
        why = reason if isinstance(error, InvalidValueError) else why
        raise Damaged(f"{path} is damaged ({why}); put back a copy, or move its run's folder away") from error


def tell(damaged: Iterable[Damaged], on_damaged: OnDamaged | None) -> None:
    """Pass each to `on_damaged`, or raise the first where there is none."""
    for error in damaged:
        if on_damaged is None:
            raise error
        on_damaged(error)
