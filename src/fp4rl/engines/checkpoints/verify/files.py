"""Whether a folder is whole: files as they were written, tensors where the index says."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from fp4rl.engines.checkpoints.export import RECORD, sha256
from fp4rl.engines.checkpoints.verify.findings import Check
from fp4rl.models.fit import readable
from fp4rl.spec.errors import InvalidValueError, NotFoundError


def read_record(out: Path) -> Mapping[str, Any] | None:
    """Return what the export wrote down; None in folders of other tools.

    Raises NotFoundError for no folder with weights, InvalidValueError for a record that cannot be read.
    """
    if not out.is_dir():
        raise NotFoundError(f"there is no folder {out}; name one that `fp4rl export` or another packer wrote")
    if not any(out.glob("*.safetensors")) and not (out / RECORD).is_file():
        raise NotFoundError(f"{out}: no safetensors file; name a folder that `fp4rl export` or another packer wrote")
    if not (out / RECORD).is_file():
        return None
    with readable(RECORD, out):
        record: Any = json.loads((out / RECORD).read_text(encoding="utf-8"))
    if not isinstance(record, dict) or not isinstance(record.get("sha256"), dict):
        raise InvalidValueError(f"{out / RECORD} is not what `fp4rl export` writes; export it anew")
    return record


def files(out: Path, record: Mapping[str, Any] | None) -> Check:
    """Compare every file with its checksum, and the index with the tensors in the files."""
    check = Check("files")
    if record is None:
        check.notes.append(f"no {RECORD}: not written by fp4rl, so there are no checksums to compare with")
    for name, written in (record or {"sha256": {}})["sha256"].items():
        check.count(files=1)
        if not (out / name).is_file():
            check.differs(name, "is missing", files=1)
        elif (now := sha256(out / name)) != written:
            check.differs(
                name, f"is not the file that was written: sha256 {now[:12]}, recorded {written[:12]}", files=1
            )
    if record is not None:
        for file in sorted(out.glob("*.safetensors")):
            if file.name not in record["sha256"]:
                check.differs(file.name, "was not written by this export, and engines may load it", files=1)
    _index(out, check)
    return check


def _index(out: Path, check: Check) -> None:
    index = next(iter(sorted(out.glob("*.safetensors.index.json"))), None)
    held = {file.name: _tensors(file, check) for file in sorted(out.glob("*.safetensors"))}
    check.count(tensors=sum(map(len, held.values())))
    if index is None:
        return
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        listed = {str(tensor): str(file) for tensor, file in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        check.differs(index.name, "cannot be read as an index", files=1)
        return
    for tensor, file in listed.items():
        if file not in held:
            check.differs(tensor, f"lies in {file} by the index, which is not there", tensors=1)
        elif tensor not in held[file]:
            check.differs(tensor, f"lies in {file} by the index, which does not hold it", tensors=1)
    for file, tensors in held.items():
        for tensor in tensors:
            if listed.get(tensor) != file:
                check.differs(tensor, f"lies in {file}, by the index {listed.get(tensor, 'nowhere')}", tensors=1)


def _tensors(file: Path, check: Check) -> list[str]:
    try:
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    except Exception as error:  # safetensors raises an exception of its own
        check.differs(file.name, f"cannot be read: {str(error).splitlines()[0]}", files=1)
        return []
