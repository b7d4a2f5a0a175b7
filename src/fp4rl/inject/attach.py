"""Put a site table into a live model, switch it by phase, take it out again. Nothing else changes the model."""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from fp4rl.inject.evidence import table_of
from fp4rl.inject.install import install, is_injected, uninstall
from fp4rl.inject.plan import SiteTable
from fp4rl.inject.resolve import resolve
from fp4rl.inject.surgery import SurgeryCheck, checked_modules
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.evidence import Injected
from fp4rl.spec.injection import Injection
from fp4rl.spec.points import PHASES, Phase
from fp4rl.spec.words import agreeing, counted


class Attachment:
    """The handle on an injection: switches phases, gives evidence (also after removal), removes; for use with `with`.

    `modules` are those whose class was swapped (none after `remove`), `states` holds the state of each site by name,
    `phase` is the present one, `training` at first. Every optimizer step in the process invalidates the rounded copies
    of trained weights by itself; code that writes weights in another way must call `invalidate`.
    """

    def __init__(self, model: nn.Module, table: SiteTable) -> None:
        self.model, self.table = model, table
        self.modules, self.states = install(model, table)
        check = SurgeryCheck(model, table)
        self._hooks = [module.register_forward_pre_hook(check) for module in checked_modules(model, table)]
        self.set_phase("training")

    def set_phase(self, phase: Phase, step: int | None = None) -> None:
        """Switch to a phase: the points that `apply_during` names for it act, the others do not.

        `step`: of training, counted from 0, where the injection has a `schedule`; without one the formats that it ends
        with act, as they do in every evaluation.
        """
        if phase not in PHASES:
            raise InvalidValueError(f"no phase is called {phase!r}; known: {', '.join(PHASES)}")
        points, sharded = self.table.injection.apply_during.active(phase), _is_sharded(self.model)
        _refuse_packed_shards(self.table, sharded)
        self.phase: Phase = phase
        for state in self.states.values():
            state.keep_copies = not sharded
            state.forget()
            state.enter(phase, points, step)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Let nothing act inside the `with`: the model computes as without injection, and no call is counted."""
        for state in self.states.values():
            state.enter(self.phase, frozenset(), state.step)
        try:
            yield
        finally:
            for state in self.states.values():
                state.enter(self.phase, self.table.injection.apply_during.active(self.phase), state.step)

    def invalidate(self) -> None:
        """Drop every rounded copy; to be called after weights were written other than by an optimizer step."""
        for state in self.states.values():
            state.forget()

    def remove(self) -> None:
        """Give every module its own class back. The weights were never written; a second call does nothing."""
        uninstall(self.model, self.table, self.modules)
        for hook in self._hooks:
            hook.remove()
        for state in self.states.values():
            state.forget()
            state.enter(
                self.phase, frozenset()
            )  # a module that was wrapped since keeps its injected class, and so must find nothing active
        self.modules = []

    def evidence(self) -> list[Injected]:
        """Return one row per phase, site and point, in the order of the phases and of the model."""
        rows = [row for state in self.states.values() for row in state.rows()]
        return sorted(rows, key=lambda row: PHASES.index(row.phase))

    def values_rounded(self) -> dict[str, int]:
        """Return point -> the number of values rounded in rollouts and training so far."""
        counts: Counter[str] = Counter()
        for state in self.states.values():
            state.book()
            for (phase, point, _), meter in state.meters.items():
                counts[point] += meter.elements if phase in ("rollout", "training") else 0
        return dict(counts)

    def reset_evidence(self) -> None:
        """Set all counters to zero."""
        for state in self.states.values():
            state.recount()

    def require_calls(self) -> None:
        """Raise CheckFailed, naming the sites, where one should have acted in the present phase and did not.

        Such a site was never called, saw no tensor at an active point, or left unchanged what rounding would change.
        """
        states, during = self.states.values(), f"called during {self.phase}"
        for state in states:
            state.book()
        silent = [state.plan.name for state in states if state.silent()]
        bare = [f"{state.plan.name} ({', '.join(points)})" for state in states if (points := state.untouched())]
        idle = [state.plan.name for state in states if state.missed()]
        unreached = (
            "; their matmul is computed in a way that injection does not reach (leave these points out: by_pattern), "
            "or a copy that was rounded earlier went stale"
        )
        for sites, what, why in (
            (
                silent,
                f"never {during}, so nothing was injected there",
                "; leave out what this model never calls: targets.leave",
            ),
            (bare, f"{during} and 0 elements were rounded", unreached),
            (idle, f"{during} and rounded nothing", ""),
        ):
            if sites:
                were = f"{len(sites)} of {counted(len(states), 'site')} {agreeing(len(sites), 'was', 'were')}"
                raise CheckFailed(f"{were} {what}: {', '.join(sites[:4])}{' ...' if len(sites) > 4 else ''}{why}")

    def report(self) -> str:
        """Return the evidence as lines of text, one per phase and point."""
        sites = counted(len(self.table.plans), "site")
        head = f"{sites}, table {self.table.digest}, phase {self.phase}"
        return "\n".join([head, *table_of(self.evidence())])

    def state_dict(self) -> dict[str, Any]:
        """Return each site's counters and the state of its randomness, for JSON, to resume an interrupted run."""
        return {name: state.state_dict() for name, state in self.states.items()}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, for the sites that it names."""
        for name in self.states.keys() & saved.keys():
            self.states[name].load_state_dict(saved[name])

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def attach(model: nn.Module, injection: Injection | SiteTable) -> Attachment:
    """Put an injection, or an already resolved table, into a live model; `with` takes it out again.

    Attach before `fully_shard`, after adapters. Raises what `resolve` raises, and InvalidValueError for a model that
    already carries an injection.
    """
    taken = next((name for name, module in model.named_modules() if is_injected(module)), None)
    if taken is not None:
        raise InvalidValueError(f"{taken or 'this layer'} already carries an injection; call remove() on it first")
    table = resolve(model, injection) if isinstance(injection, Injection) else injection
    _refuse_packed_shards(table, _is_sharded(model))
    return Attachment(model, table)


def _refuse_packed_shards(table: SiteTable, sharded: bool) -> None:
    if sharded and any(plan.packed for plan in table.plans):
        raise InvalidValueError("FSDP cannot shard packed weights: they have no tensor; use DDP, or frozen_base: copy")


def _is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP owns the weights: it frees their storage between layers, so that no copy may be kept."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # never imported here: without it nothing can be sharded
    kinds = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel) if fsdp is not None else ()
    return any(isinstance(module, kinds) for module in model.modules())


@contextmanager
def drawing_alike(first: Attachment, other: Attachment) -> Iterator[None]:
    """Make both draw the same for the same tensors: `other` is set to the step of `first`, and jitter is seeded.

    Sites are matched by name. Do not switch phases inside: that would advance the step of one of them only.
    """
    for name, state in other.states.items():
        state.rng.step = first.states[name].rng.step
    rngs = [state.rng for attachment in (first, other) for state in attachment.states.values()]
    for rng in rngs:
        rng.repeatable = True
    try:
        yield
    finally:
        for rng in rngs:
            rng.repeatable = False
