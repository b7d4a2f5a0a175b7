"""The final: the chosen recipe and its unquantized control over fresh seeds on the test split, by the usual verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import JsonValue
from pydantic_core import to_jsonable_python

from fp4rl.lab.budget import as_arm, equal_control
from fp4rl.lab.compare.budgets import Budgets
from fp4rl.lab.compare.comparison import Answer, answer_all, checked
from fp4rl.lab.compare.declared import suite_questions
from fp4rl.lab.compare.differing import differences, factor_of
from fp4rl.lab.compare.sides import At, Side
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
from fp4rl.spec.training import Training
from fp4rl.spec.words import counted

RECIPE, CONTROL = "recipe", "control"


def final_suite(recipes: Recipes, chosen: Proposed, seeds: Sequence[int], name: str) -> Suite:
    """Return the suite of the final: the recipe, the stages that it needs, and its control, which trains as long as all
    of them together where the space names none."""
    space = recipes.space
    judging = {"split": "test", "count": space.final.count, "profiles": [space.judged]}
    recipe = merge(changes(space, chosen.point), {"training": {"steps": space.screening.rungs[-1]}})
    base = merge(space.base, {"evaluation": judging})
    if space.control is None:
        stages = [recipes.stages[arm] for arm in recipes.needed([recipe])]
        control = as_arm(equal_control(parse(Experiment, merge(base, recipe), RECIPE), stages), base)
    else:
        control = own_control(space, space.control)
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


def own_control(space: Space, named: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a control with the `named` keys changes in the base: by default it takes no injection, noise or
    distillation from it, and trains for the steps of the last round; it is judged as `full`.

    Raises InvalidValueError for one that has an injection.
    """
    training = {"steps": space.screening.rungs[-1], "distillation": None}
    training |= {"oscillation": None, "learned_clipping": None}
    control = merge({"injection": None, "noise": None, "training": training}, named)
    control = merge(control, {"evaluation": {"profiles": ["full"]}})
    if parse(Experiment, merge(space.base, control), "control").injection is not None:
        raise InvalidValueError("control: injection: the control is unquantized; leave its injection out")
    return control


def verdict(space: Space, runs: SuiteRuns, seeds: Sequence[int]) -> Judged:
    """Return the verdict of a final over `seeds` by what of it is finished."""
    (answer,) = (checked(own) for own in answer_all(suite_questions(runs, At()), lambda _: None))
    return judged_by(answer, seeds, 100 * space.final.margin)


def judged_by(answer: Answer, seeds: Sequence[int], margin: float) -> Judged:
    """Return what the record keeps of the answer over `seeds`, with a margin in points."""
    own, took = answer.verdict, answer.budgets
    first, second = (_by_seed(side) for side in (answer.treatment, answer.control))
    both = [seed for seed in seeds if seed in first and seed in second]
    treatment, control = (tuple(side[seed] for seed in both) for side in (first, second))
    plain = Judged(
        word=own.word if own is not None else None,
        sentence=answer.sentence(),
        treatment=treatment,
        control=control,
        seeds=tuple(both),
        margin=margin,
        refused=answer.refused,
        budgets=None if took is None else _as_values(took),
        quotable=answer.quotable,
        marks=answer.marks,
        trained=(_trained(answer.treatment), _trained(answer.control)) if both else None,
    )
    if own is not None:
        needed = None if own.word in ("better", "reaches") else _needed(treatment, control, margin)
        numbers = {name: getattr(own, name) for name in ("difference", "low", "high", "lower_bound", "p")}
        plain = plain.extended(**numbers, needed=needed)
    return plain.over(seeds)


def _as_values(took: Budgets) -> dict[str, JsonValue]:
    """Return budgets as plain values, with what follows from them."""
    return dict(to_jsonable_python(asdict(took) | {"equal": took.equal, "sentence": took.sentence()}))


def _by_seed(side: Side) -> dict[int | None, float]:
    """Return the accuracy of each seed of a side, in points."""
    return {own.run.seed: points for own, points in zip(side.runs, side.points, strict=True)}


def _trained(side: Side) -> str:
    """Return in words what a side trained with: learning rate, schedule, steps."""
    own, known = side.spec.get("training") or {}, Training.model_fields
    rate, schedule, warm_up = (own.get(key, known[key].default) for key in ("lr", "lr_scheduler", "lr_warmup_steps"))
    warmed = f" with {counted(warm_up, 'warm-up step')}" if warm_up else ""
    return f"learning rate {rate:g}, {schedule} schedule{warmed}, {counted(side.runs[0].steps[0] or 0, 'step')}"


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
