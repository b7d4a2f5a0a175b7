"""Stacked experts whose frozen weights exist as codes alone: numbers and gradients of kept copies, and what is held."""

import copy

import pytest
import torch
import zoo_families
from expert_kinds import KINDS, SIZES, Plain, arguments, experts_of, rooted, ways
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fp4rl.inject.attach import attach
from fp4rl.inject.evidence import master_digest
from fp4rl.inject.probe import require_rounded
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.noise.perturb import perturb
from fp4rl.rl.check import check
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.injection import PHASES, Injection
from fp4rl.spec.noise import Noise

ALWAYS = {"apply_during": {"weight": PHASES}}
IDS = torch.arange(3, 27).view(2, 12)
MODES = ("w4a16", "w4a4", "nvfp4_w4a16")


def injection(mode, base):
    return Injection.model_validate({"mode": mode, "frozen_base": base, **ALWAYS})


def family(name="qwen3_moe"):
    model = zoo_families.tiny(name).float().requires_grad_(False)
    for number, (path, parameter) in enumerate(model.named_parameters()):
        if "experts" in path:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    return model


def held(model):
    """Bytes of every tensor of the experts, by hand from what their states and parameters hold."""
    total = 0
    for module in model.modules():
        for stack in getattr(module.__dict__.get("injected"), "stacks", {}).values():
            tensors = [*stack.tensors, stack.cache.copy] if stack.plan.packed else [stack.cache.copy]
            total += sum(t.numel() * t.element_size() for t in tensors if t is not None)
    return total


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["@ with biases", "bmm, undeclared", "linear"])
def test_packed_experts_compute_what_rounded_copies_compute(kind, mode):
    """In outputs and in the gradient of the input, in every implementation, size and layout."""
    name, cls = KINDS[kind]
    for size in SIZES:
        module, args = experts_of(name, cls, size).float().requires_grad_(False), arguments(cls, size[0])
        args = [a.float() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
        for way in ways(module):
            if way != "eager":
                module.config._experts_implementation = way
            seen = []
            for base in ("copy", "packed"):
                x = args[0].clone().requires_grad_()
                with attach(rooted(copy.deepcopy(module), size[0]), injection(mode, base)) as harmed:
                    y = harmed.model["experts"](x, *args[1:])
                    y.square().sum().backward()
                    harmed.require_calls()
                    require_rounded(harmed)
                seen.append((y.detach(), x.grad))
            for a, b in zip(*seen, strict=True):
                assert torch.allclose(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().max())), (size, way)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4_text", "mixtral", "deepseek_v3"])
def test_a_packed_mixture_holds_4_and_a_quarter_bits_and_saves_rounded_weights(name):
    model = family(name)
    rounded = family(name)
    with attach(rounded, injection("w4a16", "copy")) as harmed:
        wanted = harmed.model(IDS).logits
    experts = [path for path, _ in model.named_parameters() if "experts" in path and path.endswith("_proj")]
    weights = sum(model.get_parameter(path).numel() for path in experts)
    with attach(model, injection("w4a16", "packed")) as harmed:
        assert torch.allclose(model(IDS).logits, wanted, rtol=1e-5, atol=1e-5)
        assert held(model) * 8 / weights == 4.25
        assert all(model.get_parameter(path).is_meta for path in experts)
        before, state = master_digest(model), model.state_dict()
        assert not any(tensor.is_meta for tensor in state.values())
        model.load_state_dict(family(name).state_dict())
        assert master_digest(model) == before
        model.to("cpu", torch.float32)
        assert torch.allclose(model(IDS).logits, wanted, rtol=1e-5, atol=1e-5)
        wide = model.to(torch.bfloat16)(IDS).logits
        assert wide.dtype == torch.bfloat16
        assert (wide.float() - wanted).abs().median() < 0.02 * wanted.abs().max()  # of a few tokens the route flips
        assert model.to(torch.float32).get_parameter(experts[0]).dtype == torch.float32
        harmed.states[experts[0]].packed[1].data[0, 0] ^= 1
        assert master_digest(model) != before
        harmed.states[experts[0]].packed[1].data[0, 0] ^= 1
        with pytest.raises(TypeError, match="cannot be copied"):
            copy.deepcopy(model)
    assert torch.allclose(model.get_parameter(experts[0]), state[experts[0]])  # what is left is the rounded weight
    assert "injected" not in dict(model.get_submodule(experts[0].rpartition(".")[0]).__dict__)


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
def test_nothing_as_large_as_an_expert_is_kept_for_the_backward(way):
    model = family()
    model.set_experts_implementation(way)
    model.model.embed_tokens.weight.requires_grad_(True)
    sizes = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.untyped_storage().nbytes()) or t, lambda t: t
    )
    leave = {"targets": {"take": "*.experts.*"}}
    one = Injection.model_validate({"mode": "w4a16", "frozen_base": "packed", **ALWAYS, **leave})
    stack = model.model.layers[0].mlp.experts.gate_up_proj
    whole = stack.numel() * stack.element_size()
    with attach(model, one), hooks:
        model(IDS)
    assert whole not in sizes
    sizes.clear()
    with hooks:
        model(IDS)
    assert whole in sizes  # what the test looks for is there without packing


