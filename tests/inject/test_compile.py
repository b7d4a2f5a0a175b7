"""Inside torch.compile the quantizer is in the graph: results differ from full precision and counters move."""

import pytest
import torch
from torch import nn

from fp4rl.inject.attach import attach
from fp4rl.spec.errors import NotFoundError
from fp4rl.spec.hardware import HardwareError
from fp4rl.spec.injection import Injection

pytestmark = pytest.mark.filterwarnings("ignore")  # Dynamo warns about its own internals


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def policy():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64))


X = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))


def eager(injection, dtype=torch.float32):
    """(y, gradients) without compilation."""
    model = policy().to(dtype)
    with attach(model, injection):
        y = model(X.to(dtype))
        y.square().sum().backward()
    return y.detach(), [p.grad for p in model.parameters()]


def compiled(model, backend="aot_eager"):
    return torch.compile(model, backend=backend, fullgraph=True)


@pytest.mark.slow
def test_a_graph_follows_a_precision_that_changes():
    schedule = {"input": {"before": "mxfp8", "from_step": 1, "over": 1}, "weight": {"from_step": 1, "over": 1}}
    injection = Injection.named("w4a4", straight_through="clipped", schedule=schedule)
    for step in (0, 1, 2):
        results = []
        for wrap in (lambda model: model, compiled):
            model = policy()
            with attach(model, injection) as harmed:
                harmed.set_phase("training", step)
                y = wrap(model)(X)
                y.square().sum().backward()
                rows = {(row.site, row.point, row.stage, row.calls, row.elements) for row in harmed.evidence()}
            results.append((y.detach(), [p.grad for p in model.parameters()], rows))
        (y, gradients, rows), (fast, fast_gradients, fast_rows) = results
        assert torch.equal(y, fast)
        assert rows == fast_rows
        assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(gradients, fast_gradients, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["attach first", "compile first"])
def test_one_graph_holds_the_quantizer_whichever_comes_first(order):
    injection, model = Injection.named("w4a4", straight_through="clipped"), policy()
    plain = model(X).detach()
    if order == "compile first":
        fast = compiled(model)
        assert torch.equal(fast(X), plain)  # a graph without the quantizer exists already
    harmed = attach(model, injection)
    fast = fast if order == "compile first" else compiled(model)
    y = fast(X)
    y.square().sum().backward()
    expected, gradients = eager(injection)
    assert torch.equal(y, expected)
    assert not torch.equal(y, plain)
    assert all(torch.allclose(p.grad, g, rtol=1e-6) for p, g in zip(model.parameters(), gradients, strict=True))
    assert {(row.site, row.point, row.calls) for row in harmed.evidence()} == {
        (site, point, 1) for site in "02" for point in ("weight", "input")
    }
    harmed.remove()
    assert torch.equal(fast(X), plain)


def test_a_phase_switches_the_graph():
    model = policy()
    plain = model(X).detach()
    fast = compiled(model, "eager")
    with attach(model, Injection.named("w4a16")) as harmed, torch.no_grad():
        for phase, rounds in (("rollout", True), ("reference", False), ("rollout", True)):
            harmed.set_phase(phase)
            assert torch.equal(fast(X), plain) != rounds
            assert torch.equal(fast(X), model(X))
        assert {(row.phase, row.calls) for row in harmed.evidence()} == {("rollout", 6)}


def test_the_graph_reads_the_weight_afresh_at_every_call():
    model = policy()
    fast = compiled(model, "eager")
    with attach(model, Injection.named("w4a16")), torch.no_grad():
        before = fast(X)
        model[0].weight.data.mul_(2)
        assert not torch.equal(fast(X), before)
        assert torch.equal(fast(X), model(X))


@pytest.mark.slow
def test_hardware_errors_act_where_the_graph_breaks_for_them():
    injection = Injection(errors=(HardwareError(when="both"),))
    model = policy()
    with attach(model, injection) as harmed:
        y = torch.compile(model, backend="eager")(X)
        y.square().sum().backward()
        rows = harmed.evidence()
    expected, gradients = eager(injection)
    assert torch.equal(y, expected)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert sum(row.calls for row in rows) > 2


def test_a_graph_that_may_not_break_refuses_them_loudly():
    with attach(policy(), Injection(errors=(HardwareError(),))) as harmed, pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(harmed.model, "eager")(X)


def test_a_scripted_model_offers_nothing_that_could_be_swapped():
    with pytest.raises(NotFoundError, match="no layer that can be rounded"):
        attach(torch.jit.trace(policy(), X), Injection.named("w4a16"))


ROTATED = {"name": "mxfp4", "rotation": 32}
INDUCTOR = {
    "w4a4": Injection.named("w4a4"),
    "clipped": Injection.named("w4a4", straight_through="clipped"),
    "clipped, rotated": Injection(**dict.fromkeys(("weight", "input"), ROTATED), straight_through="clipped"),
    "clipped, with a fallback": Injection.named(
        "w4a4", input={"name": "mxfp4", "fallback": 0.5}, straight_through="clipped"
    ),
    "smooth": Injection.named("w4a4", straight_through="smooth", smooth={"points": ["weight", "input"]}),
    "nvfp4": Injection.named("nvfp4_w4a4"),
    "all in float16": Injection(weight="mxfp8", input="mxfp4", output="fp8", dtype="float16"),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", INDUCTOR)
def test_inductor_rounds_in_the_dtype_that_was_asked(name, dtype):
    """Left to itself it drops casts that go down and up again, and rounds what the model holds instead."""
    injection, model = INDUCTOR[name], policy().to(dtype)
    with attach(model, injection) as harmed:
        y = compiled(model, "inductor")(X.to(dtype))
        y.square().sum().backward()
        assert all(row.calls == 1 for row in harmed.evidence())
    expected, gradients = eager(injection, dtype)
    wrong, _ = eager(injection.model_copy(update={"dtype": "float32"}), dtype)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    assert torch.allclose(y, expected, **close)
    if dtype == torch.float32:
        assert not torch.allclose(y, wrong, **close)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert float((parameter.grad - gradient).norm() / gradient.norm()) < (1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.slow
def test_a_graph_breaks_for_what_is_drawn_and_the_numbers_stay():
    injection, model = Injection(weight="mxfp4_sr", input="mxfp4_sr"), policy()
    with attach(model, injection), torch.no_grad():
        assert torch.equal(torch.compile(model, backend="eager")(X), model(X))
    with attach(model, injection), pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(model, "eager")(X)
