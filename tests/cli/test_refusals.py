"""Everything that is refused because of how a model is built, looked at from the command line: one line that names the
class or the module and the cause, and a cure that works when it is followed."""

import json
from pathlib import Path

import pytest
import yaml
import zoo_families as families
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fp4rl.cli.main import main

SHORT = ["--count", "2", "--max-new-tokens", "4"]
EVERYWHERE = {"weight": ["rollout", "training", "evaluation", "reference"]}
PACKED = {"mode": "w4a16", "frozen_base": "packed", "apply_during": EVERYWHERE}
KEYS = {"kv_cache": "mxfp4"}
MERGED = {"mode": "w4a16", "lora": "merged"}
TRAINING = {"algorithm": "grpo", "steps": 1, "train_batch_size": 2, "mini_batch_size": 2, "rollout_n": 2, "lr": 0.001}
TRAINING |= {"max_response_length": 8, "entropy_coeff": 0.1, "filter_groups": {"enable": False}}


pytestmark = pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor")  # peft's own, of a bias in lora_B


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Tiny models on disk by family, each made once; `family+name` is one of the adapters below on it."""
    root, made = tmp_path_factory.mktemp("refused"), {}

    def folder(name):
        if name not in made:
            family, _, adapter = name.partition("+")
            path = root / name
            if adapter:
                made[name] = adapted(folder(family), adapter, path)
            else:
                more = {"vocab_size_per_layer_input": 512} if family.startswith("gemma") else {}
                made[name] = families.folder(family, path, **more)
        return made[name]

    return folder


ADAPTERS = {
    "plain": {"target_modules": ["q_proj"]},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "bias": {"target_modules": ["q_proj"], "lora_bias": True},
    "dropout": {"target_modules": ["q_proj"], "lora_dropout": 0.1},
    "conv": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    "shared": {"target_modules": ["q_proj"]},
}


def adapted(base: Path, name: str, path: Path) -> Path:
    """A folder with an adapter that is not at its start."""
    config = LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **ADAPTERS[name])
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(path)
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}))
    return path


def asked(capsys, *words):
    capsys.readouterr()
    code, said = main([str(word) for word in words]), capsys.readouterr()
    refused = [line for line in said.err.splitlines() if line.startswith("fp4rl: ")]
    return code, refused, said


def refused_then_cured(capsys, said, words, cured):
    """The first command ends with 2 and this line alone; the second, which follows what it says, ends with 0."""
    code, lines, all_said = asked(capsys, *words)
    assert code == 2, all_said.out
    assert lines == [f"fp4rl: {said}"]
    assert "Traceback" not in all_said.err
    code, _, all_said = asked(capsys, *cured)
    assert code == 0, all_said.err


def changed(injection, changes):
    """The injection with changes to it; None takes a key away."""
    merged = {**injection, **changes}
    return {key: value for key, value in merged.items() if value is not None}


def leaving(*patterns):
    return {"targets": {"leave": list(patterns)}}


ONE_MATRIX = (
    "transformer.blocks.0.ffn.experts.mlp.w1: DbrxExpertGLU holds all its experts in one matrix [128, "
    "64], whose parts "
    "injection cannot tell apart; leave them out: targets.leave: ['*.ffn.experts.mlp.*']"
)
NO_KEYS = (
    "kv_cache would do nothing: no layer has projections of keys and values (k_proj and v_proj, "
    "qkv_proj, ...), state "
    "spaces keep a state; leave it out"
)
# Family, injection, what is said, and what the cure changes in the injection: known from the modules alone.
SEEN = {
    "a grouped linear layer": (
        "deepseek_v4",
        {"mode": "w4a4"},
        "model.layers.0.self_attn.o_a_proj is a DeepseekV4GroupedLinear with a forward of its own, not x W^T "
        "+ b, which "
        "injection would bypass; leave it out: targets.leave: ['*.self_attn.o_a_proj']",
        leaving("*.self_attn.o_a_proj"),
    ),
    "experts in one matrix": ("dbrx", {"mode": "w4a8"}, ONE_MATRIX, leaving("*.ffn.experts.mlp.*")),
    "what experts with biases return": (
        "gpt_oss",
        {"mode": "w4a4_out"},
        "model.layers.0.mlp.experts.gate_up_proj: GptOssExperts adds a bias after its matmul, so what an "
        "expert returns "
        "is out of reach; round no output there: by_pattern: {'*.mlp.experts.*': {output: none}}",
        {"by_pattern": {"*.mlp.experts.*": {"output": "none"}}},
    ),
    "a router that is no linear layer": (
        "qwen3_moe",
        {"mode": "w4a16", "targets": {"opt_in": ["router"]}},
        "model.layers.0.mlp.gate is a Qwen3MoeTopKRouter, no linear layer to round; take router out of targets.opt_in",
        {"targets": None},
    ),
    "a router that nobody asked for": (
        "qwen3_moe",
        {"mode": "w4a16", "targets": {"leave_only": ["*lm_head*"]}},
        "model.layers.0.mlp.gate is a router, which no engine rounds; leave it ('*.mlp.gate' in "
        "targets.leave), or where "
        "it is a linear layer write targets.opt_in: [router]",
        {"targets": {"leave_only": ["*lm_head*", "*.mlp.gate"]}},
    ),
    "a router that nobody asked for, and that is a linear layer": (
        "dbrx",
        {"mode": "w4a16", "targets": {"leave_only": ["*lm_head*", "*.ffn.experts.mlp.*"]}},
        "transformer.blocks.0.ffn.router.layer is a router, which no engine rounds; leave it "
        "('*.ffn.router.layer' in "
        "targets.leave), or where it is a linear layer write targets.opt_in: [router]",
        {"targets": {"leave_only": ["*lm_head*", "*.ffn.experts.mlp.*"], "opt_in": ["router"]}},
    ),
    "a head that is the embedding": (
        "gemma",
        {"mode": "w4a16", "targets": {"opt_in": ["lm_head"]}},
        "lm_head shares its weight with model.embed_tokens, so rounding one would not be what is served; "
        "take lm_head "
        "out of targets.opt_in",
        {"targets": None},
    ),
    "the cache of a state space": ("mamba", {"mode": "w4a16", **KEYS}, NO_KEYS, {"kv_cache": None}),
    "the cache of a recurrent network": ("rwkv", {"mode": "w4a16", **KEYS}, NO_KEYS, {"kv_cache": None}),
    "the cache of attention that is left": (
        "qwen2",
        {"mode": "w4a16", **KEYS, **leaving("attention")},
        "kv_cache would do nothing: model.layers.0.self_attn is left by 'attention'; leave it out",
        {"kv_cache": None},
    ),
    "formats that a fused kernel cannot have": (
        "qwen2",
        {"mode": "w4a16", "by_pattern": {"*.q_proj": "mxfp8"}},
        "a serving kernel fuses these, which must agree: model.layers.0.self_attn.q_proj: mxfp8/none, "
        "model.layers.0.self_attn.k_proj: mxfp4/none, model.layers.0.self_attn.v_proj: mxfp4/none (or fused_groups: "
        "free)",
        {"fused_groups": "free"},
    ),
    "merging where there is no adapter": (
        "qwen2",
        MERGED,
        "lora: merged would do nothing: no adapted layer is taken",
        {"lora": None},
    ),
    "DoRA beside a rounded weight": (
        "qwen2+dora",
        {"mode": "w4a4"},
        "model.layers.0.self_attn.q_proj: DoRA divides by the norm of the unrounded weight plus its adapter, "
        "which is not "
        "what is served; use plain LoRA (use_dora=False), or round no weight there",
        {"by_pattern": {"*.q_proj": {"weight": "none"}}, "fused_groups": "free"},
    ),
    "merging DoRA": (
        "qwen2+dora",
        MERGED,
        "model.layers.0.self_attn.q_proj: lora: merged cannot round this adapter: it is a variant (DoRA or "
        "the like), no "
        "plain sum; use plain LoRA",
        None,
    ),
    "merging an adapter with a bias": (
        "qwen2+bias",
        MERGED,
        "model.layers.0.self_attn.q_proj: lora: merged cannot round this adapter: its adapter has a bias; use "
        "lora_bias=False",
        None,
    ),
    "merging under dropout": (
        "qwen2+dropout",
        MERGED,
        "model.layers.0.self_attn.q_proj: lora: merged cannot round this adapter: its dropout acts on the "
        "adapter's input "
        "alone; set lora_dropout=0",
        None,
    ),
    "codes of a Conv1D": (
        "gpt2+conv",
        PACKED,
        "transformer.h.0.attn.c_attn: frozen_base: packed unpacks no weight stored [in, out] (Conv1D); take "
        "frozen_base: "
        "copy",
        {"frozen_base": "copy"},
    ),
    "codes of a weight that layers share": (
        "zamba2+shared",
        PACKED,
        "model.layers.1.shared_transformer.self_attn.q_proj: frozen_base: packed needs a weight for each layer, and "
        "model.layers.2.shared_transformer.self_attn.q_proj shares this one; take frozen_base: copy",
        {"frozen_base": "copy"},
    ),
    "merging into a weight that layers share": (
        "zamba2+shared",
        MERGED,
        "model.layers.1.shared_transformer.self_attn.q_proj: lora: merged needs a weight for each layer, and "
        "model.layers.2.shared_transformer.self_attn.q_proj shares this one; take lora: adapter",
        {"lora": "adapter"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SEEN)
def test_what_is_refused_before_anything_is_loaded_names_its_cause_and_its_cure_works(case, folders, capsys):
    family, injection, said, cure = SEEN[case]
    cured = ["sites", folders("qwen2+plain" if cure is None else family), "--mode"]  # None: another adapter
    refused_then_cured(
        capsys,
        said,
        ["sites", folders(family), "--mode", yaml.safe_dump(injection)],
        [*cured, yaml.safe_dump(changed(injection, cure or {}))],
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", SEEN)
def test_under_the_cure_the_model_is_evaluated(case, folders, capsys, tmp_path):
    family, injection, _, cure = SEEN[case]
    described = tmp_path / "cured.yaml"
    described.write_text(yaml.safe_dump(changed(injection, cure or {})))
    folder = folders("qwen2+plain" if cure is None else family)
    code, _, said = asked(capsys, "eval", folder, "-p", f"cured={described}", *SHORT)
    assert code == 0, said.err


@pytest.mark.slow
def test_products_that_cannot_be_told_apart_are_refused_where_they_are_met(folders, capsys, tmp_path):
    file, cured = tmp_path / "cache.yaml", tmp_path / "none.yaml"
    weights = {"mode": "w4a16", **leaving("*.self_attn.o_a_proj")}
    file.write_text(yaml.safe_dump({**weights, **KEYS}))
    cured.write_text(yaml.safe_dump(weights))
    said = (
        "model.layers.0.self_attn: DeepseekV4Attention multiplies 3 times and calls sdpa 0 times, so what is "
        "a key and "
        "what a value is not known; leave kv_cache (and errors of scores and values) out, or this layer: "
        "targets.leave: "
        "[model.layers.0.self_attn]"
    )
    evaluate = ["eval", folders("deepseek_v4"), *SHORT, "-p"]
    refused_then_cured(capsys, said, [*evaluate, f"x={file}"], [*evaluate, f"x={cured}"])


@pytest.mark.slow
def test_layers_that_a_decoder_alone_never_calls_stop_the_evaluation_and_can_be_left(tmp_path, capsys):
    """BART's decoder has attention to an encoder, which a causal model of it does not have."""
    sizes = {"decoder_layers": 2, "encoder_layers": 2, "decoder_ffn_dim": 96, "encoder_ffn_dim": 96}
    heads = {"decoder_attention_heads": 4, "encoder_attention_heads": 4}
    folder = families.folder("bart", tmp_path / "bart", **sizes, **heads)
    code, lines, said = asked(capsys, "eval", folder, "-p", "w4a16", *SHORT)
    assert code == 1, said.err
    (line,) = lines
    assert "model.decoder.layers.0.encoder_attn.k_proj" in line
    assert line.endswith("; leave out what this model never calls: targets.leave")
    cured = tmp_path / "cured.yaml"
    cured.write_text(yaml.safe_dump({"mode": "w4a16", **leaving("*.encoder_attn.*")}))
    code, _, said = asked(capsys, "eval", folder, "-p", f"cured={cured}", *SHORT)
    assert code == 0, said.err


