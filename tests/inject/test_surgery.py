"""Models that are rebuilt, hooked, pickled or run by two threads while they carry an injection.

The kind of fault: what was proven about the model that was attached to is told of another one; or something of the
injection stays behind in the model.
"""

import copy
import io
import pickle
import sys
import threading

import pytest
import torch
import zoo_families as families
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from fp4rl.inject.attach import attach
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import MXFP4
from fp4rl.spec.injection import Injection
from fp4rl.spec.points import PHASES

W4A4 = Injection.named("w4a4", dtype="float32")
PACKED = Injection.named("w4a16", dtype="float32", frozen_base="packed", apply_during={"weight": PHASES})
MERGED = Injection.named("w4a16", dtype="float32", lora="merged")
IDS = torch.arange(3, 27).view(2, 12)
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"vocab_size": 50, "intermediate_size": 96}
LORA = LoraConfig(r=4, target_modules=["q_proj"])


def dense():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()


def experts():
    torch.manual_seed(0)
    few = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **few)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    return model


def wraps_a_layer(model):
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    model.model.layers[1].mlp.up_proj = Wrapper(model.model.layers[1].mlp.up_proj)


def replaces_a_layer(model):
    model.model.layers[1].mlp.up_proj = nn.Linear(64, 96, bias=False)


def adds_a_layer(model):
    model.model.layers[1].mlp.more = nn.Linear(64, 64)


def takes_a_layer_out(model):
    model.model.layers[1].mlp.up_proj = nn.Identity()


def saves_a_module_whole(model):
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["up_proj"]))


def gives_a_forward(model):
    model.model.layers[1].mlp.up_proj.forward = lambda x: x @ torch.ones(64, 96)


SURGERY = {
    wraps_a_layer: r"layers\.1\.mlp\.up_proj was taken out",
    replaces_a_layer: r"layers\.1\.mlp\.up_proj was replaced by another Linear",
    adds_a_layer: r"layers\.1\.mlp\.more was put into",
    takes_a_layer_out: r"layers\.1\.mlp\.up_proj was taken out",
    saves_a_module_whole: r"layers\.0\.mlp\.up_proj was replaced by another InjectedLinear",
    gives_a_forward: r"layers\.1\.mlp\.up_proj was given a forward of its own",
}


@pytest.mark.parametrize("cut", SURGERY, ids=lambda cut: cut.__name__)
def test_surgery_is_noticed_at_the_next_forward_and_named_with_the_cure(cut):
    model = dense()
    with attach(model, W4A4):
        for _ in range(2):
            model(IDS)
        cut(model)
        with pytest.raises(InvalidValueError, match=SURGERY[cut] + r".* call remove\(\).*attach again"):
            model(IDS)


def test_surgery_on_a_model_without_numbered_layers_is_noticed_whenever_it_comes():
    for forwards in range(3):
        model = nn.ModuleDict({"up": nn.Linear(64, 64)})
        model.forward = lambda x, model=model: model["up"](x)
        with attach(model, W4A4):
            for _ in range(forwards):
                model(torch.ones(1, 64))
            model["up"] = nn.Linear(64, 64)
            with pytest.raises(InvalidValueError, match="up was replaced by another Linear"):
                model(torch.ones(1, 64))


def test_adapters_that_are_merged_away_are_noticed_also_where_only_the_inner_model_is_called():
    model = get_peft_model(dense(), LORA)
    with attach(model, MERGED):
        model(IDS)
        inner = model.merge_and_unload()
        with pytest.raises(InvalidValueError, match=r"layers\.0\.self_attn\.q_proj lost its adapter after"):
            inner(IDS)


def test_a_second_adapter_that_leaves_every_site_as_it_is_goes_on():
    model = get_peft_model(dense(), LORA)
    with attach(model, MERGED) as harmed:
        model.add_adapter("other", LORA)
        model.set_adapter("other")
        model(IDS)
        harmed.require_calls()


def test_adapters_beside_rounded_layers_compute_as_if_they_had_come_first():
    def logits(first):
        torch.manual_seed(0)
        model = get_peft_model(dense(), LORA) if first else dense()
        with attach(model, W4A4), torch.no_grad():
            torch.manual_seed(0)
            model = model if first else get_peft_model(model, LORA)
            for name, parameter in model.named_parameters():
                if "lora" in name:
                    parameter.fill_(0.1)
            return model(IDS).logits

    assert torch.equal(logits(first=True), logits(first=False))


def everything(model):
    """What every module holds and what the state dict says, by identity where it is a tensor or a module."""
    held = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            inside = tuple((k, id(v)) for k, v in value.items()) if isinstance(value, dict) else value
            held[name, key] = inside
        held[name, "class"] = type(module)
    return held | {("state", name): id(value) for name, value in model.state_dict(keep_vars=True).items()}


