"""Steps from epochs: a description that counts in epochs, as the steps that these come to for its problems."""

from collections.abc import Mapping
from typing import Any

from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.experiment import Experiment, Suite
from fp4rl.spec.load import arm_content, merge, parse


def steps_of(experiment: Experiment) -> int:
    """Return how many steps the experiment's `training.epochs` are: whole batches of its problems, times epochs.

    Raises what reading its problems raises, InvalidValueError where they are fewer than one batch.
    """
    recipe = experiment.training
    assert recipe.epochs is not None
    count = len(experiment.task.problems("train"))
    batches = count // recipe.train_batch_size
    if not batches:
        raise InvalidValueError(
            f"training.epochs: {count} problems are less than one batch (training.train_batch_size "
            f"{recipe.train_batch_size}); make it smaller, or write training.steps"
        )
    return recipe.epochs * batches


def in_steps(described: Suite | Experiment) -> Suite | Experiment:
    """Return the description with steps in place of epochs, arm by arm; what names no epochs stays as it is.

    Raises what `steps_of` raises, and InvalidValueError for axes beside epochs, whose runs may differ in steps.
    """
    if isinstance(described, Experiment):
        if described.training.epochs is None:
            return described
        training = described.training.model_dump(exclude_unset=True, exclude={"epochs"})
        content = described.model_dump(exclude_unset=True)
        return parse(Experiment, content | {"training": training | {"steps": steps_of(described)}}, "training.epochs")
    if described.axes:
        if any(_names_epochs(content) for content in (described.base, *described.arms.values(), described.axes)):
            raise InvalidValueError("training.epochs beside axes: each value may need its own steps; make arms of them")
        return described
    arms = {arm: dict(change) for arm, change in described.arms.items()}
    for arm in arms:
        experiment = parse(Experiment, arm_content(described, arm), f"arm {arm}")
        if experiment.training.epochs is not None:
            arms[arm] = _without(merge(arms[arm], {"training": {"steps": steps_of(experiment)}}))
    if arms == described.arms:
        return described
    return described.model_copy(update={"base": _without(merge(described.base, {})), "arms": arms})


def _names_epochs(content: Mapping[str, Any]) -> bool:
    training = content.get("training")
    return "training.epochs" in content or (isinstance(training, Mapping) and "epochs" in training)


def _without(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content without its epochs."""
    left = {key: value for key, value in content.items() if key != "training.epochs"}
    if isinstance(left.get("training"), Mapping):
        left["training"] = {key: value for key, value in left["training"].items() if key != "epochs"}
    return left
