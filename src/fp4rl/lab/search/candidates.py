"""Candidates: points of a space as arms of a suite, or the reason why a description refuses one."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from random import Random
from typing import Any

from fp4rl.lab.search.alike import unlike
from fp4rl.spec.digest import canonical
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment, Suite
from fp4rl.spec.linked import arms_needed
from fp4rl.spec.load import arm_contents, merge, parse
from fp4rl.spec.space import Space

Point = Mapping[str, str | float]  # dimension -> the name of a choice, or a number of a range


def grid(space: Space) -> list[dict[str, str | float]]:
    """Return every combination of a space without ranges, in an order shuffled by `screening.seed`."""
    names = [[choice.name for choice in own] for own in space.space.values() if isinstance(own, tuple)]
    points: list[dict[str, str | float]] = [dict(zip(space.space, values, strict=True)) for values in product(*names)]
    Random(space.screening.seed).shuffle(points)
    return points


def changes(space: Space, point: Point) -> dict[str, Any]:
    """Return what a point changes in the base: its choices laid over each other, in the order of the file."""
    changed: dict[str, Any] = {}
    for name, value in point.items():
        own = space.space[name]
        chosen = next(c.set for c in own if c.name == value) if isinstance(own, tuple) else {name: value}
        changed = merge(changed, chosen)
    return changed


def in_words(point: Point) -> str:
    """Return a point in words: `lr 0.0004, start bf16`; of a key its last part."""
    last = [name.rpartition(".")[2] for name in point]
    names = [short if last.count(short) == 1 else name for short, name in zip(last, point, strict=True)]
    values = (f"{value:.3g}" if isinstance(value, float) else value for value in point.values())
    return ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))


@dataclass(frozen=True)
class Recipes:
    """Builds the experiments of points of a space, and finds what is no candidate of its own."""

    space: Space

    @cached_property
    def stages(self) -> dict[str, Experiment]:
        """The stages, each as the experiment that it is."""
        return {name: parse(Experiment, merge(self.space.base, own), name) for name, own in self.space.stages.items()}

    @cached_property
    def base(self) -> Experiment:
        """What candidates change: they are judged alike."""
        return self.experiment({})

    def suite(
        self, name: str, arms: Mapping[str, Mapping[str, Any]], seeds: Sequence[int], judging: Mapping[str, Any]
    ) -> Suite:
        """Return a suite of arms over the base of the space, judged as `judging` says (keys of `evaluation`), with the
        stages that they need before them, judged as `full`."""
        needed, full = self.needed(arms.values()), {"evaluation": {"profiles": ["full"]}}
        stages = {stage: merge(own, full) for stage, own in self.space.stages.items() if stage in needed}
        base = merge(self.space.base, {"evaluation": dict(judging)})
        content = {"suite": name, "seeds": list(seeds), "base": base, "arms": stages | dict(arms)}
        return parse(Suite, content, "")

    def needed(self, contents: Iterable[Mapping[str, Any]]) -> list[str]:
        """Return the stages that some arms take weights from, and those that these need, each behind its own."""
        ordered: list[str] = []

        def add(experiment: Experiment) -> None:
            for arm in arms_needed(experiment).values():
                if arm not in self.stages:
                    raise InvalidValueError(f"no stage is called {arm!r}")
                if arm not in ordered:
                    add(self.stages[arm])
                    ordered.append(arm)

        for content in contents:
            add(parse(Experiment, merge(self.space.base, content), ""))
        return ordered

    def experiment(self, content: Mapping[str, Any]) -> Experiment:
        """Return what changes of the base describe, with what it takes from stages filled in.

        Raises InvalidValueError where a description refuses them.
        """
        return dict(arm_contents(self.suite("candidate", {"candidate": content}, [0], {}), ""))["candidate"]

    def refused(self, point: Point, known: Mapping[str, int]) -> str | None:
        """Return why a point is no candidate; None where it is. `known`: descriptions of candidates -> their number.

        It is none where a description refuses it, where it is another's twin, and where it is judged otherwise.
        """
        try:
            own = self.experiment(changes(self.space, point))
        except InvalidValueError as error:
            return str(error).removeprefix(": ").removeprefix("arm candidate: ")
        if why := unlike(own, self.base, self.space.judged):
            return why
        twin = known.get(canonical(own))
        return f"describes the same experiment as candidate {twin}" if twin is not None else None

    def described(self, point: Point) -> str:
        """Return what tells a candidate from others: its description."""
        return canonical(self.experiment(changes(self.space, point)))
