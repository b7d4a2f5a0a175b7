"""All training that a planned arm needs before its own: the stages that it starts from, and the arms that teach."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fp4rl.lab.stages import planned_stages
from fp4rl.spec.digest import digest
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.linked import TEACHER, arms_needed, described, links


@dataclass(frozen=True)
class Beforehand:
    """The `stages` that an arm starts from with what taught them, and, without these, what `teaches` it."""

    stages: tuple[Experiment, ...]
    teaches: tuple[Experiment, ...]

    @property
    def whole(self) -> tuple[Experiment, ...]:
        """All of them, each once; the last one is that which the arm starts from."""
        return (*self.teaches, *self.stages)

    def words(self) -> str:
        """Return ` with its stages and teacher`, as far as there are such."""
        parts = [word for word, own in (("stages", self.stages), ("teacher", self.teaches)) if own]
        return f" with its {' and '.join(parts)}" if parts else ""


def beforehand(own: Experiment, arms: Mapping[str, Experiment], root: Path) -> Beforehand | None:
    """Return what is trained before a planned experiment; `arms` are those of its suite.

    None where a run of it is not below `root`, or is taught by an arm of another suite.
    """
    stages = planned_stages(own, arms, root)
    if stages is None or (taught := _taught(own, arms, root)) is None:
        return None
    before = [each for stage in stages for each in (_taught(stage, arms, root), (stage,))]
    if any(each is None for each in before):
        return None
    known = _once(stage for each in before for stage in each or ())
    return Beforehand(known, tuple(each for each in _once(taught) if each not in known))


def _taught(own: Experiment, arms: Mapping[str, Experiment], root: Path) -> tuple[Experiment, ...] | None:
    """Return the arm that teaches an experiment behind what it needs itself; None where it is not among `arms`."""
    if (name := arms_needed(own).get(TEACHER)) is None:
        return ()
    teacher = arms.get(name)
    if teacher is None or links(own)[TEACHER].digest not in (None, digest(described(teacher))):
        return None
    before = beforehand(teacher, arms, root)
    return None if before is None else (*before.whole, teacher)


def _once(experiments: Iterable[Experiment]) -> tuple[Experiment, ...]:
    known = list[Experiment]()
    for each in experiments:
        if each not in known:
            known.append(each)
    return tuple(known)
