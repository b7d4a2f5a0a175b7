"""The words for dense low-precision arithmetic: which formats stand at which points of a linear layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from fp4rl.spec.formats import MXFP4, MXFP8, NVFP4, Format

Phase = Literal["rollout", "training", "evaluation", "reference"]
PHASES: tuple[Phase, ...] = get_args(Phase)


@dataclass(frozen=True)
class Mode:
    """Formats of a linear layer's weight, of the input of its matmul, and of its output; None leaves one as it is.

    Blocks run along in_features, the reduction axis of the matmul, for weights and inputs alike.
    """

    name: str
    weight: Format | None
    input: Format | None
    output: Format | None
    meaning: str


MODES: Mapping[str, Mode] = MappingProxyType(
    {
        mode.name: mode
        for mode in (
            Mode("none", None, None, None, "nothing is rounded"),
            Mode("w4a16", MXFP4, None, None, "MXFP4 weights"),
            Mode("w4a8", MXFP4, MXFP8, None, "MXFP4 weights, MXFP8 matmul inputs: a dense mode of Ascend"),
            Mode("w4a4", MXFP4, MXFP4, None, "MXFP4 weights and matmul inputs, as 4-bit kernels compute"),
            Mode("w16a4", None, MXFP4, None, "MXFP4 matmul inputs alone, to tell their error from the weights'"),
            Mode("w8a8", MXFP8, MXFP8, None, "MXFP8 weights and matmul inputs"),
            Mode("nvfp4_w4a16", NVFP4, None, None, "NVFP4 weights"),
            Mode("nvfp4_w4a4", NVFP4, NVFP4, None, "NVFP4 weights and matmul inputs"),
            Mode("w4a4_out", MXFP4, None, MXFP4, "MXFP4 weights and outputs; only to repeat older results"),
        )
    }
)
