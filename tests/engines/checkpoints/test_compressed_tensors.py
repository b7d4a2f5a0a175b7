"""compressed-tensors: what transformers and the library itself load from our files is what was trained, bit for bit,
and what the library packs from the same weights are the same files."""

import json
import logging

import pytest
import torch
from export_models import folder_of, logits
from packed_models import by_compressed_tensors
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fp4rl.engines.checkpoints.export import export
from fp4rl.engines.checkpoints.layouts.all import layout_named
from fp4rl.engines.checkpoints.source import Source
from fp4rl.inject.attach import attach
from fp4rl.models.load import load
from fp4rl.spec.injection import Injection

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
