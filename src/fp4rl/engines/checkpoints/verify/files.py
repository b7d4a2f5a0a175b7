"""Whether a folder is whole: files as they were written, tensors where the index says."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from fp4rl.engines.checkpoints.export import RECORD, sha256
from fp4rl.engines.checkpoints.verify.findings import Check
from fp4rl.models.fit import readable
from fp4rl.spec.errors import InvalidValueError, NotFoundError, shown

_KEYS = {"layout", "run", "spec_digest", "injection", "sites_digest", "overridden", "sha256"}
_READ = (".safetensors", ".json", ".jinja", ".txt", ".model", ".py", ".bin")  # by engines and tokenizers


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
    if not isinstance(record, dict) or not isinstance(record.get("sha256"), dict) or not record.keys() >= _KEYS:
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
    for name in () if record is None else sorted(_not_recorded(out, record["sha256"])):
        check.differs(name, f"is not in {RECORD}: it was not written by this export, and engines may load it", files=1)
    _index(out, check)
    return check


def recorded(
    out: Path, record: Mapping[str, Any], method: str | None, runs: Mapping[str, str | None] | None, check: Check
) -> None:
    """Compare what the export wrote down with the folder, its card and its run (`runs`: keys of the record)."""
    method = (method or "bf16").partition(" ")[0].replace("-", "_").lower().replace("ascendv1", "ascend_v1")
    if record["layout"] != method:
        check.differs(RECORD, f"says layout {shown(record['layout'])}, and the folder is {method}", files=1)
    for key, now in (runs or {}).items():
        if record.get(key) != now:
            check.differs(RECORD, f"says {key} {shown(record.get(key))}, and it was made from {shown(now)}", files=1)
    card = (out / "README.md").read_text(encoding="utf-8") if (out / "README.md").is_file() else ""
    said = [line.partition(":** ")[2] for line in card.splitlines() if line.startswith("> **Written all the same")]
    if card and said != record["overridden"]:
        how = f"says that {shown(record['overridden'])} was overridden, and README.md {shown(said)}"
        check.differs(RECORD, how, files=1)


def _not_recorded(out: Path, known: Mapping[str, str]) -> Iterator[str]:
    """Yield the files that an engine may read, or that every export writes, and that the record does not name."""
    for file in out.rglob("*"):
        name = file.relative_to(out).as_posix()
        read = file.suffix in _READ or name == "README.md"
        if file.is_file() and read and name not in (*known, RECORD) and not any(p[0] == "." for p in name.split("/")):
            yield name


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
