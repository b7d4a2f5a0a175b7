"""The examples run, do what they say, and stay short."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name):
    return runpy.run_path(str(EXAMPLES / name))["main"]()


def test_a_loop_of_ones_own_learns_under_rounding_and_reports_it(capsys):
    first = runpy.run_path(str(EXAMPLES / "own_training_loop.py"))["main"](steps=1)
    assert run("own_training_loop.py") < first
    assert "training" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_a_hugging_face_trainer_trains_under_rounding():
    rows = run("with_hf_trainer.py")
    assert len({row.site for row in rows}) == 14
    assert all(row.calls > 0 for row in rows if row.phase == "training")


def test_the_first_example_is_under_forty_lines():
    assert len((EXAMPLES / "own_training_loop.py").read_text().splitlines()) < 40
