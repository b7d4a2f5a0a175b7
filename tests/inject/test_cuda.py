"""On a GPU an injected model computes with the numbers that it should; skipped without one."""

import copy
from collections import deque

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM

from fp4rl.inject.attach import attach
from fp4rl.inject.cache import ACCELERATOR_INTERVAL
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.spec.errors import CheckFailed, InvalidValueError
from fp4rl.spec.formats import MXFP4
from fp4rl.spec.injection import Injection

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "initializer_range": 0.1,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}


def model_of(kind="qwen3", dtype=torch.bfloat16, **more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **more)).to("cuda", dtype).eval()


@pytest.fixture
def ids():
    return torch.randint(0, 512, (4, 48), generator=torch.Generator().manual_seed(1)).cuda()


@pytest.mark.parametrize("mode", ["w4a16", "w4a8", "w4a4", "nvfp4_w4a4"])
def test_a_layer_multiplies_what_the_cpu_would_round(mode):
    injection = Injection.named(mode)
    layer = nn.Linear(512, 96, bias=False).to("cuda", torch.bfloat16)
    x = torch.randn(40, 512, dtype=torch.bfloat16)
    weight = fake_quantize(layer.weight.cpu(), injection.weight).cuda()
    rounded = (x if injection.input is None else fake_quantize(x, injection.input)).cuda()
    with attach(layer, injection):
        assert torch.equal(layer(x.cuda()), linear(rounded, weight))


def test_weights_follow_the_optimizer_and_gradients_are_those_of_the_rounded_product():
    layer = nn.Linear(256, 64, bias=False).to("cuda")
    x = torch.randn(32, 256, device="cuda")
    optimizer = torch.optim.AdamW(layer.parameters(), 0.05, fused=True)
    with attach(layer, Injection(weight="mxfp4", dtype="float32")):
        for _ in range(5):
            expected = linear(x, fake_quantize(layer.weight.detach(), MXFP4))
            y = layer(x)
            assert torch.equal(y, expected)
            y.square().sum().backward()
            assert torch.allclose(layer.weight.grad, (2 * expected).t() @ x, rtol=1e-4, atol=1e-3)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore")  # Dynamo warns about its own internals
@pytest.mark.parametrize("mode", ["w4a16", "w4a4"])
def test_compiled_equals_eager(mode, ids):
    torch._dynamo.reset()
    model = model_of(dtype=torch.float32)
    with attach(model, Injection.named(mode)) as attached, torch.no_grad():
        eager = model(ids).logits
        compiled = torch.compile(model)(ids).logits
        evidence = attached.evidence()
    assert evidence
    # In W4A4 an input on a rounding tie may fall on the other side once its sum is fused.
    off = ((compiled - eager).abs() > 1e-3 * eager.abs().max()).float().mean()
    assert off < (1e-4 if mode == "w4a16" else 0.2)


def test_a_cuda_graph_that_would_keep_old_rounding_is_refused():
    layer = nn.Linear(64, 64, bias=False).cuda()
    x = torch.randn(8, 64, device="cuda")
    with attach(layer, Injection.named("w4a16")), torch.no_grad():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(InvalidValueError, match="CUDA graph"), torch.cuda.graph(graph):
            layer(x)


def test_a_weight_written_without_notice_stops_the_run():
    layer = nn.Linear(64, 64, bias=False).cuda().requires_grad_(False)
    x = torch.randn(8, 64, device="cuda")
    with attach(layer, Injection.named("w4a16")), torch.no_grad():
        layer(x)
        layer.weight.data.add_(1)  # no version counter moves
        with pytest.raises(CheckFailed, match="written without notice"):
            deque((layer(x) for _ in range(2 * ACCELERATOR_INTERVAL)), maxlen=0)


def test_a_packed_base_takes_the_memory_of_its_codes():
    layer = nn.Linear(4096, 4096, bias=False).to("cuda", torch.bfloat16).requires_grad_(False)
    x = torch.randn(8, 4096, device="cuda", dtype=torch.bfloat16)
    layer(x)  # the first product takes a workspace, which stays
    before = torch.cuda.memory_allocated()
    whole = layer.weight.numel() * 2
    always = {"weight": ("rollout", "training", "evaluation", "reference")}
    injection = Injection.model_validate({"mode": "w4a16", "frozen_base": "packed", "apply_during": always})
    expected = linear(x, fake_quantize(layer.weight, injection.weight))
    with attach(layer, injection), torch.no_grad():
        assert torch.equal(layer(x), expected)
        del expected
        freed = before - torch.cuda.memory_allocated()
        assert freed > whole * (1 - 4.25 / 16) - (1 << 20)


@pytest.mark.parametrize("mode", ["w4a16", "w4a8", "w4a4"])
def test_experts_grouped_on_the_gpu_equal_experts_one_by_one(mode, ids):
    model = model_of("qwen3_moe", **EXPERTS)
    outputs, elements = {}, {}
    for how in ("eager", "grouped_mm"):
        model.set_experts_implementation(how)
        with attach(model, Injection.named(mode)) as attached, torch.no_grad():
            outputs[how] = model(ids).logits.float()
            records = (record for record in attached.evidence() if "experts" in record.site)
            elements[how] = sorted((record.site, record.point, record.elements) for record in records)
    assert elements["eager"] == elements["grouped_mm"]
    assert elements["eager"]
    difference = (outputs["eager"] - outputs["grouped_mm"]).norm() / outputs["eager"].norm()
    with torch.no_grad():
        plain = model(ids).logits.float()
    assert difference < 0.3 * (plain - outputs["eager"]).norm() / plain.norm()


@pytest.mark.parametrize("mode", ["w4a16", "w4a8", "w4a4", "kv_cache"])
def test_decoding_with_a_cache_equals_one_pass(mode, ids):
    """Norms add in float32 in another order there; where a value lies on a tie, a token differs by a rounding step."""
    model = model_of(dtype=torch.float64)
    changes = {"kv_cache": "mxfp8", "mode": "w4a8"} if mode == "kv_cache" else {"mode": mode}
    with attach(model, Injection.model_validate(changes | {"dtype": "float32"})), torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :40], use_cache=True)
        parts, cache = [first.logits], first.past_key_values
        for position in range(40, ids.shape[1]):
            step = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            parts.append(step.logits)
    off = (torch.cat(parts, 1) - whole).abs().amax(-1) / whole.abs().amax()
    assert off.median() < 1e-5
    assert (off > 1e-3).float().mean() <= (0.0 if mode == "w4a16" else 0.1)


def test_removal_leaves_the_model_as_it_was(ids):
    model = model_of()
    twin = copy.deepcopy(model)
    attachment = attach(model, Injection.named("w4a4"))
    with torch.no_grad():
        model(ids)
        attachment.remove()
        assert torch.equal(model(ids).logits, twin(ids).logits)
