"""Packers: the tools that write 4-bit checkpoints, and by which rule each rounds the weights."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from fp4rl.spec.formats import E2M1, E4M3, E5M2, Coarse, Format, Rounding, ScaleMath, ScaleRule

Checked = Literal["bit-equal", "read in source", "documented"]
"""How an entry is known: by a test against the real package, from its source, or from what its maker writes."""


@dataclass(frozen=True)
class Rounds:
    """How an MX format is rounded: the rule of the block scale and the rounding to the element, as a `Format` has them.

    `columns`: so many columns share an FP32 scale above the block scales; `least`: the least exponent of those.
    """

    rule: ScaleRule
    rounding: Rounding = "nearest_even"
    epsilon: float = 0.0
    math: ScaleMath = "exact"
    columns: int | None = None
    least: int | None = None

    def settings(self, fmt: Format) -> dict[str, Any]:
        """Return the settings of `fmt` that are fixed; columns that it names itself stay."""
        fixed: dict[str, Any] = {"scale_rule": self.rule, "rounding": self.rounding}
        fixed |= {"scale_epsilon": self.epsilon, "scale_math": self.math, "scale_min_exponent": self.least}
        return fixed | ({"coarse": fmt.coarse or Coarse(self.columns)} if self.columns else {})

    def __str__(self) -> str:
        """Return rule, epsilon, least scale, rounding and columns in a few words."""
        more = f" + {self.epsilon:g}" if self.epsilon else ""
        more += "" if self.least is None else f" from 2^{self.least} on"
        return f"{self.rule}{more}, {self.rounding}" + (f", FP32 for {self.columns} columns" if self.columns else "")


@dataclass(frozen=True)
class Rules:
    """What a tool does to 4-bit and to 8-bit MX formats."""

    mxfp4: Rounds
    mxfp8: Rounds

    def of(self, fmt: Format) -> Rounds:
        """Return how a format is rounded. Elements of other widths, which no tool packs, go as those of 8 bits."""
        if fmt.element == E2M1:
            return self.mxfp4
        if self.mxfp8.rule == "even_e2m1" and fmt.element not in (E4M3, E5M2):
            return replace(self.mxfp8, rule="even")
        return self.mxfp8

    def __str__(self) -> str:
        """Return both in a few words."""
        return f"MXFP4 {self.mxfp4}; MXFP8 {self.mxfp8}"


@dataclass(frozen=True)
class Packer:
    """A tool that packs checkpoints. `dtype`: what it computes the scales in."""

    name: str
    weights: Rules
    dtype: str
    checked: Checked
    source: str

    def rounds(self, fmt: Format) -> Rounds | None:
        """Return how the tool rounds weights in a format."""
        return self.weights.of(fmt)


FLOOR = Rules(Rounds("floor"), Rounds("floor"))
EVEN = Rules(Rounds("even"), Rounds("even_e2m1"))  # 8-bit scales, too, by the threshold of the 4-bit ones
RCEIL = Rules(Rounds("rceil"), Rounds("rceil"))
UOS = Rules(Rounds("uos"), Rounds("floor"))  # dst_type_max exists for FP4 alone
_OWN = "the weight's own"
_SHIPPED = "msModelSlim 26.1 (tests/numerics/test_against_msmodelslim.py)"
_MXFP8 = Rounds("floor", "half_added", math="tensor")
_MINMAX = Rounds("even", "half_added", 9.6e-7, "tensor")

OCP = Packer("ocp", FLOOR, "any", "documented", "OCP Microscaling Formats (MX) v1.0, section 6.3")
COMPRESSED_TENSORS = Packer(
    "compressed_tensors",
    EVEN,
    _OWN,
    "bit-equal",
    "compressed-tensors 0.20, which llm-compressor packs with (tests/numerics/test_against_compressed_tensors.py)",
)
TORCHAO_RCEIL = Packer(
    "torchao_rceil",
    RCEIL,
    "float32",
    "bit-equal",
    "torchao 0.18, RCEIL (tests/numerics/test_against_torchao.py), but for maxima a hair above a power of two",
)
MODELOPT = Packer(
    "modelopt",
    Rules(Rounds("rceil", "half_toward_zero", math="float32"), Rounds("rceil")),
    "float32",
    "bit-equal",
    "nvidia-modelopt 0.47, MXFP4QTensor (tests/numerics/test_against_modelopt.py); MXFP8 not looked up",
)
MSMODELSLIM = Packer(
    "msmodelslim", Rules(_MINMAX, _MXFP8), _OWN, "bit-equal", f"{_SHIPPED}: method minmax, also for MXFP8"
)
MSMODELSLIM_CEIL_X = Packer(
    "msmodelslim_ceil_x",
    Rules(replace(_MINMAX, rule="uos"), _MXFP8),
    _OWN,
    "bit-equal",
    f"{_SHIPPED}: method ceil_x with 7.25, its default; a value that it searches is not imitated",
)
MSMODELSLIM_FOUROVERSIX = Packer(
    "msmodelslim_fouroversix",
    Rules(Rounds("fouroversix", "half_added", math="tensor"), _MXFP8),
    _OWN,
    "bit-equal",
    f"{_SHIPPED}: method fouroversix, amax to 6 or to 4 by the smaller squared error",
)
MSMODELSLIM_DUALSCALE = Packer(
    "msmodelslim_dualscale",
    Rules(replace(_MINMAX, math="float32", columns=512), _MXFP8),
    "float32",
    "bit-equal",
    f"{_SHIPPED}: method dualscale; 512 columns as in its recipes, others by `coarse` of the format",
)
MSMODELSLIM_DUALSCALE_64 = replace(
    MSMODELSLIM_DUALSCALE,
    name="msmodelslim_dualscale_64",
    weights=Rules(replace(_MINMAX, math="float32", columns=64), _MXFP8),
    source=f"{_SHIPPED}: method dualscale with dual_block_size 64",
)
CANN = Packer(
    "cann", FLOOR, "float32", "documented", "CANN aclnnDynamicMxQuant: scale_alg 0 and round_mode rint, its defaults"
)
CANN_UOS = replace(
    CANN,
    name="cann_uos",
    weights=UOS,
    source="CANN aclnnDynamicMxQuant: scale_alg 2 with dst_type_max 7.25, round_mode rint",
)
AMCT = Packer(
    "amct",
    Rules(Rounds("round", "half_away", math="float32", least=-30), Rounds("floor")),
    "float32",
    "read in source",
    "CANN AMCT's mxfp4_qat (fake_quant.py): 2^round(log2(max(amax / 6, 2^-30))); MXFP8, which it has not, as CANN",
)
