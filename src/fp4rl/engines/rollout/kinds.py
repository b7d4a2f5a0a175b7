"""What vLLM computes of the sites of an injection: an entry a kind of site.

Weights come rounded with the stream (`rl.stream`). Everything else is rounded where vLLM's own module computes it, by
the state of the site, which counts it too.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn

from fp4rl.engines.rollout.attention import cache_of, not_stored, rounding_cache
from fp4rl.engines.rollout.experts import experts_of, rounding_experts
from fp4rl.engines.rollout.held import layer_of
from fp4rl.engines.rollout.linear import not_called, rounding_input
from fp4rl.inject.attention import AttentionState
from fp4rl.inject.experts import StackState
from fp4rl.inject.linear import LinearState
from fp4rl.inject.site import SiteState

_WITH_WEIGHTS = frozenset({"weight", "grad_input", "grad_weight"})


@dataclass(frozen=True)
class Kind:
    """How vLLM computes the sites of one kind.

    `state` rounds in the worker of a server as the site's own state does in this process; `points` are those that
    vLLM's module rounds. `module_of` finds that module's name from vLLM's model, its modules by name, and the name of
    the site; `rounding` lets the module round and count, by the states of the sites that it computes. `refused` says
    why a site is computed otherwise nevertheless, and the cure.
    """

    state: type[SiteState]
    points: frozenset[str]
    module_of: Callable[[nn.Module, Mapping[str, nn.Module], str], str]
    rounding: Callable[[Any, Sequence[Any]], AbstractContextManager[None]]
    refused: Callable[[Any], str | None] = lambda _: None


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "linear": Kind(LinearState, frozenset({"input"}), layer_of, rounding_input, not_called),
        "attention": Kind(AttentionState, frozenset({"kv_cache"}), cache_of, rounding_cache, not_stored),
        "experts": Kind(StackState, frozenset({"input"}), experts_of, rounding_experts),
    }
)


def active(states: Sequence[SiteState]) -> list[SiteState]:
    """Return the states of the sites where something acts in the present phase."""
    return [state for state in states if state.active]


def rounded_points(state: SiteState) -> list[str]:
    """Return the points of a site that vLLM's module has to round in the present phase."""
    return sorted(state.points & KINDS[state.plan.site.kind].points)


def not_computed(state: SiteState) -> str | None:
    """Return what vLLM does not compute as the site does in this phase, and the cure; None where it computes all."""
    kind = KINDS.get(state.plan.site.kind)
    computed = kind.points | _WITH_WEIGHTS if kind is not None else frozenset()
    wrong = sorted(state.points - computed) + [error.name for error in state.errors]
    if wrong:
        return f"{wrong[0]} of {state.plan.name} as this model does; take transformers"
    why = kind.refused(state) if kind is not None else None
    return why and f"{rounded_points(state)[0]} of {state.plan.name}: {why}"


@contextmanager
def rounding(module: nn.Module, states: Sequence[SiteState]) -> Iterator[None]:
    """Let the modules of vLLM's model round and count as `states` say."""
    modules = dict(module.named_modules())
    members: dict[tuple[str, str], list[SiteState]] = defaultdict(list)
    for state in states:
        kind = str(state.plan.site.kind)
        members[kind, KINDS[kind].module_of(module, modules, state.plan.name)].append(state)
    with ExitStack() as stack:
        for (kind, name), own in members.items():
            stack.enter_context(KINDS[kind].rounding(modules[name], own))
        yield
