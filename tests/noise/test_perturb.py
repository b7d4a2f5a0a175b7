"""Noise that is really there while sampling, of the size asked for, and gone to the last bit afterwards."""

import contextlib
import hashlib
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from fp4rl.noise import perturb as perturb_room
from fp4rl.noise.evidence import NoiseEvidence, by_layer, require_drawn, require_noise, summary
from fp4rl.noise.perturb import draw_seed, noisy_copy, perturb
from fp4rl.noise.targets import noisy_weights
from fp4rl.noise.warnings import noise_warnings
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.noise import Noise

HIDDEN, LAYERS = 64, 4


class TinyRMSNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        exact = x.float()
        normed = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * normed.to(x.dtype)


class Layer(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.input_layernorm = TinyRMSNorm(size)
        self.post_attention_layernorm = TinyRMSNorm(size)
        self.up_proj = nn.Linear(size, size, bias=False)

    def forward(self, x):
        x = x + self.up_proj(self.input_layernorm(x))
        return x + self.post_attention_layernorm(x)


class Stack(nn.Module):
    def __init__(self, size=HIDDEN, layers=LAYERS):
        super().__init__()
        self.layers = nn.ModuleList(Layer(size) for _ in range(layers))
        self.norm = TinyRMSNorm(size)
        self.lm_head = nn.Linear(size, 11, bias=False)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Stack()


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _bits(model):
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("operation", ["additive", "multiplicative"])
def test_realised_noise_of_every_layer_is_within_two_percent_of_sigma_times_multiplier(operation):
    noise = Noise(operation=operation, multipliers={"by_layer": {0: 2.0, 3: 0.5}})
    model, generator, pooled = Stack(), _generator(), []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.7)
    for _ in range(60):
        with perturb(model, noise, 0.03, generator=generator) as evidence:
            pooled += evidence
    realised = {layer.layer: layer.realised for layer in by_layer(pooled)}
    for layer, multiplier in {0: 2.0, 1: 1.0, 2: 1.0, 3: 0.5, None: 1.0}.items():
        assert realised[layer] == pytest.approx(0.03 * multiplier, rel=0.02)


def test_the_evidence_is_measured_on_the_weights_that_are_there(model):
    before = model.norm.weight.detach().clone()
    with perturb(model, Noise(), 0.1, generator=_generator()) as evidence:
        change = (model.norm.weight.detach() - before).double().square().mean().sqrt()
    assert evidence[-1].name == "norm.weight"
    assert evidence[-1].realised == pytest.approx(float(change), rel=1e-6)


