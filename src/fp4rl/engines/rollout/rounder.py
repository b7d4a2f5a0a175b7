"""What the worker of a vLLM engine in another process does at the sites of a run: round, count, and tell the counts."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import astuple
from typing import Any

from fp4rl.engines.rollout.kinds import KINDS, rounding
from fp4rl.engines.rollout.known import prepare
from fp4rl.inject.cache import SharedInput
from fp4rl.inject.plan import SitePlan
from fp4rl.inject.site import SiteState
from fp4rl.sites.walk import Site
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import format_of
from fp4rl.spec.injection import Injection


class Rounder:
    """Methods that vLLM's worker gets besides its own; they are called over `collective_rpc` with plain values."""

    model_runner: Any
    fp4rl_states: Sequence[SiteState] = ()
    fp4rl_rounding: ExitStack | None = None

    def fp4rl_begin(self, sites: Sequence[Mapping[str, Any]], injection: Mapping[str, Any]) -> list[str]:
        """Round and count at `sites` from here on; return what stands against it, in words."""
        self.fp4rl_end()
        described = Injection.model_validate(injection)
        self.fp4rl_states = [state_of(site, described) for site in sites]
        self.fp4rl_rounding = ExitStack()
        try:
            prepare(self.model_runner.get_model())
            self.fp4rl_rounding.enter_context(rounding(self.model_runner.get_model(), self.fp4rl_states))
        except InvalidValueError as error:
            return [str(error)]
        return []

    def fp4rl_end(self) -> list[dict[str, Any]]:
        """Stop rounding; return what each site counted."""
        if self.fp4rl_rounding is not None:
            self.fp4rl_rounding.close()
        counted = [
            {"calls": state.calls, "meters": {point: astuple(meter) for (_, point, _), meter in state.meters.items()}}
            for state in self.fp4rl_states
        ]
        self.fp4rl_rounding, self.fp4rl_states = None, ()
        return counted


def state_of(site: Mapping[str, Any], injection: Injection) -> SiteState:
    """Return the state of a site that `server.described` has described."""
    where = Site(site["name"], site["name"], site["kind"], "", None, tuple(site["shape"]))
    formats: dict[str, Any] = {point: format_of(described) for point, described in site["formats"].items()}
    state = KINDS[site["kind"]].state(SitePlan(where, **formats), injection, SharedInput(1))
    state.rng.step = site["step"]
    state.enter("rollout", frozenset(formats))
    return state
