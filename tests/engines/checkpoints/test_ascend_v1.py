"""An export as AscendV1 is what msModelSlim writes of the same folder: every file, byte for byte where it has bytes."""

import json
import shutil
from types import SimpleNamespace

import export_models
import pytest
import torch
from live_msmodelslim import QWEN2, QWEN3, QWEN3_MOE, layers, packed_by_it, programs
from packed_models import ASCEND_V1, WEIGHTS, start
from safetensors.torch import load_file

from fp4rl.cli.main import main
from fp4rl.engines.checkpoints.export import export
from fp4rl.engines.checkpoints.layouts.all import layout_named
from fp4rl.engines.checkpoints.layouts.layout import config_of
from fp4rl.engines.checkpoints.source import Source
from fp4rl.models.load import load
from fp4rl.rl.lora import with_lora
from fp4rl.spec.deployment import deployment_named
from fp4rl.spec.formats import MXFP4, MXFP8
from fp4rl.spec.injection import Injection
from fp4rl.spec.model import Lora

DESCRIPTION, INDEX = "quant_model_description.json", "quant_model_weights.safetensors.index.json"
SHARED = {
    "w4a4": ("w4a4", "vllm_ascend"),
    "w4a8": ("w4a8", "vllm_ascend"),
    "w4a4_ceil_x": ("w4a4", "vllm_ascend_ceil_x"),
    "w4a4_fouroversix": ("w4a4", "vllm_ascend_fouroversix"),
    "w4a4_dualscale": ("w4a4", "vllm_ascend_dualscale_64"),
}
MINMAX, MX8 = (deployment_named("vllm_ascend").at("weight", fmt) for fmt in (MXFP4, MXFP8))
DUAL = deployment_named("vllm_ascend_dualscale_64").at("weight", MXFP4)
DUAL_INPUT = deployment_named("vllm_ascend_dualscale_64").at("input", MXFP4)


def folder_of(family, path, dtype=torch.bfloat16, **more):
    """A folder of widths that vLLM-Ascend serves in every mode."""
    return export_models.folder_of(family, path, dtype, **{"intermediate_size": 192, "biased": True} | more)


def by_command(model, out, *options):
    assert main(["export", str(model), str(out), "--to", "ascend_v1", *options]) == 0
    return out


def require_equal(mine, theirs, *, order=True, beside=("config.json", "generation_config.json")):
    """Every file of the layout, in bytes; of its two lists the text, without the line end of the file."""
    files = sorted(file.name for file in theirs.glob("*.safetensors"))
    assert sorted(file.name for file in mine.glob("*.safetensors")) == files
    for name in files:
        own, real = load_file(mine / name), load_file(theirs / name)
        assert {key: (t.dtype, t.shape) for key, t in own.items()} == {
            key: (t.dtype, t.shape) for key, t in real.items()
        }
        assert [key for key in real if not torch.equal(own[key].view(torch.uint8), real[key].view(torch.uint8))] == []
        assert (mine / name).read_bytes() == (theirs / name).read_bytes()
    for name in (DESCRIPTION, INDEX):
        own, real = (json.loads((folder / name).read_text()) for folder in (mine, theirs))
        assert own == real
        assert not order or (mine / name).read_text().strip() == (theirs / name).read_text().strip()
    for name in beside:
        assert (mine / name).read_bytes() == (theirs / name).read_bytes()


@pytest.mark.parametrize("name", SHARED)
def test_the_shared_model_is_exported_as_the_real_exporter_did(name, shared_data, tmp_path):
    """From the model folder and the name of the deployment alone."""
    mode, deployment = SHARED[name]
    folder = shared_data / "ascend_v1"
    out = by_command(folder / "model", tmp_path / "out", "--mode", mode, "--deployment", deployment)
    beside = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    require_equal(out, folder / name, beside=beside)


