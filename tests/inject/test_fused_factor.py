"""One NVFP4 factor for the weights that a serving kernel fuses: q/k/v, gate/up, as an engine reads them."""

import copy
import pickle
import warnings
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fp4rl.diagnose.scan import scan
from fp4rl.inject.attach import attach
from fp4rl.inject.plan import SitePlan
from fp4rl.inject.probe import require_rounded
from fp4rl.inject.resolve import resolve
from fp4rl.inject.validate import require_shared_factors
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.sites.walk import Site
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import NVFP4
from fp4rl.spec.injection import Injection
from fp4rl.spec.scan import Scan

FUSED = Injection.model_validate({"mode": "nvfp4_w4a16", "dtype": "float32"})
EVERYWHERE = {"weight": ["rollout", "training", "evaluation", "reference"]}
GROUPS = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
QKV = tuple(f"model.layers.0.{name}" for name in GROUPS[0])


@pytest.fixture
def peer():
    pytest.importorskip("compressed_tensors", reason="install the extra `oracles`", exc_type=ModuleNotFoundError)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield import_module


def build(seed=0):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(seed)
    config = AutoConfig.for_model("llama", **sizes, num_key_value_heads=2, vocab_size=50)
    model = AutoModelForCausalLM.from_config(config).eval()
    for number, weight in enumerate(model.parameters()):  # every weight has a largest magnitude of its own
        weight.data.mul_(1 + 0.37 * (number % 5))
    return model


def product_weight(model, name):
    """What a layer multiplies by, column by column."""
    layer = model.get_submodule(name)
    with torch.no_grad():
        return layer(torch.eye(layer.in_features)).T.contiguous()


def as_one(*weights):
    """The fused matrix rounded as one tensor, in its parts."""
    return fake_quantize(torch.cat(weights), NVFP4).split([len(weight) for weight in weights])


def weights_of(model, names=QKV):
    return [model.get_parameter(f"{name}.weight").detach().clone() for name in names]


def test_the_values_are_those_that_an_engine_reads_from_a_fused_checkpoint(peer):
    """compressed-tensors packs each shard under the group's least divisor; vLLM joins them under the largest stored."""
    helpers = peer("compressed_tensors.quantization.utils.helpers")
    packing = peer("compressed_tensors.compressors.nvfp4.helpers")
    forward = peer("compressed_tensors.quantization.lifecycle.forward")
    args = peer("compressed_tensors.quantization.quant_scheme").preset_name_to_scheme("NVFP4A16", ["Linear"]).weights
    model = build()
    for group in GROUPS:
        names = [f"model.layers.1.{name}" for name in group]
        shards = weights_of(model, names)
        own = [helpers.generate_gparam(shard.min(), shard.max()) for shard in shards]
        assert len({float(divisor) for divisor in own}) == len(shards)
        divisor = torch.stack(own).amin()
        codes, scales = [], []
        for shard in shards:
            blocks = shard.view(len(shard), -1, 16)
            scale, zero = helpers.calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale=divisor)
            units = forward.quantize(shard, scale, zero, args, global_scale=divisor)
            codes.append(packing.pack_fp4_to_uint8(units))
            scales.append(scale.to(torch.float8_e4m3fn))
        joined, engine = torch.cat(codes), torch.stack([divisor] * len(shards)).amax()
        read = packing.unpack_fp4_from_uint8(joined, len(joined), 2 * joined.shape[1], dtype=torch.float32)
        value = read.view(len(joined), -1, 16) * (torch.cat(scales).float() / engine)[..., None]
        with attach(model, FUSED):
            mine = torch.cat([product_weight(model, name) for name in names])
        assert torch.equal(mine, value.view_as(mine))
        assert not torch.equal(mine, torch.cat([fake_quantize(shard, NVFP4) for shard in shards]))


def test_a_layer_that_nothing_is_fused_with_has_its_own_factor_and_so_has_each_under_factor_tensor():
    model = build()
    names = ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj")
    with attach(model, FUSED):
        for name, weight in zip(names, weights_of(model, names), strict=True):
            assert torch.equal(product_weight(model, name), fake_quantize(weight, NVFP4))
    with attach(model, Injection.model_validate({"weight": "nvfp4", "dtype": "float32"})):
        for name, weight in zip(QKV, weights_of(model), strict=True):
            assert torch.equal(product_weight(model, name), fake_quantize(weight, NVFP4))


