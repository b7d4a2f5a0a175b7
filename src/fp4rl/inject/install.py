"""Plans -> states in live modules: which kind of state a site takes, and which layers read one input."""

from collections import defaultdict
from collections.abc import Iterable
from zlib import crc32

import torch
from torch import nn

from fp4rl.inject.adapted import MergedState
from fp4rl.inject.attention import AttentionState
from fp4rl.inject.experts import ExpertsState, StackState
from fp4rl.inject.inputs import SharedInput
from fp4rl.inject.linear import LinearState
from fp4rl.inject.packed import PackedState
from fp4rl.inject.plan import SitePlan, SiteTable
from fp4rl.inject.state import Settings, SiteState
from fp4rl.inject.swap import swap

_READ_TOGETHER = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}


def install(model: nn.Module, table: SiteTable) -> tuple[list[nn.Module], dict[str, SiteState]]:
    """Swap the class of every module that the table names; -> these modules, and the state of each site by name."""
    shared = _shared_inputs(table.plans)
    states: dict[str, SiteState] = {}
    stacks: dict[str, dict[str, StackState]] = defaultdict(dict)
    modules = []
    for plan in table.plans:
        settings = _settings(table, plan)
        module = model.get_submodule(plan.site.path)
        if plan.site.kind == "experts":
            stack = StackState(plan, settings, SharedInput(1))
            states[plan.name] = stacks[plan.site.path][str(plan.site.parameter)] = stack
            continue
        if plan.site.kind == "attention":
            state: SiteState = AttentionState(plan, settings)
        elif plan.merged:
            module = model.get_submodule(plan.site.path.rpartition(".")[0])
            state = MergedState(plan, settings, shared[plan.name])
        elif plan.packed:
            state = packed = PackedState(plan, settings, shared[plan.name])
            packed.take(module)  # type: ignore[arg-type]
            _hide_from_ddp(model, f"{plan.site.path}.weight")
        else:
            state = LinearState(plan, settings, shared[plan.name], frozen=_is_frozen(module))
        swap(module, state)
        states[plan.name] = state
        modules.append(module)
    for path, by_name in stacks.items():
        module = model.get_submodule(path)
        swap(module, ExpertsState(by_name))
        modules.append(module)
    return modules, states


def _settings(table: SiteTable, plan: SitePlan) -> Settings:
    injection = table.injection
    seed = crc32(f"{injection.seed}/{plan.name}".encode())
    return Settings(getattr(torch, injection.dtype), injection.straight_through, seed)


def _is_frozen(module: nn.Module) -> bool:
    return not next(module.parameters()).requires_grad


def _hide_from_ddp(model: nn.Module, name: str) -> None:
    """A weight without memory has nothing that ranks could compare or send; DDP reads this list when it wraps."""
    ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
    model._ddp_params_and_buffers_to_ignore = [*ignored, name]  # type: ignore[assignment]


def _shared_inputs(plans: Iterable[SitePlan]) -> dict[str, SharedInput]:
    """Layers below one parent that read the same tensor in the same format share its rounding."""
    groups: dict[tuple[object, ...], list[SitePlan]] = defaultdict(list)
    for plan in plans:
        readers = _READ_TOGETHER.get(plan.site.role)
        alone = readers is None or plan.input is None or plan.input.rounding == "stochastic"
        groups[(plan.name,) if alone else (plan.site.parent, readers, plan.input)].append(plan)
    return {plan.name: one for group in groups.values() for one in [SharedInput(len(group))] for plan in group}
