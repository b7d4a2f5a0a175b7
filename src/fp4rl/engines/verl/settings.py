"""How an experiment reaches every process of a verl run: one environment variable, and verl's own trainer mode.

`FP4RL_VERL_SPEC` holds the path of one experiment's YAML file, which every node must be able to read. verl's Hydra
overrides carry it to all workers: a driver, its task runner and the workers of other nodes read the same file.
"""

from pathlib import Path

from fp4rl.engines.environment import VERL_SPEC, verl_spec
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment, Suite
from fp4rl.spec.load import load_spec

TRAINER_MODE = "fp4rl"
"""The value of verl's `trainer.v1.trainer_mode`: its synchronous trainer, with the checks of this plug-in."""

VENDOR = "fp4rl"
"""The vendor under which the engine is registered with verl; the plug-in itself makes verl look for it."""


def overrides(spec: str | Path) -> tuple[str, ...]:
    """Return the Hydra overrides that put a verl run under the experiment in the file `spec`."""
    variable = f"+ray_kwargs.ray_init.runtime_env.env_vars.{VERL_SPEC}"
    return f"trainer.v1.trainer_mode={TRAINER_MODE}", f"{variable}={Path(spec).resolve()}"


def experiment() -> Experiment | None:
    """Return the experiment of this process, None where the variable is not set.

    Raises NotFoundError for a missing file, and InvalidValueError for a suite, whose arms are runs of their own.
    """
    path = verl_spec()
    if path is None:
        return None
    spec = load_spec(path)
    if isinstance(spec, Suite):
        raise InvalidValueError(f"{VERL_SPEC}: {path} holds a suite; `fp4rl verl-config` writes one arm and seed of it")
    return spec
