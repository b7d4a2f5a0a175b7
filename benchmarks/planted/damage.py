"""Damage to files, drawn by hypothesis: what crashes, disks, editors and programs make of them."""

import hashlib
import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

FILES = ["sites.json", "spec.yaml", "result.json", "evidence.jsonl", "metrics.jsonl", "items/30-deployment.parquet"]
# A run's example costs a tenth of a second: a twentieth of them where not all of a night is asked for.
FEW = settings(max_examples=settings.default.max_examples // (20 if settings.default.max_examples < 1000 else 1))

# What no reader expects at a place, each the stand-in of a kind: another sort, another size, no number, no text.
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 0.5, -0.0, 10**30, 2**63, -(2**63), 1e308, 1e-320, float("nan"), float("inf")),
    *(
        "",
        " ",
        "x",
        "0",
        "1e400",
        "nan",
        "none",
        "true",
        "full",
        "w4a4",
        "mxfp4",
        "deployment",
        "../..",
        "/",
        "~",
        "~x",
    ),
    *(
        "[/think]",
        "[bold]",
        "a\nb",
        "\x1b[2J",
        "\u202e",
        "é",
        "😀",
        "x" * 400,
        "a.b.c",
        "*.q_proj",
        "[0-",
        "{question}",
    ),
    *([], {}, [[]], [None], [1, "a"], {"a": 1}, {"name": "mxfp4"}, {"name": []}, {"": {}}, ["full", "full"]),
]
odd = st.one_of(st.sampled_from(ODD), st.integers(), st.floats(), st.text(max_size=20)).map(deepcopy)
odd_keys = st.one_of(
    st.sampled_from(["", "a", "[x]", "[/x]", "a.b", "*", "0", "seed", "suite", "x" * 400]), st.text(max_size=9)
)


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every part of a nested value, its own first."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [above, *(path for key, part in below for path in places(part, (*above, key)))]


@st.composite
def changed(draw: Callable[..., Any], value: Any, most: int = 3) -> Any:
    """A nested value with up to `most` parts replaced, left out, added or renamed."""
    value = deepcopy(value)
    for _ in range(draw(st.integers(1, most))):
        known = places(value)
        path = known[draw(st.integers(0, len(known) - 1))]
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return draw(odd)
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        how = draw(st.sampled_from(["replace", "replace", "replace", "drop", "add", "rename"]))
        if how == "drop":
            del holder[path[-1]]
        elif how == "replace" or isinstance(holder, list):
            holder[path[-1]] = draw(odd)
        elif how == "add":
            holder[draw(odd_keys)] = draw(odd)
        else:
            holder[draw(odd_keys)] = holder.pop(path[-1])
    return value


@st.composite
def damage(draw: Callable[..., Any], content: bytes) -> bytes:
    """The bytes of a file as a crash, a disk or an editor leaves them."""
    at = draw(st.integers(0, len(content)))
    how = draw(
        st.sampled_from(["cut", "cut", "flip", "zeros", "twice", "insert", "empty", "drop line", "text", "deep"])
    )
    lines = content.splitlines(keepends=True)
    line = draw(st.integers(0, max(len(lines) - 1, 0)))
    match how:
        case "cut":
            return content[:at]
        case "flip":
            return (
                content[:at]
                + bytes(b ^ (1 << draw(st.integers(0, 7))) for b in content[at : at + 1])
                + content[at + 1 :]
            )
        case "zeros":
            return content[:at] + bytes(len(content) - at)
        case "twice":
            return b"".join([*lines[: line + 1], *lines[line:]])
        case "insert":
            return content[:at] + draw(st.binary(max_size=8)) + content[at:]
        case "empty":
            return b""
        case "drop line":
            return b"".join([*lines[:line], *lines[line + 1 :]])
        case "text":
            return draw(st.text(max_size=40)).encode()
    return b"[" * 2_000


@st.composite
def damaged_json(draw: Callable[..., Any], content: bytes) -> bytes:
    """JSON that is still JSON and says something else, in one of its lines where it has many."""
    lines = (
        content.splitlines()
        if content.count(b"\n") > 1 and content[:1] == b"{" and content[1:2] != b"\n"
        else [content]
    )
    line = draw(st.integers(0, len(lines) - 1))
    lines[line] = json.dumps(draw(changed(json.loads(lines[line])))).encode()
    return b"\n".join(lines) + b"\n"


@st.composite
def damages(draw: Callable[..., Any], folder: Path) -> list[tuple[str, "bytes | str"]]:
    """One to three files of a run: (name, what becomes of it)."""
    names = draw(st.lists(st.sampled_from(FILES), min_size=1, max_size=3, unique=True))
    return [(name, draw(one_damage(folder / name))) for name in names]


def one_damage(file: Path) -> Any:
    """What may become of one file: other bytes, or a word for what is there in its place."""
    content = file.read_bytes()
    kinds = [
        damage(content),
        damage(content),
        st.sampled_from(["gone", "folder", "link", "items/30-deployment.parquet"]),
    ]
    return st.one_of(*kinds, *([damaged_json(content)] * 3 if file.suffix.startswith(".json") else []))


def inflict(folder: Path, name: str, what: "bytes | str") -> None:
    """Let it happen to the file `name`."""
    file = folder / name
    if isinstance(what, bytes):
        file.write_bytes(what)
        return
    other = (folder / what).read_bytes() if (folder / what).is_file() else b""
    file.unlink()
    if what == "folder":
        file.mkdir()
    elif what == "link":
        file.symlink_to("nowhere")
    elif what != "gone":
        file.write_bytes(other)


def hashes(folder: Path) -> dict[str, str]:
    """Every file below `folder` with the digest of its content; links and folders with their kind."""
    return {
        str(path.relative_to(folder)): _digest(path)
        for path in sorted(folder.rglob("*"))
        if not path.name.startswith(".")
    }


def _digest(path: Path) -> str:
    if path.is_symlink() or not path.is_file():
        return "link" if path.is_symlink() else "folder"
    return hashlib.sha256(path.read_bytes()).hexdigest()
