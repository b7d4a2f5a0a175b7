"""A site that should act in a phase and is never called there stops the run in its first steps (P10)."""

import pytest
import torch
from torch import nn

from fp4rl.inject.attach import attach
from fp4rl.rl.phases import Phases
from fp4rl.spec.errors import CheckFailed
from fp4rl.spec.injection import Injection


class WithABypass(nn.Module):
    """Two layers, of which the forward may pass one by."""

    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(32, 32), nn.Linear(32, 32)
        self.bypass = True

    def forward(self, x):
        return self.up_proj(x) if self.bypass else self.down_proj(self.up_proj(x))


def spend(phases, phase):
    """One forward in a phase, as the trainer makes it."""
    x = torch.ones(1, 32)
    if phase == "rollout":
        with phases.rollout(0), torch.no_grad():
            phases.model(x)
    else:
        phases.model(x)
        phases.require_calls("training")


@pytest.mark.parametrize("phase", ["rollout", "training"])
def test_a_site_that_is_passed_by_stops_the_run(phase):
    model = WithABypass()
    with attach(model, Injection.named("w4a16")) as harmed:
        phases = Phases(model, harmed, None, seed=0, total_steps=1, record=lambda _: None)
        with pytest.raises(CheckFailed, match=f"1 of 2 sites was never called during {phase}.*: down_proj"):
            spend(phases, phase)


@pytest.mark.parametrize("phase", ["rollout", "training"])
def test_where_every_site_is_called_the_run_goes_on(phase):
    model = WithABypass()
    model.bypass = False
    with attach(model, Injection.named("w4a16")) as harmed:
        spend(Phases(model, harmed, None, seed=0, total_steps=1, record=lambda _: None), phase)
        assert harmed.phase == "training"
