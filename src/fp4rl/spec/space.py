"""A space of recipes, how they are screened and how the chosen recipe is judged: what `fp4rl search` reads."""

import os
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from fp4rl.spec.errors import InvalidValueError, nearest
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.frozen import Spec, at_home
from fp4rl.spec.keys import keys_at, wrong_part
from fp4rl.spec.linked import arms_needed
from fp4rl.spec.load import check_name, merge, parse, read_spec
from fp4rl.spec.own_code import beside

_LONGEST_LABEL = 40
# Of these the search itself sets the values of every candidate.
_OF_THE_SEARCH = ("seed", "training.steps", "training.epochs", "evaluation")


class Choice(Spec):
    """One choice of a dimension: the keys of an experiment that it sets, under the name by which it is shown."""

    name: str = Field(min_length=1)
    set: dict[str, Any] = Field(default_factory=dict, description="keys and values, by nested keys or dotted paths")


class Range(Spec):
    """Every number between two."""

    low: PositiveFloat
    high: PositiveFloat
    log: bool = Field(default=False, description="whether equal ratios are equally likely, instead of differences")

    def _conflicts(self) -> Iterator[str]:
        if self.low >= self.high:
            yield f"low: {self.low:g} is not below high {self.high:g}"


class Screening(Spec):
    """How candidates are tried and dropped, on problems and seeds that do not judge.

    Each round trains what is left for more steps than the round before; one candidate in `one_in` goes on.
    """

    rungs: tuple[PositiveInt, ...] = Field(
        default=(20, 60), min_length=1, description="training steps of each round, rising; the last are the recipe's"
    )
    one_in: int = Field(default=3, ge=2, description="of so many candidates one goes on to the next round")
    seeds: tuple[NonNegativeInt, ...] = Field(
        default=(0, 1, 2, 3, 4),
        min_length=1,
        description="the first is every candidate's; the others where they are close",
    )
    split: Literal["validation", "test"] = "validation"
    count: PositiveInt = Field(default=200, description="problems")
    candidates: PositiveInt = Field(default=64, description="at most; a smaller space is tried whole")
    seed: NonNegativeInt = Field(default=0, description="of the order of candidates, and of what TPE draws")

    def _conflicts(self) -> Iterator[str]:
        if list(self.rungs) != sorted(set(self.rungs)):
            yield f"rungs: {list(self.rungs)} do not rise; each round trains for more steps than the one before"
        if len(set(self.seeds)) < len(self.seeds):
            yield f"seeds: one is named twice in {list(self.seeds)}"


class Final(Spec):
    """How the chosen recipe is judged: on the test split, over seeds that nothing was chosen by."""

    seeds: tuple[NonNegativeInt, ...] = Field(min_length=2, description="fresh ones, of the recipe and of its control")
    count: PositiveInt = Field(default=500, description="problems of the test split")
    margin: PositiveFloat = Field(description="of non-inferiority, a share: 0.01 is one point of accuracy")

    def _conflicts(self) -> Iterator[str]:
        if len(set(self.seeds)) < len(self.seeds):
            yield f"seeds: one is named twice in {list(self.seeds)}"


Dimension = Range | tuple[Choice, ...]


def _choices(value: Any) -> Any:
    """Write out a space: a list of values becomes named choices of its key."""
    if not isinstance(value, Mapping):
        return value
    return {key: [_choice(str(key), each) for each in own] if _is_list(own) else own for key, own in value.items()}


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _choice(key: str, value: Any) -> Any:
    if isinstance(value, Choice) or (isinstance(value, Mapping) and "name" in value and {*value} <= {"name", "set"}):
        return value
    return {"name": _label(value), "set": {key: value}}


def _label(value: Any) -> str:
    if isinstance(value, Mapping):
        text = ", ".join(f"{key} {_label(own)}" for key, own in value.items())
    else:
        text = "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= _LONGEST_LABEL else f"{text[: _LONGEST_LABEL - 3]}..."


