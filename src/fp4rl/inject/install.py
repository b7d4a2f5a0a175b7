"""Install plans as states of live modules, and take them out again.

The module object, its parameters, hooks and state-dict keys stay. Only its class is swapped, for one whose forward
calls the state.
"""

from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from torch import nn

from fp4rl.inject.adapted import ForwardingState, MergedState, adapter_of
from fp4rl.inject.attention import EXPANDS, AttentionState, expanding_stored
from fp4rl.inject.cache import SharedInput
from fp4rl.inject.experts import ExpertsState, StackState, reading_rounded
from fp4rl.inject.fused import FusedGroup
from fp4rl.inject.linear import InjectedLinear, LinearState
from fp4rl.inject.packed import PackedLinear, PackedModule, PackedStack, PackedState, codes_of
from fp4rl.inject.plan import SitePlan, SiteTable
from fp4rl.inject.site import KEY, SiteState, change_class
from fp4rl.spec.injection import Injection


def install(model: nn.Module, table: SiteTable) -> tuple[list[nn.Module], dict[str, SiteState]]:
    """Swap the class of every module in the table, of none where it raises; return modules, and states by site name."""
    shared = _shared_inputs(table.plans, table.injection)
    states: dict[str, SiteState] = {}
    stacks: dict[nn.Module, dict[str, StackState]] = defaultdict(dict)
    modules: list[nn.Module] = []
    try:
        for plan in table.plans:
            adapter, module = adapter_of(model, plan.site), model.get_submodule(plan.site.path)
            state = states[plan.name] = _state_class(plan)(plan, table.injection, shared[plan.name])
            if plan.packed:
                ignored = [*_ignored_by_ddp(model), f"{plan.site.path}.{plan.site.parameter or 'weight'}"]
                model._ddp_params_and_buffers_to_ignore = ignored  # type: ignore[assignment]
            if isinstance(state, StackState):
                stacks[module][str(plan.site.parameter)] = state
                if adapter is not None:
                    swap(adapter, ForwardingState())
                    modules.append(adapter)
                continue
            for changed in {adapter} if plan.merged else set(map(model.get_submodule, plan.site.places)):
                swap(changed, state)
                modules.append(changed)
        _join_groups(model, table.plans, states)
        _pack(model, table.plans, states)
        for module, by_name in stacks.items():
            swap(module, ExpertsState(by_name))
            modules.append(module)
            for codes in codes_of(module):
                codes.take(module)
    except BaseException:
        uninstall(model, table, modules)
        raise
    return modules, states


def uninstall(model: nn.Module, table: SiteTable, modules: Iterable[nn.Module]) -> None:
    """Give the modules that `install` changed their own class back."""
    for module in modules:
        restore(module)
    hidden = {f"{plan.site.path}.{plan.site.parameter or 'weight'}" for plan in table.plans if plan.packed}
    if hidden:
        model._ddp_params_and_buffers_to_ignore = [name for name in _ignored_by_ddp(model) if name not in hidden]  # type: ignore[assignment]
        if not _ignored_by_ddp(model):
            del model._ddp_params_and_buffers_to_ignore


def _join_groups(model: nn.Module, plans: Iterable[SitePlan], states: dict[str, SiteState]) -> None:
    """Let the layers that a kernel fuses share a factor, where their format says so."""
    groups: dict[tuple[object, ...], FusedGroup] = defaultdict(FusedGroup)
    for plan in plans:
        state, group = states[plan.name], plan.site.fused_group
        fused = plan.weight is not None and plan.weight.factor == "fused" and plan.site.kind == "linear"
        if fused and group and isinstance(state, LinearState):
            state.group = groups[group, plan.weight]
            state.group.modules.append(
                adapter_of(model, plan.site) if plan.merged else model.get_submodule(plan.site.path)
            )


def _pack(model: nn.Module, plans: Iterable[SitePlan], states: dict[str, SiteState]) -> None:
    """Pack the weights of linear layers, once the factors of all groups are known."""
    packed = {plan.site.path: state for plan in plans if isinstance(state := states[plan.name], PackedState)}
    for state in packed.values():
        state.largest = None if state.group is None else state.group.largest()
    for path, state in packed.items():
        state.take(model.get_submodule(path))


