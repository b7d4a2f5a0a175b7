"""Collect everything that the report of a suite shows into one frozen value."""

from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

from fp4rl.lab.bands import Banded, banded
from fp4rl.lab.compare.comparison import Answer, answer_all
from fp4rl.lab.compare.declared import suite_questions
from fp4rl.lab.compare.differing import differences
from fp4rl.lab.compare.sides import At
from fp4rl.lab.files import Damaged
from fp4rl.lab.provenance import code_digest
from fp4rl.lab.report.cost import Cost, costs
from fp4rl.lab.report.evidence import live_difference, masters_unchanged, noise_steps, roundings, sites_quantized
from fp4rl.lab.report.flips import Flips, flips_of
from fp4rl.lab.report.notes import notes
from fp4rl.lab.report.rollouts import ArmRollouts, rollouts_of
from fp4rl.lab.report.scores import Score, scores
from fp4rl.lab.runs import Run
from fp4rl.lab.statistics.seeds import Spread
from fp4rl.lab.suites import SuiteRun, read_suite
from fp4rl.spec.digest import digest
from fp4rl.spec.evidence import MasterCheck
from fp4rl.spec.experiment import Experiment, Suite
from fp4rl.spec.words import counted

_MEANS = ("before", "after", "flexible", "formatted", "formatted_before", "truncated", "kl")


@dataclass(frozen=True)
class SuiteReport:
    """A suite and its runs. `arms`: the experiment of each arm (with its first seed), in the order of the suite.

    `not_planned`: run folders that the present suite.yaml does not plan.
    """

    name: str
    code_digest: str
    arms: dict[str, Experiment]
    runs: tuple[SuiteRun, ...]
    scores: tuple[Score, ...]
    questions: tuple[Answer, ...]
    notes: tuple[str, ...]
    not_planned: tuple[str, ...]
    described: Suite | None = None
    bands: tuple[Banded, ...] = ()
    flips: tuple[Flips, ...] = ()
    rollouts: tuple[ArmRollouts, ...] = ()
    costs: tuple[Cost, ...] = ()

    @cached_property
    def by_arm(self) -> dict[str, list[SuiteRun]]:
        """Arm -> its runs, in the order of the suite."""
        return {arm: [run for run in self.runs if run.planned.arm == arm] for arm in self.arms}

    @property
    def missing(self) -> tuple[SuiteRun, ...]:
        """Planned runs without a readable result."""
        return tuple(run for run in self.runs if run.run is None)

    @property
    def damages(self) -> tuple[Damaged, ...]:
        """The errors of finished runs that cannot be read."""
        return tuple(run.damage for run in self.runs if run.damage is not None)

    @property
    def stale(self) -> tuple[SuiteRun, ...]:
        """Finished runs that other code computed."""
        return tuple(run for run in self.runs if run.stale)

    @property
    def state(self) -> str:
        """`12 of 12 runs`, or `partial: 7 of 12 runs`."""
        count = f"{len(self.runs) - len(self.missing)} of {counted(len(self.runs), 'run')}"
        return count if not self.missing else f"partial: {count}"

    def as_dict(self) -> dict[str, object]:
        """Return all numbers as plain values; accuracies, differences and margins in points, shares in 0..1."""
        arms = [(name, experiment.model_dump(mode="json")) for name, experiment in self.arms.items()]
        return {
            "suite": self.name,
            "state": self.state,
            "code_digest": self.code_digest,
            "scores": [_score_dict(score) for score in self.scores],
            "questions": [_question_dict(answer) for answer in self.questions],
            "runs": [_run_dict(run) for run in self.runs],
            "differences_between_arms": {
                name: {key: {"first": a, "this": b} for key, (a, b) in differences(arms[0][1], described).items()}
                for name, described in arms[1:]
            },
            "bands": [_band_dict(own) for own in self.bands],
            "flips": [asdict(flips) for flips in self.flips],
            "costs": [asdict(cost) for cost in self.costs],
            "not_planned": list(self.not_planned),
            "notes": list(self.notes),
        }


