"""May two sides be compared? Every reason why not, each with the difference that is behind it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fp4rl.lab.compare.difference import covered, differences, factor_of, said, undeclared
from fp4rl.lab.compare.identical import identical
from fp4rl.lab.compare.sides import Side, SideRun
from fp4rl.rl.inputs import POINTERS

Measuring = Literal["step", "precision", "noise", "scorer", "token limit", "sampling", "items"]
Kind = Measuring | Literal["spec", "seeds", "code", "inputs", "evidence", "identical", "missing"]

_CONDITIONS: tuple[tuple[str, Kind], ...] = (
    ("precision", "precision"),
    ("sites_digest", "precision"),
    ("noise", "noise"),
    ("scorer", "scorer"),
    ("max_new_tokens", "token limit"),
    ("sampling", "sampling"),
    ("items_digest", "items"),
)

_OF_MEASURING = ("precision", "evaluation.profiles")
_VERSIONS_IN_THE_CODE = ("python", "fp4rl")  # the digest of the code says more


@dataclass(frozen=True)
class Objection:
    """Why a comparison is refused: the kind of unfairness, what differs, and the value on each side."""

    kind: Kind
    what: str
    treatment: str
    control: str

    def sentence(self) -> str:
        """The objection in one line."""
        match self.kind:
            case "identical":
                return f"{self.what} (digest {self.treatment})"
            case "missing":
                return self.what
            case "evidence":
                return f"{self.what}: {self.treatment}"
        return f"{self.what}: {self.treatment} against {self.control}"


def objections(treatment: Side, control: Side, factors: Sequence[str] = ()) -> tuple[Objection, ...]:
    """Every reason to refuse; empty for a fair pair.

    `factors`: the keys in which the specs may differ. `precision` among them lets the sides be judged at different
    precisions, which is the question when 4 bits are held against BF16.
    """
    if not (treatment.runs and control.runs):
        empty = [side.missing or f"{side.name} has no run" for side in (treatment, control) if not side.runs]
        return tuple(Objection("missing", why, "no run", "one is needed") for why in empty)
    return (
        *_specs(treatment, control, factors),
        *_nothing_differs(treatment, control, factors),
        *(Objection("identical", what, digest, digest) for what, digest in identical(treatment, control)),
        *_seeds(treatment, control),
        *_steps(treatment, control),
        *_conditions(treatment, control, covered("precision", factors)),
        *_code(treatment, control),
        *_inputs(treatment, control, factors),
        *_evidence(treatment, control),
    )


def _specs(treatment: Side, control: Side, factors: Sequence[str]) -> Iterator[Objection]:
    differing = differences(treatment.spec, control.spec)
    for key, (first, second) in undeclared(differing, factors).items():
        name = f"the specs also differ in {key}" if factors else f"the specs differ in {key}"
        if not factors and factor_of(key) != key:
            name += f" (part of {factor_of(key)})"
        yield Objection("spec", name, said(first), said(second))


def _nothing_differs(treatment: Side, control: Side, factors: Sequence[str]) -> Iterator[Objection]:
    """A knob that was never wired to anything makes two names of one recipe."""
    described = [factor for factor in factors if factor not in _OF_MEASURING]
    if not described or not treatment.spec or not control.spec or differences(treatment.spec, control.spec):
        return
    if _same_place(treatment) == _same_place(control):
        yield Objection(
            "spec", f"the sides do not differ in {' or '.join(described)}, nor in anything else", "one", "the same"
        )


def _same_place(side: Side) -> set[tuple[Any, ...]]:
    return {(run.measured.step, *(getattr(run.measured.profile, key) for key, _ in _CONDITIONS)) for run in side.runs}


def _seeds(treatment: Side, control: Side) -> Iterator[Objection]:
    for side in (treatment, control):
        seeds = Counter(side_run.run.seed for side_run in side.runs if side_run.run.seed is not None)
        for seed, count in seeds.items():
            if count > 1:
                yield Objection("seeds", f"seed {seed} counts {count} times in {side.name}", f"{count} runs", "one")


def _steps(treatment: Side, control: Side) -> Iterator[Objection]:
    yield from _unequal("step", "the evaluated step", *_both(treatment, control, lambda run: run.measured.step))
    for side in (treatment, control):
        for key in side.unmeasured:
            yield Objection("step", f"{key} was not evaluated there", "no number", "the other runs have one")
        short = [run for run in side.runs if run.measured.last and run.steps[0] not in (None, run.steps[1])]
        if short:
            planned, done = short[0].steps
            yield Objection("step", f"a run of {side.name} stopped early", f"{done} steps done", f"{planned} asked for")


def _conditions(treatment: Side, control: Side, other_precision: bool) -> Iterator[Objection]:
    for key, kind in _CONDITIONS:
        sides = _both(treatment, control, lambda run, key=key: _condition(run, key))
        if kind == "precision" and other_precision and all(len(side) == 1 for side in sides):
            continue
        if len(sides[0] | sides[1]) > 1:
            yield from _unequal(kind, f"the evaluation's {key}", *sides)
        elif key != "sites_digest" and None in sides[0]:
            yield Objection(kind, f"the evaluation's {key} is not known", _listed(sides[0]), _listed(sides[1]))
    yield from _unequal("items", "the number of answers", *_both(treatment, control, lambda run: run.measured.n))


def _condition(run: SideRun, key: str) -> Any:
    """A condition by what acted: what a label says after its colon is described and did not."""
    value = getattr(run.measured.profile, key)
    if key != "precision" or value is None:
        return value
    acted = str(value).partition(": ")[0]
    return "full" if acted == "clean" else acted


def _code(treatment: Side, control: Side) -> Iterator[Objection]:
    sides = _both(treatment, control, lambda run: run.run.result.code_digest)
    yield from _unequal("code", "the code that computed the results (rerun the stale side)", *sides)
    for name in sorted(
        {name for side in (treatment, control) for run in side.runs for name in run.run.result.versions}
    ):
        if name not in _VERSIONS_IN_THE_CODE:
            yield from _unequal(
                "code",
                f"{name}'s version",
                *_both(treatment, control, lambda side_run, name=name: side_run.run.result.versions.get(name)),
            )


def _inputs(treatment: Side, control: Side, factors: Sequence[str]) -> Iterator[Objection]:
    for name in sorted({name for side in (treatment, control) for run in side.runs for name in run.run.inputs}):
        pointer = POINTERS.get(name)
        if pointer is None or not any(covered(pointer, [factor]) or covered(factor, [pointer]) for factor in factors):
            yield from _unequal(
                "inputs",
                f"the {name}",
                *_both(treatment, control, lambda side_run, name=name: side_run.run.inputs.get(name)),
            )


def _evidence(treatment: Side, control: Side) -> Iterator[Objection]:
    for side in (treatment, control):
        for run in (side_run.run for side_run in side.runs if side_run.run.gaps):
            yield Objection("evidence", f"{run.key} lacks evidence", "; ".join(run.gaps), "a run proves its treatment")


def _both(treatment: Side, control: Side, value: Any) -> tuple[set[Any], set[Any]]:
    return {value(run) for run in treatment.runs}, {value(run) for run in control.runs}


def _unequal(kind: Kind, what: str, first: set[Any], second: set[Any]) -> Iterator[Objection]:
    if len(first | second) > 1:
        yield Objection(kind, f"{what} differs", _listed(first), _listed(second))


def _listed(values: set[Any]) -> str:
    return ", ".join(sorted(said(value) for value in values))
