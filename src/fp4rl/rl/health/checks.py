"""Every check of the monitor, one entry each; `spec.health.CHECKS` lists their names, the keys of `health.policies`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fp4rl.rl.health.answers import dead_rollouts, entropy_collapse, entropy_explosion, length_explosion
from fp4rl.rl.health.findings import Verdict
from fp4rl.rl.health.histories import SignalHistories
from fp4rl.rl.health.learning import accuracy_collapse, no_spread, reward_hacking
from fp4rl.rl.health.mechanics import gradient, mismatch, not_a_number
from fp4rl.rl.health.signals import NAMES
from fp4rl.spec import health
from fp4rl.spec.errors import InvalidValueError, nearest, require_names
from fp4rl.spec.health import Thresholds


@dataclass(frozen=True)
class Check:
    """One check; its name is that of its function.

    `signals`: what it looks at, shown while all is well. `needs`: groups of signals, of each of which it needs at least
    one. `at_once`: a single step is enough for an alarm; otherwise an alarm must persist.
    """

    function: Callable[[SignalHistories, Thresholds], Verdict]
    signals: tuple[str, ...]
    needs: tuple[tuple[str, ...], ...]
    at_once: bool = False

    def __post_init__(self) -> None:
        for signal in (*self.signals, *(name for group in self.needs for name in group)):
            if signal not in NAMES:
                raise InvalidValueError(f"{self.function.__name__}: no signal {signal!r}{nearest(signal, NAMES)}")


_ALL = (
    Check(
        not_a_number,
        signals=("loss", "grad_norm"),
        needs=(("loss", "grad_norm", "entropy", "reward", "length"),),
        at_once=True,
    ),
    Check(accuracy_collapse, signals=("accuracy", "validation"), needs=(("accuracy", "reward"),)),
    Check(length_explosion, signals=("length", "truncated"), needs=(("length",), ("truncated", "accuracy", "reward"))),
    Check(entropy_collapse, signals=("entropy",), needs=(("entropy",),)),
    Check(entropy_explosion, signals=("entropy",), needs=(("entropy",),)),
    Check(reward_hacking, signals=("reward", "validation"), needs=(("reward",), ("accuracy", "validation"))),
    Check(gradient, signals=("grad_norm",), needs=(("grad_norm",),)),
    Check(no_spread, signals=("no_spread",), needs=(("no_spread",),)),
    Check(
        mismatch,
        signals=("mismatch_kl", "mismatch_probability", "mismatch_phases", "described_kl"),
        needs=(("mismatch_phases", "mismatch_kl", "mismatch_probability"),),
    ),
    Check(
        dead_rollouts,
        signals=("truncated", "empty", "repetition"),
        needs=(("truncated", "empty", "repetition", "length"),),
    ),
)
CHECKS: Mapping[str, Check] = MappingProxyType({check.function.__name__: check for check in _ALL})
require_names("health check", CHECKS, health.CHECKS)
