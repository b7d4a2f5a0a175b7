"""Multiplicative noise is relative to what a norm multiplies by, held against norms written out here in float64."""

import contextlib

import pytest
import torch
from torch import nn
from transformers.models.bamba.modeling_bamba import BambaRMSNormGated
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm, Qwen3NextRMSNormGated

from fp4rl.noise import perturb as perturb_room
from fp4rl.noise.perturb import perturb
from fp4rl.noise.targets import noisy_weights
from fp4rl.noise.warnings import noise_warnings
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.noise import Noise

WIDTH, SIGMA = 1024, 0.05
MULTIPLICATIVE = Noise(operation="multiplicative")


class One(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm


def _model(norm, weight=0.0):
    nn.init.constant_(norm.weight, weight)
    return One(norm)


def _values(seed, shape=(3, WIDTH)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _generator():
    return torch.Generator().manual_seed(0)


def _rms(x):
    exact = x.double()
    return exact / (exact.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def _layer(x):
    return _rms(x.double() - x.double().mean(-1, keepdim=True))


ZERO_CENTRED = [(GemmaRMSNorm, _rms), (Qwen3NextRMSNorm, _rms), (NemotronLayerNorm1P, _layer)]


@pytest.mark.parametrize(("kind", "written_out"), ZERO_CENTRED, ids=lambda value: value.__name__)
def test_a_zero_centred_norm_is_perturbed_by_its_share_of_one_plus_its_weight(kind, written_out):
    model, x = _model(kind(WIDTH, eps=1e-6), weight=0.25), _values(1)
    with torch.no_grad(), perturb(model, MULTIPLICATIVE, SIGMA, generator=_generator()) as (record,):
        factor = model.norm(x).double() / written_out(x)  # what each feature is multiplied by
    assert torch.allclose(factor, factor[:1].expand_as(factor), rtol=1e-4)
    change = factor[0] / 1.25 - 1
    assert float(change.std()) == pytest.approx(SIGMA, rel=0.07)
    assert record.realised == pytest.approx(float(change.square().mean().sqrt()), rel=1e-3)
    assert torch.equal(model.norm.weight, torch.full((WIDTH,), 0.25))


def test_a_zero_centred_norm_as_it_is_made_takes_multiplicative_noise_and_another_kind_of_norm_keeps_its_zeros():
    with perturb(_model(GemmaRMSNorm(WIDTH)), MULTIPLICATIVE, SIGMA, generator=_generator()) as (record,):
        assert record.realised == pytest.approx(record.drawn, rel=1e-3)
    with perturb(_model(LlamaRMSNorm(WIDTH)), MULTIPLICATIVE, SIGMA, generator=_generator()) as (record,):
        assert record.realised == 0


@pytest.mark.parametrize("kind", [Qwen3NextRMSNormGated, BambaRMSNormGated])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_gated_norm_computes_in_float32_with_the_noisy_weight(kind, dtype):
    sizes = (WIDTH,) if kind is Qwen3NextRMSNormGated else (WIDTH, WIDTH)
    model = _model(kind(*sizes, eps=1e-6).to(dtype), weight=1.0)

    def seen(seed):
        x, gate = _values(seed).to(dtype), _values(seed + 1).to(dtype)
        swish = gate.double() * gate.double().sigmoid()
        plain = _rms(x) * swish if kind is Qwen3NextRMSNormGated else _rms(x.double() * swish)
        return model.norm(x, gate).double(), plain

    noise = Noise(operation="multiplicative", precision="float32")
    with torch.no_grad(), perturb(model, noise, SIGMA, generator=_generator()) as (record,):
        first, plain = seen(3)
        factor = first[0] / plain[0]
        other, plain = seen(5)
    assert torch.allclose(other, plain * factor, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4)
    assert record.realised == pytest.approx(float((factor - 1).square().mean().sqrt()), rel=1e-2)
    assert record.drawn == pytest.approx(SIGMA, rel=0.07)


def test_noise_that_a_norms_output_does_not_show_fails(monkeypatch):
    monkeypatch.setattr(perturb_room, "_in_float32", lambda *_: contextlib.nullcontext())
    noise = Noise(precision="float32")
    with pytest.raises(CheckFailed, match=r"but its norm's output changes by 0$"):
        perturb(_model(GemmaRMSNorm(WIDTH)), noise, SIGMA, generator=_generator()).__enter__()


class ExponentialRMSNorm(GemmaRMSNorm):
    def forward(self, x):
        return (self._norm(x.float()) * self.weight.float().exp()).type_as(x)


class AddingRMSNorm(GemmaRMSNorm):
    def forward(self, x, residual):
        return super().forward(x + residual)


def test_a_norm_that_multiplies_by_something_else_is_refused_by_name():
    with pytest.raises(InvalidValueError, match=r"norm: AddingRMSNorm cannot be tried alone .*residual.*leave: \[norm"):
        noisy_weights(_model(AddingRMSNorm(WIDTH)), Noise())
    with pytest.raises(InvalidValueError, match=r"norm: ExponentialRMSNorm multiplies by neither.*leave: \[norm"):
        noisy_weights(_model(ExponentialRMSNorm(WIDTH)), Noise())


def test_what_bfloat16_swallows_is_told_by_the_resolution_of_the_weight_that_is_written():
    """A weight near 0 is finer than the 1 + w that is perturbed: nothing is lost there, and all of it beside 1.0."""
    noise = Noise(operation="multiplicative", schedule={"kind": "constant", "sigma": 5e-4})
    assert not list(noise_warnings(_model(GemmaRMSNorm(WIDTH).bfloat16(), weight=1e-3), noise, 10))
    (lost,) = noise_warnings(_model(LlamaRMSNorm(WIDTH).bfloat16(), weight=1.0), noise, 10)
    assert "swallow all of its noise" in lost
