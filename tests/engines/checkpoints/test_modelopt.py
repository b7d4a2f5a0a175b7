"""An export in ModelOpt's layout is what ModelOpt itself exports, and decodes to the weights that were trained."""

import json
import warnings

import pytest
import torch
from export_models import EXPERTS, folder_of
from packed_models import start
from safetensors.torch import load_file, save_file

from fp4rl.cli.main import main
from fp4rl.engines.checkpoints.export import export
from fp4rl.engines.checkpoints.layouts.all import layout_named
from fp4rl.engines.checkpoints.layouts.modelopt import input_scale, multiplier
from fp4rl.engines.checkpoints.policy import Policy
from fp4rl.engines.checkpoints.source import Source
from fp4rl.models.packed.folder import PackedFolder
from fp4rl.numerics.scales import nvfp4_global
from fp4rl.spec.formats import E2M1, NVFP4
from fp4rl.spec.injection import Injection
from fp4rl.spec.points import as_served

WEIGHTS, INPUTS = as_served("weight", NVFP4), as_served("input", NVFP4)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """ModelOpt's own export of one model, with rounded inputs and without: {algorithm: folder}, and the model's."""
    pytest.importorskip("modelopt", reason="install the extra `oracles`", exc_type=ModuleNotFoundError)
    root, folders = tmp_path_factory.mktemp("modelopt"), {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export import export_hf_checkpoint

        first, tokenizer = start()
        for name, weight in first.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(weight)
        first.save_pretrained(root / "model")
        tokenizer.save_pretrained(root / "model")
        for algorithm, how in (("NVFP4", mtq.NVFP4_DEFAULT_CFG), ("W4A16_NVFP4", mtq.W4A16_NVFP4_CFG)):
            model, _ = start()
            model.load_state_dict(first.state_dict())
            model.config.architectures = [type(model).__name__]
            mtq.quantize(model, how, lambda m: m(torch.arange(1, 40)[None]))
            export_hf_checkpoint(model, export_dir=str(root / algorithm))
            folders[algorithm] = root / algorithm
    return folders | {"model": root / "model"}


def static(folder):
    """The injection whose inputs have the static factors that a folder of ModelOpt's has."""
    rows = [
        {"pattern": weight.name.removesuffix(".weight"), "input": weight.input}
        for weight in PackedFolder.open(folder).weights.values()
    ]
    return Injection(weight=WEIGHTS, input=INPUTS, deployment="modelopt", by_pattern=rows)


def bytes_of(tensor):
    return tensor.reshape(-1).view(torch.uint8)


def unlike_tensors(mine, real):
    own, other = load_file(mine / "model.safetensors"), load_file(real / "model.safetensors")
    assert {key: (t.dtype, t.shape) for key, t in own.items()} == {key: (t.dtype, t.shape) for key, t in other.items()}
    return [key for key in other if not torch.equal(bytes_of(own[key]), bytes_of(other[key]))]


def test_weights_alone_are_exported_as_modelopt_does(theirs, tmp_path, capsys):
    """From the model folder alone, by the command; the factor of the fused q, k and v, and gate and up, among it."""
    assert main(["export", str(theirs["model"]), str(tmp_path / "out"), "--to", "modelopt"]) == 0
    assert "note:" not in capsys.readouterr().out
    assert unlike_tensors(tmp_path / "out", theirs["W4A16_NVFP4"]) == []
    require_same_description(tmp_path / "out", theirs["W4A16_NVFP4"])


def test_static_inputs_are_exported_as_modelopt_does(theirs, tmp_path):
    source = Source(theirs["model"], static(theirs["NVFP4"]))
    export(source, layout_named("modelopt"), tmp_path / "out")
    unlike = unlike_tensors(tmp_path / "out", theirs["NVFP4"])
    assert all(key.endswith(".input_scale") for key in unlike)  # a neighbour, whose reciprocal is the trained factor
    require_same_description(tmp_path / "out", theirs["NVFP4"])
    layers = source.injection.by_pattern
    again = PackedFolder.open(tmp_path / "out").weights
    assert len(layers) == 7
    for row in layers:
        stored = load_file(tmp_path / "out" / "model.safetensors")[f"{row.pattern}.input_scale"]
        trained = nvfp4_global(torch.tensor(row.input.calibrated), E2M1)
        assert abs(stored.reciprocal() / trained - 1) <= 2.0**-23
        assert again[f"{row.pattern}.weight"].input.factor == "static"


def require_same_description(mine, real):
    own, other = (json.loads((folder / "config.json").read_text()) for folder in (mine, real))
    assert own["quantization_config"] == other["quantization_config"]
    assert {key: value for key, value in own.items() if value != other.get(key)} == {}
    assert (mine / "hf_quant_config.json").read_text() == (real / "hf_quant_config.json").read_text()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_modelopt_decodes_the_weights_that_were_trained(dtype, tmp_path):
    """All of them where the last bit is not FP32's own; the card says how many differ."""
    tensor = pytest.importorskip("modelopt.torch.quantization.qtensor").NVFP4QTensor
    folder = folder_of("qwen3_moe", tmp_path / "model", dtype)
    injection = Injection.named("nvfp4_w4a16", "modelopt", dtype=str(dtype).removeprefix("torch."))
    made = export(Source(folder, injection), layout_named("modelopt"), tmp_path / "out")
    file, policy = load_file(tmp_path / "out" / "model.safetensors"), Policy.of(folder, injection)
    unlike = values = 0
    for entry in policy.rounded:
        right, name = policy.baked(entry), entry.name
        scale, factor = file[f"{name}_scale"], file[f"{name}_scale_2"]
        decoded = tensor(right.shape, dtype, file[name]).dequantize(
            dtype=dtype, scale=scale, double_scale=factor, block_sizes={-1: 16}
        )
        unlike, values = unlike + int((decoded != right).sum()), values + right.numel()
        assert (decoded.float() - right.float()).abs().le(2.0**-22 * right.float().abs()).all()
    assert (unlike == 0) == (dtype != torch.float32)
    notes, card = list(made.layout.notes(policy)), (tmp_path / "out" / "README.md").read_text()
    assert [f"gives {unlike:,} of {values:,} values other last bits" in note for note in notes] == [True] * bool(unlike)
    assert all(f"- Note: {note}" in card for note in notes)


def test_the_stored_multiplier_is_that_of_the_most_equal_values():
    """Every product of a block scale and a code, against the best of 41 numbers around the reciprocal."""
    scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    generator = torch.Generator().manual_seed(0)
    all_equal = dict.fromkeys((torch.bfloat16, torch.float32), 0)
    for dtype in all_equal:
        for largest in torch.rand(200, generator=generator).to(dtype).float():
            factor = nvfp4_global(largest, E2M1)
            around = (factor.reciprocal().view(torch.int32) + torch.arange(-20, 21, dtype=torch.int32)).view(
                torch.float32
            )
            right = ((scales / factor).unsqueeze(-1) * codes).to(dtype)
            equal = [int((((scales * s).unsqueeze(-1) * codes).to(dtype) == right).sum()) for s in around]
            stored = multiplier(factor, dtype)
            own = int((((scales * stored).unsqueeze(-1) * codes).to(dtype) == right).sum())
            assert own >= 0.98 * max(equal)
            assert own == right.numel() or stored in around
            all_equal[dtype] += own == right.numel()
    assert all_equal[torch.bfloat16] >= 190
    assert 10 <= all_equal[torch.float32] <= 90


def test_a_static_scale_has_the_reciprocal_that_was_trained_where_there_is_one():
    generator, seen = torch.Generator().manual_seed(0), 0
    for largest in torch.rand(200, generator=generator) * 30:
        seen += int(input_scale(float(largest)).reciprocal() == nvfp4_global(largest, E2M1))
    assert seen >= 150


def test_layers_with_and_without_rounded_inputs_are_named_one_by_one(tmp_path):
    """As ModelOpt's own conversion says the same for config.json."""
    conversion = pytest.importorskip("modelopt.torch.export.convert_hf_config")
    folder = folder_of("qwen2", tmp_path / "model", torch.bfloat16)
    given = {"name": "nvfp4", "factor": "static", "calibrated": 8.0}
    injection = Injection(weight=WEIGHTS, by_pattern=[{"pattern": "*mlp*", "input": given}])
    export(Source(folder, injection), layout_named("modelopt"), tmp_path / "out")
    said = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    assert said["quantization"]["quant_algo"] == "MIXED_PRECISION"
    own = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert own == conversion.convert_hf_quant_config_format(said)
    weights = PackedFolder.open(tmp_path / "out").weights
    assert {name: w.input is not None for name, w in weights.items()} == {name: "mlp" in name for name in weights}


@pytest.mark.parametrize(
    ("family", "described", "why"),
    [
        (
            "qwen2",
            {"mode": "w4a16"},
            "MXFP4, which no engine loads from ModelOpt's layout; take --to compressed_tensors",
        ),
        ("qwen2", {"weight": "mxfp8"}, "mxfp8, for which modelopt has no type"),
        ("qwen2", {"mode": "nvfp4_w4a4"}, "a factor for each token; ModelOpt has NVFP4 inputs with one factor"),
        (
            "qwen2",
            {"mode": "nvfp4_w4a4", "input": {"name": "nvfp4", "factor": "per_token", "fallback": 0.25}},
            "are rounded twice, which no engine does; train without fallback, or take --to bf16",
        ),
        ("qwen2", {"weight": "nvfp4", "output": "mxfp8"}, "outputs are rounded, which no engine does"),
        ("qwen2", {"weight": "nvfp4", "input": "mxfp8"}, "inputs are rounded to mxfp8; ModelOpt has NVFP4 inputs"),
        (
            "qwen2",
            {"mode": "nvfp4_w4a16", "fused_groups": "free", "by_pattern": {"*up_proj": "none"}},
            r"engines load .* in one type alone, but .*gate_proj is W4A16_NVFP4, .*up_proj is none",
        ),
        ("qwen2", {"weight": {"name": "nvfp4", "factor": "tensor"}}, "has an NVFP4 factor of its own"),
        ("gpt_oss", {"mode": "nvfp4_w4a16"}, "stacks its experts"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_nothing_loads_is_refused(family, described, why, tmp_path):
    folder = folder_of(family, tmp_path / "model", torch.bfloat16)
    with pytest.raises(ValueError, match=why):
        export(Source(folder, Injection.model_validate(described)), layout_named("modelopt"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_routers_and_all_else_that_is_left_are_listed(tmp_path):
    folder = folder_of("qwen3_moe", tmp_path / "model", torch.bfloat16)
    injection = Injection.named("nvfp4_w4a16", "modelopt", targets={"leave": ["*self_attn*"]})
    export(Source(folder, injection), layout_named("modelopt"), tmp_path / "out")
    said = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
    layers = range(2)
    attention = [f"model.layers.{n}.self_attn.{m}_proj" for n in layers for m in "kqvo"]
    assert said == sorted(
        [*attention, "lm_head", "model.embed_tokens", *(f"model.layers.{n}.mlp.gate" for n in layers)]
    )
    weights = PackedFolder.open(tmp_path / "out").weights
    assert len(weights) == 2 * 3 * EXPERTS["num_experts"]


def test_verify_tells_the_order_of_products_from_another_value(tmp_path, capsys):
    """In float32 last bits differ, which is a note; one code, or one bit more in a multiplier, is a difference."""
    folder, out = folder_of("qwen2", tmp_path / "model"), tmp_path / "out"
    assert main(["export", str(folder), str(out), "--to", "modelopt"]) == 0
    assert "other last bits" in " ".join(capsys.readouterr().out.split())  # lines end where the terminal does
    assert main(["verify", str(out), "--json"]) == 0
    verified = json.loads(capsys.readouterr().out)
    [note] = next(check["notes"] for check in verified["checks"] if check["check"] == "weights")
    assert "values have other last bits" in note
    file, name = load_file(out / "model.safetensors"), "model.layers.1.mlp.down_proj.weight"
    for part, change in ((name, lambda t: t[3, 5].bitwise_xor_(16)), (f"{name}_scale_2", lambda t: t.mul_(1.00001))):
        planted = {key: tensor.clone() for key, tensor in file.items()}
        change(planted[part])
        save_file(planted, out / "model.safetensors", {"format": "pt"})
        assert main(["verify", str(out), "--json"]) == 1
        found = json.loads(capsys.readouterr().out)["checks"]
        differences = next(check["differences"] for check in found if check["check"] == "weights")
        assert [difference["what"] for difference in differences] == [name]


def test_verify_takes_static_factors_of_inputs_for_equal(tmp_path):
    folder = folder_of("qwen2", tmp_path / "model", torch.bfloat16)
    rows = [
        {"pattern": f"*.layers.{n}.*{name}*", "input": {"name": "nvfp4", "factor": "static", "calibrated": 1.3 + n / 7}}
        for n in range(2)
        for name in ("attn", "mlp")
    ]
    injection = Injection(weight=WEIGHTS, input=INPUTS, by_pattern=rows)
    export(Source(folder, injection), layout_named("modelopt"), tmp_path / "out")
    assert main(["verify", str(tmp_path / "out")]) == 0
