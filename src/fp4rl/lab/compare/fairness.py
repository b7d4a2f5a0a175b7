"""Whether two sides may be compared: the keys in which their descriptions differ, and every objection."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from fp4rl.lab.compare.differing import STEPS, covered, differences, factor_of, in_few_words, undeclared
from fp4rl.lab.compare.sides import Side, SideRun
from fp4rl.lab.gaps import points_named
from fp4rl.lab.runs import Run
from fp4rl.lab.stages import link_of
from fp4rl.rl.inputs import POINTERS
from fp4rl.spec.linked import START, TEACHER
from fp4rl.spec.points import FORMAT_POINTS, PHASES, ApplyDuring

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

_Values = tuple[set[Any], set[Any]]  # of the treatment, of the control
_OF_MEASURING = ("precision", "evaluation.profiles")
_VERSIONS_IN_THE_CODE = ("python", "fp4rl")  # the digest of the code is more precise


@dataclass(frozen=True)
class Objection:
    """Why a comparison is refused: the kind of unfairness, what differs, the value on each side, and the cure if the
    difference may be meant."""

    kind: Kind
    what: str
    treatment: str
    control: str
    cure: str = ""

    def sentence(self) -> str:
        """Return the objection in one line."""
        match self.kind:
            case "identical":
                return f"{self.what} (digest {self.treatment})"
            case "missing":
                return self.what
            case "evidence":
                return f"{self.what}: {self.treatment}"
        return f"{self.what}: {self.treatment} against {self.control}{f'; {self.cure}' if self.cure else ''}"


def objections(treatment: Side, control: Side, factors: Sequence[str] = ()) -> tuple[Objection, ...]:
    """Return every reason to refuse; empty for a fair pair.

    `factors`: the keys in which the specs may differ. `precision` among them lets the sides be judged at different
    precisions, which is the question when 4 bits are compared with BF16.
    """
    if not (treatment.runs and control.runs):
        empty = [side.missing or f"{side.name} has no run" for side in (treatment, control) if not side.runs]
        return tuple(Objection("missing", why, "no run", "one is needed") for why in empty)
    return (
        *_specs(treatment, control, factors),
        *_nothing_differs(treatment, control, factors),
        *_identical(treatment, control),
        *_seeds(treatment, control),
        *_steps(treatment, control, factors),
        *_conditions(treatment, control, covered("precision", factors)),
        *_code(treatment, control, factors),
        *_inputs(treatment, control, factors),
        *_evidence(treatment, control),
    )


def _specs(treatment: Side, control: Side, factors: Sequence[str]) -> Iterator[Objection]:
    differing = differences(treatment.spec, control.spec)
    for key, (first, second) in undeclared(differing, factors).items():
        part = f" (part of {factor_of(key)})" if not factors and factor_of(key) != key else ""
        what = f"the specs {'also ' if factors else ''}differ in {key}{part}"
        yield Objection("spec", what, in_few_words(first), in_few_words(second))


def _nothing_differs(treatment: Side, control: Side, factors: Sequence[str]) -> Iterator[Objection]:
    """Yield an objection where declared factors do not differ: a key without effect makes two names of one recipe."""
    described = [factor for factor in factors if factor not in _OF_MEASURING]
    if not described or not treatment.spec or not control.spec or differences(treatment.spec, control.spec):
        return
    where = [
        {(run.measured.step, *(getattr(run.measured.profile, key) for key, _ in _CONDITIONS)) for run in side.runs}
        for side in (treatment, control)
    ]
    if where[0] == where[1]:
        what = f"the sides do not differ in {' or '.join(described)}, nor in anything else"
        yield Objection("spec", what, "one", "the same")


def _identical(treatment: Side, control: Side) -> Iterator[Objection]:
    """Yield an objection to runs with the same final weights, or the same answers, bit for bit.

    Weights may be the same where the descriptions differ in nothing that affects training. Answers may be the same
    where different sites were rounded, as evidence proves: then the result is that rounding costs nothing.
    """
    ended, seeded = defaultdict[str | None, list[str]](list), defaultdict[int | None, list[SideRun]](list)
    for b in control.runs:
        ended[b.run.result.evidence.final_weights].append(b.run.key)
        seeded[b.run.seed].append(b)
    weights = [(a.run, a.run.result.evidence.final_weights) for a in treatment.runs]
    same = [(run, final) for run, final in weights if final for key in ended[final] if key != run.key]
    if same and training_part(treatment.spec) != training_part(control.spec):
        seeds, digest = ", ".join(str(run.seed) for run, _ in same), str(same[0][1])
        what = f"the final weights are bit-identical (seed {seeds}): what differs did not act"
        yield Objection("identical", what, digest, digest)
        return
    answered = [(a, b) for a in treatment.runs for b in seeded[a.run.seed] if a.answers and b.answers]
    sites = [a.measured.profile.sites_digest == b.measured.profile.sites_digest for a, b in answered]
    if answered and all(sites) and all(a.answers == b.answers for a, b in answered):
        digest = str(answered[0][0].answers)
        yield Objection("identical", "every answer is the same on both sides: what differs did not act", digest, digest)


def _seeds(treatment: Side, control: Side) -> Iterator[Objection]:
    for side in (treatment, control):
        seeds = Counter(side_run.run.seed for side_run in side.runs if side_run.run.seed is not None)
        for seed, count in seeds.items():
            if count > 1:
                yield Objection("seeds", f"seed {seed} counts {count} times in {side.name}", f"{count} runs", "one")


def _steps(treatment: Side, control: Side, factors: Sequence[str]) -> Iterator[Objection]:
    """Yield numbers of different steps: where the steps or stages are a declared factor, the last ones are compared."""
    steps = _values(treatment, control, lambda run: run.measured.step)
    ends = all(run.measured.last for side in (treatment, control) for run in side.runs)
    declared = any(covered(key, factors) for key in (STEPS, START))
    if not (ends and declared and all(len(of_side) == 1 for of_side in steps)):
        meant = ends and len({run.steps[0] for side in (treatment, control) for run in side.runs}) > 1
        cure = f"where that is meant, declare it as a factor ({STEPS})" if meant else ""
        yield from (replace(objection, cure=cure) for objection in _unequal("step", "the evaluated step", steps))
    for side in (treatment, control):
        for key in side.unmeasured:
            yield Objection("step", f"{key} was not evaluated there", "no number", "the other runs have one")
        short = [run for run in side.runs if run.measured.last and run.steps[0] not in (None, run.steps[1])]
        if short:
            planned, done = short[0].steps
            yield Objection("step", f"a run of {side.name} stopped early", f"{done} steps done", f"{planned} asked for")


def _conditions(treatment: Side, control: Side, other_precision: bool) -> Iterator[Objection]:
    for key, kind in _CONDITIONS:
        sides = _values(treatment, control, partial(_condition, key=key))
        if kind == "precision" and other_precision and all(len(side) == 1 for side in sides):
            continue
        if key != "sites_digest" and sides[0] == sides[1] == {None}:
            yield Objection(kind, f"the evaluation's {key} is not known", *map(_listed, sides))
        yield from _unequal(kind, f"the evaluation's {key}", sides)
    yield from _unequal("items", "the number of answers", _values(treatment, control, lambda run: run.measured.n))


def _condition(run: SideRun, key: str) -> Any:
    """Return a condition by what acted, without the part of a label after its colon, which did not act."""
    value = getattr(run.measured.profile, key)
    if key != "precision" or value is None:
        return value
    acted = str(value).partition(": ")[0]
    return "full" if acted == "clean" else acted


def _code(treatment: Side, control: Side, factors: Sequence[str]) -> Iterator[Objection]:
    """Yield differences of code and libraries. Engines have libraries of their own: where they are a declared factor,
    only those that evaluated must be the same."""
    sides = _values(treatment, control, lambda run: run.run.result.code_digest)
    yield from _unequal("code", "the code that computed the results (rerun the stale side)", sides)
    engines = covered("engine", factors)
    for name, versions in _by_name(
        treatment, control, lambda run: (engines and run.result.evaluated_with) or run.result.versions
    ):
        if name not in _VERSIONS_IN_THE_CODE:
            yield from _unequal("code", f"{name}'s version", versions)


def _inputs(treatment: Side, control: Side, factors: Sequence[str]) -> Iterator[Objection]:
    linked = {name for side in (treatment, control) for name in _of_same_seed(side.spec)}
    for name, digests in _by_name(treatment, control, lambda run: run.inputs):
        declared = any(covered(key, [f]) or covered(f, [key]) for key in POINTERS.get(name, ()) for f in factors)
        if declared:
            continue
        if name in linked:
            yield from _unequal_at_a_seed(name, treatment, control)
        else:
            yield from _unequal("inputs", f"the {name}", digests)


def _of_same_seed(spec: Mapping[str, Any]) -> Iterator[str]:
    """Yield the inputs that are another run's weights, of the same seed: repeats differ in them."""
    for name, key in (("start model", START), ("teacher", TEACHER)):
        if (link_of(spec, key) or {}).get("arm"):
            yield name


