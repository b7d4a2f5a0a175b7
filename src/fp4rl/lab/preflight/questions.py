"""Checks of what is asked: arms that differ in their factors alone, seeds and problems enough for a word."""

from collections.abc import Iterator
from math import sqrt

from fp4rl.lab.compare.controls import missing_controls
from fp4rl.lab.compare.differing import refused_beforehand
from fp4rl.lab.preflight.rows import Check, Row, Subject, merged
from fp4rl.lab.serving import of_profiles
from fp4rl.spec.experiment import Experiment, Suite
from fp4rl.spec.words import counted

_Z = 1.96  # of a 95 % interval
_FEW = 200  # problems, below which a run's own accuracy is known to 7 points at best
_SEEDS = 2  # the fewest of which a spread can be known


def differing(subject: Subject) -> Iterator[Row]:
    """Hold the arms of every question against its factors: steps, schedules and budgets are among their keys."""
    suite, expected = subject.described, "arms of a question differ in its factors alone"
    if not isinstance(suite, Suite) or not suite.comparisons:
        return
    refused = [*refused_beforehand(suite)]
    yield from (Row("warn", line, expected, "name the factor, or make the arms alike") for line in refused)
    if not refused:
        yield Row("pass", f"{counted(len(suite.comparisons), 'question')}, none with another difference", expected)


def budgets(subject: Subject) -> Iterator[Row]:
    """Count what both sides of every question train, with all stages, and look for a control that trains as long."""
    suite, expected = subject.described, "a control that trains as long as the treatment, by such a schedule"
    if not isinstance(suite, Suite) or not suite.comparisons:
        return
    missing = [*missing_controls(suite, subject.root)]
    yield from (Row("warn", each.sentence(), expected, "paste what `fp4rl plan` prints") for each in missing)
    if not missing:
        yield Row("pass", f"{counted(len(suite.comparisons), 'question')}, none that lacks it", expected)


def seeds(subject: Subject) -> Iterator[Row]:
    """Count the seeds of a suite that asks questions: one earns no word."""
    suite, expected = subject.described, f"{_SEEDS} or more, since the seed is what is repeated"
    if isinstance(suite, Suite) and suite.comparisons:
        number = len({run.seed for run in subject.runs})
        if number >= _SEEDS:
            yield Row("pass", f"{counted(number, 'seed')} an arm", expected)
        else:
            yield Row("warn", f"{counted(number, 'seed')} an arm", expected, "seeds=[0,1,2]; `fp4rl power` counts them")


def sample(subject: Subject) -> Iterator[Row]:
    """Compute the 95 % interval of one run's accuracy, at its widest, from the number of problems."""
    yield from merged((arm, _interval(own.evaluation.count)) for arm, own in subject.arms.items())


def half_width(problems: int) -> float:
    """Return half of the 95 % interval of an accuracy from so many problems, at its widest, in points."""
    return 100 * _Z * sqrt(0.25 / problems)


def _interval(problems: int) -> Row:
    measured = f"{counted(problems, 'problem')}: the accuracy of a run is known to +-{half_width(problems):.1f} points"
    enough = problems >= _FEW
    cure = "" if enough else "raise evaluation.count"
    return Row("pass" if enough else "warn", measured, f"{_FEW} problems or more", cure)


def reference(subject: Subject) -> Iterator[Row]:
    """Look for an unrounded accuracy at step 0, without which a low score may be the format of answers alone."""
    rounds = any(own.injection is not None and own.injection.formats for own in subject.arms.values())
    if not rounds:
        return
    full = [arm for arm, own in subject.arms.items() if "full" in own.evaluation.profiles]
    expected = "an arm that is judged unrounded, at step 0 too"
    if full:
        yield Row("pass", f"judged unrounded: {', '.join(full)}", expected)
    else:
        yield Row("warn", "no arm is judged unrounded", expected, "evaluation.profiles: [full, deployment]")


def noise_in_evaluation(subject: Subject) -> Iterator[Row]:
    """Name every profile under which hardware errors act: their accuracy is not that of the policy."""
    yield from merged((arm, _noisy_profiles(own)) for arm, own in subject.arms.items())


def _noisy_profiles(experiment: Experiment) -> Row:
    expected = "the profiles that are meant to be noisy, and no other"
    own = {"deployment": experiment.injection, **of_profiles(experiment.evaluation)}
    profiles = experiment.evaluation.all_profiles
    drawn = [name for name in profiles if (judged := own.get(name)) and "errors" in judged.acts_in("evaluation")]
    if drawn:
        cure = "injection.apply_during.errors: without evaluation"
        return Row("warn", f"hardware errors act while judging as {', '.join(drawn)}", expected, cure)
    matmul = [name for name in profiles if "=" in name]
    meant = f"; noise by name: {', '.join(matmul)}" if matmul else "; no noise in any"
    return Row("pass", f"profiles {', '.join(name for name in profiles if name not in matmul)}{meant}", expected)


CHECKS = (
    Check("questions", ("P20", "P46"), differing),
    Check("budgets", ("P46",), budgets),
    Check("seeds", ("P21",), seeds),
    Check("sample", ("P34",), sample),
    Check("reference", ("P22",), reference),
    Check("noise judged", ("P07",), noise_in_evaluation),
)
