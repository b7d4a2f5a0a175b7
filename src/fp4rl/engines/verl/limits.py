"""What a run of verl cannot do as its experiment says, refused before it starts with the cause and the cure."""

from collections.abc import Callable, Iterator, Mapping
from math import isclose
from typing import Any

from fp4rl.engines.verl.beyond import beyond_weights, rounding_rollouts
from fp4rl.engines.verl.configuration import decided
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.formats import Format
from fp4rl.spec.points import Phase

ROUNDING_ROLLOUTS = frozenset({"vllm"})
"""verl's rollouts (`actor_rollout_ref.rollout.name`) whose workers round themselves; weights come rounded to all."""

ROUNDED = ("input", "kv_cache")
"""The points that they round."""

Read = Callable[[str], Any]
"""A key of verl's configuration, as a dotted path, to its value; None where it is not set."""

_MODEL, _ACTOR, _ROLLOUT = (f"actor_rollout_ref.{part}" for part in ("model", "actor", "rollout"))


def require_possible(experiment: Experiment, read: Read) -> None:
    """Raise InvalidValueError for the first thing that verl would not do as the experiment says."""
    for problem in (
        *_of_experiment(experiment, read),
        *_of_rollouts(experiment, read),
        *_of_config(experiment, read),
        *_other(experiment, read),
    ):
        raise InvalidValueError(problem)


def _of_experiment(experiment: Experiment, read: Read) -> Iterator[str]:
    injection, noise = experiment.injection, experiment.noise
    for phase in ("rollout", "evaluation"):
        points, why = _not_rounded(experiment, phase, read)
        if points:
            yield (
                f"injection: {', '.join(points)} acts during {phase}, and {why}; take mode w4a16, or keep it to "
                f"training: apply_during: {{{points[0]}: [training]}}"
            )
    if injection is not None and injection.frozen_base == "packed":
        yield "injection.frozen_base: FSDP cannot shard packed weights; write copy"
    if noise is not None and noise.precision == "float32":
        yield "noise.precision: verl's rollouts hold weights in the model's dtype; write weight"
    if experiment.training.distillation is not None:
        yield "training.distillation: verl has a trainer of its own for it; leave it out"


def _not_rounded(experiment: Experiment, phase: Phase, read: Read) -> tuple[list[str], str]:
    """Return what acts in a phase besides weights and cannot, by verl's rollout or on its device, and why."""
    beyond, rollout = beyond_weights(experiment, phase), read(f"{_ROLLOUT}.name")
    never = [point for point in beyond if point not in ROUNDED]
    if rollout not in ROUNDING_ROLLOUTS:
        return beyond, f"verl's rollout {rollout!r} gets rounded weights alone"
    if never:
        return never, f"verl's rollout {rollout!r} rounds weights, {' and '.join(ROUNDED)} alone"
    if read("trainer.device") == "npu" and "input" in beyond and _four_bits(experiment.injection):
        return ["input"], "Ascend cannot take new W4A4 weights in place"
    return [], ""


def _four_bits(injection: Any) -> bool:
    inputs = [injection.input, *(row.input for row in injection.by_pattern)]
    return any(fmt.element.bits == 4 for fmt in inputs if isinstance(fmt, Format))


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


def _of_rollouts(experiment: Experiment, read: Read) -> Iterator[str]:
    """Yield what keeps the worker of a rollout engine from rounding as the whole model does."""
    if not rounding_rollouts(experiment):
        return
    for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "data_parallel_size"):
        if (read(f"{_ROLLOUT}.{key}") or 1) != 1:
            yield f"{_ROLLOUT}.{key}: a rollout that rounds has one worker, which computes the whole model; write 1"
    if read(f"{_ROLLOUT}.disaggregation.enabled"):
        yield f"{_ROLLOUT}.disaggregation.enabled: its servers are others, which round weights alone; write False"


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
