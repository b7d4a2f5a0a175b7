"""What training a policy takes beforehand, all stages together, and the control that would take as much.

A teacher that had to be trained is part of what a recipe takes; an arm that is its start and its teacher counts once.
Pure values: no torch is imported and no file read. `budget_of` counts; `equal_control` turns a treatment and the stages
that it starts from into the experiment of its equal-budget control; `as_arm` writes that as an arm of a suite.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import Any, Protocol

from pydantic_core import to_jsonable_python

from fp4rl.spec.digest import canonical
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.frozen import Spec
from fp4rl.spec.load import merge, parse
from fp4rl.spec.training import Training
from fp4rl.spec.words import counted

TOLERANCE = 0.02  # the share by which two budgets may differ and still count as equal
DECAYING = ("cosine", "linear")
COUNTED = ("steps", "updates", "answers")


class Counts(Protocol):
    """What has the three counts of a budget; None where one is not known."""

    @property
    def steps(self) -> float | None:
        """Batches of rollouts."""

    @property
    def updates(self) -> float | None:
        """Optimizer updates."""

    @property
    def answers(self) -> float | None:
        """Answers sampled for them."""


@dataclass(frozen=True)
class Budget:
    """Training of all stages together: `steps` (batches of rollouts), optimizer `updates`, and `answers` sampled for
    them, without those that dynamic sampling replaces."""

    steps: int
    updates: int
    answers: int

    def sentence(self) -> str:
        """Return `90 steps, 180 updates, 11,520 answers`."""
        parts = (self.steps, "step"), (self.updates, "update"), (self.answers, "answer")
        return ", ".join(counted(number, word) for number, word in parts)


def budget_of(*stages: Experiment) -> Budget:
    """Return what these experiments train, one after the other."""
    recipes = [stage.training for stage in stages]
    return Budget(
        steps=sum(recipe.steps for recipe in recipes),
        updates=sum(recipe.steps * recipe.updates_per_step for recipe in recipes),
        answers=sum(recipe.steps * recipe.train_batch_size * recipe.rollout_n for recipe in recipes),
    )


def beyond(number: float, other: float) -> bool:
    """Return whether two amounts differ by more than the tolerance, of the larger."""
    return abs(number - other) > TOLERANCE * max(number, other)


def unequal(first: Budget, second: Budget) -> bool:
    """Return whether two budgets differ by more than the tolerance in updates or answers."""
    return differing(first, second) is not None


def differing(first: Counts, second: Counts) -> str | None:
    """Return the count in which budgets are unequal: updates or answers, and steps where these stand for both; None
    where they are equal, as they are at other steps of as many updates and answers."""
    pairs = {name: (getattr(first, name), getattr(second, name)) for name in COUNTED}
    over = {name for name, (a, b) in pairs.items() if a is not None and b is not None and beyond(a, b)}
    open_ = {name for name, pair in pairs.items() if None in pair}
    if over | open_ == set(COUNTED) and "steps" in over:
        return "steps"
    return next((name for name in COUNTED[1:] if name in over), None)


def equal_control(
    treatment: Experiment,
    stages: Sequence[Experiment] = (),
    like: Experiment | None = None,
    kept: Sequence[Experiment] | None = None,
) -> Experiment:
    """Return the control that trains as long as `treatment` and all `stages` trained for it, in their order, together.

    It is the treatment's recipe in a single stage without quantization: no injection, no noise, no distillation, no
    start; judged as `full`. It makes as many optimizer updates from as many answers: with the treatment's batches where
    these do both, else with others. Where no whole batch does, it has not fewer of either. Its schedule is the last one
    of these stages that decays (else the treatment's), stretched over all steps with its warm-up. With `like` it keeps
    the injection, noise, distillation and profiles of that experiment, and the start where both have the same; what is
    then trained for the control too is `kept`, by default the stages of such a start.
    """
    common = like is not None and like.start is not None and like.start == treatment.start
    if kept is None:
        kept = stages if common else ()
    counting = (*(stage for stage in stages if stage not in kept), treatment)
    recipe = treatment.training
    whole, without = budget_of(*stages, treatment), budget_of(*kept)
    batches = _batches(recipe, whole.updates - without.updates, whole.answers - without.answers)
    steps = batches["steps"]
    shaped = next((s.training for s in reversed(counting) if s.training.lr_scheduler in DECAYING), recipe)
    schedule = batches | {
        "lr_scheduler": shaped.lr_scheduler,
        "lr_warmup_steps": round(steps * shaped.lr_warmup_steps / shaped.steps),
        "distillation": like.training.distillation if like is not None else None,
        "oscillation": like.training.oscillation if like is not None else None,
        "learned_clipping": like.training.learned_clipping if like is not None else None,
    }
    profiles = like.evaluation.profiles if like is not None else ("full",)
    control = treatment.model_copy(
        update={
            "start": treatment.start if common else None,
            "injection": like.injection if like is not None else None,
            "noise": like.noise if like is not None else None,
            "training": recipe.model_copy(update=schedule),
            "evaluation": treatment.evaluation.model_copy(update={"profiles": profiles}),
        }
    )
    return parse(Experiment, control.model_dump(exclude_unset=True), "equal-budget control")


def _batches(recipe: Training, updates: int, answers: int) -> dict[str, int]:
    """Return steps and batch sizes of a recipe that makes these updates from these answers, its own where they do.

    Where none do both within the tolerance, it is the least of those that have not fewer of either.
    """
    updates, answers = max(updates, 1), max(answers, 1)
    wanted = Budget(0, updates, answers)
    enough = list[tuple[float, dict[str, int]]]()
    for each, size in _recipes(recipe, answers / (updates * recipe.rollout_n)):
        from_each = each * size * recipe.rollout_n
        least = ceil(updates / each)
        near = range(ceil(updates * (1 - TOLERANCE) / each), floor(updates / (1 - TOLERANCE) / each) + 1)
        full = max(least, ceil(answers / from_each))
        for steps in (least, *sorted(near, key=lambda n: (n < least, abs(n - least))), full):
            made = Budget(steps, steps * each, steps * from_each)
            keys = {"steps": steps, "train_batch_size": each * size, "mini_batch_size": size}
            if steps and not unequal(made, wanted):
                return keys
        enough.append((max(made.updates / updates, made.answers / answers), keys))
    return min(enough, key=lambda pair: pair[0])[1]


def _recipes(recipe: Training, prompts: float) -> Iterator[tuple[int, int]]:
    """Yield updates a step and prompts an update: the recipe's, then those about as large as `prompts`."""
    own, micro = recipe.updates_per_step, recipe.micro_batch_size or 1
    yield own, recipe.mini_batch_size
    sizes = range(max(floor(prompts), 1), ceil(prompts) + micro)
    for each in sorted(range(1, 2 * own + 1), key=lambda n: abs(n - own)):
        yield from ((each, size) for size in sizes if size * recipe.rollout_n % micro == 0)


def as_arm(experiment: Experiment, base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overrides that make the content `base` of a suite into the experiment, but for its seed.

    Raises InvalidValueError where the base names something that no override takes away, such as a profile of its own.
    """
    arm = _differing(parse(Experiment, base, "base"), experiment)
    arm.pop("seed", None)
    made = parse(Experiment, merge(base, arm), "arm").model_copy(update={"seed": experiment.seed})
    if canonical(made) != canonical(experiment):  # keys of a mapping that the base has beyond it cannot be overridden
        raise InvalidValueError(f"no arm of this base is the experiment: {sorted(arm)} cannot take away what it names")
    return arm


def _differing(base: Spec, own: Spec) -> dict[str, Any]:
    """Return the keys of `own` whose values differ from those in `base`, nested; `none` where a part is gone."""
    changed: dict[str, Any] = {}
    for name in type(own).model_fields:
        before, after = getattr(base, name), getattr(own, name)
        if before == after:
            continue
        if isinstance(after, Spec) and type(before) is type(after):
            changed[name] = _differing(before, after)
        else:  # a later key at its default is not in the dump
            changed[name] = own.model_dump(mode="json", include={name}).get(name, to_jsonable_python(after))
    return changed
