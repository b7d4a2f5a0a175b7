"""From the words of a command line to the runs that they describe."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from fp4rl.cli.terminal import say_once
from fp4rl.lab.catalogue import Entry, entry, names
from fp4rl.lab.catalogue.rows import Scale
from fp4rl.lab.compare.differing import refused_beforehand
from fp4rl.lab.epochs import in_steps
from fp4rl.lab.matrix import PlannedRun, planned, single
from fp4rl.lab.provenance import missing_files
from fp4rl.lab.spec_warnings import spec_warnings
from fp4rl.rl.rewards import REWARDS
from fp4rl.spec.errors import InvalidValueError, NotFoundError, UserError, nearest
from fp4rl.spec.experiment import Experiment, Suite
from fp4rl.spec.load import former_words, load_spec


def source_of(spec: Path, scale: Scale | None = None) -> Entry:
    """Return a spec file, or a suite of the catalogue by its name (`catalogue/quickstart`), at a scale if it has some.

    Raises InvalidValueError for the scale of what has none.
    """
    of_catalogue = not (spec.exists() or spec.suffix) and (spec.parent.name == "catalogue" or spec.name in names())
    if of_catalogue:
        return entry(spec.name, scale)
    if scale is not None:
        raise InvalidValueError(f"--scale {scale}: {spec} is a file and has one scale; leave it out")
    return Entry(spec)


def described_by(spec: Path, overrides: list[str], scale: Scale | None = None) -> Suite | Experiment:
    """Load the suite or experiment that a file, or a name of the catalogue, describes; former names in it are said."""
    source = source_of(spec, scale)
    described = load_spec(source.path, overrides, source.content)
    say_once(former_words(source.path if source.content is None else None, overrides), f"{spec}: ")
    if isinstance(described, Suite):
        say_once(_without_effect(source, overrides, described))
    return in_steps(described)


def _without_effect(source: Entry, overrides: list[str], suite: Suite) -> Iterator[str]:
    """Yield a line for each override of the base that leaves every run as it is."""
    runs = planned(suite)
    for number, word in enumerate(overrides):
        key = word.partition("=")[0]
        if key.partition(".")[0] in Suite.model_fields:
            continue
        try:
            without = load_spec(source.path, [*overrides[:number], *overrides[number + 1 :]], source.content)
        except UserError:  # it is this word that makes the others fit
            continue
        if isinstance(without, Suite) and planned(without) == runs:
            cure = "" if word.startswith("+") else f" (arms.NAME.{key} changes an arm)"
            yield f"{word} changes no run: that is so already, or every arm or an axis sets it itself{cure}"


def runs_described(described: Suite | Experiment, name: str) -> tuple[PlannedRun, ...]:
    """Return the runs of a suite, or an experiment of its own as the single run of a suite called `name`."""
    return planned(described) if isinstance(described, Suite) else (single(described, name),)


def selected(runs: Sequence[PlannedRun], arms: Sequence[str], seeds: Sequence[int]) -> tuple[PlannedRun, ...]:
    """Return the runs of these arms and seeds; all where none are named. Raises NotFoundError for one that is not
    planned."""
    known_arms, known_seeds = list(dict.fromkeys(run.arm for run in runs)), sorted({run.seed for run in runs})
    for arm in arms:
        if arm not in known_arms:
            raise NotFoundError(f"--arm {arm}: no such arm{nearest(arm, known_arms)}")
    for seed in seeds:
        if seed not in known_seeds:
            raise NotFoundError(f"--seed {seed}: the seeds are {known_seeds}; seeds=[{seed}] (of one run: seed={seed})")
    return tuple(run for run in runs if run.arm in (arms or known_arms) and run.seed in (seeds or known_seeds))


def require_here(runs: Iterable[PlannedRun]) -> None:
    """Raise NotFoundError for the first path that the runs name and that does not exist on this machine."""
    gone = missing_files(runs)
    if gone:
        raise NotFoundError(f"{gone[0]}{f' (and {len(gone) - 1} more)' if len(gone) > 1 else ''}")


def own_code(runs: Iterable[PlannedRun]) -> list[str]:
    """Return a line for each piece of the user's own code that the runs load."""
    names = dict.fromkeys(reward.name for run in runs for reward in run.experiment.training.all_rewards)
    return [
        f"the reward {name} is Python code of your own: it is loaded and run with all your rights"
        for name in names
        if name not in REWARDS
    ]


def warnings_of(runs: Iterable[PlannedRun], described: Suite | Experiment) -> list[str]:
    """Return warnings about the arms of some runs, and the questions of their suite: what is hardly ever meant."""
    refused = refused_beforehand(described) if isinstance(described, Suite) else ()
    return [*spec_warnings({run.arm: run.experiment for run in runs}), *refused]


def runs_of(spec: Path, overrides: list[str]) -> tuple[PlannedRun, ...]:
    """Return the runs that a file, or a name of the catalogue, describes."""
    return runs_described(described_by(spec, overrides), spec.stem)


def is_spec(source: str) -> bool:
    """Return whether a verb's first word names a spec file or a suite of the catalogue, not a model."""
    return Path(source).suffix in (".yaml", ".yml") or Path(source).parent.name == "catalogue"


def run_described(source: str, overrides: list[str], arm: str | None) -> PlannedRun:
    """Return the first run of the arm that is named, else of the first arm that rounds something, else of the first."""
    runs = runs_of(Path(source), overrides)
    arms = list(dict.fromkeys(run.arm for run in runs))
    if arm is not None and arm not in arms:
        raise NotFoundError(f"{source} has no arm {arm!r}{nearest(arm, arms)}")
    chosen = [run for run in runs if run.arm == arm] or [run for run in runs if run.experiment.injection] or runs
    return chosen[0]
