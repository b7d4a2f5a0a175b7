"""A cached model appears whole or not at all, and never answers for another recipe."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fp4rl.models import tiny
from fp4rl.models.load import load
from fp4rl.models.tiny import cached
from fp4rl.spec.model import Embedded
from fp4rl.tasks.arithmetic import Arithmetic

RECIPE = Embedded(warm_up_steps=4, warm_up_batch_size=8)
EXAMPLES = Arithmetic().demonstrations(32)


class Killed(BaseException):
    """Stands for a process that ends at this moment."""


def die_at(step: int):
    def on_step(now: int, _loss: float) -> None:
        if now == step:
            raise Killed

    return on_step


ASK = """
import sys
from pathlib import Path
from fp4rl.models.tiny import cached
from fp4rl.spec.model import Embedded
from fp4rl.tasks.arithmetic import Arithmetic
recipe = Embedded(warm_up_steps=4, warm_up_batch_size=8)
cached(Path(sys.argv[1]), recipe, Arithmetic().demonstrations(32), lambda step, _loss: print(step))
"""


def test_the_folder_holds_a_model_and_a_tokenizer_that_load(tmp_path):
    model, tokenizer = load(cached(tmp_path, RECIPE, EXAMPLES))
    expected = tiny.build(RECIPE, tokenizer)
    tiny.warm_up(expected, tokenizer, EXAMPLES, RECIPE)
    assert all(torch.equal(w, model.state_dict()[name]) for name, w in expected.state_dict().items())


def test_the_second_call_makes_nothing(tmp_path):
    steps: list[int] = []
    first = cached(tmp_path, RECIPE, EXAMPLES, lambda step, _loss: steps.append(step))
    assert cached(tmp_path, RECIPE, EXAMPLES, lambda step, _loss: steps.append(step)) == first
    assert steps == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "other",
    [
        (RECIPE.model_copy(update={"seed": 1}), EXAMPLES),
        (RECIPE.model_copy(update={"warm_up_lr": 1e-3}), EXAMPLES),
        (RECIPE, EXAMPLES[::-1]),
        (RECIPE, [*EXAMPLES[:-1], (EXAMPLES[-1][0], "#### 0")]),
    ],
)
def test_another_recipe_or_another_example_is_another_folder(tmp_path, other):
    assert cached(tmp_path, RECIPE, EXAMPLES) != cached(tmp_path, *other)


def test_a_warm_up_that_is_killed_leaves_nothing_that_looks_finished_and_the_next_call_finishes(tmp_path):
    with pytest.raises(Killed):
        cached(tmp_path, RECIPE, EXAMPLES, die_at(3))
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    assert (cached(tmp_path, RECIPE, EXAMPLES) / "config.json").is_file()


def test_a_kill_while_writing_leaves_nothing_that_looks_finished_either(tmp_path, monkeypatch):
    def half_a_tokenizer(_tokenizer, folder):
        (folder / "tokenizer.json").write_text("{")
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", half_a_tokenizer)
        with pytest.raises(Killed):
            cached(tmp_path, RECIPE, EXAMPLES)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    place = cached(tmp_path, RECIPE, EXAMPLES)
    load(place)


def test_what_a_kill_left_half_made_is_made_anew(tmp_path):
    place = cached(tmp_path, RECIPE, EXAMPLES)
    half_made = place.rename(place.with_suffix(".partial"))  # `kill -9` lets nothing clean up
    (half_made / "config.json").unlink()
    assert cached(tmp_path, RECIPE, EXAMPLES) == place
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [place]
    load(place)


def test_two_that_ask_at_once_make_it_once(tmp_path):
    steps: list[int] = []
    start = threading.Barrier(2)

    def ask(_asker: int):
        start.wait()
        return cached(tmp_path, RECIPE, EXAMPLES, lambda step, _loss: steps.append(step))

    with ThreadPoolExecutor(2) as askers:
        first, second = askers.map(ask, range(2))
    assert first == second
    assert steps == [1, 2, 3, 4]


@pytest.mark.slow
def test_two_processes_that_ask_at_once_make_it_once(tmp_path, popen):
    command = [sys.executable, "-c", ASK, str(tmp_path)]
    both = [popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for _ in range(2)]
    said = sorted(process.communicate(timeout=120)[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert said == ["", "1\n2\n3\n4\n"]
    load(cached(tmp_path, RECIPE, EXAMPLES))
