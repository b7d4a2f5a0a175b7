"""Suite folder -> everything the report shows, as one frozen value."""

from dataclasses import dataclass
from pathlib import Path

from fp4rl.lab.compare.comparison import Answer, answer_all
from fp4rl.lab.compare.declared import suite_questions
from fp4rl.lab.compare.sides import At
from fp4rl.lab.damage import Damaged
from fp4rl.lab.ledger.query import known_spread
from fp4rl.lab.provenance import code_digest
from fp4rl.lab.report.notes import notes
from fp4rl.lab.report.scores import Score, scores
from fp4rl.lab.suites import SuiteRun, read_suite
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.words import agreeing, counted


@dataclass(frozen=True)
class SuiteReport:
    """A suite as its runs show it. `not_planned`: run folders that the present suite.yaml does not ask for."""

    name: str
    code_digest: str
    runs: tuple[SuiteRun, ...]
    scores: tuple[Score, ...]
    questions: tuple[Answer, ...]
    notes: tuple[str, ...]
    not_planned: tuple[str, ...]

    @property
    def arms(self) -> dict[str, Experiment]:
        """Arm -> what it describes (its first seed), in the order of the suite."""
        described: dict[str, Experiment] = {}
        for run in self.runs:
            described.setdefault(run.planned.arm, run.planned.experiment)
        return described

    @property
    def finished(self) -> tuple[SuiteRun, ...]:
        """Planned runs with a result that can be read."""
        return tuple(run for run in self.runs if run.run is not None)

    @property
    def missing(self) -> tuple[SuiteRun, ...]:
        """Planned runs without one."""
        return tuple(run for run in self.runs if run.run is None)

    @property
    def damages(self) -> tuple[Damaged, ...]:
        """What is wrong with finished runs that cannot be read."""
        return tuple(run.damage for run in self.runs if run.damage is not None)

    @property
    def stale(self) -> tuple[SuiteRun, ...]:
        """Finished runs that other code computed."""
        return tuple(run for run in self.runs if run.stale)

    @property
    def state(self) -> str:
        """`12 of 12 runs`, or `partial: 7 of 12 runs`."""
        count = f"{len(self.finished)} of {counted(len(self.runs), 'run')}"
        return count if not self.missing else f"partial: {count}"


def collect(suite_folder: Path, ledger: str | None = None) -> SuiteReport:
    """Read a suite's folder, and the spread of repeats from the ledger at that address, else from the folder's own.

    Raises `NotFoundError` where it is no suite, and what the door raises for its suite.yaml.
    """
    suite = read_suite(suite_folder)
    address = ledger or suite_folder.parent / "ledger.db"
    questions = suite_questions(suite, At())
    answers = answer_all(questions, lambda run: known_spread(address, run))
    rows = scores(suite.runs)
    return SuiteReport(
        name=suite_folder.resolve().name,
        code_digest=code_digest(),
        runs=suite.runs,
        scores=rows,
        questions=answers,
        notes=(*notes(suite.runs, rows, answers), *_left_alone(suite.not_planned)),
        not_planned=suite.not_planned,
    )


def _left_alone(others: tuple[str, ...]) -> tuple[str, ...]:
    """A description that changed, in the file or in the code that reads it, gives its runs other ids."""
    if not others:
        return ()
    many = f"{counted(len(others), 'run folder')} {agreeing(len(others), 'is', 'are')}"
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    return (f"{many} not asked for by the present suite.yaml, and left alone: {', '.join(others[:3])}{more}.",)
