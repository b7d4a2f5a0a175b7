"""The errors of every format on ideal Gaussian data: what the format itself costs, whatever the tensor.

Figures of `fp4rl.numerics.errors.gaussian_ideal`, kept here to be shown without torch; a test measures them again. A
format without figures here is measured when these are needed.
"""

from collections.abc import Mapping
from types import MappingProxyType

from fp4rl.spec.formats import FORMATS, Format, ScaleRule

MEASURES = (
    *("sqnr_db", "relative_l2", "relative_l1", "mean_relative", "deadzone_share"),
    *("clipped_share", "clipped_error", "scale_bias", "deadzone", "grid_noise"),
)

_FIGURES = {
    "mxfp4": (18.75, 0.1155, 0.1069, 0.2048, 0.08413, 0.02458, 0.1591, 0.1523, 0.01659, 0.09971),
    "mxfp4_sr": (15.56, 0.1667, 0.1545, 0.3385, 0.1114, 0.0, 0.0, 0.1542, 0.03014, 0.2251),
    "mxfp4_2d": (18.39, 0.1205, 0.1208, 0.257, 0.1241, 0.001995, 0.01517, 0.1619, 0.02858, 0.1117),
    "mxfp4_b16": (18.63, 0.117, 0.1055, 0.1916, 0.07373, 0.04192, 0.2312, 0.1497, 0.014, 0.09311),
    "mxfp4_dual": (18.77, 0.1153, 0.1076, 0.2084, 0.08665, 0.02533, 0.1455, 0.1495, 0.01659, 0.09971),
    "mxfp6_e2m3": (30.98, 0.02826, 0.02652, 0.06582, 0.02102, 0.003366, 0.02906, 0.03721, 0.001483, 0.02421),
    "mxfp6_e3m2": (25.34, 0.05408, 0.04551, 0.04964, 0.002645, 0.008207, 0.07101, 0.07221, 7.213e-05, 0.04788),
    "mxfp8": (30.5, 0.02988, 0.02348, 0.02286, 4.292e-06, 0.008207, 0.2292, 0.03831, 2.865e-09, 0.02396),
    "mxfp8_e5m2": (25.34, 0.05408, 0.04548, 0.04508, 0.0, 0.008207, 0.07101, 0.07221, 0.0, 0.04788),
    "nvfp4": (20.44, 0.09511, 0.08952, 0.1788, 0.06812, 0.03479, 0.01131, 0.07467, 0.014, 0.09311),
    "fp8": (31.56, 0.02643, 0.0225, 0.02252, 6.676e-06, 0.0, 0.0, 0.0, 1.391e-08, 0.02643),
    "bf16": (55.61, 0.001657, 0.001407, 0.001407, 0.0, 0.0, 0.0, 0.0, 0.0, 0.001657),
}

# MXFP4 under each scale rule, as SQNR in dB.
MXFP4_RULES_DB: Mapping[ScaleRule, float] = MappingProxyType(
    {
        "floor": 18.75,
        "ceil": 17.01,
        "rceil": 18.65,
        "even": 18.99,
        "uos": 19.02,
        "round": 18.34,
        "mse": 19.03,
        "fouroversix": 19.03,
    }
)


def kept_ideal(fmt: Format) -> dict[str, float] | None:
    """Return the stored measures of a format on Gaussian data; None for a format that has none."""
    if fmt.name not in _FIGURES or fmt != FORMATS.get(fmt.name):
        return None
    return dict(zip(MEASURES, _FIGURES[fmt.name], strict=True))
