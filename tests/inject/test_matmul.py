"""Errors in matmul results: as large as asked, where and when asked, and the same again from the same seed."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from fp4rl.inject.attach import attach
from fp4rl.inject.faults import SiteRng, apply_error
from fp4rl.spec.errors import InvalidValueError, NotFoundError
from fp4rl.spec.hardware import HardwareError
from fp4rl.spec.injection import Injection
from fp4rl.spec.targets import Targets


def error(**fields):
    return Injection(errors=(HardwareError(**fields),), apply_during=["rollout", "training", "evaluation"])


def passed(layer, x, injection):
    """(y, grad_x, grad_weight) of sum(y * g) under an injection."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    with attach(layer, injection):
        y = layer(x)
        y.backward(torch.ones_like(y))
    return y.detach(), x.grad, layer.weight.grad


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(0)
    return nn.Linear(256, 1024)


@pytest.fixture(scope="module")
def x():
    return torch.randn(512, 256, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.05, 0.2])
def test_relative_noise_has_the_size_that_was_asked(layer, x, scale, dtype):
    layer, x = nn.Linear(256, 1024, bias=False, dtype=dtype), x.to(dtype)
    clean = layer(x).detach().float()
    noisy = passed(layer, x, error(scale=scale))[0].float()
    ratio = ((noisy - clean) / clean)[clean.abs() > clean.abs().median()]
    assert float(ratio.std()) == pytest.approx(scale, rel=0.01)
    assert abs(float(ratio.mean())) < 0.01 * scale


@pytest.mark.parametrize("when", ["forward", "backward", "both"])
def test_the_direction_is_the_one_asked(layer, x, when):
    clean, noisy = passed(layer, x, Injection()), passed(layer, x, error(when=when))
    changed = [not torch.equal(a, b) for a, b in zip(clean, noisy, strict=True)]
    assert changed == [when != "backward", when != "forward", when != "forward"]


def test_both_backward_products_have_the_size_that_was_asked(layer, x):
    clean, noisy = passed(layer, x, Injection()), passed(layer, x, error(when="backward"))
    for a, b in zip(clean[1:], noisy[1:], strict=True):
        assert float(((b - a) / a)[a.abs() > a.abs().median()].std()) == pytest.approx(0.05, rel=0.01)


def test_absolute_noise_has_the_size_that_was_asked(layer, x):
    clean, noisy = passed(layer, x, Injection()), passed(layer, x, error(kind="absolute", scale=0.3))
    assert float((noisy[0] - clean[0]).std()) == pytest.approx(0.3, rel=0.01)


def test_the_same_seed_gives_the_same_values_and_another_seed_others(layer, x):
    injection = error(when="both")
    first, again = passed(layer, x, injection), passed(layer, x, injection)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = passed(layer, x, injection.model_copy(update={"seed": 1}))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_two_sites_draw_different_noise(x):
    model = nn.ModuleDict({name: nn.Linear(256, 64, bias=False) for name in "ab"})
    model["b"].weight.data.copy_(model["a"].weight.data)
    with attach(model, error()), torch.no_grad():
        assert not torch.equal(model["a"](x), model["b"](x))


def test_the_next_step_and_another_input_draw_anew(layer, x):
    with attach(layer, error()) as harmed, torch.no_grad():
        first = layer(x)
        assert torch.equal(layer(x), first)
        harmed.invalidate()
        assert not torch.equal(layer(x), first)


def test_jitter_never_repeats_itself(layer, x):
    with attach(layer, error(kind="jitter")), torch.no_grad():
        assert not torch.equal(layer(x), layer(x))


def test_an_error_meets_the_layers_that_it_names_alone(x):
    model = nn.ModuleDict({name: nn.Linear(256, 64) for name in "ab"})
    injection = Injection(errors=(HardwareError(targets=Targets(take=("b",))),))
    with torch.no_grad():
        clean = {name: model[name](x) for name in "ab"}
        with attach(model, injection):
            assert torch.equal(model["a"](x), clean["a"])
            assert not torch.equal(model["b"](x), clean["b"])


def test_an_error_for_a_layer_that_does_not_exist_is_refused(layer):
    injection = Injection(errors=(HardwareError(targets=Targets(take=("*.q_prj",))),))
    with pytest.raises(NotFoundError, match=r"no linear site matches '\*\.q_prj'; did you mean '\*\.q_proj'"):
        attach(nn.ModuleDict({"a": nn.ModuleDict({"q_proj": layer})}), injection)


def test_errors_stay_out_of_evaluations_unless_named(layer, x):
    clean = layer(x)
    with attach(layer, Injection(errors=(HardwareError(),))) as harmed:
        harmed.set_phase("evaluation")
        assert torch.equal(layer(x), clean)
        harmed.set_phase("rollout")
        assert not torch.equal(layer(x), clean)


def test_noise_comes_on_top_of_rounding(layer, x):
    both = Injection.named("w4a4", errors=(HardwareError(),))
    alone, with_noise = passed(layer, x, Injection.named("w4a4"))[0], passed(layer, x, both)[0]
    ratio = ((with_noise - alone) / (alone - layer.bias.detach()))[(alone - layer.bias).abs() > 0.3]
    assert float(ratio.std()) == pytest.approx(0.05, rel=0.02)


def test_evidence_shows_the_realised_size_by_direction(layer, x):
    layer.zero_grad()
    with attach(layer, error(when="both")) as harmed:
        layer(x).sum().backward()
        rows = {row.point: row for row in harmed.evidence()}
    assert set(rows) == {
        "relative@matmul/both",
        "relative@matmul/both:grad_weight",
    }
    for row in rows.values():
        assert row.calls == 1
        assert row.relative_error == pytest.approx(0.05, rel=0.1)


