"""A token's log-probability is its own, to the last bit: the same alone, among batch-mates, and decoded with a cache.

The models add up in one order, whatever the shape of a call, so that all that can differ is the rounding: one FP32
factor for a whole call moves log-probabilities by tenths of a nat.
"""

import math

import pytest
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from fp4rl.inject.attach import attach
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.injection import Injection

STATIC = {"name": "nvfp4", "factor": "static", "calibrated": 4.0}
PER_TOKEN = {"name": "nvfp4", "factor": "per_token"}
ACCEPTED = {
    **{mode: {"mode": mode} for mode in ("w4a16", "w4a8", "w4a4", "w8a8", "nvfp4_w4a16", "nvfp4_w4a4")},
    "nvfp4 static": {"mode": "nvfp4_w4a4", "input": STATIC},
    "nvfp4 everywhere": {"weight": "nvfp4", **dict.fromkeys(("input", "output", "kv_cache"), PER_TOKEN)},
    "mxfp4 with a fallback": {"mode": "w4a4", "input": {"name": "mxfp4", "fallback": 0.5}},
    "nvfp4 with a fallback": {"mode": "nvfp4_w4a4", "input": PER_TOKEN | {"fallback": 0.25}},
    "fp8 per token": {"weight": "fp8", "input": {"name": "fp8", "factor": "per_token"}},
    "fp8 static": {"weight": "fp8", "input": {"name": "fp8", "factor": "static", "calibrated": 4.0}},
}
REFUSED = {"nvfp4": {"weight": "nvfp4", "input": "nvfp4"}, "fp8": {"weight": "fp8", "input": "fp8"}}
LENGTHS = (5, 11, 8)


def in_order(terms):
    """The sum over the last axis, one term after the other: zeros of padding change nothing."""
    return terms.cumsum(-1)[..., -1]


def product(a, b):
    """a b^T over the last axis."""
    return in_order(a.unsqueeze(-2) * b.unsqueeze(-3))


def each(function):
    """A function of one number at a time, where torch's vectors and their remainders may disagree in the last bit."""
    return lambda x, **_: x.detach().double().clone().apply_(function).to(x.dtype)


exp, log = each(math.exp), each(math.log)


def softmax(x, dim=-1, dtype=None, **_):
    assert dim in (-1, x.ndim - 1)
    powers = exp(x.to(dtype or x.dtype) - x.amax(-1, keepdim=True))
    return powers / in_order(powers).unsqueeze(-1)


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """`scaled_dot_product_attention` with a mask that says what may be seen; a row that sees nothing is zero."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = product(query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    seen = torch.ones_like(scores, dtype=torch.bool) if attn_mask is None else attn_mask
    seen = seen.tril() if is_causal else seen
    return product(softmax(scores.masked_fill(~seen, -torch.inf)).masked_fill(~seen, 0.0), value.mT)


class InOneOrder(TorchFunctionMode):
    """Whatever adds numbers up, or takes a function of them that is not rounded correctly, does so as above."""

    OWN = {  # noqa: RUF012
        functional.linear: lambda x, weight, bias=None: product(x, weight) + (0 if bias is None else bias),
        functional.scaled_dot_product_attention: attention,
        functional.softmax: softmax,
        functional.silu: each(lambda x: x / (1 + math.exp(-x))),
        torch.Tensor.mean: lambda x, dim, keepdim: in_order(x).unsqueeze(-1) / x.shape[dim],
        torch.Tensor.cos: each(math.cos),
        torch.Tensor.sin: each(math.sin),
    }
    UNKNOWN = (torch.matmul, torch.bmm, torch.mm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.einsum)

    def __init__(self):
        super().__init__()
        self.met = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Compute it in the one order."""
        assert func not in self.UNKNOWN, f"{func} adds up in an order of its own"
        self.met |= {func} & self.OWN.keys()
        return self.OWN.get(func, func)(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def one_order():
    with InOneOrder() as mode:
        yield
    assert len(mode.met) >= 6, mode.met


@pytest.fixture(scope="module", params=[("llama", torch.float32), ("qwen3_moe", torch.bfloat16)], ids=str)
def model(request):
    kind, dtype = request.param
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.15, "vocab_size": 50}
    if kind == "qwen3_moe":
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).to(dtype).eval()
    made.set_experts_implementation("eager")  # its products are those of `linear`
    return made


def texts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 50, (length,), generator=generator) for length in LENGTHS]


def scored(logits, ids):
    least = logits[:-1] - logits[:-1].amax(-1, keepdim=True)
    return least.gather(-1, ids[1:, None]).squeeze(-1) - log(in_order(exp(least)))


def alone(model):
    return [scored(model(ids[None]).logits[0], ids) for ids in texts()]


def together(model):
    """All in one batch, padded on the left."""
    width = max(LENGTHS)
    ids = torch.stack([torch.nn.functional.pad(text, (width - len(text), 0)) for text in texts()])
    mask = torch.stack([torch.arange(width) >= width - length for length in LENGTHS]).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    return [scored(row[width - len(text) :], text) for row, text in zip(logits, texts(), strict=True)]


def decoded(model):
    """Token by token with a cache, behind a prompt of three."""
    found = []
    for ids in texts():
        output = model(ids[None, :3], use_cache=True)
        rows = [output.logits[0]]
        for token in ids[3:]:
            output = model(token.view(1, 1), past_key_values=output.past_key_values, use_cache=True)
            rows.append(output.logits[0])
        found.append(scored(torch.cat(rows), ids))
    return found


def distance(first, other):
    return max((a - b).abs().max().item() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_mode_that_rl_accepts_gives_a_token_one_log_probability(name, model):
    injection = Experiment.model_validate({"injection": ACCEPTED[name]}).injection
    plain = alone(model)
    with torch.no_grad(), attach(model, injection) as attachment:
        attachment.set_phase("rollout")
        by_itself = alone(model)
        assert distance(by_itself, plain) > 1e-3
        assert distance(by_itself, together(model)) == 0
        assert distance(by_itself, decoded(model)) == 0


@pytest.mark.parametrize("name", REFUSED)
def test_one_factor_for_a_call_gives_it_several_and_is_refused(name, model):
    with pytest.raises(ValueError, match="the log-probability of a token depends on its batch-mates"):
        Experiment.model_validate({"injection": REFUSED[name]})
    with torch.no_grad(), attach(model, Injection.model_validate(REFUSED[name])) as attachment:
        attachment.set_phase("rollout")
        assert distance(alone(model), together(model)) > 1e-3
        assert distance(alone(model), decoded(model)) > 1e-3