@pytest.mark.parametrize(
    "targets", [{"target_modules": ["q_proj"]}, {"target_parameters": ["mlp.experts.gate_up_proj"]}]
)
def test_adapters_over_packed_experts_train_as_over_a_copy(targets):
    """Beside attention, and on the experts themselves; under gradient checkpointing too."""
    grads = []
    for base, checkpointed in (("copy", False), ("packed", False), ("packed", True)):
        torch.manual_seed(0)
        model = get_peft_model(family(), LoraConfig(r=4, init_lora_weights=False, **targets))
        generator = torch.Generator().manual_seed(1)
        for p in model.parameters():
            if p.requires_grad:
                p.data.normal_(0, 0.1, generator=generator)
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
            model.train()
        with attach(model, injection("w4a4", base)):
            model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(grads[0]) >= 4
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            assert a.abs().max() > 0
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_errors_of_the_products_reach_packed_experts():
    error = [{"kind": "relative", "point": "matmul", "when": "both", "scale": 0.05}]
    seen = []
    for base in ("copy", "packed"):
        model = family()
        x = model.model.embed_tokens(IDS).requires_grad_()
        described = Injection.model_validate({"mode": "w4a16", "frozen_base": base, **ALWAYS, "errors": error})
        with attach(model, described) as harmed:
            model(inputs_embeds=x).logits.square().sum().backward()
            harmed.require_calls()
        seen.append(x.grad)
    assert torch.allclose(*seen, rtol=1e-3, atol=1e-3 * float(seen[0].abs().max()))


def test_a_weight_that_cannot_be_packed_leaves_all_others_as_they_were():
    model = family()
    model.model.layers[1].mlp.experts.down_proj.data[0, 0, 0] = torch.nan
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InvalidValueError, match="down_proj"):
        attach(model, injection("w4a16", "packed"))
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert before.keys() == model.state_dict().keys()


def test_a_square_stack_of_unknown_layout_is_refused_with_the_cure():
    """It would be run once unrounded to find out, and codes hold nothing unrounded."""
    module = Plain(inner=64).requires_grad_(False)
    with pytest.raises(InvalidValueError, match=r"gate_up_proj: .*how this square one is stored.*leave"):
        attach(rooted(module, 64), injection("w4a16", "packed"))


@pytest.mark.filterwarnings("ignore")  # Dynamo warns about its own internals
def test_a_compiled_module_unpacks_as_it_does_uncompiled():
    torch._dynamo.reset()
    module, args = experts_of("qwen3_moe", "Qwen3MoeExperts", SIZES[0]).requires_grad_(False), arguments("", 64)
    args = [a.float() if a.is_floating_point() else a for a in args]
    with attach(rooted(module.float(), 64), injection("w4a16", "packed")) as harmed, torch.no_grad():
        wanted = module(*args)
        harmed.reset_evidence()
        assert torch.equal(torch.compile(module, backend="eager")(*args), wanted)
        harmed.require_calls()
        assert {row.calls for row in harmed.evidence()} == {1}
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_noise_on_packed_weights_is_refused_before_a_run_and_in_a_loop_of_its_own(name, tmp_path):
    """Kind: `Tensor.item() cannot be called on meta tensors`, in the first rollout of a run."""
    model, noise = family(name), Noise(targets={"kinds": ["linear"]})
    packed, refused = injection("w4a16", "packed"), pytest.raises(InvalidValueError, match="packed into 4-bit codes")
    with attach(model, packed), refused, perturb(model, noise, 0.01, generator=torch.Generator()):
        pass
    tokenizer = build_tokenizer()
    settings = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": 512}
    config = family(name).config
    config.update(settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    described = {
        "model": {"path": str(tmp_path), "lora": {"rank": 2, "target_modules": ["q_proj"]}},
        "task": {"name": "arithmetic"},
        "injection": packed.model_dump(mode="json"),
        "training": {"reference_precision": "deployment", "max_prompt_length": 256, "max_response_length": 64},
        "evaluation": {"max_new_tokens": 64},
    }
    check(Experiment.model_validate(described))
    check(Experiment.model_validate({**described, "noise": {}}))  # norms take it
    with pytest.raises(InvalidValueError, match=r"noise: model.layers.0.*packed into 4-bit codes .*kinds: \[norm\]"):
        check(Experiment.model_validate({**described, "noise": {"targets": {"kinds": ["linear"]}}}))
