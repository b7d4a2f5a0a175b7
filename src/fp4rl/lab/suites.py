"""A suite's folder: the runs that its suite.yaml plans, and the state and results of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fp4rl.lab.files import Damaged, damage_named
from fp4rl.lab.folders import RunFolder, run_folder
from fp4rl.lab.matrix import PlannedRun, planned, single
from fp4rl.lab.provenance import code_digest
from fp4rl.lab.runs import Curves, Run, read_run
from fp4rl.lab.status import Status, status_of
from fp4rl.spec.errors import NotFoundError, nearest
from fp4rl.spec.experiment import Comparison, Experiment, Suite
from fp4rl.spec.load import load_spec


@dataclass(frozen=True)
class SuiteRun:
    """One planned run. `state`: `missing` (no folder), `unfinished` (no result yet), `failed`, `damaged` or `finished`.

    `stale`: it was computed by other code than the present; `failure`: why it failed.
    """

    planned: PlannedRun
    folder: RunFolder
    state: str
    run: Run | None = None
    stale: bool = False
    damage: Damaged | None = None
    failure: str | None = None

    @property
    def gaps(self) -> tuple[str, ...]:
        """Why a run is not comparable: it failed, or evidence that its spec asks for is not there."""
        return self.run.gaps if self.run is not None else tuple(filter(None, [self.failure]))

    @property
    def counts(self) -> bool:
        """Whether its numbers may enter a mean or a comparison."""
        return self.run is not None and not self.run.gaps

    @cached_property
    def status(self) -> Status:
        """What has become of it, why, and since when."""
        return status_of(self.folder, self.damage or self.run)

    @property
    def curves(self) -> Curves:
        """Step -> metric -> value."""
        return self.run.curves if self.run is not None else {}


@dataclass(frozen=True)
class SuiteRuns:
    """A suite's folder. `not_planned`: run folders that the present suite.yaml does not plan; `described`: what that
    says, None for a single experiment."""

    folder: Path
    runs: tuple[SuiteRun, ...]
    comparisons: tuple[Comparison, ...]
    not_planned: tuple[str, ...]
    described: Suite | None = None

    @cached_property
    def by_arm(self) -> dict[str, list[SuiteRun]]:
        """Arm -> its runs, in the order of the suite."""
        arms = dict.fromkeys(run.planned.arm for run in self.runs)
        return {arm: [run for run in self.runs if run.planned.arm == arm] for arm in arms}


def read_suite(folder: Path, *, curves: bool = True) -> SuiteRuns:
    """Read every planned run of a suite's folder, without `curves` where these are not needed.

    Raises `NotFoundError` where it is no suite's folder, and what `load_spec` raises for its suite.yaml.
    """
    described = _described(folder)
    if isinstance(described, Suite):
        plan, comparisons = planned(described), described.comparisons
    else:
        plan, comparisons = (single(described, folder.name),), ()
    runs = tuple(_read(run, RunFolder(folder / run.run_id), curves) for run in plan)
    ids = {run.run_id for run in plan}
    others = (other for other in folder.iterdir() if other.is_dir() and other.name not in ids)
    not_planned = sorted(other.name for other in others if (other / "spec.yaml").is_file())
    suite = described if isinstance(described, Suite) else None
    return SuiteRuns(folder, runs, comparisons, tuple(not_planned), suite)


def statuses_of(runs: Sequence[PlannedRun], root: Path) -> dict[str, Status]:
    """Return run id -> its status, for runs planned below `root`."""
    folders = {run.run_id: run_folder(root, run.suite, run.run_id) for run in runs}
    return {run.run_id: _read(run, folders[run.run_id], curves=False).status for run in runs}


def _read(planned: PlannedRun, folder: RunFolder, curves: bool) -> SuiteRun:
    try:
        if not folder.finished:
            why = folder.failure
            state = "failed" if why else "unfinished" if folder.path.is_dir() else "missing"
            return SuiteRun(planned, folder, state, failure=why)
        with damage_named(folder.path):
            run = read_run(folder, curves=curves)
            return SuiteRun(planned, folder, "finished", run, run.result.code_digest != code_digest())
    except Damaged as error:
        return SuiteRun(planned, folder, "damaged", damage=error)


def _described(folder: Path) -> Suite | Experiment:
    file = folder / "suite.yaml"
    if not file.is_file():
        suites = [suite_file.parent.name for suite_file in folder.parent.glob("*/suite.yaml")]
        cure = nearest(folder.name, suites) if suites else "; `fp4rl run` makes one"
        raise NotFoundError(f"{folder}: no suite.yaml, so this is no suite's folder{cure}")
    return load_spec(file)
