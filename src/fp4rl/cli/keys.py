"""`fp4rl keys`: every key that an experiment or a suite may have, with its type, its default and what it means."""

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from fp4rl.cli.options import AsJson
from fp4rl.cli.terminal import console, print_json, styled, table
from fp4rl.spec.errors import NotFoundError, nearest

if TYPE_CHECKING:
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
    path = prefix.removeprefix("base.")  # the base holds an experiment's keys
    chosen = whole.get(path) or [key for key in every if _below(key, path)]
    if not chosen:
        raise NotFoundError(f"no key is called {prefix!r}{_nearest(path, every)}")
    if as_json:
        print_json([_row(key) for key in chosen])
        return
    _print(chosen)


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


def _print(keys: "list[Key]") -> None:
    rows: list[tuple[str | Text, ...]] = []
    for key, begins in _with_breaks(keys):
        parts = [part for part in (styled(key.kind), _default(key), styled(key.meaning)) if part]
        rows += [(), (key.path, styled("; ").join(parts))] if begins else [(key.path, styled("; ").join(parts))]
    console().print(table("=", "", rows=rows))


def _with_breaks(keys: "list[Key]") -> "Iterator[tuple[Key, bool]]":
    """Each key, and whether a new part of the experiment, one of several keys, begins or ends with it."""
    sizes = Counter(key.path.partition(".")[0] for key in keys)
    before = None
    for key in keys:
        part = key.path.partition(".")[0]
        yield key, before is not None and part != before and max(sizes[part], sizes[before]) > 1
        before = part


def _default(key: "Key") -> Text:
    if key.kind.startswith("keys"):
        return styled()
    if key.default is ...:
        return styled(("required", "bold"))
    return styled("default ", (_as_yaml(key.default), "bold"))


def _as_yaml(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_as_yaml(item)}' for key, item in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_as_yaml, value))}]"
    return (
        {True: "true", False: "false", None: "none"}[value] if value is None or isinstance(value, bool) else str(value)
    )
