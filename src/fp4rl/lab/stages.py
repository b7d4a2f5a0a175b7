"""The runs whose weights another run takes: where they are, and whether they are what they are said to be."""

from collections.abc import Sequence
from pathlib import Path

from fp4rl.lab.folders import RunFolder, run_folder
from fp4rl.lab.matrix import PlannedRun
from fp4rl.rl.inputs import Stages, of_model
from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.former_names import with_present_names
from fp4rl.spec.linked import START, TEACHER, other_model
from fp4rl.spec.load import parse

FINAL = "final"


def sources(run: PlannedRun, root: Path) -> dict[str, RunFolder]:
    """Return key of the experiment -> the run below `root` whose weights the run takes.

    Raises NotFoundError for a run that is named and is not there.
    """
    of_suite = {key: run_folder(root, run.suite, run_id) for key, run_id in run.needs.items()}
    start = run.experiment.start
    return of_suite if start is None or start.run is None else of_suite | {START: _named(start.run, root)}


def stages_of(run: PlannedRun, root: Path) -> Stages:
    """Return the folders of weights that a run takes from others.

    Raises NotFoundError for one that is not finished, and InvalidValueError for one that ended early, whose model is
    built from something else, or whose weights are not those that it ended with.
    """
    given = sources(run, root)
    folders = {key: _weights(key, run, source) for key, source in given.items()}
    done = START in given and _transformed(given[START])
    return Stages(start=folders.get(START), teacher=folders.get(TEACHER), transformed=done)


def require_sources(runs: Sequence[PlannedRun], root: Path) -> None:
    """Raise NotFoundError where a run takes weights from one that is neither finished nor among `runs`."""
    ids = {run.run_id for run in runs}
    for run in runs:
        for key, source in sources(run, root).items():
            if not source.finished and (run.needs.get(key) not in ids):
                arm = source.run_id.rpartition("-s")[0]
                cure = f"run it too (--arm {arm})" if key in run.needs else "run it first"
                raise NotFoundError(f"{run.run_id}: {key}: {source.key} is not finished; {cure}")


def present_digests(run: PlannedRun, root: Path) -> dict[str, str]:
    """Return input -> the digest of the weights that a run would take now, as far as they are there."""
    given = sources(run, root)
    transforms = bool(run.experiment.model.transforms) and START in given and not _transformed(given[START])
    names = {START: "untransformed model" if transforms else "start model", TEACHER: "teacher"}
    folders = {names[key]: source.path / FINAL for key, source in given.items()}
    return {name: of_model(folder) for name, folder in folders.items() if folder.is_dir()}


def _named(name: str, root: Path) -> RunFolder:
    """Return the run of `suite/run-id` below `root`, or of a folder."""
    for path in (root / name, Path(name)):
        if (path / "spec.yaml").is_file():
            return RunFolder(path.resolve())
    raise NotFoundError(f"start.run: {name} is no run below {root}, nor a run's folder; write suite/run-id")


def _weights(key: str, run: PlannedRun, source: RunFolder) -> Path:
    result, folder = source.result(), source.path / FINAL
    if result.stopped is not None:
        raise InvalidValueError(f"{key}: {source.key} was ended early ({result.stopped}); what it trained is no stage")
    if not folder.is_dir():
        raise NotFoundError(f"{key}: {folder} is gone; run {source.key} again, or put its weights back")
    then = result.evidence.final_files
    if then is not None and of_model(folder) != then:
        raise InvalidValueError(
            f"{key}: {folder} does not hold the weights that {source.key} ended with; put them back"
        )
    if key == START and (why := other_model(run.experiment, _described(source))):
        raise InvalidValueError(f"{key}: {source.key}: {why}")
    return folder


def _described(source: RunFolder) -> Experiment:
    return parse(Experiment, with_present_names(source.spec()), f"{source.key}: spec.yaml")


def _transformed(source: RunFolder) -> bool:
    """Return whether what a run trained went through transforms before."""
    return bool(_described(source).model.transforms)
