"""A frozen base kept as codes: the same numbers and gradients, a quarter of the memory of BF16."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fp4rl.inject.attach import attach
from fp4rl.inject.evidence import master_digest
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.injection import PHASES, Injection

ALWAYS = {"apply_during": {"weight": PHASES}}
COPY = {mode: Injection.model_validate({"mode": mode, **ALWAYS}) for mode in ("w4a16", "w4a4", "nvfp4_w4a16")}
PACKED = {m: Injection.model_validate({**i.model_dump(), "frozen_base": "packed"}) for m, i in COPY.items()}


def frozen(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 512, bias=bias), nn.SiLU(), nn.Linear(512, 64)).to(dtype).requires_grad_(False)


def passed(model, injection):
    x = torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(1)).to(model[0].weight.dtype).requires_grad_()
    with attach(model, injection):
        y = model(x)
        y.square().sum().backward()
    return y.detach(), x.grad


def held(model):
    """Bytes of every tensor that the model holds, packed ones included."""
    tensors = [p for p in model.parameters() if not p.is_meta]
    for module in model.modules():
        state = module.__dict__.get("injected")
        for one in getattr(state, "stacks", {"": state}).values():
            tensors += getattr(one, "tensors", [])
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", COPY)
def test_packed_computes_what_the_rounded_copy_computes(mode, dtype):
    for a, b in zip(passed(frozen(dtype), COPY[mode]), passed(frozen(dtype), PACKED[mode]), strict=True):
        assert torch.allclose(a, b, rtol=1e-6 if dtype == torch.float32 else 1e-2)


def test_a_packed_mxfp4_weight_takes_4_and_a_quarter_bits():
    model = frozen(torch.bfloat16, bias=False)
    weights = sum(p.numel() for n, p in model.named_parameters() if n.endswith("weight"))
    rest = held(model) - 2 * weights
    with attach(model, PACKED["w4a16"]):
        model(torch.zeros(1, 256, dtype=torch.bfloat16))
        assert (held(model) - rest) * 8 / weights == 4.25


def test_nothing_as_large_as_a_weight_is_kept_for_the_backward():
    model, x = frozen(), torch.randn(2, 256, requires_grad=True)
    sizes = []
    with (
        attach(model, PACKED["w4a16"]),
        torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t),
    ):
        model(x)
    assert max(sizes, default=0) < 256 * 512 / 4


def test_what_is_left_after_removal_is_the_rounded_weight():
    model = frozen()
    with attach(copy.deepcopy(model), COPY["w4a16"]) as harmed:
        rounded = harmed.model(torch.eye(256))
    attach(model, PACKED["w4a16"]).remove()
    assert type(model[0]) is nn.Linear
    assert torch.allclose(model(torch.eye(256)), rounded, rtol=1e-5)
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")


def test_the_state_dict_holds_the_rounded_weight_and_loading_packs_again():
    model, other = frozen(), frozen()
    other.load_state_dict({name: value * 2 for name, value in other.state_dict().items()})
    with attach(model, PACKED["w4a16"]):
        state = model.state_dict()
        assert state["0.weight"].shape == (512, 256)
        assert not state["0.weight"].is_meta
        model.load_state_dict(other.state_dict())
        x = torch.randn(2, 256)
        with attach(other, COPY["w4a16"]):
            assert torch.allclose(model(x), other(x), rtol=1e-5)


def test_a_packed_layer_can_be_moved_and_cast():
    model = frozen()
    with attach(model, PACKED["nvfp4_w4a16"]):
        before = model(torch.ones(1, 256))
        model.to("cpu", torch.float32)
        assert torch.equal(model(torch.ones(1, 256)), before)


def test_the_digest_watches_the_codes():
    model = frozen()
    with attach(model, PACKED["w4a16"]):
        before = master_digest(model)
        assert master_digest(model) == before
        model[0].__dict__["injected"].packed[0].data[0, 0] ^= 1
        assert master_digest(model) != before


def test_evidence_of_packed_weights_is_measured_when_they_are_packed():
    model = frozen()
    with attach(model, PACKED["w4a16"]) as harmed:
        harmed.set_phase("rollout")
        model(torch.ones(1, 256))
        rows = harmed.evidence()
    assert [row.calls for row in rows] == [1, 1]
    assert all(0.08 < row.relative_error < 0.15 for row in rows)


def test_a_phase_without_rounding_is_refused():
    with pytest.raises(ValueError, match="leaves no unrounded weight for any phase"):
        Injection.model_validate({"mode": "w4a16", "frozen_base": "packed"})


@pytest.mark.parametrize("fmt", ["mxfp8", "mxfp4_sr"])
def test_a_format_without_fixed_4_bit_codes_is_refused(fmt):
    injection = Injection.model_validate({"weight": fmt, "frozen_base": "packed", **ALWAYS})
    with pytest.raises(InvalidValueError, match="stores 4-bit codes"):
        attach(frozen(), injection)


def test_a_packed_layer_refuses_to_be_copied():
    with attach(frozen(), PACKED["w4a16"]) as harmed, pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(harmed.model)


def test_adapters_over_a_packed_base_train_as_over_a_copy():
    grads = []
    for injection in (COPY["w4a4"], PACKED["w4a4"]):
        model = get_peft_model(frozen(), LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False))
        torch.manual_seed(1)
        for p in model.parameters():
            if p.requires_grad:
                p.data.normal_(0, 0.1)
        with attach(model, injection):
            model(torch.randn(4, 256)).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(grads[0]) == 4
    assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(*grads, strict=True))