def test_a_layer_of_every_type_is_exported_as_the_real_exporter_did(tmp_path):
    """In bfloat16, with biases, a tied head, and 96 columns under dual scales for 64."""
    model, tokenizer = start()
    real = load_file(ASCEND_V1 / WEIGHTS)
    for name, weight in model.named_parameters():
        if name.endswith(".bias"):
            weight.data.copy_(real[name])
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    own = {"q_proj": (MX8, MXFP8), "k_proj": (MX8, MXFP8), "v_proj": (MX8, MXFP8), "o_proj": (MINMAX, MXFP8)}
    own |= {"down_proj": (DUAL, DUAL_INPUT)}
    rows = [{"pattern": f"*{name}", "weight": weight, "input": given} for name, (weight, given) in own.items()]
    injection = Injection(weight=MINMAX, input=MXFP4, by_pattern=rows)
    layout = layout_named("ascend_v1")
    with pytest.raises(ValueError, match=r"no w4a8 kernel for 1 dense layer such as .*o_proj"):
        export(Source(tmp_path / "model", injection), layout, tmp_path / "out")
    made = export(Source(tmp_path / "model", injection), layout, tmp_path / "out", override=True)
    require_equal(tmp_path / "out", ASCEND_V1, beside=())
    assert len(made.overridden) == 1
    assert made.overridden[0] in (tmp_path / "out" / "README.md").read_text()


def tensors_of(folder):
    return {key: t for file in folder.glob("*.safetensors") for key, t in load_file(file).items()}


def test_files_are_numbered_and_listed_where_there_are_several(tmp_path, monkeypatch):
    folder = folder_of("qwen2", tmp_path / "model", shard="40KB")
    one = tensors_of(by_command(folder, tmp_path / "one", "--mode", "w4a8"))
    monkeypatch.setattr("fp4rl.engines.checkpoints.layouts.ascend_v1.AscendV1.file_bytes", 30_000)
    many = by_command(folder, tmp_path / "many", "--mode", "w4a8")
    files = sorted(file.name for file in many.glob("*.safetensors"))
    assert len(files) >= 3
    assert files == [f"quant_model_weights-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))]
    assert all(sum(t.nbytes for t in load_file(many / name).values()) < 30_000 for name in files)
    index = json.loads((many / INDEX).read_text())
    assert index["weight_map"] == {key: name for name in files for key in load_file(many / name)}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())
    again = tensors_of(many)
    assert again.keys() == one.keys()
    assert all(torch.equal(again[key].view(torch.uint8), one[key].view(torch.uint8)) for key in one)


def test_what_a_folder_says_of_its_own_quantization_is_left_out(tmp_path):
    """As msModelSlim leaves it out, also inside text_config: the engine would read it before the description."""
    own = {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(own | {"model_type": "x", "text_config": own | {"size": 3}}))
    assert config_of(SimpleNamespace(folder=tmp_path)) == {"model_type": "x", "text_config": {"size": 3}}


@pytest.mark.parametrize("lora", ["merged", "adapter"])
def test_an_adapter_is_in_the_codes_or_beside_them(lora, tmp_path):
    base = folder_of("qwen2", tmp_path / "base", dtype=torch.float32)
    model, tokenizer = load(base)
    adapted = with_lora(model, Lora(rank=4, alpha=8.0), base)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "sum")
    tokenizer.save_pretrained(tmp_path / "sum")
    injection = Injection.named("w4a8", "vllm_ascend", lora=lora)
    layout = layout_named("ascend_v1")
    export(Source(tmp_path / "adapter", injection), layout, tmp_path / "out")
    right = tmp_path / ("sum" if lora == "merged" else "base")
    export(Source(right, Injection.named("w4a8", "vllm_ascend")), layout, tmp_path / "right")
    own, other = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "right")
    assert list(own) == list(other)
    assert [key for key in own if not torch.equal(own[key], other[key])] == []
    assert (tmp_path / "out" / "adapter").is_dir() == (lora == "adapter")


