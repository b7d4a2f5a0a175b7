"""Which formats and errors act where in a model, in which phases, and how gradients pass through them."""

import warnings
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, model_validator

from fp4rl.spec.deployment import DEPLOYMENTS, Deployment, deployment_named
from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest, shown
from fp4rl.spec.formats import Format
from fp4rl.spec.former_names import of_deployment, renaming
from fp4rl.spec.frozen import NoneIsAWord, Spec, later_key
from fp4rl.spec.hardware import HardwareError
from fp4rl.spec.points import (
    FORMAT_POINTS,
    GRADIENTS,
    LINEAR_POINTS,
    MODES,
    PHASES,
    ApplyDuring,
    Mode,
    PatternFormats,
    Phase,
    PointFormat,
    Smooth,
    can_clip,
    can_smooth,
    read_format,
)
from fp4rl.spec.precision import PrecisionSchedule
from fp4rl.spec.targets import Targets

T = TypeVar("T")
__all__ = ["MODES", "PHASES", "ApplyDuring", "Injection", "Phase"]


class Injection(Spec):
    """Quantization error and hardware errors in a model. `Injection.named("w4a16")` is the usual way to make one.

    In YAML a mode alone (`injection: w4a4`) or a mapping with an optional `mode`. `weight`, `input` and `output` are
    points of linear layers; `kv_cache` rounds keys and values per head; `grad_input` and `grad_weight` round the
    gradient that arrives, as an operand of the matmul that computes the one or the other. `deployment` sets the rules
    of a packer for weights and of a kernel for inputs. `dtype` is what the quantizer sees: weights and inputs are first
    cast to it, so that trainer, sampler and export round the same numbers. `straight_through: clipped` stops the
    gradient of values that were clipped; `smooth` multiplies gradients by a derivative of rounding. `by_pattern` lists
    exceptions, the first match counts; a pattern may be the word for a part of the model (`experts: mxfp4`, `attention:
    mxfp8`, `router: leave`). Groups that serving kernels fuse (q/k/v, gate/up) must agree unless `fused_groups` is
    `free`. `lora` says what is deployed: `adapter` Q(W) + BA, `merged` Q(W + sBA). `frozen_base: packed` keeps frozen
    weights as codes and scales alone; taking the injection out gives back the rounded weights, the only ones there are
    then. `schedule` gives points another format at first.
    """

    mode: str | None = Field(default=None, description=f"formats at once: {', '.join(MODES)}")
    deployment: str | None = Field(
        default=None, description="whose packer and kernel set scale rules and rounding; `fp4rl deployments` lists them"
    )
    weight: PointFormat = Field(default=None, description="weights of linear layers; `fp4rl formats` lists the formats")
    input: PointFormat = Field(default=None, description="inputs of their matmuls")
    output: PointFormat = Field(default=None, description="outputs of their matmuls")
    kv_cache: PointFormat = Field(default=None, description="keys and values, per head")
    grad_input: PointFormat = Field(default=None, description="the gradient, in the matmul of the input's gradient")
    grad_weight: PointFormat = Field(default=None, description="the gradient, in the matmul of the weight's gradient")
    by_pattern: tuple[PatternFormats, ...] = Field(default=(), description="exceptions; the first match counts")
    errors: tuple[HardwareError, ...] = ()
    targets: Targets = Targets()
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="what is rounded is cast to it first, whatever the model's own dtype"
    )
    straight_through: Literal["identity", "clipped", "smooth"] = Field(
        default="identity",
        description="clipped: no gradient for values that were clipped; smooth: times a smooth derivative of rounding",
    )
    smooth: Smooth = later_key(Smooth())
    apply_during: ApplyDuring = ApplyDuring()
    fused_groups: Literal["agree", "free"] = Field(
        default="agree", description="whether q/k/v and gate/up must have the same format"
    )
    lora: Literal["adapter", "merged"] = Field(
        default="adapter", description="what is deployed: Q(W) + BA, or Q(W + sBA)"
    )
    frozen_base: Literal["copy", "packed"] = Field(
        default="copy", description="packed: frozen weights are kept as codes and scales alone"
    )
    seed: int = Field(default=0, ge=0, description="for stochastic rounding and hardware errors")
    schedule: Annotated[PrecisionSchedule | None, NoneIsAWord] = later_key(None)

    @classmethod
    def named(cls, mode: str, deployment: str | None = None, **changes: Any) -> "Injection":
        """Return the injection of a mode under a deployment; raises NotFoundError with the nearest name."""
        if isinstance(former := changes.pop("preset", None), str):
            warnings.warn(renaming(former), FutureWarning, stacklevel=2)
            deployment = of_deployment({"deployment": deployment, "preset": former})["deployment"]
        if mode not in MODES:
            raise NotFoundError(f"no mode is called {mode!r}{nearest(mode, MODES)}")
        if deployment is not None:
            deployment_named(deployment)
        return cls(mode=mode, deployment=deployment, **changes)

    @property
    def name(self) -> str:
        """The mode and what comes on top of it, or the points and their formats where no mode says it."""
        beyond = [
            point for point in FORMAT_POINTS if getattr(self, point) and not (self.mode and point in LINEAR_POINTS)
        ]
        words = [self.mode] if self.mode else []
        words += [f"{point}:{getattr(self, point).name}" for point in beyond] + [error.name for error in self.errors]
        # Mixed or changing precision is not what its mode says alone.
        words += [key for key in ("by_pattern", "schedule") if getattr(self, key)]
        return "+".join(word for word in words if word) or "none"

    @property
    def is_nothing(self) -> bool:
        """Whether nothing would be done anywhere."""
        return not self.by_pattern and not self.errors and not any(getattr(self, point) for point in FORMAT_POINTS)

    @property
    def checkpoint_mode(self) -> str | None:
        """The mode of the checkpoint that is deployed: its own, else one of the same elements and kinds of scales."""
        own = _kinds(self)
        return self.mode or next((mode.name for mode in MODES.values() if _kinds(mode) == own), None)

    @property
    def points(self) -> frozenset[str]:
        """The points that have a format somewhere, gradients among them, and `errors` where there are any."""
        rows = (self, *self.by_pattern)
        points = {point for row in rows for point in FORMAT_POINTS if isinstance(getattr(row, point, None), Format)}
        return frozenset(points | ({"errors"} if self.errors else set()))

    def acts_in(self, phase: Phase) -> frozenset[str]:
        """Return those of its points that act in a phase."""
        return self.points & self.apply_during.active(phase)

    @property
    def formats(self) -> tuple[Format, ...]:
        """Every format that stands at a point with a forward, exceptions and those of the first steps included."""
        points = (*LINEAR_POINTS, "kv_cache")
        return tuple(fmt for point in points for fmt in (*self.formats_at(point), *self.formats_before(point)))

    def formats_at(self, point: str) -> tuple[Format, ...]:
        """Return the formats of a point, exceptions included."""
        formats = (getattr(row, point, None) for row in (self, *self.by_pattern))
        return tuple(fmt for fmt in formats if isinstance(fmt, Format))

    def formats_before(self, point: str) -> tuple[Format, ...]:
        """Return the format that a schedule gives a point in the first steps, none where there is none."""
        return self.schedule.before(point) if self.schedule is not None else ()

    @model_validator(mode="before")
    @classmethod
    def _expanded(cls, value: Any) -> Any:
        """Fill in the mode's formats for keys that are not given, and put the deployment's rules on every format."""
        value = {"mode": value} if isinstance(value, str) else value
        if not isinstance(value, Mapping):
            return value
        content = of_deployment(value)
        mode = _entry(MODES, content.get("mode"), "mode")
        deployment = _entry(DEPLOYMENTS, content.get("deployment"), "deployment")
        for point in LINEAR_POINTS:
            content.setdefault(point, getattr(mode, point) if mode else None)
        for point in (*LINEAR_POINTS, "kv_cache"):
            content[point] = _under(deployment, point, content.get(point))
        if isinstance(schedule := content.get("schedule"), Mapping):
            content["schedule"] = {point: _first(deployment, point, own) for point, own in schedule.items()}
        entries = _of_deployment(deployment, content, _entries(content.get("by_pattern", ())))
        if entries or "by_pattern" in content:
            content["by_pattern"] = [_exception(entry, content, deployment) for entry in entries]
        return content

    def _conflicts(self) -> Iterator[str]:
        mode = MODES.get(self.mode or "")
        for point in LINEAR_POINTS if mode else ():
            named, own = getattr(mode, point), getattr(self, point)
            if (named and named.element) != (own and own.element):
                yield (
                    f"mode {self.mode} means {point}: {named.name if named else 'none'}, but {point} is "
                    f"{own.name if own else 'none'}; drop `mode` and name the points"
                )
        yield from self._without_effect()
        yield from self._wrong_factors()
        if (self.lora == "merged" or self.frozen_base == "packed") and not self.weight:
            yield "lora: merged and frozen_base: packed round weights, but `weight` is none; name its format"
        if self.frozen_base == "packed" and self.apply_during.weight != PHASES:
            yield (
                "frozen_base: packed leaves no unrounded weight for any phase; "
                f"write apply_during: {{weight: [{', '.join(PHASES)}]}}"
            )
        if self.lora == "merged" and self.frozen_base == "packed":
            yield "lora: merged rounds the sum W + sBA, which needs the unpacked W; take frozen_base: copy"
        if self.schedule is not None:
            yield from self.schedule.wrong(
                {point: self.formats_at(point) for point in FORMAT_POINTS}, self.apply_during
            )
            if own := self.schedule.weight:
                if self.frozen_base == "packed":
                    yield "schedule.weight: packed weights have codes of one format; write frozen_base: copy"
                if self.lora == "merged" and own.before is None:
                    yield (
                        "schedule.weight.before: the sum of lora: merged is computed where it is rounded; name a "
                        "format, or write lora: adapter"
                    )

    def _wrong_factors(self) -> Iterator[str]:
        wrong: dict[str, tuple[str, ...]] = dict.fromkeys(("input", "output", "kv_cache"), ("fused",))
        wrong |= {"weight": ("per_token", "static"), **dict.fromkeys(GRADIENTS, ("static", "fused"))}
        for point, factors in wrong.items():
            for fmt in (*self.formats_at(point), *self.formats_before(point)):
                if fmt.factor in factors:
                    yield f"{point} {fmt.name}: factor {fmt.factor} is not for this point; leave it out here"
                if fmt.fallback and point != "input":
                    yield f"{point} {fmt.name}: fallback is for inputs, where outliers are; leave it out here"

    def _not_smooth(self) -> Iterator[str]:
        for point in self.smooth.points:
            at_point = (*self.formats_at(point), *self.formats_before(point))
            if not any(can_smooth(fmt) for fmt in at_point):
                yield f"straight_through: smooth would do nothing at {point}: no format there rounds to nearest levels"
            for fmt in at_point:
                if fmt.scale != "none" and not can_smooth(fmt):
                    how = "rotated" if fmt.rotation else "twice rounded" if fmt.fallback else None
                    why = f"a {how} value has no levels of its own" if how else f"it rounds {fmt.rounding}"
                    yield f"straight_through: smooth cannot act on {point} {fmt.name}: {why}; see smooth.points"

    def _without_effect(self) -> Iterator[str]:
        during = self.apply_during
        if self.straight_through == "clipped" and not any(can_clip(fmt) for fmt in self.formats):
            yield "straight_through: clipped would do nothing: no format here clips; take a floor or even rule"
        if self.straight_through == "smooth":
            yield from self._not_smooth()
        if self.straight_through != "identity":
            points = self.smooth.points if self.straight_through == "smooth" else (*LINEAR_POINTS, "kv_cache")
            if not any("training" in getattr(during, p) for p in points if getattr(self, p)):
                yield f"straight_through: {self.straight_through} would do nothing: no point is active in training"
        if any(error.when == "backward" for error in self.errors) and "training" not in during.errors:
            yield "an error in the backward would do nothing: apply_during.errors leaves training out"


