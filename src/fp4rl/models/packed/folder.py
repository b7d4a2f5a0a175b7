"""A folder with packed weights: which tool's layout it has, every weight by its unquantized name, and its values."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp4rl.models.fit import readable
from fp4rl.models.packed import ascend_v1, compressed_tensors, gpt_oss, modelopt
from fp4rl.models.packed.contents import Contents
from fp4rl.models.packed.weight import Stored, StoredWeight
from fp4rl.models.shards import StoredTensor, all_tensors
from fp4rl.numerics.packing import Packed, Quantized
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.formats import Format
from fp4rl.spec.points import MODES

# Where tools record that they quantized a checkpoint: transformers and most others; older llm-compressor.
IN_CONFIG = ("quantization_config", "compression_config")
# Files of their own: NVIDIA ModelOpt, AutoGPTQ, AutoAWQ and MindStudio (Ascend).
_FILES = (modelopt.FILE, "quantize_config.json", "quant_config.json", ascend_v1.DESCRIPTION)
_Read = Callable[[Path, Mapping[str, Any], Mapping[str, StoredTensor]], Contents]
_READ: Mapping[str, _Read] = {
    "compressed-tensors": compressed_tensors.contents,
    "modelopt": modelopt.contents,
    "mxfp4": gpt_oss.contents,
    modelopt.FILE: modelopt.contents,
    ascend_v1.DESCRIPTION: ascend_v1.contents,
}


@dataclass(frozen=True)
class PackedFolder:
    """What a folder of packed weights holds; nothing but headers and static factors has been read.

    `method` says in words whose layout it is. `weights` are the packed ones by their name in the unquantized files,
    such as `model.layers.0.self_attn.q_proj.weight`; `plain` are all other tensors.
    """

    path: Path
    method: str
    weights: Mapping[str, StoredWeight]
    plain: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, folder: str | Path) -> "PackedFolder":
        """Open a folder; raises InvalidValueError, in one line that names what is wrong, for what cannot be read."""
        packed = opened(Path(folder))
        if packed is None:
            raise InvalidValueError(f"{folder}: its weights are not packed; nothing there says that they are quantized")
        return packed

    @property
    def mode(self) -> str | None:
        """The mode of all packed weights, such as `w4a4`; None where they differ or no mode is that."""
        kinds = {(_kind(weight.fmt), _kind(weight.input)) for weight in self.weights.values()}
        if len(kinds) > 1 or any(weight.unread_input for weight in self.weights.values()):
            return None
        known = {(_kind(mode.weight), _kind(mode.input)): mode.name for mode in MODES.values() if not mode.output}
        return known.get(kinds.pop())

    def quantized(self, name: str, dtype: torch.dtype = torch.bfloat16) -> Packed | Quantized:
        """Return codes and scales of a packed weight."""
        return self.weights[name].quantized(dtype)

    def values(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return a packed weight's values in its unquantized shape, as the library of its layout decodes them."""
        return self.weights[name].values(dtype)

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """Every tensor of the unquantized model by name; each is read where it is asked for its values."""
        return {**self.plain, **self.weights}


def _kind(fmt: Format | None) -> tuple[str, str] | None:
    return (fmt.element.name, fmt.scale) if fmt else None


def opened(folder: Path) -> PackedFolder | None:
    """Open a folder of packed weights; None where nothing says that its weights are quantized.

    Raises InvalidValueError for a method that is not read here, and for what is missing or wrong.
    """
    said = _said(folder)
    if said is None:
        return None
    method, table, words = said
    if method not in _READ:
        raise InvalidValueError(
            f"the model in {str(folder)!r} is quantized already ({words}): its weights hold that rounding for good; "
            "give the unquantized folder that it was made from"
        )
    with readable(f"what {words} packed", folder):
        contents = _READ[method](folder, table, all_tensors(folder))
    if not contents.weights:
        raise InvalidValueError(f"{folder}: {words} says that weights are packed, but its files hold no packed weight")
    return PackedFolder(folder, contents.method, contents.weights, contents.plain)


def checkpoint_tensors(folder: str | Path) -> Mapping[str, Stored]:
    """Return every tensor of a checkpoint folder under its unquantized name, packed or not.

    Raises what `opened` and `all_tensors` do.
    """
    packed = opened(Path(folder))
    return all_tensors(folder) if packed is None else packed.tensors


def _said(folder: Path) -> tuple[str, Mapping[str, Any], str] | None:
    """Return what a folder says of its quantization: the method, its settings, and both in words."""
    config = _table(_json(folder / "config.json"))
    for part, key in product([config, *map(config.get, ("text_config", "llm_config"))], IN_CONFIG):
        if said := _table(part).get(key):
            table = _table(said)
            names = [str(name) for name in map(table.get, ("quant_method", "quant_algo", "format")) if name]
            older = "config_groups" in table and not table.get("quant_method")  # before it named its method
            words = f"{key}: {names[0] if names else 'of a kind that it does not name'}"
            return "compressed-tensors" if older else "".join(names[:1]), table, words
    file = next((name for name in _FILES if (folder / name).is_file()), None)
    return None if file is None else (file, _table(_json(folder / file)), file)


def _json(file: Path) -> Any:
    """Return a file's content; None where it cannot be read, which whoever needs it reports."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _table(part: Any) -> dict[str, Any]:
    return part if isinstance(part, dict) else {}
