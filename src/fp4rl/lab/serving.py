"""What the arms of a suite would be served as: the deployment decides, not the checkpoint."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from fp4rl.spec.deployment import DEPLOYMENTS
from fp4rl.spec.evaluation import Evaluation
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.injection import Injection
from fp4rl.spec.kernels import SERVED_MODES, Served
from fp4rl.spec.points import MODES
from fp4rl.spec.words import counted

UNNAMED = "ocp"  # whose rules formats have where no deployment is named
TWICE = "inputs with a fallback are rounded twice in part, which no engine does"


class Fate(NamedTuple):
    """What a policy is served as: under which deployment, from which checkpoint, computed as what, and what to note."""

    deployment: str
    checkpoint: str
    computed: str
    note: str = ""

    @property
    def changed(self) -> bool:
        """Whether a checkpoint is computed as another one, or not at all."""
        return self.computed not in (self.checkpoint, "as it is", "not known", "not looked up")


def fates(arms: Mapping[str, Experiment]) -> dict[Fate, list[str]]:
    """Return what is served of each arm, and of each profile with an injection (`arm@profile`), with who shares it."""
    named: dict[Fate, list[str]] = {}
    for arm, experiment in arms.items():
        named.setdefault(_fate(experiment.injection), []).append(arm)
    for profile in dict.fromkeys(name for experiment in arms.values() for name in of_profiles(experiment.evaluation)):
        shared: dict[Fate, list[str]] = {}
        for arm, experiment in arms.items():
            if (injection := of_profiles(experiment.evaluation).get(profile)) is not None:
                shared.setdefault(_fate(injection), []).append(f"{arm}@{profile}")
        for fate, names in shared.items():
            everyone = len(names) == len(arms) > 1
            named.setdefault(fate, []).extend([f"every arm@{profile}"] if everyone else names)
    return named


def served_as(injection: Injection | None) -> str:
    """Return what is served of an injection, in one sentence."""
    if injection is None or not injection.formats:
        return "full precision, which every machine computes as it is"
    if rounds_twice(injection):
        return f"nothing serves it: {TWICE}"
    mode, name = injection.checkpoint_mode, injection.deployment or UNNAMED
    unnamed = "" if injection.deployment else " (no deployment is named)"
    if mode is None:
        return f"{name}{unnamed}: formats that no mode has; what serves them is not known"
    return f"{name}{unnamed}: {DEPLOYMENTS[name].sentence(mode)}"


def rounds_twice(injection: Injection) -> bool:
    """Return whether some format has a fallback, for which no deployment may be named."""
    return any(fmt.fallback is not None for fmt in injection.formats)


def changed(injection: Injection | None) -> str | None:
    """Return a warning where what is computed here is not what the deployment would serve; None where it is."""
    if injection is not None and rounds_twice(injection):
        return f"{injection.name} is computed here, but nothing serves it: {TWICE}"
    mode = injection.checkpoint_mode if injection is not None else None
    if injection is None or injection.deployment is None or mode is None:
        return None
    deployment = DEPLOYMENTS[injection.deployment]
    served = deployment.served(mode)
    if served is None or served.mode == mode:
        return None
    return f"{mode} is computed here, but {deployment.name} serves {served.mode or 'nothing of it'}: {served.note}"


def packed_otherwise(injections: Iterable[Injection | None], saved: str) -> str | None:
    """Return a warning where a packer, given a folder of dtype `saved`, rounds other numbers than are rounded here."""
    for injection in injections:
        if injection and injection.deployment and injection.weight and injection.dtype != saved:
            return (
                f"weights are cast to {injection.dtype} before they are rounded; of a {saved} folder a packer rounds "
                "the values as they are, and about 1 % of them to another number"
            )
    return None


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
    """Return the injection of each profile that is named by a mode, or is one of the suite's own."""
    own, names = evaluation.injections, evaluation.all_profiles
    named = {name: Injection.named(name, evaluation.deployment) for name in names if name in MODES and name != "none"}
    return named | {name: own[name] for name in names if name in own}


def _fate(injection: Injection | None) -> Fate:
    if injection is None or not injection.formats:
        return Fate("-", "full precision", "as it is")
    if rounds_twice(injection):
        return Fate("-", injection.checkpoint_mode or "of no mode", "nothing", TWICE)
    mode, name = injection.checkpoint_mode, injection.deployment or f"{UNNAMED} (not named)"
    if mode is None:
        return Fate(name, "of no mode", "not known")
    kernel, served = (deployment := DEPLOYMENTS[injection.deployment or UNNAMED]).kernel, deployment.served(mode)
    if mode not in SERVED_MODES:
        return Fate(name, mode, "nothing", deployment.sentence(mode))
    if served is None:
        return Fate(name, mode, "not looked up")
    note = f"{mode} on {kernel.hardware}: {served.note}" if served.note else ""
    return Fate(name, mode, served.mode or "nothing", note)
