"""Faults of packing, planted one by one into a folder whose checksums were made anew: verify finds and names each."""

import hashlib
import json

import pytest
import torch
from packed_models import by_compressed_tensors, by_modelopt, start
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from fp4rl.cli.main import main
from fp4rl.engines.checkpoints.export import RECORD, export
from fp4rl.engines.checkpoints.layouts.all import LAYOUTS, layout_named
from fp4rl.engines.checkpoints.source import Source
from fp4rl.engines.checkpoints.verify.against import Request
from fp4rl.engines.checkpoints.verify.trained import Trained
from fp4rl.engines.checkpoints.verify.verify import verify
from fp4rl.inject.attach import attach
from fp4rl.lab.folders import RunFolder
from fp4rl.models.load import load
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.rl.inputs import of_model
from fp4rl.rl.lora import with_lora
from fp4rl.spec.evidence import CheckpointKept, Failed
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.injection import Injection
from fp4rl.spec.model import Lora
from fp4rl.spec.retarget import under_deployment

Q, K, OUT = (f"model.layers.0.self_attn.{name}_proj" for name in "qko")
ROUTER, EXPERT = "model.layers.0.mlp.gate", "model.layers.0.mlp.experts.1"
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
SIZES |= {"intermediate_size": 96, "head_dim": 16, "initializer_range": 0.2, "bos_token_id": None}
OF = {
    "qwen2": {"tie_word_embeddings": True},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
}
# What is exported: a layout, and the injection under which its weights are rounded.
CASES = {
    "bf16": ("bf16", {"mode": "w4a16", "deployment": "compressed_tensors"}),
    "mxfp4": ("compressed_tensors", {"mode": "w4a4", "deployment": "compressed_tensors"}),
    "nvfp4": ("compressed_tensors", {"mode": "nvfp4_w4a16", "deployment": "compressed_tensors"}),
    "ascend_v1": ("ascend_v1", {"mode": "w4a8", "deployment": "vllm_ascend"}),
    "modelopt": ("modelopt", {"mode": "nvfp4_w4a16"}),
}
CASES = {name: case for name, case in CASES.items() if case[0] in LAYOUTS}
PACKED = [name for name in CASES if name != "bf16"]


def model_of(path, family="qwen2", seed=0, **more):
    """A folder as a trainer would save it, in bfloat16."""
    tokenizer = build_tokenizer()
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **SIZES | OF[family] | ids | more, vocab_size=len(tokenizer))
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter)
    model.to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


class Written:
    """An exported folder whose tensors and texts can be changed; `save` makes index and checksums anew."""

    def __init__(self, folder):
        self.folder = folder
        self.files = {file: load_file(file) for file in sorted(folder.glob("*.safetensors"))}

    def __getitem__(self, name):
        return next(tensors[name] for tensors in self.files.values() if name in tensors)

    def __setitem__(self, name, value):
        file = next((file for file, tensors in self.files.items() if name in tensors), next(iter(self.files)))
        self.files[file][name] = value.contiguous()

    def __delitem__(self, name):
        next(tensors for tensors in self.files.values() if name in tensors).pop(name)

    def parts(self, layer):
        """The names of a layer's tensors, without its bias."""
        names = (name for tensors in self.files.values() for name in tensors)
        return [name for name in names if name.startswith(f"{layer}.weight")]

    def codes(self, layer):
        return next(n for n in self.parts(layer) if n.endswith((".weight", ".weight_packed")))

    def text(self, name, change):
        """Change the JSON of a file."""
        file = self.folder / name
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    def exchange(self, first, other):
        for name in self.parts(first):
            twin = name.replace(first, other)
            self[name], self[twin] = self[twin], self[name]

    def save(self):
        for file, tensors in self.files.items():
            save_file(tensors, file, {"format": "pt"})
        for index in self.folder.glob("*.index.json"):
            listed = {name: file.name for file, tensors in self.files.items() for name in tensors}
            if json.loads(index.read_text())["weight_map"] != listed:
                index.write_text(json.dumps({"metadata": {}, "weight_map": listed}))
        self.text(RECORD, self._with_sums)

    def _with_sums(self, record):
        for name in record["sha256"]:
            record["sha256"][name] = hashlib.sha256((self.folder / name).read_bytes()).hexdigest()


def exported(case, place, family="qwen2", **more):
    folder, (layout, described) = model_of(place / "model", family, **more), CASES[case]
    export(Source(folder, Injection.model_validate(described)), layout_named(layout), place / "out", override=True)
    return Written(place / "out")


def found(folder, **request):
    """All differences that verify finds: name of the check, and the difference."""
    checks = verify(folder, Request(**request)).checks
    return [(check.name, difference) for check in checks for difference in check.differences]


def where(differences):
    return [(check, difference.what) for check, difference in differences]


