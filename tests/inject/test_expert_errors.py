"""Hardware errors and rounded gradients in stacked experts, against experts written out by hand in float64.

The kind of fault: what is described for linear layers stopped before the experts, which hold most of the weights of a
mixture, and nothing said so.
"""

import expert_kinds as experts
import pytest
import torch
import zoo_oracle as oracle

from fp4rl.inject.attach import attach
from fp4rl.inject.resolve import resolve
from fp4rl.noise.perturb import perturb
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.injection import Injection
from fp4rl.spec.noise import Noise

KINDS = {
    "qwen3_moe": "Qwen3MoeExperts",
    "mixtral": "MixtralExperts",
    "deepseek_v3": "DeepseekV3Experts",
    "qwen3_next": "Qwen3NextExperts",
    "gpt_oss": "GptOssExperts",
    "llama4": "Llama4TextExperts",
}
WAYS = [(family, way) for family in KINDS for way in ("eager", "grouped_mm", "batched_mm") if family != "llama4"]
WAYS.append(("llama4", "eager"))
HIDDEN, INNER, TOKENS = 64, 96, 48
# Rows of experts 0 to 3: more than one block of 32, fewer, few, none.
CHOSEN = [0] * 34 + [1] * 10 + [2] * 4


def made(family, way, *, like_the_first=False):
    """(experts with random weights, their arguments): every token goes to one expert, in another order than theirs."""
    module = experts.experts_of(family, KINDS[family], (HIDDEN, INNER))
    if family != "llama4":
        module.config._experts_implementation = way
    dtype = torch.float32 if way == "grouped_mm" else torch.float64  # the grouped kernel is for single precision
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=dtype)
    chosen = torch.tensor(CHOSEN)[torch.randperm(TOKENS, generator=generator)][:, None]
    share = torch.rand(TOKENS, 1, generator=generator, dtype=dtype)
    if like_the_first:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(parameter[:1].expand_as(parameter))
    return module.to(dtype), (x,) if family == "llama4" else (x, chosen, share)


class Written(torch.autograd.Function):
    """y = a b^T and its two gradients, each of a gradient that is rounded along the axis that it sums over."""

    @staticmethod
    def forward(ctx, a, b, hand):
        ctx.save_for_backward(a, b)
        ctx.hand = hand
        return hand.get("matmul", lambda y: y)(a @ b.T)

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        same = lambda x: x  # noqa: E731
        wrong = ctx.hand.get("backward", same)
        grad_a = wrong(ctx.hand.get("grad_input", same)(g) @ b)
        return grad_a, wrong(ctx.hand.get("grad_weight", same)(g.T) @ a), None


def by_hand(module, args, hand):
    """(what the experts return, gradients of x and of the stacks), where `hand` says what is done at each point."""
    straight = lambda x, change: x + (change(x.detach()) - x).detach() if change else x  # noqa: E731

    def product(x, weight, injection, bias=None):
        y = Written.apply(straight(x, hand.get("input")), straight(weight, hand.get("weight")), hand)
        return y if bias is None else y + bias

    module = module.double()
    x, *routes = (a.double() if a.is_floating_point() else a for a in args)
    x = x.requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle.expert_oracle, "product", product)
        if routes:
            # A grouped product sorts its rows by expert, in whatever order that leaves them: blocks run along it.
            grouped = module.config._experts_implementation == "grouped_mm"
            in_order = routes[0][:, 0].sort().indices if grouped else torch.arange(TOKENS)
            y = torch.zeros_like(x)
            for expert in range(3):
                rows = in_order[routes[0][in_order, 0] == expert]
                one = oracle.expert_oracle.one_expert(module, expert, x[rows], None)
                y = y.index_add(0, rows, one * routes[1][rows])
        else:
            y = oracle.expert_oracle.in_bands(module, x, None)
    return taken(module, x, y)


def taken(module, x, y):
    module.zero_grad()
    weights = [p for name, p in module.named_parameters() if not name.endswith("bias")]
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).sin().view(y.shape))
    return [t.double() for t in (y.detach(), x.grad, *(w.grad for w in weights))]


def under(module, args, injection):
    """(the same of the live module, its evidence by site and point)."""
    x, *routes = args
    x = x.detach().requires_grad_()
    with attach(experts.rooted(module, HIDDEN), injection) as harmed:
        results = taken(module, x, module(x, *routes))
        harmed.require_calls()
        return results, {(row.site, row.point): row for row in harmed.evidence()}


