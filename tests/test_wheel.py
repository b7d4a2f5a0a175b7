"""What is installed is what is here: the wheel holds every file that the package needs, and has one version."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fp4rl

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_wheel_is_built_and_works_away_from_the_checkout(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    built = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"fp4rl-{fp4rl.__version__}-")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    kinds = {".py", ".c", ".h", ".j2", ".js", ".css", ".yaml", ".typed"}
    here = {f.relative_to(ROOT / "src") for f in (ROOT / "src").rglob("*") if f.suffix in kinds or f.name == "py.typed"}
    assert here <= {f.relative_to(site) for f in site.rglob("*")}

    program = "import fp4rl, sys; from fp4rl.cli.main import main; print(fp4rl.__file__); sys.exit(main(sys.argv[1:]))"
    for verb in (["--version"], ["plan", "catalogue/quickstart"], ["formats", "mxfp4"]):
        ran = subprocess.run(
            [sys.executable, "-c", program, *verb],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.startswith(str(site)), ran.stdout
