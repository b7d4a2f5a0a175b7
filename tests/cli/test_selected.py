"""A part of a suite by arm and seed."""

import pytest

from fp4rl.cli.described import selected
from fp4rl.lab.matrix import planned
from fp4rl.spec.errors import NotFoundError
from fp4rl.spec.experiment import Suite

RUNS = planned(Suite(suite="s", arms={"bf16": {}, "w4a8": {"injection": "w4a8"}}, seeds=(0, 1, 4)))


@pytest.mark.parametrize(
    "arms, seeds, expected",
    [
        ([], [], [("bf16", 0), ("w4a8", 0), ("bf16", 1), ("w4a8", 1), ("bf16", 4), ("w4a8", 4)]),
        (["w4a8"], [], [("w4a8", 0), ("w4a8", 1), ("w4a8", 4)]),
        (["w4a8"], [4], [("w4a8", 4)]),
        ([], [0, 1], [("bf16", 0), ("w4a8", 0), ("bf16", 1), ("w4a8", 1)]),
    ],
)
def test_arms_and_seeds_are_a_part_of_the_plan(arms, seeds, expected):
    chosen = selected(RUNS, arms, seeds)
    assert [(run.arm, run.seed) for run in chosen] == expected
    assert {run.run_id for run in chosen} <= {run.run_id for run in RUNS}


def test_what_is_not_planned_is_named():
    with pytest.raises(NotFoundError, match="--arm w4a: no such arm; did you mean 'w4a8'"):
        selected(RUNS, ["w4a"], [])
    with pytest.raises(NotFoundError, match=r"--seed 3: the seeds are \[0, 1, 4\]; seeds=\[3\]"):
        selected(RUNS, [], [3])
