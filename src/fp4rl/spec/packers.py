"""Packers: the tools that write 4-bit checkpoints, and by which rule each rounds the weights."""

from dataclasses import dataclass, replace
from typing import Literal

from fp4rl.spec.formats import E2M1, E4M3, E5M2, Format, Rounding, ScaleRule

Checked = Literal["bit-equal", "read in source", "documented"]
"""How an entry is known: by a test against the real package, from its source, or from what its maker writes."""


@dataclass(frozen=True)
class Rounds:
    """How an MX format is rounded: the rule of the block scale, and the rounding to the element."""

    rule: ScaleRule
    rounding: Rounding = "nearest_even"


@dataclass(frozen=True)
class Rules:
    """What a tool does to 4-bit and to 8-bit MX formats; None where it rounds neither."""

    mxfp4: Rounds
    mxfp8: Rounds

    def of(self, fmt: Format) -> Rounds:
        """Return how a format is rounded. Elements of other widths, which no tool packs, go as those of 8 bits."""
        if fmt.element == E2M1:
            return self.mxfp4
        if self.mxfp8.rule == "even_e2m1" and fmt.element not in (E4M3, E5M2):
            return replace(self.mxfp8, rule="even")
        return self.mxfp8


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

OCP = Packer("ocp", FLOOR, "float32", "documented", "OCP Microscaling Formats (MX) v1.0, section 6.3")
COMPRESSED_TENSORS = Packer(
    "compressed_tensors",
    EVEN,
    "the weight's own",
    "bit-equal",
    "compressed-tensors 0.20, which llm-compressor packs with (tests/numerics/test_against_compressed_tensors.py)",
)
TORCHAO_RCEIL = Packer(
    "torchao_rceil", RCEIL, "float32", "bit-equal", "torchao 0.18, RCEIL (tests/numerics/test_against_torchao.py)"
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
