"""A finished run as one typed value: its description, its result, its evidence, its curves.

Reports, displays and comparisons of runs all read them here, from their folders; where a folder is not here, from the
ledger's record of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from fp4rl.lab.files import damage_named
from fp4rl.lab.folders import RunFolder
from fp4rl.lab.gaps import gaps, lines_of
from fp4rl.lab.repeats import digest_and_present
from fp4rl.spec.digest import digest
from fp4rl.spec.evidence import Evaluation, Evidence, Warned
from fp4rl.spec.records import RunResult, Sites

Curves = Mapping[int, Mapping[str, float]]
_E = TypeVar("_E")


@dataclass(frozen=True)
class Run:
    """One finished run. `spec` is empty for a foreign log, `folder` is None where the run's files are not here."""

    suite: str
    run_id: str
    spec: Mapping[str, Any]
    result: RunResult
    lines: Sequence[Evidence] = ()
    sites: Sites = field(default_factory=Sites)
    curves: Curves = field(default_factory=dict)
    folder: RunFolder | None = None

    @property
    def key(self) -> str:
        """`suite/run-id`."""
        return f"{self.suite}/{self.run_id}"

    @property
    def arm(self) -> str:
        """The arm, or the run's id where its result names none."""
        return self.result.arm or self.run_id

    @property
    def seed(self) -> int | None:
        """The seed; None where a foreign log does not give it."""
        return self.result.seed

    @property
    def described(self) -> Mapping[str, Any]:
        """The experiment without its seed: runs with the same one are repeats of each other."""
        return {key: value for key, value in self.spec.items() if key != "seed"}

    @cached_property
    def experiment(self) -> str | None:
        """The digest of the experiment without its seed; None for a foreign log."""
        return digest(self.described) if self.spec else None

    @cached_property
    def gaps(self) -> tuple[str, ...]:
        """The evidence that its spec requires and that is missing; a run is comparable without gaps."""
        if self.result.imported is not None:
            return ("it is a foreign log without evidence",)
        return gaps(self.spec, self.result.evidence, self.lines, self.result.evaluations)

    @property
    def inputs(self) -> dict[str, str | int]:
        """What the run was made from: digests by name, and the number of processes that trained it."""
        number = self.result.evidence.processes
        return {**self.result.evidence.inputs, **({} if number is None else {"number of processes": number})}

    @property
    def warnings(self) -> tuple[str, ...]:
        """The warnings that the run showed, in order."""
        return tuple(line.line for line in self.of(Warned))

    def of(self, kind: type[_E]) -> list[_E]:
        """Return its lines of evidence of one kind."""
        return lines_of(self.lines, kind)

    def evaluations(self, step: int | None = None) -> dict[str, Evaluation]:
        """Return profile -> evaluation at `step`, by default at the last step.

        An earlier evaluation never replaces a missing last one; of two at one step the last counts.
        """
        chosen = [e for e in self.result.evaluations if (e.last if step is None else e.step == step)]
        return {e.profile.name: e for e in sorted(chosen, key=lambda e: e.last)}

    def start(self, profile: str) -> Evaluation | None:
        """Return the evaluation before the first step."""
        at_start = (e for e in self.result.evaluations if e.step == 0 and not e.last)
        return next((e for e in at_start if e.profile.name == profile), None)

    def answers(self, evaluation: Evaluation) -> str | None:
        """Return the digest of the answers of an evaluation; equal where every answer is the same."""
        own = [e for e in self.of(Evaluation) if (e.step, e.profile.name) == (evaluation.step, evaluation.profile.name)]
        return own[-1].answers_digest if own else evaluation.answers_digest


def read_run(folder: RunFolder, *, curves: bool = True) -> Run:
    """Read a finished run, without its `curves` where they are not needed: they are the longest file.

    Raises `Damaged` for files that cannot be read, `NotFoundError` where it is not finished.
    """
    if not folder.finished:
        folder.result()
    with damage_named(folder.path):
        result, spec = folder.result(), folder.spec()
        own_digest, present = digest_and_present(spec)
        if spec and result.spec_digest not in (None, own_digest):  # YAML that was cut off can still be valid
            raise ValueError("spec.yaml is not what its result was computed from")
        return Run(
            suite=folder.suite,
            run_id=folder.run_id,
            spec=present,
            result=result,
            lines=folder.evidence(),
            sites=folder.sites(),
            curves=folder.metrics() if curves else {},
            folder=folder,
        )
