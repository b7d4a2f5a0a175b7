"""The spaces that ship: every combination is a candidate, and the final of any of them may be compared."""

from pathlib import Path
from random import Random

import pytest

from fp4rl.cli.main import main
from fp4rl.lab.budget import budget_of, unequal
from fp4rl.lab.catalogue import space_file
from fp4rl.lab.compare.differing import refused_beforehand
from fp4rl.lab.matrix import planned
from fp4rl.lab.search.candidates import Recipes, in_words
from fp4rl.lab.search.final import final_suite
from fp4rl.lab.search.leakage import require_separate
from fp4rl.lab.search.records import Proposed
from fp4rl.spec.load import arm_contents
from fp4rl.spec.space import load_space

NAMES = sorted(file.stem for file in space_file(Path("spaces/w4a4.yaml")).parent.glob("*.yaml"))
MARGINS = {"w4a8": 0.005}  # the others have 0.01


def some_points(space):
    """A dozen combinations, every choice of each dimension among them; of a range both ends."""
    choices = {
        name: [choice.name for choice in own] if isinstance(own, tuple) else [own.low, own.high]
        for name, own in space.space.items()
    }
    drawn = Random(0)
    longest = max(map(len, choices.values()))
    for number in range(max(12, longest)):
        yield {name: own[number] if number < len(own) else drawn.choice(own) for name, own in choices.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_space_that_ships_holds_candidates_whose_final_can_be_compared(name):
    space = load_space(space_file(Path(f"spaces/{name}.yaml")))
    require_separate(space)
    recipes, known = Recipes(space), {}
    for number, point in enumerate(some_points(space)):
        why = recipes.refused(point, known)
        assert why is None or "the same experiment" in why, (point, why)
        suite = final_suite(
            recipes, Proposed(number=number, batch=0, point=point, words=in_words(point)), [101, 102], "f"
        )
        assert list(refused_beforehand(suite)) == []
        arms = dict(arm_contents(suite))
        stages = [own for arm, own in arms.items() if arm not in ("recipe", "control")]
        assert not unequal(budget_of(*stages, arms["recipe"]), budget_of(arms["control"]))
        assert arms["control"].injection is arms["control"].noise is arms["control"].start is None
        assert {run.seed for run in planned(suite)} == {101, 102}


@pytest.mark.parametrize("name", NAMES)
def test_the_margin_and_seven_fresh_seeds_stand_in_the_file(name):
    final = load_space(space_file(Path(f"spaces/{name}.yaml"))).final
    assert (len(final.seeds), final.margin) == (7, MARGINS.get(name, 0.01))


def test_a_space_that_does_not_ship_is_named_with_the_nearest(capsys):
    assert main(["search", "spaces/w4a44.yaml"]) == 2
    assert "did you mean 'spaces/w4a4.yaml'" in capsys.readouterr().err
