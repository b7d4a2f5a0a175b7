"""Adapters of stacked experts (peft's `target_parameters`) against experts that are written out in float64."""

import copy

import expert_kinds as experts
import expert_oracle
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fp4rl.inject.attach import attach
from fp4rl.inject.probe import require_rounded
from fp4rl.inject.resolve import resolve
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.injection import Injection

oracle = expert_oracle.oracle
KINDS = {name: experts.KINDS[name] for name in ("linear", "@ with biases", "bmm, undeclared", "no gate")}
HIDDEN, RANK = 64, 4


def adapted(kind, sizes=(HIDDEN, 96)):
    """(a model of these experts under adapters that are no longer fresh, the experts, peft's layers by parameter)."""
    module = experts.experts_of(*KINDS[kind], sizes).double()
    names = [f"experts.{name}" for name in module._parameters if name.endswith("_proj")]
    config = LoraConfig(r=RANK, lora_alpha=6.0, target_modules=[], target_parameters=names)
    model = get_peft_model(nn.ModuleDict({"experts": module}), config)
    layers = {layer.parameter_name: layer for layer in model.modules() if hasattr(layer, "parameter_name")}
    for layer in layers.values():
        for linear in (*layer.lora_A.values(), *layer.lora_B.values()):
            linear.double()
            nn.init.normal_(linear.weight, std=0.2)
    known = {
        n: (x.lora_A["default"].weight, x.lora_B["default"].weight, x.scaling["default"]) for n, x in layers.items()
    }
    module.__dict__["adapters"] = known
    return model, module, layers


def called(model, *args):
    """The outermost layer above the experts, called as their block calls it."""
    return model.base_model.model["experts"](*args)


def weights(module):
    return [weight for pair in module.adapters.values() for weight in pair[:2]]


def ways(module):
    """The implementations that compute in double precision."""
    return [way for way in experts.ways(module) if way != "grouped_mm"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_oracle_knows_how_peft_lays_out_its_matrices(kind):
    model, module, _ = adapted(kind)
    args = experts.arguments(KINDS[kind][1], HIDDEN)
    assert torch.allclose(called(model, *args), oracle(module, args, Injection()), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("lora", ["adapter", "merged"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_of_adapted_experts_are_those_of_experts_written_out(kind, lora):
    """By autograd over the oracle: y = Q(x) Q(W) + x sBA, or Q(x) Q(W + sBA), one expert at a time."""
    model, module, _ = adapted(kind)
    args = experts.arguments(KINDS[kind][1], HIDDEN)
    x = args[0].requires_grad_()
    for mode in ("w4a16", "w4a8", "w4a4", *(() if kind == "@ with biases" else ("w4a4_out",))):
        injection = Injection.named(mode, dtype="float32", lora=lora)
        wanted = oracle(module, args, injection)
        gradients = torch.autograd.grad(wanted.square().sum(), [x, *weights(module)])
        for way in ways(module):
            if hasattr(module, "config"):
                module.config._experts_implementation = way
            with attach(model, injection) as harmed:
                found = called(model, *args)
                got = torch.autograd.grad(found.square().sum(), [x, *weights(module)])
                harmed.require_calls()
                require_rounded(harmed)
                rows = {row.point: row.elements for row in harmed.evidence() if row.site.endswith("down_proj")}
                assert rows["weight"] == module._parameters["down_proj"].numel()
            assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-9), (mode, way)
            for one, other in zip(got, gradients, strict=True):
                assert torch.allclose(one, other, rtol=1e-9, atol=1e-9), (mode, way)


def test_a_merged_adapter_is_what_peft_merges_and_then_is_rounded():
    model, _, _ = adapted("linear")
    args, injection = experts.arguments("", HIDDEN), Injection.named("w4a4", dtype="float32", lora="merged")
    whole = copy.deepcopy(model).merge_and_unload()
    with attach(model, injection), attach(whole, Injection.named("w4a4", dtype="float32")), torch.no_grad():
        assert torch.allclose(called(model, *args), whole["experts"](*args), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lora", ["adapter", "merged"])
def test_an_adapter_that_is_switched_off_or_trained_on_is_no_longer_in_the_numbers(lora):
    model, module, _ = adapted("linear")
    args, injection = experts.arguments("", HIDDEN), Injection.named("w4a4", dtype="float32", lora=lora)
    with attach(model, injection), torch.no_grad():
        before = called(model, *args)
        with model.disable_adapter():
            off = called(model, *args)
        assert torch.equal(called(model, *args), before)
        module.adapters["down_proj"][1].mul_(2.0)
        after = called(model, *args)
    known = module.__dict__["adapters"]
    assert torch.allclose(after, oracle(module, args, injection))
    module.__dict__["adapters"] = {}
    assert torch.allclose(off, oracle(module, args, injection))
    module.__dict__["adapters"] = known
    assert not torch.allclose(after, before)


def test_taking_the_injection_out_leaves_peft_as_it_was():
    model, module, layers = adapted("linear")
    args = experts.arguments("", HIDDEN)
    before, kinds = called(model, *args), [type(layer) for layer in (module, *layers.values())]
    with attach(model, Injection.named("w4a4", dtype="float32")):
        assert not torch.allclose(called(model, *args), before)
    assert torch.equal(called(model, *args), before)
    assert kinds == [type(layer) for layer in (module, *layers.values())]


def test_only_the_parameters_that_are_taken_are_rounded_and_peft_adds_to_the_others():
    """gate_up is left: its adapter is peft's own business; down is taken, and its adapter ours."""
    model, module, _ = adapted("linear")
    args, injection = experts.arguments("", HIDDEN), Injection.named("w4a4", dtype="float32")
    given = injection.model_copy(update={"targets": injection.targets.model_copy(update={"take": ("*down_proj",)})})
    with attach(model, given), torch.no_grad():
        found = called(model, *args)
    with torch.no_grad():
        right = expert_oracle.product
        sizes = module._parameters["down_proj"].shape[-1]
        plain = Injection()
        expert_oracle.product = lambda x, w, i, b=None: right(x, w, i if x.shape[-1] == sizes else plain, b)
        try:
            assert torch.allclose(found, oracle(module, args, injection), rtol=1e-9, atol=1e-9)
        finally:
            expert_oracle.product = right


def test_a_linear_layer_adapted_as_a_parameter_is_refused_with_the_cure():
    config = LoraConfig(r=2, target_modules=[], target_parameters=["0.weight"])
    model = get_peft_model(nn.Sequential(nn.Linear(64, 64)), config)
    with pytest.raises(InvalidValueError, match=r"target_parameters puts a sum .* target_modules: \[0\]"):
        resolve(model, Injection.named("w4a16"))


def test_an_adapter_that_is_put_on_later_is_named():
    module = experts.experts_of(*KINDS["linear"], (HIDDEN, 96)).double()
    model, args = nn.ModuleDict({"experts": module}), experts.arguments("", HIDDEN)
    with attach(model, Injection.named("w4a4", dtype="float32")):
        later = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"]))
        with pytest.raises(CheckFailed, match="got an adapter after the injection"):
            called(later, *args)
