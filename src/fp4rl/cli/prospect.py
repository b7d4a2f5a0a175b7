"""What a suite expects, what others reported of it, in which bands its numbers lie, and what comes next."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp4rl.cli.terminal import console, print_indented, print_json
from fp4rl.lab.catalogue.reported import reported_as
from fp4rl.lab.suites import read_suite
from fp4rl.spec.criteria import Criterion
from fp4rl.spec.digest import digest
from fp4rl.spec.experiment import Experiment, Suite
from fp4rl.spec.words import counted

if TYPE_CHECKING:
    from fp4rl.lab.bands import Banded
    from fp4rl.lab.statistics.seeds import Spread


def print_expected(suite: Suite) -> None:
    """Print what the suite is, its prediction, what the documents reported, and its bands."""
    if suite.about:
        console().print(f"{suite.suite}: {suite.about}")
    if suite.prediction:
        print_indented(("predicted", "bold"), f" {suite.prediction}")
    for name in suite.reported:
        print_indented(("reported", "bold"), f" {reported_as(name).sentence()}")
    for criterion in suite.criteria:
        print_indented(("bands", "bold"), f" {_bands(criterion)}")


def print_power(suite: Suite, experiment: Experiment, ledger: str | Path) -> None:
    """Print what the suite's seeds can show, by the spread of repeats on its task and model in the ledger."""
    if not suite.comparisons:
        return
    seeds, questions = len(suite.seeds), len(suite.comparisons)
    if seeds < 2:
        print_indented(("power", "bold"), " one seed an arm shows differences and never an effect", by=0)
        return
    spread = _spread(experiment, ledger)
    if spread is None or spread.sd == 0:
        cure = "`fp4rl power POINTS --spread SD` computes with a spread of one's own"
        print_indented(("power", "bold"), f" not known, no repeats of this task and model in the ledger; {cure}", by=0)
        return
    from fp4rl.lab.statistics.power import difference_seen, power

    alpha = 0.05 / questions
    least = difference_seen(seeds, spread.sd, alpha=alpha)
    groups, family = counted(spread.groups, "group"), counted(questions, "question")
    basis = f"spread {spread.sd:.2f} points in {groups} of repeats, {family}"
    print_indented(
        ("power", "bold"), f" {counted(seeds, 'seed')} an arm see {least:.1f} points in 80 of 100 tries ({basis})", by=0
    )
    for question in suite.comparisons:
        if question.margin is not None:
            seen = power(seeds, 0.0, spread.sd, alpha=alpha, margin=100 * question.margin)
            of = f"{question.treatment} that is as good as {question.control}"
            shown = f"{100 * seen:.0f} of 100 tries show that it reaches it within {100 * question.margin:g} points"
            print_indented(f"of a {of}, {shown}")


def _spread(experiment: Experiment, ledger: str | Path) -> "Spread | None":
    from fp4rl.lab.ledger.query import known_spread

    spec = experiment.model_dump(mode="json")
    return known_spread(ledger, digest(spec["task"]), digest(spec["model"]))


def print_next(described: Suite | Experiment, root: Path, *, as_json: bool = False) -> None:
    """Print in which band each criterion's number lies, and what that band calls for."""
    if as_json:
        print_json(_as_dicts(described, root))
        return
    for measured in _measured_in(described, root):
        print_indented(("measured", "bold"), f" {measured.sentence()}")
        if measured.follow_up is not None:
            follow = measured.follow_up
            print_indented(("next", "bold"), f" {', '.join(follow.do)}: {follow.why}", by=4)
        elif measured.band is not None:
            print_indented("nothing is planned for that band; `comparisons` give the verdict", by=4)


def _measured_in(described: Suite | Experiment, root: Path) -> "tuple[Banded, ...]":
    """Return the criteria of a suite with what its folder below `root` gives; none for a single experiment."""
    from fp4rl.lab.bands import Banded, banded

    if not isinstance(described, Suite) or not described.criteria:
        return ()
    folder = root / described.suite
    if not (folder / "suite.yaml").is_file():
        return tuple(Banded(criterion, 0) for criterion in described.criteria)
    return banded(read_suite(folder), described.criteria)


def _as_dicts(described: Suite | Experiment, root: Path) -> list[dict[str, Any]]:
    """Return the same as plain values."""
    return [
        measured.criterion.model_dump(mode="json")
        | {"value": measured.value, "low": measured.low, "high": measured.high, "seeds": measured.seeds}
        | {"band": measured.band, "possible": list(measured.possible), "refused": measured.refused}
        for measured in _measured_in(described, root)
    ]


def _bands(criterion: Criterion) -> str:
    parts, before = [], None
    for band, limit in criterion.bands.items():
        parts.append(f"{band} {f'from {limit:g}' if limit is not None else f'below {before:g}'}")
        before = limit
    of = f"{criterion.of} minus {criterion.against}" if criterion.against else criterion.of
    where = "at the end" if criterion.step is None else f"at step {criterion.step}"
    return f"of {of}, {criterion.metric} {where}: {', '.join(parts)}"