REFUSED = [
    ("qwen2", {"weight": "nvfp4"}, "is rounded to nvfp4, for which ascend_v1 has no type"),
    ("qwen2", {"mode": "w4a8", "input": {"name": "mxfp8", "fallback": 0.5}}, "are rounded twice, which no engine does"),
    ("qwen2", {"weight": {"name": "mxfp4", "block": 16}, "input": "mxfp8"}, "for which ascend_v1 has no type"),
    ("qwen2", {"weight": {"name": "mxfp4", "rotation": 32}, "input": "mxfp8"}, "without rotation"),
    ("qwen2", {"weight": "mxfp8"}, r"mxfp8 \(weight\) and unrounded \(input\), for which AscendV1 has no type"),
    (
        "qwen2",
        {"weight": {"name": "mxfp4", "coarse": 64}, "input": "mxfp4"},
        r"mxfp4 under dual scales \(weight\) and mxfp4 \(input\)",
    ),
    (
        "qwen2",
        {"mode": "w4a8", "fused_groups": "free", "by_pattern": {"*k_proj": "none"}},
        r"engines load .* in one type alone, but .*q_proj is W4A8_MXFP, .*k_proj is FLOAT",
    ),
    (
        "qwen3_moe",
        {"mode": "w4a8", "by_pattern": {"*down_proj": "mxfp8"}},
        r"experts in one type alone, but .*gate_up_proj is W4A8_MXFP, .*down_proj is W8A8_MXFP8",
    ),
    ("gpt_oss", {"mode": "w4a8"}, "stacks its experts"),
    ("odd", {"mode": "w4a4"}, "in_features 48 is no multiple of 32"),
]


