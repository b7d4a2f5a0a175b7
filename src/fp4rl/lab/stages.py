"""The runs whose weights another run takes: where they are, and whether they are what they are said to be."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import Any

from fp4rl.lab.files import Damaged
from fp4rl.lab.folders import RunFolder, run_folder
from fp4rl.lab.matrix import PlannedRun
from fp4rl.lab.runs import Run
from fp4rl.rl.inputs import Stages, of_model
from fp4rl.spec.digest import digest
from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.former_names import with_present_names
from fp4rl.spec.linked import START, TEACHER, other_model
from fp4rl.spec.load import parse

FINAL = "final"
_INPUTS = {START: ("start model", "untransformed model"), TEACHER: ("teacher",)}  # key -> names of what it gives a run


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


def at_start(run: PlannedRun, root: Path) -> Experiment:
    """Return the run's experiment with the weights that it starts from as its model.

    Raises NotFoundError where the run that trained them is not finished, and what `stages_of` raises.
    """
    if run.experiment.start is None:
        return run.experiment
    source = sources(run, root)[START]
    if not source.finished:
        arm = run.experiment.start.arm
        first = f"run it first (fp4rl run SPEC --arm {arm} --seed {run.seed})" if arm else "run it first"
        raise NotFoundError(f"arm {run.arm} starts from {source.key}, which is not finished; {first}")
    model = run.experiment.model.model_copy(update={"path": str(_weights(START, run, source)), "embedded": None})
    return run.experiment.model_copy(update={"model": model, "start": None})


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


def link_of(spec: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    """Return the run or folder that a described experiment takes weights from under a key; None for none."""
    link: Any = spec
    for part in key.split("."):
        link = link.get(part) if isinstance(link, Mapping) else None
    return link if isinstance(link, Mapping) and (link.get("arm") or link.get("run")) else None


def taken_from(run: Run, key: str) -> RunFolder | None:
    """Return the run whose weights a finished run took; None where it is not here as it was then."""
    link = link_of(run.spec, key)
    if link is None or run.folder is None:
        return None
    taken = [run.inputs.get(name) for name in _INPUTS[key]]
    for folder in _candidates(run.folder, run.seed, link):
        if folder.finished and folder.result().evidence.final_files in (None, *taken):
            return folder
    return None


def planned_stages(experiment: Experiment, arms: Mapping[str, Experiment], root: Path) -> tuple[Experiment, ...] | None:
    """Return the experiments that a planned one starts from, the first one first; `arms` are those of its suite.

    None where it starts from a run that is not below `root` any more.
    """
    start = experiment.start
    if start is None:
        return ()
    if start.arm is not None:
        before = arms.get(start.arm)
        return None if before is None else _and_own(planned_stages(before, arms, root), before)
    with suppress(NotFoundError, Damaged):
        return _on_disk(_named(str(start.run), root), root)
    return None


def _on_disk(folder: RunFolder, root: Path) -> tuple[Experiment, ...] | None:
    own = parse(Experiment, with_present_names(folder.spec()), f"{folder.key}: spec.yaml")
    if own.start is None or own.start.arm is None:
        return _and_own(planned_stages(own, {}, root), own)
    of_the_arm = next(_candidates(folder, own.seed, own.start.model_dump()), None)
    return None if of_the_arm is None else _and_own(_on_disk(of_the_arm, root), own)


def _and_own(before: tuple[Experiment, ...] | None, own: Experiment) -> tuple[Experiment, ...] | None:
    return None if before is None else (*before, own)


def _candidates(folder: RunFolder, seed: int | None, link: Mapping[str, Any]) -> Iterator[RunFolder]:
    """Yield the runs that a link of the run in `folder` may mean: its arm's as described, of the same seed, or that
    which it names."""
    if link.get("run"):
        with suppress(NotFoundError):
            yield _named(str(link["run"]), folder.path.parent.parent)
        return
    for path in sorted(folder.path.parent.glob(f"{escape(link['arm'])}-s{seed}-*")):
        described = {key: value for key, value in RunFolder(path).spec().items() if key != "seed"}
        if link.get("digest") in (None, digest(described)):
            yield RunFolder(path)


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