def described(path, folder, **sections):
    """A suite of one run on a folder; a section is merged into what it would be."""
    base = {"model": {"path": str(folder)}, "task": {"name": "arithmetic"}, "training": TRAINING}
    base |= {"injection": {"mode": "w4a16"}, "evaluation": {"count": 2, "max_new_tokens": 4}}
    merged = {**base, **{name: {**base.get(name, {}), **section} for name, section in sections.items()}}
    path.write_text(yaml.safe_dump({"suite": path.stem, "seeds": [0], "base": merged, "arms": {"only": {}}}))
    return path


LORA = {"rank": 4, "target_modules": ["q_proj"]}
CONSTANT = {"kind": "constant", "sigma": 0.01}
# Family, sections of the run, what is said, and the sections of the cure.
ASKED = {
    "rows of experts that are never summed": (
        "qwen3_moe",
        {"model": {"experts_implementation": "batched_mm"}, "injection": {"grad_weight": "mxfp8"}},
        "model.layers.0.mlp.experts.gate_up_proj: grad_weight: the implementation 'batched_mm' gives each "
        "row a matrix of "
        "its own, so no matmul of Qwen3MoeExperts sums over rows; take grouped_mm (model.experts_implementation)",
        {"model": {"experts_implementation": "grouped_mm"}, "injection": {"grad_weight": "mxfp8"}},
    ),
    "a choice of experts where there are none": (
        "qwen2",
        {"model": {"experts_implementation": "eager"}},
        "model.experts_implementation: Qwen2ForCausalLM computes its experts in one way; leave it out",
        {},
    ),
    "a linear layer named as a parameter": (
        "qwen2",
        {"model": {"lora": {"rank": 4, "target_modules": [], "target_parameters": ["q_proj.weight"]}}},
        "model.layers.0.self_attn.q_proj: peft's target_parameters puts a sum in the place of this linear "
        "layer's weight; "
        "name the layer in target_modules: [q_proj], and stacked experts alone in target_parameters",
        {"model": {"lora": LORA}},
    ),
    "a replay of choices that cannot be seen": (
        "llama4_text",
        {"training": {"routing_replay": True}},
        "model.layers.0.feed_forward.experts (Llama4TextExperts) is not handed the numbers of its experts as "
        "a top-k of "
        "the block above gives them: leave training.routing_replay off",
        {},
    ),
    "a replay of choices where there are no experts": (
        "qwen2",
        {"training": {"routing_replay": True}},
        "training.routing_replay: Qwen2ForCausalLM has no experts to choose; leave it out",
        {},
    ),
    "noise on norms without weights": (
        "olmo",
        {"noise": {"schedule": CONSTANT}},
        "no weight of OlmoForCausalLM takes noise under targets.kinds=['norm']; a norm is known by RMSNorm "
        "or LayerNorm "
        "in its class name and a weight of one dimension; take noise.targets.kinds: [linear], or leave noise out",
        {"noise": {"schedule": CONSTANT, "targets": {"kinds": ["linear"]}}},
    ),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match")  # peft's own, of its table for experts
@pytest.mark.parametrize("case", ASKED)
def test_what_a_run_is_refused_for_names_its_cause_and_its_cure_trains(
    case, folders, in_process, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    family, asking, said, cure = ASKED[case]
    code, lines, all_said = asked(capsys, "run", described(tmp_path / "asked.yaml", folders(family), **asking))
    assert code == 2, all_said.out
    assert [line for line in lines if said in line], all_said.err
    code, _, all_said = asked(capsys, "run", described(tmp_path / "cured.yaml", folders(family), **cure))
    assert code == 0, all_said.err


# What was refused before, and is not: the float64 oracle holds each in `make zoo`.
WHOLE = (
    "gpt2",
    "jamba",
    "mamba2",
    "deepseek_v3",
    "gemma3n_text",
    "qwen3_next",
    "kimi_linear",
    "falcon",
    "zamba2",
    "dbrx",
)


@pytest.mark.slow
@pytest.mark.parametrize("family", WHOLE)
def test_what_the_list_of_refusals_held_goes_through_every_reading_verb(family, folders, capsys, tmp_path):
    injection = leaving("*.ffn.experts.mlp.*") if family == "dbrx" else {}
    injection |= {"mode": "w4a4"} | ({} if family == "mamba2" else KEYS)
    file = tmp_path / "all.yaml"
    file.write_text(yaml.safe_dump(injection))
    for words in (
        ["sites", folders(family), "--mode", yaml.safe_dump(injection)],
        ["eval", folders(family), "-p", f"all={file}", *SHORT],
        ["scan", folders(family), "texts=2", f"injection={yaml.safe_dump(injection, default_flow_style=True).strip()}"],
    ):
        code, _, said = asked(capsys, *words)
        assert code == 0, said.err
