"""The clamp of learned clipping in a preflight: planted faults in the live clamp, and clean cases beside them."""

import pytest
import torch

from fp4rl.lab.preflight import clamps
from fp4rl.rl import clamp as clamp_room

CLIPPING = {"training": {"learned_clipping": {"lr": 0.1}}}


def verdicts(rows, subject, **injection):
    return [row.verdict for row in rows(clamps, "clamps", subject(a=CLIPPING | {"injection": injection}))]


@pytest.mark.parametrize("weight", ["mxfp4", "mxfp4_2d", "nvfp4", "fp8"])
def test_the_clamp_of_each_format_is_its_formula(weight, subject, rows):
    assert verdicts(rows, subject, weight=weight) == ["pass"]


def test_an_arm_without_learned_clipping_has_no_such_row(subject, rows):
    assert rows(clamps, "clamps", subject(a={"injection": {"mode": "w4a16"}})) == ()


def test_weights_of_equal_size_share_the_gradient_of_their_bound(subject, rows, monkeypatch):
    """A start in few digits has blocks with several largest weights."""
    masters_of = clamps.masters_of

    def coarse(model, *rest):
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_((weight * 16).round() / 16)
        return masters_of(model, *rest)

    monkeypatch.setattr(clamps, "masters_of", coarse)
    assert verdicts(rows, subject, weight="mxfp4") == ["pass"]


def _other_bound(clamp):
    def call(self, master):
        return clamp(self, 1.01 * master)

    return call


def _no_way_to_the_largest(clamp):
    """A bound that autograd does not take back to the block's largest weight."""

    def call(self, master):
        blocks = self._blocks.split(self._stored(master).contiguous())
        largest = blocks.detach().abs().amax(self._blocks.axes, keepdim=True)
        bound = self._blocks.scales_inside(self.strength).sigmoid() * largest
        return self._stored(self._blocks.join(blocks.clamp(-bound, bound))).contiguous()

    return call


def _of_whole_rows(clamp):
    """One strength for a row: that of its first block."""

    def call(self, master):
        kept = self.strength
        self.strength = torch.nn.Parameter(kept[..., :1].expand_as(kept).contiguous())
        try:
            return clamp(self, master) + 0 * kept.sum()
        finally:
            self.strength = kept

    return call


def _not_a_number(clamp):
    def call(self, master):
        return clamp(self, master) * float("nan")

    return call


@pytest.mark.parametrize("fault", [_not_a_number, _other_bound, _no_way_to_the_largest, _of_whole_rows])
def test_a_clamp_that_is_not_its_formula_fails(fault, subject, rows, monkeypatch):
    assert verdicts(rows, subject, weight="mxfp4") == ["pass"]
    monkeypatch.setattr(clamp_room.Clamp, "__call__", fault(clamp_room.Clamp.__call__))
    assert verdicts(rows, subject, weight="mxfp4") == ["fail"]