def collect(suite_folder: Path, ledger: str | None = None) -> SuiteReport:
    """Read a suite's folder, and the spread of repeats from `ledger` (an address), by default from the folder's own.

    Raises `NotFoundError` where it is no suite, and what `load_spec` raises for its suite.yaml.
    """
    suite = read_suite(suite_folder)
    address = ledger or suite_folder.parent / "ledger.db"
    answers = answer_all(suite_questions(suite, At()), partial(_spread_in, address))
    rows = scores(suite.by_arm)
    arms = {arm: runs[0].planned.experiment for arm, runs in suite.by_arm.items()}
    return SuiteReport(
        name=suite_folder.resolve().name,
        code_digest=code_digest(),
        arms=arms,
        runs=suite.runs,
        scores=rows,
        questions=answers,
        notes=notes(suite, rows, answers),
        not_planned=suite.not_planned,
        described=suite.described,
        bands=banded(suite, suite.described.criteria) if suite.described is not None else (),
        flips=tuple(flips_of(answers, arms)),
        rollouts=tuple(rollouts_of(suite.by_arm)),
        costs=tuple(costs(suite.by_arm, suite_folder.resolve().parent)),
    )


def _spread_in(address: str | Path, run: Run) -> Spread | None:
    from fp4rl.lab.ledger.query import known_spread  # and with it SQL, for sides of one seed alone

    return known_spread(address, digest(run.spec.get("task")), digest(run.spec.get("model")))


def _score_dict(score: Score) -> dict[str, object]:
    means = {name: getattr(score, name) for name in _MEANS}
    return {
        "arm": score.arm,
        "profile": score.profile,
        "measured_under": [profile.model_dump() for profile in score.profiles],
        "problems": score.problems,
        **{name: mean and asdict(mean) for name, mean in means.items()},
        "of_samples": {name: asdict(mean) for name, mean in score.of_samples.items()},
        "by_seed": [
            {
                "seed": s.run.planned.seed,
                "run_id": s.run.planned.run_id,
                "counts": s.run.counts,
                "stale": s.run.stale,
                "before": None if s.start is None else 100 * s.start.strict,
                "after": s.after,
            }
            for s in score.by_seed
        ],
    }


def _question_dict(answer: Answer) -> dict[str, object]:
    return {
        **(answer.question.declaration.model_dump(mode="json") if answer.question.declaration else {}),
        "word": answer.word,
        "sentence": answer.sentence(),
        "refused": list(answer.refused),
        "verdict": None if answer.verdict is None else asdict(answer.verdict),
    }


def _band_dict(own: Banded) -> dict[str, object]:
    return {"sentence": own.sentence(), "band": own.band, "possible": list(own.possible), "value": own.value}


def _run_dict(run: SuiteRun) -> dict[str, object]:
    result = None if run.run is None else run.run.result
    return {
        "run_id": run.planned.run_id,
        "arm": run.planned.arm,
        "seed": run.planned.seed,
        "state": run.state,
        **run.status.as_dict(),
        "counts": run.counts,
        "stale": run.stale,
        "code_digest": result.code_digest if result else None,
        "gaps": list(run.gaps),
        "versions": dict(result.versions) if result else {},
        "wall_s": result.wall_s if result else None,
        "stopped": result.stopped if result else None,
        "preflight": result.preflight if result else None,
        "evidence": None if run.run is None else _evidence_dict(run.run),
    }


def _evidence_dict(run: Run) -> dict[str, object]:
    health = run.result.evidence.health
    return {
        "sites": sites_quantized(run),
        "sites_digest": run.sites.digest,
        "roundings": [asdict(rounding) for rounding in roundings(run)],
        "noise": [asdict(step) for step in noise_steps(run)],
        "master_checks": len(run.of(MasterCheck)),
        "master_unharmed": masters_unchanged(run),
        "live_difference": live_difference(run),
        "health": None if health is None else health.as_json(),
    }
