"""Suites that come with the package, as files that a user can copy and change."""

from pathlib import Path

from fp4rl.spec.errors import NotFoundError, nearest

_HERE = Path(__file__).parent


def named(name: str) -> Path:
    """Return the YAML file of a suite that comes with the package. Raises NotFoundError with the nearest name."""
    file = _HERE / f"{name}.yaml"
    if not file.is_file():
        raise NotFoundError(f"no suite {name!r} in the catalogue{nearest(name, names())}")
    return file


def names() -> list[str]:
    """List all suites of the catalogue."""
    return sorted(file.stem for file in _HERE.glob("*.yaml"))
