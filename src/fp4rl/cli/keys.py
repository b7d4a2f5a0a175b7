"""`fp4rl keys`: every key that an experiment or a suite may have, with its type, its default and what it means."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fp4rl.cli.options import AsJson
from fp4rl.cli.terminal import console, print_json, styled
from fp4rl.spec.errors import NotFoundError, nearest

if TYPE_CHECKING:
    from rich.text import Text

    from fp4rl.spec.keys import Key


def command(
    prefix: Annotated[str, typer.Argument(help="Only the keys below this one, such as training or noise.")] = "",
    as_json: AsJson = False,
) -> None:
    """List the keys of an experiment, the `base` of a suite, and those of a suite and of a scan, with defaults.

    Examples: `fp4rl keys training.rollout_correction`, `fp4rl keys suite`, `fp4rl keys scan`
    """
    from fp4rl.spec.experiment import Experiment, Suite
    from fp4rl.spec.keys import described_keys
    from fp4rl.spec.scan import ScanRequest

    whole = {"suite": described_keys(Suite), "scan": described_keys(ScanRequest)}
    every = [*described_keys(Experiment), *whole["suite"]]
    asked = prefix.removeprefix("base.")  # the base holds an experiment's keys
    found = whole.get(asked) or [key for key in every if _below(key, asked)]
    if not found:
        raise NotFoundError(f"no key is called {prefix!r}{_nearest(asked, every)}")
    if as_json:
        print_json([_row(key) for key in found])
        return
    _print(found)


def _below(key: "Key", prefix: str) -> bool:
    return not prefix or key.path == prefix or key.path.startswith(f"{prefix}.")


def _nearest(word: str, every: "list[Key]") -> str:
    """The nearest of all keys; where none is near, the first words that there are."""
    close = nearest(word, {key.path for key in every})
    return close if close.startswith("; did") else nearest(word, {key.path.partition(".")[0] for key in every})


def _row(key: "Key") -> dict[str, Any]:
    default = None if key.default is ... else key.default
    return {
        "key": key.path,
        "type": key.kind,
        "required": key.default is ...,
        "default": default,
        "meaning": key.meaning,
    }


def _print(found: "list[Key]") -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column("key", no_wrap=True)
    table.add_column("what", overflow="fold")
    for key, begins in _with_breaks(found):
        if begins:
            table.add_row()
        said = [part for part in (styled(key.kind), _default(key), styled(key.meaning)) if part]
        table.add_row(key.path, styled("; ").join(said))
    console().print(table)


def _with_breaks(found: "list[Key]") -> "Iterator[tuple[Key, bool]]":
    """Each key, and whether a new part of the experiment begins with it."""
    before = None
    for key in found:
        part = key.path.partition(".")[0]
        yield key, before is not None and part != before
        before = part


def _default(key: "Key") -> "Text":
    if key.kind.startswith("keys"):
        return styled()
    if key.default is ...:
        return styled(("required", "bold"))
    return styled("default ", (_as_yaml(key.default), "bold"))


def _as_yaml(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_as_yaml(one)}' for key, one in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_as_yaml, value))}]"
    return (
        {True: "true", False: "false", None: "none"}[value] if value is None or isinstance(value, bool) else str(value)
    )
