"""The checkpoint that is verified: its tensors by their unquantized names, packed or not."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fp4rl.models.fit import readable
from fp4rl.models.packed.folder import opened
from fp4rl.models.packed.weight import StoredWeight
from fp4rl.models.shards import StoredTensor, all_tensors


@dataclass(frozen=True)
class Checkpoint:
    """A folder with weights. `method` says whose packing it has, None where its weights are plain; `mode` is the one of
    all packed weights, None where there is none."""

    folder: Path
    method: str | None
    tensors: Mapping[str, StoredTensor | StoredWeight] = field(repr=False)
    mode: str | None = None

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Open a folder; raises InvalidValueError, in one line, for what cannot be read."""
        with readable("config.json", folder):
            json.loads((folder / "config.json").read_text(encoding="utf-8"))
        packed = opened(folder)
        if packed is None:
            return cls(folder, None, all_tensors(folder))
        return cls(folder, packed.method, packed.tensors, packed.mode)

    def packed(self, name: str) -> StoredWeight | None:
        """Return a tensor that is stored as codes and scales; None for any other."""
        tensor = self.tensors[name]
        return tensor if isinstance(tensor, StoredWeight) else None

    def value(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return the values of a tensor; packed ones as `dtype` holds them."""
        tensor = self.tensors[name]
        return tensor.values(dtype) if isinstance(tensor, StoredWeight) else tensor.read()
