"""Plan the runs of a suite: arms x axes x seeds, each with an id that needs no model to be known."""

from dataclasses import dataclass, field
from functools import cached_property

from fp4rl.spec.digest import digest, digest_by_seed
from fp4rl.spec.experiment import Experiment, Suite
from fp4rl.spec.load import arm_contents


@dataclass(frozen=True)
class PlannedRun:
    """One cell of the matrix. `run_id` is arm, seed and the digest of the described experiment with its seed.

    `digested`: an experiment whose digest is known, with it.
    """

    suite: str
    arm: str
    seed: int
    experiment: Experiment
    digested: tuple[Experiment, str] | None = field(default=None, repr=False, compare=False)

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
    """Return every run of a suite, seed by seed, so that an interrupted suite has complete comparisons."""
    arms = [(arm, own, digest_by_seed(own.model_dump(mode="json"))) for arm, own in arm_contents(suite)]
    return tuple(
        PlannedRun(suite.suite, arm, seed, experiment, (experiment, digest_of(seed)))
        for seed in suite.seeds
        for arm, own, digest_of in arms
        for experiment in [own.model_copy(update={"seed": seed})]
    )


def single(experiment: Experiment, name: str) -> PlannedRun:
    """Return an experiment as the only run of a suite called `name`."""
    return PlannedRun(name, "run", experiment.seed, experiment)
