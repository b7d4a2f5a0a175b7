"""Faults planted in mixtures of experts, each found by a run's own checks, and by nothing once these are taken away.

Found by: `require_calls` (inputs that are not rounded, in eager mode and in a compiled graph), the layout that the
first product shows and `require_rounded` (blocks along the wrong axis), `require_rounded` (a router that is rounded).
"""

import expert_kinds as kinds
import pytest
import torch
import zoo_families as families

from fp4rl.inject import attach as attaching
from fp4rl.inject import experts, probe
from fp4rl.inject.attach import attach
from fp4rl.inject.probe import require_rounded
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.sites import walk as walking
from fp4rl.spec.errors import CheckFailed
from fp4rl.spec.formats import MXFP4
from fp4rl.spec.injection import Injection

IDS = torch.arange(3, 27).view(2, 12)
W4A4 = Injection.named("w4a4", dtype="float32")


def verified(model, injection=W4A4):
    """What a run does around its first rollout: generate, look at the evidence, hold the operands."""
    with attach(model, injection) as harmed:
        harmed.set_phase("rollout")
        with torch.no_grad():
            model(IDS)
        harmed.require_calls()
        return require_rounded(harmed)


def leave_inputs(monkeypatch):
    """The plant: what goes into an expert's product is not rounded; everything else is as ever."""
    monkeypatch.setattr(experts.StackState, "rounded_input", lambda self, x: x)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_inputs_of_experts_that_are_not_rounded_are_found_by_their_count(family, monkeypatch):
    assert verified(families.tiny(family))
    leave_inputs(monkeypatch)
    with pytest.raises(CheckFailed, match=r"0 elements were rounded: .*experts.gate_up_proj \(input\)"):
        verified(families.tiny(family))
    monkeypatch.setattr(experts.StackState, "untouched", lambda self: ())
    assert verified(families.tiny(family))  # nothing else sees it


def test_inputs_that_are_counted_and_come_out_as_they_went_in_are_found_by_a_look(monkeypatch):
    rounded = experts.StackState.rounded

    def lazy(self, x, point, generator):
        return (x.detach().clone(), None) if point == "input" else rounded(self, x, point, generator)

    monkeypatch.setattr(experts.StackState, "rounded", lazy)
    with pytest.raises(CheckFailed, match=r"called during rollout and rounded nothing: .*experts.gate_up_proj"):
        verified(families.tiny("qwen3_moe"))


@pytest.mark.filterwarnings("ignore")  # Dynamo warns about its own internals
def test_in_a_compiled_model_the_count_of_elements_holds_and_their_absence_is_found(monkeypatch):
    """By hand: 16 rows of 64 and of 96 inputs a call, two calls; then none."""
    args = [a.float() if a.is_floating_point() else a for a in kinds.arguments("", 64)]
    module = kinds.experts_of("qwen3_moe", "Qwen3MoeExperts", (64, 96))
    for plant, counts in ((None, {64 * 16 * 2, 96 * 16 * 2}), (leave_inputs, {0})):
        torch._dynamo.reset()
        if plant:
            plant(monkeypatch)
        with attach(kinds.rooted(module, 64), W4A4) as harmed, torch.no_grad():
            fast = torch.compile(module, backend="eager")
            fast(*args), fast(*args)
            assert {row.elements for row in harmed.evidence() if row.point == "input"} == counts
            if plant is None:
                harmed.require_calls()
                continue
            with pytest.raises(CheckFailed, match=r"0 elements were rounded: experts.gate_up_proj \(input\)"):
                harmed.require_calls()
    torch._dynamo.reset()


def other_layout(monkeypatch):
    """The plant: every stack is taken to be stored the other way round."""
    told = walking.experts_transposed
    monkeypatch.setattr(walking, "experts_transposed", lambda *args: not told(*args))


@pytest.mark.parametrize("sizes", [(64, 64), (64, 96)], ids=["square", "not square"])
@pytest.mark.parametrize(("family", "name"), [("qwen3_moe", "Qwen3MoeExperts"), ("llama4", "Llama4TextExperts")])
def test_blocks_along_the_wrong_axis_are_found_by_the_first_product(family, name, sizes, monkeypatch):
    module, args = kinds.experts_of(family, name, sizes).double(), kinds.arguments(name, sizes[0])
    other_layout(monkeypatch)
    with attach(kinds.rooted(module, sizes[0]), W4A4) as harmed, torch.no_grad():
        with pytest.raises(CheckFailed, match="its matmul sums over the other axis"):
            module(*args)
        monkeypatch.setattr(experts.StackState, "summed_over", lambda self, transposed: None)
        module(*args)  # nothing else sees it
        harmed.require_calls()
        require_rounded(harmed)


@pytest.mark.parametrize("sizes", [(64, 64), (64, 96)], ids=["square", "not square"])
def test_blocks_that_are_made_along_the_wrong_axis_are_found_by_value(sizes, monkeypatch):
    """The layout is known as it is, and the rounding itself runs along the outputs."""
    module, args = kinds.experts_of("qwen3_moe", "Qwen3MoeExperts", sizes).double(), kinds.arguments("", sizes[0])

    def across(self, weight):
        return fake_quantize(weight.detach().float().mT.contiguous(), MXFP4).mT.to(weight.dtype).contiguous(), None

    monkeypatch.setattr(experts.StackState, "_as_stored", across)
    with attach(kinds.rooted(module, sizes[0]), W4A4) as harmed, torch.no_grad():
        module(*args)
        harmed.require_calls()
        with pytest.raises(CheckFailed, match=r"at 2 of 2 sites .*experts.gate_up_proj \(weight\)"):
            require_rounded(harmed)
        monkeypatch.setattr(probe, "_stack_is_right", lambda *_: True)
        require_rounded(harmed)  # nothing else sees it


def rounding(router):
    """A forward of the router that multiplies by its rounded weight."""
    whole, master = router.forward, router.weight
    rounded = fake_quantize(master.detach().float(), MXFP4).to(master.dtype)

    def forward(hidden_states):
        del router._parameters["weight"]
        router.weight = rounded
        try:
            return whole(hidden_states)
        finally:
            del router.weight
            router.weight = master

    return forward


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "llama4_text", "qwen3_next"])
def test_a_router_that_is_rounded_although_it_is_to_be_left_is_found_by_value(family, monkeypatch):
    """The plant: `attach` also rounds what every router multiplies by."""
    install = attaching.install

    def too_much(model, table):
        for site in (left.site for left in table.left_out if left.site.kind == "router"):
            router = model.get_submodule(site.path)
            router.forward = rounding(router)
        return install(model, table)

    assert verified(families.tiny(family))
    monkeypatch.setattr(attaching, "install", too_much)
    with pytest.raises(CheckFailed, match=r"(router|gate) is to be left, and multiplies by other numbers than its own"):
        verified(families.tiny(family))
    monkeypatch.setattr(probe, "_rounded_routers", lambda attachment: [])
    assert verified(families.tiny(family))  # nothing else sees it
