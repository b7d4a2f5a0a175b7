"""From the name of an evaluation profile to what is injected while it is measured."""

from dataclasses import dataclass
from typing import Any

from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest
from fp4rl.spec.evaluation import KNOWN_PROFILES, MATMUL_NOISE, Evaluation
from fp4rl.spec.formats import FORMATS
from fp4rl.spec.hardware import HardwareError
from fp4rl.spec.injection import MODES, Injection
from fp4rl.spec.points import ApplyDuring


@dataclass(frozen=True)
class Precision:
    """What a profile measures under: an injection (None: the model as it is), and the label of its noise."""

    injection: Injection | None
    noise: str = "off"


def precision_named(name: str, spec: Evaluation, deployed: Injection | None) -> Precision:
    """Return what a profile means. `deployed` is the run's own injection.

    `full` is the model as it is, `deployment` the run's injection; a mode (`w4a16`) or a format of the weights
    (`mxfp8`) quantizes afterwards; `matmul_noise=0.05` is the deployment with relative errors of that size in the
    result of every matmul. An injection from `spec.injections` acts whole. Raises NotFoundError for any other name.
    """
    if name == "full":
        return Precision(None)
    if name == "deployment":
        return Precision(deployed)
    if name in spec.injections:
        return Precision(_whole(spec.injections[name]))
    if name in MODES:
        return Precision(Injection.named(name, deployment=spec.deployment))
    if name in FORMATS:
        return Precision(Injection.model_validate({"weight": name, "deployment": spec.deployment}))
    if name.startswith(MATMUL_NOISE):
        return _with_matmul_noise(name.removeprefix(MATMUL_NOISE), deployed)
    known = [*spec.injections, *KNOWN_PROFILES, f"{MATMUL_NOISE}0.05"]
    raise NotFoundError(f"evaluation.profiles: no profile {name!r}{nearest(name, known)}")


def _whole(injection: Injection) -> Injection:
    """Return the injection acting in evaluations at every point that it names, whatever its phases."""
    phases = ApplyDuring.model_validate(["evaluation"])
    return injection.model_copy(update={"apply_during": phases, "frozen_base": "copy"})


def _with_matmul_noise(size: str, deployed: Injection | None) -> Precision:
    try:
        error = HardwareError(scale=float(size)) if float(size) else None
    except ValueError:
        raise InvalidValueError(f"evaluation.profiles: {MATMUL_NOISE}{size}: write a number such as 0.05") from None
    if error is None:
        return Precision(deployed)
    content: dict[str, Any] = deployed.model_dump() if deployed is not None else {}
    content["errors"] = (error,)  # instead of errors that the run trained with
    content["apply_during"] = {**content.get("apply_during", {}), "errors": ("evaluation",)}
    return Precision(Injection.model_validate(content), f"matmul relative {error.scale:g}")
