"""`fp4rl keys`: every key of an experiment, a suite or a scan, with its type, its default and its meaning."""

from collections import Counter
from typing import Annotated, Any

import typer
from rich.text import Text

from fp4rl.cli.options import AsJson
from fp4rl.cli.terminal import console, print_json, styled, table
from fp4rl.spec.errors import NotFoundError, nearest
from fp4rl.spec.experiment import Experiment, Suite
from fp4rl.spec.keys import Key, described_keys
from fp4rl.spec.scan import ScanRequest


def command(
    prefix: Annotated[str, typer.Argument(help="Only the keys below this one, such as training or noise.")] = "",
    as_json: AsJson = False,
) -> None:
    """List the keys of an experiment (the `base` of a suite), of a suite or of a scan, with their defaults.

    Examples: `fp4rl keys training.rollout_correction`, `fp4rl keys suite`, `fp4rl keys scan`
    """
    whole = {"suite": described_keys(Suite), "scan": described_keys(ScanRequest)}
    every = [*described_keys(Experiment), *whole["suite"]]
    path = prefix.removeprefix("base.")  # the base holds an experiment's keys
    chosen = whole.get(path) or [key for key in every if f"{key.path}.".startswith(f"{path}." if path else "")]
    if not chosen:
        close = nearest(path, {key.path for key in every})
        near = close if close.startswith("; did") else nearest(path, {key.path.partition(".")[0] for key in every})
        raise NotFoundError(f"no key is called {prefix!r}{near}")
    if as_json:
        print_json([_as_dict(key) for key in chosen])
        return
    console().print(table("=", "", rows=_rows(chosen)))


def _as_dict(key: Key) -> dict[str, Any]:
    required = key.default is ...
    default = {"required": required, "default": None if required else key.default}
    return {"key": key.path, "type": key.kind, **default, "meaning": key.meaning}


def _rows(keys: list[Key]) -> list[tuple[str | Text, ...]]:
    """Return a row for each key, and an empty one before and after each part of several keys."""
    parts = [key.path.partition(".")[0] for key in keys]
    sizes = Counter(parts)
    rows: list[tuple[str | Text, ...]] = []
    for key, part, before in zip(keys, parts, [parts[0], *parts], strict=False):
        if part != before and max(sizes[part], sizes[before]) > 1:
            rows.append(())
        words = [word for word in (styled(key.kind), _default(key), styled(key.meaning)) if word]
        rows.append((key.path, styled("; ").join(words)))
    return rows


def _default(key: "Key") -> Text:
    if key.kind.startswith("keys"):
        return styled()
    if key.default is ...:
        return styled(("required", "bold"))
    return styled("default ", (_as_yaml(key.default), "bold"))


def _as_yaml(value: Any) -> str:
    match value:
        case dict():
            return f"{{{', '.join(f'{key}: {_as_yaml(item)}' for key, item in value.items())}}}"
        case list() | tuple():
            return f"[{', '.join(map(_as_yaml, value))}]"
        case bool() | None:
            return str(value).lower()
    return str(value)
