"""Kernels: what serves a 4-bit checkpoint, how it rounds the inputs of a matmul, and as which mode it computes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from fp4rl.spec.formats import Format
from fp4rl.spec.packers import EVEN, FLOOR, RCEIL, UOS, Checked, Rounds, Rules

MX_MODES = ("w4a16", "w4a8", "w4a4", "w8a8")
NVFP4_MODES = ("nvfp4_w4a16", "nvfp4_w4a4")
SERVED_MODES = (*MX_MODES, *NVFP4_MODES)


@dataclass(frozen=True)
class Served:
    """What a checkpoint is computed as: `mode`, or None where no kernel takes it; and under which condition.

    Of dense layers `multiple_of` must divide in_features, and `experts_alone` takes none.
    """

    mode: str | None
    note: str = ""
    multiple_of: int = 1
    experts_alone: bool = False


@dataclass(frozen=True)
class Kernel:
    """What computes the matmuls. `inputs` None: it leaves inputs as they are.

    `serves`: the mode of a checkpoint -> what it is computed as; a mode that is missing has not been looked up.
    """

    name: str
    hardware: str  # a phrase behind "on"
    inputs: Rules | None
    serves: Mapping[str, Served]
    checked: Checked
    source: str

    def rounds(self, fmt: Format) -> Rounds | None:
        """Return how the kernel rounds inputs in a format; None where it leaves them as they are."""
        return self.inputs.of(fmt) if self.inputs is not None else None


def _as_they_are(*modes: str) -> dict[str, Served]:
    return {mode: Served(mode) for mode in modes}


def _table(*parts: Mapping[str, Served]) -> Mapping[str, Served]:
    return MappingProxyType({mode: served for part in parts for mode, served in part.items()})


_NO_NVFP4 = {mode: Served(None, "Ascend has no NVFP4") for mode in NVFP4_MODES}
_MARLIN = "Marlin, with one warning in vLLM's log"

OCP_EMULATION = Kernel(
    "ocp",
    "any machine, by rounding before an ordinary matmul",
    FLOOR,
    _table(_as_they_are(*MX_MODES, *NVFP4_MODES)),
    "documented",
    "OCP Microscaling Formats (MX) v1.0, section 6.3",
)
COMPRESSED_TENSORS_EMULATION = Kernel(
    "compressed_tensors",
    "CPU and GPU by emulation (transformers; vLLM on ROCm)",
    EVEN,
    _table(
        {mode: Served(mode, "vLLM has no MXFP4 or NVFP4 kernel for CPUs") for mode in ("w4a16", "w4a4", *NVFP4_MODES)},
        {"w4a8": Served("w4a8", "bit for bit by transformers; what vLLM does on ROCm was not looked up")},
        _as_they_are("w8a8"),
    ),
    "bit-equal",
    "compressed-tensors 0.20 (tests/numerics/test_against_compressed_tensors.py, and whole models in "
    "tests/engines/checkpoints/test_compressed_tensors.py), vLLM's reference_mxfp4.py",
)
VLLM_BLACKWELL = Kernel(
    "vllm_blackwell",
    "NVIDIA Blackwell (SM100)",
    RCEIL,
    _table(
        {
            "w4a16": Served("w4a4", "vLLM takes any MXFP4 group without FP8 inputs for W4A4"),
            "w4a8": Served("w4a8", "if the group names float 8-bit inputs, dynamic per token or group; else W4A4"),
            "nvfp4_w4a4": Served("nvfp4_w4a4", "the inputs' FP32 factor is static or per token, never per call"),
        },
        _as_they_are("w4a4", "w8a8", "nvfp4_w4a16"),
    ),
    "read in source",
    "vLLM 0.32 with FlashInfer's mxfp4_quantize and mxfp8_quantize: amax / largest by an approximate reciprocal, the "
    "power of two rounded up; not confirmed on hardware",
)
VLLM_HOPPER = Kernel(
    "vllm_hopper",
    "NVIDIA Hopper and older (SM75 to SM90)",
    None,
    _table(
        {"w4a4": Served("w4a16", _MARLIN), "nvfp4_w4a4": Served("nvfp4_w4a16", _MARLIN)},
        _as_they_are("w4a16", "nvfp4_w4a16"),
    ),
    "read in source",
    "vLLM 0.32, Marlin: weights are decoded, inputs stay in 16 bits",
)
VLLM_ASCEND = Kernel(
    "vllm_ascend",
    "Ascend 950",
    Rules(Rounds("floor", "half_away"), Rounds("floor")),
    _table(
        {
            "w4a16": Served("w4a16", "routed experts alone; no such kernel for dense layers", experts_alone=True),
            "w4a8": Served("w4a8", "dense layers need in_features % 64 == 0", multiple_of=64),
            "w4a4": Served(
                "w4a4", "an odd in_features / 32 is padded; RL there rolls out W4A8, which alone is refreshed in place"
            ),
        },
        _as_they_are("w8a8"),
        _NO_NVFP4,
    ),
    "read in source",
    "vLLM-Ascend: npu_dynamic_mx_quant with scale_alg 0; MXFP4 with round_mode 'round' (half away from zero by its "
    "name), MXFP8 with 'rint'; not confirmed on hardware",
)
ASCEND_DUAL = Kernel(
    "vllm_ascend_dual",
    "Ascend 950",
    Rules(Rounds("floor", columns=512), Rounds("floor")),
    _table(
        {"w4a4": Served("w4a4", "with dual scales, as W4A4_MXFP4_DUALSCALE")},
        _NO_NVFP4,
    ),
    "documented",
    "CANN aclnnDynamicDualLevelMxQuant: an FP32 scale for 512 columns, floor and rint inside; not confirmed on "
    "hardware",
)
ASCEND_DUAL_64 = replace(
    ASCEND_DUAL,
    name="vllm_ascend_dual_64",
    inputs=Rules(Rounds("floor", columns=64), Rounds("floor")),
    source="vllm_ascend_dual with the 64 columns of the checkpoint; whether CANN's operation takes others than 512 was "
    "not looked up",
)
ASCEND_ROUND = replace(
    VLLM_ASCEND,
    name="vllm_ascend_round",
    inputs=Rules(Rounds("floor", "half_away"), Rounds("floor", "half_away")),
    checked="documented",
    source="vllm_ascend with round_mode 'round' for MXFP8 too, which it does not use",
)
CANN = Kernel(
    "cann",
    "Ascend 950",
    FLOOR,
    _table(_as_they_are(*MX_MODES), _NO_NVFP4),
    "documented",
    "CANN aclnnDynamicMxQuant: scale_alg 0 and round_mode rint, its defaults",
)
CANN_UOS = replace(
    CANN,
    name="cann_uos",
    inputs=UOS,
    source="CANN aclnnDynamicMxQuant: scale_alg 2 with dst_type_max 7.25, round_mode rint",
)
