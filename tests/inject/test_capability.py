"""No silent no-op: every combination that can be written either acts, and evidence shows it, or is refused."""

from dataclasses import replace
from itertools import product
from typing import get_args

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from fp4rl.inject.attach import attach
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import FORMATS, MXFP4, ScaleRule
from fp4rl.spec.hardware import CAPABILITIES, SPARSE, HardwareError
from fp4rl.spec.injection import PHASES, Injection
from fp4rl.spec.points import FORMAT_POINTS, GRADIENTS


class Block(nn.Module):
    """One attention with its projections: every point of an injection has a place here."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(64, 64))

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (2, 32)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


def numbers(block, injection, phase="training"):
    """(output and all gradients, evidence) of one training step in a phase."""
    x = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(1)).mul_(2).requires_grad_()
    block.zero_grad()
    with attach(block, injection) as harmed:
        harmed.set_phase(phase)
        y = block(x)
        y.square().sum().backward()
        rows = harmed.evidence()
    return [y.detach(), x.grad.clone(), *(p.grad.clone() for p in block.parameters())], rows


def differ(one, other):
    return any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def block():
    return Block()


@pytest.fixture(scope="module")
def clean(block):
    return numbers(block, Injection())[0]


def test_the_table_holds_every_combination():
    assert len(CAPABILITIES) == 8 * 5 * 3
    assert sum(reason is None for reason in CAPABILITIES.values()) == 8 * 3 * 3 + 8 + 4 - 2


@pytest.mark.parametrize(("kind", "point", "when"), CAPABILITIES)
def test_every_hardware_error_acts_or_is_refused(block, clean, kind, point, when):
    scale = 0.003 if kind == "saturation" else 0.3  # below most values, so that it clamps some
    fields = {"kind": kind, "point": point, "when": when, "scale": scale, "share": 0.2 if kind in SPARSE else None}
    reason = CAPABILITIES[kind, point, when]
    if reason is not None:
        with pytest.raises(ValidationError, match="would do nothing"):
            HardwareError(**fields)
        return
    found, rows = numbers(block, Injection(errors=(HardwareError(**fields),)))
    assert differ(found, clean)
    # Attention that is written out differs from the fused kernel by float noise.
    assert torch.allclose(found[0], clean[0], atol=1e-5) == (when == "backward")
    assert rows
    assert all(row.calls > 0 for row in rows)
    directions = {"backward" if ":" in row.point else "forward" for row in rows if row.share_changed > 0}
    both = {"forward", "backward"} if point != "weight" else {"forward"}
    assert directions == ({when} if when != "both" else both)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("point", FORMAT_POINTS)
def test_every_format_at_every_point_acts(block, clean, point, fmt):
    found, rows = numbers(block, Injection.model_validate({point: fmt}))
    assert differ(found, clean)
    assert {row.point for row in rows} == {point}
    assert all(row.share_changed > 0 and row.calls > 0 and row.elements > 0 for row in rows)


EVERYWHERE = {"weight": ["rollout", "training", "evaluation", "reference"]}
RULES = [replace(MXFP4, scale_rule=rule) for rule in get_args(ScaleRule) if rule != "amax"]


@pytest.mark.parametrize("fmt", [*RULES, *(FORMATS[name] for name in ("nvfp4", "fp8", "bf16"))], ids=str)
@pytest.mark.parametrize("point", [point for point in FORMAT_POINTS if point not in GRADIENTS])
def test_the_clipped_variant_acts_or_is_refused(block, point, fmt):
    content = {point: fmt, "straight_through": "clipped"}
    if fmt.scale in ("fp32", "none") or fmt.scale_rule in ("ceil", "rceil"):
        with pytest.raises(ValidationError, match="no format here clips"):
            Injection.model_validate(content)
        return
    injection = Injection.model_validate(content)
    identity = numbers(block, injection.model_copy(update={"straight_through": "identity"}))[0]
    assert differ(numbers(block, injection)[0], identity)


@pytest.mark.parametrize(("point", "phase"), list(product([*FORMAT_POINTS, "errors"], PHASES)))
def test_every_point_acts_in_its_phases_and_in_no_other(block, clean, point, phase):
    content = {"errors": [{"kind": "relative"}]} if point == "errors" else {point: "mxfp4"}
    if point not in GRADIENTS:
        content["apply_during"] = {point: [phase]}
    injection = Injection.model_validate(content)
    for other in PHASES:
        acts = other == ("training" if point in GRADIENTS else phase)
        found, rows = numbers(block, injection, other)
        assert differ(found, clean) == acts
        assert bool(rows) == acts


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            {"mode": "w4a16", "straight_through": "clipped", "apply_during": ["rollout"]},
            "no point is active in training",
        ),
        ({"errors": [{"when": "backward"}], "apply_during": ["rollout"]}, "leaves training out"),
        ({"errors": [{"kind": "spikes"}]}, "name it"),
        ({"errors": [{"share": 0.5}]}, "would do nothing"),
        ({"errors": [{"unit": "largest"}]}, "in proportion to each value already"),
        ({"errors": [{"scale": 0}]}, "greater than 0"),
        ({"input": "mxfp4", "lora": "merged"}, "`weight` is none"),
        ({"input": "mxfp4", "frozen_base": "packed"}, "`weight` is none"),
        (
            {"weight": "mxfp4", "frozen_base": "packed", "lora": "merged", "apply_during": EVERYWHERE},
            "needs the unpacked W",
        ),
        ({"weight": "mxfp4", "apply_during": {"weight": []}}, "at least 1"),
    ],
)
def test_settings_that_would_do_nothing_are_refused_at_once(content, reason):
    with pytest.raises(ValidationError, match=reason):
        Injection.model_validate(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"weight": "mxfp4", "lora": "merged"}, "lora: merged would do nothing"),
        (
            {"weight": "mxfp4", "frozen_base": "packed", "apply_during": EVERYWHERE},
            "frozen_base: packed would do nothing",
        ),
        ({"kv_cache": "mxfp4"}, "kv_cache would do nothing"),
    ],
)
def test_settings_that_find_no_site_are_refused_by_resolve(content, reason):
    with pytest.raises(InvalidValueError, match=reason):
        attach(nn.Linear(64, 64), Injection.model_validate(content))


def test_a_gradient_format_for_frozen_weights_is_refused():
    layer = nn.Linear(64, 64).requires_grad_(False)
    with pytest.raises(InvalidValueError, match="grad_weight would do nothing: every taken weight is frozen"):
        attach(layer, Injection(grad_weight="mxfp4"))
