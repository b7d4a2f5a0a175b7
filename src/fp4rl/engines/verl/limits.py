"""What a run of verl cannot do as its experiment says, refused before it starts with the cause and the cure."""

from collections.abc import Callable, Iterator, Mapping
from math import isclose
from typing import Any

from fp4rl.engines.verl.configuration import decided
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.points import LINEAR_POINTS, Phase

ROUNDING_ROLLOUTS: frozenset[str] = frozenset()
"""verl's rollouts (`actor_rollout_ref.rollout.name`) whose workers round inputs; weights come rounded to all."""

Read = Callable[[str], Any]
"""A key of verl's configuration, as a dotted path, to its value; None where it is not set."""

_MODEL, _ACTOR, _ROLLOUT = (f"actor_rollout_ref.{part}" for part in ("model", "actor", "rollout"))


def require_possible(experiment: Experiment, read: Read) -> None:
    """Raise InvalidValueError for the first thing that verl would not do as the experiment says."""
    rollout = str(read(f"{_ROLLOUT}.name"))
    for problem in (*_of_experiment(experiment, rollout), *_of_config(experiment, read), *_other(experiment, read)):
        raise InvalidValueError(problem)


def _of_experiment(experiment: Experiment, rollout: str) -> Iterator[str]:
    injection, noise = experiment.injection, experiment.noise
    for phase in ("rollout", "evaluation"):
        beyond = _beyond_weights(experiment, phase)
        if beyond and rollout not in ROUNDING_ROLLOUTS:
            points = ", ".join(beyond)
            yield (
                f"injection: {points} acts during {phase}, and verl's rollout {rollout!r} gets rounded weights alone "
                "(nor can Ascend take new W4A4 weights in place); take mode w4a16, or keep it to training: "
                f"apply_during: {{{beyond[0]}: [training]}}"
            )
    if injection is not None and injection.frozen_base == "packed":
        yield "injection.frozen_base: FSDP cannot shard packed weights; write copy"
    if noise is not None and noise.precision == "float32":
        yield "noise.precision: verl's rollouts hold weights in the model's dtype; write weight"
    if experiment.training.distillation is not None:
        yield "training.distillation: verl has a trainer of its own for it; leave it out"


def _beyond_weights(experiment: Experiment, phase: Phase) -> list[str]:
    """Return what acts in a phase of the rollout engine besides the rounding of weights."""
    injection = experiment.injection
    if injection is None:
        return []
    present = [p for p in (*LINEAR_POINTS, "kv_cache") if p != "weight" and getattr(injection, p) is not None]
    present += [p for p in LINEAR_POINTS[1:] if any(_rounds(row, p) for row in injection.by_pattern)]
    present += ["errors"] if injection.errors else []
    return [point for point in dict.fromkeys(present) if point in injection.apply_during.active(phase)]


def _rounds(row: Any, point: str) -> bool:
    return getattr(row, point, "keep") not in ("keep", None)


def _other(experiment: Experiment, read: Read) -> Iterator[str]:
    """Yield the keys that have another value than the experiment's, whose record would be of another run."""
    for key, value in decided(experiment).items():
        name = key.lstrip("+")
        present = read(name)
        if not _same(present, value):
            yield f"{name}={present}, and the experiment has {value}; change that, and write the script anew"


def _same(present: Any, value: Any) -> bool:
    if isinstance(value, Mapping):
        return isinstance(present, Mapping) and all(_same(present.get(key), inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return not isinstance(present, str | None) and list(present) == list(value)
    if isinstance(value, float) and isinstance(present, int | float):
        return isclose(present, value, rel_tol=1e-9)
    return bool(present == value)


def _of_config(experiment: Experiment, read: Read) -> Iterator[str]:
    if read(f"{_ACTOR}.fsdp_config.qat.enable"):
        yield f"{_ACTOR}.fsdp_config.qat.enable: verl's own QAT would round a second time; set it to False"
    if read(f"{_ROLLOUT}.quantization"):
        yield f"{_ROLLOUT}.quantization: the rollout would round rounded weights again; set it to null"
    adapted = read(f"{_MODEL}.lora_rank") or read(f"{_MODEL}.lora.rank") or read(f"{_MODEL}.lora_adapter_path")
    acts = experiment.injection is not None or experiment.noise is not None
    if adapted and acts and not read(f"{_MODEL}.lora.merge"):
        yield (
            f"{_MODEL}.lora.merge: rollouts that get adapters alone keep the base of its files, without rounding "
            f"and noise; write {_MODEL}.lora.merge=True"
        )
    dtype = read(f"{_ROLLOUT}.dtype")
    if dtype != experiment.model.dtype:
        yield f"{_ROLLOUT}.dtype={dtype}, and the experiment's model.dtype is {experiment.model.dtype}; make them equal"
