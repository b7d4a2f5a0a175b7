"""Pack tensors with the real msModelSlim: `python pack.py WEIGHTS PACKED`, two safetensors files, in a venv with it.

Every two-dimensional tensor NAME becomes, for each METHOD, `NAME/METHOD/codes` (MXFP4 two a byte), `NAME/METHOD/scales`
(E8M0 bytes) and for dual scales `NAME/METHOD/dual` (FP32).
"""

import sys

import torch
from msmodelslim.core.quant_service.modelslim_v1.save.utils.pack import pack_fp4_to_uint8
from msmodelslim.core.quantizer.base import AutoWeightQuantizer, QConfig
from msmodelslim.ir.qal import QDType, QScope, QStorage
from safetensors.torch import load_file, save_file

METHODS = {
    "minmax": (QScope.PER_BLOCK, {}),
    "mxfp8": (QScope.PER_BLOCK, {}),
    "ceil_x": (QScope.PER_BLOCK, {"ceil_x_value": 7.25}),
    "fouroversix": (QScope.PER_BLOCK, {}),
    "dualscale": (QScope.DUAL_SCALE, {"dual_block_size": 64}),
}


def packed(weight, method):
    """Codes, scales and, for dual scales, the FP32 scales of a weight, as the exporter writes them."""
    scope, more = METHODS[method]
    wide = method == "mxfp8"
    settings = {"scope": scope, "dtype": QDType.MXFP8 if wide else QDType.MXFP4, "symmetric": True}
    settings["method"] = "minmax" if wide else method
    quantizer = AutoWeightQuantizer.from_config(QConfig(**settings, ext={"axes": -1} | more))
    quantizer.init_weight(QStorage(QDType.FLOAT, weight.clone()))
    value = quantizer.get_q_storage().value
    yield "codes", value.to(torch.float8_e4m3fn).view(torch.uint8) if wide else pack_fp4_to_uint8(value)
    known = quantizer.get_q_param().ext
    yield "scales", (known["scale"].squeeze(-1) + 127).to(torch.uint8)
    if "dual_scale" in known:
        yield "dual", known["dual_scale"].float()


def main(weights, target):
    """Pack every tensor of the file by every method."""
    made = {}
    with torch.no_grad():
        for name, weight in load_file(weights).items():
            for method in METHODS:
                for part, value in packed(weight, method):
                    made[f"{name}/{method}/{part}"] = value.contiguous()
    save_file(made, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
