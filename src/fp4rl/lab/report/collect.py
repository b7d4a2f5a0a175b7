"""Suite folder -> everything the report shows, as one frozen value."""

from dataclasses import dataclass
from pathlib import Path

from fp4rl.lab.damage import Damaged
from fp4rl.lab.folders import RunFolder
from fp4rl.lab.matrix import PlannedRun, planned, single
from fp4rl.lab.provenance import code_digest
from fp4rl.lab.report.notes import notes
from fp4rl.lab.report.plain import as_dict
from fp4rl.lab.report.questions import Question, has_single_runs, questions
from fp4rl.lab.report.runs import Run, read_run
from fp4rl.lab.report.scores import Score, scores
from fp4rl.lab.report.spread import from_ledger
from fp4rl.spec.errors import NotFoundError, nearest
from fp4rl.spec.experiment import Experiment, Suite
from fp4rl.spec.load import load_spec
from fp4rl.spec.words import agreeing, counted


@dataclass(frozen=True)
class SuiteReport:
    """A suite as its runs show it. `not_planned`: run folders that the present suite.yaml does not ask for."""

    name: str
    code_digest: str
    runs: tuple[Run, ...]
    scores: tuple[Score, ...]
    questions: tuple[Question, ...]
    notes: tuple[str, ...]
    not_planned: tuple[str, ...]

    @property
    def arms(self) -> dict[str, Experiment]:
        """Arm -> what it describes (its first seed), in the order of the suite."""
        found: dict[str, Experiment] = {}
        for run in self.runs:
            found.setdefault(run.planned.arm, run.planned.experiment)
        return found

    @property
    def finished(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.state == "finished")

    @property
    def missing(self) -> tuple[Run, ...]:
        """Planned runs without a result."""
        return tuple(run for run in self.runs if run.state != "finished")

    @property
    def damages(self) -> tuple[Damaged, ...]:
        """What is wrong with finished runs that cannot be read."""
        return tuple(run.damage for run in self.runs if run.damage is not None)

    @property
    def stale(self) -> tuple[Run, ...]:
        """Finished runs that other code computed."""
        return tuple(run for run in self.runs if run.stale)

    @property
    def state(self) -> str:
        """`12 of 12 runs`, or `partial: 7 of 12 runs`."""
        count = f"{len(self.finished)} of {counted(len(self.runs), 'run')}"
        return count if not self.missing else f"partial: {count}"

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON; accuracies in points."""
        return as_dict(self)


def collect(suite_folder: Path, ledger: str | None = None) -> SuiteReport:
    """Read a suite's folder, and the spread of repeats from the ledger at that address, else from the folder's own.

    Raises `NotFoundError` where it is no suite, and what the door raises for its suite.yaml.
    """
    described = _described(suite_folder)
    plan = planned(described) if isinstance(described, Suite) else (single(described, suite_folder.name),)
    code_now = code_digest()
    runs = tuple(read_run(run, RunFolder(suite_folder / run.run_id), code_now) for run in plan)
    comparisons = described.comparisons if isinstance(described, Suite) else ()
    found = scores(runs)
    place = ledger or suite_folder.parent / "ledger.db"
    spread = from_ledger(place, plan[0].experiment) if comparisons and has_single_runs(runs) else None
    asked = questions(comparisons, runs, spread)
    others = _not_planned(suite_folder, plan)
    return SuiteReport(
        name=suite_folder.resolve().name,
        code_digest=code_now,
        runs=runs,
        scores=found,
        questions=asked,
        notes=(*notes(runs, found, asked), *_left_alone(others)),
        not_planned=others,
    )


def _described(suite_folder: Path) -> Suite | Experiment:
    file = suite_folder / "suite.yaml"
    if not file.is_file():
        root = suite_folder.parent
        suites = [found.parent.name for found in root.glob("*/suite.yaml")]
        cure = nearest(suite_folder.name, suites) if suites else "; `fp4rl run` makes one"
        raise NotFoundError(f"{suite_folder}: no suite.yaml, so this is no suite's folder{cure}")
    return load_spec(file)


def _not_planned(suite_folder: Path, plan: tuple[PlannedRun, ...]) -> tuple[str, ...]:
    ids = {run.run_id for run in plan}
    folders = (folder for folder in suite_folder.iterdir() if folder.is_dir() and folder.name not in ids)
    return tuple(sorted(folder.name for folder in folders if (folder / "spec.yaml").is_file()))


def _left_alone(others: tuple[str, ...]) -> tuple[str, ...]:
    """A description that changed, in the file or in the code that reads it, gives its runs other ids."""
    if not others:
        return ()
    many = f"{counted(len(others), 'run folder')} {agreeing(len(others), 'is', 'are')}"
    return (f"{many} not asked for by the present suite.yaml, and left alone: {', '.join(others[:3])}{_more(others)}.",)


def _more(others: tuple[str, ...]) -> str:
    return f" and {len(others) - 3} more" if len(others) > 3 else ""
