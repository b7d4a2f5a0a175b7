"""The origins of results: code, versions of libraries, and files that a description only names."""

import hashlib
import os
import platform
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import fp4rl
from fp4rl.lab.files import Damaged
from fp4rl.lab.folders import run_folder
from fp4rl.lab.matrix import PlannedRun
from fp4rl.lab.stages import present_digests
from fp4rl.rl.inputs import of_model, pointed_at
from fp4rl.spec.errors import NotFoundError
from fp4rl.spec.linked import TEACHER, links
from fp4rl.spec.records import RunResult

# A change in any of these rooms can change a number; all others only move numbers.
_ROOMS = ("spec", "numerics", "sites", "tasks", "models", "inject", "noise", "rl")
_SOURCE = (".py", ".c", ".h")
_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "numpy")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@cache
def code_digest() -> str:
    """Return twelve hex digits over the source of every room that computes results."""
    root = Path(fp4rl.__file__).parent
    hashed = hashlib.sha256()
    for room in _ROOMS:
        for file in sorted(path for path in (root / room).rglob("*") if path.suffix in _SOURCE):
            hashed.update(f"{file.relative_to(root).as_posix()}\n".encode())
            hashed.update(file.read_bytes())
    return hashed.hexdigest()[:12]


def versions(*more: str) -> dict[str, str]:
    """Return the versions of Python, fp4rl and the libraries that compute numbers, by name, and of `more` packages."""
    installed = {"python": platform.python_version(), "fp4rl": fp4rl.__version__}
    for name in (*_PACKAGES, *more):
        with suppress(PackageNotFoundError):
            installed[name] = version(name)
    return installed


def missing_files(runs: Iterable[PlannedRun]) -> list[str]:
    """Return one line for each path that the runs name and that does not exist on this machine; loads nothing."""
    lines: list[str] = []
    for run in runs:
        task, model = run.experiment.task, run.experiment.model
        teacher = getattr(links(run.experiment).get(TEACHER), "path", None)
        named = {"model.path": model.path, f"{TEACHER}.path": teacher}
        named |= {f"task.{key}": path for key, path in task.files.items()}
        for key, path in named.items():
            if path is not None and not os.path.exists(path):  # noqa: PTH110 - Path.exists raises for a long name
                lines.append(f"{key}: {path} does not exist on this machine; {_cure(key, path)}")
    return list(dict.fromkeys(lines))


def changed_inputs(runs: Iterable[PlannedRun], root: Path) -> dict[str, Sequence[str]]:
    """Return run id -> inputs of finished runs that have changed since. The embedded model's recipe is in its spec."""
    changed: dict[str, Sequence[str]] = {}
    for run in runs:
        recorded = recorded_result(run, root)
        then = recorded.evidence.inputs if recorded is not None else {}
        now = pointed_at(run.experiment)
        if run.experiment.model.path is not None and run.experiment.start is None:
            name = "untransformed model" if run.experiment.model.transforms else "start model"
            now[name] = of_model(Path(run.experiment.model.path))
        now |= present_digests(run, root)
        names = [name for name, digest in now.items() if then.get(name, digest) != digest]
        if names:
            changed[run.run_id] = names
    return changed


def recorded_result(run: PlannedRun, root: Path) -> RunResult | None:
    """Return the result of a finished run; None where it cannot be read (reporting the run names the damage)."""
    try:
        return run_folder(root, run.suite, run.run_id).result()
    except (Damaged, NotFoundError):
        return None


def _cure(key: str, path: str) -> str:
    if key != "model.path" or not _HUB_ID.fullmatch(path) or Path(path).parent.is_dir():
        return "put it there, or name another place"
    return (
        "nothing is downloaded here, so if it is an id of the Hub, "
        f"`hf download {path} --local-dir models/{Path(path).name}` fetches it: then name that folder"
    )
