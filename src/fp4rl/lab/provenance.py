"""What made a result: the versions below it, and a digest of the code that computes it."""

import hashlib
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import fp4rl

# A change in any of these rooms can change a number; the lab, the engines and the command line only move numbers.
_ROOMS = ("spec", "numerics", "sites", "tasks", "models", "inject", "noise", "rl")
_SOURCE = (".py", ".c", ".h")
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "numpy")


@cache
def code_digest() -> str:
    """Twelve hex digits over the source of every room that computes results."""
    root = Path(fp4rl.__file__).parent
    found = hashlib.sha256()
    for room in _ROOMS:
        for file in sorted(path for path in (root / room).rglob("*") if path.suffix in _SOURCE):
            found.update(f"{file.relative_to(root).as_posix()}\n".encode())
            found.update(file.read_bytes())
    return found.hexdigest()[:12]


def versions() -> dict[str, str]:
    """Name -> version of Python, fp4rl and the libraries that a number passes through."""
    found = {"python": platform.python_version(), "fp4rl": fp4rl.__version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
