"""The table of traps is complete, and what it points at is there: what catches each, and a test that plants it."""

import ast
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from fp4rl.lab.preflight.preflight import GROUPS, checks
from fp4rl.lab.preflight.traps import traps

TESTS = Path(__file__).parents[2]


@cache
def named_in(file):
    """The names of the tests in a file, those in classes too."""
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_the_traps_are_numbered_without_a_gap():
    assert [*traps()] == [f"P{number:02}" for number in range(1, len(traps()) + 1)]
    assert len(traps()) >= 50


@pytest.mark.parametrize("number", traps())
def test_what_catches_a_trap_and_the_tests_that_plant_it_are_there(number):
    own = traps()[number]
    for pointer in (name for names in own.caught.values() for name in names):
        module, _, name = pointer.partition(":")
        assert hasattr(import_module(f"fp4rl.{module}"), name), pointer
    assert own.tests
    for test in own.tests:
        file, _, name = test.partition("::")
        assert name in named_in(file), test


@pytest.mark.parametrize("needs", GROUPS)
def test_every_check_is_of_traps_that_say_so(needs):
    """The table names, of each trap that a check is about, a room of these checks before the run."""
    for check in checks(needs):
        assert check.traps
        for number in check.traps:
            assert any(name.startswith("lab.preflight.") for name in traps()[number].caught["before"]), (
                check.name,
                number,
            )
