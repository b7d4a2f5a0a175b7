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
    ["preflight", "catalogue/quickstart", "--static"],
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


def of_one_device(tree: ast.AST) -> list[str]:
    """Return the lines that ask for CUDA or an NPU by name, where torch.accelerator and get_device_module serve all."""
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr="cuda" | "npu" | "is_cuda" | "is_npu"):
                found.append(f"{node.lineno}: {ast.unparse(node)}")
            case ast.Import(names=names) if any(re.match(r"torch(\.cuda|\.npu|_npu)\b", name.name) for name in names):
                found.append(f"{node.lineno}: {ast.unparse(node)}")
            case ast.ImportFrom(module=module) if re.match(r"torch(\.cuda|\.npu|_npu)\b", module or ""):
                found.append(f"{node.lineno}: {ast.unparse(node)}")
            case ast.Constant(value=str() as word) if re.fullmatch(r"(cuda|npu)(:\d+)?", word):
                found.append(f"{node.lineno}: {word!r}")
    return found


# Where the names of devices are words of someone else: the choice of the Triton kernels, which are written for CUDA
# alone, by the device of the tensor that is rounded; the variables by which each driver is told what a process sees;
# and verl's own names of devices and extras.
NAMED = (
    "src/fp4rl/numerics/dispatch.py",
    "src/fp4rl/engines/executors/devices.py",
    "src/fp4rl/engines/verl/",
)


def test_no_device_is_asked_for_by_name():
    files = {file.relative_to(ROOT).as_posix(): file for file in sorted((ROOT / "src" / "fp4rl").rglob("*.py"))}
    found = {
        name: lines for name, file in files.items() if (lines := of_one_device(ast.parse(file.read_text("utf-8"))))
    }
    asked = {name: [line for line in lines if not line.endswith("'")] for name, lines in found.items()}
    assert all(name.startswith(NAMED) for name in found), found
    assert not any(asked.values()), asked


def test_a_planted_query_of_one_device_is_noticed():
    planted = """
import torch.cuda
from torch.cuda import amp
import torch_npu
if torch.cuda.is_available() or x.is_cuda: x = x.cuda()
y = x.to("cuda:0").npu()
import torch; torch.accelerator.current_accelerator()
"""
    lines = [found.partition(":")[0] for found in of_one_device(ast.parse(planted))]
    assert sorted(lines) == ["2", "3", "4", "5", "5", "5", "6", "6"]


# A function's docstring begins with what it does. Add a verb here rather than writing around it.
VERBS = """
Add Adjust Aggregate Announce Answer Append Apply Audit Average Begin Book Build Call Check Choose Clamp Clear Clip
Close Collect Combine Compare Compile Complete Compute Concatenate Convert Copy Correct Correlate Count Create Cut
Decide Declare Delete Derive Describe Draw Drop Emit Empty End Enter Estimate Evaluate Execute Exit Expand Explain
Export Extend Extract Fill Filter Find Fit Flatten Force Forward Gather Generate Give Go Group Hash Hold Import Infer
Insert Install Intercept Invalidate Iterate Join Judge Keep Leave Let List Load Log Look Make Map Mark Mask Measure
Merge Move Name Note Number Open Pack Pad Parse Pass Plan Plot Pool Predict Prepare Prescribe Print Probe Process Put
Quantize Raise Read Rebuild Receive Record Reduce Register Remove Rename Render Replace Replay Report Request Require
Resample Reset Resolve Restore Resume Return Reverse Rotate Round Run Sample Save Scale Scan Score Search Seed Select
Send Set Show Shuffle Sort Split Start Stop Store Sum Summarise Swap Switch Synchronise Take Test Tokenize Train
Transform Translate Turn Undo Unpack Unwrap Update Use Validate View Wait Walk Warn Watch Wrap Write Yield
"""


def without_a_verb(tree: ast.AST) -> list[str]:
    """Return the public functions whose docstring begins with no verb; properties are things and may have a noun."""
    found = []
    for node in ast.iter_child_nodes(tree):
        private = getattr(node, "name", "").startswith("_")
        if isinstance(node, ast.ClassDef) and not private:
            found += without_a_verb(node)
        elif isinstance(node, ast.FunctionDef) and not private:
            decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
            first = (ast.get_docstring(node) or "Return").split()[0].rstrip(".,:;")
            if first not in VERBS.split() and not decorators & {
                "property",
                "cached_property",
                "functools.cached_property",
            }:
                found.append(f"{node.name}: {first}")
    return found


def test_the_docstring_of_a_public_function_begins_with_a_verb():
    wrong = {
        file.relative_to(ROOT).as_posix(): names
        for file in sorted((ROOT / "src" / "fp4rl").rglob("*.py"))
        if (names := without_a_verb(ast.parse(file.read_text(encoding="utf-8"))))
    }
    assert not wrong


def test_a_docstring_without_a_verb_is_noticed():
    planted = """
class Shape:
    def area(self): "The area."
    def draw(self): "Draw it: every line once."
    @property
    def width(self): "The width."
    def _hidden(self): "A helper."
def sides(): "What it is made of."
"""
    assert without_a_verb(ast.parse(planted)) == ["area: The", "sides: What"]