def agree(found, wanted):
    """Row by row: in single precision a value may round the other way now and then, which is seen in its row alone."""
    for name, a, b in zip(("y", "grad_x", "first", "second"), found, wanted, strict=True):
        off = (a - b).flatten(0, -2).norm(dim=-1)
        size = b.flatten(0, -2).norm(dim=-1)
        assert float(off[size == 0].sum()) == 0, name
        assert float((off / size)[size > 0].median()) < 1e-5, (name, (off / size)[size > 0])


def error(**fields):
    return Injection.model_validate({"errors": [fields], "dtype": "float32"})


DETERMINISTIC = {
    "bias@matmul": ({"kind": "bias", "scale": 0.3}, {"matmul": lambda y: y + 0.3}),
    "dead_zone@matmul": ({"kind": "dead_zone", "scale": 0.4}, {"matmul": lambda y: y.masked_fill(y.abs() < 0.4, 0)}),
    "saturation@input": (
        {"kind": "saturation", "point": "input", "scale": 0.5},
        {"input": lambda x: x.clamp(-0.5, 0.5)},
    ),
    "dead_zone@weight": (
        {"kind": "dead_zone", "point": "weight", "when": "both", "scale": 0.2},
        {"weight": lambda w: w.masked_fill(w.abs() < 0.2, 0)},
    ),
    "bias in the backward": ({"kind": "bias", "scale": 0.3, "when": "backward"}, {"backward": lambda g: g + 0.3}),
}

# By hand: every token's row once, or every stored weight once. In the backward, grad_input comes first.
_IN = {"gate_up_proj": TOKENS * HIDDEN, "down_proj": TOKENS * INNER}
_OUT = {"gate_up_proj": TOKENS * 2 * INNER, "down_proj": TOKENS * HIDDEN}
ELEMENTS = {
    "bias@matmul": _OUT,
    "dead_zone@matmul": _OUT,
    "saturation@input": _IN,
    "dead_zone@weight": {"gate_up_proj": 4 * 2 * INNER * HIDDEN, "down_proj": 4 * HIDDEN * INNER},
    "bias in the backward": _IN,
}


@pytest.mark.parametrize("kind", DETERMINISTIC)
@pytest.mark.parametrize(("family", "way"), WAYS)
def test_an_error_that_draws_nothing_is_there_to_the_bit_of_a_hand_computation(family, way, kind):
    fields, hand = DETERMINISTIC[kind]
    module, args = made(family, way)
    if way == "batched_mm" and "backward" in hand:
        with pytest.raises(InvalidValueError, match=rf"'batched_mm' gives each row .*{KINDS[family]}.*grouped_mm"):
            resolve(experts.rooted(module, HIDDEN), error(**fields))
        return
    found, evidence = under(module, args, error(**fields))
    agree(found, by_hand(module, args, hand))
    for site, count in ELEMENTS[kind].items():
        point = next(name for at, name in evidence if at == f"experts.{site}" and not name.endswith("grad_weight"))
        assert evidence[f"experts.{site}", point].elements == count


@pytest.mark.parametrize("points", [("grad_input",), ("grad_weight",), ("grad_input", "grad_weight")])
@pytest.mark.parametrize(("family", "way"), WAYS)
def test_rounded_gradients_change_both_gradients_as_written_out_by_hand(family, way, points):
    """mxfp8 along the outputs for grad_input, mxfp4 along the rows of one expert for grad_weight, inside W4A4."""
    formats = {"grad_input": "mxfp8", "grad_weight": "mxfp4"}
    rounding = {"grad_input": oracle.mxfp8, "grad_weight": oracle.mxfp4}
    module, args = made(family, way)
    injection = Injection.named("w4a4", dtype="float32", **{point: formats[point] for point in points})
    if way == "batched_mm" and "grad_weight" in points:
        with pytest.raises(InvalidValueError, match="grad_weight: the implementation 'batched_mm' gives each row"):
            resolve(experts.rooted(module, HIDDEN), injection)
        return
    found, evidence = under(module, args, injection)
    hand = {"weight": oracle.mxfp4, "input": oracle.mxfp4, **{point: rounding[point] for point in points}}
    agree(found, by_hand(module, args, hand))
    for point in points:
        assert evidence["experts.gate_up_proj", point].elements == TOKENS * 2 * INNER
        assert evidence["experts.down_proj", point].elements == TOKENS * HIDDEN


@pytest.mark.parametrize(("family", "way"), WAYS)
def test_noise_in_a_matmul_of_experts_has_the_size_that_was_asked(family, way):
    """By mean and deviation over 3,072 results of the last product: standard errors 0.0009 and 1.3 %."""
    module, args = made(family, way)
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
    injection = error(kind="relative", scale=0.05, targets={"take": "*.down_proj"})
    noisy = under(module, args, injection)[0][0]
    ratio = noisy / by_hand(module, args, {})[0] - 1
    assert abs(float(ratio.mean())) < 4 * 0.05 / TOKENS**0.5 / HIDDEN**0.5
    assert float(ratio.std()) == pytest.approx(0.05, rel=0.06)


