"""compressed-tensors: what transformers and the library itself load from our files is what was trained, bit for bit,
and what the library packs from the same weights are the same files."""

import json
import logging
import re
from importlib import import_module

import pytest
import torch
from export_models import folder_of, logits
from packed_models import by_compressed_tensors
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import MULTIMODAL, multimodal
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from fp4rl.engines.checkpoints.export import export
from fp4rl.engines.checkpoints.layouts.all import layout_named
from fp4rl.engines.checkpoints.source import Source
from fp4rl.inject.attach import attach
from fp4rl.models.load import load
from fp4rl.models.packed.folder import PackedFolder
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.numerics.quantize import fake_quantize
from fp4rl.rl.evaluate import answer
from fp4rl.rl.inputs import warmed_up
from fp4rl.rl.lora import with_lora
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.evaluation import Evaluation
from fp4rl.spec.formats import NVFP4
from fp4rl.spec.injection import Injection
from fp4rl.spec.model import Embedded, Lora
from fp4rl.spec.points import as_served
from fp4rl.tasks.arithmetic import Arithmetic

pytest.importorskip("compressed_tensors", reason="install the extra `oracles`", exc_type=ModuleNotFoundError)
pytestmark = pytest.mark.filterwarnings("ignore")

STATIC = {"name": "nvfp4", "factor": "static", "calibrated": 8.0}
MIXED = {"mode": "w4a4", "by_pattern": {"*.layers.0.mlp*": "mxfp8", "*.layers.1.self_attn*": "none"}}
CASES = {
    "w4a16": {"mode": "w4a16"},
    "w4a8": {"mode": "w4a8"},
    "w4a4": {"mode": "w4a4"},
    "w8a8": {"mode": "w8a8"},
    "nvfp4_w4a16": {"mode": "nvfp4_w4a16"},
    "nvfp4_w4a4": {"mode": "nvfp4_w4a4", "input": STATIC},
    "mixed": MIXED,
    "tiles": {"weight": "mxfp4_2d", "input": "mxfp4"},
}
FORMATS = {"w8a8": "mxfp8-quantized", "mixed": "mixed-precision"}


def injection_of(described, **more):
    return Injection.model_validate({"deployment": "compressed_tensors"} | described | more)


@pytest.fixture(scope="module")
def model_in(tmp_path_factory):
    """(family, dtype) -> a folder, made once."""
    made = {}

    def make(family, dtype=torch.bfloat16):
        if (family, dtype) not in made:
            made[family, dtype] = folder_of(family, tmp_path_factory.mktemp(family) / "model", dtype)
        return made[family, dtype]

    return make


def exported(folder, out, injection, **more):
    return export(Source(folder, injection), layout_named("compressed_tensors"), out, **more)


def live(folder, injection):
    """Logits in the dtype that engines compute in, and with the attention that `load` takes there."""
    model, _ = load(folder, "bfloat16")
    with attach(model, injection) as attachment:
        attachment.set_phase("evaluation")
        return logits(model)


def reloaded(out):
    logging.getLogger("compressed_tensors").setLevel(logging.ERROR)
    return AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")


