"""What the arms of a suite would be served as: the deployment decides, not the checkpoint."""

from collections.abc import Iterable, Iterator, Mapping

from fp4rl.spec.deployment import DEPLOYMENTS
from fp4rl.spec.evaluation import Evaluation
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.injection import Injection
from fp4rl.spec.kernels import Served
from fp4rl.spec.points import MODES
from fp4rl.spec.words import counted

UNNAMED = "ocp"  # whose rules formats have where no deployment is named


def served_lines(arms: Mapping[str, Experiment]) -> list[str]:
    """Return a line for what each arm, and each profile named by a mode, is served as; once for all arms that share it.

    The arms of a line stand before it where it is not that of all.
    """
    arms_by_line: dict[str, list[str]] = {}
    for arm, experiment in arms.items():
        for line in _lines(experiment):
            arms_by_line.setdefault(line, []).append(arm)
    return [
        line if len(names) == len(arms) > 1 else f"{', '.join(names)}: {line}" for line, names in arms_by_line.items()
    ]


def served_as(injection: Injection | None) -> str:
    """Return what is served of an injection, in one sentence."""
    if injection is None or not injection.formats:
        return "full precision, which every machine computes as it is"
    mode, name = injection.checkpoint_mode, injection.deployment or UNNAMED
    unnamed = "" if injection.deployment else " (no deployment is named)"
    if mode is None:
        return f"{name}{unnamed}: formats that no mode has; what serves them is not known"
    return f"{name}{unnamed}: {DEPLOYMENTS[name].sentence(mode)}"


def changed(injection: Injection | None) -> str | None:
    """Return a warning where what is computed here is not what the deployment would serve; None where it is."""
    mode = injection.checkpoint_mode if injection is not None else None
    if injection is None or injection.deployment is None or mode is None:
        return None
    deployment = DEPLOYMENTS[injection.deployment]
    served = deployment.served(mode)
    if served is None or served.mode == mode:
        return None
    return f"{mode} is computed here, but {deployment.name} serves {served.mode or 'nothing of it'}: {served.note}"


def unserved(injection: Injection, rounded: Iterable[tuple[str, str, int]]) -> Iterator[str]:
    """Yield which layers have no kernel. `rounded`: name, part and in_features of each layer with 4-bit weights."""
    mode = injection.checkpoint_mode
    if injection.deployment is None or mode is None:
        return
    served = DEPLOYMENTS[injection.deployment].served(mode) or Served(mode)
    dense = [(name, width) for name, part, width in rounded if part != "experts"]
    unfit = [name for name, width in dense if width % served.multiple_of]
    for names, why in (
        ([name for name, _ in dense] if served.experts_alone else [], "not routed experts"),
        (unfit, f"of in_features that {served.multiple_of} does not divide"),
    ):
        if names:
            layers = f"{counted(len(names), 'dense layer')} such as {names[0]}"
            yield f"{injection.deployment} has no {mode} kernel for {layers}: {why}"


def of_profiles(evaluation: Evaluation) -> dict[str, Injection]:
    """Return the injection of each profile that is named by a mode."""
    names = [name for name in evaluation.all_profiles if name in MODES and name != "none"]
    return {name: Injection.named(name, evaluation.deployment) for name in names}


def _lines(experiment: Experiment) -> Iterator[str]:
    yield served_as(experiment.injection)
    for name, injection in of_profiles(experiment.evaluation).items():
        yield f"profile {name} imitates {served_as(injection)}"