@pytest.mark.parametrize("point", ["matmul", "input"])
def test_two_experts_that_compute_the_same_draw_each_for_itself(point):
    """Two like experts for every token: the deviation of their mean is that of one by the root of two."""
    module, (x, _, _) = made("qwen3_moe", "eager", like_the_first=True)
    chosen, share = torch.tensor([[0, 1]]).expand(TOKENS, 2), torch.full((TOKENS, 2), 0.5, dtype=x.dtype)
    fields = {"kind": "absolute", "scale": 0.1, "point": point, "targets": {"take": "*.down_proj"}}
    with torch.no_grad():
        clean = module(x, chosen, share)
        with attach(experts.rooted(module, HIDDEN), error(**fields)):
            both = module(x, chosen, share) - clean
            one = module(x, chosen[:, :1], 2 * share[:, :1]) - clean
    assert float(both.std() / one.std()) == pytest.approx(0.5**0.5, rel=0.06)


def test_stuck_channels_are_the_same_in_every_expert_and_every_call():
    """10 % of 64 results of down_proj are 6 channels, each 0.7 in all rows."""
    module, args = made("qwen3_moe", "eager")
    args = (*args[:2], torch.ones_like(args[2]))
    injection = error(kind="stuck", share=0.1, scale=0.7, targets={"take": "*.down_proj"})
    first, again = (under(module, args, injection)[0][0] for _ in range(2))
    stuck = (first == 0.7).all(0)
    assert int(stuck.sum()) == 6
    assert torch.equal(first, again)


def test_spikes_in_stored_experts_hit_each_expert_elsewhere():
    """1 % of 24,576 weights: 246, at other places in every expert."""
    module, _ = made("qwen3_moe", "eager", like_the_first=True)
    injection = error(kind="spikes", point="weight", when="both", share=0.01, scale=9.0)
    with attach(experts.rooted(module, HIDDEN), injection) as harmed:
        stack = harmed.states["experts.down_proj"]
        hit = (stack.copy_of(module._parameters["down_proj"]) - module._parameters["down_proj"]).abs() > 8
    assert int(hit.sum()) == pytest.approx(0.01 * 4 * HIDDEN * INNER, abs=4 * 16)
    assert not torch.equal(hit[0], hit[1])


def test_frozen_experts_have_no_gradient_of_their_weights_to_round():
    module, _ = made("qwen3_moe", "eager")
    table = resolve(experts.rooted(module.requires_grad_(False), HIDDEN), Injection.named("w4a4", grad_input="mxfp8"))
    assert all(plan.grad_input and not plan.grad_weight for plan in table.plans)


def test_a_rehearsal_of_a_square_stack_is_no_evidence():
    """By hand: 5 rows of 64 inputs enter the products of 4 experts once; the rehearsal counts for nothing."""
    model = experts.rooted(experts.Plain(inner=64), HIDDEN)
    with attach(model, Injection.named("w4a4")) as harmed, torch.no_grad():
        model["experts"](torch.randn(5, HIDDEN))
        assert {row.point: row.elements for row in harmed.evidence()} == {"weight": 4 * 64 * 64, "input": 4 * 5 * 64}


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_noise_on_weights_is_in_what_experts_multiply_by(family):
    """Mean 0 and deviation 0.02 over 4 x 192 x 64 weights; what is computed is that of their rounded values."""
    module, args = made(family, "eager")
    twin, _ = made(family, "eager")
    model, clean = experts.rooted(module, HIDDEN), module._parameters["gate_up_proj"].detach().clone()
    noise, generator = Noise(targets={"kinds": ["linear"]}), torch.Generator().manual_seed(0)
    with attach(model, Injection.named("w4a16", dtype="float32")) as harmed, torch.no_grad():
        before = module(*args)
        with perturb(model, noise, 0.02, generator=generator) as evidence:
            harmed.invalidate()
            drawn, noisy = module._parameters["gate_up_proj"] - clean, module(*args)
            twin.load_state_dict(module.state_dict())
        harmed.invalidate()
        assert torch.equal(module(*args), before)
    assert {item.name for item in evidence} == {"experts.gate_up_proj", "experts.down_proj"}
    assert abs(float(drawn.mean())) < 4 * 0.02 / drawn.numel() ** 0.5
    assert float(drawn.std()) == pytest.approx(0.02, rel=0.02)
    assert torch.allclose(noisy, by_hand(twin, args, {"weight": oracle.mxfp4})[0], rtol=1e-9)
    assert not torch.equal(noisy, before)
