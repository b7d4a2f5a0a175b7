"""CONTRIBUTING.md is executed: its blocks are applied to a copy of the package, its commands typed, its files counted.

The kind of fault: a recipe that does not work as it is written, or a forgotten piece that is noticed after sampling.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
_BLOCK = re.compile(r"^```(\w+)(?: +(\S+))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_COUNT = re.compile(r"New files: (\d+)\. Changed files: (\d+)\.")
WANTED = {
    *("A format", "A deployment", "A task", "A reward", "An algorithm", "A health check", "A score"),
    *("A noise schedule", "An executor", "A sampler", "A command-line verb", "A figure"),
}


@dataclass(frozen=True)
class Piece:
    """One block of code: a whole file, or a change to a file that exists."""

    path: str
    change: bool
    text: str

    def apply(self, package: Path, place: Path) -> None:
        target = (package if self.path.startswith("src/") else place) / self.path
        if not self.change:
            assert not self.path.startswith("src/") or not target.exists(), f"{self.path} is there already"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(self.text, encoding="utf-8")
            return
        lines = self.text.splitlines()
        assert all(line[:1] in (" ", "+", "-", "") for line in lines), f"{self.path}: a line without its mark"
        old, new = ("".join(f"{line[1:]}\n" for line in lines if line[:1] not in mark) for mark in (("+",), ("-",)))
        content = target.read_text(encoding="utf-8")
        assert content.count(old) == 1, f"{self.path} does not hold this once:\n{old}"
        target.write_text(content.replace(old, new), encoding="utf-8")


@dataclass(frozen=True)
class Command:
    """One line that is typed, and what its output shows."""

    line: str
    shown: tuple[str, ...]
    slow: bool


@dataclass(frozen=True)
class Recipe:
    """One section of the page."""

    name: str
    counts: tuple[int, int]
    pieces: tuple[Piece, ...]
    commands: tuple[Command, ...]

    @property
    def code(self) -> list[Piece]:
        """What adds the thing: pieces of the package, or a user's own modules where there are none."""
        inside = [piece for piece in self.pieces if piece.path.startswith("src/")]
        return inside or [piece for piece in self.pieces if piece.path.endswith(".py")]


def pieces_of(text: str) -> list[Piece]:
    return [
        Piece(path, kind == "diff", body) for kind, path, body in _BLOCK.findall(text) if kind != "console" and path
    ]


def recipe(section: str) -> Recipe:
    name, _, body = section.partition("\n")
    counts = _COUNT.search(body)
    assert counts, f"{name} does not say how many files it takes"
    commands = []
    for kind, path, text in _BLOCK.findall(body):
        if kind == "console":
            for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
                line, *shown = part.splitlines()
                commands.append(Command(line, tuple(" ".join(s.split()) for s in shown if s), path == "slow"))
    return Recipe(name, (int(counts[1]), int(counts[2])), tuple(pieces_of(body)), tuple(commands))


PREAMBLE, *SECTIONS = PAGE.split("\n### ")
SHARED = pieces_of(PREAMBLE)  # files that every recipe is tried with
RECIPES = [recipe(section) for section in SECTIONS]


def forgotten(one: Recipe, piece: Piece):
    """Pieces of the floors with torch show their absence when torch is imported, which takes longer."""
    late = one.commands[0].slow or (piece.path == "src/fp4rl/rl/losses.py")
    name = f"{one.name}, without {piece.path}, {one.pieces.index(piece)}"
    return pytest.param(one, piece, late, id=name, marks=[pytest.mark.slow] if late else [])


# A curve that is not listed is drawn nowhere, and nothing asks for it.
FORGETFUL = [forgotten(one, piece) for one in RECIPES if one.name != "A figure" for piece in one.code]


@pytest.fixture
def typed(tmp_path):
    """Type a command in a folder of its own, with a copy of the package that pieces can be applied to."""
    package, place, commands = tmp_path / "package", tmp_path / "place", tmp_path / "bin"
    shutil.copytree(ROOT / "src" / "fp4rl", package / "src" / "fp4rl")
    place.mkdir()
    commands.mkdir()
    (commands / "fp4rl").write_text(f'#!/bin/sh\nexec {sys.executable} -m fp4rl "$@"\n')
    (commands / "fp4rl").chmod(0o755)
    path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
    modules = os.pathsep.join([str(package / "src"), str(place)])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": modules, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}

    def run(line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", "-c", line], cwd=place, env=environment, capture_output=True, text=True)

    run.package, run.place = package, place
    return run


def follow(one: Recipe, typed, commands, left_out: Piece | None = None):
    for piece in (*SHARED, *one.pieces):
        if piece is not left_out:
            piece.apply(typed.package, typed.place)
    for command in commands:
        ended = typed(command.line)
        output = " ".join((ended.stdout + ended.stderr).split())
        yield command, ended, output


def test_every_recipe_is_there():
    assert {one.name for one in RECIPES} == WANTED


@pytest.mark.parametrize("one", RECIPES, ids=lambda one: one.name)
def test_a_recipe_takes_as_many_files_as_it_says(one):
    new = {piece.path for piece in one.code if not piece.change}
    changed = {piece.path for piece in one.code if piece.change}
    assert (len(new), len(changed)) == one.counts


@pytest.mark.parametrize("one", [one for one in RECIPES if not one.commands[0].slow], ids=lambda one: one.name)
def test_a_recipe_works_as_it_is_written(one, typed):
    quick = [command for command in one.commands if not command.slow]
    for command, ended, output in follow(one, typed, quick):
        assert ended.returncode == 0, f"{command.line}\n{ended.stdout}{ended.stderr}"
        assert all(line in output for line in command.shown), f"{command.line}\n{command.shown}\n{ended.stdout}"


@pytest.mark.slow
@pytest.mark.parametrize("one", [one for one in RECIPES if any(c.slow for c in one.commands)], ids=lambda one: one.name)
def test_a_recipe_trains_as_it_is_written(one, typed):
    for command, ended, output in follow(one, typed, one.commands):
        assert ended.returncode == 0, f"{command.line}\n{ended.stdout}{ended.stderr}"
        assert all(line in output for line in command.shown), f"{command.line}\n{command.shown}\n{ended.stdout}"


@pytest.mark.parametrize("one, left_out, late", FORGETFUL)
def test_a_forgotten_piece_is_an_error_before_anything_is_sampled(one, left_out, late, typed):
    """The last command of every recipe uses what it adds."""
    commands = [command for command in one.commands if late or not command.slow]
    *_, (command, ended, _) = follow(one, typed, commands, left_out)
    assert ended.returncode != 0, f"{command.line}\n{ended.stdout}{ended.stderr}"
    assert not list(typed.place.rglob("metrics.jsonl"))


@pytest.mark.parametrize("one", RECIPES, ids=lambda one: one.name)
def test_code_of_the_page_is_formatted_as_the_project_is(one, tmp_path):
    for piece in (*SHARED, *one.pieces):
        if piece.path.endswith(".py") and not piece.change:
            piece.apply(tmp_path, tmp_path)
            for check in (["format", "--check"], ["check", "--ignore", "T201"]):
                ruff = [Path(sys.executable).with_name("ruff"), *check, "--config", ROOT / "pyproject.toml"]
                ended = subprocess.run([*ruff, tmp_path / piece.path], capture_output=True, text=True)
                assert ended.returncode == 0, ended.stdout + ended.stderr