INJECTIONS = {
    "w4a4": (experts, W4A4),
    "everything": (
        experts,
        Injection.model_validate(
            {
                "mode": "w4a4",
                "kv_cache": "mxfp4",
                "errors": [{"kind": "relative", "point": point, "scale": 0.01} for point in ("matmul", "scores")],
            }
        ),
    ),
    "merged": (lambda: get_peft_model(dense(), LORA), MERGED),
}


@pytest.mark.parametrize("case", INJECTIONS)
def test_remove_leaves_nothing_behind(case):
    build, injection = INJECTIONS[case]
    model = build()
    before, plain = everything(model), model(IDS).logits
    with attach(model, injection):
        assert not torch.equal(model(IDS).logits, plain)
        assert everything(model) != before
    assert everything(model) == before
    assert torch.equal(model(IDS).logits, plain)


def test_a_packed_base_leaves_its_rounded_weights_and_nothing_else_behind():
    model = dense().requires_grad_(False)
    before, held = everything(model), list(model.parameters())  # the id of a freed tensor is used again
    rounded = {
        name: fake_quantize(value, MXFP4) for name, value in model.state_dict().items() if name.endswith("_proj.weight")
    }
    with attach(model, PACKED):
        model(IDS)
    after, state = everything(model), model.state_dict()
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    weights = {("state", name) for name in rounded}
    assert held
    assert changed == weights | {(name.removesuffix(".weight"), "_parameters") for name in rounded}
    assert all(torch.equal(state[name], value) for name, value in rounded.items())


@pytest.mark.parametrize("order", ["hooks first", "injection first", "hooks removed inside"])
def test_the_hooks_of_accelerate_run_the_rounded_layer_and_survive_its_removal(order):
    model, plain_model = experts(), experts()
    with attach(plain_model, W4A4), torch.no_grad():
        wanted = plain_model(IDS).logits
    plain = plain_model(IDS).logits

    def hook():
        for module in model.modules():
            add_hook_to_module(module, ModelHook())

    if order == "hooks first":
        hook()
    with attach(model, W4A4) as harmed, torch.no_grad():
        if order != "hooks first":
            hook()
        if order == "hooks removed inside":
            remove_hook_from_submodules(model)
        assert torch.equal(model(IDS).logits, wanted)
        harmed.require_calls()
    assert torch.equal(model(IDS).logits, plain)
    remove_hook_from_submodules(model)
    assert torch.equal(model(IDS).logits, plain)
    with attach(model, W4A4), torch.no_grad():
        assert torch.equal(model(IDS).logits, wanted)


def test_an_offloaded_model_computes_with_its_rounded_weights():
    model, other = dense(), dense()
    with attach(other, W4A4), torch.no_grad():
        wanted = other(IDS).logits
    with torch.no_grad():
        cpu_offload(model, execution_device=torch.device("cpu"))
        with attach(model, W4A4) as harmed:
            assert torch.equal(model(IDS).logits, wanted)
            harmed.require_calls()


def latent():
    return families.tiny("deepseek_v3").float()


def shared():
    return families.tiny("zamba2").float()


@pytest.mark.parametrize("build", [dense, experts, latent, shared])
@pytest.mark.parametrize(
    "injection",
    [INJECTIONS["everything"][1], W4A4.model_copy(update={"apply_during": W4A4.apply_during})],
    ids=["all", "w4a4"],
)
def test_two_threads_through_one_model_compute_what_each_computes_alone(build, injection):
    model = build()
    inputs = [torch.randint(3, 50, (2, 8 + 3 * n), generator=torch.Generator().manual_seed(n)) for n in range(2)]
    interval = sys.getswitchinterval()
    with attach(model, injection), torch.no_grad():
        alone = [model(ids).logits for ids in inputs]
        found, failed = [[], []], []

        def run(thread):
            try:
                with torch.no_grad():
                    for _ in range(8):
                        found[thread].append(model(inputs[thread]).logits)
            except BaseException as why:
                failed.append(why)

        sys.setswitchinterval(1e-6)
        try:
            threads = [threading.Thread(target=run, args=(n,)) for n in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(interval)
    assert not failed, failed
    for wanted, outputs in zip(alone, found, strict=True):
        assert all(torch.equal(wanted, output) for output in outputs)


def _saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), _saved]


@pytest.mark.parametrize("twin_of", COPIES, ids=["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("case", INJECTIONS)
def test_a_copy_of_an_attached_model_computes_alike_and_notices_surgery_on_itself(twin_of, case):
    build, injection = INJECTIONS[case]
    model = build()
    with attach(model, injection), torch.no_grad():
        twin = twin_of(model)
        assert torch.equal(twin(IDS).logits, model(IDS).logits)
        inner = twin.base_model.model if case == "merged" else twin
        inner.model.layers[1].self_attn.o_proj = nn.Linear(64, 64, bias=False)
        model(IDS)
        with pytest.raises(InvalidValueError, match=r"layers\.1\.self_attn\.o_proj was replaced"):
            twin(IDS)
