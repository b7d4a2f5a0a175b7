"""The experiments of the documents: rows of one table, each a suite of its own beside its control, at two scales."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest
from fp4rl.spec.frozen import Spec
from fp4rl.spec.load import merge, parse, read_yaml

_TABLE = Path(__file__).with_name("experiments.yaml")
Scale = Literal["tiny", "full"]
_LAYERS = 28  # of the model that the rows speak of


class Step(Spec):
    """What comes next: rows, and why."""

    do: tuple[str, ...]
    why: str


class Row(Spec):
    """One experiment: what it changes of its group's base."""

    group: str
    about: str
    injection: str | dict[str, Any] | None = None
    leave_ends: bool = False
    noise: tuple[float, float] | None = Field(default=None, description="sigma at first and at last")
    kind: str = "geometric"
    stages: int = 10
    epochs: int = 1
    kinds: tuple[str, ...] = ("norm",)
    layers: dict[str, float] = Field(default_factory=dict)
    others: float = 1.0
    error: float | None = Field(default=None, description="relative, in matmuls forward and backward")
    lr_times: float = 1.0
    change: dict[str, Any] = Field(default_factory=dict)
    tiny: dict[str, Any] = Field(default_factory=dict)
    control: str | None = None
    factors: tuple[str, ...] = ()
    prediction: str = ""
    next: dict[str, Step] = Field(default_factory=dict)
    reported: tuple[str, ...] = ()
    refused: str | None = Field(default=None, description="what the description of the original is refused for")

    @property
    def rounds(self) -> bool:
        """Whether it has formats, so that its policy is judged as deployed too; errors of hardware alone are none."""
        return self.injection is not None

    @property
    def profile(self) -> str:
        """How its policy is judged."""
        return "deployment" if self.rounds else "full"


class Group(Spec):
    """What the rows of a group share; `lora` decides the learning rate at the tiny scale."""

    base: dict[str, Any]
    lora: bool = False
    tiny: dict[str, Any] = Field(default_factory=dict)


class _Scaling(Spec):
    layers: int
    over: dict[str, Any]
    lr: dict[str, float] = Field(default_factory=dict)
    steps_per_step: float = 1.0


class Table(Spec):
    """The whole table. `bands`: points of difference to the control from which a band begins."""

    bands: dict[str, float]
    scales: dict[Scale, _Scaling]
    groups: dict[str, Group]
    rows: dict[str, Row]


@cache
def table() -> Table:
    """Return the table of experiments, checked."""
    content = parse(Table, read_yaml(_TABLE), _TABLE.name)
    for name, row in content.rows.items():
        for other in (*((row.control,) if row.control else ()), *(do for step in row.next.values() for do in step.do)):
            if other not in content.rows:
                raise InvalidValueError(f"{_TABLE.name}: rows.{name} names {other!r}{nearest(other, content.rows)}")
    return content


def suite_of(name: str, scale: Scale) -> dict[str, Any]:
    """Return the suite of a row at a scale: its arm, its control and the question between them, as a file holds it.

    Raises NotFoundError, with the nearest name, for a row that is not in the table.
    """
    rows = table().rows
    if name not in rows:
        raise NotFoundError(f"no experiment {name!r} in the catalogue{nearest(name, rows)}")
    row = rows[name]
    described: dict[str, Any] = {name: _described(row, scale)}
    suite: dict[str, Any] = {
        "suite": name if scale == "full" else f"{name}-{scale}",
        "about": row.about,
        "prediction": row.prediction or None,
        "reported": list(row.reported) or None,
    }
    if row.control is not None:
        described = {row.control: _described(rows[row.control], scale)} | described
        if row.rounds and not rows[row.control].rounds and isinstance(row.injection, str):
            described[row.control]["evaluation"]["profiles"].append(row.injection)
        suite |= _questions(name, row)
    base = _common(list(described.values()))
    suite |= {"base": base, "arms": {arm: _beyond(content, base) for arm, content in described.items()}}
    return {key: value for key, value in suite.items() if value is not None}


