"""The files that a run needs and this machine lacks, found out without loading anything."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from fp4rl.lab.matrix import PlannedRun

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def missing_files(runs: Iterable[PlannedRun]) -> list[str]:
    """One line for each path that the runs name and that does not exist."""
    return list(dict.fromkeys(line for run in runs for line in _not_here(run)))


def _not_here(run: PlannedRun) -> Iterator[str]:
    task, model = run.experiment.task, run.experiment.model
    for key, path in (("model.path", model.path), *((f"task.{key}", path) for key, path in task.files.items())):
        if path is not None and not _exists(path):
            yield f"{key}: {path} does not exist on this machine; {_cure(key, path)}"


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # a name that is too long, or holds a zero byte
        return False


def _cure(key: str, path: str) -> str:
    place = "put it there, or name another place"
    if key != "model.path" or not _HUB_ID.fullmatch(path) or Path(path).parent.is_dir():
        return place
    return (
        "nothing is downloaded here, so if it is an id of the Hub, "
        f"`hf download {path} --local-dir models/{Path(path).name}` fetches it: then name that folder"
    )
