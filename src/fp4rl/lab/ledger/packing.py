"""One evaluation's items as a handful of bytes, and back: a bit per problem and sample, in a fixed order."""

import hashlib
import json
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow
    from numpy.typing import NDArray

FLAGS = ("strict", "flexible", "formatted", "truncated")


@dataclass(frozen=True)
class PackedItems:
    """What the ledger stores of one evaluation: the list of its problems, and a row that refers to it."""

    problems: dict[str, Any]
    row: dict[str, Any]


def pack(table: "pyarrow.Table") -> PackedItems:
    """Rows of an items file, in the order of (problem, sample), so that equal problems give an equal list."""
    # By way of lists: pyarrow's compute functions import pandas where it is installed, which takes a second.
    columns = {name: table.column(name).to_pylist() for name in ("problem_id", "sample", *FLAGS, "length")}
    order = sorted(range(table.num_rows), key=lambda row: (columns["problem_id"][row], columns["sample"][row]))
    ids, samples = ([columns[name][row] for row in order] for name in ("problem_id", "sample"))
    text = json.dumps([ids, samples], separators=(",", ":"), ensure_ascii=False).encode()
    digest = hashlib.sha256(text).hexdigest()
    solved = {name: np.array([columns[name][row] is True for row in order], dtype=np.bool_) for name in FLAGS}
    flags = {name: np.packbits(bits).tobytes() for name, bits in solved.items()}
    lengths = [-1 if columns["length"][row] is None else columns["length"][row] for row in order]
    return PackedItems(
        {"digest": digest, "rows": len(ids), "packed": zlib.compress(text, 9)},
        {"problems": digest, **flags, "lengths": zlib.compress(np.array(lengths, dtype="<i4").tobytes(), 6)},
    )


def unpack_problems(packed: bytes) -> tuple[list[str], list[int]]:
    """(problem ids, samples), one of each per row."""
    ids, samples = json.loads(zlib.decompress(packed))
    return ids, samples


def unpack_flags(packed: bytes, rows: int) -> "NDArray[np.bool_]":
    """One flag of every row: bool [rows]."""
    return np.unpackbits(np.frombuffer(packed, np.uint8), count=rows).astype(np.bool_)


def unpack_lengths(packed: bytes) -> "NDArray[np.int32]":
    """Generated tokens of every row: int32 [rows], -1 where not known."""
    return np.frombuffer(zlib.decompress(packed), "<i4").astype(np.int32)