def _unequal_at_a_seed(name: str, treatment: Side, control: Side) -> Iterator[Objection]:
    first, second = ({run.run.seed: run.run.inputs.get(name) for run in side.runs} for side in (treatment, control))
    for seed in first.keys() & second.keys():
        yield from _unequal("inputs", f"the {name} of seed {seed}", ({first[seed]}, {second[seed]}))


def _evidence(treatment: Side, control: Side) -> Iterator[Objection]:
    for side in (treatment, control):
        for run in (side_run.run for side_run in side.runs if side_run.run.gaps):
            yield Objection("evidence", f"{run.key} lacks evidence", "; ".join(run.gaps), "a run proves its treatment")


def _values(treatment: Side, control: Side, value: Callable[[SideRun], Any]) -> _Values:
    return {value(run) for run in treatment.runs}, {value(run) for run in control.runs}


def _by_name(
    treatment: Side, control: Side, table: Callable[[Run], Mapping[str, Any]]
) -> Iterator[tuple[str, _Values]]:
    """Yield every name in some run's table, with its values on both sides."""
    tables = [[table(side_run.run) for side_run in side.runs] for side in (treatment, control)]
    for name in sorted({name for side in tables for own in side for name in own}):
        first, second = ({own.get(name) for own in side} for side in tables)
        yield name, (first, second)