@pytest.mark.parametrize("grad", [False, True])
def test_a_write_to_one_layer_of_a_group_is_seen_by_the_others(grad):
    """A copy depends on every weight of the group, whichever of them an optimizer or a plain write changed."""
    model = build()
    with attach(model, FUSED) as attachment, torch.set_grad_enabled(grad):
        before = [product_weight(model, name) for name in QKV]
        assert all(map(torch.equal, before, as_one(*weights_of(model))))
        value = model.get_parameter(f"{QKV[2]}.weight")
        with torch.no_grad():
            value[0, 0] = 3.0
        after = [product_weight(model, name) for name in QKV]
        assert all(map(torch.equal, after, as_one(*weights_of(model))))
        assert not torch.equal(after[0], before[0])
        assert require_rounded(attachment) == 14
        value.grad = torch.full_like(value, 1.0)
        torch.optim.AdamW([value], lr=0.1, fused=True).step()
        made = [product_weight(model, name) for name in QKV]
        assert all(map(torch.equal, made, as_one(*weights_of(model))))


def test_gradients_pass_to_the_masters_of_the_group():
    model, ids = build(), torch.arange(3, 20)[None]
    with attach(model, FUSED):
        model(ids, labels=ids).loss.backward()
    assert all(model.get_parameter(f"{name}.weight").grad.abs().sum() > 0 for name in QKV)


def test_a_merged_adapter_on_one_layer_changes_the_factor_of_the_others():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(build(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    base = "base_model.model.model.layers.0.self_attn."
    merged = Injection.model_validate({"mode": "nvfp4_w4a16", "dtype": "float32", "lora": "merged"})

    def sums():
        found = []
        for name in ("q_proj", "k_proj", "v_proj"):
            layer = model.get_submodule(base + name)
            stored = getattr(layer, "base_layer", layer).weight.detach()
            found.append(stored + layer.get_delta_weight("default").detach() if name != "k_proj" else stored)
        return found

    with attach(model, merged):
        for _ in range(2):
            for name, wanted in zip(("q_proj", "k_proj", "v_proj"), as_one(*sums()), strict=True):
                assert torch.equal(product_weight(model, base + name), wanted)
            layer = model.get_submodule(f"{base}v_proj")
            layer.scaling["default"] *= 3  # no tensor is written, and q and k are rounded under another factor


def test_packed_codes_hold_the_factor_of_the_group_and_other_weights_are_refused_under_it():
    model = build().requires_grad_(False)
    wanted, names = as_one(*weights_of(model)), QKV
    packed = {"mode": "nvfp4_w4a16", "dtype": "float32", "frozen_base": "packed", "apply_during": EVERYWHERE}
    with attach(model, Injection.model_validate(packed)):
        for name, values in zip(names, wanted, strict=True):
            assert torch.equal(product_weight(model, name), values)
        saved = {key: value.clone() for key, value in model.state_dict().items()}
        model.load_state_dict(saved)
        assert torch.equal(product_weight(model, names[1]), wanted[1])
        saved[f"{names[1]}.weight"] *= 2
        with pytest.raises(InvalidValueError, match="other weights were loaded under the factor"):
            model.load_state_dict(saved)
    model = build().requires_grad_(False)
    model.get_parameter(f"{QKV[0]}.weight").requires_grad_(True)
    with pytest.raises(InvalidValueError, match="freeze or train all of it"):
        resolve(model, Injection.model_validate(packed))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_shares_factors_among_its_own_layers(duplicate):
    model = build()
    with attach(model, FUSED):
        other = duplicate(model)
        other.get_parameter(f"{QKV[1]}.weight").data.mul_(5)
        for name, wanted in zip(QKV, as_one(*weights_of(other)), strict=True):
            assert torch.equal(product_weight(other, name), wanted)
        for name, wanted in zip(QKV, as_one(*weights_of(model)), strict=True):
            assert torch.equal(product_weight(model, name), wanted)


def test_weights_on_the_grid_of_their_group_are_no_missed_rounding():
    """They would change under a factor of their own, and do not under the group's."""
    model = build()
    for group in GROUPS:
        for layer in (0, 1):
            names = [f"model.layers.{layer}.{name}" for name in group]
            for name, values in zip(names, as_one(*weights_of(model, names)), strict=True):
                model.get_parameter(f"{name}.weight").data.copy_(values)
    with attach(model, FUSED) as attachment, torch.no_grad():
        model(torch.arange(3, 20)[None])
        rows = {row.site: row for row in attachment.evidence()}
        assert rows[QKV[0]].missed == 0


def test_a_group_of_which_a_part_has_its_own_factor_is_refused():
    pattern = {"mode": "nvfp4_w4a16", "by_pattern": {"*.k_proj": {"weight": "nvfp4"}}}
    with pytest.raises(InvalidValueError, match=r"q_proj: nvfp4 \(fused factor\)/none, .*k_proj: nvfp4/none"):
        resolve(build(), Injection.model_validate(pattern))


@pytest.mark.parametrize(("mode", "earlier"), [("nvfp4_w4a16", "9b17519b4ce2"), ("nvfp4_w4a4", "8accf681523e")])
def test_the_digest_of_a_mode_is_no_more_that_of_a_factor_for_each_matrix(mode, earlier):
    """`earlier`: what stands beside scores of this model from when the mode had such a factor."""
    model, own = build(), {"mode": mode, "weight": "nvfp4"}
    now, each = (
        resolve(model, Injection.model_validate(asked)).digest_in("evaluation") for asked in ({"mode": mode}, own)
    )
    assert each == earlier
    assert now != earlier


def test_an_expert_of_a_stack_has_one_factor_for_its_gate_and_up():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 32, "vocab_size": 50, "head_dim": 16}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **sizes))
    stack = model.get_parameter("model.layers.0.mlp.experts.gate_up_proj")
    stack.data[1] *= 7
    with attach(model, FUSED) as attachment, torch.no_grad():
        model(torch.arange(3, 20)[None])
        copy_of = attachment.states["model.layers.0.mlp.experts.gate_up_proj"].cache.copy
        assert torch.equal(copy_of, torch.stack([fake_quantize(expert, NVFP4) for expert in stack]))


