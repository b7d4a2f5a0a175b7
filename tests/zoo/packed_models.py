"""Tiny packed checkpoints, written by the real libraries: compressed-tensors, ModelOpt, msModelSlim (a stored one)."""

import json
import shutil
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from fp4rl.models.tiny import build
from fp4rl.models.tokenizer import build_tokenizer
from fp4rl.spec.model import Embedded

ASCEND_V1 = Path(__file__).parents[1] / "data" / "ascend_v1"
WEIGHTS = "quant_model_weights-00001-of-00001.safetensors"
LINEAR = ("Linear",)
MIXED = (("MXFP4", ("re:.*mlp.*",)), ("MXFP8", ("re:.*self_attn.(q|k|v)_proj",)))
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SMALL = Embedded(hidden_size=32, num_layers=1, intermediate_size=96, seed=7)


def start(recipe=SMALL):
    """The unquantized model, in bfloat16, and its tokenizer."""
    tokenizer = build_tokenizer()
    return build(recipe, tokenizer).bfloat16(), tokenizer


def by_compressed_tensors(out, *groups, model=None, ignore=("lm_head",)):
    """Pack a model; `groups` are names of schemes with their targets, `A+B` the weights of A with the inputs of B.

    Every step is the library's own.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
        from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
        from compressed_tensors.quantization.utils.helpers import compute_dynamic_scales_and_zp, generate_gparam

        own, tokenizer = start()
        model = own if model is None else model
        schemes = {}
        for number, (name, targets) in enumerate(groups):
            weights, _, inputs = name.partition("+")
            scheme = preset_name_to_scheme(weights, list(targets))
            if inputs:
                scheme.input_activations = preset_name_to_scheme(inputs, []).input_activations
            schemes[str(number)] = scheme
        apply_quantization_config(model, QuantizationConfig(config_groups=schemes, ignore=list(ignore)))
        for module in model.modules():
            scheme = getattr(module, "quantization_scheme", None)
            if scheme is None:
                continue
            weight, factor = module.weight.data.float(), None
            if hasattr(module, "weight_global_scale"):
                factor = generate_gparam(weight.min(), weight.max())
                module.weight_global_scale.data.copy_(factor)
            if hasattr(module, "input_global_scale"):
                module.input_global_scale.data.copy_(generate_gparam(-weight.max(), weight.max()))
            scale, _ = compute_dynamic_scales_and_zp(weight, scheme.weights, None, factor)
            module.weight_scale.data.copy_(scale.view_as(module.weight_scale))
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(out)
        compressor.update_config(str(out))
    tokenizer.save_pretrained(out)
    return out


def by_modelopt(out):
    """Pack and export a model by ModelOpt's own calls: NVFP4 with calibrated inputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export import export_hf_checkpoint

        model, tokenizer = start()
        model.config.architectures = [type(model).__name__]
        mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, lambda m: m(torch.arange(1, 40)[None]))
        export_hf_checkpoint(model, export_dir=str(out))
    tokenizer.save_pretrained(out)
    return out


def by_msmodelslim(out):
    """A model that msModelSlim 26.1 exported, with a layer of every MX type, and a tokenizer."""
    shutil.copytree(ASCEND_V1, out)
    build_tokenizer().save_pretrained(out)
    return out


def as_gpt_oss(out):
    """A tiny gpt-oss whose experts are random codes and scales; its own files are made by no tool that runs here."""
    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "gpt_oss", **sizes, num_key_value_heads=1, head_dim=32, num_local_experts=2, num_experts_per_tok=1
    )
    config.vocab_size, config.pad_token_id, config.eos_token_id = len(tokenizer), 0, 2
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    tensors = load_file(out / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, into, width = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(256, (experts, width, into // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 124, (experts, width, into // 32), dtype=torch.uint8)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    edit_config(out, quantization_config={"quant_method": "mxfp4"})
    return out


def edit_config(folder, **changes):
    """Change keys of config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def weights_file(folder):
    """The one file of a folder's tensors."""
    (file,) = folder.glob("*.safetensors")
    return file


def edit_tensors(folder, change):
    """Rewrite the tensors of a folder after `change(tensors)`."""
    file = weights_file(folder)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def stated(codes, scales, dual=None, columns=None):
    """The layout of packed MXFP4 in float64: low nibble = even column, exponent + 127, an FP32 scale above."""
    grid = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float64)
    values = grid[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).long()]
    width = values.shape[-1]
    values = values * (2.0 ** (scales.double() - 127)).repeat_interleave(32, -1)[:, :width]
    return values if dual is None else values * dual[..., 0].double().repeat_interleave(columns, -1)[:, :width]
