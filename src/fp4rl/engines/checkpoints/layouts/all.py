"""The layouts by name. Adding one is one entry here."""

from collections.abc import Mapping
from types import MappingProxyType

from fp4rl.engines.checkpoints.layouts.ascend_v1 import AscendV1
from fp4rl.engines.checkpoints.layouts.baked import Baked
from fp4rl.engines.checkpoints.layouts.compressed_tensors import CompressedTensors
from fp4rl.engines.checkpoints.layouts.layout import Layout
from fp4rl.engines.checkpoints.layouts.modelopt import ModelOpt
from fp4rl.spec.errors import NotFoundError, nearest

_ALL: tuple[type[Layout], ...] = (AscendV1, Baked, CompressedTensors, ModelOpt)
LAYOUTS: Mapping[str, type[Layout]] = MappingProxyType({layout.name: layout for layout in _ALL})


def layout_named(name: str) -> Layout:
    """Return the layout of that name; raises NotFoundError, naming the nearest."""
    if name not in LAYOUTS:
        raise NotFoundError(f"--to {name}: there is no such layout{nearest(name, LAYOUTS)}")
    return LAYOUTS[name]()