def _state_class(plan: SitePlan) -> type[SiteState]:
    if plan.site.kind == "experts":
        return PackedStack if plan.packed else StackState
    if plan.site.kind == "attention":
        return AttentionState
    return MergedState if plan.merged else PackedState if plan.packed else LinearState


def _ignored_by_ddp(model: nn.Module) -> list[str]:
    """Return the names that DDP must ignore: a packed weight has no memory to compare or send."""
    return getattr(model, "_ddp_params_and_buffers_to_ignore", [])


def _shared_inputs(plans: Iterable[SitePlan], injection: Injection) -> dict[str, SharedInput]:
    """Return a shared input for each fused group: its layers read one tensor, and in one format share its rounding."""
    groups: dict[tuple[object, ...], list[SitePlan]] = defaultdict(list)
    for plan in plans:
        group = plan.site.fused_group
        formats = (plan.input, *injection.formats_before("input"))
        rounded_apart = group is None or any(fmt is None or fmt.rounding == "stochastic" for fmt in formats)
        groups[(plan.name,) if rounded_apart else (group, plan.input)].append(plan)
    return {plan.name: shared for group in groups.values() for shared in [SharedInput(len(group))] for plan in group}


class InjectedModule(nn.Module):
    """A module under injection that is no linear layer: its state decides what its forward does."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the state's forward with the arguments of the module's own."""
        return self.__dict__[KEY].forward(self, *args, **kwargs)


State = SiteState | ExpertsState | ForwardingState


@lru_cache(maxsize=256)
def injected_class(original: type[nn.Module], stacked: tuple[str, ...] = (), packed: bool = False) -> type[nn.Module]:
    """Return the one subclass that replaces `original`; in its forward, `stacked` parameters read as rounded copies."""
    if original is nn.Linear:
        return InjectedLinear
    mixin = InjectedLinear if issubclass(original, nn.Linear) else InjectedModule
    body: dict[str, Any] = {"__module__": original.__module__, "__reduce_ex__": _reduce}
    body |= {name: reading_rounded(name) for name in stacked}
    if hasattr(original, EXPANDS):
        body[EXPANDS] = expanding_stored
    bases = (PackedModule, mixin, original) if packed else (mixin, original)
    return type(f"Injected{original.__name__}", bases, body)


def _reduce(module: nn.Module, _protocol: int) -> Any:
    """Pickle a module whose class no file holds by what that was made from."""
    state: State = module.__dict__[KEY]
    return _unpickled, (state.original, state.stacked), module.__dict__


def _unpickled(original: Any, stacked: tuple[str, ...]) -> nn.Module:
    kind = injected_class(original, stacked)
    return kind.__new__(kind)


def _class_for(original: type[nn.Module], state: State) -> type[nn.Module]:
    if isinstance(state, PackedState):
        return PackedLinear
    packed = isinstance(state, ExpertsState) and any(stack.plan.packed for stack in state.stacks.values())
    return injected_class(original, state.stacked, packed)  # type: ignore[arg-type]


def swap(module: nn.Module, state: State) -> None:
    """Swap the class of `module`, so that it computes as `state` says."""
    before: State | None = module.__dict__.get(KEY)
    state.original = type(module) if before is None else before.original
    module.__dict__[KEY] = state
    if before is None:
        change_class(module, _class_for(type(module), state))


def restore(module: nn.Module) -> None:
    """Give `module` its own class back. One that was wrapped since (FSDP) keeps its class, with nothing active."""
    state: State = module.__dict__[KEY]
    for codes in codes_of(module):
        codes.give_back(module)
    if type(module) is _class_for(state.original, state):
        change_class(module, state.original)
        del module.__dict__[KEY]
    else:
        state.removed = True


def is_injected(module: nn.Module) -> bool:
    """Return whether the module carries an injection that was not removed."""
    return KEY in module.__dict__ and not module.__dict__[KEY].removed
