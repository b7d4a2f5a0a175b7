"""The house itself: its floors hold, and describing things never costs an import of torch."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fp4rl

ROOT = Path(__file__).parents[1]
TORCH_FREE = [
    ["--help"],
    ["--version"],
    ["formats"],
    ["keys"],
    ["plan", "catalogue/quickstart"],
    ["run", "--help"],
    ["schedule", "--help"],
    ["runs", "--help"],
]


def test_the_floors_hold():
    found = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout


def test_a_planted_import_of_a_higher_floor_is_caught(tmp_path):
    package = tmp_path / "fp4rl"
    for room in ("spec", "numerics"):
        (package / room).mkdir(parents=True)
        (package / room / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "spec" / "wrong.py").write_text("import fp4rl.numerics\n")
    (tmp_path / ".importlinter").write_text(
        "[importlinter]\nroot_package = fp4rl\n\n[importlinter:contract:1]\nname = floors\ntype = layers\n"
        "layers =\n    fp4rl.numerics\n    fp4rl.spec\n"
    )
    found = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 1, found.stdout + found.stderr


@pytest.mark.parametrize("arguments", TORCH_FREE, ids=" ".join)
def test_describing_never_imports_torch(arguments, tmp_path):
    program = (
        "import sys\nfrom fp4rl.cli.main import main\n"
        f"code = main({arguments!r})\n"
        "heavy = [m for m in ('torch', 'transformers', 'trl', 'numpy', 'scipy') if m in sys.modules]\n"
        "assert code == 0, code\nassert not heavy, heavy\n"
    )
    found = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_listing_runs_never_imports_what_statistics_need(tmp_path):
    """Kind: a shared module that pulls a library of seconds into a verb that does without it."""
    program = (
        "import sys\nfrom fp4rl.cli.main import main\nmain(['runs'])\n"
        "heavy = [m for m in ('torch', 'scipy', 'pyarrow') if m in sys.modules]\nassert not heavy, heavy\n"
    )
    (tmp_path / "runs").mkdir()
    found = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_importing_the_package_is_free():
    program = "import sys, fp4rl\nassert 'torch' not in sys.modules and 'pydantic' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_public_name_has_a_home():
    """Read, not imported: the homes import torch, transformers and trl, and other tests do that anyway."""
    for name, home in fp4rl._HOMES.items():
        tree = ast.parse((ROOT / "src" / Path(*home.split("."))).with_suffix(".py").read_text())
        defined = {getattr(node, "name", None) for node in tree.body}
        for node in tree.body:
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                defined |= {target.id for target in targets if isinstance(target, ast.Name)}
        assert name in defined, f"fp4rl.{name} is not in {home}"


def test_a_name_that_is_not_there_is_an_attribute_error_that_lists_those_that_are():
    with pytest.raises(AttributeError, match=r"it offers .*fake_quantize"):
        fp4rl.fake_quantise  # noqa: B018


_TAG = re.compile(r"\[/?(bold|dim|italic|red|green|yellow|blue|cyan|magenta|link)\b[^\]]*\]|\[/\]")


def test_no_source_writes_markup_or_makes_a_console_of_its_own():
    found = []
    for file in (ROOT / "src" / "fp4rl").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and _TAG.search(node.value):
                found.append(f"{file.name}:{node.lineno}: markup in a string; use styled() of cli/terminal.py")
            if isinstance(node, ast.Attribute) and node.attr == "from_markup":
                found.append(f"{file.name}:{node.lineno}: from_markup; use styled() of cli/terminal.py")
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Console" and file.name != "terminal.py":
                found.append(f"{file.name}:{node.lineno}: a console; take console() of cli/terminal.py")
    assert not found, found
