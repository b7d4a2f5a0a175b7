"""Deployment presets: which scale rule and which rounding a target really uses, for weights and for matmul inputs.

`mxfp4` without a preset means `ocp`.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from types import MappingProxyType

from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest
from fp4rl.spec.formats import E2M1, E4M3, E5M2, FORMATS, MXFP8, Format, Rounding, ScaleRule


@dataclass(frozen=True)
class Preset:
    """What one deployment target does to MX formats; other formats, and stochastic ones, pass unchanged."""

    name: str
    rule: ScaleRule
    source: str
    weight_rounding: Rounding = "nearest_even"
    input_rounding: Rounding = "nearest_even"
    beside_experts: Format | None = None  # what else is rounded than routed experts, which have the mode's formats

    def at(self, point: str, fmt: Format) -> Format:
        """Return the format as this target rounds at `point`. Raises InvalidValueError where it sets another rule."""
        if fmt.scale != "e8m0" or fmt.rounding == "stochastic":
            return fmt
        rule, rounding = self.rule, self.weight_rounding if point == "weight" else self.input_rounding
        if rule == "uos" and fmt.element != E2M1:
            rule = "floor"  # dst_type_max exists for FP4 alone; the wider elements keep scale_alg 0
        if rule == "even" and fmt.element in (E4M3, E5M2):
            rule = "even_e2m1"  # compressed-tensors rounds the 8-bit scales with the threshold of the 4-bit ones
        known = FORMATS.get(fmt.name, fmt)
        for key, own, usual, fixed in (
            ("scale_rule", fmt.scale_rule, known.scale_rule, rule),
            ("rounding", fmt.rounding, known.rounding, rounding),
        ):
            if own not in (usual, fixed):
                raise InvalidValueError(
                    f"{fmt.name} sets {key} {own!r}, but preset {self.name!r} fixes {fixed!r}; drop one of them"
                )
        return replace(fmt, scale_rule=rule, rounding=rounding)


_ALL = (
    Preset("ocp", "floor", "OCP Microscaling Formats (MX) Specification v1.0, section 6.3"),
    Preset(
        "ascend950", "floor", "CANN aclnnDynamicMxQuant: scale_alg 0 (the OCP rule) and round_mode rint, its defaults"
    ),
    Preset("ascend950_uos", "uos", "CANN aclnnDynamicMxQuant: scale_alg 2 with dst_type_max 7.25, round_mode rint"),
    Preset(
        "ascend950_moe",
        "floor",
        "ascend950 as in msModelSlim's recipes for GLM and LongCat: the mode's formats on routed experts, MXFP8 on "
        "every other linear layer",
        beside_experts=MXFP8,
    ),
    Preset(
        "vllm_ascend",
        "floor",
        "vLLM-Ascend W4A4_MXFP4: weights as msModelSlim packed them, inputs by npu_dynamic_mx_quant "
        "with round_mode 'round' (half away from zero by its name; not confirmed on hardware)",
        input_rounding="half_away",
    ),
    Preset("vllm", "even", "compressed-tensors 0.20 (llm-compressor checkpoints) and vLLM's reference_mxfp4.py"),
    Preset(
        "modelopt",
        "rceil",
        "nvidia-modelopt 0.47 MXFP4QTensor; its pack path sends exact ties toward zero, which this preset does not "
        "imitate",
    ),
)

PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in _ALL})


def preset_named(name: str) -> Preset:
    """Return the preset of that name in `PRESETS`; raises NotFoundError, naming the nearest."""
    if name not in PRESETS:
        raise NotFoundError(f"no preset is called {name!r}{nearest(name, PRESETS)}")
    return PRESETS[name]


def accepted(weight: Format, preset: str | None) -> bool:
    """Return whether the preset, or any preset where none is named, rounds weights as the format says."""
    for target in PRESETS.values() if preset is None else (preset_named(preset),):
        with suppress(InvalidValueError):  # a rule of its own that the target does not have
            if target.at("weight", weight) == weight:
                return True
    return False