def tensors_in(out):
    return {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_transformers_loads_the_rounded_weights_and_gives_the_same_logits(name, dtype, model_in, tmp_path):
    folder, injection = model_in("qwen2", dtype), injection_of(CASES[name])
    made = exported(folder, tmp_path / "out", injection)
    again = reloaded(tmp_path / "out")
    theirs = logits(again)
    weights = again.state_dict()
    for entry in made.policy.rounded:
        assert torch.equal(weights[entry.name].to(dtype), made.policy.baked(entry))
    kept = {entry.name: entry for entry in made.policy.entries if entry.weight is None}
    assert (len(made.policy.rounded), len(kept)) == ((10, 16) if name == "mixed" else (14, 12))
    stored = tensors_in(tmp_path / "out")
    assert all(same(stored[name], entry.stored.read()) for name, entry in kept.items())
    assert torch.equal(theirs, live(folder, injection))
    read = PackedFolder.open(tmp_path / "out")
    assert all(torch.equal(read.values(entry.name, dtype), made.policy.baked(entry)) for entry in made.policy.rounded)
    assert not torch.equal(theirs, logits(load(folder, "bfloat16")[0]))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    expected = "nvfp4-pack-quantized" if "nvfp4" in name else FORMATS.get(name, "mxfp4-pack-quantized")
    assert config["format"] == expected


LIBRARY = {  # the schemes of the library that are the cases above
    "w4a16": [("MXFP4A16", ["Linear"])],
    "w4a8": [("MXFP4A16+MXFP8", ["Linear"])],
    "w4a4": [("MXFP4", ["Linear"])],
    "w8a8": [("MXFP8", ["Linear"])],
    "nvfp4_w4a16": [("NVFP4A16", ["Linear"])],
    "nvfp4_w4a4": [("NVFP4", ["Linear"])],
    "mixed": [("MXFP8", ["re:.*layers.0.mlp.*"]), ("MXFP4", ["re:.*layers.0.self_attn.*", "re:.*layers.1.mlp.*"])],
}
APART = {"weight": {"name": "nvfp4", "factor": "tensor"}}  # the helper gives each layer a factor of its own


@pytest.fixture(scope="module", params=LIBRARY)
def both(request, model_in, tmp_path_factory):
    """(name of the case, our folder, the library's) of the same weights."""
    name, top = request.param, tmp_path_factory.mktemp("both")
    folder = model_in("qwen2")
    described = CASES[name] | (APART if "nvfp4" in name else {})
    exported(folder, top / "ours", injection_of(described), override=True)
    ignore = ["lm_head", *(["re:.*layers.1.self_attn.*"] if name == "mixed" else [])]
    by_compressed_tensors(top / "theirs", *LIBRARY[name], model=load(folder, "bfloat16")[0], ignore=ignore)
    return name, top / "ours", top / "theirs"


def test_the_library_packs_the_same_tensors_byte_for_byte(both):
    name, ours, theirs = both
    own, others = tensors_in(ours), tensors_in(theirs)
    assert set(own) == set(others)
    different = [key for key in own if "input_global" not in key and not same(own[key], others[key])]
    assert not different
    assert sum("scale" in key for key in own) >= (10 if name == "mixed" else 14)


def test_the_configuration_is_the_one_that_the_library_writes(both):
    name, ours, theirs = both
    own, others = (json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (ours, theirs))
    assert sorted(own.pop("ignore")) == sorted(others.pop("ignore"))
    groups, expected = own.pop("config_groups"), others.pop("config_groups")
    assert own == others
    for group in (*groups.values(), *expected.values()) if name == "mixed" else ():
        group.pop("targets")  # whose words are free: see the next test
    assert sorted(groups.values(), key=str) == sorted(expected.values(), key=str)


def test_the_library_gives_every_layer_the_scheme_that_it_gave_itself(both):
    _, ours, theirs = both
    chosen = []
    for folder in (ours, theirs):
        layers = reloaded(folder).named_modules()
        chosen.append(
            {name: str(getattr(layer, "quantization_scheme", None)).partition("weights=")[2] for name, layer in layers}
        )
    assert chosen[0] == chosen[1]
    assert any(chosen[0].values())


def test_layers_that_vllm_fuses_share_the_divisor_of_their_common_largest_magnitude(model_in, tmp_path):
    factor = import_module("compressed_tensors.quantization.utils.helpers").generate_gparam
    folder = model_in("qwen2")
    exported(folder, tmp_path / "out", injection_of(CASES["nvfp4_w4a4"]))
    stored, plain = tensors_in(tmp_path / "out"), tensors_in(folder)
    for fused in (("self_attn", "q_proj", "k_proj", "v_proj"), ("mlp", "gate_proj", "up_proj"), ("mlp", "down_proj")):
        names = [f"model.layers.1.{fused[0]}.{name}" for name in fused[1:]]
        whole = torch.cat([plain[f"{name}.weight"] for name in names]).float()
        for name in names:
            assert stored[f"{name}.weight_global_scale"] == factor(whole.min(), whole.max())
            assert stored[f"{name}.input_global_scale"] == factor(torch.tensor(-8.0), torch.tensor(3.0))


# How vLLM 0.32 finds the scheme of its own layers, in few words: a name, then a class that contains a target, then the
# names of all parts of a fused layer; experts by the names of one expert's three layers.
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def vllm_scheme(config, name, kind):
    def takes(target, word):
        return re.match(target[3:], word) if target.startswith("re:") else target == word

    targets = {t: group["format"] for group in config["config_groups"].values() for t in group["targets"]}
    last = name.rpartition(".")[2]
    parts = [name.removesuffix(last) + part for part in PARTS.get(last, (last,))]
    ignored = {any(takes(target, part) for target in config["ignore"]) for part in parts}
    assert len(ignored) == 1
    if ignored.pop():
        return None
    found = [fmt for target, fmt in targets.items() if takes(target, name)]
    found += [fmt for target, fmt in targets.items() if ":" not in target and target.lower() in kind.lower()]
    if last in PARTS:
        each = [[fmt for target, fmt in targets.items() if takes(target, part)] for part in parts]
        found += [own[0] for own in each[:1] if all(each)]
    return found[0] if found else "none found"


def of_vllm(folder, layers=2):
    """The scheme of every layer that vLLM builds for Qwen2, Qwen3-MoE and Mixtral."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    found = {}
    for layer in range(layers):
        top = f"model.layers.{layer}"
        found[f"{layer} qkv"] = vllm_scheme(config, f"{top}.self_attn.qkv_proj", "QKVParallelLinear")
        found[f"{layer} o"] = vllm_scheme(config, f"{top}.self_attn.o_proj", "RowParallelLinear")
        found[f"{layer} gate_up"] = vllm_scheme(config, f"{top}.mlp.gate_up_proj", "MergedColumnParallelLinear")
        found[f"{layer} down"] = vllm_scheme(config, f"{top}.mlp.down_proj", "RowParallelLinear")
        for block in ("mlp", "block_sparse_moe"):
            found[f"{layer} {block} gate"] = vllm_scheme(config, f"{top}.{block}.gate", "ReplicatedLinear")
            experts = {
                vllm_scheme(config, f"{top}.{block}.experts.0.{part}_proj", "RoutedExpertsLinear")
                for part in ("gate", "up", "down")
            }
            (found[f"{layer} {block} experts"],) = experts
    return found | {"head": vllm_scheme(config, "lm_head", "ParallelLMHead")}


def test_vllm_finds_one_scheme_for_every_fused_layer(model_in, tmp_path):
    four, eight = "mxfp4-pack-quantized", "mxfp8-quantized"
    exported(model_in("qwen2"), tmp_path / "one", injection_of(CASES["w4a8"]))
    one = of_vllm(tmp_path / "one")
    assert {one[f"{layer} {part}"] for layer in (0, 1) for part in ("qkv", "o", "gate_up", "down")} == {four}
    assert one["head"] is None
    exported(model_in("qwen2"), tmp_path / "mixed", injection_of(MIXED))
    mixed = of_vllm(tmp_path / "mixed")
    assert [mixed[f"0 {part}"] for part in ("qkv", "o", "gate_up", "down")] == [four, four, eight, eight]
    assert [mixed[f"1 {part}"] for part in ("qkv", "o", "gate_up", "down")] == [None, None, four, four]


@pytest.mark.parametrize(("family", "block"), [("qwen3_moe", "mlp"), ("mixtral", "block_sparse_moe")])
def test_vllm_finds_experts_and_leaves_their_routers(family, block, model_in, tmp_path):
    for name, described in {
        "one": CASES["w4a16"],
        "mixed": {"mode": "w4a16", "by_pattern": {"attention": "mxfp8"}},
    }.items():
        exported(model_in(family), tmp_path / name, injection_of(described))
        found = of_vllm(tmp_path / name)
        for layer in (0, 1):
            assert found[f"{layer} {block} experts"] == "mxfp4-pack-quantized"
            assert found[f"{layer} {block} gate"] is None
            assert found[f"{layer} qkv"] == ("mxfp8-quantized" if name == "mixed" else "mxfp4-pack-quantized")
        assert found["head"] is None
    (pattern,) = (target for target in targets_of(tmp_path / "mixed") if r"layers\.1" in target)
    assert re.match(pattern[3:], f"language_model.model.layers.1.{block}.experts.0.gate_proj")
    assert not re.match(pattern[3:], f"model.layers.11.{block}.experts.0.gate_proj")
    assert not re.match(pattern[3:], f"model.layers.1.{block}.shared_experts.gate_proj")


def targets_of(folder):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return [target for group in config["config_groups"].values() for target in group["targets"]]


def test_a_rounded_head_is_named_since_it_is_no_linear_layer_to_vllm(model_in, tmp_path):
    described = CASES["w4a16"] | {"targets": {"opt_in": ["lm_head"]}}
    exported(model_in("qwen3_moe"), tmp_path / "out", injection_of(described))
    assert of_vllm(tmp_path / "out")["head"] == "mxfp4-pack-quantized"


@pytest.mark.parametrize("name", ["w4a16", "nvfp4_w4a16"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_every_expert_is_what_the_library_makes_of_its_matrix(family, name, model_in, tmp_path):
    compressors = import_module("compressed_tensors.compressors").BaseCompressor
    schemes = import_module("compressed_tensors.quantization.quant_scheme")
    helpers = import_module("compressed_tensors.quantization.utils.helpers")
    scheme = schemes.preset_name_to_scheme(LIBRARY[name][0][0], ["Linear"])
    made = exported(
        model_in(family), tmp_path / "out", injection_of(CASES[name], deployment="vllm_blackwell"), override=True
    )
    stored, plain = tensors_in(tmp_path / "out"), tensors_in(model_in(family))
    experts = [entry.name for entry in made.policy.rounded if ".experts." in entry.name]
    assert len(experts) == 2 * 4 * 3
    for key in experts:
        weight, factor = plain[key].float(), None
        if "nvfp4" in name:
            gate, up = ("w1", "w3") if family == "mixtral" else ("gate_proj", "up_proj")
            both = {key} if "w2" in key or "down" in key else {key.replace(up, gate), key.replace(gate, up)}
            whole = torch.cat([plain[one] for one in sorted(both)]).float()
            factor = helpers.generate_gparam(whole.min(), whole.max())
        scale, _ = helpers.compute_dynamic_scales_and_zp(weight, scheme.weights, None, factor)
        given = {"weight": weight, "weight_scale": scale} | ({} if factor is None else {"weight_global_scale": factor})
        kind = "nvfp4" if "nvfp4" in name else "mxfp4"
        theirs = compressors.get_value_from_registry(f"{kind}-pack-quantized").compress(given, scheme)
        module = key.removesuffix(".weight")
        own = {
            name.removeprefix(f"{module}."): tensor for name, tensor in stored.items() if name.startswith(f"{module}.")
        }
        assert set(own) == set(theirs)
        assert all(same(own[part], theirs[part].view_as(own[part])) for part in own)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_transformers_loads_mxfp4_experts_right_and_leaves_their_inputs(family, model_in, tmp_path):
    weights_alone = injection_of(CASES["w4a16"])
    made = exported(model_in(family), tmp_path / "w4a16", weights_alone)
    assert torch.equal(logits(reloaded(tmp_path / "w4a16")), live(model_in(family), weights_alone))
    assert not list(made.layout.notes(made.policy))
    made = exported(model_in(family), tmp_path / "w4a4", injection_of(CASES["w4a4"]))
    theirs = logits(reloaded(tmp_path / "w4a4"))
    assert not torch.equal(theirs, live(model_in(family), injection_of(CASES["w4a4"])))
    leaves = injection_of(CASES["w4a4"], by_pattern=[{"pattern": "experts", "input": "none"}])
    assert torch.equal(theirs, live(model_in(family), leaves))
    assert "transformers 5 leaves the inputs of experts as they are" in (tmp_path / "w4a4" / "README.md").read_text()


def test_transformers_gets_other_experts_wrong_or_refuses_them_and_the_card_says_so(model_in, tmp_path):
    """Should this fail, transformers can do more than the card says: correct `_lost_in_transformers`."""
    injection = injection_of(CASES["nvfp4_w4a16"])
    with pytest.raises(InvalidValueError, match="its answers are wrong; name vLLM's hardware"):
        exported(model_in("qwen3_moe"), tmp_path / "nvfp4", injection)
    for_vllm = injection_of(CASES["nvfp4_w4a16"], deployment="vllm_blackwell")
    made = exported(model_in("qwen3_moe"), tmp_path / "nvfp4", for_vllm)
    model = reloaded(tmp_path / "nvfp4")
    name = "model.layers.0.mlp.experts.1.down_proj"
    (entry,) = (each for each in made.policy.rounded if each.module == name)
    factor = tensors_in(tmp_path / "nvfp4")[f"{name}.weight_global_scale"]
    theirs = model.get_submodule("model.layers.0.mlp.experts").down_proj[1]
    assert factor > 100
    assert torch.allclose(theirs.float(), made.policy.baked(entry).float() * factor, rtol=0.01)
    assert "its answers are wrong" in (tmp_path / "nvfp4" / "README.md").read_text()
    by_layer = {"mode": "w4a16", "by_pattern": {"*.layers.0.mlp*": "mxfp8"}}
    for case, said in ((CASES["w8a8"], "experts in mxfp8"), (by_layer, "experts in mxfp4 and mxfp8")):
        out = tmp_path / said
        exported(model_in("qwen3_moe"), out, injection_of(case), override=True)
        with pytest.raises(RuntimeError, match="conversion of the weights"):
            reloaded(out)
        assert f"transformers 5 cannot load {said}" in (out / "README.md").read_text()


REFUSED = {
    "NVFP4 inputs have a factor for each token here": ("qwen2", {"mode": "nvfp4_w4a4"}),
    "stacks its experts, and nothing loads it packed": ("gpt_oss", CASES["w4a16"]),
    r"is stored \[in, out\] \(Conv1D\)": ("gpt2", CASES["w4a16"]),
    "outputs are rounded, which no engine does": ("qwen2", {"mode": "w4a4_out"}),
    "are rounded twice, which no engine does": (
        "qwen2",
        {"mode": "w4a4", "input": {"name": "mxfp4", "fallback": 0.25}},
    ),
    "for which compressed_tensors has no type": ("qwen2", {"weight": "mxfp6_e2m3"}),
    "mxfp4_b16, for which": ("qwen2", {"weight": "mxfp4_b16"}),
    "'coarse': .*for which": ("qwen2", {"weight": {"name": "mxfp4", "coarse": 64}}),
    "mxfp8 weights have no scheme with inputs in mxfp4": ("qwen2", {"weight": "mxfp8", "input": "mxfp4"}),
    "engines load .*.qkv in one type alone": (
        "qwen2",
        {"mode": "w4a16", "fused_groups": "free", "by_pattern": {"*.q_proj": "mxfp8"}},
    ),
    "has an NVFP4 factor of its own, but vLLM applies one.*--anyway": ("qwen2", APART),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_no_engine_computes_is_refused_with_the_reason(said, model_in, tmp_path):
    family, described = REFUSED[said]
    injection = Injection.model_validate(described)
    with pytest.raises(InvalidValueError, match=said):
        exported(model_in(family), tmp_path / "out", injection)
    assert not (tmp_path / "out").exists()


def test_nvfp4_values_of_another_dtype_than_bfloat16_are_rounded_once_more_by_engines(model_in, tmp_path):
    injection = injection_of(CASES["nvfp4_w4a16"], dtype="float32")
    with pytest.raises(InvalidValueError, match=r"other numbers; add injection\.dtype=bfloat16"):
        exported(model_in("qwen2", torch.float32), tmp_path / "out", injection)
    made = exported(model_in("qwen2", torch.float32), tmp_path / "out", injection, override=True)
    weights, differ = reloaded(tmp_path / "out"), 0
    logits(weights)
    for entry in made.policy.rounded:
        own, theirs = made.policy.baked(entry), weights.state_dict()[entry.name]
        assert torch.equal(own.bfloat16(), theirs)
        differ += int((own != theirs.float()).sum())
    assert differ > 10_000
    assert not list(made.layout.computed_otherwise(made.policy))
    made = exported(model_in("qwen2", torch.float32), tmp_path / "mx", injection_of(CASES["w4a8"], dtype="float32"))
    (why,) = made.layout.computed_otherwise(made.policy)
    assert why.startswith("inputs were rounded in float32, and engines round them in bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name != "tiles"])
def test_greedy_answers_to_200_problems_are_the_same(name, trained, tmp_path):
    folder, injection, task = trained, injection_of(CASES[name]), Arithmetic()
    exported(folder, tmp_path / "out", injection)
    given = (task.problems("test", 200), task.score, Evaluation().for_task(task))
    model, tokenizer = load(folder, "bfloat16")
    plain = answer(model, tokenizer, *given)
    with attach(model, injection) as attachment:
        attachment.set_phase("evaluation")
        own = answer(model, tokenizer, *given)
    theirs = answer(reloaded(tmp_path / "out"), tokenizer, *given)
    assert own == theirs
    assert sum(item.strict for item in own) > 10
    assert own != plain


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The embedded model after a short warm-up, in float32 as a run leaves it."""
    recipe = Embedded(warm_up_steps=250, initializer_range=0.08)
    return warmed_up(recipe, Arithmetic(), tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("lora", ["merged", "adapter"])
def test_an_adapter_is_packed_into_the_sum_or_stands_on_the_packed_base(lora, model_in, tmp_path):
    """transformers and peft load both: the sum alone, or the base with the adapter's folder."""
    base = model_in("qwen2")
    model, tokenizer = load(base, "bfloat16")
    adapted = with_lora(model, Lora(rank=4, alpha=8.0), base)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    injection = injection_of(CASES["w4a4"], lora=lora)
    exported(tmp_path / "adapter", tmp_path / "out", injection)
    with attach(adapted.eval(), injection) as attachment:
        attachment.set_phase("evaluation")
        own = logits(adapted)
    theirs = reloaded(tmp_path / "out")
    if lora == "adapter":
        logits(theirs)  # decodes the weights, which peft looks for
        theirs = PeftModel.from_pretrained(theirs, tmp_path / "out" / "adapter")
    assert torch.equal(logits(theirs), own)


def test_no_scheme_of_the_library_has_a_factor_for_each_token():
    """Why NVFP4 inputs per token are refused: dynamic without a stored factor is no factor, which clips at 448 * 6."""
    scheme = import_module("compressed_tensors.quantization.quant_scheme").NVFP4["input_activations"]
    helpers = import_module("compressed_tensors.quantization.utils.helpers")
    rounded = import_module("compressed_tensors.quantization.lifecycle.forward").fake_quantize
    dynamic, x = scheme.model_copy(update={"dynamic": True}), torch.linspace(100.0, 30000.0, 32)[None]
    scale, zero = helpers.compute_dynamic_scales_and_zp(x, dynamic, None, None)
    assert rounded(x, scale, zero, dynamic, None).max() == 448 * 6
    assert fake_quantize(x, as_served("input", NVFP4)).max() == 30000


@pytest.mark.parametrize("name", ["w4a4", "mixed"])
@pytest.mark.parametrize("family", MULTIMODAL)
def test_the_text_model_of_a_multimodal_folder_is_packed_and_what_sees_is_left(family, name, tmp_path):
    multimodal(family).bfloat16().save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    injection = injection_of(CASES[name])
    made = exported(tmp_path / "model", tmp_path / "out", injection)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert torch.equal(logits(theirs), live(tmp_path / "model", injection))
    assert len(made.policy.rounded) == (21 if name == "w4a4" else 17)
    chosen = {path for path, layer in theirs.named_modules() if getattr(layer, "quantization_scheme", None)}
    assert chosen == {entry.plan.name for entry in made.policy.rounded}
