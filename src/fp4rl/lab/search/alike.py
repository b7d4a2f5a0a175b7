"""What candidates of a search and its control have alike: the problems that they are judged on, answers as long, a
profile that rounds what their injections name, and no training that the budget does not count."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fp4rl.lab.files import loads
from fp4rl.lab.folders import RunFolder
from fp4rl.spec.errors import InvalidValueError
from fp4rl.spec.evaluation import MATMUL_NOISE
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.linked import START, TEACHER
from fp4rl.spec.load import merge, parse
from fp4rl.spec.points import FORMAT_POINTS, GRADIENTS
from fp4rl.spec.space import Space

_EXPORTED = "fp4rl_export.json"  # stands beside exported weights, and names the run that trained them
Named = tuple[str, Mapping[str, Any]]  # where keys of an experiment stand, and the keys


def require_alike(space: Space) -> None:
    """Raise InvalidValueError, which names key and cure, for a choice or a control that is judged otherwise than the
    base, and for weights of a run that is no stage."""
    choices = _choices(space)
    parts = [("base", space.base), *((f"stages.{name}", own) for name, own in space.stages.items())]
    for where, content in [*parts, ("control", space.control or {}), *choices]:
        if why := uncounted(content):
            raise InvalidValueError(f"{where}: {why}")
    base = _judged(space, {})
    if why := _judged_otherwise(_judged(space, space.control or {}), base):
        raise InvalidValueError(f"control: {why}")
    wrong = {where: why for where, content in [("base", {}), *choices] if (why := _unlike(space, content, base))}
    if wrong and ("base" not in wrong or len(wrong) > len(choices)):  # else a choice may mend the base
        where, why = next(iter(wrong.items()))
        raise InvalidValueError(f"{where}: {why}")


def unlike(own: Experiment, base: Experiment, profile: str) -> str | None:
    """Return why a candidate that is judged under a profile cannot be held against the base; None where it can."""
    if why := _judged_otherwise(own, base):
        return why
    return _unrounded(own, base) if profile == "deployment" or profile.startswith(MATMUL_NOISE) else None


def uncounted(content: Mapping[str, Any]) -> str | None:
    """Return why keys of an experiment take weights whose training no budget would count; None where none do."""
    written = merge({}, content)
    run, teacher = _at(written, f"{START}.run"), _at(written, f"{TEACHER}.path")
    why = "its training would not be counted, and all seeds would share it: name its recipe as a stage, and write"
    if run is not None:
        return f"{START}.run: {run}: {why} {START}: {{arm: STAGE}}"
    if teacher is not None and _of_a_run(Path(str(teacher))):
        return f"{TEACHER}.path: {teacher} was trained by a run: {why} teacher: {{arm: STAGE}}"
    return None


def _of_a_run(folder: Path) -> bool:
    """Return whether weights are those of a finished run, in its folder or exported from it."""
    whole = folder.expanduser().resolve()
    if any(RunFolder(own).finished for own in (whole, *whole.parents[:2])):
        return True
    return (whole / _EXPORTED).is_file() and loads((whole / _EXPORTED).read_bytes()).get("run") is not None


def _choices(space: Space) -> list[Named]:
    """Return each choice of a space with its keys; of a range both ends."""
    choices: list[Named] = []
    for name, own in space.space.items():
        if isinstance(own, tuple):
            choices += [(f"space.{name}: {choice.name}", choice.set) for choice in own]
        else:
            choices += [(f"space.{name}: {end:g}", {name: end}) for end in (own.low, own.high)]
    return choices


def _judged(space: Space, content: Mapping[str, Any]) -> Experiment:
    """Return what changes of the base describe, judged as the final does. Raises InvalidValueError as `parse` does."""
    judging = {"split": "test", "count": space.final.count, "profiles": [space.judged]}
    return parse(Experiment, merge(merge(space.base, {"evaluation": judging}), content), "")


def _unlike(space: Space, content: Mapping[str, Any], base: Experiment) -> str | None:
    """Return why a choice alone is no candidate; None also where it needs another choice beside it."""
    try:
        return unlike(_judged(space, content), base, space.judged)
    except InvalidValueError:
        return None


def _judged_otherwise(own: Experiment, base: Experiment) -> str | None:
    for part in ("task", "evaluation"):
        mine, theirs = (getattr(experiment, part).model_dump(mode="json") for experiment in (own, base))
        keys = [key for key in {**theirs, **mine} if key != "profiles" and mine.get(key) != theirs.get(key)]
        if keys:
            return (
                f"{part}.{keys[0]} would be {mine.get(keys[0])} here and {theirs.get(keys[0])} in the base: candidates "
                f"and control are judged alike; write {part}.{keys[0]} in `base` alone"
            )
    return None


def _unrounded(own: Experiment, base: Experiment) -> str | None:
    """Return which points its own injection names and leaves unrounded in evaluations, or that it lost the base's."""
    points, of_base = _points(own), _points(base)
    if of_base and not points:
        return f"injection: rounds nothing, where the base rounds {' and '.join(of_base)}: the control is that already"
    active = own.injection.acts_in("evaluation") if own.injection is not None else ()
    left = [point for point in points if point not in active]
    if not left:
        return None
    return (
        f"injection.apply_during.{left[0]} leaves evaluation out, so that the deployment would be judged with "
        f"{' and '.join(left)} unrounded; name evaluation there, or write `judged: full`"
    )


def _points(experiment: Experiment) -> list[str]:
    """Return the points of a forward that the injection names."""
    named = experiment.injection.points if experiment.injection is not None else ()
    return [point for point in FORMAT_POINTS if point in named and point not in GRADIENTS]


def _at(content: Mapping[str, Any], path: str) -> Any:
    value: Any = content
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