def _unequal(kind: Kind, what: str, sides: _Values) -> Iterator[Objection]:
    if len(sides[0] | sides[1]) > 1:
        yield Objection(kind, f"{what} differs", *map(_listed, sides))


def _listed(values: set[Any]) -> str:
    return ", ".join(sorted(in_few_words(value) for value in values))


def training_part(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a description that can affect weights: all but the evaluation and the seed."""
    part = {key: value for key, value in spec.items() if key not in ("evaluation", "seed")}
    injection = spec.get("injection")
    return part | {"injection": _trained_under(injection) if isinstance(injection, Mapping) else None}


def _trained_under(injection: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return an injection without the points that act in evaluations only; None where nothing is left."""
    during = ApplyDuring.model_validate(injection.get("apply_during") or {})
    phases = {phase: during.active(phase) for phase in PHASES if phase != "evaluation"}
    idle = {*FORMAT_POINTS, "errors"}.difference(*phases.values())
    table, *by_pattern = (
        {key: value for key, value in described.items() if key not in idle}
        for described in (injection, *(injection.get("by_pattern") or ()))
    )
    points = points_named(injection) - idle | ({"errors"} if table.get("errors") else set())
    if not points:
        return None
    # Mode and deployment are left out, since they only name the formats of the points.
    named = {key: value for key, value in table.items() if key not in ("mode", "deployment", "apply_during")}
    active = {phase: sorted(active & points) for phase, active in phases.items()}
    return named | {"by_pattern": by_pattern, "phases": active}