@pytest.mark.parametrize("family", OF)
@pytest.mark.parametrize("case", CASES)
def test_an_export_is_equal_value_by_value(case, family, tmp_path):
    written = exported(case, tmp_path, family)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    numbers = {name: p.numel() for name, p in model.named_parameters()}
    rounded = sum(n for name, n in numbers.items() if "proj" in name and "bias" not in name)
    assert found(written.folder) == []
    checks = {check.name: check for check in verify(written.folder, Request()).checks}
    assert checks["weights"].compared["values"] == rounded
    assert checks["other tensors"].compared["values"] >= sum(numbers.values()) - rounded
    assert checks["files"].compared["files"] == len(list(written.folder.iterdir())) - 1  # the record's own
    assert checks["sites"].compared["rounded"] == 2 * {"qwen2": 7, "qwen3_moe": 4 + 3 * 4}[family]


@pytest.mark.parametrize("case", CASES)
def test_a_flipped_bit_is_found_by_its_file_and_by_its_value(case, tmp_path):
    written = exported(case, tmp_path)
    written[written.codes(Q)].view(torch.uint8)[3, 9] ^= 1
    record = (written.folder / RECORD).read_text()
    written.save()
    [(check, value)] = found(written.folder)
    assert (check, value.what) == ("weights", f"{Q}.weight")
    assert value.first == (3, 4 if case == "bf16" else 18)  # two bytes a value, or two values a byte
    assert value.here != value.expected
    assert value.how.startswith("1 of 4,096 values differ")
    (written.folder / RECORD).write_text(record)
    assert [check for check, _ in found(written.folder)] == ["files", "weights"]


@pytest.mark.parametrize("case", PACKED)
def test_exchanged_nibbles_are_named(case, tmp_path):
    written = exported(case, tmp_path)
    codes = written.codes(Q)
    written[codes] = (written[codes] << 4) | (written[codes] >> 4)
    written.save()
    [(check, value)] = found(written.folder)
    assert (check, value.what) == ("weights", f"{Q}.weight")
    assert "as by the order of nibbles" in value.how


@pytest.mark.parametrize("case", PACKED)
def test_a_transposed_scale_is_named(case, tmp_path):
    written = exported(case, tmp_path)
    scale = written[f"{Q}.weight_scale"]
    written[f"{Q}.weight_scale"] = scale.view(torch.uint8).T.reshape(scale.shape).view(scale.dtype)
    written.save()
    [(check, value)] = found(written.folder)
    assert (check, value.what) == ("weights", f"{Q}.weight")
    assert "codes are right, the scales of" in value.how


@pytest.mark.parametrize("case", [case for case in ("nvfp4", "modelopt") if case in CASES])
def test_an_inverted_global_scale_is_named(case, tmp_path):
    written = exported(case, tmp_path)
    [factor] = [name for name in written.parts(Q) if name.endswith(("global_scale", "scale_2"))]
    times = float(written[factor]) ** (2 if case == "modelopt" else -2)
    written[factor] = 1 / written[factor]
    written.save()
    [(check, value)] = found(written.folder)
    assert (check, value.what) == ("weights", f"{Q}.weight")
    assert "a scale of the whole tensor" in value.how
    assert value.here / value.expected == pytest.approx(1 / times, rel=0.02)


def leave_in_bf16(written, case, layer, master):
    for name in written.parts(layer):
        del written[name]
    written[f"{layer}.weight"] = master
    if CASES[case][0] == "compressed_tensors":
        written.text("config.json", lambda c: c["quantization_config"]["ignore"].append(layer))
    if case == "ascend_v1":
        kept = {f"{layer}.weight": "FLOAT"}
        gone = [f"{layer}.weight_scale"]
        written.text("quant_model_description.json", lambda d: [d.update(kept), *map(d.pop, gone)])
    if case == "modelopt":
        written.text("hf_quant_config.json", lambda c: c["quantization"]["exclude_modules"].append(layer))


@pytest.mark.parametrize("case", CASES)
def test_a_layer_left_in_bf16_is_named_as_a_site_too(case, tmp_path):
    written = exported(case, tmp_path)
    leave_in_bf16(written, case, Q, load_file(tmp_path / "model" / "model.safetensors")[f"{Q}.weight"])
    written.save()
    differences = found(written.folder)
    assert ("sites", f"{Q}.weight") in where(differences)
    assert {what for _, what in where(differences)} == {f"{Q}.weight"}
    assert "it is not rounded" in dict(differences)["weights"].how
    assert ("values lie off the grid" if case == "bf16" else "is stored in bfloat16") in dict(differences)["sites"].how