class TestFaults:
    """Each fault on plain numbers."""

    x = torch.tensor([[-3.0, -0.1, 0.0, 0.2, 4.0, 1.0, -1.0, 0.4]])

    def made(self, **fields):
        return apply_error(self.x, HardwareError(**fields), SiteRng(0).fixed(self.x.device, ""))

    def test_dead_zone(self):
        assert self.made(kind="dead_zone", scale=0.3).tolist() == [
            [-3.0, 0.0, 0.0, 0.0, 4.0, 1.0, -1.0, pytest.approx(0.4)]
        ]

    def test_a_dead_zone_as_a_share_of_the_largest_value(self):
        made = self.made(kind="dead_zone", scale=0.05, unit="largest")  # 0.05 * 4
        assert made.count_nonzero() == 6

    def test_saturation(self):
        assert float(self.made(kind="saturation", scale=1.0).abs().max()) == 1.0

    def test_bias(self):
        assert torch.equal(self.made(kind="bias", scale=0.5), self.x + 0.5)

    def test_spikes_hit_the_share_that_was_asked(self):
        x = torch.zeros(200, 100)
        wrong = apply_error(x, HardwareError(kind="spikes", scale=9, share=0.1), SiteRng(0).fixed(x.device, ""))
        assert float((wrong != 0).float().mean()) == pytest.approx(0.1, rel=0.1)
        assert wrong.unique().tolist() == [-9.0, 0.0, 9.0]

    def test_stuck_channels_are_the_same_ones_everywhere(self):
        x = torch.randn(50, 40)
        wrong = apply_error(x, HardwareError(kind="stuck", scale=7, share=0.1), SiteRng(0).fixed(x.device, ""))
        stuck = (wrong == 7).all(0)
        assert int(stuck.sum()) == 4
        assert torch.equal(wrong[:, ~stuck], x[:, ~stuck])


def test_a_stuck_channel_stays_where_it_is_from_step_to_step(layer, x):
    with attach(layer, error(kind="stuck", share=0.01, scale=3)) as harmed, torch.no_grad():
        first = layer(x) == 3 + layer.bias
        harmed.invalidate()
        assert torch.equal(layer(x.flip(0)) == 3 + layer.bias, first)
        assert first.all(0).sum() == 10


class Attention(nn.Module):
    """Projections by name, and grouped-query attention in one call."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(64, 128), nn.Linear(64, 64), nn.Linear(64, 64)
        self.causal, self.mask = True, None

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (-1, 32)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return scaled_dot_product_attention(
            q, k, v, attn_mask=self.mask, is_causal=self.causal, enable_gqa=True, scale=0.1
        )


@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_the_written_out_attention_is_the_fused_one_when_the_error_is_nil(mask):
    module, x = Attention(), torch.randn(2, 9, 64)
    if mask:
        module.causal, keep = False, torch.ones(9, 9, dtype=torch.bool).tril()
        module.mask = keep if mask == "bool" else torch.zeros(9, 9).masked_fill(~keep, -torch.inf)
    plain = module(x)
    with attach(module, error(point="scores", scale=1e-12)):
        assert torch.allclose(module(x), plain, atol=1e-5)


@pytest.mark.parametrize("point", ["scores", "values"])
def test_attention_products_go_wrong_in_the_direction_asked(point):
    module, x = Attention(), torch.randn(2, 9, 64)
    plain = module(x)
    plain.sum().backward()
    clean = module.q_proj.weight.grad.clone()
    for when in ("forward", "backward"):
        module.zero_grad()
        with attach(module, error(point=point, when=when)) as harmed:
            y = module(x)
            y.sum().backward()
            rows = harmed.evidence()
        assert torch.allclose(y, plain, atol=1e-5) == (when == "backward")
        if when == "backward":
            assert not torch.allclose(module.q_proj.weight.grad, clean, rtol=1e-3)
        assert all(row.relative_error == pytest.approx(0.05, rel=0.15) for row in rows)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("point", ["scores", "values"])
def test_a_row_that_sees_nothing_is_0_as_in_sdpa(kind, point):
    """Fault: padding on the left masks whole rows, whose softmax is NaN; a run with noise of 1e-7 had 3 % accuracy."""
    module, x = Attention(), torch.randn(2, 9, 64)
    module.causal, keep = False, torch.ones(9, 9, dtype=torch.bool).tril()
    keep[:3] = False
    module.mask = keep if kind == "bool" else torch.zeros(9, 9).masked_fill(~keep, -torch.inf)
    plain = module(x)
    assert torch.equal(plain[:, :, :3], torch.zeros_like(plain[:, :, :3]))
    with attach(module, error(point=point, scale=1e-12)):
        noisy = module(x)
        noisy.sum().backward()
    assert torch.allclose(noisy, plain, atol=1e-5)
    assert all(p.grad.isfinite().all() for p in module.parameters())


class Gated(Attention):
    """Multiplies three times, so that nobody knows what a key is."""

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (-1, 32)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return torch.matmul(torch.matmul(torch.matmul(q, k.mT), q @ k.mT), v) + scaled_dot_product_attention(q, k, v)


def test_products_that_are_not_those_of_attention_are_refused_by_name():
    module, said = Gated(), r"Gated multiplies 4 times and calls sdpa 1 times.*leave kv_cache .*out"
    with attach(module, Injection(kv_cache="mxfp4")), pytest.raises(InvalidValueError, match=said):
        module(torch.randn(2, 9, 64))