@pytest.mark.parametrize(("family", "described", "why"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_nothing_loads_is_refused(family, described, why, tmp_path):
    sizes = {"intermediate_size": 48} if family == "odd" else {}
    folder = folder_of("qwen3" if family == "odd" else family, tmp_path / "model", **sizes)
    with pytest.raises(ValueError, match=why):
        export(Source(folder, Injection.model_validate(described)), layout_named("ascend_v1"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--mode", "w4a16"), "no w4a16 kernel for 14 dense layers"),
        (("--deployment", "vllm_blackwell"), "loaded by vLLM-Ascend alone"),
    ],
)
def test_what_vllm_ascend_does_not_serve_needs_anyway(options, why, tmp_path, capsys):
    folder = folder_of("qwen2", tmp_path / "model")
    assert main(["export", str(folder), str(tmp_path / "out"), "--to", "ascend_v1", *options]) == 2
    assert why in capsys.readouterr().err
    by_command(folder, tmp_path / "out", "--anyway", *options)
    assert why in (tmp_path / "out" / "README.md").read_text()


def test_routed_experts_alone_may_have_unrounded_inputs(tmp_path):
    folder = folder_of("qwen3_moe", tmp_path / "model")
    injection = Injection.named("w4a16", "vllm_ascend", targets={"leave": ["*self_attn*"]})
    export(Source(folder, injection), layout_named("ascend_v1"), tmp_path / "out")
    said = json.loads((tmp_path / "out" / DESCRIPTION).read_text())
    assert said["model_quant_type"] == "W4A16_MXFP4"
    assert {kind for name, kind in said.items() if ".experts." in name} == {"W4A16_MXFP4"}
    assert {kind for name, kind in said.items() if ".self_attn." in name} == {"FLOAT"}


@pytest.fixture(scope="module")
def live():
    return programs()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["w4a8", "w8a8"])
def test_shards_and_biases_in_bfloat16_are_as_the_live_package_writes_them(mode, live, tmp_path, monkeypatch):
    folder = folder_of("qwen2", tmp_path / "model", shard="40KB")
    weight, given = {"w4a8": ("mxfp4", "mxfp8"), "w8a8": ("mxfp8", "mxfp8")}[mode]
    theirs = packed_by_it(live, QWEN2, folder, tmp_path / "theirs", layers(weight, given), part_bytes=30_000)
    assert len(list(theirs.glob("*.safetensors"))) >= 3
    monkeypatch.setattr("fp4rl.engines.checkpoints.layouts.ascend_v1.AscendV1.file_bytes", 30_000)
    require_equal(by_command(folder, tmp_path / "out", "--mode", mode), theirs)


@pytest.mark.slow
def test_layers_that_are_left_keep_their_biases_as_the_live_package_does(live, tmp_path):
    folder = folder_of("qwen2", tmp_path / "model")
    theirs = packed_by_it(live, QWEN2, folder, tmp_path / "theirs", layers("mxfp4", "mxfp8", ["*mlp*"]))
    injection = Injection.named("w4a8", "vllm_ascend", targets={"leave": ["*self_attn*"]})
    export(Source(folder, injection), layout_named("ascend_v1"), tmp_path / "out")
    assert {t.dtype for key, t in tensors_of(theirs).items() if key.endswith(".bias")} == {torch.bfloat16}
    require_equal(tmp_path / "out", theirs)


@pytest.mark.slow
def test_a_model_without_biases_is_as_the_live_package_writes_it(live, tmp_path):
    folder = folder_of("qwen3", tmp_path / "model", intermediate_size=96)  # an odd number of blocks
    theirs = packed_by_it(live, QWEN3, folder, tmp_path / "theirs", layers("mxfp4", "mxfp4"))
    require_equal(by_command(folder, tmp_path / "out", "--mode", "w4a4"), theirs)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A mixture of experts in bfloat16, with what transformers 4 reads of it."""
    folder = folder_of("qwen3_moe", tmp_path_factory.mktemp("moe") / "model")
    for name, changes in (
        ("config.json", {"num_experts": export_models.EXPERTS["num_experts"]}),
        ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": {}}),
    ):
        text = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps(text, indent=2) + "\n")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("described", ["w4a4", "mixed"])
def test_experts_are_as_the_live_package_writes_them(described, live, mixture, tmp_path):
    """The router alone has another place in the lists: transformers 4 builds it before the experts, 5 behind them."""
    experts, attention = ["*experts*"], ["*self_attn*"]
    if described == "mixed":
        steps = [layers("mxfp4", "mxfp4", experts), layers("mxfp8", "mxfp8", attention)]
        rows = [{"pattern": "*self_attn*", "weight": MX8, "input": MXFP8}]
    else:
        steps, rows = [layers("mxfp4", "mxfp4", exclude=["*mlp.gate"])], []
    theirs = packed_by_it(live, QWEN3_MOE, mixture, tmp_path / "theirs", *steps, with_experts=True)
    injection = Injection.named("w4a4", "vllm_ascend", by_pattern=rows)
    export(Source(mixture, injection), layout_named("ascend_v1"), tmp_path / "out")
    require_equal(tmp_path / "out", theirs, order=False)
    own, real = (
        [name for name in json.loads((folder / DESCRIPTION).read_text()) if "mlp.gate." not in name]
        for folder in (tmp_path / "out", theirs)
    )
    assert own == real


@pytest.mark.slow
def test_under_transformers_5_the_live_package_leaves_stacked_experts_in_bf16(live, mixture, tmp_path):
    """Which is why its folder is no oracle there: nothing is said, and only attention is packed."""
    shutil.copytree(mixture, tmp_path / "model")
    theirs = packed_by_it(live, QWEN3_MOE, tmp_path / "model", tmp_path / "theirs", layers("mxfp4", "mxfp4"))
    said = json.loads((theirs / DESCRIPTION).read_text())
    assert {kind for name, kind in said.items() if ".experts." in name} == {"FLOAT"}
    assert {kind for name, kind in said.items() if "_proj.weight" in name and "expert" not in name} == {"W4A4_MXFP4"}


@pytest.mark.slow
def test_dual_scales_for_512_columns_are_as_the_live_package_writes_them(live, tmp_path):
    """Rows of 512 and a rest, and shorter ones, in bfloat16 with biases."""
    folder = folder_of("qwen2", tmp_path / "model", intermediate_size=768)
    dual = layers("mxfp4", "mxfp4", scope="dual_scale", method="dualscale", dual_block_size=512)
    theirs = packed_by_it(live, QWEN2, folder, tmp_path / "theirs", dual)
    options = ("--mode", "w4a4", "--deployment", "vllm_ascend_dualscale")
    require_equal(by_command(folder, tmp_path / "out", *options), theirs)
