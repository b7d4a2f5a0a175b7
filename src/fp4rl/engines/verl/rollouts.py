"""What a worker's rollout engine rounds besides weights: by the sites of the worker's own policy, and counted there.

A worker sends weights to one server. Before it does, it takes what that server has counted since the last ones; once
they are there, the server is told what to round until the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fp4rl.engines.rollout.kinds import active, not_computed, rounded_points
from fp4rl.engines.rollout.server import credit, described
from fp4rl.engines.verl.policy import Policy
from fp4rl.inject.site import SiteState
from fp4rl.spec.errors import EngineDiffers, InvalidValueError
from fp4rl.spec.points import Phase


@dataclass
class Rollouts:
    """The rollout engine of one worker: its policy, and verl's handle of the server (a ray actor, `replica.Server`)."""

    policy: Policy
    server: Any
    _phase: Phase | None = None
    _sites: Sequence[SiteState] = ()

    async def begin(self) -> None:
        """Let the server round what is active in the phase that the last weights were sent for.

        Raises InvalidValueError for what its vLLM does not compute as the policy does.
        """
        phase = self.policy.phase_of_streams
        with self.policy.during(phase):
            sites = active(self.policy.states)
            against = [what for what in map(not_computed, sites) if what]
            rows, injection = described(sites)
        if not any(row["formats"] for row in rows):
            return
        against = against or await self.server.fp4rl_begin.remote(rows, injection)
        for why in against:
            raise InvalidValueError(f"verl's vLLM: {why} (or keep it to training: injection.apply_during)")
        self._phase, self._sites = phase, sites

    async def end(self) -> None:
        """Credit what the server counted to the policy's sites. Raises EngineDiffers where a site rounded fewer values
        than the answers have tokens."""
        if self._phase is None:
            return
        (phase, sites), self._phase = (self._phase, self._sites), None
        tokens, counted = await self.server.fp4rl_end.remote()
        if not tokens:
            return
        with self.policy.during(phase):
            credit(sites, counted)
            for state, row in zip(sites, counted, strict=True):
                _require_all(state, row, tokens)


def _require_all(state: SiteState, row: Any, tokens: int) -> None:
    """Raise EngineDiffers for a linear layer that met fewer inputs than tokens were answered."""
    if state.plan.site.kind != "linear":
        return
    for point in rounded_points(state):
        rounded, width = row["meters"][point][1], state.plan.site.shape[-1]
        if rounded < tokens * width:
            raise EngineDiffers(
                f"{state.plan.name}: verl's vLLM answered with {tokens} tokens, and rounded {point} of "
                f"{rounded // width}",
                "calls",
            )
