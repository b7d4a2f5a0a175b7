"""Gradients of everything that is injected: sound ones pass, and each planted wrong one fails the check of its arm."""

from dataclasses import replace

import pytest
import torch

from fp4rl.inject import linear, rounding, site
from fp4rl.inject.linear import LinearState
from fp4rl.inject.rounding import Estimator
from fp4rl.inject.site import SiteState
from fp4rl.lab.preflight import numbers
from fp4rl.lab.preflight.gradients import checks_of
from fp4rl.lab.preflight.kinds import kinds_of
from fp4rl.lab.preflight.model import modules_of
from fp4rl.lab.preflight.oracle import slope

TURNED = {"name": "mxfp4", "rotation": 32}
W4A4 = {"mode": "w4a4"}
SCHEDULE = {"weight": {"before": "mxfp8", "from_step": 2, "over": 3}, "input": {"from_step": 4}}
INJECTIONS = {
    "identity": W4A4,
    "clipped": W4A4 | {"straight_through": "clipped"},
    "fallback": W4A4 | {"input": {"name": "mxfp4", "fallback": 0.5}, "straight_through": "clipped"},
    "another fallback": W4A4 | {"input": {"name": "mxfp4", "fallback": 0.5}},
    "smooth": W4A4 | {"straight_through": "smooth", "smooth": {"points": ["weight", "input"]}},
    "rotated": {"weight": TURNED, "input": TURNED, "straight_through": "clipped"},
    "gradients": W4A4 | {"grad_input": "mxfp8", "grad_weight": "mxfp8"},
    "a cache": {"kv_cache": "mxfp4", "straight_through": "clipped"},
    "drawn weights": {"weight": "mxfp4_sr"},
    "drawn inputs": {"input": "mxfp4_sr"},
    "a schedule": W4A4 | {"schedule": SCHEDULE, "straight_through": "clipped"},
    "a pattern": W4A4 | {"by_pattern": {"*.down_proj": {"input": "none"}}, "fused_groups": "free"},
}


def everywhere(monkeypatch, change):
    """Put `change` in the place of what passes gradients of a rounded tensor to its master."""
    for module in (site, linear):
        monkeypatch.setattr(module, "through", change)


def nothing_passes(monkeypatch):
    """Rounding without a straight-through estimator: the derivative is 0 almost everywhere."""
    everywhere(monkeypatch, lambda master, copy, *_: copy + 0 * (master - master.detach()))


def clipped_values_pass(monkeypatch):
    monkeypatch.setattr(rounding, "within_reach", lambda x, fmt: torch.ones_like(x, dtype=torch.bool))


def what_one_rounding_clips_is_stopped(monkeypatch):
    sound = rounding.within_reach
    monkeypatch.setattr(rounding, "within_reach", lambda x, fmt: sound(x, replace(fmt, fallback=None)))


def all_blocks_fall_back(monkeypatch):
    sound = site.fake_quantize
    monkeypatch.setattr(
        site,
        "fake_quantize",
        lambda x, fmt, generator=None: sound(x, replace(fmt, fallback=fmt.fallback and 1.0), generator=generator),
    )


def without_its_cap(monkeypatch):
    sound = rounding.smooth_slope
    monkeypatch.setattr(rounding, "smooth_slope", lambda x, fmt, k, cap: sound(x, fmt, k, 1e9))


def in_the_basis_of_the_values(monkeypatch):
    monkeypatch.setattr(rounding, "_passed", lambda g, reach, rotation: g if reach is None else g * reach)


def an_operand_unrounded(monkeypatch):
    sound = SiteState.gradient
    monkeypatch.setattr(SiteState, "gradient", lambda self, p, g: g if p == "grad_input" else sound(self, p, g))


def an_estimator_for_layers_alone(monkeypatch):
    sound = Estimator.of
    monkeypatch.setattr(
        Estimator, "of", lambda own, point, fmt: None if point == "kv_cache" else sound(own, point, fmt)
    )


