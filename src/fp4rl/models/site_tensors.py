"""Which tensors of a checkpoint's files hold the weight of a site: files may hold experts one by one."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from fp4rl.models.packed.weight import Stored
from fp4rl.sites.walk import Site
from fp4rl.spec.errors import InvalidValueError, NotFoundError, nearest

T = TypeVar("T", bound=Stored)

# What the files of a mixture call the matrices that are stacked in memory; those of one name each are rows of one.
_IN_FILES: dict[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (("up_proj",),),  # without a gate
    "down_proj": (("down_proj",), ("w2",)),
}


def tensors_of(site: Site, stored: Mapping[str, T], folder: str | Path) -> list[tuple[T, ...]]:
    """Return the tensors of a site: its own alone, or, where experts lie one by one, for each those whose rows make it.

    `stored` has the tensors by their names in memory. Raises NotFoundError for what the files do not hold,
    InvalidValueError for another shape than config.json says.
    """
    experts = site.kind == "experts"
    name = site.name if experts and site.name in stored else f"{site.name}.weight"
    if experts and name not in stored:
        return _one_by_one(site, stored, folder)
    if name not in stored:
        raise NotFoundError(f"{folder}: no tensor {name!r} in its safetensors files{nearest(name, stored)}")
    shape = (*site.shape[:-2], *site.shape[:-3:-1]) if site.transposed else site.shape
    if list(stored[name].shape) != list(shape):
        raise InvalidValueError(f"{folder}: {name} is {list(stored[name].shape)}, but config.json says {list(shape)}")
    return [(stored[name],)]


def _one_by_one(site: Site, stored: Mapping[str, T], folder: str | Path) -> list[tuple[T, ...]]:
    layer = site.name.partition(".experts.")[0].rpartition(".")[0]  # Mixtral's files name the block otherwise
    for names in _IN_FILES.get(str(site.parameter), ()):
        pattern = re.compile(rf"{re.escape(layer)}\.\w+\.experts\.(\d+)\.({'|'.join(names)})\.weight")
        matches = {(int(m[1]), m[2]): stored[name] for name in stored if (m := pattern.fullmatch(name))}
        if len(matches) == site.shape[0] * len(names):
            matrices = [tuple(matches[expert, name] for name in names) for expert in range(site.shape[0])]
            _require_shape(site, matrices[0], folder)
            return matrices
    raise NotFoundError(
        f"{folder}: its safetensors files name no experts that make up {site.name}; scan without weights_only"
    )


def _require_shape(site: Site, tensors: tuple[Stored, ...], folder: str | Path) -> None:
    rows, columns = sum(tensor.shape[0] for tensor in tensors), tensors[0].shape[-1]
    if (rows, columns) != site.shape[1:]:
        made, said = f"{tensors[0].name} and its like make [{rows}, {columns}]", list(site.shape[1:])
        raise InvalidValueError(f"{folder}: {made}, but config.json says {said}")