@pytest.mark.parametrize("case", CASES)
def test_a_rounded_router_is_named_as_a_site_too(case, tmp_path):
    written = exported(case, tmp_path, "qwen3_moe")
    router = written[f"{ROUTER}.weight"]
    scale = router.abs().amax(1, keepdim=True) / 6
    written[f"{ROUTER}.weight"] = (router / scale).round().clamp(-6, 6) * scale
    written.save()
    differences = found(written.folder)
    assert where(differences) == [("sites", f"{ROUTER}.weight"), ("other tensors", f"{ROUTER}.weight")]
    assert "is rounded to 4 bits, but was to be left as it is (left by" in differences[0][1].how


@pytest.mark.parametrize("case", CASES)
def test_q_and_k_exchanged_name_each_other(case, tmp_path):
    written = exported(case, tmp_path)
    written.exchange(Q, K)
    written.save()
    how = {difference.what: difference.how for _, difference in found(written.folder)}
    assert how.keys() == {f"{Q}.weight", f"{K}.weight"}
    assert f"it holds the values of {K}.weight" in how[f"{Q}.weight"]
    assert f"it holds the values of {Q}.weight" in how[f"{K}.weight"]


@pytest.mark.parametrize("case", CASES)
def test_gate_and_up_of_an_expert_exchanged_name_each_other(case, tmp_path):
    written = exported(case, tmp_path, "qwen3_moe")
    written.exchange(f"{EXPERT}.gate_proj", f"{EXPERT}.up_proj")
    written.save()
    how = {difference.what: difference.how for _, difference in found(written.folder)}
    assert how.keys() == {f"{EXPERT}.gate_proj.weight", f"{EXPERT}.up_proj.weight"}
    assert f"it holds the values of {EXPERT}.up_proj.weight" in how[f"{EXPERT}.gate_proj.weight"]


@pytest.mark.parametrize("case", CASES)
def test_a_stale_shard_is_found_by_its_file_and_by_its_values(case, tmp_path, monkeypatch):
    monkeypatch.setattr(LAYOUTS[CASES[case][0]], "file_bytes", 30_000)
    (tmp_path / "other").mkdir()
    written = exported(case, tmp_path)
    other = exported(case, tmp_path / "other", seed=1)
    stale = list(written.files)[1]
    stale.write_bytes((other.folder / stale.name).read_bytes())
    differences = found(written.folder)
    assert where(differences)[0] == ("files", stale.name)
    layers = {name.rpartition(".")[0] for name in written.files[stale]}
    assert len(layers) > 1
    assert {what.rpartition(".")[0] for _, what in where(differences)[1:]} == layers
    again = Written(written.folder)
    again.save()
    assert where(found(written.folder)) == where(differences)[1:]


@pytest.mark.parametrize("case", CASES)
def test_a_missing_bias_is_named(case, tmp_path):
    written = exported(case, tmp_path)
    del written[f"{Q}.bias"]
    if case == "ascend_v1":
        written.text("quant_model_description.json", lambda d: d.pop(f"{Q}.bias"))
    written.save()
    [(check, difference)] = found(written.folder)
    assert (check, difference.line) == ("other tensors", f"{Q}.bias: is missing")


@pytest.mark.parametrize("case", CASES)
def test_a_tied_head_that_is_written_twice_with_different_values_is_named(case, tmp_path):
    written = exported(case, tmp_path)
    head = written["model.embed_tokens.weight"].clone()
    written["lm_head.weight"] = head
    written.save()
    assert found(written.folder) == []
    head[5, 3] += 1
    written["lm_head.weight"] = head
    written.save()
    [(check, difference)] = found(written.folder)
    assert (check, difference.what, difference.first) == ("other tensors", "lm_head.weight", (5, 3))
    assert "written twice with different values" in difference.how


