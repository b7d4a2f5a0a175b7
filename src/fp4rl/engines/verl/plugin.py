"""The entry point `verl.plugins`, which verl imports in every process of a run; without an experiment it does nothing.

verl hides an exception in here at DEBUG. So what is wrong ends the process, with one line.
"""

from typing import Any

from fp4rl.engines.environment import choose_engine, noisy_operators
from fp4rl.engines.verl.beyond import rounding_rollouts
from fp4rl.engines.verl.old import translate
from fp4rl.engines.verl.settings import VENDOR, experiment
from fp4rl.spec.errors import CheckFailed, InvalidValueError, UserError
from fp4rl.spec.legacy import PREFIX


def apply() -> None:
    """Register engine and trainer, where this process is under an experiment and verl is the one that was checked."""
    described = experiment()
    if described is None:
        if translate({}, noisy_operators())[0]:
            raise InvalidValueError(
                f"{PREFIX}ENABLED is a fork's own; `fp4rl verl-config --from SCRIPT` reads it (or unset it)"
            )
        return
    from fp4rl.engines.verl.contract import require

    require()
    choose_engine(VENDOR)
    from fp4rl.engines.verl import engine, trainer

    engine.register()
    trainer.register_with_verl()
    if rounding_rollouts(described):
        from verl.workers.rollout.replica import RolloutReplicaRegistry

        RolloutReplicaRegistry.register("vllm", _replica)


def _replica() -> Any:
    """Return the class of verl's replicas; verl calls this where it starts one, since vLLM is imported with it."""
    from fp4rl.engines.verl.contract import ROLLOUT_HOOKS, require

    require(ROLLOUT_HOOKS)
    from fp4rl.engines.verl.replica import Replica

    return Replica


try:
    apply()
except (UserError, CheckFailed, ImportError) as error:
    raise SystemExit(f"fp4rl: the plug-in for verl is not applied: {error}") from error
