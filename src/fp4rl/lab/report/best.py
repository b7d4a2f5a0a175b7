"""The best number of each category over all suites of a folder, and of each category of the reported experiments."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fp4rl.lab.catalogue.reported import reported
from fp4rl.lab.files import OnDamaged, tell
from fp4rl.lab.report.scores import Mean, scores
from fp4rl.lab.suites import SuiteRuns, read_suite


@dataclass(frozen=True)
class OwnBest:
    """The highest mean of a category: a task and model, the precision that training rounded to, and that of the number.

    `of`: how many arms with a mean the category has. The best of many is too high by chance alone.
    """

    task: str
    trained_under: str
    measured_under: str
    name: str
    accuracy: Mean
    of: int


@dataclass(frozen=True)
class ReportedBest:
    """The highest reported number of a model, format and mode (`category`), of the experiments that were completed;
    `confounds` speak against it."""

    model: str
    category: str
    id: str
    accuracy: float
    of: int
    confounds: tuple[str, ...]


def own_best(root: Path, on_damaged: OnDamaged | None = None) -> list[OwnBest]:
    """Return the best of every category over the suites below `root`; runs without evidence do not count."""
    best: dict[tuple[str, str, str], OwnBest] = {}
    for file in sorted(root.glob("*/suite.yaml")):
        suite = read_suite(file.parent, curves=False)
        tell((run.damage for run in suite.runs if run.damage is not None), on_damaged)
        for own in _of_suite(suite):
            key = own.task, own.trained_under, own.measured_under
            known = best.get(key)
            better = known is None or own.accuracy.value > known.accuracy.value
            kept = own if better else known
            assert kept is not None
            best[key] = OwnBest(*key, kept.name, kept.accuracy, 1 + (known.of if known else 0))
    return sorted(best.values(), key=lambda own: (own.task, own.trained_under, -own.accuracy.value))


def reported_best() -> list[ReportedBest]:
    """Return the best reported number of each model, format and mode, of the experiments that were completed."""
    groups: dict[tuple[str, str], list[tuple[float, str, tuple[str, ...]]]] = {}
    for own in reported().values():
        if own.accuracy is not None and own.status == "completed":
            words = (own.settings.get("format"), own.settings.get("quant_mode"))
            category = " ".join(str(word) for word in words if word)
            groups.setdefault((str(own.settings.get("model")), category), []).append(
                (own.accuracy, own.id, own.confounds)
            )
    rows = ((category, max(own), len(own)) for category, own in sorted(groups.items()))
    return [ReportedBest(*category, name, value, of, confounds) for category, (value, name, confounds), of in rows]


def _of_suite(suite: SuiteRuns) -> Iterator[OwnBest]:
    for score in scores(suite.by_arm):
        experiment = suite.by_arm[score.arm][0].planned.experiment
        if score.after is None:
            continue
        trained = experiment.injection.name if experiment.injection is not None else experiment.model.dtype
        measured = _joined({profile.precision or profile.name for profile in score.profiles})
        model = experiment.model.path or experiment.model.embedded_word
        task = f"{experiment.task.name}, {Path(model).name}"
        yield OwnBest(task, trained or "unnamed", measured, f"{suite.folder.name}/{score.name}", score.after, 1)


def _joined(names: Iterable[str]) -> str:
    return " or ".join(sorted(names))
