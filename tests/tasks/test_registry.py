"""A task is one class and one line; what a class lacks is an error when it is imported."""

import subprocess
import sys

import pytest

from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.load import parse
from fp4rl.spec.task import Task
from fp4rl.spec.task_registry import TASKS
from fp4rl.tasks.gsm8k import Gsm8k


def test_a_description_becomes_the_task_of_its_name():
    described = parse(Experiment, {"task": {"name": "gsm8k", "path": "~/train.jsonl"}}, "")
    assert isinstance(described.task, Gsm8k)
    assert not described.task.path.startswith("~")
    assert [TASKS[name]().name for name in ("arithmetic",)] == ["arithmetic"]


def test_a_name_that_no_task_has_is_named_with_the_nearest():
    with pytest.raises(InvalidValueError, match=r"task\.name: 'gsm8' is not known; did you mean 'gsm8k'"):
        parse(Experiment, {"task": {"name": "gsm8"}}, "")


def test_the_files_of_a_task_are_its_keys_that_hold_a_place():
    assert Gsm8k.file_keys() == ("path", "test_path")
    assert Gsm8k(path="a.jsonl").files == {"path": "a.jsonl"}
    assert Gsm8k(path="a.jsonl", test_path="b.jsonl").files == {"path": "a.jsonl", "test_path": "b.jsonl"}
    assert TASKS["arithmetic"].file_keys() == ()


@pytest.mark.parametrize("missing", sorted(Task.__abstractmethods__))
def test_a_task_that_lacks_a_method_is_an_error_at_import(missing):
    program = (
        "from fp4rl.tasks.gsm8k import Gsm8k\n"
        f"Gsm8k.__abstractmethods__ = frozenset({{{missing!r}}})\n"
        "import fp4rl.spec.experiment\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 1
    assert f"TypeError: fp4rl.tasks.gsm8k.Gsm8k does not implement {missing}" in ended.stderr


def test_any_task_module_can_be_imported_first():
    for module in ("fp4rl.tasks.gsm8k", "fp4rl.spec.task", "fp4rl.spec.task_registry", "fp4rl.spec.experiment"):
        subprocess.run([sys.executable, "-c", f"import {module}, fp4rl.tasks.arithmetic"], check=True)
