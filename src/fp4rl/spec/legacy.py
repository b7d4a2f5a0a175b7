"""Settings of the verl fork that this work grew from, read as an injection and noise, with a warning for each trap.

Three families: `...hw_error_injection.KEY` (and `...hw_error_injection_config.KEY` of the rollout), the environment
variables `VERL_NOISY_OPS_KEY`, and the noise of `legacy_noise`. Whoever calls reads files and environments; this only
translates.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fp4rl.spec.errors import InvalidValueError, nearest
from fp4rl.spec.injection import Injection
from fp4rl.spec.legacy_noise import FAMILY, noise_of, require_word
from fp4rl.spec.noise import Noise
from fp4rl.spec.plain_yaml import plain_values

PREFIX = "VERL_NOISY_OPS_"
_FAMILY = ("hw_error_injection.", "hw_error_injection_config.", "hw_error_injection_enabled")
_DEFAULTS: dict[str, Any] = {
    "enabled": False,
    "error_scale": 1e-5,
    "error_type": "relative_gaussian",
    "injection_point": "input",
    "target_modules": ["rmsnorm"],
    "target_layers": None,
    "apply_during": "both",
    "seed": None,
    "deadzone_threshold": 0.01,
    "mxfp4_stochastic_rounding": False,
    "mxfp4_block_2d": False,
    "nvfp4_stochastic_rounding": False,
    "exclude_modules": None,
    "use_ste": True,
}
_NOISY_OPS = ("ENABLED", "SCALE", "TYPE", "FORWARD_ONLY", "BACKWARD_ONLY", "TRAINING_ONLY", "ALL_OPS", "SKIP_VLLM")
_KINDS = {"relative_gaussian": "relative", "absolute_gaussian": "absolute", "systematic_bias": "bias"}
_FORMATS = ("mxfp4", "nvfp4", "fp8")
_POINTS = {"weight": ("weight",), "input": ("input",), "output": ("output",), "both": ("weight", "input")}
_MODES = {"weight": "w4a16", "both": "w4a4"}  # of plain mxfp4
_PHASES = {"rollout": ["rollout", "evaluation"], "training": ["training"]}
_EVERYWHERE = ["rollout", "training", "evaluation"]


@dataclass(frozen=True)
class Translation:
    """What settings of the verl fork become here, with a warning for what they did not do or did silently."""

    injection: Injection
    warnings: tuple[str, ...]
    noise: Noise | None = None
    speaks_of: tuple[str, ...] = ("injection",)

    def fragment(self) -> dict[str, Any]:
        """Return a fragment for `fp4rl run SPEC +FILE`, of injection or noise only as far as the settings have them."""
        given = self.injection.model_dump(mode="json", exclude_defaults=True)
        injection = {"mode": None, **given} if given else "none"  # a mode that the spec names must not stay
        noise = self.noise.model_dump(mode="json") if self.noise else "none"
        if isinstance(noise, dict):  # a list where there are no layers: mappings merge, and a spec's factors would stay
            noise["multipliers"]["by_layer"] = noise["multipliers"]["by_layer"] or []
        return {key: value for key, value in (("injection", injection), ("noise", noise)) if key in self.speaks_of}


def translate(settings: Mapping[str, Any]) -> Translation:
    """Translate settings of the fork, by dotted key or variable name; keys of other families are left alone.

    Raises InvalidValueError for an unknown key of the families, an unknown value, and settings that never could act.
    """
    if not any(FAMILY in key for key in settings):
        return _errors_of(settings)
    plain = {key: plain_values(value, key) if isinstance(value, str) else value for key, value in settings.items()}
    noise, lines = noise_of(plain)
    if not any(key.startswith(PREFIX) or any(part in key for part in _FAMILY) for key in settings):
        return Translation(Injection(), lines, noise, ("noise",))
    errors = _errors_of(settings)
    return replace(errors, warnings=(*errors.warnings, *lines), noise=noise, speaks_of=("injection", "noise"))


def _errors_of(settings: Mapping[str, Any]) -> Translation:
    old = {key: value for key, value in settings.items() if any(part in key for part in _FAMILY)}
    noisy = {key.removeprefix(PREFIX): str(value) for key, value in settings.items() if key.startswith(PREFIX)}
    if not (old or noisy):
        raise InvalidValueError(
            f"no setting of the verl fork here: expected keys with hw_error_injection or {FAMILY} in them, "
            f"or {PREFIX}... variables"
        )
    if noisy and _yes(noisy.get("ENABLED", "")):
        if old:
            raise InvalidValueError(
                f"both {PREFIX}... and hw_error_injection are set, which injected errors twice; translate one of them"
            )
        return _from_noisy_ops(noisy)
    return _from_hooks(_known(old)) if old else Translation(Injection(), (f"{PREFIX}ENABLED is not 1: nothing acts",))


def _known(old: Mapping[str, Any]) -> dict[str, Any]:
    content = dict(_DEFAULTS)
    for path, value in old.items():
        key = path.rpartition(".")[2].removeprefix("hw_error_injection_").lstrip("+'")
        if key not in _DEFAULTS:
            raise InvalidValueError(f"{path}: the verl fork had no {key!r}{nearest(key, _DEFAULTS)}")
        content[key] = plain_values(value, path) if isinstance(value, str) else value
    return content


def _from_hooks(old: dict[str, Any]) -> Translation:
    kind = old["error_type"]
    require_word("error_type", kind, (*_KINDS, *_FORMATS, "deadzone"))
    require_word("injection_point", old["injection_point"], _POINTS)
    if not old["enabled"]:
        return Translation(Injection(), ("enabled is false: nothing acts",))
    content: dict[str, Any] = {"targets": _targets(old), "seed": old["seed"] or 0}
    if kind not in _FORMATS or old["apply_during"] in _PHASES:  # formats act everywhere by themselves
        content["apply_during"] = _PHASES.get(old["apply_during"], _EVERYWHERE)
    content |= _rounding(old) if kind in _FORMATS else {"errors": [_error(old, content["targets"])]}
    return Translation(Injection.model_validate(content), tuple(_traps(old)))


def _rounding(old: Mapping[str, Any]) -> dict[str, Any]:
    fmt = old["error_type"]
    if fmt == "mxfp4" and old["mxfp4_stochastic_rounding"]:
        fmt = "mxfp4_sr"
    elif fmt == "mxfp4" and old["mxfp4_block_2d"]:
        fmt = "mxfp4_2d"
    elif fmt == "nvfp4" and old["nvfp4_stochastic_rounding"]:
        fmt = {"name": "nvfp4", "rounding": "stochastic"}
    if fmt == "mxfp4" and old["injection_point"] in _MODES:
        return {"mode": _MODES[old["injection_point"]]}
    return dict.fromkeys(_POINTS[old["injection_point"]], fmt)


def _error(old: Mapping[str, Any], targets: Any) -> dict[str, Any]:
    kind, point = old["error_type"], old["injection_point"]
    if point in ("weight", "both"):
        raise InvalidValueError(
            f"injection_point {point} with error_type {kind} never acted on a weight; write injection_point: output"
        )
    where = {"point": "matmul" if point == "output" else "input", "targets": targets}
    if kind == "deadzone":
        return where | {"kind": "dead_zone", "scale": old["deadzone_threshold"], "unit": "largest"}
    if [word.lower() for word in old["target_modules"] or ["rmsnorm"]] == ["rmsnorm"]:
        raise InvalidValueError(
            "target_modules is ['rmsnorm'] (the fork's default): it met norms, which no 4-bit kernel rounds; "
            "write target_modules: [linear]"
        )
    return where | {"kind": _KINDS[kind], "scale": old["error_scale"]}


def _targets(old: Mapping[str, Any]) -> dict[str, Any]:
    """Return the targets: the fork matched words anywhere in a name. `base_layer`, the adapted weight, is kept in."""
    words = [word for word in old["target_modules"] or [] if word.lower() not in ("linear", "rmsnorm")]
    left = [word for word in old["exclude_modules"] or [] if word not in ("base_layer", "lm_head", "embed_tokens")]
    leave = [f"*{word}.*" if word.rpartition(".")[2].isdigit() else f"*{word}*" for word in left]
    targets: dict[str, Any] = {"leave": [p for p in leave if not p.startswith("*lora_")]}
    if words:
        targets["take"] = [f"*{word}*" for word in words]
    if old["target_layers"] is not None:
        targets["layers"] = list(old["target_layers"])
    return targets


def _traps(old: Mapping[str, Any]) -> list[str]:
    kind, point, left = old["error_type"], old["injection_point"], old["exclude_modules"]
    rounds = kind in _FORMATS
    rounds_weights = rounds and point in ("weight", "both")
    head_met = left is not None and "lm_head" not in left
    numbers = any(str(word)[-1:].isdigit() for word in left or [])
    stochastic = old["mxfp4_stochastic_rounding"] or old["nvfp4_stochastic_rounding"]
    lines = {
        "apply_during: both was on in validation too; it is kept here, take evaluation out of apply_during for clean "
        "scores": old["apply_during"] != "training",
        "injection_point: both rounded weights and, depending on the version, inputs or outputs; here it is inputs, as "
        "kernels do (mode w4a4_out repeats the other)": point == "both",
        "injection_point: output rounds after the layer, which no kernel does": rounds and point == "output",
        "use_ste: false let the backward see unrounded numbers; here it always meets rounded ones": not old["use_ste"],
        "hooks swapped weights, lost after a forward without backward; here none is written": rounds_weights,
        "fp8 at the weight did nothing, and elsewhere had no scale; here it acts, scaled": kind == "fp8",
        "nvfp4 had no scale for the tensor and blocks along out_features; here both are NVIDIA's": kind == "nvfp4",
        "stochastic rounding returned half the value; here it is unbiased": stochastic,
        "2-D blocks were 1,024 consecutive values; here they are 32 x 32": old["mxfp4_block_2d"],
        "the dead zone met whole decoder layers (the residual stream); here it meets their matmuls": kind == "deadzone",
        "exclude_modules without lm_head rounded the output head, which ruins a model; here it is left out": head_met,
        "excluding base_layer left the real weights unrounded (LoRA); here they round": "base_layer" in (left or []),
        "a number in exclude_modules also met longer ones (layers.2: layers 20 to 29); here it is that layer": numbers,
        "without a seed no run could be repeated; here the seed is 0": old["seed"] is None,
    }
    return [line for line, holds in lines.items() if holds]


def _from_noisy_ops(noisy: Mapping[str, str]) -> Translation:
    for key in noisy:
        if key not in _NOISY_OPS:
            raise InvalidValueError(f"{PREFIX}{key} is unknown{nearest(key, _NOISY_OPS)}")
    kind = noisy.get("TYPE", "relative_gaussian")
    require_word(f"{PREFIX}TYPE", kind, ("relative_gaussian", "absolute_gaussian"))
    only = {way: _yes(noisy.get(f"{way}_ONLY", "")) for way in ("FORWARD", "BACKWARD", "TRAINING")}
    when = "both" if only["FORWARD"] == only["BACKWARD"] else "forward" if only["FORWARD"] else "backward"
    error = {"kind": _KINDS[kind], "when": when, "scale": float(noisy.get("SCALE", "1e-4"))}
    phases = ["training"] if only["TRAINING"] else _EVERYWHERE
    lines = {
        "the noise was on in validation too; it is kept here, take evaluation out of apply_during for clean "
        "scores": not only["TRAINING"],
        "rollouts in vLLM under torch.compile or CUDA graphs were never reached; here they are": not only["TRAINING"],
        f"{PREFIX}SCALE was not set, and its default is 1e-4, not 5 %": "SCALE" not in noisy,
        "FORWARD_ONLY and BACKWARD_ONLY together meant both": only["FORWARD"] and only["BACKWARD"],
        "ALL_OPS also put errors into softmax, activations and norms, which has no counterpart here": _yes(
            noisy.get("ALL_OPS", "")
        ),
        "errors met attention in its eager form alone; here name point: scores and point: values for it": True,
        "errors met the output head as well; here it is left out": True,
        "no seed was set, so no run could be repeated; here the seed is 0": True,
    }
    injection = Injection.model_validate({"errors": [error], "apply_during": phases})
    return Translation(injection, tuple(line for line, holds in lines.items() if holds))


def _yes(word: str) -> bool:
    return word.strip().lower() in ("1", "true", "yes")
