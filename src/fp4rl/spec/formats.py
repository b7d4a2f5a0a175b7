"""Number formats as values: an element, the block that shares a scale, the scale's own format, and how both are
rounded.

A new format is a new value, never a new branch, and one entry here is all it takes:

    MXFP4 = add_format(Format("mxfp4", E2M1, block=(1, 32)))
    MXFP4_2D = add_format(replace(MXFP4, name="mxfp4_2d", block=(32, 32)))

Sources: OCP Microscaling Formats (MX) v1.0 for E8M0 and `floor`; NVIDIA's NVFP4. The numbers themselves
are made in `fp4rl.numerics`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from math import ceil, inf
from types import MappingProxyType
from typing import Any, Literal, get_args

from fp4rl.spec.elements import E2M1 as E2M1
from fp4rl.spec.elements import E2M3 as E2M3
from fp4rl.spec.elements import E3M2 as E3M2
from fp4rl.spec.elements import E4M3 as E4M3
from fp4rl.spec.elements import E5M2 as E5M2
from fp4rl.spec.elements import E8M7 as E8M7
from fp4rl.spec.elements import Element as Element
from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest

Scale = Literal["e8m0", "e4m3", "fp32", "none"]
ScaleRule = Literal["floor", "ceil", "rceil", "even", "even_e2m1", "uos", "round", "mse", "fouroversix", "amax"]
ScaleMath = Literal["exact", "tensor", "float64", "float32", "bfloat16", "float16"]
Rounding = Literal["nearest_even", "half_away", "half_added", "half_toward_zero", "toward_zero", "stochastic"]
CoarseChoice = Literal["max", "search"]
Factor = Literal["tensor", "per_token", "static", "fused"]

ROTATIONS = (16, 32, 64, 128)
UOS_LIMIT = 7.25  # Ascend's dst_type_max for E2M1: a block maximum up to 7.25 scales is clipped to 6, not rescaled


@dataclass(frozen=True)
class Coarse:
    """A second FP32 scale for every `columns` of a row, above the block scales (Ascend's two levels).

    `max` maps the macro-block's largest magnitude to the element's; `search` tries sixteen fractions of a power of
    two and keeps the one of least squared error.
    """

    columns: int = 512
    choice: CoarseChoice = "max"


@dataclass(frozen=True)
class Format:
    """How a tensor is rounded. `block`: the (rows, columns) of the last two axes that share a scale; None: all do.

    Blocks of one row run along the last axis, the reduction axis of a linear layer. `scale` is the block scale's
    own format: `e8m0` a power of two, `e4m3` under one FP32 scale for the tensor, `fp32`, or `none`. `scale_rule`
    picks the exponent of an `e8m0` scale from the block's largest magnitude; the other scales know one rule,
    `amax`. `scale_epsilon` is added to what the rule takes the logarithm of, and `scale_math` says in which arithmetic
    the rule is worked out: `exact`, or op by op in a dtype, as tools do (`tensor`: in that of the tensor itself). No
    scale is below 2^`scale_min_exponent`. `rotation` is the size of the Hadamard blocks along the last axis. `factor`:
    what has one FP32 number, above `e4m3` scales or as the scale: the `tensor`, each row (`per_token`), all calls
    (`static`, for a magnitude `calibrated`), or weights that a kernel fuses (`fused`). `fallback`: the share of a row's
    blocks, those of the largest magnitude, that are rounded twice, the second time what the first left (arXiv
    2503.08040). Refuses what means nothing.
    """

    name: str
    element: Element
    block: tuple[int, int] | None = (1, 32)
    scale: Scale = "e8m0"
    scale_rule: ScaleRule = "floor"
    rounding: Rounding = "nearest_even"
    coarse: Coarse | None = None
    rotation: int | None = None
    scale_epsilon: float = 0.0
    scale_math: ScaleMath = "exact"
    factor: Factor = "tensor"
    calibrated: float | None = None
    scale_min_exponent: int | None = None
    fallback: float | None = None

    def __post_init__(self) -> None:
        checks = (_wrong_words, _wrong_scale, _wrong_factor, _wrong_block, _wrong_fallback)
        for mistake in (mistake for check in checks for mistake in check(self)):
            raise InvalidValueError(f"{self.name}: {mistake}")

    @property
    def bits_per_value(self) -> float:
        """Bits for one value of a large tensor whose axes divide: those of every rounding of it."""
        return self.bits_once * (1 + (self.fallback or 0))

    @property
    def bits_once(self) -> float:
        """Bits for one rounding of a value of a large tensor whose axes divide: code, and its share of the scales."""
        bits = float(self.element.bits)
        if self.block is not None and self.scale != "none":
            bits += {"e8m0": 8, "e4m3": 8, "fp32": 32}[self.scale] / (self.block[0] * self.block[1])
        return bits + (32 / self.coarse.columns if self.coarse else 0)

    def twice(self, columns: int) -> int:
        """Return how many blocks of a row of so many columns are rounded twice: the share of them, rounded up."""
        if self.fallback is None or self.block is None:
            return 0
        return ceil(self.fallback * -(-columns // self.block[1]) - 1e-9)  # 0.28 * 25 is a hair above 7

    def passes(self, columns: int) -> float:
        """Return how often the blocks of a row of so many columns are rounded on average; 1 without a fallback."""
        return 1.0 if self.block is None else 1 + self.twice(columns) / -(-columns // self.block[1])

    @property
    def spans_rows(self) -> bool:
        """Whether values in different rows share a scale."""
        rows = self.block[0] if self.block is not None else 1
        return (self.scale in ("e4m3", "fp32") and self.factor in ("tensor", "fused")) or rows > 1


def _wrong_words(fmt: Format) -> Iterator[str]:
    words = {"scale": Scale, "scale_rule": ScaleRule, "rounding": Rounding, "scale_math": ScaleMath, "factor": Factor}
    for key, known in words.items():
        if (word := getattr(fmt, key)) not in get_args(known):
            yield f"{key} {word!r} is unknown{nearest(str(word), get_args(known))}"
    if fmt.coarse and fmt.coarse.choice not in get_args(CoarseChoice):
        yield f"coarse choice {fmt.coarse.choice!r} is unknown; known: max, search"


def _wrong_scale(fmt: Format) -> Iterator[str]:
    powers = fmt.scale == "e8m0"
    if powers == (fmt.scale_rule == "amax"):
        cure = "floor, ceil, rceil, even, uos, round, mse or fouroversix" if powers else "amax"
        yield f"a scale in {fmt.scale} takes the scale_rule {cure}, not {fmt.scale_rule!r}"
    if fmt.scale_rule in ("uos", "fouroversix") and fmt.element.largest != 6.0:
        yield f"scale_rule {fmt.scale_rule!r} is defined for E2M1 only; take floor, even or rceil"
    if fmt.scale_epsilon and (fmt.scale_rule in ("mse", "fouroversix", "amax") or not 0 < fmt.scale_epsilon < inf):
        yield f"scale_epsilon {fmt.scale_epsilon!r} must be 0, or above 0 where the scale_rule takes one logarithm"
    if fmt.scale_math != "exact" and fmt.scale_rule in ("mse", "amax"):
        yield f"scale_rule {fmt.scale_rule!r} is worked out exactly; scale_math {fmt.scale_math!r} changes other rules"
    least, single = fmt.scale_min_exponent, powers and fmt.scale_rule not in ("mse", "fouroversix")
    if least is not None and not (single and -127 <= least <= 0):
        yield f"scale_min_exponent {least} must be -127 to 0, for a scale_rule that considers one e8m0 scale alone"
    if fmt.scale == "none" and fmt.rounding != "nearest_even":
        yield f"rounding {fmt.rounding!r} needs a scaled format; without a scale take nearest_even"
    if fmt.coarse and not powers:
        yield f"a coarse scale stands above e8m0 block scales only, not above {fmt.scale}"


def _wrong_factor(fmt: Format) -> Iterator[str]:
    known = ("e4m3",) if fmt.factor == "fused" else ("e4m3", "fp32")
    if fmt.factor != "tensor" and (fmt.scale not in known or (fmt.block or (1, 1))[0] > 1):
        yield f"factor {fmt.factor!r} is for scales in {' or '.join(known)} that span no two rows"
    if (fmt.factor == "static") != (fmt.calibrated is not None):
        yield "factor static goes with `calibrated`, a largest magnitude: `fp4rl scan MODEL --calibrate FILE` finds it"
    if fmt.calibrated is not None and not 0 < fmt.calibrated < inf:
        yield f"calibrated {fmt.calibrated!r} must be a magnitude above 0"


def _wrong_block(fmt: Format) -> Iterator[str]:
    whole = fmt.scale in ("fp32", "none")
    if whole != (fmt.block is None):
        yield f"a scale in {fmt.scale} {'is one for the tensor: block None' if whole else 'needs a block'}"
    if fmt.block is not None and (len(fmt.block) != 2 or min(fmt.block) < 1):
        yield f"block {fmt.block} must be (rows, columns), each at least 1"
    elif fmt.coarse and fmt.block and (fmt.block[0] != 1 or fmt.coarse.columns % fmt.block[1]):
        yield f"coarse columns {fmt.coarse.columns} must hold whole one-row blocks of {fmt.block[1]}"
    if fmt.rotation is not None and fmt.rotation not in ROTATIONS:
        yield f"rotation {fmt.rotation} is not one of {', '.join(map(str, ROTATIONS))}"


def _wrong_fallback(fmt: Format) -> Iterator[str]:
    if fmt.fallback is None:
        return
    if not 0 < fmt.fallback <= 1:
        yield f"fallback {fmt.fallback!r} must be a share of a row's blocks, above 0, at most 1; for none leave it out"
    if fmt.block is None or fmt.block[0] != 1 or not (fmt.scale == "e8m0" or fmt.factor == "per_token"):
        yield "fallback chooses among a row's own blocks: take blocks of one row, under e4m3 scales factor: per_token"
    if fmt.rotation is not None or fmt.rounding == "stochastic":
        yield "fallback goes with no rotation and no stochastic rounding; leave one of them out"


_LISTED: dict[str, Format] = {}
FORMATS: Mapping[str, Format] = MappingProxyType(_LISTED)


def add_format(fmt: Format) -> Format:
    """List `fmt` in FORMATS, for spec files, profiles and every verb; InvalidValueError for a name that is taken."""
    if fmt.name in FORMATS:
        raise InvalidValueError(f"there is a number format called {fmt.name!r} already; take another name")
    _LISTED[fmt.name] = fmt
    return fmt


MXFP4 = add_format(Format("mxfp4", E2M1))
MXFP4_SR = add_format(replace(MXFP4, name="mxfp4_sr", scale_rule="rceil", rounding="stochastic"))  # no clipping
MXFP4_2D = add_format(replace(MXFP4, name="mxfp4_2d", block=(32, 32)))
MXFP4_B16 = add_format(replace(MXFP4, name="mxfp4_b16", block=(1, 16)))
MXFP4_DUAL = add_format(replace(MXFP4, name="mxfp4_dual", coarse=Coarse(512)))
MXFP6_E2M3 = add_format(Format("mxfp6_e2m3", E2M3))
MXFP6_E3M2 = add_format(Format("mxfp6_e3m2", E3M2))
MXFP8 = add_format(Format("mxfp8", E4M3))
MXFP8_E5M2 = add_format(Format("mxfp8_e5m2", E5M2))
NVFP4 = add_format(Format("nvfp4", E2M1, block=(1, 16), scale="e4m3", scale_rule="amax"))
FP8 = add_format(Format("fp8", E4M3, block=None, scale="fp32", scale_rule="amax"))
BF16 = add_format(Format("bf16", E8M7, block=None, scale="none", scale_rule="amax"))


def format_named(name: str) -> Format:
    """Return the format of that name in `FORMATS`; raises NotFoundError, naming the nearest."""
    if name not in FORMATS:
        raise NotFoundError(f"no number format is called {name!r}{nearest(name, FORMATS)}")
    return FORMATS[name]


def format_of(value: object) -> Format:
    """Return the format that a spec file names, or describes as `{name: mxfp4, scale_rule: even, block: 16, ...}`.

    A mapping starts from the format of that name. `block` is columns or [rows, columns]; `coarse` is columns or
    `{columns: 512, choice: search}`. Raises NotFoundError for an unknown name or key, InvalidValueError for a value
    that cannot stand there.
    """
    if isinstance(value, Format):
        return value
    if isinstance(value, str):
        return format_named(value)
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise InvalidValueError(
            f"a format is a name or a mapping with a name, not {value!r}; try mxfp4 or {{name: mxfp4, block: 16}}"
        )
    fmt = format_named(value["name"])
    changes = {key: _field_of(fmt.name, key, given) for key, given in value.items() if key != "name"}
    return replace(fmt, **changes)


def _field_of(name: str, key: object, given: Any) -> Any:
    whole = isinstance(given, int) and not isinstance(given, bool)
    match key:
        case "scale_rule" | "rounding" | "scale_math" | "factor" if isinstance(given, str):
            return given
        case "scale_epsilon" | "calibrated" | "fallback" if whole or isinstance(given, float):
            return float(given)
        case "rotation" | "calibrated" | "scale_min_exponent" | "fallback" if given is None or whole:
            return given
        case "block" if whole:
            return (1, given)
        case "block" if isinstance(given, list | tuple) and all(type(n) is int for n in given):
            return tuple(given)
        case "coarse" if given is None or isinstance(given, Coarse):
            return given
        case "coarse" if whole:
            return replace(Coarse(), columns=given)
        case "coarse" if isinstance(given, Mapping) and set(given) <= {"columns", "choice"}:
            return Coarse(**given)
    if key in _SETTINGS:
        raise InvalidValueError(f"{name}: {key} cannot be {given!r}")
    raise NotFoundError(f"{name}: no format setting is called {key!r}{nearest(str(key), _SETTINGS)}")


_RULES = ("scale_rule", "rounding", "block", "coarse", "rotation")
_SETTINGS = (*_RULES, "scale_epsilon", "scale_math", "factor", "calibrated", "scale_min_exponent", "fallback")


def describe(fmt: Format) -> str | dict[str, object]:
    """Return what `format_of` reads back, ready for JSON: the name alone, or the name and what differs from it."""
    known = format_named(fmt.name)
    if fmt == known:
        return fmt.name
    changed = {key: value for key in _SETTINGS if (value := getattr(fmt, key)) != getattr(known, key)}
    return {"name": fmt.name} | {key: _plain(value) for key, value in changed.items()}


def _plain(value: object) -> object:
    match value:
        case Coarse():
            return asdict(value)
        case (1, int() as columns):
            return columns
        case tuple():
            return list(value)
    return value
