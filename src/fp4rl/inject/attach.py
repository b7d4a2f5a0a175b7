"""Site table -> harm that can be switched by phase and taken out again. The only step of injection that mutates."""

import sys
from collections.abc import Iterator, Mapping, Sized
from types import TracebackType
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fp4rl.inject.install import install, uninstall
from fp4rl.inject.plan import SiteTable
from fp4rl.inject.report import evidence_rows, report
from fp4rl.inject.resolve import resolve
from fp4rl.inject.state import SiteState
from fp4rl.inject.swap import is_injected
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.injection import Injection
from fp4rl.spec.modes import PHASES, Phase
from fp4rl.spec.words import agreeing, counted


class Attachment:
    """The handle on injected harm: a switch per phase, evidence (also after removal), and the way back. A context
    manager.

    It starts in the phase `training`. Every optimizer step of the process invalidates its rounded copies by itself;
    whoever writes weights in another way calls `invalidate`.
    """

    def __init__(self, model: nn.Module, table: SiteTable) -> None:
        self.model = model
        self.table = table
        self._modules, self._states = install(model, table)
        # Weak: a model that is dropped without `remove` must not live on in the hook.
        audience = self._audience = WeakSet(self._states.values())
        for state in self._states.values():
            state.audience = audience

        def stepped(*_: Any) -> None:
            for state in audience:
                state.forget(frozen=False)

        self._hook = register_optimizer_step_post_hook(stepped)
        self.set_phase("training")

    @property
    def states(self) -> Mapping[str, SiteState]:
        """What each site knows, by name; for `inject.memory`."""
        return self._states

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules whose class was swapped; none after `remove`."""
        return tuple(self._modules)

    @property
    def phase(self) -> Phase:
        """The phase that is on."""
        return self._phase

    def set_phase(self, phase: Phase) -> None:
        """Switch to a phase: the points that `apply_during` names for it act, the others do not."""
        if phase not in PHASES:
            raise InvalidValueError(f"no phase is called {phase!r}; known: {', '.join(PHASES)}")
        points, sharded = self.table.injection.apply_during.active(phase), _is_sharded(self.model)
        _refuse_packed_shards(self.table, sharded)
        self._phase: Phase = phase
        for state in self._states.values():
            state.keep_copies = not sharded
            state.forget()
            state.enter(phase, points)

    def invalidate(self) -> None:
        """Throw away every rounded copy; to be called after weights were written (optimizer step, load)."""
        for state in self._states.values():
            state.forget()

    def remove(self) -> None:
        """Give every module its own class back. The weights were never written; calling it twice is harmless."""
        uninstall(self.model, self.table, self._modules)
        for state in self._states.values():
            state.release()
            self._audience.discard(state)
        self._modules = []
        if not self._audience:  # else there are deep copies, which go on
            self._hook.remove()

    def evidence(self) -> list[dict[str, Any]]:
        """One row per phase, site and point: calls, elements harmed, share changed, realised relative error."""
        return evidence_rows(self._states.values())

    def reset_evidence(self) -> None:
        """Start counting afresh."""
        for state in self._states.values():
            state.recount()

    def require_calls(self) -> None:
        """Raise CheckFailed, naming them, for sites that should act in the present phase and were never called, were
        called and met no tensor at a point that should act, or left as they were what rounding changes."""
        everywhere = len(self._states)
        if silent := [state.plan.name for state in self._silent()]:
            raise CheckFailed(
                f"{_were(silent, everywhere)} never called during {self.phase}, so nothing was "
                f"harmed there: {_first(silent)}"
            )
        bare = {
            f"{state.plan.name} ({', '.join(points)})": points
            for state in self._states.values()
            if (points := state.untouched())
        }
        if bare:
            raise CheckFailed(
                f"{_were(bare, everywhere)} called during {self.phase} and 0 elements were rounded: "
                f"{_first(list(bare))}; their matmul is computed in a way that injection does not reach (leave these "
                "points out: by_pattern), or a copy that was rounded earlier went stale"
            )
        if idle := [state.plan.name for state in self._states.values() if state.missed()]:
            raise CheckFailed(
                f"{_were(idle, everywhere)} called during {self.phase} and rounded nothing: {_first(idle)}"
            )

    def _silent(self) -> Iterator[SiteState]:
        for state in self._states.values():
            state.book()
            if state.active and not any((self.phase, point) in state.meters for point in state.active):
                yield state

    def report(self) -> str:
        """The evidence as lines of text, one per phase and point."""
        return report(self.table, self.phase, self.evidence())

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def attach(model: nn.Module, injection: Injection | SiteTable) -> Attachment:
    """Put an injection, or a table resolved before, into a live model; `with` takes it out again.

    Attach before `fully_shard`, after adapters. Raises what `resolve` raises, and InvalidValueError for a model that
    already carries an injection.
    """
    taken = next((name for name, module in model.named_modules() if is_injected(module)), None)
    if taken is not None:
        raise InvalidValueError(f"{taken or 'this layer'} already carries an injection; call remove() on it first")
    table = resolve(model, injection) if isinstance(injection, Injection) else injection
    _refuse_packed_shards(table, _is_sharded(model))
    return Attachment(model, table)


def _were(sites: Sized, everywhere: int) -> str:
    """`1 of 15 sites was`, `2 of 15 sites were`."""
    return f"{len(sites)} of {counted(everywhere, 'site')} {agreeing(len(sites), 'was', 'were')}"


def _first(names: list[str]) -> str:
    return f"{', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"


def _refuse_packed_shards(table: SiteTable, sharded: bool) -> None:
    if sharded and any(plan.packed for plan in table.plans):
        raise InvalidValueError(
            "FSDP cannot shard packed weights, which have no tensor to shard; use DDP, or frozen_base: copy"
        )


def _is_sharded(model: nn.Module) -> bool:
    """Whether FSDP owns the weights: it frees their storage between layers, so a copy of them must not be kept."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # never imported here: without it nothing can be sharded
    kinds = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel) if fsdp is not None else ()
    return any(isinstance(module, kinds) for module in model.modules())
