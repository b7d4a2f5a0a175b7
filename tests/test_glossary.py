"""Names of the code are those of the field: words of the earlier dialect do not come back (docs/glossary.md)."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "fp4rl"
# As any part of a name (`unharmed_weights`, `KeptCopy`), and what says it instead.
PARTS = {
    "harm": "quantization error, injected",
    "harmed": "injected",
    "unharmed": "unchanged",
    "heal": "noise",
    "forewarn": "warnings",
    "mistakes": "validation errors",
    "complaints": "validation errors",
    "laps": "step timer",
    "corrupted": "apply_error",
    "spared": "leave_one_out",
    "wish": "ScanRequest",
    "anyway": "force",
    "hired": "spawn",
    "dismiss": "stop",
    "doubt": "revalidate",
    "refusals": "validate",
}
# As a whole name, which could mean anything.
WHOLE = {"found", "one", "asked", "there", "moved", "acting", "sound", "prove", "place", "past", "recall", "remembered"}
WHOLE |= {"not_here", "made_from_others", "set_aside", "carry_out", "judge", "door"}
CLASSES = {"NotThere", "BadValue", "Course", "Courses", "Still", "Standing", "Parts", "Hooks", "Listeners", "Attempt"}
CLASSES |= {"Past", "Watch", "KeptCopy", "Chance", "Wish", "Together", "Place", "Acting"}


def defined(tree: ast.AST) -> Iterator[str]:
    """Every name that a module defines: classes, functions, parameters, variables and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def wrong(name: str) -> bool:
    """Whether a name, or a part of it, is of the dialect."""
    parts = {part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)}
    return name in CLASSES or name.strip("_") in WHOLE or bool(parts & PARTS.keys())


def test_no_name_is_of_the_earlier_dialect():
    found = {
        (str(file.relative_to(SRC)), name)
        for file in SRC.rglob("*.py")
        for name in defined(ast.parse(file.read_text(encoding="utf-8")))
        if wrong(name)
    }
    assert not found


@pytest.mark.parametrize(
    ("name", "old"),
    [
        ("master_unharmed", True),
        ("KeptCopy", True),
        ("_acting", True),
        ("Course", True),
        ("found", True),
        ("health", False),
        ("charm", False),
        ("not_found", False),
        ("Watched", False),
    ],
)
def test_a_name_is_held_against_whole_words(name, old):
    assert wrong(name) is old