class Space(Spec):
    """Recipes that share a `base` and differ in the dimensions of a `space`; the best is found and then judged.

    `stages` are arms that candidates may start from or be taught by. A combination that a description refuses is no
    candidate. `judged` is the profile of the candidates; the control is judged as `full`.
    """

    search: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=140, description="names the folders under runs/"
    )
    about: str | None = Field(default=None, description="what is searched for, in words")
    base: dict[str, Any] = Field(default_factory=dict, description="what all share: the keys of an experiment")
    stages: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="arms that candidates may start from or be taught by"
    )
    space: Annotated[dict[str, Dimension], BeforeValidator(_choices)] = Field(
        min_length=1, description="a key and its choices, a range {low, high, log}, or a name and choices {name, set}"
    )
    judged: str = Field(default="deployment", description="the profile under which candidates are judged")
    control: dict[str, Any] | None = Field(
        default=None, description="the unquantized control's keys; by default it is made at the recipe's own budget"
    )
    screening: Screening = Screening()
    final: Final

    @model_validator(mode="after")
    def _keys_are_known(self) -> "Space":
        parts = [("base", self.base), *((f"stages.{name}", own) for name, own in self.stages.items())]
        parts += [("control", self.control or {})]
        parts += [
            (f"space.{name}", choice.set)
            for name, own in self.space.items()
            for choice in (own if isinstance(own, tuple) else (Choice(name=name, set={name: own.low}),))
        ]
        for where, content in parts:
            for key in content:
                _require_key(where, key)
            own = next((key for key in _paths(content) if where.startswith("space.") and _is_or_below(key)), None)
            if own is not None:
                raise ValueError(f"{where}: {own}: the search sets it for every candidate; see `screening`")
        return self

    @property
    def size(self) -> int | None:
        """The number of combinations; None where a dimension is a range."""
        if any(isinstance(own, Range) for own in self.space.values()):
            return None
        return prod(len(own) for own in self.space.values() if isinstance(own, tuple))

    @property
    def sampler(self) -> Literal["grid", "tpe"]:
        """How candidates are drawn: all combinations where they are few enough, else by TPE."""
        return "grid" if self.size is not None and self.size <= self.screening.candidates else "tpe"

    def _conflicts(self) -> Iterator[str]:
        for name, own in self.space.items():
            if isinstance(own, tuple) and len({choice.name for choice in own}) < max(len(own), 1):
                yield f"space.{name}: " + ("a choice stands twice" if own else "is empty; name at least one choice")
        if shared := sorted({*self.screening.seeds} & {*self.final.seeds}):
            seeds = ", ".join(map(str, shared))
            yield (
                f"final.seeds: {seeds} chooses in screening.seeds too, and what chose cannot judge; name fresh seeds"
            )


def _paths(content: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for key, value in content.items():
        yield f"{above}{key}"
        if isinstance(value, Mapping):
            yield from _paths(value, f"{above}{key}.")


def _is_or_below(key: str) -> bool:
    return any(key == own or key.startswith(f"{own}.") for own in _OF_THE_SEARCH)


def _require_key(where: str, key: str) -> None:
    parts = key.split(".")
    wrong = wrong_part(Experiment, parts)
    if wrong is not None:
        raise ValueError(f"{where}: {key!r} is no key{nearest(parts[wrong], keys_at(Experiment, parts[:wrong]))}")


def load_space(path: str | os.PathLike[str]) -> Space:
    """Read a space from a YAML file. Raises NotFoundError for a missing file, and InvalidValueError, which names file,
    key and cure, for what is not allowed in it: also for a base, a stage or a control that is no experiment."""
    space = parse(Space, beside(read_spec(path), Path(at_home(path)).parent), str(path))
    for name, own in (*space.stages.items(), ("control", space.control or {})):
        check_name(name, f"{path}: stages:")
        stage = parse(Experiment, merge(space.base, own), f"{path}: {name}")
        for key, arm in arms_needed(stage).items():
            if arm not in space.stages:
                raise InvalidValueError(f"{path}: {name}: {key}.arm: no stage is called {arm!r}")
    return space