def another_draw_in_the_backward(monkeypatch):
    sound = LinearState.forward

    def twice(self, layer, x):
        given = sound(self, layer, x)
        self.rng.step += 1
        self.forget()
        passed = sound(self, layer, x)
        return passed + (given - passed).detach()

    monkeypatch.setattr(LinearState, "forward", twice)


def draws_that_round_down(monkeypatch):
    sound = site.fake_quantize
    monkeypatch.setattr(
        site, "fake_quantize", lambda x, fmt, generator=None: sound(x * (1 - 2**-4), fmt, generator=generator)
    )


def the_gradient_of_the_last_format(monkeypatch):
    monkeypatch.setattr(site, "passing", lambda before, after, like, share: after)


PLANTS = {
    "identity": (nothing_passes, "grad_input of weight mxfp4, input mxfp4, identity: off by 1"),
    "clipped": (clipped_values_pass, "grad_input of weight mxfp4, input mxfp4, clipped: off by"),
    "fallback": (
        what_one_rounding_clips_is_stopped,
        "grad_input of weight mxfp4, input mxfp4, clipped: off by",
    ),
    "another fallback": (all_blocks_fall_back, "result of weight mxfp4, input mxfp4, identity: off by"),
    "smooth": (without_its_cap, "grad_input of weight mxfp4, input mxfp4, smooth: off by"),
    "rotated": (in_the_basis_of_the_values, "grad_input of weight mxfp4, input mxfp4, clipped: off by"),
    "gradients": (an_operand_unrounded, "grad_input of weight mxfp4, input mxfp4, grad_input mxfp8"),
    "a cache": (an_estimator_for_layers_alone, "grad_key of kv_cache mxfp4, clipped: off by"),
    "drawn weights": (another_draw_in_the_backward, "grad_input of weight mxfp4_sr, identity: off by"),
    "drawn inputs": (draws_that_round_down, "levels of input mxfp4_sr, identity"),
    "a schedule": (
        the_gradient_of_the_last_format,
        "grad_weight of weight mxfp4, input mxfp4, clipped, step 3: off by",
    ),
    "a pattern": (nothing_passes, "grad_input of weight mxfp4, input mxfp4, identity: off by 1"),
}


@pytest.mark.parametrize("which", INJECTIONS)
def test_a_wrong_gradient_of_what_is_injected_fails(which, subject, rows, monkeypatch):
    own = subject(a={"injection": INJECTIONS[which]})
    (row,) = rows(numbers, "gradients", own)
    assert row.verdict == "pass", row.measured
    plant, measured = PLANTS[which]
    plant(monkeypatch)
    (row,) = rows(numbers, "gradients", own)
    assert row.verdict == "fail"
    assert row.measured.startswith(measured)


def test_the_derivative_of_the_oracle_is_that_of_the_paper_by_hand():
    """DGE with k = 5 and a cap of 3: 1/k at a level, |2t - 1|^(-0.8) / 5 between, the cap half-way, 0 beyond."""
    units = torch.tensor([0.0, 0.5, 0.625, 0.75, 4.0, 4.5, 5.0, 6.0, 6.01], dtype=torch.float64)
    wanted = [0.2, 0.2, 0.5**-0.8 / 5, 3.0, 0.2, 0.5**-0.8 / 5, 3.0, 0.2, 0.0]
    assert slope(units, (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), 5.0, 3.0).tolist() == pytest.approx(wanted)


def test_every_kind_of_site_and_every_stage_is_compared(subject):
    """Three comparisons a layer, at four stages: before, in the blend, as inputs begin, and as deployed."""

    def kinds(which):
        own = subject(a={"injection": INJECTIONS[which]}).arms["a"]
        return [*kinds_of(modules_of(own.model), own.injection)]

    names = [check.name for kind in kinds("a schedule") for check in checks_of(kind)]
    assert len(names) == 3 * 4
    assert {name.rpartition(", ")[2] for name in names} == {"step 1", "step 3", "step 4", "clipped"}
    assert [kind.site.input is None for kind in kinds("a pattern")] == [False, True]
