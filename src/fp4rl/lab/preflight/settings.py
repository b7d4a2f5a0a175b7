"""Checks of settings: schedules that act, keys that act, evaluations that come to the last step. No model is needed."""

from collections.abc import Callable, Iterator
from math import isfinite

from fp4rl.lab.preflight.rows import Check, Row, Subject, merged
from fp4rl.lab.spec_warnings import SOURCES, by_line, idle_settings
from fp4rl.noise.schedule import asked_sigma
from fp4rl.spec.experiment import Experiment
from fp4rl.spec.words import counted


def warned(source: str, expected: str, measured: Callable[[Experiment], str | None]) -> Callable[..., Iterator[Row]]:
    """Return a check that warns of each line of a source of `spec_warnings`, and passes with what was `measured`."""

    def run(subject: Subject) -> Iterator[Row]:
        lines = by_line(SOURCES[source], subject.arms)
        yield from (Row("warn", line, expected, arms=tuple(arms)) for line, arms in lines)
        if not lines and (words := subject.each(measured)):
            yield Row("pass", words, expected)

    return run


def schedule(subject: Subject) -> Iterator[Row]:
    """Build every schedule of noise over the steps that will be done, and look at each of its values."""
    noisy = ((arm, own) for arm, own in subject.arms.items() if own.noise is not None)
    yield from merged((arm, row) for arm, own in noisy for row in _values(own))


def _values(experiment: Experiment) -> Iterator[Row]:
    noise, steps = experiment.noise, experiment.training.steps
    assert noise is not None
    sigmas = [asked_sigma(noise, step, steps) for step in range(steps)]
    expected = "finite, above 0 somewhere, to the last value of the schedule"
    if noise.control == "sigma_zero":
        yield Row("fail" if any(sigmas) else "pass", "a control: sigma 0 at every step", "0 at every step")
    elif not all(isfinite(sigma) and sigma >= 0 for sigma in sigmas):
        yield Row("fail", f"sigma is {min(sigmas)} in some of {counted(steps, 'step')}", expected, "name other ends")
    elif not any(sigmas):
        cure = f"training.steps: {noise.schedule.steps_for_all} reaches every value of it"
        yield Row("fail", f"sigma is 0 in all {counted(steps, 'step')}", expected, cure)
    elif lines := [*SOURCES["schedule"](experiment)]:
        yield from (Row("warn", line, expected, "more steps, or fewer stages") for line in lines)
    else:
        silent = sum(not sigma for sigma in sigmas)
        positive = [sigma for sigma in sigmas if sigma]
        measured = f"sigma {max(positive):.4g} to {min(positive):.4g} in {counted(steps, 'step')}, {silent} of them 0"
        yield Row("pass", measured, expected)


def keys(subject: Subject) -> Iterator[Row]:
    """Name every key that is set and cannot act in any arm that sets it; unknown ones are refused when read."""
    expected = "each key that is set acts in an arm that sets it"
    idle = [*idle_settings(subject.arms)]
    yield from (Row("warn", line, expected, "drop it", tuple(arms)) for line, arms in idle)
    if not idle:
        yield Row("pass", "every key is known, and none that is set is idle", expected)


def _judged_at(experiment: Experiment) -> str:
    steps, every = experiment.training.steps, experiment.evaluation.test_freq
    between = f", each {every}" if every else ""
    return f"judged at steps 0{between} and {steps}"


def _updates(experiment: Experiment) -> str:
    number = experiment.training.updates_per_step
    return f"{counted(number, 'update')} from each batch{'' if number == 1 else ', which clipping can bound'}"


def _precision(experiment: Experiment) -> str | None:
    injection = experiment.injection
    if injection is None or injection.schedule is None:
        return None
    points = injection.schedule.points.items()
    return ", ".join(f"{point} in its own format from step {own.from_step + own.over} on" for point, own in points)


def _recipe(experiment: Experiment) -> str:
    recipe = experiment.training
    return f"lr rises in {recipe.lr_warmup_steps} of {counted(recipe.steps, 'step')}"


CHECKS = (
    Check("schedule", ("P01", "P02"), schedule),
    Check(
        "precision", ("P02",), warned("precision", "the deployed format in a fifth of the steps or more", _precision)
    ),
    Check("keys", ("P04", "P12", "P36"), keys),
    Check(
        "recipe", ("P28", "P32"), warned("recipe", "warm-up in at most a fifth; checkpoints within the run", _recipe)
    ),
    Check(
        "updates",
        ("P05",),
        warned(
            "updates",
            "updates that the dtype of the masters can hold",
            lambda own: f"masters in {own.model.master_dtype}",
        ),
    ),
    Check("evaluations", ("P19",), warned("evaluations", "step 0, even parts, the last step", _judged_at)),
    Check(
        "batch",
        ("P40",),
        warned("batch", "no scale that tokens of a call share", lambda _: "each token is rounded alone"),
    ),
    Check("loss", ("P36",), warned("loss", "clipping and KL that can act", _updates)),
)
