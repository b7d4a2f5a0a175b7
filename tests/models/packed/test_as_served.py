"""Evaluated as it is served, a packed folder gives the logits of the policy whose weights were packed."""

import pytest
import torch
from packed_models import LINEAR, MIXED, by_compressed_tensors, by_modelopt, by_msmodelslim, start
from tiny_models import experts_in
from transformers import AutoModelForCausalLM

from fp4rl.cli.main import main
from fp4rl.inject.attach import attach
from fp4rl.models.load import load
from fp4rl.models.packed.as_served import inputs_as_served, packed_note
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.injection import Injection

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(1, 60)[None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(name of a scheme) -> the folder that compressed-tensors made; `start` is the folder that it was made from."""
    pytest.importorskip("compressed_tensors", reason="install the extra `oracles`", exc_type=ModuleNotFoundError)
    root = tmp_path_factory.mktemp("m")

    def make(name):
        folder = root / name
        if folder.exists():
            return folder
        if name == "start":
            for part in start():
                part.save_pretrained(folder)
            return folder
        return by_compressed_tensors(folder, *(MIXED if name == "mixed" else [(name, LINEAR)]))

    return make


def logits(folder, injection, dtype="bfloat16"):
    model, _ = load(folder, dtype)
    if injection is None:
        return model(IDS).logits
    with attach(model, Injection.model_validate(injection)) as attachment, torch.no_grad():
        attachment.set_phase("evaluation")
        return model(IDS).logits


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("scheme", "mode"), [("MXFP4", "w4a4"), ("MXFP4A16", "w4a16"), ("MXFP8", "w8a8")])
def test_logits_are_those_of_the_injection_whose_weights_were_packed(dtype, scheme, mode, folders):
    served = inputs_as_served(folders(scheme)).injection
    right = logits(folders("start"), Injection.named(mode, "compressed_tensors"), dtype)
    assert torch.equal(logits(folders(scheme), served, dtype), right)
    if served is not None:  # the inputs were rounded, and by this kernel's rule
        assert served["deployment"] == "compressed_tensors"
        assert not torch.equal(logits(folders(scheme), None, dtype), right)
        assert not torch.equal(
            logits(folders(scheme), inputs_as_served(folders(scheme), "ocp").injection, dtype), right
        )


@pytest.mark.parametrize("scheme", ["MXFP4", "mixed"])
def test_logits_are_those_that_compressed_tensors_computes(scheme, folders):
    """Of MX formats; its NVFP4 scales of bfloat16 inputs are made in bfloat16 (docs/concepts/formats.md)."""
    library = AutoModelForCausalLM.from_pretrained(folders(scheme), dtype=torch.bfloat16, attn_implementation="eager")
    with torch.no_grad():
        right = library(IDS).logits
    served = inputs_as_served(folders(scheme)).injection
    assert torch.equal(logits(folders(scheme), served), right)
    assert not torch.equal(logits(folders(scheme), None), right)


@pytest.mark.parametrize(
    ("name", "mode", "deployment"),
    [("w4a4", "w4a4", "vllm_ascend"), ("w4a8", "w4a8", "vllm_ascend"), ("w4a4_ceil_x", "w4a4", "vllm_ascend_ceil_x")],
)
def test_logits_of_a_model_that_msmodelslim_packed(name, mode, deployment, shared_data):
    folder = shared_data / "ascend_v1"
    served = inputs_as_served(folder / name).injection
    assert served["deployment"] == "vllm_ascend"
    right = logits(folder / "model", Injection.named(mode, deployment, dtype="float32"), "float32")
    assert torch.equal(logits(folder / name, served | {"dtype": "float32"}, "float32"), right)


def test_sites_of_several_formats_are_told_apart(tmp_path):
    served = inputs_as_served(by_msmodelslim(tmp_path / "m"))
    injection = Injection.model_validate(served.injection)
    assert injection.deployment is None  # two kernels: dual scales for one layer, none for the others
    rules = {p.pattern.rsplit(".")[-1]: (p.input.name, p.input.rounding) for p in injection.by_pattern}
    assert (injection.input.name, injection.input.rounding) == ("mxfp8", "nearest_even")
    assert rules == {
        "gate_proj": ("mxfp4", "half_away"),
        "up_proj": ("mxfp4", "half_away"),
        "down_proj": ("mxfp4_dual", "nearest_even"),
    }
    assert "inputs mxfp8 and mxfp4 and mxfp4_dual" in served.words


@pytest.mark.parametrize("mode", ["w4a4", "w4a8"])
def test_stacked_experts_whose_files_hold_them_one_by_one(mode, tmp_path):
    tokenizer = build_tokenizer()
    experts_in("mixtral", "cpu", len(tokenizer)).bfloat16().save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    words = ("--to", "compressed_tensors", "--mode", mode, "--deployment", "compressed_tensors", "--json")
    assert main(["export", str(tmp_path / "start"), str(tmp_path / "out"), *words]) == 0
    served = inputs_as_served(tmp_path / "out").injection
    right = logits(tmp_path / "start", Injection.named(mode, "compressed_tensors"))
    assert torch.equal(logits(tmp_path / "out", served), right)
    assert not torch.equal(logits(tmp_path / "out", None), right)


def test_layers_left_in_full_precision_keep_their_inputs(folders):
    served = inputs_as_served(folders("mixed")).injection
    model, _ = load(folders("mixed"))
    with attach(model, Injection.model_validate(served)) as attachment:
        rounded = {plan.name.rsplit(".")[-1]: plan.input.name for plan in attachment.table.plans}
    mx = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "mxfp8")
    assert rounded == mx | dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mxfp4")


def test_a_deployment_that_leaves_inputs_as_they_are(folders):
    served = inputs_as_served(folders("MXFP4"), "vllm_hopper")
    assert (served.injection, served.words) == (None, "vllm_hopper leaves inputs as they are")


def test_static_factors_of_modelopt_are_layer_by_layer(tmp_path):
    pytest.importorskip("modelopt", reason="install the extra `oracles`", exc_type=ModuleNotFoundError)
    served = Injection.model_validate(inputs_as_served(by_modelopt(tmp_path / "m")).injection)
    factors = {served.input.calibrated, *(p.input.calibrated for p in served.by_pattern)}
    assert len(factors) >= 4  # q, k and v share one input, and so do gate and up
    assert all(p.input.factor == "static" for p in served.by_pattern)


def test_what_has_no_meaning_is_refused(folders):
    with pytest.raises(InvalidValueError, match="its weights are not packed"):
        inputs_as_served(folders("start"))
    assert packed_note(folders("start")) is None
    with pytest.raises(InvalidValueError, match=r"inputs are rounded to num_bits 8, .* group_size 128"):
        inputs_as_served(folders("MXFP4XFP8"))
