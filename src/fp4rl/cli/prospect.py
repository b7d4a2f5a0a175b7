"""What a suite expects, what others reported of it, in which bands its numbers lie, and what comes next."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp4rl.cli.terminal import console, print_indented, print_json
from fp4rl.lab.catalogue.reported import reported_as
from fp4rl.lab.suites import read_suite
from fp4rl.spec.criteria import Criterion
from fp4rl.spec.experiment import Experiment, Suite

if TYPE_CHECKING:
    from fp4rl.lab.bands import Banded


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


def print_next(described: Suite | Experiment, root: Path, *, as_json: bool = False) -> None:
    """Print in which band each criterion's number lies, and what that band calls for."""
    if as_json:
        print_json(_as_dicts(described, root))
        return
    for measured in _measured_in(described, root):
        print_indented((measured.band or "open", "bold"), f" {measured.sentence()}")
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
        | {"band": measured.band, "possible": list(measured.possible)}
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
