"""The final: the chosen recipe and its unquantized control over fresh seeds on the test split, by the usual verdict."""

from collections.abc import Sequence

from fp4rl.lab.budget import as_arm, equal_control
from fp4rl.lab.compare.comparison import answer_all, checked
from fp4rl.lab.compare.declared import suite_questions
from fp4rl.lab.compare.differing import differences, factor_of
from fp4rl.lab.compare.sides import At
from fp4rl.lab.search.candidates import Recipes, changes
from fp4rl.lab.search.records import Judged, Proposed
from fp4rl.lab.statistics.power import seeds_needed
from fp4rl.lab.statistics.seeds import pooled
from fp4rl.lab.suites import SuiteRuns
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Comparison, Experiment, Suite
from fp4rl.spec.linked import described
from fp4rl.spec.load import arm_contents, merge, parse
from fp4rl.spec.space import Space

RECIPE, CONTROL = "recipe", "control"


def final_suite(recipes: Recipes, chosen: Proposed, seeds: Sequence[int], name: str) -> Suite:
    """Return the suite of the final: the recipe, the stages that it needs, and its control, which trains as long as all
    of them together where the space names none."""
    space = recipes.space
    judging = {"split": "test", "count": space.final.count, "profiles": [space.judged]}
    recipe = merge(changes(space, chosen.point), {"training": {"steps": space.screening.rungs[-1]}})
    base, full = merge(space.base, {"evaluation": judging}), {"evaluation": {"profiles": ["full"]}}
    if space.control is None:
        stages = [recipes.stages[arm] for arm in recipes.needed([recipe])]
        control = as_arm(equal_control(parse(Experiment, merge(base, recipe), RECIPE), stages), base)
    else:
        control = merge(space.control, full)
    suite = recipes.suite(name, {RECIPE: recipe, CONTROL: control}, seeds, judging)
    arms = dict(arm_contents(suite))
    differing = differences(described(arms[RECIPE]), described(arms[CONTROL]))
    question = Comparison(
        question=f"Is the recipe, judged as {space.judged}, as good as the unquantized control?",
        treatment=f"{RECIPE}@{space.judged}",
        control=f"{CONTROL}@full",
        factors=tuple(dict.fromkeys(map(factor_of, differing))),
        test="reaches",
        margin=space.final.margin,
    )
    about = f"The final of the search {space.search}: {chosen.words}, against its control."
    return suite.model_copy(update={"comparisons": (question,), "about": about})


def verdict(space: Space, runs: SuiteRuns, seeds: Sequence[int]) -> Judged:
    """Return the verdict of a final over `seeds` by what of it is finished."""
    (answer,) = (checked(own) for own in answer_all(suite_questions(runs, At()), lambda _: None))
    margin, own = 100 * space.final.margin, answer.verdict
    both = {run.run.seed for run in answer.treatment.runs} & {run.run.seed for run in answer.control.runs}
    plain = {
        "word": own.word if own is not None else None,
        "sentence": answer.sentence(),
        "treatment": answer.treatment.points,
        "control": answer.control.points,
        "seeds": tuple(seed for seed in seeds if seed in both),
        "margin": margin,
        "refused": answer.refused,
        "whole": both.issuperset(seeds),
    }
    if own is None:
        return Judged.model_validate(plain)
    needed = (
        None if own.word in ("better", "reaches") else _needed(answer.treatment.points, answer.control.points, margin)
    )
    return Judged.model_validate(
        plain
        | {"difference": own.difference, "low": own.low, "high": own.high, "lower_bound": own.lower_bound, "p": own.p}
        | {"needed": needed}
    )


def _needed(treatment: Sequence[float], control: Sequence[float], margin: float) -> str | None:
    """Return in words how many seeds would decide, where the difference is what these seeds show."""
    spread = pooled([treatment, control])
    if spread is None or not spread.sd:
        return None
    difference = sum(treatment) / len(treatment) - sum(control) / len(control)
    shown = f"at the difference ({difference:+.1f} points) and the run-to-run spread ({spread.sd:.1f}) of these seeds"
    try:
        seeds = seeds_needed(difference, spread.sd, margin=margin)
    except InvalidValueError:
        return f"{shown} no number of seeds shows that it is within {margin:g} points: the recipe itself falls short"
    return f"{shown} {seeds} seeds an arm show with a chance of 80 % that it is within {margin:g} points"
