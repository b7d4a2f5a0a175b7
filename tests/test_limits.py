"""Limits of size, and imports without cycles. Complexity and arguments are ruff's: pyproject.toml."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
FILE, FUNCTION = 300, 60


def too_long(source: Path) -> Iterator[str]:
    """Files and functions over the limits, in physical lines."""
    for file in sorted(source.rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > FILE:
            yield f"{file.relative_to(source)}: {lines} lines, at most {FILE}"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                if size > FUNCTION:
                    yield f"{file.relative_to(source)}: {node.name} has {size} lines, at most {FUNCTION}"


def imports(source: Path) -> dict[str, set[str]]:
    """Module -> modules of `source` that it imports, also inside functions."""
    files = {
        ".".join(f.relative_to(source).with_suffix("").parts).removesuffix(".__init__"): f for f in source.rglob("*.py")
    }
    graph: dict[str, set[str]] = {}
    for module, file in files.items():
        named = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                own = {f"{node.module}.{alias.name}" for alias in node.names} & files.keys()
                named |= own or {node.module}
        graph[module] = (named & files.keys()) - {module}
    return graph


def test_no_file_and_no_function_is_too_long():
    assert list(too_long(SOURCE)) == []


def test_no_module_imports_itself_by_way_of_others():
    try:
        TopologicalSorter(imports(SOURCE)).prepare()
    except CycleError as error:
        pytest.fail(f"a cycle of imports: {' -> '.join(error.args[1])}")


def test_both_find_what_is_planted(tmp_path):
    room = tmp_path / "fp4rl"
    room.mkdir()
    (room / "__init__.py").write_text("")
    (room / "one.py").write_text("def f():\n    from fp4rl.two import g\n\n    return g\n" + "\n" * FILE)
    (room / "two.py").write_text(
        "import fp4rl.one\n\n\ndef g():\n" + "    x = fp4rl.one\n" * FUNCTION + "    return x\n"
    )
    assert [line.partition(",")[0] for line in too_long(tmp_path)] == [
        f"fp4rl/one.py: {FILE + 4} lines",
        f"fp4rl/two.py: g has {FUNCTION + 2} lines",
    ]
    with pytest.raises(CycleError):
        TopologicalSorter(imports(tmp_path)).prepare()