def _kinds(formats: Injection | Mode) -> list[tuple[str, str] | None]:
    chosen = [getattr(formats, point) for point in LINEAR_POINTS]
    return [(fmt.element.name, fmt.scale) if fmt else None for fmt in chosen]


def _entry(table: Mapping[str, T], name: Any, what: str) -> T | None:
    if name is None:
        return None
    if not isinstance(name, str) or name not in table:
        raise InvalidValueError(f"no {what} is called {shown(name)}{nearest(str(name), table)}")
    return table[name]


def _under(deployment: Deployment | None, point: str, given: Any) -> Any:
    """Return the format at a point under the deployment's rules; what names no format passes as it is."""
    if given in (None, "none", "keep"):
        return given
    fmt = read_format(given)
    return fmt if deployment is None else deployment.at(point, fmt)


def _first(deployment: Deployment | None, point: str, own: Any) -> Any:
    """Return a point's schedule with its first format under the deployment's rules."""
    if not isinstance(own, Mapping) or "before" not in own:
        return own
    return {**own, "before": _under(deployment, point, own["before"])}


def _entries(value: Any) -> list[Any]:
    """Return `{pattern: format}` as a list, so that its order survives sorted JSON."""
    if isinstance(value, Mapping):
        return [{"pattern": pattern, "format": fmt} for pattern, fmt in value.items()]
    return list(value) if isinstance(value, list | tuple) else [value]


