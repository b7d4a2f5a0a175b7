"""Suites that come with the package: files that a user can copy and change, and the experiments of the documents."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fp4rl.lab.catalogue.rows import Scale, suite_of, table
from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest
from fp4rl.spec.experiment import Suite
from fp4rl.spec.load import load_spec

_HERE = Path(__file__).parent


class Entry(NamedTuple):
    """A suite of the catalogue: its file, or its content where it is a row of the table."""

    path: Path
    content: Mapping[str, Any] | None = None


def entry(name: str, scale: Scale | None = None) -> Entry:
    """Return a suite that comes with the package; a row of the table at `scale`, by default the tiny one.

    Raises NotFoundError with the nearest name, InvalidValueError for the scale of a file, which has one only.
    """
    if name in table().rows:
        return Entry(Path(f"catalogue/{name}"), suite_of(name, scale or "tiny"))
    if name not in files():
        raise NotFoundError(f"no suite {name!r} in the catalogue{nearest(name, names())}")
    if scale is not None:
        raise InvalidValueError(f"--scale {scale}: catalogue/{name} is a file and has one scale; leave it out")
    return Entry(_HERE / f"{name}.yaml")


def described(name: str, scale: Scale | None = None) -> Suite:
    """Return a suite of the catalogue, checked."""
    source = entry(name, scale)
    suite = load_spec(source.path, content=source.content)
    assert isinstance(suite, Suite)
    return suite


def files() -> list[str]:
    """List the suites that are files."""
    return sorted(file.stem for file in _HERE.glob("*.yaml") if file.stem != "experiments")


def space_file(path: Path) -> Path:
    """Return the file of a space: `path` itself, or the space that comes with the package as `spaces/NAME.yaml`.

    Raises NotFoundError with the nearest name.
    """
    if path.exists() or path.parent.name != "spaces":
        return path
    own = _HERE / "spaces" / f"{path.stem}.yaml"
    if not own.is_file():
        known = [f"spaces/{file.name}" for file in own.parent.glob("*.yaml")]
        raise NotFoundError(
            f"{path}: no such file, and no space that comes with the package{nearest(str(path), known)}"
        )
    return own


def names() -> list[str]:
    """List all suites of the catalogue."""
    return [*files(), *table().rows]
