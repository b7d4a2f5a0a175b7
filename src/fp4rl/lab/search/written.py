"""The files that a search leaves in its folder: `recipe.yaml`, a suite of its own, and `report.html`."""

from pathlib import Path
from typing import Any

import yaml

from fp4rl.lab.files import write_whole
from fp4rl.lab.search.candidates import Recipes
from fp4rl.lab.search.final import final_suite
from fp4rl.lab.search.page import page
from fp4rl.lab.search.records import Book
from fp4rl.lab.search.result import Result


def recipe_of(recipes: Recipes, result: Result) -> dict[str, Any] | None:
    """Return the recipe as a suite: its stages, the recipe, its control, and the question of the final; None where
    nothing is chosen."""
    if result.chosen is None:
        return None
    name = f"{recipes.space.search}-recipe"
    suite = final_suite(recipes, result.chosen, recipes.space.final.seeds, name)
    return suite.model_copy(update={"about": result.paragraph}).model_dump(mode="json", exclude_defaults=True)


def write_result(recipes: Recipes, book: Book, folder: Path) -> Result:
    """Write `recipe.yaml` (once something is chosen) and `report.html` into the search's folder."""
    result = Result(recipes.space, book)
    recipe = recipe_of(recipes, result)
    if recipe is not None:
        write_whole(folder / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    write_whole(folder / "report.html", page(result, recipe))
    return result
