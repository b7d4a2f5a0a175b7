"""Turn whatever other libraries raise over a damaged file into one line that names the folder and the cure."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fp4rl.spec.errors import InvalidValueError, UserError


@contextmanager
def readable(what: str, folder: Path) -> Iterator[None]:
    """Raises InvalidValueError for anything that goes wrong but an interrupt; what is a mistake already passes.

    A parser in Rust panics with an exception of its own beside `Exception`.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as why:
        reason = (str(why).strip().splitlines() or [type(why).__name__])[0]
        raise InvalidValueError(f"{what} in {str(folder)!r} cannot be read: {reason}{_cure(folder)}") from why


def _cure(folder: Path) -> str:
    """Weights that only pickle holds are read without running it, so not all of them can be."""
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        return "; its weights are in .bin files: save them as safetensors (save_pretrained does), or copy them anew"
    return ""