def _of_deployment(deployment: Deployment | None, content: Mapping[str, Any], entries: list[Any]) -> list[Any]:
    """Add what a deployment says of experts and of the rest, behind what is written and where nothing is."""
    formats = {point: content[point] for point in LINEAR_POINTS if content[point] not in (None, "none")}
    if deployment is None or deployment.beside_experts is None or not formats:
        return entries
    written = {entry["pattern"] if isinstance(entry, Mapping) else entry.pattern for entry in entries}
    own = {"experts": formats, "*": deployment.beside_experts}
    return entries + [{"pattern": word, "format": own[word]} for word in own if word not in written]


def _exception(entry: Any, content: Mapping[str, Any], deployment: Deployment | None) -> Any:
    """Return one exception. A bare format stands for every point that the injection rounds."""
    if not isinstance(entry, Mapping):
        return entry
    entry = dict(entry)
    if "format" in entry:
        fmt = entry.pop("format")
        fmt = "none" if fmt == "leave" else fmt
        rounded = [point for point in LINEAR_POINTS if content[point] not in (None, "none")] or ["weight"]
        entry |= fmt if isinstance(fmt, Mapping) and "name" not in fmt else dict.fromkeys(rounded, fmt)
    return {key: _under(deployment, key, given) if key in LINEAR_POINTS else given for key, given in entry.items()}
