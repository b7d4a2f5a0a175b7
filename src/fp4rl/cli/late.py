"""What a verb leaves out on its way: named at once, while the verb goes on, and an exit code of 1 at its end."""

from fp4rl.cli.terminal import console
from fp4rl.spec.errors import CheckFailed

_left_out: dict[str, None] = {}


def leave_out(error: Exception) -> None:
    """Name something that cannot be read, once a command line."""
    if str(error) not in _left_out:
        _left_out[str(error)] = None
        console(stderr=True).print(f"left out: {error}", soft_wrap=True)


def begin() -> None:
    """A new command line."""
    _left_out.clear()


def end() -> None:
    """Raise CheckFailed if anything was left out since `begin`."""
    count = len(_left_out)
    if count:
        raise CheckFailed(f"{count} {'run is' if count == 1 else 'runs are'} damaged and left out, as named above")
