"""fp4rl: a lab for language models that are trained with reinforcement learning and then run in 4 bits.

The names below are loaded on first use, so that `import fp4rl` is fast and does not import torch by itself.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Format": "fp4rl.spec.formats",
    "FORMATS": "fp4rl.spec.formats",
    "Targets": "fp4rl.spec.targets",
    "Injection": "fp4rl.spec.injection",
    "NoiseSchedule": "fp4rl.spec.noise",
    "Experiment": "fp4rl.spec.experiment",
    "Suite": "fp4rl.spec.experiment",
    "load_spec": "fp4rl.spec.load",
    "fake_quantize": "fp4rl.numerics.quantize",
    "attach": "fp4rl.inject.attach",
    "perturb": "fp4rl.noise.perturb",
    "scan": "fp4rl.diagnose.scan",
    "advise": "fp4rl.diagnose.advice",
    "train": "fp4rl.rl.train",
    "evaluate": "fp4rl.rl.evaluate",
}
__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fp4rl' has no attribute {name!r}; it offers {', '.join(sorted(_HOMES))}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
