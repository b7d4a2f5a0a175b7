"""Swapping the class of a live module, and back: the object, its parameters, hooks and state-dict keys stay."""

from functools import lru_cache
from typing import Any

from torch import nn

from fp4rl.inject.experts import ExpertsState, reading_rounded
from fp4rl.inject.linear import InjectedLinear
from fp4rl.inject.packed import PackedLinear, PackedState
from fp4rl.inject.site import KEY, SiteState


class InjectedModule(nn.Module):
    """Any other module under injection: its state decides what its forward does."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the module's own forward takes and returns."""
        return self.__dict__[KEY].forward(self, *args, **kwargs)


State = SiteState | ExpertsState


@lru_cache(maxsize=256)
def injected_class(original: type[nn.Module], stacked: tuple[str, ...] = ()) -> type[nn.Module]:
    """The class that stands in for `original`, a subclass of it; the same object every time.

    Parameters named in `stacked` read as their rounded copies inside the forward.
    """
    if original is nn.Linear:
        return InjectedLinear
    mixin = InjectedLinear if issubclass(original, nn.Linear) else InjectedModule
    body = {"__module__": original.__module__} | {name: reading_rounded(name) for name in stacked}
    return type(f"Injected{original.__name__}", (mixin, original), body)


def _class_for(original: type[nn.Module], state: State) -> type[nn.Module]:
    if isinstance(state, PackedState):
        return PackedLinear
    return injected_class(original, state.stacked)  # type: ignore[arg-type]


def swap(module: nn.Module, state: State) -> None:
    """Make `module` compute as `state` says."""
    before: State | None = module.__dict__.get(KEY)
    state.original = type(module) if before is None else before.original
    module.__dict__[KEY] = state
    if before is None:
        module.__class__ = _class_for(type(module), state)


def restore(module: nn.Module) -> None:
    """Give `module` its own class back. One that was wrapped since (sharded) keeps its class, with nothing active."""
    state: State = module.__dict__[KEY]
    if isinstance(state, PackedState):
        state.give_back(module)  # type: ignore[arg-type]
    if type(module) is _class_for(state.original, state):
        module.__class__ = state.original
        del module.__dict__[KEY]
    else:
        state.removed = True


def is_injected(module: nn.Module) -> bool:
    """Whether the module carries an injection that was not removed."""
    return KEY in module.__dict__ and not module.__dict__[KEY].removed
