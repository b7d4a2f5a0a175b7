"""What a run was made from besides its description: digests of contents that a path or a name only points to."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from fp4rl.lab.folders import run_folder
from fp4rl.lab.matrix import PlannedRun
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.task import Gsm8k

# Each with the part of a description that points to it: where that is a declared factor, the contents may differ too.
POINTERS = {"start model": "model", "problems": "task", "reward's source": "training.reward"}

_read: dict[tuple[Path, int, int], str] = {}


def inputs(experiment: Experiment, start: Path) -> dict[str, str]:
    """Name -> twelve hex digits, for the model that training starts from (`start`), the file of problems and the
    module of a reward of one's own."""
    return {"start model": _of_files(_parts(start)), **_pointed_at(experiment)}


def made_from_others(runs: Iterable[PlannedRun], root: Path) -> dict[str, Sequence[str]]:
    """Finished run -> which of its inputs are no longer what it was made from. An embedded model is not looked at:
    its folder is named by its recipe."""
    found: dict[str, Sequence[str]] = {}
    for run in runs:
        then = (run_folder(root, run.suite, run.run_id).result().get("evidence") or {}).get("inputs") or {}
        now = _pointed_at(run.experiment)
        if run.experiment.model.path is not None:
            now["start model"] = _of_files(_parts(Path(run.experiment.model.path)))
        others = [name for name, digest in now.items() if then.get(name, digest) != digest]
        if others:
            found[run.run_id] = others
    return found


def _pointed_at(experiment: Experiment) -> dict[str, str]:
    found = {}
    if isinstance(experiment.task, Gsm8k):
        paths = (experiment.task.path, experiment.task.test_path)
        found["problems"] = _of_files([Path(path) for path in paths if path is not None])
    source = _source(experiment.training.reward.rpartition(".")[0])
    if source is not None:
        found["reward's source"] = _of_files([source])
    return found


def _source(module: str) -> Path | None:
    try:
        spec = find_spec(module) if module else None
    except ImportError:  # the run itself says so
        return None
    return Path(spec.origin) if spec is not None and spec.origin else None


def _parts(folder: Path) -> Iterator[Path]:
    """The files of a model: weights, settings and tokenizer, but no notes."""
    return (
        path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix != ".md" and path.name[0] != "."
    )


def _of_files(paths: Iterable[Path]) -> str:
    """Over names and contents."""
    found = hashlib.sha256()
    for path in paths:
        found.update(f"{path.name}\n{_of_file(path)}\n".encode())
    return found.hexdigest()[:12]


def _of_file(path: Path) -> str:
    """A large model is read once a process, not once a run."""
    stat = path.stat()
    place = path, stat.st_size, stat.st_mtime_ns
    if place not in _read:
        with path.open("rb") as file:
            _read[place] = hashlib.file_digest(file, "sha256").hexdigest()
    return _read[place]