def _common(contents: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what all contents have in common, key by key."""
    first, *others = contents
    shared: dict[str, Any] = {}
    for key, value in first.items():
        theirs = [other.get(key) for other in others]
        if all(isinstance(part, dict) for part in (value, *theirs)):
            shared[key] = _common([part for part in (value, *theirs) if isinstance(part, dict)])
        elif all(key in other and other[key] == value for other in others):
            shared[key] = value
    return shared


def _beyond(content: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that `content` has beyond `base`."""
    beyond: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            value = _beyond(value, base[key])
            if not value:
                continue
        elif key in base and base[key] == value:
            continue
        beyond[key] = value
    return beyond


def _questions(name: str, row: Row) -> dict[str, Any]:
    """Return the questions between a row and its control, and the bands of the difference with what they call for."""
    assert row.control is not None
    control = table().rows[row.control]
    keys = {
        "injection": _injection(row, _LAYERS) != _injection(control, _LAYERS),
        "noise": _noise(row, _LAYERS) != _noise(control, _LAYERS),
        "evaluation.profiles": row.rounds != control.rounds,
    }
    factors = [*(key for key, differs in keys.items() if differs), *row.factors]
    sides = {"treatment": f"{name}@{row.profile}", "control": f"{row.control}@{control.profile}"}
    with_precision = [*factors, "precision"] if row.rounds != control.rounds else factors
    questions = [{"question": f"{row.about}, against {control.about}", **sides, "factors": with_precision}]
    if row.rounds and not control.rounds and isinstance(row.injection, str):
        afterwards = {**sides, "control": f"{row.control}@{row.injection}", "factors": factors}
        questions.append({"question": "Does training so beat quantizing afterwards?", **afterwards})
    steps = {band: step.model_dump(mode="json") for band, step in row.next.items()}
    criterion = {"of": sides["treatment"], "against": sides["control"], "next": steps}
    return {"comparisons": questions, "criteria": [criterion | {"bands": {**table().bands, "fail": None}}]}


def _described(row: Row, scale: Scale) -> dict[str, Any]:
    """Return one experiment at a scale."""
    group, scaling = table().groups[row.group], table().scales[scale]
    content = merge(group.base, row.change)
    lr, steps = content["training"]["lr"], content["training"]["steps"]
    if scale == "tiny":
        content = merge(merge(merge(content, scaling.over), group.tiny), row.tiny)
        content["training"]["overlong_buffer"] = {}
        content["training"]["steps"] = max(1, round(scaling.steps_per_step * steps))
        lr = scaling.lr["lora" if group.lora else "whole"]
    else:
        content = merge(scaling.over, content)
    content["training"]["lr"] = lr * row.lr_times
    content["evaluation"]["profiles"] = ["full", *(["deployment"] if row.rounds else [])]
    for key, value in (("injection", _injection(row, scaling.layers)), ("noise", _noise(row, scaling.layers))):
        if value is not None:
            content[key] = value
    return content


def _injection(row: Row, layers: int) -> dict[str, Any] | None:
    content: dict[str, Any] = {}
    if row.injection is not None:
        content = {"mode": row.injection} if isinstance(row.injection, str) else dict(row.injection)
    if row.error is not None:
        content["errors"] = [{"kind": "relative", "point": "matmul", "when": "both", "scale": row.error}]
    if content and row.leave_ends:
        content["targets"] = {"leave": ["*layers.0.*", f"*layers.{layers - 1}.*"]}
    return content or None


def _noise(row: Row, layers: int) -> dict[str, Any] | None:
    if row.noise is None:
        return None
    first, last = row.noise
    schedule: dict[str, Any] = {"kind": row.kind, "sigma_start": first, "sigma_end": last}
    schedule |= {"epochs": row.epochs} if row.kind == "epoch_aware" else {"num_stages": row.stages}
    content: dict[str, Any] = {"schedule": schedule}
    if row.kinds != ("norm",):
        content["targets"] = {"kinds": list(row.kinds)}
    if row.layers or row.others != 1.0:
        content["multipliers"] = {"by_layer": _spread(row.layers, layers), "others": row.others}
    return content


def _spread(spans: Mapping[str, float], layers: int) -> dict[int, float]:
    """Return layer -> factor for a model of so many layers; of two that meet in a layer the first that is named."""
    by_layer: dict[int, float] = {}
    for span, factor in spans.items():
        first, _, last = span.partition("-")
        for layer in range(int(first), int(last or first) + 1):
            by_layer.setdefault(layer * layers // _LAYERS, factor)
    return dict(sorted(by_layer.items()))
