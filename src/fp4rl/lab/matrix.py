"""Plan the runs of a suite: arms x axes x seeds, each with an id that needs no model to be known."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

from fp4rl.spec.digest import digest, digest_by_seed
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment, Suite
from fp4rl.spec.linked import arms_needed, in_order
from fp4rl.spec.load import arm_contents


@dataclass(frozen=True)
class PlannedRun:
    """One cell of the matrix. `run_id` is arm, seed and the digest of the described experiment with its seed.

    `needs`: key of the experiment -> the id of the run of the same suite and seed whose weights it takes.
    `digested`: an experiment whose digest is known, with it. `unchecked`: its preflight was skipped.
    """

    suite: str
    arm: str
    seed: int
    experiment: Experiment
    needs: Mapping[str, str] = field(default_factory=dict, hash=False)
    digested: tuple[Experiment, str] | None = field(default=None, repr=False, compare=False)
    unchecked: bool = field(default=False, repr=False, compare=False)

    @cached_property
    def spec_digest(self) -> str:
        """Twelve hex digits of the experiment, seed included."""
        if self.digested is not None and self.digested[0] is self.experiment:
            return self.digested[1]
        return digest(self.experiment)

    @property
    def run_id(self) -> str:
        """The name of the run's folder."""
        return f"{self.arm}-s{self.seed}-{self.spec_digest}"


def planned(suite: Suite) -> tuple[PlannedRun, ...]:
    """Return every run of a suite, seed by seed, so that an interrupted suite has complete comparisons; of a seed each
    behind those whose weights it takes."""
    arms = dict(arm_contents(suite))
    digests = {arm: digest_by_seed(own.model_dump(mode="json")) for arm, own in arms.items()}
    runs: dict[tuple[int, str], PlannedRun] = {}
    for seed, arm in product(suite.seeds, in_order(arms)):
        needs = {key: runs[seed, other].run_id for key, other in arms_needed(arms[arm]).items()}
        experiment = arms[arm].model_copy(update={"seed": seed})
        runs[seed, arm] = PlannedRun(suite.suite, arm, seed, experiment, needs, (experiment, digests[arm](seed)))
    return tuple(runs.values())


def single(experiment: Experiment, name: str) -> PlannedRun:
    """Return an experiment as the only run of a suite called `name`. Raises InvalidValueError for one that takes
    weights from an arm."""
    for key, arm in arms_needed(experiment).items():
        raise InvalidValueError(
            f"{key}.arm {arm}: this is one experiment without other arms; name its run in start.run, or the folder of "
            "a teacher in training.distillation.teacher.path"
        )
    return PlannedRun(name, "run", experiment.seed, experiment)
