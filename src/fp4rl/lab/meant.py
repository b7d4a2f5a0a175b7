"""Which run a word of the command line means."""

from pathlib import Path

from fp4rl.lab.folders import RunFolder, all_runs, require_not_failed
from fp4rl.spec.errors import CheckFailed, InvalidValueError, NotFoundError, nearest


def run_meant(what: str, runs: Path) -> Path | None:
    """Return the folder of the run that a name, its beginning or a folder means; None for a model folder. A run's
    `final` means the run.

    Raises NotFoundError for what is neither, InvalidValueError for a run that is not finished, CheckFailed for one
    that failed.
    """
    folder = Path(what)
    for run in (folder.parent, folder) if folder.name == "final" else (folder,):
        if (run / "result.json").is_file():
            return run
        if (run / "spec.yaml").is_file() and not (run / "config.json").is_file():
            if (why := RunFolder(run).failure) is not None:
                raise CheckFailed(f"{run} failed: {why}")
            raise InvalidValueError(f"{run} is not finished; `fp4rl run` goes on with it")
    if folder.is_dir() and any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return None
    known = {run.key: run for run in all_runs(runs)}
    meant = [run for key, run in known.items() if key.startswith(what) or run.run_id.startswith(what)]
    finished = [run for run in meant if run.finished]
    if len(finished) > 1:
        raise InvalidValueError(f"{what!r} may be {', '.join(run.key for run in finished[:4])}; write more of the name")
    if not finished:
        require_not_failed(runs, what)
        if meant:
            raise InvalidValueError(f"{meant[0].key} is not finished; `fp4rl run` goes on with it")
        raise NotFoundError(
            f"{what!r} is no model folder and no run below {runs}{nearest(what, known) if known else ''}"
        )
    return finished[0].path