def test_experts_without_a_gate_are_rounded_each_under_its_own_factor():
    """Fault: the stack of `up_proj` was taken for a group of its own."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 64, "layers_block_type": ["moe", "attention"]}
    sizes |= {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 1,
        "topk_group": 1,
    }
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "mamba_num_heads": 4}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("nemotron_h", **sizes))
    (name,) = (name for name, _ in model.named_parameters() if name.endswith("experts.up_proj"))
    with attach(model, FUSED) as attachment, torch.no_grad():
        model(torch.arange(3, 20)[None])
        attachment.require_calls()
        copy_of = attachment.states[name].cache.copy
    assert torch.equal(copy_of, torch.stack([fake_quantize(expert, NVFP4) for expert in model.get_parameter(name)]))


def test_gate_and_up_of_experts_in_two_stacks_are_refused():
    fmt = replace(NVFP4, factor="fused")
    sites = [Site(f"x.experts.{role}_proj", "x.experts", "experts", role, 0, (4, 8, 16)) for role in ("gate", "up")]
    with pytest.raises(InvalidValueError, match="lie in two stacks"):
        require_shared_factors([SitePlan(site, weight=fmt) for site in sites])
    require_shared_factors([SitePlan(sites[0], weight=fmt), SitePlan(sites[1], weight=NVFP4)])


def test_a_scan_gives_both_errors():
    model = build()
    report = scan(model, FUSED, spec=Scan(parts=("precision",)))
    parts = {part.site: part for part in report.parts}
    for name, weight, values in zip(QKV, weights_of(model), as_one(*weights_of(model)), strict=True):
        part, own = parts[name], fake_quantize(weight, NVFP4)
        assert part.measures["relative_l2"] == pytest.approx(((values - weight).norm() / weight.norm()).item(), 1e-4)
        assert part.own_factor == pytest.approx(((own - weight).norm() / weight.norm()).item(), 1e-4)
    assert parts["model.layers.0.self_attn.o_proj"].own_factor is None
    rows = report.as_dict()["parts"]
    assert {row["site"] for row in rows if "own_factor" in row} == {
        f"model.layers.{layer}.{name}" for layer in (0, 1) for group in GROUPS for name in group
    }


def test_a_compiled_model_shares_factors_too():
    model = build()
    layers = nn.ModuleList([model.get_submodule(name) for name in QKV])
    with attach(model, FUSED), torch.no_grad():
        run = torch.compile(lambda x: [layer(x) for layer in layers], backend="eager")
        made = run(torch.eye(64))
    for weight, wanted in zip(made, as_one(*weights_of(model)), strict=True):
        assert torch.equal(weight.T, wanted)