WRONG_GROUPS = {
    "mxfp4": ("config.json", lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"]),
    "nvfp4": ("config.json", lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"]),
    "ascend_v1": ("quant_model_description.json", lambda c: c),
    "modelopt": ("hf_quant_config.json", lambda c: c["quantization"]),
}


@pytest.mark.parametrize("case", PACKED)
def test_a_wrong_group_size_is_named(case, tmp_path):
    written = exported(case, tmp_path)
    file, part = WRONG_GROUPS[case]
    written.text(file, lambda content: part(content).update(group_size=64))
    written.save()
    [(check, difference)] = found(written.folder)
    assert check == "files"
    assert "group_size 64" in difference.how


@pytest.mark.parametrize("case", [case for case in ("mxfp4", "ascend_v1") if case in CASES])
def test_another_format_of_inputs_than_trained_is_named(case, tmp_path):
    written = exported(case, tmp_path)
    if case == "mxfp4":
        eight = {"num_bits": 8}
        written.text(
            "config.json",
            lambda c: c["quantization_config"]["config_groups"]["group_0"]["input_activations"].update(eight),
        )
    else:
        four = dict.fromkeys((f"{Q}.weight", f"{Q}.weight_scale"), "W4A4_MXFP4")
        written.text("quant_model_description.json", lambda d: d.update(four))
    written.save()
    differences = found(written.folder)
    assert ("inputs", f"{Q}.weight") in where(differences)
    assert {check for check, _ in differences} == {"inputs"}
    assert len(differences) == (14 if case == "mxfp4" else 1)
    trained, said = ("mxfp4", "mxfp8") if case == "mxfp4" else ("mxfp8", "mxfp4")
    assert differences[0][1].how == f"inputs are said to have {said}, but the policy's have {trained}"


STATIC = {"name": "nvfp4", "factor": "static", "calibrated": 8.0}
MIXED = {"mode": "w4a4", "by_pattern": {"*.layers.0.mlp*": "mxfp8", "*.layers.1.self_attn*": "none"}}


@pytest.mark.parametrize(
    ("layout", "described", "rounded", "part", "cause"),
    [
        (
            "compressed_tensors",
            MIXED | {"deployment": "compressed_tensors"},
            10,
            "mlp.up_proj.weight_scale",
            "scales of",
        ),
        ("compressed_tensors", {"mode": "w8a8", "deployment": "compressed_tensors"}, 14, None, "values differ"),
        (
            "ascend_v1",
            {"mode": "w4a4", "deployment": "vllm_ascend_dualscale_64"},
            14,
            "self_attn.q_proj.weight_dual_scale",
            "scales of",
        ),
        ("ascend_v1", {"mode": "w8a8", "deployment": "vllm_ascend"}, 14, None, "values differ"),
    ],
    ids=["mixed", "mxfp8", "dual", "ascend mxfp8"],
)
def test_other_formats_are_compared_likewise(layout, described, rounded, part, cause, tmp_path, monkeypatch):
    monkeypatch.setitem(CASES, "own", (layout, described))
    written = exported("own", tmp_path)
    assert found(written.folder) == []
    checks = {check.name: check.compared for check in verify(written.folder, Request()).checks}
    assert checks["sites"] == {"rounded": rounded, "left": 1 + (layout == "ascend_v1") + 14 - rounded}
    name = f"model.layers.0.{part}" if part else written.codes(Q)
    if part is None:
        written[name].view(torch.uint8)[1, 2] ^= 1
    elif "dual" in part:
        written[name] = 1 / written[name]
    else:
        written[name][0] += 1
    written.save()
    [(check, difference)] = found(written.folder)
    assert (check, difference.what) == ("weights", f"{name.rpartition('.')[0]}.weight")
    assert cause in difference.how


def test_a_static_factor_of_inputs_that_is_another_is_named(tmp_path, monkeypatch):
    described = {"mode": "nvfp4_w4a4", "input": STATIC, "deployment": "compressed_tensors"}
    monkeypatch.setitem(CASES, "own", ("compressed_tensors", described))
    written = exported("own", tmp_path)
    assert found(written.folder) == []
    written[f"{Q}.input_global_scale"] *= 2
    written.save()
    [(check, difference)] = found(written.folder)
    assert (check, difference.what) == ("inputs", f"{Q}.weight")
    assert difference.how == "its static factor is for inputs up to 4.0, the policy's up to 8.0"


def test_the_verb_prints_all_that_differs_and_exits_with_1(tmp_path, capsys):
    written = exported("bf16", tmp_path)
    assert main(["verify", str(written.folder)]) == 0
    assert "14 tensors, 69,632 values: equal" in capsys.readouterr().out
    written[f"{Q}.weight"][2, 7] += 1
    del written[f"{OUT}.weight"]
    written.save()
    assert main(["verify", str(written.folder)]) == 1
    said = capsys.readouterr()
    assert f"{Q}.weight: 1 of 4,096 values differ; first [2, 7]: " in " ".join(said.out.split())
    assert f"{OUT}.weight: is missing" in said.out
    assert said.err == f"fp4rl: {written.folder}: 2 differences (weights)\n"
    assert main(["verify", str(written.folder), "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["equal"] is False
    weights = next(check for check in answer["checks"] if check["check"] == "weights")
    assert weights["differing"] == {"tensors": 2, "values": 1}
    assert [d.get("first") for d in weights["differences"]] == [None, [2, 7]]


def test_without_its_source_only_files_are_checked_and_that_is_said(tmp_path, capsys):
    written = exported("bf16", tmp_path)
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    assert main(["verify", str(written.folder)]) == 2  # nothing is known, which is not the same as equal
    told = capsys.readouterr()
    assert "no value was compared; name a run or a model folder with --against" in " ".join(told.out.split())
    assert told.err.endswith("out: no value was compared; name its run or model folder with --against\n")
    assert main(["verify", str(written.folder), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["equal"] is None
    assert main(["verify", str(written.folder), "--against", str(tmp_path / "elsewhere")]) == 0
    assert "69,632 values: equal" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nowhere"], "there is no folder nowhere"),
        (["."], ".: no safetensors file"),
        (["out", "--engine", "vlm"], "--engine vlm: no such engine; did you mean 'vllm'"),
        (["out", "--against", "elsewhere"], "'elsewhere' is no model folder and no run below runs"),
        (["out", "--mode", "w4a44"], "no mode"),
    ],
)
def test_bad_input_is_one_line(words, line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exported("bf16", tmp_path)
    capsys.readouterr()
    assert main(["verify", *words]) == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1


class Multiplied(TorchFunctionMode):
    """The weights that linear layers were given."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Note the weight, and go on."""
        if func is torch.nn.functional.linear:
            self.weights.append(args[1].detach().clone())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["w4a4", "nvfp4_w4a16"])
def test_a_checkpoint_is_compared_with_what_the_matmuls_multiply_by(mode, tmp_path):
    estimator = {"straight_through": "clipped"} if mode == "w4a4" else {}  # which acts in training alone
    folder, injection = model_of(tmp_path / "model"), Injection.named(mode, "compressed_tensors", **estimator)
    trained = Trained.of(folder, "bfloat16", None, injection)
    assert under_deployment(trained.injection, "compressed_tensors") == trained.injection
    model, _ = load(folder, "bfloat16")
    linears = {module: name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    called = []
    for module in linears:
        module.register_forward_pre_hook(lambda module, _: called.append(module))
    with attach(model, injection) as attachment, torch.no_grad(), Multiplied() as seen:
        attachment.set_phase("evaluation")
        model(torch.arange(1, 9)[None])
    multiplied = {linears[module]: weight for module, weight in zip(called, seen.weights, strict=True)}
    assert len(trained.plans) == 14
    for name in trained.plans:
        assert torch.equal(trained.values[name], multiplied[name.removesuffix(".weight")])
        assert not torch.equal(trained.values[name], model.get_parameter(name))


@pytest.mark.parametrize(("scheme", "mode"), [("MXFP4A16", "w4a16"), ("MXFP4A16+MXFP8", "w4a8"), ("MXFP4", "w4a4")])
def test_what_compressed_tensors_wrote_is_equal_to_its_model(scheme, mode, tmp_path):
    pytest.importorskip("compressed_tensors", reason="install the extra `oracles`", exc_type=ModuleNotFoundError)
    for part in start():
        part.save_pretrained(tmp_path / "model")
    by_compressed_tensors(tmp_path / "out", (scheme, ["Linear"]))
    assert found(tmp_path / "out", against=str(tmp_path / "model")) == []
    checks = {c.name: c.compared for c in verify(tmp_path / "out", Request(str(tmp_path / "model"))).checks}
    assert checks["weights"]["values"] > 10_000
    assert checks["inputs"]["layers"] == checks["sites"]["rounded"] == checks["weights"]["tensors"]
    other = "w4a16" if mode == "w4a4" else "w4a4"
    differences = found(tmp_path / "out", against=str(tmp_path / "model"), mode=other)
    assert {check for check, _ in differences} == {"inputs"}
    assert len(differences) == checks["inputs"]["layers"]


@pytest.mark.filterwarnings("ignore")
def test_what_modelopt_wrote_is_equal_to_its_model_and_has_factors_of_its_own(tmp_path):
    pytest.importorskip("modelopt", reason="install the extra `oracles`", exc_type=ModuleNotFoundError)
    for part in start():
        part.save_pretrained(tmp_path / "model")
    by_modelopt(tmp_path / "out")
    assert found(tmp_path / "out", against=str(tmp_path / "model")) == []
    checks = {c.name: c for c in verify(tmp_path / "out", Request(str(tmp_path / "model"))).checks}
    assert checks["weights"].compared["values"] > 10_000
    assert checks["inputs"].notes == ["7 layers with static factors of the checkpoint's own: a model folder has none"]


def broken_config(written):
    (written.folder / "config.json").write_text("{")


def cut_short(written):
    file = next(iter(written.files))
    file.write_bytes(file.read_bytes()[:1000])


def without_weights(written):
    next(iter(written.files)).unlink()


@pytest.mark.parametrize("fault", [broken_config, cut_short, without_weights])
def test_a_folder_that_cannot_be_read_is_a_difference(fault, tmp_path):
    written = exported("mxfp4", tmp_path)
    fault(written)
    differences = found(written.folder)
    assert {check for check, _ in differences} == {"files"}
    assert "cannot be read" in differences[-1][1].how


def test_a_tokenizer_that_is_missing_is_a_difference_of_the_loaded_model(tmp_path):
    written = exported("mxfp4", tmp_path)
    (written.folder / "tokenizer.json").unlink()
    checks = verify(written.folder, Request(), engine="transformers").checks
    assert [check.name for check in checks if check.differences] == ["files", "configuration", "transformers"]
    assert all("has no tokenizer" in check.differences[0].how for check in checks[-2:])


def as_json(folder, change, file="config.json"):
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))


BESIDE = {
    "another epsilon": ("mxfp4", lambda config: config.update(rms_norm_eps=0.1), "config.json: rms_norm_eps"),
    "another activation": ("bf16", lambda config: config.update(hidden_act="gelu"), "config.json: hidden_act"),
    "rounded outputs": (
        "mxfp4",
        lambda config: config["quantization_config"]["config_groups"]["group_0"].update(
            output_activations={"num_bits": 4}
        ),
        "quantization_config.group_0",
    ),
    "a head to quantize": ("mxfp4", lambda config: config["quantization_config"].update(ignore=[]), "lm_head"),
}


@pytest.mark.parametrize("planted", BESIDE)
def test_what_stands_beside_the_weights_is_compared_without_checksums_too(planted, tmp_path):
    case, change, named = BESIDE[planted]
    written = exported(case, tmp_path)
    (written.folder / RECORD).unlink()
    request = Request(against=str(tmp_path / "model"))
    assert verify(written.folder, request).checks[-1].differences == []
    as_json(written.folder, change)
    checks = verify(written.folder, request).checks
    assert [(check.name, d.what) for check in checks for d in check.differences] == [("configuration", named)]


def test_a_tokenizer_with_exchanged_ids_is_found(tmp_path):
    written = exported("mxfp4", tmp_path)
    (written.folder / RECORD).unlink()

    def exchange(content):
        vocabulary = content["model"]["vocab"]
        vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]

    as_json(written.folder, exchange, "tokenizer.json")
    check = verify(written.folder, Request(against=str(tmp_path / "model"))).checks[-1]
    assert [d.what for d in check.differences] == ["the tokenizer"]
    assert "2 tokens have other ids" in check.differences[0].how


RECORDED = {
    "layout": ("modelopt", "says layout 'modelopt', and the folder is bf16"),
    "run": ("suite/other-s0-0123456789ab", "says run 'suite/other-s0-0123456789ab', and it was made from None"),
    "spec_digest": ("0123456789ab", "says spec_digest '0123456789ab', and it was made from None"),
    "overridden": ([], "says that [] was overridden, and README.md ['it was not meant']"),
    "sites_digest": ("0123456789ab", "but 0123456789ab was recorded"),
}


@pytest.mark.parametrize("key", RECORDED)
def test_a_record_that_was_edited_is_found_by_what_it_says(key, tmp_path):
    written = exported("bf16", tmp_path)
    card = written.folder / "README.md"
    card.write_text(
        card.read_text().replace(
            "- Made from", "> **Written all the same (`--anyway`):** it was not meant\n\n- Made from"
        )
    )
    written.text(RECORD, lambda record: record.update(overridden=["it was not meant"]))
    written.save()
    assert found(written.folder) == []
    value, how = RECORDED[key]
    written.text(RECORD, lambda record: record.update({key: value}))
    ((_, difference),) = found(written.folder)
    assert how in difference.how


@pytest.mark.parametrize("name", ["config.json", "README.md", "tokenizer.json", "model.safetensors"])
def test_a_file_that_was_taken_out_of_the_record_is_found(name, tmp_path):
    written = exported("bf16", tmp_path)
    written.text(RECORD, lambda record: record["sha256"].pop(name))
    assert where(found(written.folder)) == [("files", name)]


def test_notes_beside_an_export_are_no_difference(tmp_path):
    written = exported("bf16", tmp_path)
    (written.folder / "LICENSE").write_text("free")
    (written.folder / ".cache").mkdir()
    (written.folder / ".cache" / "x.json").write_text("{}")
    assert found(written.folder) == []
    (written.folder / "chat_template.jinja").write_text("{{ messages }}")
    assert ("files", "chat_template.jinja") in where(found(written.folder))


@pytest.mark.skipif("ascend_v1" not in CASES, reason="no such layout")
def test_a_type_of_the_whole_model_that_no_tensor_has_is_found(tmp_path):
    written = exported("ascend_v1", tmp_path)
    (written.folder / RECORD).unlink()
    request = Request(against=str(tmp_path / "model"), mode="w4a8", deployment="vllm_ascend")
    assert verify(written.folder, request).differences == []
    as_json(written.folder, lambda said: said.update(model_quant_type="W4A4_MXFP4"), "quant_model_description.json")
    (difference,) = verify(written.folder, request).differences
    assert difference.what == "quant_model_description.json: model_quant_type"
    assert difference.how == "is 'W4A4_MXFP4', and its tensors are of W4A8_MXFP"


def test_of_differences_of_one_kind_the_first_are_shown_and_the_rest_counted(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    written = exported("bf16", tmp_path)
    names = sorted(name for tensors in written.files.values() for name in tensors if "proj.weight" in name)
    for count, name in enumerate(names[:9], start=1):
        written[name][2, :count] += 1
    for name in names[9:]:
        del written[name]
    written.save()
    assert main(["verify", str(written.folder)]) == 1
    said = capsys.readouterr()
    lines = " ".join(said.out.split())
    assert lines.count("values differ; first") == 5
    assert "and 4 more of the same kind (--json names all)" in lines
    assert lines.count("is missing") == len(names) - 9
    assert said.err.endswith(" differences (weights, sites)\n")
    assert all(len(line) <= 80 for line in said.out.splitlines())


# -- runs


@pytest.fixture
def finished(tmp_path):
    """The folder of a finished run whose policy lies in `final`, as it was recorded."""
    run = RunFolder(tmp_path / "runs" / "suite" / "w4a16-s0-0123456789ab")
    run.path.mkdir(parents=True)
    model_of(run.path / "final")
    experiment = {"model": {"path": str(run.path / "final"), "dtype": "bfloat16"}, "injection": {"mode": "w4a16"}}
    run.write_spec(json.dumps(Experiment.model_validate(experiment).model_dump(mode="json")))
    run.add_evidence(CheckpointKept(step=1))
    return run


def result_of(run, **summary):
    told = {"code_digest": "c", "seed": 0, "arm": "w4a16", "steps_done": 1}
    (run.path / "result.json").write_text(json.dumps({**told, "evaluations": [], "evidence": summary}))


def test_a_policy_that_was_changed_after_its_evaluation_is_not_exported_without_a_word(finished, tmp_path, capsys):
    final = finished.path / "final"
    result_of(finished, final_files=of_model(final))
    words = ["export", str(finished.path), "--to", "bf16", "--mode", "w4a16"]
    assert main([words[0], words[1], str(tmp_path / "one"), *words[2:], "--anyway"]) == 0
    assert "was changed after" not in capsys.readouterr().out
    file = final / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{Q}.weight"][0, 0] += 1
    save_file(tensors, file, {"format": "pt"})
    assert main([words[0], words[1], str(tmp_path / "two"), *words[2:]]) == 2
    assert "final was changed after suite/w4a16-s0-0123456789ab was evaluated" in capsys.readouterr().err
    assert main([words[0], words[1], str(tmp_path / "two"), *words[2:], "--anyway"]) == 0
    assert "was changed after" in (tmp_path / "two" / "README.md").read_text()


@pytest.mark.parametrize("verb", ["export", "parity", "verify"])
def test_an_unfinished_run_is_bad_input_and_a_failed_one_a_failure(verb, finished, tmp_path, capsys):
    out = {"export": [str(tmp_path / "out"), "--to", "bf16"], "parity": [], "verify": []}[verb]
    exported("bf16", tmp_path / "other") if verb == "verify" else None
    for named in (finished.key, "w4a16-s0", str(finished.path), str(finished.path / "final")):
        words = [verb, *([str(tmp_path / "other" / "out"), "--against", named] if verb == "verify" else [named]), *out]
        assert main([*words, "--runs", str(tmp_path / "runs")]) == 2, named
        assert "is not finished; `fp4rl run` goes on with it" in capsys.readouterr().err
    finished.add_evidence(Failed(why="the disk is full"))
    for named in (finished.key, "w4a16-s0", str(finished.path), str(finished.path / "final")):
        words = [verb, *([str(tmp_path / "other" / "out"), "--against", named] if verb == "verify" else [named]), *out]
        assert main([*words, "--runs", str(tmp_path / "runs")]) == 1, named
        assert "failed: the disk is full" in capsys.readouterr().err


def test_the_embedded_model_is_exported_and_compared(tmp_path, capsys, monkeypatch):
    folder = model_of(tmp_path / "made")
    monkeypatch.setattr("fp4rl.rl.inputs.start_folder", lambda *_: folder)
    assert main(["export", "embedded", str(tmp_path / "out"), "--to", "bf16"]) == 0
    assert main(["verify", str(tmp_path / "out"), "--against", "embedded"]) == 0
    assert "against " + str(folder) in capsys.readouterr().out.replace("\n", "")


def test_a_packed_folder_is_nothing_to_compare_with(tmp_path, capsys):
    written = exported("mxfp4", tmp_path)
    assert main(["verify", str(written.folder), "--against", str(written.folder)]) == 2
    assert "is packed itself; name the unquantized folder" in capsys.readouterr().err


def test_a_record_without_a_known_injection_is_bad_input_in_one_line(tmp_path, capsys):
    written = exported("bf16", tmp_path)
    written.text(RECORD, lambda record: record.update(injection={"mode": "w9"}))
    assert main(["verify", str(written.folder)]) == 2
    assert "no mode is called 'w9'" in capsys.readouterr().err
    written.text(RECORD, lambda record: record.pop("source"))
    assert main(["verify", str(written.folder)]) == 2
    assert "nothing here says what it was made from" in capsys.readouterr().out


OTHERS = {
    "w4a4": None,
    "w4a8": None,
    "w4a4_ceil_x": "vllm_ascend_ceil_x",
    "w4a4_fouroversix": "vllm_ascend_fouroversix",
    "w4a4_dualscale": "vllm_ascend_dualscale_64",
}


@pytest.mark.parametrize("folder", OTHERS)
def test_what_msmodelslim_wrote_is_equal_to_its_model_under_its_rule(folder, shared_data):
    data = shared_data / "ascend_v1"
    if not data.is_dir():
        pytest.skip("no ascend_v1 in the shared data")
    request = {"against": str(data / "model"), "deployment": OTHERS[folder]}
    assert found(data / folder, **request) == []
    compared = {check.name: check.compared for check in verify(data / folder, Request(**request)).checks}
    assert compared["weights"] == {"tensors": 14, "values": 106_496}
    assert compared["sites"] == {"rounded": 14, "left": 2}
    if folder in ("w4a4_ceil_x", "w4a4_fouroversix"):  # under another packer's rule many values differ
        differences = found(data / folder, against=str(data / "model"))
        assert {check for check, _ in differences} <= {"weights", "sites", "inputs"}
        assert len([check for check, _ in differences if check == "weights"]) > 7


def computes(folder):
    """What the check of the loaded model says: its name, differences and notes."""
    check = verify(folder, Request(), engine="transformers").checks[-1]
    return check.name, check.differences, " | ".join(check.notes)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_a_loaded_checkpoint_has_the_logits_of_the_policy(case, tmp_path):
    written = exported(case, tmp_path)
    name, differences, notes = computes(written.folder)
    assert name == ("our reader" if case in ("ascend_v1", "modelopt") else "transformers")
    assert differences == []
    assert f"largest difference of logits: 0 (loaded by {name}, in bfloat16)" in notes
    assert ("transformers loads no" in notes) == (name == "our reader")
    assert "a model folder has no task" in notes
    codes = written[written.codes(Q)].view(torch.uint8)
    codes[:] = codes.flip(0)
    written.save()
    _, [logits], _ = computes(written.folder)
    assert logits.what == "logits"
    assert logits.here != logits.expected


@pytest.mark.filterwarnings("ignore")
def test_where_transformers_rounds_inputs_by_another_rule_that_is_said_and_no_difference(tmp_path, monkeypatch):
    monkeypatch.setitem(CASES, "mxfp4", ("compressed_tensors", {"mode": "w4a4", "deployment": "vllm_blackwell"}))
    _, differences, notes = computes(exported("mxfp4", tmp_path).folder)
    assert differences == []
    assert "largest difference of logits: 0 " not in notes
    assert "transformers rounds inputs as compressed_tensors does, not as vllm_blackwell" in notes


@pytest.mark.filterwarnings("ignore")
def test_a_folder_that_transformers_cannot_load_is_a_difference(tmp_path):
    written = exported("bf16", tmp_path)
    written.text("config.json", lambda c: c.update(intermediate_size=97))
    written.save()
    _, [loading], _ = computes(written.folder)
    assert "transformers cannot load it" in loading.how


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lora", ["merged", "adapter"])
@pytest.mark.parametrize("case", ["bf16", "mxfp4", "ascend_v1"])
def test_an_adapter_is_compared_merged_or_beside_its_packed_base(case, lora, tmp_path):
    base, (layout, described) = model_of(tmp_path / "base"), CASES[case]
    model, tokenizer = load(base, "bfloat16")
    adapted = with_lora(model, Lora(rank=4, alpha=8.0), base)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    for part in (adapted, tokenizer):
        part.save_pretrained(tmp_path / "start")
    injection = Injection.model_validate(described | {"lora": lora})
    out = export(Source(tmp_path / "start", injection), layout_named(layout), tmp_path / "out", override=True).folder
    assert found(out) == []
    weights = {check.name: check for check in verify(out, Request()).checks}
    assert weights["weights"].compared["values"] == 69_632
    assert computes(out)[1] == []
    if lora == "adapter":
        written = Written(out / "adapter")
        name = next(name for tensors in written.files.values() for name in tensors if "lora_B" in name)
        written[name][1, 2] += 1
        for file, tensors in written.files.items():
            save_file(tensors, file, {"format": "pt"})
        assert where(found(out)) == [
            ("files", "adapter/adapter_model.safetensors"),
            ("other tensors", f"adapter/{name}"),
        ]