def test_multipliers_reach_the_weights(model):
    """The old fault: multipliers were configured in one process and never delivered to the one that sampled."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with perturb(model, Noise(multipliers={"by_layer": {1: 0.0}}), 0.1, generator=_generator()):
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {
        f"layers.{i}.{norm}.weight" for i in (0, 2, 3) for norm in ("input_layernorm", "post_attention_layernorm")
    } | {"norm.weight"}


def test_clean_weights_are_bit_equal_after_fifty_rollouts(model):
    clean, generator = _bits(model), _generator()
    for _ in range(50):
        with perturb(model, Noise(targets={"kinds": ["norm", "linear"]}), 0.05, generator=generator):
            assert _bits(model) != clean
    assert _bits(model) == clean


def test_with_an_adapter_nothing_accumulates_over_fifty_rollouts_and_the_adapter_takes_no_noise():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(Stack(), peft.LoraConfig(r=4, target_modules=["up_proj"]))
    clean, generator, noise = _bits(wrapped), _generator(), Noise(targets={"kinds": ["norm", "linear"]})
    for _ in range(50):
        with perturb(wrapped, noise, 0.05, generator=generator) as evidence:
            assert not any("lora" in item.name for item in evidence)
    assert _bits(wrapped) == clean
    assert {item.name for item in evidence} >= {"layers.0.up_proj.weight", "layers.0.input_layernorm.weight"}


def test_rollouts_are_noisy_and_training_is_not(model):
    from fp4rl.rl.phases import Phases

    clean, records = _bits(model), []
    phases = Phases(model, None, Noise(), seed=0, total_steps=29, record=records.append)
    for step in (3, 4):
        with phases.rollout(step):
            assert _bits(model) != clean
        assert _bits(model) == clean  # training
    assert [r.sigma for r in records if r.kind == "noise"] == [0.05, 0.05]


def test_the_course_of_an_epoch_aware_schedule_survives_a_resume(model):
    """The second of two epochs began at step 6 because the data did; a resumed run must not fall back to step 12."""
    from fp4rl.rl.phases import Phases

    def phases():
        noise = Noise(schedule={"kind": "epoch_aware", "epochs": 2})
        return Phases(model, None, noise, seed=0, total_steps=24, record=lambda _: None)

    before, after = phases(), phases()
    with before.rollout(6, data_epochs=1.0):
        pass
    after.restore(json.loads(json.dumps(before.state())))
    with after.rollout(9, data_epochs=1.5):
        assert after.sigma == pytest.approx(0.005)


def test_the_bits_come_back_after_an_exception(model):
    model = model.bfloat16()
    clean = _bits(model)
    with pytest.raises(RuntimeError, match="sampler"), perturb(model, Noise(), 0.5, generator=_generator()):
        raise RuntimeError("sampler")
    assert _bits(model) == clean


def test_adding_and_subtracting_would_not_bring_the_bits_back(model):
    """The planted defect: what a perturb without kept copies leaves behind in bfloat16."""
    weight = torch.randn(4096, generator=_generator()).bfloat16()
    noise = (0.05 * torch.randn(4096, generator=_generator(1))).bfloat16()
    assert not torch.equal(weight + noise - noise, weight)


def test_noise_is_fresh_at_every_rollout_and_the_same_for_the_same_generator(model):
    def first_norm(generator):
        with perturb(model, Noise(), 0.1, generator=generator):
            return model.layers[0].input_layernorm.weight.detach().clone()

    generator = _generator(5)
    one, two = first_norm(generator), first_norm(generator)
    assert not torch.equal(one, two)
    assert torch.equal(one, first_norm(_generator(5)))


def test_a_stream_of_weights_carries_the_same_noise_as_the_model_under_perturb(model):
    noise, generator = Noise(), _generator(7)
    seed = draw_seed(_generator(7))
    streamed = {w.name: noisy_copy(w, w.parameter, noise, 0.1, seed)[0] for w in reversed(noisy_weights(model, noise))}
    with perturb(model, noise, 0.1, generator=generator):
        there = dict(model.named_parameters())
        assert all(torch.equal(there[name], value) for name, value in streamed.items())


def test_bfloat16_swallows_small_noise_and_the_evidence_counts_it():
    model = Stack().bfloat16()
    with perturb(model, Noise(), 0.0005, generator=_generator()) as evidence:
        record = summary(evidence, 0.0005, step=0)
    # Half a step below 1.0 is 2^-9 = .00195, four standard deviations away.
    assert record.share_changed < 0.01
    assert record.swallowed >= 0.99 * record.elements


def test_float32_precision_keeps_noise_that_bfloat16_swallows():
    torch.manual_seed(0)
    model, x = Stack().bfloat16(), torch.randn(8, HIDDEN, generator=_generator()).bfloat16()
    clean, bits = model(x), _bits(model)
    with perturb(model, Noise(precision="float32"), 0.002, generator=_generator()) as evidence:
        assert _bits(model) == bits  # no weight is written at all
        assert not torch.equal(model(x), clean)
    assert all(item.share_changed > 0.999 and item.realised == pytest.approx(item.drawn, rel=1e-3) for item in evidence)
    assert torch.equal(model(x), clean)


def test_float32_precision_computes_what_a_noisy_weight_computes(model):
    """In an FP32 model both precisions are the same mathematics."""
    x = torch.randn(8, HIDDEN, generator=_generator())
    with perturb(model, Noise(), 0.1, generator=_generator(3)):
        written = model(x)
    with perturb(model, Noise(precision="float32"), 0.1, generator=_generator(3)):
        assert torch.allclose(model(x), written, atol=1e-6)


def test_a_graph_built_on_clean_weights_cannot_be_used_under_noise(model):
    loss = model(torch.randn(2, HIDDEN, generator=_generator())).sum()
    with (
        perturb(model, Noise(), 0.1, generator=_generator()),
        pytest.raises(RuntimeError, match="modified by an inplace"),
    ):
        loss.backward()


def test_sigma_zero_walks_the_machinery_and_changes_no_bit(model):
    clean = _bits(model)
    with perturb(model, Noise(control="sigma_zero"), 0.0, generator=_generator()) as evidence:
        assert _bits(model) == clean
    assert len(evidence) == 9
    require_noise(Noise(control="sigma_zero"), [evidence])


def test_a_run_that_asks_for_noise_and_shows_none_fails(model):
    with perturb(model, Noise(), 0.0, generator=_generator()) as silent:
        pass
    with pytest.raises(CheckFailed, match="no weight changed in 1 rollout;"):
        require_noise(Noise(), [silent])


def test_a_rollout_whose_noise_bfloat16_swallows_whole_is_not_a_wiring_fault():
    model = Stack().bfloat16()
    with perturb(model, Noise(), 1e-6, generator=_generator()) as swallowed:
        pass
    require_drawn(swallowed, 1e-6)
    with pytest.raises(CheckFailed, match="precision: float32 keeps it"):
        require_noise(Noise(), [swallowed])


def test_a_rollout_that_was_given_no_noise_although_asked_fails(model):
    with perturb(model, Noise(), 0.0, generator=_generator()) as unwired:
        pass
    with pytest.raises(CheckFailed, match="was given any"):
        require_drawn(unwired, 0.05)


@pytest.mark.parametrize("factor", [0.1, 0.5, 2.0])
def test_noise_of_another_size_than_asked_fails(model, factor, monkeypatch):
    drawn = perturb_room.standard_noise
    monkeypatch.setattr(perturb_room, "standard_noise", lambda *place: drawn(*place) * factor)
    with perturb(model, Noise(), 0.05, generator=_generator()) as noisy:
        pass
    with pytest.raises(CheckFailed, match="times the size that was asked for was drawn"):
        require_drawn(noisy, 0.05)


def test_noise_that_is_measured_and_never_written_fails(model, monkeypatch):
    monkeypatch.setattr(perturb_room, "_written", lambda weight, noisy: contextlib.nullcontext())
    with pytest.raises(CheckFailed, match="does not hold the noise that was drawn for it"):
        perturb(model, Noise(), 0.05, generator=_generator()).__enter__()


def test_noise_that_is_a_little_too_small_everywhere_fails_by_all_weights_together():
    one = NoiseEvidence("norm", "norm", 0, 1.0, 0.05, 0.05 * 0.8, 0.04, 1.0, 64)
    require_drawn([one], 0.05)
    with pytest.raises(CheckFailed, match=r"all weights together: noise of 0\.8 times"):
        require_drawn([replace(one, name=f"norm {i}") for i in range(20)], 0.05)


def test_a_healthy_rollout_is_never_stopped_for_the_size_of_its_noise():
    """Down to a weight of one value, whose sample says next to nothing."""
    for size in (1, 2, 8, 64):
        for seed in range(300):
            values = 0.05 * perturb_room.standard_noise(seed, "norm", torch.Size([size]))
            drawn = float(values.square().mean().sqrt())
            require_drawn([NoiseEvidence("norm", "norm", 0, 1.0, 0.05, drawn, drawn, 1.0, size)], 0.05)


FADING = {"kind": "geometric", "sigma_start": 0.05, "sigma_end": 0.0005, "num_stages": 10}


def test_what_noise_will_not_do_is_said_before_the_run(model):
    coarse = Stack().bfloat16()
    assert list(noise_warnings(model, Noise.model_validate({"schedule": FADING}), 30)) == []
    (late,) = noise_warnings(coarse, Noise.model_validate({"schedule": FADING}), 30)
    assert "bfloat16 will swallow its noise from sigma 0.0008" in late
    faint = {"schedule": FADING | {"sigma_start": 0.001, "sigma_end": 0.0001}}
    (lost,) = noise_warnings(coarse, Noise.model_validate(faint), 30)
    assert "bfloat16 will swallow all of its noise" in lost
    assert "take noise.precision: float32" in lost
    assert list(noise_warnings(coarse, Noise.model_validate(faint | {"precision": "float32"}), 30)) == []
    assert list(noise_warnings(coarse, Noise.model_validate(faint | {"control": "sigma_zero"}), 5)) == []


def test_a_control_that_shows_noise_fails(model):
    with perturb(model, Noise(), 0.1, generator=_generator()) as noisy:
        pass
    require_noise(Noise(), [noisy])
    with pytest.raises(CheckFailed, match="not a control"):
        require_noise(Noise(control="sigma_zero"), [noisy])


@pytest.mark.parametrize("sigma", [-0.1, float("nan"), float("inf")])
def test_a_sigma_that_is_no_standard_deviation_is_refused(model, sigma):
    with (
        pytest.raises(InvalidValueError, match="finite standard deviation"),
        perturb(model, Noise(), sigma, generator=_generator()),
    ):
        pass
