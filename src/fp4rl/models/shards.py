"""Reads weights from safetensors files a few rows at a time, so that a checkpoint may be larger than memory.

The files are read, not mapped: mapped pages would count as this process's memory.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from fp4rl.models.fit import readable
from fp4rl.spec.errors import InvalidValueError, NotFoundError

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NARROW = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu}
_WHOLE = {"U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}
_DTYPES = {**_FLOATS, **_NARROW, **_WHOLE, "BOOL": torch.bool}
_HEADER_LIMIT = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor on disk: file, first byte, dtype, shape."""

    name: str
    file: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of values."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """What it takes on disk."""
        return self.elements * self.dtype.itemsize

    @property
    def cut_short(self) -> InvalidValueError:
        """What to raise where the file ends before the tensor does."""
        return InvalidValueError(f"{self.file}: the file ends inside {self.name!r}; copy it anew")

    def read(self) -> Tensor:
        """Return the whole tensor in its stored dtype."""
        return self._values(0, self.elements).view(self.shape)

    def rows(self, at_once: int, columns: int | None = None) -> Iterator[Tensor]:
        """Yield the tensor as [rows, columns] in pieces of at most `at_once` rows; leading axes become rows.

        `columns`: so many values are a row, in place of the last axis.
        """
        columns = columns or (self.shape[-1] if self.shape else 1)
        count = self.elements // max(columns, 1)
        for first in range(0, count, at_once):
            take = min(at_once, count - first)
            yield self._values(first * columns, take * columns).view(take, columns)

    def _values(self, first: int, count: int) -> Tensor:
        size = self.dtype.itemsize
        buffer = bytearray(count * size)
        with self.file.open("rb") as handle:
            handle.seek(self.start + first * size)
            if handle.readinto(buffer) != len(buffer):
                raise self.cut_short
        return torch.frombuffer(buffer, dtype=self.dtype) if count else torch.empty(0, dtype=self.dtype)


def stored_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """Return every tensor of wide floats of a checkpoint folder (one file, or shards with an index), in file order.

    Raises NotFoundError for no safetensors file or a missing shard, InvalidValueError for what cannot be read.
    """
    return {name: tensor for name, tensor in _listed(folder, _FLOATS).items() if tensor is not None}


def all_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """Return every tensor of a checkpoint folder; raises what `stored_tensors` does, for a dtype not known
    here, and for a file that ends too early."""
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in _listed(folder, _DTYPES).items():
        if tensor is None:
            raise InvalidValueError(f"{folder}: tensor {name!r} is of a dtype that nothing here reads")
        if tensor.start + tensor.bytes > tensor.file.stat().st_size:
            raise tensor.cut_short
        tensors[name] = tensor
    return tensors


def _listed(folder: str | Path, dtypes: dict[str, torch.dtype]) -> dict[str, StoredTensor | None]:
    path = Path(folder)
    tensors: dict[str, StoredTensor | None] = {}
    with readable("the safetensors", path):
        files = _files(path)
        if not files:
            raise NotFoundError(f"{path}: no safetensors file; give a Hugging Face model folder")
        for file in files:
            tensors |= dict(_contents(file, dtypes))
    return tensors


def _files(path: Path) -> list[Path]:
    indices = [path / "model.safetensors.index.json", *sorted(path.glob("quant_model*.safetensors.index.json"))]
    index = next((file for file in indices if file.is_file()), None)  # the second: AscendV1's
    if index is None:
        return sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for name in names:
        if not (path / name).is_file():
            raise NotFoundError(f"{path}: the index names {name}, which is not there; copy the checkpoint anew")
    return [path / name for name in names]


def _contents(file: Path, dtypes: dict[str, torch.dtype]) -> Iterator[tuple[str, StoredTensor | None]]:
    """Yield names and tensors of a file, None for those of other dtypes.

    It holds the header's length (8 bytes, little endian), the header in JSON, and the data.
    """
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        try:
            header = json.loads(handle.read(length)) if length <= _HEADER_LIMIT else None
        except ValueError:
            header = None
    if header is None:
        raise InvalidValueError(f"{file}: not a safetensors file")
    for name, entry in header.items():
        if name != "__metadata__":
            start, dtype = 8 + length + entry["data_offsets"][0], dtypes.get(entry["dtype"])
            tensor = None if dtype is None else StoredTensor(name, file, start, dtype, tuple(entry["shape"]))
            yield name, tensor
