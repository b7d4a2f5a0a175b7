"""Checks of the data: problems that are learned and judged, and schedules that follow how often they come again."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from fp4rl.lab.preflight.questions import half_width
from fp4rl.lab.preflight.rows import Check, Row, Subject, merged
from fp4rl.models.load import load_tokenizer
from fp4rl.noise.schedule import ScheduleProgress, StageLog
from fp4rl.rl.evaluate import evaluation_runner
from fp4rl.rl.problems import problems_of
from fp4rl.spec.digest import digest
from fp4rl.spec.errors import NotFoundError
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.model import Model
from fp4rl.spec.noise import EpochAware
from fp4rl.spec.task import Problem
from fp4rl.spec.words import counted
from fp4rl.tasks.overlap import overlap


def is_missing(model: Model) -> bool:
    """Return whether a model's folder is missing, which the check of files says once."""
    return model.path is not None and not Path(model.path).is_dir()


def without_tokenizer(model: Model) -> str | None:
    """Return why no prompt can be tokenized here; None where it can."""
    if is_missing(model):
        return f"model folder {model.path!r} does not exist"
    try:
        if model.path is not None:
            load_tokenizer(Path(model.path))
    except NotFoundError as error:
        return str(error)
    return None


def problems(subject: Subject) -> Iterator[Row]:
    """Hold the problems that are learned against those that are judged, in substance, and these among themselves."""
    looked: dict[str, list[Row]] = {}
    for own in subject.arms.values():
        if (key := _split(own)) not in looked:
            looked[key] = [*_shared(own)]
    yield from merged((arm, row) for arm, own in subject.arms.items() for row in looked[_split(own)])


def _split(experiment: Experiment) -> str:
    """Return a digest of what decides which problems an arm learns and is judged on."""
    judged, recipe = experiment.evaluation, experiment.training
    limits = recipe.filter_overlong_prompts, recipe.max_prompt_length
    return digest([experiment.task.model_dump(mode="json"), experiment.model.path, judged.split, judged.count, limits])


def _shared(experiment: Experiment) -> Iterator[Row]:
    expected = "no problem that is the same in substance"
    if why := experiment.training.filter_overlong_prompts and without_tokenizer(experiment.model):
        yield Row("waits", why, expected)
        return
    learned, judged = problems_of(experiment, "train"), evaluation_runner(experiment).problems
    shared = overlap(experiment.task, learned, judged)
    measured = f"{len(learned)} learned, {len(judged)} judged, {len(shared)} shared"
    if shared:
        yield Row("fail", f"{measured}, such as {shared[0]!r}", expected, "cut the splits by substance")
    else:
        yield Row("pass", measured, expected)
    yield _distinct(experiment, judged)


def _distinct(experiment: Experiment, judged: Sequence[Problem]) -> Row:
    """Count the problems that are judged, each substance once: what comes twice tells nothing more."""
    number, count = len({experiment.task.substance(problem) for problem in judged}), experiment.evaluation.count
    measured = f"{counted(number, 'distinct problem')} judged: +-{half_width(number):.1f} points"
    expected = f"{count}, as evaluation.count says: +-{half_width(count):.1f} points"
    return Row(
        "pass" if number >= count else "fail", measured, expected, "" if number >= count else "drop what is twice"
    )


def draws(subject: Subject) -> Iterator[Row]:
    """Take each schedule of noise through the data, where dynamic sampling draws problems once to as often as it may.

    Steps are counted when they are done, so that data which come again move one schedule alone: the epoch-aware one.
    """
    noisy = ((arm, own) for arm, own in subject.arms.items() if own.noise is not None)
    yield from merged((arm, row) for arm, own in noisy for row in _draws(own))


def _draws(experiment: Experiment) -> Iterator[Row]:
    noise, recipe, expected = experiment.noise, experiment.training, "every value, however often problems are drawn"
    assert noise is not None
    if not isinstance(noise.schedule, EpochAware):
        yield Row("pass", f"{noise.schedule.kind} follows the steps that are done, not the data", expected)
        return
    if why := recipe.filter_overlong_prompts and without_tokenizer(experiment.model):
        yield Row("waits", why, expected)
        return
    problems = len(problems_of(experiment, "train"))
    most = recipe.filter_groups.max_num_gen_batches if recipe.filters else 1
    missed = {times: _missed(experiment, problems / times) for times in range(1, most + 1)}
    told = ", ".join(f"{len(values)} at {times} a step" for times, values in missed.items())
    measured = f"values of sigma that never come, of {counted(problems, 'problem')} by batches drawn: {told}"
    if any(missed.values()):
        yield Row(
            "warn", measured, expected, "more problems, fewer epochs, or a geometric schedule, which follows steps"
        )
    else:
        yield Row("pass", measured, expected)


def _missed(experiment: Experiment, problems: float) -> tuple[float, ...]:
    """Return the values of sigma that never come where each step draws one batch of so many problems."""
    noise, recipe, seen = experiment.noise, experiment.training, StageLog()
    assert noise is not None
    progress = ScheduleProgress.of(noise, recipe.steps)
    for step in range(recipe.steps):
        progress = progress.at(step, step * recipe.train_batch_size / problems)
        seen.note(progress.sigma(noise, step))
    return seen.missed(noise.schedule, recipe.steps) if noise.control != "sigma_zero" else ()


CHECKS = (
    Check("problems", ("P34", "P37", "P47"), problems),
    Check("draws", ("P02",), draws),
)
