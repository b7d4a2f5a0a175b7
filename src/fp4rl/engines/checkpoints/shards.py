"""Writes tensors into safetensors files as they come: at most one file's worth of them is held."""

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from fp4rl.engines.checkpoints.layouts.layout import Layout, Named, Stored


def write_tensors(folder: Path, layout: Layout, given: Iterable[Named]) -> Stored:
    """Write all tensors, and the index where there are several files.

    A file is begun anew before it would reach the layout's bytes. Names of files count them, so they are given last.
    """
    parts: list[dict[str, Tensor]] = [{}]
    names: list[tuple[str, ...]] = []
    size = total = 0
    for name, tensor in given:
        if parts[-1] and size + tensor.nbytes >= layout.file_bytes:
            names.append(_save(folder, len(names), parts[-1], layout))
            parts, size = [{}], 0
        parts[-1][name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    names.append(_save(folder, len(names), parts.pop(), layout))
    return _named(folder, layout, names, total)


def _save(folder: Path, number: int, tensors: dict[str, Tensor], layout: Layout) -> tuple[str, ...]:
    file = folder / f"{number}.part"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, layout.metadata)
    file.chmod(0o644)  # as the files beside it; safetensors lets the owner alone read it
    return tuple(tensors)


def _named(folder: Path, layout: Layout, names: list[tuple[str, ...]], total: int) -> Stored:
    alone = len(names) == 1 and not layout.always_sharded
    files = {}
    for number, own in enumerate(names):
        count = "" if alone else f"-{number + 1:05d}-of-{len(names):05d}"
        file = f"{layout.stem}{count}.safetensors"
        (folder / f"{number}.part").replace(folder / file)
        files[file] = own
    stored = Stored(files, total)
    if not alone:
        index = {"metadata": {"total_size": total}, "weight_map": stored.file_of}
        (folder / layout.index).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return stored
