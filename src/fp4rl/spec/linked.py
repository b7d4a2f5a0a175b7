"""Arms of a suite that take weights from other arms: which ones, in which order, and by which description."""

from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

from fp4rl.spec.digest import digest
from fp4rl.spec.distillation import TeacherModel
from fp4rl.spec.errors import InvalidValueError, nearest
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.stages import Start

START, TEACHER = "start", "training.distillation.teacher"


def links(experiment: Experiment) -> dict[str, Start | TeacherModel]:
    """Return key -> the other run or folder that the experiment takes weights from."""
    distillation = experiment.training.distillation
    teacher = distillation.teacher if distillation is not None else None
    return ({START: experiment.start} if experiment.start is not None else {}) | (
        {TEACHER: teacher} if isinstance(teacher, TeacherModel) else {}
    )


def arms_needed(experiment: Experiment) -> dict[str, str]:
    """Return key -> the arm of the same suite whose weights the experiment takes."""
    return {key: link.arm for key, link in links(experiment).items() if link.arm is not None}


def linked(experiments: Mapping[str, Experiment], arms: Sequence[str], source: str) -> dict[str, Experiment]:
    """Return the experiments of a suite with what they take from each other filled in, in the given order.

    `experiments`: name -> experiment, every arm of `arms` in turn with each value of the axes; an arm that is named
    means the one with the same values. Raises InvalidValueError for an arm that there is not, for a circle of arms, and
    for an arm whose model is built from something else.
    """
    if not any(map(arms_needed, experiments.values())):
        return dict(experiments)
    names, done = list(experiments), dict[str, Experiment]()
    crossed = len(names) // len(arms)
    needs = {
        name: {key: names[arms.index(arm) * crossed + names.index(name) % crossed] for key, arm in own}
        for name, own in ((name, _known(name, experiments[name], arms, source)) for name in names)
    }
    for name in _ordered(needs, source):
        experiment = experiments[name]
        if START in needs[name]:
            _require_same_model(name, experiment, needs[name][START], experiments[needs[name][START]], source)
        for key, other in needs[name].items():
            experiment = _filled(experiment, key, other, digest(described(done[other])), f"{source}: arm {name}")
        done[name] = experiment
    return {name: done[name] for name in names}


def described(experiment: Experiment) -> dict[str, object]:
    """Return the experiment without its seed as plain values: runs with the same ones are repeats of each other."""
    return {key: value for key, value in experiment.model_dump(mode="json").items() if key != "seed"}


def in_order(experiments: Mapping[str, Experiment]) -> list[str]:
    """Return the names of linked experiments in their order, each behind those that it takes weights from."""
    return list(_ordered({name: arms_needed(experiment) for name, experiment in experiments.items()}, "arms"))


def _ordered(needs: Mapping[str, Mapping[str, str]], source: str) -> Iterator[str]:
    try:
        TopologicalSorter({name: own.values() for name, own in needs.items()}).prepare()
    except CycleError as error:
        circle = " <- ".join(error.args[1])
        raise InvalidValueError(f"{source}: arms take weights from each other in a circle: {circle}") from None
    waiting, done = list(needs), set[str]()
    while waiting:
        ready = next(name for name in waiting if done.issuperset(needs[name].values()))
        waiting.remove(ready)
        done.add(ready)
        yield ready


def _known(name: str, experiment: Experiment, arms: Sequence[str], source: str) -> list[tuple[str, str]]:
    needed = list(arms_needed(experiment).items())
    for key, arm in needed:
        if arm not in arms:
            raise InvalidValueError(f"{source}: arm {name}: {key}.arm: no arm is called {arm!r}{nearest(arm, arms)}")
    return needed


def _require_same_model(name: str, own: Experiment, arm: str, start: Experiment, source: str) -> None:
    if why := other_model(own, start):
        raise InvalidValueError(f"{source}: arm {name}: start.arm {arm}: {why}")


def other_model(own: Experiment, start: Experiment) -> str | None:
    """Return why an experiment cannot begin with the weights that `start` trained; None where it can."""
    ours, theirs = own.model, start.model
    if (ours.path, ours.embedded) != (theirs.path, theirs.embedded):
        return "it is built from another model; give both the same model.path or model.embedded"
    if theirs.transforms and ours.transforms != theirs.transforms:
        return "its weights went through its model.transforms; give both the same, which are then not done again"
    if ours.lora is not None and theirs.lora is not None:
        return "it ends with an adapter; drop model.lora to train that one on"
    return None


def _filled(experiment: Experiment, key: str, arm: str, content: str, where: str) -> Experiment:
    link = links(experiment)[key]
    if link.digest not in (None, content):
        raise InvalidValueError(f"{where}: {key}.digest {link.digest} is not that of {arm}, {content}; leave it out")
    link = link.model_copy(update={"arm": arm, "digest": content})
    if key == START:
        return experiment.model_copy(update={"start": link})
    recipe = experiment.training
    assert recipe.distillation is not None
    distillation = recipe.distillation.model_copy(update={"teacher": link})
    return experiment.model_copy(update={"training": recipe.model_copy(update={"distillation": distillation})})
